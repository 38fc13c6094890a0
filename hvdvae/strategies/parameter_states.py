"""`optimizer.state[parameter]["exp_avg"]`: the state of flat vectors by parameters, as torch's optimizers have it.

What is read are views of the vectors, so that writing into them in place counts. Numbers that a whole vector has once
(steps taken) are given out as copies, one a parameter; where somebody has written into all copies (Horovod broadcasts
so), the vector's number follows before the next step.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import CheckpointError, ConfigError
from hvdvae.flat import FlatModel

States = dict[int, dict[str, Any]]
"""By the number of the trained parameter: entries by name."""


class ParameterState(dict[str, Any]):
    """Of one parameter. Pickled, and copied, as an OrderedDict."""

    def __setitem__(self, key: str, value: Any) -> None:
        """Write into the vector. Raises ConfigError for what is not there, or has another shape."""
        present = self.get(key)
        if not (isinstance(present, Tensor) and isinstance(value, Tensor) and present.shape == value.shape):
            raise _refusal(f"[parameter][{key!r}] = ...")
        if present is not value:
            present.detach().copy_(value)

    def __delitem__(self, key: str) -> None:
        """Refused. Raises ConfigError."""
        raise _refusal(f"[parameter][{key!r}]")

    def update(self, *args: Any, **entries: Any) -> None:
        """As dict's, entry by entry."""
        for key, value in dict(*args, **entries).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As dict's."""
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        """Refused. Raises ConfigError."""
        del self[key]

    def clear(self) -> None:
        """Refused. Raises ConfigError."""
        raise _refusal("[parameter].clear()")

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())


class ParameterStates(MutableMapping[Any, ParameterState]):
    """Of all parameters. Raises ConfigError where this rank does not have the state."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        find: Callable[[], States],
        signature: Callable[[], list[int]],
        forget: Callable[[], None],
    ) -> None:
        """`find`: the states now, by number of the trained `parameters`; `signature`: changes with what holds them.

        `forget`: lets there be none. Local.
        """
        self._numbers = {parameter: number for number, parameter in enumerate(parameters)}
        self._parameters, self._find, self._signature, self._clear = parameters, find, signature, forget
        self._found: dict[int, ParameterState] = {}
        self._found_of: list[int] | None = None

    def forget(self) -> None:
        """Look anew when asked again, as after a step. Local."""
        self._found_of = None

    def __getitem__(self, parameter: Any) -> ParameterState:
        """Empty where there is none yet. Raises KeyError for what is not trained here."""
        number = self._numbers[parameter]
        return self._now().get(number) or ParameterState()

    def __iter__(self) -> Iterator[Any]:
        return iter([self._parameters[number] for number in self._now()])

    def __len__(self) -> int:
        return len(self._now())

    def __contains__(self, parameter: object) -> bool:
        return isinstance(parameter, Tensor) and self._numbers.get(parameter) in self._now()  # type: ignore[call-overload]

    def __setitem__(self, parameter: Any, state: Any) -> None:
        """Write into the vectors what is there already. Raises ConfigError for the rest."""
        self[parameter].update(state)

    def __delitem__(self, parameter: Any) -> None:
        """Refused. Raises ConfigError."""
        raise _refusal("[parameter]")

    def clear(self) -> None:
        """Let the optimizer begin anew."""
        self._clear()

    def _now(self) -> dict[int, ParameterState]:
        signature = self._signature()
        if signature != self._found_of:
            self._found = {number: ParameterState(entries) for number, entries in self._find().items()}
            self._found_of = signature
        return self._found

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict,), None, None, iter(self.items())


class GivenNumbers:
    """Copies of numbers that a vector has once, which were given out one a parameter."""

    def __init__(self) -> None:
        """None yet."""
        self._given: list[tuple[Tensor, float, list[Tensor]]] = []

    def __bool__(self) -> bool:
        return bool(self._given)

    def note(self, optimizer: Optimizer, flat: FlatModel, states: States) -> None:
        """Remember those in `states`, which were made of this flat optimizer's. Local."""
        start = 0
        for group, parameters in zip(optimizer.param_groups, flat.groups, strict=True):
            numbers, start = range(start, start + len(parameters)), start + len(parameters)
            for key, value in optimizer.state.get(group["params"][0], {}).items():
                if isinstance(value, Tensor) and value.dim() == 0:
                    copies = [states[number][key] for number in numbers if number in states]
                    if copies and copies[0] is not value and copies[0].dim() == 0:
                        self._given.append((value, float(value), copies))

    def take(self) -> None:
        """Let the vectors' numbers be what was written into all of their copies since. Local.

        Raises CheckpointError where somebody has written different numbers for parameters of one vector.
        """
        given, self._given = self._given, []
        for value, before, copies in given:
            found = {float(one) for one in copies}
            if found != {before} and len(found) > 1:
                raise CheckpointError(
                    f"parameters of one group were given different counts of steps ({sorted(found)}), and they are "
                    "stepped as one vector: give them the same, or groups of their own"
                )
            if found != {before}:
                value.fill_(found.pop())


def _refusal(what: str) -> ConfigError:
    return ConfigError(
        f"optimizer.state{what} was to be replaced or taken out, and it is part of a vector: write into its tensor in "
        "place, use load_state_dict(), or optimizer.state.clear() to begin anew"
    )
