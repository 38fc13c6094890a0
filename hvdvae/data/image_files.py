"""Which files of a folder are its images, and which folders hold masks or labels of the others."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from hvdvae.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})

_ANNOTATION = "masks?|labels?|annotations?|segmentations?|seg|gt|ground[_-]?truths?|targets?|depths?|edges?|instances?"
_WORDS = re.compile(rf"(^|[^a-z])({_ANNOTATION}|images?|imgs?|inputs?|rgb)($|[^a-z])|segmentation|jpegimages", re.I)
"""Names of folders that hold one half of pairs. Folders of classes are called otherwise."""
_MARKED = re.compile(rf"^(.+?)[_\-. ]({_ANNOTATION})$", re.I)


def find_images(folder: Path) -> list[Path]:
    """Image files below `folder`, subfolders (classes) included, in an order that no file system changes.

    Links to folders are followed; names that begin with a dot are left out, as programs write them beside images.
    """
    return sorted(_below(folder, frozenset())) if folder.is_dir() else []


def _below(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    here = folder.resolve()
    if here in above:  # A link to a folder that it lies in.
        return
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.suffix.lower() in SUFFIXES and entry.is_file():
            yield entry
        elif entry.is_dir():
            yield from _below(entry, above | {here})


def check_no_pairs(folder: Path, files: Sequence[Path]) -> None:
    """Refuse images that others belong to, as their masks or labels (DataError naming both). Pure.

    Classes may well number their files alike: it takes equal names in folders called as images/ and masks/, a file
    called as 001_mask.png beside 001.png, or the files of a folder in two formats each.
    """
    names = [file.relative_to(folder) for file in files]
    for one, other in (_paired_folders(names), _marked_files(names), _two_formats(names)):
        if one is not None:
            raise DataError(
                f"{folder}: found {one} beside {other}: are those masks or labels of these? Expected images alone (or "
                "a folder for each class): name the folder of the images with --data, or move the others elsewhere"
            )


Pair = tuple[Path | None, Path | None]


def _paired_folders(names: Sequence[Path]) -> Pair:
    seen: dict[tuple[str, ...], Path] = {}
    # Each name once for each of its folders, with that folder left open.
    for name in sorted(names, key=lambda name: not any(map(_WORDS.search, name.parts[:-1]))):
        for place, part in enumerate(name.parts[:-1]):
            key = (*name.parts[:place], "*", *name.parts[place + 1 : -1], name.stem)
            other = seen.setdefault(key, name) if _WORDS.search(part) else seen.get(key, name)
            if other.parts[place] != part:
                return other, name
    return None, None


def _marked_files(names: Sequence[Path]) -> Pair:
    plain = {(name.parent, name.stem): name for name in names}
    for name in names:
        marked = _MARKED.match(name.stem)
        if marked and (name.parent, marked.group(1)) in plain:
            return plain[name.parent, marked.group(1)], name
    return None, None


def _two_formats(names: Sequence[Path]) -> Pair:
    folders: dict[Path, dict[str, dict[str, Path]]] = defaultdict(lambda: defaultdict(dict))
    for name in names:
        folders[name.parent][name.suffix.lower()][name.stem] = name
    for formats in folders.values():
        for suffix, mine in formats.items():
            for other, theirs in formats.items():
                if suffix != other and len(mine) > 1 and mine.keys() <= theirs.keys():
                    stem = min(mine)
                    return theirs[stem], mine[stem]
    return None, None
