"""What a model must be for its parameters to be laid out in one vector: named, of one kind, and apart. Pure."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hvdvae.errors import ConfigError


def names_of(model: nn.Module, groups: Sequence[Sequence[nn.Parameter]]) -> list[str]:
    """Names of parameters in a model. Raises ConfigError for one that is not in it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for group in groups:
        for parameter in group:
            if parameter not in names:
                raise ConfigError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the model: "
                    "build the optimizer from model.parameters(), and wrap both together"
                )
            found.append(names[parameter])
    return found


def check_same_kind(names: Sequence[str], tensors: Sequence[Tensor]) -> Tensor:
    """The first of them. Raises ConfigError naming one that has no shape, is complex, or is of another kind."""
    if not tensors:
        raise ConfigError("the optimizer holds no parameters, expected at least one")
    first = tensors[0]
    for name, tensor in zip(names, tensors, strict=True):
        if not is_lazy(tensor) and tensor.layout != torch.strided:
            raise ConfigError(
                f"parameter {name!r} is sparse ({tensor.layout}), expected a dense one: keep tensor.to_dense() of it "
                "(gradients may be sparse, as those of nn.Embedding(sparse=True))"
            )
        if is_lazy(tensor):
            raise ConfigError(f"parameter {name!r} has no shape yet: run the model once, on any batch, then wrap")
        if tensor.is_complex():
            raise ConfigError(
                f"parameter {name!r} is {tensor.dtype}, expected a real one: keep torch.view_as_real of it"
            )
    for name, tensor in zip(names, tensors, strict=True):
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ConfigError(
                f"parameter {name!r} is {tensor.dtype} on {tensor.device}, but {names[0]!r} is {first.dtype} on "
                f"{first.device}: move the whole model to one device and dtype (mixed precision: autocast)"
            )
    return first


def check_apart(tensors: dict[str, Tensor], moved: set[str]) -> None:
    """Raises ConfigError where one that is moved shares memory with another: each would go its own way."""
    spans = sorted(
        (tensor.untyped_storage().data_ptr(), tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
        for name, tensor in tensors.items()
        if not (is_lazy(tensor) or tensor.is_meta) and tensor.numel() and tensor.layout == torch.strided
    )
    end, last = 0, ""
    for _, first, behind, name in spans:
        if first < end and {name, last} & moved:
            raise ConfigError(
                f"{last!r} and {name!r} of the model share memory, and would not once they are moved into vectors: let "
                "both be one Parameter (or buffer), or compute one from the other in forward"
            )
        if behind > end:
            end, last = behind, name


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element to behind its last."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in strides)) * tensor.element_size()
