"""Whether the environment holds exactly the pins of the files given: `installed.py run.txt test.txt`.

Exit 1 and one line a difference. With --mend instead of files: forgets packages that were left torn.
"""

import csv
import importlib.metadata
import re
import shutil
import sys
import sysconfig
from pathlib import Path


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(files: list[str]) -> dict[str, str]:
    """Name -> version of every `name==version` line."""
    lines = [line for file in files for line in Path(file).read_text().splitlines()]
    requirements = [re.split("#| --", line)[0].strip() for line in lines]
    return {normal(text.split("==")[0]): text.split("==")[1] for text in requirements if text}


def differences(wanted: dict[str, str]) -> list[str]:
    """One line for each pin that is absent or of another version. A local part (+cpu) does not count."""
    found = {normal(dist.name): dist.version.split("+")[0] for dist in importlib.metadata.distributions()}
    return [
        f"{name}: {found.get(name, 'absent')}, expected {version}"
        for name, version in wanted.items()
        if found.get(name) != version
    ]


def mend() -> list[str]:
    """Remove the metadata of packages whose files are not all there, so that pip installs them; their names.

    pip writes RECORD last and takes a package with metadata for installed: one killed half way stays torn.
    """
    torn = []
    for info in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
        record = info / "RECORD"
        rows = csv.reader(record.read_text().splitlines()) if record.exists() else None
        if rows is None or not all(present(info.parent, row) for row in rows):
            torn.append(info.name.removesuffix(".dist-info"))
            shutil.rmtree(info)
    return torn


def present(root: Path, row: list[str]) -> bool:
    """Whether the file of a RECORD's row exists. Byte code may go at any time and comes back by itself."""
    return not row or row[0].endswith(".pyc") or (root / row[0]).exists()


def main(arguments: list[str]) -> int:
    """Exit status."""
    if arguments[:1] == ["--mend"]:
        for name in mend():
            print(f"install: {name} was left torn by an earlier install: installing it again")
        return 0
    lines = differences(pins(arguments))
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
