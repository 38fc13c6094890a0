"""Data sets by name: digits comes with scikit-learn; MNIST and Fashion-MNIST are found or downloaded.

They are looked for in $HVDVAE_DATA/NAME, then downloaded there (or into the user's cache), checked by md5.
"""

import gzip
import importlib.util
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hvdvae.data.source import ArraySource
from hvdvae.errors import DataError


class Remote(NamedTuple):
    """Where a set lies, mirrors in order, and the md5 of its files."""

    mirrors: tuple[str, ...]
    md5: dict[str, str]


REMOTES = {
    "mnist": Remote(
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        },
    ),
    "fashion-mnist": Remote(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        },
    ),
}
NAMES = ("digits", *REMOTES)


def digits() -> ArraySource:
    """The 1797 digits (1, 8, 8) that scikit-learn embeds, their values 0..16 scaled to uint8 0..255."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError("data digits: scikit-learn, which brings them, is not installed: run launch/install.sh")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        # To import scikit-learn would take each rank a second more.
        with gzip.open(file, "rt") as lines:
            images = np.loadtxt(lines, delimiter=",")[:, :-1].reshape(-1, 8, 8)
    else:
        from sklearn.datasets import load_digits

        images = load_digits().images
    return ArraySource(np.rint(images * (255 / 16)).astype(np.uint8), "digits (scikit-learn)")


def data_folder() -> Path | None:
    """$HVDVAE_DATA, if it is set."""
    value = os.environ.get("HVDVAE_DATA")
    return Path(value).expanduser() if value else None


def fetch(name: str) -> Path:
    """Folder with the files of the set `name`; downloads what is missing, which blocks. Any rank may call it.

    A file that is being downloaded gets its name only when its md5 is right. One that is there, packed or not, is
    taken as it is. Raises DataError if a download fails.
    """
    root, files = data_folder(), REMOTES[name].md5
    if root is not None and not _missing(root / name, files):
        return root / name
    import pooch  # type: ignore[import-untyped]  # here: only downloads need it

    pooch.get_logger().setLevel(logging.WARNING)
    folder = (root or Path(pooch.os_cache("hvdvae"))) / name
    # Some files of a set, as an interrupted copy leaves them, would be another set: a test cut from train.
    for file in _missing(folder, files):
        _retrieve(name, file, files[file], folder)
    return folder


def _missing(folder: Path, files: Iterable[str]) -> list[str]:
    """Files that are there neither as they are served nor unpacked."""
    return [file for file in files if not any((folder / one).is_file() for one in (file, file.removesuffix(".gz")))]


def _retrieve(name: str, file: str, md5: str, folder: Path) -> None:
    import pooch

    failures = []
    for mirror in REMOTES[name].mirrors:
        try:
            pooch.retrieve(mirror + file, known_hash=f"md5:{md5}", fname=file, path=folder)
            return
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong md5 is a ValueError
            failures.append(f"{mirror}{file}: {error}")
    raise DataError(
        f"{folder / file}: found neither the file nor a way to download it ({'; '.join(failures)}); expected "
        f"md5 {md5}: put the files of {name} into $HVDVAE_DATA/{name}, or name their folder with --data"
    )
