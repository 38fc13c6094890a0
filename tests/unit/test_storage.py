"""What is saved, copied or sent of a wrapped model is that tensor, and nothing that stands beside it in a vector."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from hvdvae.flat_layout import ALIGNED
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.world import World


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.encoder = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))
        self.decoder = nn.Linear(3, 50_000)
        self.tied = self.encoder[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))  # type: ignore[no-any-return]


def wrapped() -> tuple[Net, Strategy]:
    model = Net()
    plain = torch.optim.Adam(model.parameters(), 0.01)
    optimizer = DistributedOptimizer(plain, model, world=World.alone(device="cpu"), strategy="local")
    optimizer.zero_grad()
    model(torch.randn(4, 7)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def saved_bytes(value: object) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return len(file.getvalue())


def test_a_part_of_the_model_saves_that_part() -> None:
    model, optimizer = wrapped()
    plain = saved_bytes(Net().encoder.state_dict())
    assert saved_bytes(model.encoder.state_dict()) < plain + 1000
    assert saved_bytes(model.encoder) < 10_000
    for tensor in (model.encoder[0].weight, model.encoder[0].weight.grad, model.encoder[1].running_mean):
        assert saved_bytes(tensor) < 3000
        assert len(pickle.dumps(tensor)) < 3000
        assert copy.deepcopy(tensor).untyped_storage().nbytes() == tensor.nbytes  # type: ignore[union-attr, operator]
    assert saved_bytes(optimizer.state_dict()["state"][0]) < 4000


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    model, optimizer = wrapped()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    other = Net()
    safetensors.torch.load_model(other, str(tmp_path / "model.safetensors"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded[name]), name
        assert torch.equal(value, other.state_dict()[name]), name
    before = copy.deepcopy(model)
    optimizer.flat.parameters.fill_(2.0)
    assert bool((model.decoder.weight == 2).all()), "a state_dict's entries stay live references"
    assert not bool((before.decoder.weight == 2).any())
    assert before.tied.weight is before.encoder[0].weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_parameter_and_gradient_begins_where_torch_would_begin_it(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model, world=World.alone(device="cpu"), strategy="local"
    )
    model(torch.randn(4, 7, dtype=dtype)).square().mean().backward()
    optimizer.synchronize()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.data_ptr() % ALIGNED == parameter.grad.data_ptr() % ALIGNED == 0
        assert parameter.storage_offset() == 0


def test_a_pair_of_reals_is_a_complex_number_again() -> None:
    """As the message on complex parameters advises."""

    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))
            self.waves = nn.Parameter(torch.view_as_real(torch.ones(4, dtype=torch.complex64)).clone())

    model = Waves()
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.5), model, world=World.alone(device="cpu"), strategy="local"
    )
    torch.view_as_complex(model.waves).abs().square().sum().backward()
    optimizer.step()
    assert torch.view_as_complex(model.waves).tolist() == [0] * 4


def test_parameters_in_memory_that_processes_share_go_on_training() -> None:
    """A queue between processes, and share_memory(), move a tensor's storage."""
    model, optimizer = wrapped()
    model.share_memory()
    before = model.decoder.bias.clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 7)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model.decoder.bias, before)
    assert torch.equal(optimizer.flat.views(optimizer.flat.parameters)["decoder.bias"], model.decoder.bias)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.Rprop])
def test_gaps_stay_zero(kind: type[torch.optim.Optimizer]) -> None:
    model = Net()
    plain = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    optimizer = DistributedOptimizer(plain, model, world=World.alone(device="cpu"), strategy="local", clip_norm=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 7)).square().mean().backward()
        optimizer.step()
    for vector in (optimizer.flat.parameters, optimizer.flat.gradient):
        rest = vector.clone()
        optimizer.flat.layout.runs.spread(torch.zeros(optimizer.flat.layout.runs.count), rest)
        assert not bool(rest.any())
    expected = sum(float(parameter.grad.square().sum()) for parameter in model.parameters())  # type: ignore[union-attr]
    assert expected**0.5 == pytest.approx(min(0.1, optimizer.gradient_norm), rel=1e-4)
