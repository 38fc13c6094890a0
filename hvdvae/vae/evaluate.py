"""How good a model is: the importance-weighted bound, rate, distortion, and what its latents do.

Examples are cut into fixed chunks, whatever the number of ranks. Each chunk has its own generator, seeded by
(seed, chunk number), and chunks are dealt to ranks round robin; results are kept an example (or a chunk) and
put together in chunk order in float64, whenever ranks exchange them. So the numbers are the same, bit for bit,
at every world size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hvdvae.errors import ConfigError
from hvdvae.vae.evaluation import Evaluation, Floats, Part, combine
from hvdvae.vae.model import VAE

Gather = Callable[[int, int], Tensor]

_CHUNK_EXAMPLES = 32
_CHUNK_ROWS = 512  # rows of a decoder pass: enough for the matrix products, few enough for the cache
_CHUNK_NUMBERS = 2**20  # pixels of a decoder pass, the bound for large images
_ROUND_NUMBERS = 2**28  # pixels that a rank decodes between two meetings: seconds, where a meeting takes milliseconds


def chunk_sizes(shape: tuple[int, ...], samples: int) -> tuple[int, int]:
    """(examples, samples) of one decoder pass: of the model's shape alone, so that every rank cuts alike."""
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_NUMBERS // math.prod(shape)))
    examples = min(_CHUNK_EXAMPLES, rows)
    return examples, min(samples, max(1, rows // examples))


def round_chunks(shape: tuple[int, ...], samples: int) -> int:
    """Chunks of a rank between two meetings: of shape and samples alone, so that every rank comes to as many."""
    examples, _ = chunk_sizes(shape, samples)
    return max(1, _ROUND_NUMBERS // (examples * samples * math.prod(shape)))


def evaluate(
    model: VAE,
    gather: Gather,
    count: int,
    *,
    samples: int = 5000,
    seed: int = 0,
    rank: int = 0,
    size: int = 1,
    gather_objects: Callable[[dict[str, object]], list[dict[str, object]]] = lambda part: [part],
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates `count` examples over all ranks; every rank must call it, and every rank gets the result.

    gather: (start, stop) -> those examples, (stop - start, *shape) float; must not depend on the rank.
    samples: k of the importance-weighted bound. gather_objects: JSON-able object -> list of every rank's; called after
    every few chunks, so that ranks of unequal speed wait for each other no longer than these differ.
    progress: called with (chunks done, chunks of this rank). The model is in eval mode meanwhile. Memory: one decoder
    pass and 24 bytes an example. Raises ConfigError for no examples or samples.
    """
    if count < 1 or samples < 1:
        raise ConfigError(f"evaluate: found {count} examples, {samples} samples, expected at least 1 of each")
    examples, chunk_samples = chunk_sizes(model.shape, samples)
    chunks = math.ceil(count / examples)
    mine = range(rank, chunks, size)
    generator = torch.Generator(next(model.parameters()).device)
    parts: list[Part] = []
    per_round = round_chunks(model.shape, samples)
    # Every rank has as many rounds, though its last may be empty.
    for start in range(0, math.ceil(chunks / size), per_round):
        part = Part.empty(count, samples, examples, model.latent)
        with evaluating(model):
            for done, chunk in enumerate(mine[start : start + per_round], start=start + 1):
                generator.manual_seed(_seed_of(seed, chunk))
                x = gather(chunk * examples, min((chunk + 1) * examples, count)).to(generator.device, torch.float32)
                part.add(chunk, *_evaluate_chunk(model, x, samples, chunk_samples, generator))
                if progress is not None:
                    progress(done, len(mine))
        parts += [Part.from_json(other) for other in gather_objects(part.to_json())]
    return combine(parts)


@dataclass
class _Sums:
    """Running sums over samples, float64."""

    log_weight: Tensor  # (B,) log of the sum of importance weights
    log_px: Tensor  # (B,)
    kl: list[Tensor]  # a layer: (B, L)
    mean: list[Tensor]  # a layer: (B, L) of q's mean


def _evaluate_chunk(
    model: VAE, x: Tensor, samples: int, step: int, generator: torch.Generator
) -> tuple[Floats, Floats, Floats]:
    """(3, B) nll, rate, distortion; (L,) sum of KL; (2, L) sums of mean and its square. L: all layers'."""
    q = model.encode(x)
    sums: _Sums | None = None
    for start in range(0, samples, step):
        k = min(step, samples - start)
        drawn = model.draw(q, k, importance=True, generator=generator)
        assert drawn.log_ratio is not None
        log_px = model.log_px(x, drawn.z)
        now = _Sums(
            torch.logsumexp((log_px - drawn.log_ratio).double(), 0),
            log_px.double().sum(0),
            # what is the same for all samples has one row, to be counted k times
            [kl.double().sum(0) * (k / kl.shape[0]) for kl in drawn.kl],
            [p.mean.double().sum(0) * (k / p.packed.shape[0]) for p in drawn.posteriors],
        )
        if sums is None:
            sums = now
        else:
            sums.log_weight = torch.logaddexp(sums.log_weight, now.log_weight)
            sums.log_px += now.log_px
            for total, more in zip(sums.kl + sums.mean, now.kl + now.mean, strict=True):
                total += more
    assert sums is not None
    kl = torch.cat(sums.kl, 1) / samples
    mean = torch.cat(sums.mean, 1) / samples
    nll = math.log(samples) - sums.log_weight
    per_example = torch.stack((nll, kl.sum(1), -sums.log_px / samples))
    moments = torch.stack((mean.sum(0), mean.square().sum(0)))
    return per_example.cpu().numpy(), kl.sum(0).cpu().numpy(), moments.cpu().numpy()


def _seed_of(seed: int, chunk: int) -> int:
    return int(np.random.SeedSequence((seed, chunk)).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def evaluating(model: VAE) -> Iterator[None]:
    """Eval mode without gradients inside the block; the mode as it was after it."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)
