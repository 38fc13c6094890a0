"""A gather whose errors name the file, whatever raised them."""

from hvdvae.data.source import Indices, Source, Values
from hvdvae.errors import DataError


def read(source: Source, examples: Indices) -> Values:
    """`source.gather(examples)`.

    Errors of the system become DataError; others keep their type and get a note.
    """
    try:
        return source.gather(examples)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{source.path}: reading failed ({error}); expected {len(examples)} examples") from error
    except Exception as error:
        error.add_note(f"while examples were read from {source.path}")
        raise
