"""Checkpoints: one safetensors file each, whole or not there, never unpickled.

A file holds named tensors and, in its header, `format`, a JSON `record` (step, position, configuration, ...) and
`digest`, the SHA-256 of record and tensors. It is written under another name, flushed to the disk, then renamed; a
crash at any moment leaves the earlier checkpoints as they were.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hvdvae.dtypes import DTYPES
from hvdvae.errors import CheckpointError
from hvdvae.world import World

FORMAT = "hvdvae-checkpoint-1"
_NAME = re.compile(r"step-(\d+)\.safetensors")


class Checkpoint(NamedTuple):
    """Named tensors, and a JSON-able record of everything else."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    name: str = "the checkpoint"
    """For messages: the file that it came from."""


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically. Local; call it on one rank. Raises CheckpointError naming the file, with nothing changed."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    record = json.dumps(checkpoint.record)
    header = {"format": FORMAT, "record": record, "digest": _digest(tensors, record)}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            _write(file, tensors, header)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write checkpoint {path}: {error.strerror or error}. Earlier checkpoints are untouched: free space "
            "or fix the folder, then continue with --resume"
        ) from error


def load(path: Path) -> Checkpoint:
    """Read and verify. Raises CheckpointError naming the file where it is missing, torn, foreign or altered."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    return parse(data, str(path))


def parse(data: bytes, name: str) -> Checkpoint:
    """A checkpoint from a file's bytes, verified. `name` is for messages. Raises CheckpointError."""
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{name} is torn or not a checkpoint ({error}): delete it, an earlier one is used then"
        ) from error
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{name} is not a checkpoint of hvdvae: format is {header.get('format')!r}, expected {FORMAT!r}"
        )
    record = header.get("record", "")
    if header.get("digest") != _digest(tensors, record):
        raise CheckpointError(f"{name} is damaged: its content does not match its digest. Delete it")
    return Checkpoint(tensors, json.loads(record), name)


def spread(path: Path | None, world: World) -> Checkpoint | None:
    """Rank 0's checkpoint (None: there is none) on all ranks, so that only rank 0 needs to see the file.

    Blocks; every rank must call it. The file's bytes are in memory twice meanwhile.
    """
    data = bytearray()
    if world.is_first and path is not None:
        load(path)
        data = bytearray(path.read_bytes())
    length = world.broadcast_(torch.tensor([len(data)]), what="broadcast of the checkpoint's size")
    if not int(length):
        return None
    content = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(int(length), dtype=torch.uint8)
    world.broadcast_(content, what="broadcast of the checkpoint")
    return parse(content.numpy().tobytes(), str(path or "rank 0's checkpoint"))


def shared(checkpoint: Checkpoint | None, root: int, world: World) -> Checkpoint:
    """Root's checkpoint, on all ranks, without a file. Blocks; every rank must call it; the others give None."""
    mine = b""
    if checkpoint is not None:
        forms = [(name, list(t.shape), str(t.dtype)) for name, t in checkpoint.tensors.items()]
        mine = json.dumps([forms, checkpoint.record]).encode()
    forms, record = json.loads(world.gather_bytes(mine, "form of a rank's state")[root])
    tensors = {}
    for name, shape, dtype in forms:
        own = checkpoint.tensors[name] if checkpoint is not None else torch.empty(shape, dtype=DTYPES[dtype])
        data = own.detach().cpu().contiguous()
        # As bytes: whatever the dtype.
        world.broadcast_(data.reshape(-1).view(torch.uint8), root, "broadcast of a rank's state")
        tensors[name] = data
    return Checkpoint(tensors, record, f"the state of rank {root}")


class Folder:
    """The checkpoints of one run: the last `keep` steps, and the best by validation."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Names only; nothing is read or made."""
        self.folder = folder
        self.keep = keep

    @property
    def best(self) -> Path:
        """Where the best by validation stands, if there is one."""
        return self.folder / "best.safetensors"

    def steps(self) -> list[Path]:
        """Checkpoints by step, newest first."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def save(self, checkpoint: Checkpoint, *, is_best: bool) -> Path:
        """Write `step-N.safetensors`, link it as best if it is, and drop the oldest. Local; on one rank."""
        path = self.folder / f"step-{checkpoint.record['step']:09d}.safetensors"
        save(path, checkpoint)
        if is_best:
            self._link(path)
        # The one just written stays whatever its number: a torn one may bear a higher.
        for old in [other for other in self.steps() if other != path][self.keep - 1 :]:
            old.unlink(missing_ok=True)
        for left in self.folder.glob("*.tmp"):
            left.unlink(missing_ok=True)
        return path

    def newest_good(self) -> Path | None:
        """The newest whole checkpoint, or None; torn ones are named on stderr and passed over."""
        for path in self.steps():
            try:
                load(path)
            except CheckpointError as error:
                sys.stderr.write(f"hvdvae: refused: {error}\n")
                continue
            return path
        return None

    def _link(self, path: Path) -> None:
        temporary = self.best.with_suffix(f".{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # Some cluster file systems have no hard links.
            save(temporary, load(path))
        temporary.replace(self.best)


def _digest(tensors: dict[str, Tensor], record: str) -> str:
    digest = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(file: BinaryIO, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """The safetensors format, tensor by tensor: the library's own writer holds all of it in memory twice."""
    entries: dict[str, Any] = {"__metadata__": header}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        entries[name] = {"dtype": _FORMAT[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    file.write(len(head).to_bytes(8, "little") + head)
    for tensor in tensors.values():
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


_FORMAT = {
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


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
