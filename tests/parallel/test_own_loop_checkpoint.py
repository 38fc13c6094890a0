"""Law 8 in loops of one's own: save, rebuild, restore, go on == never stopped, whatever the strategy.

Ranks have different data and start from different weights, so that what is not saved, or not given to all, shows.
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvdvae.checkpoint import Piece
from hvdvae.errors import CheckpointError, ConfigError
from hvdvae.ps.plan import Plan
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.world import World
from tests.parallel.regression import INPUTS, OUTPUTS

BEFORE, AFTER = 5, 4

CASES: dict[str, dict[str, Any]] = {
    "local": {"strategy": "local"},
    "horovod": {"strategy": "allreduce", "engine": "horovod"},
    "mpi": {"strategy": "allreduce", "engine": "mpi"},
    "accumulated": {"strategy": "allreduce", "engine": "mpi", "backward_passes_per_step": 2, "clip_norm": 0.5},
    "int8": {"strategy": "allreduce", "engine": "mpi", "compression": "int8"},
    "topk": {"strategy": "allreduce", "engine": "mpi", "compression": "topk", "compression_share": 0.2},
    "powersgd": {"strategy": "allreduce", "engine": "mpi", "compression": "powersgd", "compression_rank": 1},
    "adasum": {"strategy": "allreduce", "engine": "horovod", "reduce_op": "adasum"},
    "zero 1, mpi": {"strategy": "sharded", "engine": "mpi"},
    "zero 1, horovod": {"strategy": "sharded", "engine": "horovod"},
    "zero 2": {"strategy": "sharded", "engine": "mpi", "zero_stage": 2},
    "bf16": {"strategy": "sharded", "engine": "mpi", "zero_stage": 2, "weights": "bf16"},
    "local-sgd": {"strategy": "local-sgd", "sync_every": 4},
    "diloco": {"strategy": "diloco", "sync_every": 3, "adaptive_sync": True},
    "diloco, int8": {"strategy": "diloco", "sync_every": 3, "compression": "int8"},
}
SHARING = ("topk", "powersgd", "adasum", "local-sgd", "diloco", "diloco, int8")
"""Where ranks have something of their own, which a checkpoint averages: the run that saves goes on from the mean."""


def network(seed: int, *, statistics: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(5) if statistics else nn.Identity()
    # No bias in front of BatchNorm: its gradient is noise of the rounding.
    return nn.Sequential(nn.Linear(INPUTS, 5, bias=False), norm, nn.Tanh(), nn.Linear(5, OUTPUTS))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.1)


def build(world: World, seed: int, case: dict[str, Any]) -> tuple[nn.Module, Strategy]:
    model = network(seed + world.rank, statistics=case.get("weights") != "bf16")
    return model, DistributedOptimizer(adam(model), model, world=world, **case)


def train(world: World, model: nn.Module, optimizer: Strategy, steps: range) -> None:
    for number in steps:
        optimizer.zero_grad()
        for micro in range(optimizer.backward_passes_per_step):
            generator = torch.Generator().manual_seed(1000 * number + 10 * world.rank + micro)
            x, y = torch.randn(8, INPUTS, generator=generator), torch.randn(8, OUTPUTS, generator=generator)
            with optimizer.arithmetic():
                loss = (model(x) - y).square().mean()
            optimizer.watch(loss)
            loss.backward()
        optimizer.step()


def passed(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """Through a file, as torch writes and reads it."""
    if state is None:
        return None
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def leaves(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        for key, value in state.items():
            # Bytes moved: a checkpoint moves some, too.
            yield from leaves(value, f"{name}/{key}") if key != "moved" else ()
    elif isinstance(state, list):
        for number, value in enumerate(state):
            yield from leaves(value, f"{name}/{number}")
    else:
        yield name, state


def assert_same(found: dict[str, Any] | None, expected: dict[str, Any] | None) -> None:
    assert (found is None) == (expected is None)
    if found is None:
        return
    here, there = dict(leaves(found)), dict(leaves(expected))
    assert here.keys() == there.keys()
    for name, value in here.items():
        same = torch.equal(value, there[name]) if isinstance(value, Tensor) else value == there[name]
        assert same, f"{name}: {value} instead of {there[name]}"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, world: World) -> dict[str, Any]:
    chosen = CASES[request.param]
    if chosen["strategy"] == "local" and world.size > 1:
        pytest.skip("local is of one process")
    if chosen.get("engine") == "horovod" and world.launcher != "none":
        pytest.importorskip("horovod.torch")
    if world.launcher == "horovodrun-gloo" and (chosen.get("engine") == "mpi" or "reduce_op" in chosen):
        pytest.skip("horovodrun --gloo has no MPI, and Gloo no Adasum")
    return {**chosen, "name": request.param}


def test_goes_on_as_if_it_had_never_stopped(world: World, case: dict[str, Any]) -> None:
    shares = case.pop("name") in SHARING and world.size > 1
    model, optimizer = build(world, 40, case)
    train(world, model, optimizer, range(BEFORE))
    own = {"step": BEFORE, "schedule": {"rates": [0.1, torch.ones(2)]}}
    state = optimizer.checkpoint(**own)
    assert (state is not None) == world.is_first
    kept = passed(state)
    assert_same(kept, state)
    train(world, model, optimizer, range(BEFORE, BEFORE + AFTER))
    assert_same(state, kept)  # A checkpoint is of its moment, not views of what goes on.
    # Rebuilt, from other weights, and some steps taken meanwhile.
    again, resumed = build(world, 60, case)
    train(world, again, resumed, range(20, 22))
    found = resumed.restore(kept)
    assert found is not None
    assert_same(found, own)
    assert_same(resumed.checkpoint(**own), kept)
    train(world, again, resumed, range(BEFORE, BEFORE + AFTER))
    end = optimizer.checkpoint()
    assert_same(resumed.checkpoint(), end)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    if not shares:
        straight, other = build(world, 40, case)
        train(world, straight, other, range(BEFORE + AFTER))
        assert_same(other.checkpoint(), end)


def test_into_another_strategy_and_size(world: World, case: dict[str, Any]) -> None:
    """From any strategy to one process with the plain optimizer's own numbers, and back to all ranks."""
    name = case.pop("name")
    model, optimizer = build(world, 40, case)
    train(world, model, optimizer, range(BEFORE))
    state = optimizer.checkpoint()
    if state is not None:
        alone = World.alone(device="cpu")
        plain = network(7, statistics=name != "bf16")
        plain_optimizer = adam(plain)
        plain.load_state_dict(state["model"])
        plain_optimizer.load_state_dict(passed(state)["optimizer"])  # type: ignore[index]
        ours = network(8, statistics=name != "bf16")
        wrapped = DistributedOptimizer(adam(ours), ours, world=alone, strategy="local")
        if state["strategy"]:
            with pytest.warns(UserWarning, match=f"what strategy '{optimizer.name}' remembered"):
                wrapped.restore(passed(state))
        else:
            wrapped.restore(passed(state))
        for number in range(2):
            x = torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(number))
            for network_, stepped in ((plain, plain_optimizer), (ours, wrapped)):
                stepped.zero_grad()
                network_(x).square().mean().backward()
                stepped.step()
        for key, value in plain.named_parameters():
            torch.testing.assert_close(ours.get_parameter(key), value, msg=lambda text, key=key: f"{key}: {text}")
        state = wrapped.checkpoint()
    back, resumed = build(world, 60, case)
    resumed.restore(state)
    found = resumed.checkpoint()
    if state is not None:
        assert found is not None
        assert_same(found["model"], state["model"])
        assert_same(found["optimizer"], state["optimizer"])
    assert set(back.state_dict()) == set(model.state_dict())


def test_no_rank_ever_holds_more_than_a_tensor_of_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first keeps all of it, which is what it asked for; the others let each go before the next one comes."""
    if world.launcher == "horovodrun-gloo":
        pytest.skip("horovodrun --gloo has no MPI")
    model, optimizer = build(world, 40, CASES["zero 1, mpi"])
    train(world, model, optimizer, range(2))
    alive: list[int] = []
    whole = type(optimizer)._put_together  # type: ignore[attr-defined]

    def counted(*args: Any) -> Tensor:
        import weakref

        found: Tensor = whole(*args)
        alive.append(1)
        weakref.finalize(found, alive.pop)
        assert world.is_first or len(alive) == 1
        return found

    monkeypatch.setattr(type(optimizer), "_put_together", counted)
    state = optimizer.checkpoint()
    entries = {
        number: dict(values) for number, values in (state or {"optimizer": {"state": {}}})["optimizer"]["state"].items()
    }
    assert bool(entries) == world.is_first
    del state


def test_a_state_that_does_not_fit_is_refused_on_all_ranks(world: World) -> None:
    case = {"strategy": "local"} if world.size == 1 else CASES["horovod"]
    _, optimizer = build(world, 40, case)
    state = optimizer.checkpoint()
    assert optimizer.restore(None) is None
    if world.size == 1:
        optimizer.broadcast_bytes = lambda data: data.zero_()  # type: ignore[method-assign, assignment]
        with pytest.raises(CheckpointError, match="got a state on rank 0, and none on the first"):
            optimizer.restore(state)
        del optimizer.broadcast_bytes  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"'names' of checkpoint\(\) is a set, expected numbers"):
        optimizer.checkpoint(names={"a"})
    with pytest.raises(CheckpointError, match="expected what checkpoint"):
        optimizer.restore({"model": {}})
    other = nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, OUTPUTS))
    with pytest.raises(CheckpointError, match="of another model"):
        DistributedOptimizer(adam(other), other, world=world, **case).restore(state)
    model = network(3)
    with pytest.raises(CheckpointError, match="of optimizer AdamW, this one is SGD"):
        DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, world=world, **case).restore(state)


def test_what_was_frozen_then_keeps_nothing_and_the_others_all(world: World) -> None:
    """Parameters are found by their names: an optimizer of more of them takes the state of those it knows."""
    case = {"strategy": "local"} if world.size == 1 else CASES["horovod"]

    def half(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)

    model = network(40)
    model[0].requires_grad_(False)  # type: ignore[operator, index]
    optimizer = DistributedOptimizer(half(model), model, world=world, **case)
    train(world, model, optimizer, range(3))
    state = optimizer.checkpoint()
    again = network(41)
    resumed = DistributedOptimizer(torch.optim.Adam(again.parameters(), 0.1), again, world=world, **case)
    with pytest.warns(UserWarning, match="has taken no step"):
        resumed.restore(state)
    found = resumed.checkpoint()
    if state is not None and found is not None:
        for number, entries in state["optimizer"]["state"].items():
            assert_same({"entries": found["optimizer"]["state"][number + 1]}, {"entries": entries})


@contextmanager
def workers(world: World, plan: Plan, seed: int) -> Iterator[tuple[nn.Module, Strategy, World] | None]:
    from hvdvae.ps.serve import serve

    joined = World.create(device="cpu", deadline=60, servers=1)
    if joined.role == "server":
        serve(joined, plan)
        joined.close()
        yield None
        return
    model = network(seed + joined.rank)
    yield model, DistributedOptimizer(adam(model), model, world=joined, strategy="ps", plan=plan), joined
    joined.close()


@pytest.mark.parametrize("plan", [Plan(), Plan(consistency="bsp")], ids=["asp", "bsp"])
def test_parameter_servers_go_on(world: World, plan: Plan) -> None:
    """One worker bit for bit; several: the servers' weights and state."""
    if world.launcher in ("none", "horovodrun-gloo") or world.size < 2:
        pytest.skip("needs MPI and two ranks")
    kept: dict[str, Any] | None = None
    end: dict[str, Tensor] = {}
    with workers(world, plan, 40) as worker:
        if worker:
            model, optimizer, mine = worker
            assert not optimizer.state_dict()["state"], "nobody has a state yet"
            train(mine, model, optimizer, range(BEFORE))
            for ask in (optimizer.state_dict, lambda: optimizer.state[model[0].weight]):
                with pytest.raises(ConfigError, match=r"is on the servers .* call optimizer\.checkpoint\(\)"):
                    ask()
            state = optimizer.checkpoint()
            assert (state is not None) == mine.is_first
            kept = passed(state)
            train(mine, model, optimizer, range(BEFORE, BEFORE + AFTER))
            optimizer.finish()
            end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with workers(world, plan, 60) as worker:
        if worker:
            model, optimizer, mine = worker
            optimizer.restore(kept)
            if kept is not None and mine.size == 1:
                assert_same(optimizer.checkpoint(), kept)
            train(mine, model, optimizer, range(BEFORE, BEFORE + AFTER))
            with pytest.raises(ConfigError, match="after the first step"):
                optimizer.restore(kept)
            optimizer.finish()
            if mine.size == 1:
                for name, tensor in model.state_dict().items():
                    assert torch.equal(tensor, end[name]), name
            elif plan.consistency == "bsp" and mine.is_first:
                for name, parameter in model.named_parameters():
                    torch.testing.assert_close(parameter.detach(), end[name], atol=1e-6, rtol=1e-5)


def test_pieces_are_asked_for_in_one_order(world: World) -> None:
    """What ranks hold together blocks: whoever asks in another order would wait for ever."""
    asked: list[str] = []
    model, optimizer = build(
        world, 40, CASES["zero 2"] if world.launcher != "horovodrun-gloo" else CASES["zero 1, horovod"]
    )
    train(world, model, optimizer, range(1))
    pieces = optimizer.pieces

    def noted() -> Any:
        found, scalars = pieces()

        def note(name: str, get: Callable[[], Tensor]) -> Tensor:
            asked.append(name)
            return get()

        named = {name: Piece(p.shape, p.dtype, lambda name=name, p=p: note(name, p.get)) for name, p in found.items()}
        return named, scalars

    optimizer.pieces = noted  # type: ignore[method-assign]
    optimizer.checkpoint()
    assert asked
    assert asked == sorted(asked)


def documented() -> str:
    page = Path(__file__).parents[2] / "docs" / "own-loop.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    (found,) = (block for block in blocks if "own = optimizer.restore(state)  # on all ranks: what" in block)
    return str(found)


STRATEGIES = ("local", "allreduce", "sharded", "local-sgd", "diloco", "ps")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_documented_loop_resumes(
    world: World, strategy: str, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands on the page, with every strategy: stopped after 8 steps it goes on from 5, to the same weights."""
    if strategy == "local" and world.size > 1:
        pytest.skip("local is of one process")
    if strategy == "ps" and (world.launcher in ("none", "horovodrun-gloo") or world.size < 2):
        pytest.skip("needs MPI and two ranks")

    class Stopped(Exception):
        pass

    class Served(Exception):
        pass

    def serve_and_leave(joined: World, plan: Plan) -> None:
        from hvdvae.ps.serve import serve

        serve(joined, plan)
        joined.close()
        raise Served

    if strategy == "ps":
        monkeypatch.setattr("hvdvae.ps.serve.serve_and_exit", serve_and_leave)
    else:
        monkeypatch.setattr(World, "create", classmethod(lambda cls, **options: world))
    monkeypatch.chdir(shared_path)
    code = compile(documented().replace('strategy="allreduce"', f"strategy={strategy!r}"), "own-loop.md", "exec")

    def run(seed: int, stop: int) -> tuple[list[int], dict[str, Tensor]]:
        taken: list[int] = []

        def batch(step: int, rank: int) -> Tensor:
            if step == stop:
                raise Stopped
            taken.append(step)
            return torch.randn(4, INPUTS)

        def loss(model: nn.Module, x: Tensor) -> Tensor:
            return model(x).square().mean()

        names = {"Net": lambda: network(seed + world.rank), "STEPS": 13, "EVERY": 5, "batch": batch, "loss": loss}
        with suppress(Stopped, Served):
            exec(code, names)
        if strategy == "ps" and "rank" in names:
            names["optimizer"].world.close()  # type: ignore[attr-defined]
        model: nn.Module = names["model"]  # type: ignore[assignment]
        return taken, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    _, expected = run(40, 10**9)
    world.barrier("the first run is over")
    if world.is_first:
        (shared_path / "run.pt").unlink()
    run(40, 8)
    taken, found = run(60, 10**9)
    if taken:
        assert taken[0] == 5
        workers = world.size - (strategy == "ps")
        for name, tensor in found.items():
            if strategy != "ps" or workers == 1:
                assert torch.equal(tensor, expected[name]), name
