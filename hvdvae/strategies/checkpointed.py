"""All that a loop of one's own needs to continue, as one plain dict, and back: `optimizer.checkpoint()`, `restore`.

    first rank    tensor by tensor from all ranks ---> {"model", "optimizer", "buffers", ...} ---> torch.save
    all ranks     what belongs to them <--- tensor by tensor from the first rank <--- the dict <--- torch.load

The dict holds tensors, numbers, texts, lists and dicts alone: `torch.load(weights_only=True)` takes it. Its "model"
loads into the model, its "optimizer" into the plain torch optimizer. The Trainer's checkpoints (resume.py) are made of
the same pieces.
"""

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hvdvae.checkpoint import Piece
from hvdvae.checkpoint.pieces import kind_of
from hvdvae.dtypes import DTYPES
from hvdvae.errors import CheckpointError, ConfigError
from hvdvae.strategies.optimizer_state import LOOSE, Groups, Scalars, pack

if TYPE_CHECKING:
    from hvdvae.strategies.strategy import Strategy

FORMAT = "hvdvae-state-1"
State = dict[str, Any]


def check_state(model: nn.Module) -> None:
    """Raises ConfigError where a module has state that is no tensor: a checkpoint holds nothing that needs pickling."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"the model's {name} is a {type(value).__name__}, and a checkpoint holds tensors alone: let "
                "get_extra_state return a tensor, or train without checkpoints"
            )


def pieces_of_all(strategy: "Strategy", model: nn.Module, rows: Tensor) -> tuple[dict[str, Piece], Scalars]:
    """Tensors of model, buffers, strategy and optimizer as KIND/NAME, and the optimizer's scalars. Inside `saving`.

    `rows`: float buffers of all ranks, (size, F). All ranks ask for the pieces, in the order of names.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["buffers"] = rows
    tensors |= {f"strategy/{name}": tensor for name, tensor in strategy.memory().items()}
    pieces = {name: Piece.of(tensor) for name, tensor in tensors.items()}
    if masters := strategy.master_weights():
        # Tied parameters have several names, and one place.
        names = {tensor.data_ptr(): name for name, tensor in strategy.flat.views(strategy.flat.parameters).items()}
        for name, tensor in model.state_dict().items():
            if (own := names.get(tensor.data_ptr())) in masters:
                pieces[f"model/{name}"] = masters[own]
    state, scalars = strategy.pieces()
    return pieces | {f"optimizer/{name}": piece for name, piece in state.items()}, scalars


def checkpoint(strategy: "Strategy", own: Mapping[str, Any]) -> State | None:
    """As Strategy.checkpoint."""
    _check_whole(strategy)
    check_state(strategy.model)
    kept = {name: plain(value, f"{name!r} of checkpoint()") for name, value in own.items()}
    is_first = strategy.world.rank == strategy.peers[0]
    if not (strategy.synchronous or is_first):
        return None
    taken: dict[str, Tensor] = {}
    with strategy.saving() as rows:
        pieces, scalars = pieces_of_all(strategy, strategy.model, rows)
        for name in sorted(pieces):
            tensor = pieces[name].get()
            if is_first:
                # Of their own, on the host: the run goes on, and a saved view would be a saved vector.
                taken[name] = tensor.detach().to("cpu", copy=True)
            del tensor
    if not is_first:
        return None
    found: State = {"format": FORMAT, "model": {}, "optimizer": {}, "buffers": taken.pop("buffers"), "strategy": {}}
    entries: dict[int, dict[str, Any]] = {
        int(number): {key: plain(value, f"state {key!r}") for key, value in values.items()}
        for number, values in scalars.items()
    }
    for name, tensor in taken.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            number, _, key = rest.partition("/")
            entries.setdefault(int(number), {})[key] = tensor
        else:
            found[kind][rest] = tensor
    state: dict[Any, Any] = entries.pop(LOOSE, {})
    state |= {number: entries[number] for number in sorted(entries)}
    found["optimizer"] = {
        "state": state,
        "param_groups": plain(pack(strategy.param_groups), "an option of the optimizer"),
    }
    found["record"] = {
        "strategy": strategy.name,
        "optimizer": strategy.wrapped_class,
        "trained": list(strategy.numbered.items()),
        "ranks": len(strategy.peers),
        "skipped_steps": strategy.skipped_steps,
        "moved": strategy.moved.counts(),
    }
    found["own"] = kept
    return found


def restore(strategy: "Strategy", state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """As Strategy.restore."""
    _check_whole(strategy)
    strategy.check_loadable()
    strategy.flat.take_back()
    is_first = strategy.world.rank == strategy.peers[0]
    source = _Sent(state if is_first else None, strategy.broadcast_bytes)
    if source.is_nothing:
        if state is not None:
            raise CheckpointError(
                f"restore() got a state on rank {strategy.world.rank}, and none on the first rank, whose state counts: "
                "load it there"
            )
        return None
    record = source.record
    if record["optimizer"] != strategy.wrapped_class:
        raise CheckpointError(
            f"the state is of optimizer {record['optimizer']}, this one is {strategy.wrapped_class}: wrap the same, or "
            "load state['model'] alone into the model"
        )
    groups = _fitting(record["param_groups"], strategy.param_groups)
    _load_model(strategy.model, source)
    strategy.load_master_weights(source.each("model"))
    for _, rows in source.each("buffers"):
        if rows.shape[1] == strategy.flat.buffers.numel():
            same = rows.shape[0] == len(strategy.peers)
            mine = strategy.peers.index(strategy.world.rank)
            strategy.flat.buffers.copy_(rows[mine] if same else rows.mean(0))
    _load_memory(strategy, source, record)
    strategy.load_entries(groups, _entries(strategy, source, record))
    strategy.skipped_steps = record["skipped_steps"]
    strategy.moved.count_on(record["moved"])
    strategy.restored()
    strategy.zero_grad()
    own: dict[str, Any] = record["own"]
    return own


class _Sent:
    """A state that the first rank has, on all ranks, tensor by tensor; a `Source`."""

    name = "the state"

    def __init__(self, state: Mapping[str, Any] | None, broadcast: Callable[[Tensor], None]) -> None:
        """Blocks; every rank must make it. Raises CheckpointError on all ranks where what the first has is no state."""
        self._broadcast = broadcast
        self._tensors: dict[str, Tensor] | None = None
        form = b""
        if state is not None:
            room = io.BytesIO()
            problem, forms, record = _problem(state), list[Any](), dict[str, Any]()
            if not problem:
                self._tensors, scalars = _flattened(state)
                forms = [(name, tuple(t.shape), str(t.dtype)) for name, t in self._tensors.items()]
                groups = state["optimizer"]["param_groups"]
                record = {**state["record"], "param_groups": groups, "scalars": scalars, "own": state.get("own", {})}
            torch.save([problem, forms, record], room)
            form = room.getvalue()
        length = torch.tensor([len(form)])
        broadcast(length.view(torch.uint8))
        self.is_nothing = not int(length)
        """Whether the first rank has none."""
        if self.is_nothing:
            return
        data = torch.frombuffer(bytearray(form.ljust(int(length), b"\0")), dtype=torch.uint8)
        broadcast(data)
        problem, forms, self.record = torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)
        if problem:
            raise CheckpointError(problem)
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape, _ in forms}
        self._dtypes = {name: DTYPES[dtype] for name, _, dtype in forms}

    def each(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """As Source's."""
        for name in [name for name in self.shapes if kind_of(name) == kind]:
            if self._tensors is None:
                tensor = torch.empty(self.shapes[name], dtype=self._dtypes[name])
            else:
                tensor = self._tensors[name].detach().cpu().contiguous()
            # As bytes: whatever the dtype.
            self._broadcast(tensor.reshape(-1).view(torch.uint8))
            yield name.partition("/")[2], tensor


def plain(value: Any, name: str) -> Any:
    """A copy of options with nothing in it that `torch.load(weights_only=True)` refuses. Raises ConfigError."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Enum):
        return plain(value.value, name)
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype):
        return value
    if isinstance(value, Counter):  # Milestones of a schedule; torch.load knows it.
        return Counter(value)
    if isinstance(value, dict):
        return {key: plain(entry, f"{key!r} in {name}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        copied = [plain(entry, name) for entry in value]
        return tuple(copied) if isinstance(value, tuple) else copied
    raise ConfigError(
        f"{name} is a {type(value).__name__}, expected numbers, texts or tensors: a checkpoint holds nothing that "
        "needs pickling"
    )


def _check_whole(strategy: "Strategy") -> None:
    if strategy.parts is not None:
        raise ConfigError(
            "checkpoint() and restore() are of whole models, and this rank holds a part of one: train it with the "
            "Trainer, whose checkpoints are of all parts"
        )


def _problem(state: Mapping[str, Any]) -> str:
    keys = {"format", "model", "optimizer", "buffers", "strategy", "record"}
    if not isinstance(state, Mapping) or not keys <= state.keys() or state["format"] != FORMAT:
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        return f"restore() got {found}, expected what checkpoint() returned ({', '.join(sorted(keys))})"
    return ""


def _flattened(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], Scalars]:
    """Its tensors as KIND/NAME, and the optimizer's scalars."""
    tensors = {f"model/{name}": tensor for name, tensor in state["model"].items()}
    tensors["buffers"] = state["buffers"]
    tensors |= {f"strategy/{name}": tensor for name, tensor in state["strategy"].items()}
    scalars: Scalars = {}
    for number, entries in state["optimizer"]["state"].items():
        if not isinstance(number, int):
            scalars.setdefault(str(LOOSE), {})[number] = entries
            continue
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{number}/{key}"] = value
            else:
                scalars.setdefault(str(number), {})[key] = value
    return tensors, scalars


def _fitting(saved: Groups, mine: Groups) -> Groups:
    """Saved options, for groups of as many parameters as there are now: entries are found by names of parameters."""
    if len(saved) != len(mine):
        raise CheckpointError(
            f"the state is of an optimizer with {len(saved)} parameter groups, this one has {len(mine)}: build it with "
            "the same groups"
        )
    return [{**old, "params": new["params"]} for old, new in zip(saved, mine, strict=True)]


def _load_model(model: nn.Module, source: _Sent) -> None:
    mine = model.state_dict()
    shapes = {name.partition("/")[2]: shape for name, shape in source.shapes.items() if kind_of(name) == "model"}
    for name in [*mine, *shapes]:
        here = tuple(mine[name].shape) if name in mine else None
        if here != shapes.get(name):
            raise CheckpointError(
                f"the state is of another model ({name} has shape {shapes.get(name, 'none')} there, {here or 'none'} "
                "here): build the model that it was taken of"
            )
    with torch.no_grad():
        for name, tensor in source.each("model"):
            mine[name].copy_(tensor)


def _load_memory(strategy: "Strategy", source: _Sent, record: Mapping[str, Any]) -> None:
    memory = strategy.memory()
    shapes = {name.partition("/")[2]: shape for name, shape in source.shapes.items() if kind_of(name) == "strategy"}
    # All of it, or nothing: a part would be of another moment.
    fits = all(name in memory and tuple(memory[name].shape) == shape for name, shape in shapes.items())
    for name, saved in source.each("strategy"):
        if fits:
            memory[name].copy_(saved)
    if not fits and strategy.world.rank == strategy.peers[0]:
        warnings.warn(
            f"what strategy {record['strategy']!r} remembered ({', '.join(shapes)}) has no place in this "
            f"{strategy.name!r}, or is of other trained parameters: it begins with nothing remembered",
            stacklevel=4,
        )


def _entries(strategy: "Strategy", source: _Sent, record: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """The optimizer's state by the numbers that its parameters have here."""
    here = {name: number for number, name in strategy.numbered.items()}
    numbers = {number: here[name] for number, name in record["trained"] if name in here} | {LOOSE: LOOSE}
    for number, entries in record["scalars"].items():
        if int(number) in numbers:
            for key, value in entries.items():
                yield numbers[int(number)], key, value
    for name, tensor in source.each("optimizer"):
        number, _, key = name.partition("/")
        if int(number) in numbers:
            yield numbers[int(number)], key, tensor
