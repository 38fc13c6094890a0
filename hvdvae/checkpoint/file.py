"""A checkpoint's file: safetensors, whose header has `format`, the JSON `record`, and `digest`.

The digest is the SHA-256 of record and tensors, in the order of their names. A file is written under another name,
flushed to the disk, then renamed; a crash at any moment leaves the earlier ones as they were. Tensors are written and
read one by one: the library's own functions hold all of them in memory, or map the file, which counts as memory too.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from hvdvae.checkpoint.pieces import Checkpoint, Draft
from hvdvae.errors import CheckpointError
from hvdvae.regular_file import open_new, open_to_read, temporary, why

FORMAT = "hvdvae-checkpoint-1"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def save(path: Path, checkpoint: Checkpoint | Draft) -> None:
    """Write atomically, tensor by tensor. One rank's affair; the others `ask` their drafts.

    Raises CheckpointError naming the file, with nothing changed.
    """
    pieces, record = checkpoint.draft() if isinstance(checkpoint, Checkpoint) else checkpoint
    written = json.dumps(record)
    digest = hashlib.sha256(written.encode())
    draft = temporary(path)
    left = iter(sorted(pieces))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_new(draft) as file:
            # The digest is known at the end only; it is as long as this.
            file.write(_head(pieces, written, "0" * 64))
            for name in left:
                tensor = pieces[name].get().detach().cpu().contiguous()
                _digest(digest, name, tensor)
                file.write(_bytes(tensor))
                del tensor  # Before the next one is there.
            file.seek(0)
            file.write(_head(pieces, written, digest.hexdigest()))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        for name in left:  # Other ranks wait in those that are held together.
            pieces[name].get()
        raise CheckpointError(
            f"cannot write checkpoint {path}: {why(error, path)}. Earlier checkpoints are untouched: free space "
            "or fix the folder, then continue with --resume"
        ) from error
    finally:
        with suppress(OSError):
            draft.unlink()


def load(path: Path) -> Checkpoint:
    """Read and verify. Raises CheckpointError naming the file where it is missing, torn, foreign or altered."""
    with opened(path) as file:
        return Checkpoint({name: file.read(name) for name in file.shapes}, file.record, str(path))


class _Torn(Exception):
    """The file does not hold what it says."""


class File:
    """An open checkpoint."""

    def __init__(self, file: BinaryIO) -> None:
        """Read the header of a file that the library has found in order. Raises ValueError or KeyError."""
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
        metadata = entries.pop("__metadata__", {})
        self.format, self.digest = metadata.get("format"), metadata.get("digest")
        self.text: str = metadata.get("record", "")
        self._record = json.loads(self.text) if self.format == FORMAT else {}
        if not isinstance(self._record, dict):
            raise ValueError(f"its record is a {type(self._record).__name__}, expected a mapping")
        self.dtypes = {name: _DTYPES[entries[name]["dtype"]] for name in sorted(entries)}
        self.shapes = {name: tuple(entries[name]["shape"]) for name in sorted(entries)}
        """Of all tensors, in the order of names."""
        self._starts = {name: 8 + length + entries[name]["data_offsets"][0] for name in entries}
        self._file = file

    @property
    def record(self) -> dict[str, Any]:
        """Everything but the tensors."""
        return self._record

    def read(self, name: str) -> Tensor:
        """One tensor, a copy. Local."""
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self._file.seek(self._starts[name])
        room = _bytes(tensor)
        if self._file.readinto(room) != len(room):  # type: ignore[attr-defined]
            raise _Torn(f"it ends within {name}")
        return tensor


@contextmanager
def opened(path: Path) -> Iterator[File]:
    """A checkpoint's file, verified; a tensor of it at a time is in memory meanwhile. Raises as `load`."""
    with _stream(path) as stream:
        yield _verified(path, stream)


@contextmanager
def opened_again(path: Path, digest: str) -> Iterator[File]:
    """A file that was verified before, with this digest. Raises CheckpointError where it is another one now."""
    with _stream(path) as stream:
        file = _read_header(path, stream)
        if file.digest != digest:
            raise CheckpointError(f"{path} has changed while it was read: let one run at a time write to its folder")
        yield file


@contextmanager
def _stream(path: Path) -> Iterator[BinaryIO]:
    try:
        with open_to_read(path) as stream:
            yield stream
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except _Torn as error:
        raise CheckpointError(
            f"{path} is torn or not a checkpoint ({error}): name another one, or delete it if it is one of a run's, so "
            "that an earlier one is used"
        ) from error


def _read_header(path: Path, stream: BinaryIO) -> File:
    try:
        with safetensors.safe_open(path, framework="np"):  # Whether names, shapes and lengths go together.
            return File(stream)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Torn(str(error)) from error


def _verified(path: Path, stream: BinaryIO) -> File:
    file = _read_header(path, stream)
    digest = hashlib.sha256(file.text.encode())
    for name in file.shapes:
        _digest(digest, name, file.read(name))
    if file.format != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of hvdvae: format is {file.format!r}, expected {FORMAT!r}")
    if file.digest != digest.hexdigest():
        raise CheckpointError(f"{path} is damaged: its content does not match its digest. Delete it")
    return file


def _digest(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _head(pieces: dict[str, Any], record: str, digest: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, "record": record, "digest": digest}}
    start = 0
    for name in sorted(pieces):
        shape, dtype, _ = pieces[name]
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        if dtype not in _NAMES:
            raise CheckpointError(
                f"a checkpoint cannot hold {name}: it is {dtype}, expected one of {', '.join(_DTYPES)}"
            )
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
