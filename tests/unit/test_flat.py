"""Parameters, gradients and buffers as views of vectors: nothing about the model changes but where its numbers lie."""

import pytest
import torch
from torch import nn

from hvdvae.errors import ConfigError
from hvdvae.flat import FlatModel


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def flat_of(model: nn.Module) -> FlatModel:
    return FlatModel(model, [list(model.parameters())])


def dense(flat: FlatModel, vector: torch.Tensor) -> torch.Tensor:
    return flat.layout.runs.dense(vector)


def test_parameters_are_views_with_their_values_and_order() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flat = flat_of(model)
    assert flat.names == [name for name, _ in model.named_parameters()]
    assert torch.equal(dense(flat, flat.parameters), torch.cat([before[name].flatten() for name in flat.names]))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    flat.parameters.fill_(7.0)
    assert all(bool((p == 7).all()) for p in model.parameters())
    with torch.no_grad():
        model[0].weight[0, 0] = -1.0  # type: ignore[index, operator]
    assert flat.parameters[0] == -1


def test_groups_are_slices_in_the_optimizers_order() -> None:
    model = network()
    first, *rest = list(model.parameters())
    flat = FlatModel(model, [rest, [first]])
    assert flat.group_slices == [slice(0, 5 * 16), slice(80, 96)]
    assert torch.equal(flat.parameters[80:92].view(3, 4), first)
    piece = flat.split(flat.parameters[80:], 1)
    assert [tuple(tensor.shape) for tensor in piece] == [(3, 4)]
    assert torch.equal(flat.views(flat.parameters)["0.weight"], first)


def test_gradients_of_any_origin_are_gathered() -> None:
    """None, autograd's own, accumulated over two passes, and one that a user put there."""
    model = network()
    x = torch.randn(5, 4)
    model(x).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    flat = flat_of(model)
    model(x).square().mean().backward()
    first = flat.gather_gradient()
    torch.testing.assert_close(dense(flat, first), torch.cat([g.flatten() for g in expected]))
    model(x).square().mean().backward()  # Accumulates into the views.
    torch.testing.assert_close(dense(flat, flat.gather_gradient()), 2 * torch.cat([g.flatten() for g in expected]))

    parameters = list(model.parameters())
    parameters[0].grad = None
    parameters[1].grad = torch.full_like(parameters[1], 3.0)
    gathered = flat.gather_gradient()
    assert gathered is flat.gradient
    assert not gathered[:16].any()
    assert bool((gathered[16:19] == 3).all())
    torch.testing.assert_close(dense(flat, gathered)[15:], 2 * torch.cat([g.flatten() for g in expected[2:]]))
    again = gathered.clone()
    assert torch.equal(flat.gather_gradient(), again), "gathering twice is gathering once"
    gathered.mul_(2)
    assert all(torch.equal(p.grad.flatten(), g.flatten()) for p, g in zip(parameters, flat.split(gathered, 0)))  # type: ignore[union-attr]  # noqa: B905


def test_zero_grad_either_way_starts_anew() -> None:
    for set_to_none in (True, False):
        model = network()
        flat = flat_of(model)
        for _ in range(2):
            model.zero_grad(set_to_none)
            model(torch.ones(2, 4)).sum().backward()
            gathered = flat.gather_gradient().clone()
        model.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        torch.testing.assert_close(gathered, flat.gather_gradient())


def test_channels_last_strides_stay_and_train_alike() -> None:
    def convolutions(channels_last: bool) -> nn.Module:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        return model.to(memory_format=torch.channels_last) if channels_last else model  # type: ignore[call-overload, no-any-return]

    x = torch.randn(2, 3, 8, 8)
    model, plain = convolutions(True), convolutions(False)
    strides = [p.stride() for p in model.parameters()]
    flat, plain_flat = flat_of(model), flat_of(plain)
    assert [p.stride() for p in model.parameters()] == strides
    assert strides[2] != list(plain.parameters())[2].stride()
    for name, view in flat.views(flat.parameters).items():
        torch.testing.assert_close(view, plain_flat.views(plain_flat.parameters)[name])
    for each, vectors in ((model, flat), (plain, plain_flat)):
        each(x).square().mean().backward()
        vectors.gather_gradient()
        assert all(p.grad.stride() == p.stride() for p in each.parameters())  # type: ignore[union-attr]
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_float_buffers_are_views_and_counters_stay() -> None:
    model = network()
    flat = flat_of(model)
    assert flat.buffers.numel() == 6
    model(torch.randn(8, 4))
    assert torch.equal(flat.buffers, torch.cat([model[1].running_mean, model[1].running_var]))  # type: ignore[index, union-attr, list-item]
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[index, union-attr, arg-type]
    assert flat_of(nn.Linear(2, 2)).buffers.numel() == 0


def test_a_zero_dimensional_parameter_is_one_element() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(3.0))
    model.rows = nn.Parameter(torch.ones(2))
    flat = flat_of(model)
    assert dense(flat, flat.parameters).tolist() == [3, 1, 1]
    assert flat.views(flat.parameters)["scale"].shape == ()


def test_mixed_dtypes_and_devices_are_refused_by_name() -> None:
    model = network()
    model[2].bias.data = model[2].bias.data.double()  # type: ignore[index, union-attr, operator]
    with pytest.raises(ConfigError, match=r"'2\.bias' is torch\.float64 on cpu, but '0\.weight' is torch\.float32"):
        flat_of(model)
    model = network()
    model[2].to("meta")  # type: ignore[index, operator]
    with pytest.raises(ConfigError, match=r"'2\.weight' is torch\.float32 on meta"):
        flat_of(model)


def test_no_parameters_and_foreign_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="no parameters"):
        FlatModel(network(), [[]])
    with pytest.raises(ConfigError, match=r"shape \(5, 6\).*not in the model"):
        FlatModel(network(), [[nn.Parameter(torch.zeros(5, 6))]])


def test_the_digest_tells_models_apart_not_their_values() -> None:
    reference = flat_of(network()).digest()
    other_values = network()
    with torch.no_grad():
        other_values[0].weight.fill_(9.0)  # type: ignore[index, union-attr, operator]
    assert flat_of(other_values).digest() == reference
    renamed = nn.Sequential()
    for number, layer in enumerate(network().children()):
        renamed.add_module(f"layer{number}", layer)
    shapes = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    without_buffers = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))
    for other in (renamed, shapes, without_buffers, network().double()):
        assert flat_of(other).digest() != reference


def test_what_replaces_a_parameters_storage_is_copied_in_and_trained_on() -> None:
    """`p.data = ...` is how weights are clamped, and `model.to(memory_format=...)` does it, too."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2))
    flat = flat_of(model)
    clamped = model[2].weight.detach().clamp(0.0, 0.1)
    model[2].weight.data = clamped
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = model[0].weight.detach().clone()
    flat.take_back()
    flat.parameters.mul_(2)
    assert torch.equal(model[2].weight, 2 * clamped)
    assert torch.equal(model[0].weight, 2 * before)
    assert torch.equal(flat.views(flat.parameters)["0.weight"], model[0].weight)


def test_a_parameter_that_was_moved_is_named() -> None:
    model = network()
    flat = flat_of(model)
    model.to(torch.float64)
    with pytest.raises(ConfigError, match=r"'0\.weight' was torch\.float32 \(3, 4\) on cpu .* and is torch\.float64"):
        flat.take_back()


class Mean(nn.Module):
    """Assigns its buffer anew, as many codebooks do."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.mean(0) * self.weight
        return self.mean


def test_a_buffer_that_a_module_assigns_anew_stays_in_the_vector() -> None:
    model = Mean()
    flat = flat_of(model)
    model(torch.full((2, 3), 4.0))
    assert torch.equal(flat.buffers, torch.full((3,), 2.0))
    flat.buffers.fill_(7.0)
    assert torch.equal(model.mean, torch.full((3,), 7.0))
    model.mean = torch.zeros(4)
    with pytest.raises(ConfigError, match=r"buffer 'mean' of Mean had shape \(3,\).*has \(4,\) now"):
        _ = flat.buffers


def test_buffers_of_a_float64_model_are_in_the_vector() -> None:
    model = network().double()
    flat = flat_of(model)
    assert flat.buffers.dtype == torch.float64
    flat.buffers.fill_(5.0)
    assert torch.equal(model[1].running_mean, torch.full((3,), 5.0, dtype=torch.float64))  # type: ignore[arg-type]


def test_state_that_is_no_tensor_is_left_alone() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"version": 3}

    flat = flat_of(Extra(2, 2))
    assert flat.rest == []


class Aliased(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        whole = torch.randn(6)
        if what == "parameters":
            self.first, self.second = nn.Parameter(whole[:4]), nn.Parameter(whole[2:])
        elif what == "buffers":
            self.weight = nn.Parameter(torch.randn(2))
            self.register_buffer("first", whole)
            self.register_buffer("second", whole[:3])
        else:
            self.first = nn.Parameter(whole)
            self.register_buffer("second", self.first.data[1:2])


@pytest.mark.parametrize("what", ["parameters", "buffers", "a buffer in a parameter"])
def test_tensors_that_share_memory_are_refused(what: str) -> None:
    """Each would go its own way."""
    with pytest.raises(ConfigError, match=r"'(first|second)' and '(first|second)' of the model share memory"):
        flat_of(Aliased(what))


def test_tied_parameters_are_one() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert flat_of(model).layout.runs.count == 9 + 3 + 3


def test_what_has_no_shape_or_is_complex_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'0\.weight' has no shape yet: run the model once"):
        flat_of(nn.Sequential(nn.LazyLinear(3)))
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(2))  # Not of what stands before it is it told.
    model.wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match=r"'wave' is torch\.complex64"):
        flat_of(model)


def test_buffers_of_any_dtype_are_restored() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("count", torch.tensor(0))
    model.register_buffer("mean", torch.zeros(2, dtype=torch.float64))
    flat = flat_of(model)
    flat.keep_buffers()
    for value in (float("nan"), 1.0):
        with torch.no_grad():
            model.count += 1  # type: ignore[operator]
            model.mean.fill_(value)  # type: ignore[operator, union-attr]
        if value != 1.0:
            flat.keep_buffers()  # Comes after the pass that spoiled them.
        flat.restore_buffers()
        assert model.count == 0
        assert torch.equal(model.mean, torch.zeros(2, dtype=torch.float64))  # type: ignore[arg-type]


def test_two_optimizers_of_one_model_see_the_same_buffers() -> None:
    model = network()
    first = FlatModel(model, [[*model[0].parameters()]])  # type: ignore[index, operator]
    second = FlatModel(model, [[*model[2].parameters()]])  # type: ignore[index, operator]
    for value, flat in ((1.0, first), (2.0, second), (3.0, first)):
        with torch.no_grad():
            model[1].running_mean.fill_(value)  # type: ignore[index, operator, union-attr]
        assert (flat.buffers[:3] == value).all()
        flat.buffers[:3] = -value
        assert (model[1].running_mean == -value).all()  # type: ignore[index, union-attr]


def test_a_step_of_one_optimizer_confirms_what_another_must_not_take_back() -> None:
    """Statistics are those of all optimizers of a model; a module whose numbers are spoiled waits, the others not."""
    model = nn.ModuleDict({"one": network(), "other": network()})
    both = [FlatModel(model, [[*model[name].parameters()]]) for name in ("one", "other")]
    for flat in both:
        flat.keep_buffers()
    statistics = {name: model[name][1].running_mean for name in ("one", "other")}  # type: ignore[index]
    counts = {name: model[name][1].num_batches_tracked for name in ("one", "other")}  # type: ignore[index]
    with torch.no_grad():
        statistics["one"].fill_(1.0)  # Of a good step.
        counts["one"].fill_(1)
        statistics["other"].fill_(float("nan"))  # Of one that will be skipped.
        counts["other"].fill_(1)
    assert both[0].shares_buffers
    both[0].keep_buffers()
    both[1].restore_buffers()
    assert statistics["one"].tolist() == [1, 1, 1]
    assert statistics["other"].tolist() == [0, 0, 0]
    assert {name: int(count) for name, count in counts.items()} == {"one": 1, "other": 0}


def test_optimizers_of_a_model_and_of_a_part_of_it_hear_of_each_other() -> None:
    model = nn.ModuleDict({"one": network(), "other": network()})
    whole = FlatModel(model, [[*model["other"].parameters()]])
    part = FlatModel(model["one"], [[*model["one"].parameters()]])
    whole.keep_buffers()
    part.keep_buffers()
    with torch.no_grad():
        model["one"][1].running_mean.fill_(1.0)  # type: ignore[index]
    part.keep_buffers()
    whole.restore_buffers()
    assert model["one"][1].running_mean.tolist() == [1, 1, 1]  # type: ignore[index]
    assert part.buffers[:3].tolist() == [1, 1, 1]


def test_infinity_in_a_mask_is_no_reason_to_forget_statistics() -> None:
    model = network()
    model.register_buffer("mask", torch.full((2, 2), -float("inf")).triu(1))
    flat = flat_of(model)
    flat.keep_buffers()
    with torch.no_grad():
        model[1].running_mean.fill_(1.0)  # type: ignore[index, union-attr, operator]
    flat.keep_buffers()
    flat.restore_buffers()
    assert model[1].running_mean.tolist() == [1, 1, 1]  # type: ignore[index, union-attr]
