"""Parts of a vector as tensors of a shape, each with a storage of its own over the vector's memory.

A view of the vector would do as well for computing. But what saves, copies or sends a tensor (torch.save, safetensors,
pickle, copy.deepcopy, a queue between processes) takes all of its storage: the whole vector, with others' weights.
"""

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack


def shaped(vector: Tensor, start: int, like: Tensor) -> Tensor:
    """The elements of a vector from `start` on as a view of `like`'s shape and order in memory."""
    part = vector[start : start + like.numel()]
    if like.is_contiguous():
        return part.view(like.shape)
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return part.as_strided(like.shape, like.stride(), part.storage_offset())
    return part.view(like.shape)


def apart(view: Tensor) -> Tensor:
    """The same memory with a storage of its own, as long as what `view` spans; keeps the memory alive."""
    if view.device.type not in ("cpu", "cuda") or not view.numel():
        return view.detach()
    found: Tensor = from_dlpack(view.detach())
    # DLPack may write the strides of sides of 1 in another way.
    return found if found.stride() == view.stride() else found.as_strided(view.shape, view.stride())


def part_of(vector: Tensor, start: int, like: Tensor) -> Tensor:
    """As `shaped`, with a storage of its own."""
    return apart(shaped(vector, start, like))
