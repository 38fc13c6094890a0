"""Files that are written whole or not at all."""

from contextlib import suppress
from pathlib import Path

from hvdvae.errors import ConfigError
from hvdvae.regular_file import open_new, temporary, why


def write_whole(path: Path, content: str | bytes) -> None:
    """Put a file in the place of what is there; of a link, of the link alone. Local. Raises ConfigError naming it."""
    draft = temporary(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with open_new(draft) as file:
            file.write(data)
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise ConfigError(f"cannot write {path}: {why(error, path)}") from error
