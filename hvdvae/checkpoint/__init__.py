"""Checkpoints: one safetensors file each, whole or not there, never unpickled.

    pieces.py    what a checkpoint holds, in memory or to come tensor by tensor
    file.py      the file
    folder.py    those of one run
    ranks.py     one that rank 0 alone can read, on all ranks

Tensors are named KIND/NAME: model, optimizer, ema, strategy (resume.py), and `buffers`.
"""

from hvdvae.checkpoint.file import load, save
from hvdvae.checkpoint.folder import Folder
from hvdvae.checkpoint.pieces import Checkpoint, Draft, Piece, Source
from hvdvae.checkpoint.ranks import shared, spread

__all__ = ["Checkpoint", "Draft", "Folder", "Piece", "Source", "load", "save", "shared", "spread"]
