"""Short messages of the parameter server: what one end writes, the other reads, and nothing is lost on the way."""

import pytest
import torch
from torch import Tensor

from hvdvae.ps.plan import COMPRESSIONS, Plan
from hvdvae.ps.wire import PullMessage, PushMessage, codec_for

LENGTH, BUFFERS = 5001, 7
FEEDBACK = ("sign", "topk")


def vector(length: int, seed: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed))


def ends(codec: str, buffers: int, momentum: float = 0.0) -> tuple[PushMessage, PushMessage]:
    make = codec_for(Plan(compression=codec))
    assert make is not None
    return tuple(PushMessage(make(LENGTH), LENGTH, buffers, momentum) for _ in range(2))  # type: ignore[return-value]


def pulls(codec: str) -> tuple[PullMessage, PullMessage]:
    make = codec_for(Plan(compression=codec))
    assert make is not None
    return PullMessage(make(LENGTH), LENGTH), PullMessage(make(LENGTH), LENGTH)


@pytest.mark.parametrize("codec", COMPRESSIONS)
def test_pushes_bring_all_of_the_gradients_in_the_end(codec: str) -> None:
    writer, reader = ends(codec, BUFFERS)
    given, brought = torch.zeros(2, LENGTH, dtype=torch.float64)
    into = torch.zeros(LENGTH + BUFFERS)
    gradient = vector(LENGTH, 0)
    for step in range(400):
        pushed = torch.cat([gradient, vector(BUFFERS, step)])
        before = pushed.clone()
        reader.message.copy_(writer.write(pushed, key=1))
        writer.keep()
        reader.read(into)
        assert torch.equal(pushed, before)
        assert torch.equal(into[LENGTH:], pushed[LENGTH:]), "buffers come as they are"
        given += gradient
        brought += into[:LENGTH]
    if writer._feedback is None:
        assert float((given - brought).norm() / given.norm()) < 0.05, "right in the mean"
    else:  # What did not come is remembered, and that does not grow with the number of steps.
        torch.testing.assert_close(brought + writer._feedback.remembered, given, rtol=1e-5, atol=1e-4)
        assert float((given - brought).norm() / given.norm()) < 0.3
    assert writer.message.nbytes < 4 * (LENGTH + BUFFERS)
    assert 0 < writer.error < 1


@pytest.mark.parametrize("codec", FEEDBACK)
def test_a_push_that_is_dropped_costs_its_own_gradient_alone(codec: str) -> None:
    """What earlier messages left out, and this one was to bring, is still remembered."""
    writer, _ = ends(codec, 0)
    assert writer._feedback is not None
    writer.write(torch.randn(LENGTH), key=1)
    writer.keep()
    before = writer._feedback.remembered.clone()
    assert before.any()
    for _ in range(3):
        writer.write(torch.randn(LENGTH), key=1)
        assert torch.equal(writer._feedback.remembered, before)
    writer.write(torch.randn(LENGTH), key=1)
    writer.keep()
    assert not torch.equal(writer._feedback.remembered, before)


@pytest.mark.parametrize("codec", COMPRESSIONS)
def test_pulls_come_to_the_weights_and_both_ends_know_what_is_held(codec: str) -> None:
    server, worker = pulls(codec)
    start, weights = vector(LENGTH, 0), vector(LENGTH, 1)
    for end in (server, worker):
        assert not end.is_known
        end.holds(start)
    held = torch.zeros(LENGTH)
    distances = []
    for _ in range(400):
        worker.message.copy_(server.write(weights, key=3))
        worker.read(held)
        distances.append(float((weights - held).norm()))
    near = 0.2 if codec == "sign" else 0.01  # Steps of one size end in a circle around it.
    assert distances[-1] < near * float((weights - start).norm())
    assert distances[-1] <= distances[0]


def test_no_codec_no_messages() -> None:
    assert codec_for(Plan()) is None
