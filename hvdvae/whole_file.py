"""Files that are written whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path

from hvdvae.errors import ConfigError


def write_whole(path: Path, text: str) -> None:
    """Put a file in the place of what is there; of a link, of the link alone. Local. Raises ConfigError naming it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("x", encoding="utf-8") as file:  # Follows no link.
            file.write(text)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
