"""Codecs say what they should, in the bytes they should, and error feedback loses nothing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvdvae.compression import CODECS, Averaged, Gathered, codec_of
from hvdvae.compression.feedback import Feedback
from hvdvae.compression.int8 import CHUNK, LEVELS
from hvdvae.compression.powersgd import orthonormal
from hvdvae.errors import ConfigError

GATHERED = ("fp16", "bf16", "int8", "sign", "topk")
LENGTHS = (1, 7, 8, 1023, 1024, 4097, 70_001, 140_000)


def vector(length: int, seed: int = 0) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed))


def gathered(name: str, length: int, share: float | None = None) -> Gathered:
    codec = codec_of(name, [(length,)], share=share)
    assert isinstance(codec, Gathered)
    return codec


def message_of(codec: Gathered, of: Tensor, key: int = 0) -> Tensor:
    message = torch.zeros(codec.nbytes, dtype=torch.uint8)
    codec.encode(of, message, key)
    return message


def decoded(codec: Gathered, of: Tensor, key: int = 0) -> Tensor:
    total = torch.zeros_like(of)
    codec.add(message_of(codec, of, key), total)
    return total


def averaged(codec: Averaged, vectors: list[Tensor], key: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """What ranks with these vectors end with, and what each said; the means are taken here."""
    ends, said = [each.clone() for each in vectors], [torch.empty_like(each) for each in vectors]
    talks = [codec.average(end, sent, key) for end, sent in zip(ends, said, strict=True)]
    if len(talks) == 1:
        for _ in talks[0]:
            pass
        return ends, said
    # The codec's own memory is shared here, so all must be asked before any goes on.
    for parts in zip(*talks, strict=True):
        mean = torch.stack(parts).mean(0)
        for part in parts:
            part.copy_(mean)
    return ends, said


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", GATHERED)
def test_a_message_adds_what_it_says_and_leaves_the_vector_alone(name: str, length: int) -> None:
    codec, of = gathered(name, length), vector(length)
    before = of.clone()
    once = decoded(codec, of)
    assert torch.equal(of, before)
    twice = once.clone()
    codec.add(message_of(codec, of), twice)
    torch.testing.assert_close(twice, 2 * once)
    assert torch.equal(once, decoded(codec, of)), "the same key says the same"
    assert once.any()


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_halves_are_rounded_to_the_nearest(name: str, dtype: torch.dtype) -> None:
    of = vector(5000)
    assert torch.equal(decoded(gathered(name, 5000), of), of.to(dtype).float())


def test_bytes_on_the_wire() -> None:
    length = 100_000
    sizes = {name: gathered(name, length).nbytes for name in GATHERED}
    assert sizes == {
        "fp16": 200_000,
        "bf16": 200_000,
        "int8": 100_000 + 4 * 98,
        "sign": 12_500 + 4 * 25,
        "topk": 8 * 1000,
    }


def test_int8_is_a_level_off_at_most_and_right_in_the_mean() -> None:
    of = vector(3000) * torch.linspace(0.01, 10, 3000)
    codec = gathered("int8", 3000)
    tries = torch.stack([decoded(codec, of, key) for key in range(400)])
    level = torch.cat([part.abs().max().expand(part.numel()) for part in of.split(CHUNK)]) / LEVELS
    assert ((tries - of).abs() <= level * 1.0001).all()
    # The mean of 400 tries is off by at most some standard errors of half a level.
    assert ((tries.mean(0) - of).abs() <= 5 * 0.5 * level / math.sqrt(400)).float().mean() > 0.999
    assert len({decoded(codec, of, key).numpy().tobytes() for key in range(5)}) == 5


def test_int8_keeps_zeros_and_the_largest() -> None:
    of = torch.zeros(2 * CHUNK)
    of[5], of[9] = 3.0, -3.0
    assert torch.equal(decoded(gathered("int8", 2 * CHUNK), of), of)


def test_sign_says_the_mean_size_of_each_chunk() -> None:
    of = vector(4096 + 100)
    said = decoded(gathered("sign", of.numel()), of)
    for part, word in zip(of.split(4096), said.split(4096), strict=True):
        torch.testing.assert_close(word, torch.where(part >= 0, 1.0, -1.0) * part.abs().mean())


@given(length=st.integers(1, 3000), share=st.floats(0.001, 1), seed=st.integers(0, 100), flat=st.booleans())
def test_topk_says_exactly_the_largest(length: int, share: float, seed: int, flat: bool) -> None:
    of = vector(length, seed)
    if flat:  # Many of one size: any of them will do.
        of = of.sign()
    said = decoded(gathered("topk", length, share), of)
    count = max(1, round(length * share))
    places = said.nonzero().view(-1)
    assert places.numel() == count
    assert torch.equal(said[places], of[places])
    assert torch.equal(said.abs().sort(descending=True).values[:count], of.abs().sort(descending=True).values[:count])


def test_topk_finds_few_large_ones_that_no_sample_sees() -> None:
    of = torch.full((1_000_000,), 1e-3)
    of[[12_345, 678_901]] = torch.tensor([5.0, -7.0])
    said = decoded(gathered("topk", of.numel(), 2e-6), of)
    assert said.nonzero().view(-1).tolist() == [12_345, 678_901]


def test_randomk_visits_all_places_and_each_once_a_message() -> None:
    codec = codec_of("randomk", [(1000,)], share=0.1)
    assert isinstance(codec, Averaged)
    visits = torch.zeros(1000)
    for key in range(300):
        (end,), (said,) = averaged(codec, [vector(1000) + 10], key)
        assert torch.equal(end, said)
        assert int((said != 0).sum()) == 100
        visits += said != 0
    assert visits.min() > 5
    assert visits.max() < 80


@pytest.mark.parametrize("name", ["randomk", "powersgd"])
def test_the_mean_is_that_of_what_all_said(name: str) -> None:
    shapes = [(20, 30), (20,), (4, 5, 6)]
    length = 20 * 30 + 20 + 120
    codec = codec_of(name, shapes)
    assert isinstance(codec, Averaged)
    ends, said = averaged(codec, [vector(length, seed) for seed in range(3)])
    torch.testing.assert_close(ends[0], torch.stack(said).mean(0), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_powersgd_finds_a_matrix_of_its_rank_and_keeps_vectors_whole() -> None:
    left, right = vector(40 * 2).view(40, 2), vector(2 * 30, 1).view(2, 30)
    of = torch.cat([(left @ right).view(-1), vector(30, 2)])
    codec = codec_of("powersgd", [(40, 30), (30,)], rank=2)
    assert isinstance(codec, Averaged)
    for _ in range(3):
        (end,), _ = averaged(codec, [of])
    torch.testing.assert_close(end, of, atol=1e-4, rtol=1e-4)


def test_powersgd_comes_nearer_from_call_to_call() -> None:
    """It goes on where it was: the power method, a step a call."""
    matrix = torch.linalg.qr(vector(50 * 50).view(50, 50)).Q @ torch.diag(0.8 ** torch.arange(50.0))
    codec = codec_of("powersgd", [(50, 50)], rank=3)
    assert isinstance(codec, Averaged)
    errors = []
    for _ in range(15):
        (end,), _ = averaged(codec, [matrix.reshape(-1)])
        errors.append(float((end.view(50, 50) - matrix).norm()))
    best = float(torch.linalg.svdvals(matrix)[3:].norm())
    assert errors[-1] < errors[0]
    assert errors[-1] < 1.05 * best


def test_powersgd_goes_on_where_it_was_after_a_vector_that_is_not_finite() -> None:
    codec = codec_of("powersgd", [(20, 30)])
    assert isinstance(codec, Averaged)
    averaged(codec, [vector(600)])
    before = {name: kept.clone() for name, kept in codec.memory().items()}
    (end,), _ = averaged(codec, [torch.full((600,), math.nan)])
    assert not torch.isfinite(end).any()
    assert all(torch.equal(kept, before[name]) for name, kept in codec.memory().items())


def test_powersgd_sends_what_was_zero_for_a_while() -> None:
    """A layer that begins at zero has no gradient before it, and a branch may be used later."""
    matrix = vector(40).view(40, 1) @ vector(30, 1).view(1, 30)
    codec = codec_of("powersgd", [(40, 30)], rank=2)
    assert isinstance(codec, Averaged)
    averaged(codec, [torch.zeros(1200)])
    averaged(codec, [matrix.reshape(-1)])  # Of rank 1: one column is enough, and the other must not be lost.
    both = (matrix + vector(40, 2).view(40, 1) @ vector(30, 3).view(1, 30)).reshape(-1)
    for _ in range(4):
        (end,), _ = averaged(codec, [both])
    torch.testing.assert_close(end, both, atol=1e-2, rtol=1e-2)


def test_topk_of_nothing_says_nothing() -> None:
    codec = codec_of("topk", [(0,)])
    assert isinstance(codec, Gathered)
    message, total = torch.zeros(codec.nbytes, dtype=torch.uint8), torch.zeros(0)
    codec.encode(torch.zeros(0), message, 0)
    codec.add(message, total)
    assert codec.nbytes == 0


def test_orthonormal_columns() -> None:
    columns = vector(60).view(20, 3)
    columns[:, 2] = columns[:, 0] + 1e-5 * columns[:, 2]
    found = orthonormal(columns)
    torch.testing.assert_close(found.T @ found, torch.eye(3), atol=1e-4, rtol=0)
    assert torch.equal(orthonormal(torch.zeros(5, 2)), torch.zeros(5, 2))


@pytest.mark.parametrize("name", ["sign", "topk", "randomk", "powersgd"])
def test_feedback_remembers_to_the_bit_what_was_left_out(name: str) -> None:
    """Law 5: sent + remembered == original. On a coarse grid sums are exact, and nothing may be lost by rounding."""
    shape, share = ((50, 100), {"topk": 0.01, "randomk": 0.01}.get(name))
    codec, feedback = codec_of(name, [shape], share=share), Feedback(5000, name)
    given_, said = torch.zeros(5000, dtype=torch.float64), torch.zeros(5000, dtype=torch.float64)
    for step in range(20):
        gradient = (vector(5000, step) * 64).round() / 64
        whole = feedback.compensate(gradient).clone()
        sent = decoded(codec, whole, step) if isinstance(codec, Gathered) else averaged(codec, [whole], step)[1][0]
        feedback.remember(sent)
        feedback.keep()
        given_ += gradient
        said += sent
        if name in ("topk", "randomk"):
            assert torch.equal(said + feedback.remembered, given_)
        torch.testing.assert_close(said + feedback.remembered, given_, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["sign", "powersgd"])
def test_small_elements_beside_large_ones_are_not_forgotten(name: str) -> None:
    codec, feedback = codec_of(name, [(64, 64)], rank=None), Feedback(4096, name)
    gradient = vector(4096)
    gradient[::2] *= 1e-8
    said = torch.zeros(4096, dtype=torch.float64)
    for step in range(200):
        whole = feedback.compensate(gradient).clone()
        sent = decoded(codec, whole, step) if isinstance(codec, Gathered) else averaged(codec, [whole], step)[1][0]
        feedback.remember(sent)
        feedback.keep()
        said += sent
    expected = 200 * gradient.double()
    torch.testing.assert_close((said + feedback.remembered)[::2], expected[::2], atol=0, rtol=1e-3)


@pytest.mark.parametrize("size", [1e6, 1.0, 1e-6, 1e-12, 1e-20])
@pytest.mark.parametrize("true_rank", [1, 2, 6])
def test_powersgd_says_no_more_than_there_is_whatever_its_size(size: float, true_rank: int) -> None:
    matrix = (vector(40 * true_rank).view(40, -1) @ vector(30 * true_rank, 1).view(-1, 30)).view(-1) * size
    codec = codec_of("powersgd", [(40, 30)], rank=4)
    for _ in range(6):
        (end,), _ = averaged(codec, [matrix])
        assert float(end.double().norm()) <= 1.001 * float(matrix.double().norm())
    if true_rank <= 4:
        torch.testing.assert_close(end / size, matrix / size, atol=1e-3, rtol=1e-3)


def test_what_is_empty_is_averaged_as_it_is() -> None:
    for name, shapes in (("powersgd", [(0, 3), (4, 5)]), ("randomk", [(0,)])):
        length = sum(math.prod(shape) for shape in shapes)
        (end,), _ = averaged(codec_of(name, shapes), [torch.ones(length)])  # type: ignore[arg-type]
        torch.testing.assert_close(end, torch.ones(length), atol=1e-5, rtol=0)


def test_a_step_that_was_not_taken_changes_nothing() -> None:
    feedback = Feedback(100, "topk", momentum=0.9)
    feedback.compensate(vector(100))
    feedback.remember(torch.zeros(100))
    feedback.keep()
    before = {name: kept.clone() for name, kept in feedback.memory().items()}
    feedback.compensate(torch.full((100,), math.nan))
    feedback.remember(torch.full((100,), math.nan))
    assert all(torch.equal(kept, before[name]) for name, kept in feedback.memory().items())


def test_momentum_correction_sends_what_momentum_would_have_moved() -> None:
    """Where everything is sent at once it is momentum SGD's first step; what is held back goes on gathering speed."""
    gradient = torch.ones(2)
    feedback = Feedback(2, "topk", momentum=0.5)
    moved = torch.zeros(2)
    for step in range(4):
        whole = feedback.compensate(gradient).clone()
        sent = whole * torch.tensor([0.0, 1.0]) if step < 3 else whole
        feedback.remember(sent)
        feedback.keep()
        moved += sent
    # Held back for four steps: velocities 1, 1.5, 1.75, 1.875. Sent each time: the velocity begins anew.
    assert moved.tolist() == [1 + 1.5 + 1.75 + 1.875, 4.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zip", {}, "expected none or one of fp16"),
        ("topk", {"share": 0.0}, "--compression-share is 0.0"),
        ("randomk", {"share": 1.5}, "--compression-share is 1.5"),
        ("topk", {"share": math.nan}, "--compression-share is nan"),
        ("int8", {"share": 0.1}, "--compression-share is for --compression topk and randomk"),
        ("topk", {"rank": 2}, "--compression-rank is for --compression powersgd"),
        ("powersgd", {"rank": 0}, "--compression-rank is 0, expected a whole number of at least 1"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        codec_of(name, [(20, 30), (30,)], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shapes", [[(30,), (4,)], [(64, 1), (64,), (1, 64), (1,)], [(2, 9), (3, 3, 1)], [(20, 30)]])
def test_powersgd_averages_what_is_thin_as_it_is(shapes: list[tuple[int, ...]]) -> None:
    """Vogels et al. 2019: what two factors would not make shorter travels whole; nothing is left out of it."""
    length = sum(math.prod(shape) for shape in shapes)
    rank = 12 if shapes == [(20, 30)] else 2
    with pytest.warns(UserWarning, match="averages all of it as it is"):
        codec = codec_of("powersgd", shapes, rank=rank)
    assert isinstance(codec, Averaged)
    vectors = [vector(length, seed) for seed in range(3)]
    ends, said = averaged(codec, vectors)
    torch.testing.assert_close(ends[0], torch.stack(vectors).mean(0))
    assert all(torch.equal(one, of) for one, of in zip(said, vectors, strict=True)), "law 5, with nothing to remember"


def test_powersgd_sends_thin_matrices_whole_beside_two_factors_of_the_others() -> None:
    shapes = [(40, 30), (40, 1), (1, 40), (40, 2)]
    codec = codec_of("powersgd", shapes, rank=2)
    assert isinstance(codec, Averaged)
    of = vector(1200 + 40 + 40 + 80)
    feedback = Feedback(of.numel(), "powersgd")
    whole = feedback.compensate(of).clone()
    _, (sent,) = averaged(codec, [whole])
    remembered = feedback.remember(sent)
    assert torch.equal(sent[1200:], of[1200:])
    assert not remembered[1200:].any()
    assert remembered[:1200].any()
    torch.testing.assert_close(sent + remembered, of.double(), atol=1e-12, rtol=0)


def test_all_codecs_are_here() -> None:
    assert {*GATHERED, "randomk", "powersgd"} == set(CODECS)
