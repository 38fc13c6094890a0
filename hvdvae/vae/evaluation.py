"""The result of an evaluation, and how the ranks' parts of it are put together."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

ACTIVE_THRESHOLD = 0.01  # Burda et al. 2016, section 5.2


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything in nats; arrays in example order, float64."""

    samples: int
    nll_per_example: Floats  # (examples,) importance-weighted bound with `samples` samples
    rate_per_example: Floats  # (examples,)
    distortion_per_example: Floats  # (examples,)
    kl_per_dimension: tuple[Floats, ...]  # a stochastic layer, bottom up: (L,), mean over examples
    mean_variance: tuple[Floats, ...]  # a layer: (L,) Var over x of the mean of q(z|x)

    @property
    def nll(self) -> float:
        """Mean importance-weighted bound on -log p(x), nats per example (Burda et al. 2016)."""
        return float(self.nll_per_example.mean())

    @property
    def nll_error(self) -> float:
        """Standard error of `nll` from the finite number of examples, nats; nan for one example."""
        n = len(self.nll_per_example)
        return float(self.nll_per_example.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")

    @property
    def rate(self) -> float:
        """Mean KL(q(z|x) || p(z)), nats per example."""
        return float(self.rate_per_example.mean())

    @property
    def distortion(self) -> float:
        """Mean -log p(x|z) under q, nats per example."""
        return float(self.distortion_per_example.mean())

    @property
    def elbo(self) -> float:
        """-(rate + distortion), nats per example."""
        return -(self.rate + self.distortion)

    @property
    def active_units(self) -> tuple[int, ...]:
        """A layer, bottom up: the number of dimensions whose mean varies over x by more than 0.01."""
        return tuple(int((variance > ACTIVE_THRESHOLD).sum()) for variance in self.mean_variance)


@dataclass(kw_only=True)
class Part:
    """One rank's chunks of an evaluation."""

    count: int
    samples: int
    chunk_examples: int
    latent: tuple[int, ...]
    chunks: list[int]
    per_example: list[Floats]  # a chunk: (3, B) nll, rate, distortion
    kl: list[Floats]  # a chunk: (L,) sum over its examples, all layers side by side
    moments: list[Floats]  # a chunk: (2, L) sums of the posterior mean and of its square

    @classmethod
    def empty(cls, count: int, samples: int, chunk_examples: int, latent: Sequence[int]) -> Self:
        """A part without chunks yet."""
        return cls(
            count=count,
            samples=samples,
            chunk_examples=chunk_examples,
            latent=tuple(latent),
            chunks=[],
            per_example=[],
            kl=[],
            moments=[],
        )

    def add(self, chunk: int, per_example: Floats, kl: Floats, moments: Floats) -> None:
        """Appends one chunk's results."""
        self.chunks.append(chunk)
        self.per_example.append(per_example)
        self.kl.append(kl)
        self.moments.append(moments)

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; the floats as bytes, so that nothing is rounded."""
        width = sum(self.latent)
        arrays = {
            "per_example": np.concatenate([np.zeros((3, 0)), *self.per_example], axis=1),
            "kl": np.array(self.kl).reshape(-1, width),
            "moments": np.array(self.moments).reshape(-1, 2, width),
        }
        packed = {name: base64.b64encode(array.astype("<f8").tobytes()).decode() for name, array in arrays.items()}
        sizes = {"count": self.count, "samples": self.samples, "chunk_examples": self.chunk_examples}
        return {**sizes, "latent": list(self.latent), "chunks": self.chunks, **packed}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_json."""

        def unpack(name: str) -> Floats:
            return np.frombuffer(base64.b64decode(values[name]), dtype="<f8").astype(np.float64)

        part = cls.empty(values["count"], values["samples"], values["chunk_examples"], values["latent"])
        width = sum(part.latent)
        part.chunks = list(values["chunks"])
        lengths = [min(part.chunk_examples, part.count - c * part.chunk_examples) for c in part.chunks]
        columns = unpack("per_example").reshape(3, -1)
        part.per_example = np.split(columns, np.cumsum(lengths)[:-1], axis=1) if lengths else []
        part.kl = list(unpack("kl").reshape(-1, width))
        part.moments = list(unpack("moments").reshape(-1, 2, width))
        return part


def combine(parts: Sequence[Part]) -> Evaluation:
    """Puts the parts of all ranks, in any order, together.

    Raises ValueError if a chunk is missing or there twice.
    """
    first = parts[0]
    rows = [row for part in parts for row in zip(part.chunks, part.per_example, part.kl, part.moments, strict=True)]
    rows.sort(key=lambda row: row[0])
    expected = -(-first.count // first.chunk_examples)
    if [row[0] for row in rows] != list(range(expected)):
        raise ValueError(
            f"evaluation parts: found chunks {[row[0] for row in rows]}, expected each of 0..{expected - 1} once"
        )
    nll, rate, distortion = np.concatenate([row[1] for row in rows], axis=1)
    splits = np.cumsum(first.latent)[:-1]
    kl = np.sum([row[2] for row in rows], axis=0) / first.count
    mean, square = np.sum([row[3] for row in rows], axis=0) / first.count
    return Evaluation(
        samples=first.samples,
        nll_per_example=nll,
        rate_per_example=rate,
        distortion_per_example=distortion,
        kl_per_dimension=tuple(np.split(kl, splits)),
        mean_variance=tuple(np.split(np.maximum(square - mean**2, 0), splits)),
    )
