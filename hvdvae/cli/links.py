"""What a run writes stays in its folder: through a link it would change a file elsewhere."""

from collections.abc import Iterable
from pathlib import Path

from hvdvae.errors import ConfigError


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raises ConfigError for the first of `names` that is a symbolic link in `folder`, dangling or not. Local."""
    for name in names:
        path = folder / name
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a symbolic link to {path.readlink()}, expected a file or folder of its own: nothing is "
                "written through it; remove the link, or choose another folder with --out"
            )
