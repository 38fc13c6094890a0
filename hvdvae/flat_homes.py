"""Which modules of a model hold the parameters that are trained, and what becomes of those that are replaced there.

Replaced (`load_state_dict(assign=True)`, `module.weight = nn.Parameter(...)`) by one of the same form: its values, and
its gradient, are copied in, and the trained parameter is put back. Renamed (prune, some parametrizations): followed.
All else is refused by name: a parameter that no optimizer has would be used, and never trained.
"""

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError


class Homes:
    """Of one model and the parameters in it that one optimizer trains."""

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        """`trained`: by their names in `model`. Local."""
        self._model = model
        self._trained = list(trained.values())
        self._names = list(trained)
        self._known = {id(parameter): parameter for parameter in model.parameters()}
        self._look()

    def changed(self) -> bool:
        """Whether modules hold others than they did. Microseconds."""
        found = [table.get(name) for table, name in self._places]
        sizes = list(map(len, self._tables))
        return sizes != self._sizes or not all(map(operator.is_, found, self._expected))

    @torch.no_grad()
    def follow(self, elsewhere: Sequence[nn.Parameter]) -> None:
        """Take back what was replaced. Mutates the model. `elsewhere`: parameters that other optimizers train.

        Raises ConfigError naming the first that cannot be.
        """
        present = {id(parameter) for parameter in self._model.parameters()}
        for name, parameter in zip(self._names, self._trained, strict=True):
            if id(parameter) not in present:
                self._put_back(name, parameter)
        known = self._known.keys() | {id(parameter) for parameter in elsewhere}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                raise ConfigError(
                    f"parameter {name!r} came into the model after the optimizer was wrapped, and would be neither "
                    "trained nor the same on all ranks: change the model first, then build and wrap the optimizer; or "
                    "freeze it with requires_grad_(False)"
                )
        self._look()

    def _put_back(self, name: str, parameter: nn.Parameter) -> None:
        places = [(path, module, own) for path, module, own, held in self._all_places if held is parameter]
        found = [getattr(module, own, None) for _, module, own in places]
        others = [other for other in found if isinstance(other, nn.Parameter)]
        if len(others) < len(places) or any(id(other) in self._known for other in others):
            raise ConfigError(
                f"parameter {name!r} was in the model when the optimizer was wrapped, and is not any more (as by "
                "weight_norm, tied weights, or a layer that was taken out): change the model first, then build and "
                "wrap the optimizer"
            )
        for other in others:
            mine, theirs = ((t.dtype, t.device, tuple(t.shape)) for t in (parameter, other))
            if mine != theirs:
                raise ConfigError(
                    f"parameter {name!r} was {mine[0]} {mine[2]} on {mine[1]} when the optimizer was wrapped, and its "
                    f"module has another now, {theirs[0]} {theirs[2]} on {theirs[1]}: change the model first, then "
                    "build and wrap the optimizer"
                )
            if not torch.equal(other, others[0]):
                raise ConfigError(
                    f"parameter {name!r} is used in {len(places)} places ({', '.join(path for path, *_ in places)}), "
                    "which hold different ones now: change the model first, then build and wrap the optimizer"
                )
        parameter.copy_(others[0])
        gradient: Tensor | None = None
        for other in {id(other): other for other in others}.values():
            if other.grad is not None:
                gradient = other.grad if gradient is None else gradient + other.grad
        if gradient is not None:
            parameter.grad = gradient
        parameter.requires_grad_(others[0].requires_grad)
        for _, module, own in places:
            setattr(module, own, parameter)

    def _look(self) -> None:
        """Remember what modules hold now."""
        modules = dict(self._model.named_modules())
        self._all_places = [
            (f"{path}.{name}" if path else name, module, name, parameter)
            for path, module in modules.items()
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        ]
        trained = set(map(id, self._trained))
        places: list[tuple[Mapping[str, object], str, object]] = [
            (module._parameters, name, parameter)
            for _, module, name, parameter in self._all_places
            if id(parameter) in trained
        ]
        places += [(one._modules, name, child) for one in modules.values() for name, child in one.named_children()]
        self._places = [(table, name) for table, name, _ in places]
        self._expected = [expected for *_, expected in places]
        self._tables = [table for module in modules.values() for table in (module._parameters, module._modules)]
        self._sizes = list(map(len, self._tables))
