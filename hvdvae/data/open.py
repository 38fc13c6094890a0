"""One function from a name or a path to the three splits, refused here if they cannot be trained on."""

import re
from pathlib import Path

import numpy as np

from hvdvae.data import named
from hvdvae.data.check import check_finite, check_same_form
from hvdvae.data.dataset import Dataset
from hvdvae.data.idx import open_idx
from hvdvae.data.image_files import SUFFIXES, find_images
from hvdvae.data.images import open_images
from hvdvae.data.npy import open_npy, open_npz
from hvdvae.data.source import Source
from hvdvae.data.split import complete_splits, pick_splits, split_called
from hvdvae.data.values import check_exact, check_scale
from hvdvae.errors import ConfigError, DataError

HDF5_SUFFIXES = (".h5", ".hdf5")
_IDX_SPLIT = re.compile(r"(?:^|[_.-])(train|val|valid|validation|test|t10k)[_.-]images", re.IGNORECASE)
_IDX_FILE = re.compile(r"(\.idx|[.-]idx\d?-?ubyte|-ubyte)(\.gz)?$", re.IGNORECASE)


def open_dataset(name_or_path: str, *, validation: int | None = None, external_storage: bool = False) -> Dataset:
    """The data set of a name (digits, mnist, fashion-mnist) or path, split the same on every rank.

    A path is an IDX file, .npy, .npz, .h5 or .hdf5, or a folder of IDX files, of .npy files, or of images
    (also in subfolders train, validation, test); one that does not exist is looked for in $HVDVAE_DATA.
    `validation` is the count of examples to hold out of train where the data has no validation split.
    `external_storage`: numbers of an HDF5 file may lie in other files, any that it names (ConfigError where there is no
    HDF5 file). Every rank calls it. Blocks while files are read or downloaded, and floats are searched for NaN in
    bounded memory. Raises DataError naming the file.
    """
    if external_storage and not name_or_path.lower().endswith(HDF5_SUFFIXES):
        raise ConfigError(f"--external-storage is for HDF5 files, found --data {name_or_path}: drop one")
    if name_or_path == "digits":
        return _finished("digits", {"train": named.digits()}, validation)
    path = named.fetch(name_or_path) if name_or_path in named.NAMES else _existing(name_or_path)
    name = name_or_path if name_or_path in named.NAMES else path.name
    try:
        splits = _open_folder(path) if path.is_dir() else _open_file(path, external_storage)
    except OSError as error:
        raise DataError(f"{path}: {error}; expected a file or folder that this user may read") from error
    return _finished(name, splits, validation)


def _finished(name: str, splits: dict[str, Source], validation: int | None) -> Dataset:
    check_same_form(splits)
    for source in splits.values():
        check_finite(source)
        check_exact(source)
    if splits["train"].dtype == np.uint8:
        brightest = max(source.limits for source in splits.values())
        for source in splits.values():
            source.limits = brightest  # one scale for all splits, should one of them happen to hold only 0 and 1
            check_scale(source)
    train, held, test = complete_splits(splits, validation)
    return Dataset(name=name, train=train, validation=held, test=test, brought=tuple(splits))


def _existing(name_or_path: str) -> Path:
    root = named.data_folder()
    candidates = [Path(name_or_path).expanduser(), *([root / name_or_path] if root else [])]
    for path in candidates:
        if path.exists():
            return path
    raise DataError(
        f"{name_or_path}: found no such file or folder; expected one of {', '.join(named.NAMES)}, or a path: "
        "check --data" + ("" if root else ", or set HVDVAE_DATA to the folder that holds your data")
    )


def _open_file(path: Path, external_storage: bool) -> dict[str, Source]:
    suffix = path.suffix.lower()
    if not path.is_file():
        raise DataError(
            f"{path}: found no plain file; expected one, or a folder: a pipe or a device cannot be trained on"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: found an empty file; expected data")
    if suffix == ".npz":
        return open_npz(path)
    if suffix in HDF5_SUFFIXES:
        from hvdvae.data.hdf5 import open_hdf5  # here: h5py costs memory and time that others need not pay

        return open_hdf5(path, external_storage=external_storage)
    if suffix == ".npy":
        return {"train": open_npy(path)}
    if _IDX_FILE.search(path.name) or _IDX_SPLIT.search(path.name):
        return {"train": open_idx(path)}
    raise DataError(
        f"{path}: found a file of unknown kind; expected .npy, .npz, .h5, .hdf5, IDX (such as "
        "train-images-idx3-ubyte or .idx, plain or .gz) or a folder of these or of images: rename it or name "
        "another"
    )


def _open_folder(folder: Path) -> dict[str, Source]:
    entries = sorted(folder.iterdir())
    idx = [file for file in entries if file.is_file() and _IDX_FILE.search(file.name)]
    if idx:
        return {split: open_idx(file) for split, file in _idx_splits(folder, idx).items()}
    arrays = {file.stem: file for file in entries if file.is_file() and file.suffix.lower() == ".npy"}
    # Beside images an array that is not named for a split has their labels.
    if arrays and (any(map(split_called, arrays)) or not find_images(folder)):
        return {split: open_npy(arrays[key]) for split, key in pick_splits(list(arrays), str(folder)).items()}
    subfolders = [entry.name for entry in entries if entry.is_dir()]
    if "train" in map(split_called, subfolders):
        return {split: open_images(folder / name) for split, name in _image_splits(folder, subfolders).items()}
    if find_images(folder):
        return {"train": open_images(folder)}
    found = ", ".join(entry.name for entry in entries[:5]) or "nothing"
    raise DataError(
        f"{folder}: found {found}; expected IDX files (train-images-idx3-ubyte[.gz], t10k-images-...), .npy "
        f"files called train, validation, test, or images ({', '.join(sorted(SUFFIXES))}): name the "
        "folder that has them"
    )


def _image_splits(folder: Path, subfolders: list[str]) -> dict[str, str]:
    chosen = pick_splits(subfolders, str(folder))
    # A class may be called train: then the others are classes, too, and must not vanish.
    classes = [name for name in subfolders if name not in chosen.values() and find_images(folder / name)]
    if classes:
        raise DataError(
            f"{folder}: found {chosen['train']!r} for train beside images in {', '.join(classes)}; expected either "
            "splits (train, validation, test) or classes: rename it if it is a class, or move the others elsewhere"
        )
    return chosen


def _idx_splits(folder: Path, files: list[Path]) -> dict[str, Path]:
    chosen: dict[str, Path] = {}
    for file in files:
        match = _IDX_SPLIT.search(file.name)
        split = split_called(match.group(1)) if match else None
        if split is None:
            continue
        other = chosen.setdefault(split, file)
        # The plain file sorts before its .gz, and saves decompressing.
        if other != file and other.name != file.name.removesuffix(".gz"):
            raise DataError(f"{folder}: found both {other.name} and {file.name} for {split}; expected one: move one")
    if not chosen and len(files) == 1:
        return {"train": files[0]}
    if "train" not in chosen:
        found = ", ".join(file.name for file in files)
        raise DataError(f"{folder}: found {found}; expected a train-images IDX file: name that file or rename it")
    return chosen
