"""What forward and backward need in memory, told from tensors without numbers."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hvdvae.allocator import LARGEST_KEPT
from hvdvae.cli.activations import Alive, Needs, needs

FLOAT = 4


def of_layers(examples: int, inputs: int, hidden: int, outputs: int, *, is_first: bool = True) -> Needs:
    with FakeTensorMode():
        layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        batch = torch.empty(examples, inputs)
        return needs(layers, (batch,), batch, is_first, lambda payload: (layers(payload[0]),))


def test_what_autograd_keeps_counts_once() -> None:
    # ReLU's result, which ReLU and the layer after it both want, and the output.
    assert of_layers(8, 10, 20, 5).kept == FLOAT * 8 * (20 + 5)


def test_only_what_another_stage_sends_is_received() -> None:
    assert of_layers(8, 10, 20, 5).received == 0
    assert of_layers(8, 10, 20, 5, is_first=False).received == FLOAT * 8 * 10


def test_gradients_of_activations_pass_and_those_of_parameters_do_not_count() -> None:
    found = of_layers(8, 1000, 20, 5)
    # Gradients of the output, of ReLU's result and of the first layer's, of which two are there at a time.
    assert FLOAT * 8 * (20 + 5) <= found.passing <= FLOAT * 8 * (20 + 20 + 5)


def test_blocks_that_malloc_keeps_are_no_room_for_others() -> None:
    with FakeTensorMode(), Alive([]) as alive:
        small = torch.empty(1000)
        del small
        again = torch.empty(1000)
        del again
        large = torch.empty(LARGEST_KEPT // FLOAT)
        del large
        assert alive.now == 0
    assert alive.peak(without=[]) == FLOAT * 1000 + LARGEST_KEPT
