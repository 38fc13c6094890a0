"""What a monitor says when its file cannot be written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvdvae.errors import ConfigError
from hvdvae.regular_file import why


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, an OSError (a full disk, a folder that is gone) becomes a ConfigError that names the path."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {why(error, path)}. Checkpoints are untouched: free space or fix the folder, "
            "then continue with --resume"
        ) from error
