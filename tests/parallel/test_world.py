"""What ranks say to each other, at any number of ranks, over MPI, over Horovod's Gloo, and alone."""

import numpy as np
import pytest
import torch

from hvdvae.errors import RankLost
from hvdvae.launcher import detect
from hvdvae.world import World

DTYPES = [torch.float32, torch.float64, torch.int64]


def mine(world: World, dtype: torch.dtype) -> torch.Tensor:
    """Different on every rank, and large enough that float32 or int32 on the way would show."""
    big = 2**40 if dtype == torch.int64 else 0
    return torch.tensor([[world.rank + 1, 10 * world.rank, -world.rank], [1, 0, big]], dtype=dtype)


def test_the_world_is_the_launchers(world: World) -> None:
    import os

    launch = detect(os.environ)
    assert (world.rank, world.size, world.launcher) == (launch.rank, launch.size, launch.launcher)
    assert (world.local_rank, world.local_size) == (launch.local_rank, launch.local_size)
    assert world.is_first == (world.rank == 0)
    assert world.gather_objects(world.rank) == list(range(world.size))
    assert world.device == torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum(world: World, dtype: torch.dtype) -> None:
    tensor = mine(world, dtype)
    n = world.size
    expected = [[n * (n + 1) // 2, 5 * n * (n - 1), -n * (n - 1) // 2], [n, 0, n * int(tensor[1, 2])]]
    assert world.sum_(tensor) is tensor
    assert tensor.dtype == dtype
    assert tensor.tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max(world: World, dtype: torch.dtype) -> None:
    tensor = mine(world, dtype)
    n = world.size
    expected = [[n, 10 * (n - 1), 0], [1, 0, int(tensor[1, 2])]]
    assert world.max_(tensor) is tensor
    assert tensor.tolist() == expected


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
def test_broadcast_from_every_rank(world: World, dtype: torch.dtype) -> None:
    for root in range(world.size):
        tensor = torch.full((3, 2), 7 * world.rank + 1, dtype=dtype)
        assert world.broadcast_(tensor, root) is tensor
        assert tensor.tolist() == [[7 * root + 1] * 2] * 3


def test_sums_are_the_same_bits_on_all_ranks(world: World) -> None:
    generator = torch.Generator().manual_seed(world.rank)
    values = torch.randn(100_003, generator=generator) * 10 ** torch.randn(100_003, generator=generator)
    total = world.sum_(values).numpy().tobytes()
    assert set(world.gather_bytes(total)) == {total}


def test_float64_keeps_its_digits(world: World) -> None:
    tensor = torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)
    world.sum_(tensor)
    assert tensor.item() == world.size * (1.0 + 2.0**-40)


def test_views_and_odd_strides_are_changed_in_place(world: World) -> None:
    """Also where a tensor's memory is not one piece, or needs a gradient."""
    whole = torch.full((4, 6), float(world.rank))
    columns = whole[:, 1:3]
    world.sum_(columns)
    total = world.size * (world.size - 1) / 2
    assert bool((whole[:, 1:3] == total).all())
    assert bool((whole[:, 0] == world.rank).all())
    assert bool((whole[:, 3:] == world.rank).all())
    parameter = torch.nn.Parameter(torch.full((2,), float(world.rank)))
    world.sum_(parameter)
    assert parameter.tolist() == [total, total]
    scalar = torch.tensor(world.rank)
    world.max_(scalar)
    assert int(scalar) == world.size - 1


def test_tensors_of_no_elements(world: World) -> None:
    for shape in ((0,), (world.size, 0)):
        assert world.sum_(torch.zeros(shape)).shape == shape
        assert world.max_(torch.zeros(shape)).shape == shape
        assert world.broadcast_(torch.zeros(shape)).shape == shape


def test_objects_come_in_rank_order_and_whole(world: World) -> None:
    record = {"rank": world.rank, "text": "é\n" * world.rank, "list": [None, True, 1.5, []], "host": world.host}
    found = world.gather_objects(record)
    assert found[world.rank] == record
    assert [other["rank"] for other in found] == list(range(world.size))
    assert [other["text"] for other in found] == ["é\n" * rank for rank in range(world.size)]


@pytest.mark.parametrize("length", [lambda rank: rank, lambda rank: 0, lambda rank: (rank + 1) % 2 * 70_001])
def test_bytes_of_unequal_lengths(world: World, length) -> None:  # type: ignore[no-untyped-def]
    def content(rank: int) -> bytes:
        return np.random.default_rng(rank).bytes(length(rank))

    assert world.gather_bytes(content(world.rank)) == [content(rank) for rank in range(world.size)]


@pytest.mark.parametrize("length", [1, 5])
def test_rows_go_to_their_ranks(world: World, length: int) -> None:
    mine = torch.arange(world.size * length, dtype=torch.float32).view(world.size, length) + 1000 * world.rank
    found = world.exchange_rows(mine, torch.full_like(mine, -1))
    columns = torch.arange(length) + world.rank * length
    expected = columns + 1000 * torch.arange(world.size)[:, None]
    assert torch.equal(found, expected.float())
    gathered = world.gather_rows(mine[world.rank], torch.full_like(mine, -1))
    assert torch.equal(gathered, torch.arange(world.size)[:, None] * (1000 + length) + torch.arange(length).float())


def test_the_barrier_holds_until_all_have_come(world: World) -> None:
    """The last rank comes late, so the others must have waited."""
    import time

    world.barrier()
    if world.rank == world.size - 1:
        time.sleep(0.3)
    came = time.monotonic()
    world.barrier()
    left = time.monotonic()
    # Of one clock, as all are on one machine.
    assert left >= max(world.gather_objects(came))


def test_waits_are_counted(world: World) -> None:
    if world.size == 1:
        pytest.skip("alone there is nobody to wait for")
    import time

    world.barrier()
    before = world.watchdog.waited
    if world.rank == 0:
        time.sleep(1.0)
    came = time.monotonic()
    world.sum_(torch.ones(1))
    waited = world.watchdog.waited - before
    assert waited <= time.monotonic() - came, "neither twice, nor where it slept"
    # With room for a rank that came late itself, on a loaded machine.
    assert world.rank == 0 or waited > 0.1


def test_alone_is_one_process_within_any_launch(world: World) -> None:
    alone = World.alone(device="cpu")
    assert (alone.rank, alone.size, alone.launcher) == (0, 1, "none")
    assert alone.sum_(torch.tensor([world.rank])).item() == world.rank
    assert alone.gather_objects(world.rank) == [world.rank]


def test_where_nobody_can_go_on_a_carriers_failure_ends_the_job_as_a_death(world: World) -> None:
    class HorovodInternalError(RuntimeError):
        """As Horovod's, which is known by its name."""

    expected = HorovodInternalError if world.size == 1 else RankLost
    with (
        pytest.raises(expected, match="a peer has closed its end") as raised,
        world.waiting("sum of nothing"),
    ):
        raise HorovodInternalError("a peer has closed its end\nand more")
    if world.size > 1:
        assert str(raised.value).startswith("HorovodInternalError during sum of nothing, step ")
        assert "and more" not in str(raised.value)
