"""Two thin matrices for each weight matrix: PowerSGD (Vogels, Karimireddy, Jaggi 2019, algorithm 1).

Shapes: a matrix M (n, m), P (n, r), Q (m, r). One step of the power method a call, begun from the Q of the last:

    P = mean over ranks of M Q, orthonormal columns;  Q = mean over ranks of M^T P;  the mean of M is about P Q^T

What two factors would not make shorter (biases, thin matrices) is averaged whole, as in the paper. Only the directions
of Q are kept: its size is that of M, which may be next to nothing, and P has none.
"""

import math
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hvdvae.compression.codec import Averaged
from hvdvae.errors import ConfigError


class PowerSgd(Averaged):
    """`rank`: r. Keeps each matrix's Q from one call to the next."""

    name = "powersgd"

    def __init__(self, shapes: Sequence[tuple[int, ...]], rank: int) -> None:
        """`shapes`: of the tensors that follow each other in the vector. Raises ConfigError.

        Warns where no matrix is large enough for its two factors to be shorter than it is.
        """
        if not isinstance(rank, int) or rank < 1:
            raise ConfigError(f"--compression-rank is {rank}, expected a whole number of at least 1")
        self._parts: list[tuple[slice, tuple[int, int] | None]] = []
        start = 0
        for shape in shapes:
            count = math.prod(shape)
            pair = (shape[0], count // shape[0]) if len(shape) > 1 and count else None
            thin = pair is not None and rank * sum(pair) < count
            self._parts.append((slice(start, start + count), pair if thin else None))
            start += count
        if start and not any(pair for _, pair in self._parts):
            warnings.warn(
                f"--compression powersgd with --compression-rank {rank} makes nothing of this model shorter, and "
                "averages all of it as it is: two factors have rank * (rows + columns) elements, no matrix has more",
                stacklevel=2,
            )
        generator = torch.Generator().manual_seed(0)
        self._q = [torch.randn(pair[1], rank, generator=generator) for _, pair in self._parts if pair is not None]

    def average(self, vector: Tensor, sent: Tensor, key: int) -> Iterator[Tensor]:
        """As Averaged's."""
        matrices = [vector[part].view(pair) for part, pair in self._parts if pair is not None]
        whole = [part for part, pair in self._parts if pair is None]
        first = torch.cat(
            [*[(m @ q).view(-1) for m, q in zip(matrices, self._q, strict=True)], *[vector[p] for p in whole]]
        )
        sent.copy_(vector)
        yield first
        sizes = [m.shape[0] * q.shape[1] for m, q in zip(matrices, self._q, strict=True)]
        *means, rest = torch.split(first, [*sizes, first.numel() - sum(sizes)])
        p = [orthonormal(mean.view(m.shape[0], -1)) for mean, m in zip(means, matrices, strict=True)]
        own = [m.T @ columns for m, columns in zip(matrices, p, strict=True)]
        for (part, pair), columns, q in zip(self._thin(), p, own, strict=True):
            torch.mm(columns, q.T, out=sent[part].view(pair))
        second = torch.cat([q.reshape(-1) for q in own]) if own else torch.empty(0)
        yield second
        q_means = [
            mean.view(q.shape) for mean, q in zip(torch.split(second, [q.numel() for q in own]), own, strict=True)
        ]
        for (part, pair), columns, q in zip(self._thin(), p, q_means, strict=True):
            torch.mm(columns, q.T, out=vector[part].view(pair))
        for part, values in zip(whole, torch.split(rest, [part.stop - part.start for part in whole]), strict=True):
            vector[part].copy_(values)
        if bool(torch.isfinite(second).all()):  # Else the step is skipped, and the next begins where this one did.
            for kept, q in zip(self._q, q_means, strict=True):
                # A column of zeros would stay one: where there was nothing to send, the next begins where this one did.
                sent_columns = q.any(0)
                kept[:, sent_columns] = _unit(q[:, sent_columns])

    def memory(self) -> dict[str, Tensor]:
        """As Averaged's: each matrix's Q."""
        return {f"q{number}": q for number, q in enumerate(self._q)}

    def _thin(self) -> list[tuple[slice, tuple[int, int]]]:
        return [(part, pair) for part, pair in self._parts if pair is not None]


NOTHING = 1e-6
"""What is left of a column, as a part of it, where float32 cannot tell it from the ones before."""


def orthonormal(columns: Tensor) -> Tensor:
    """The same space (n, r) with orthonormal columns, by Gram and Schmidt, whatever their size.

    A column of zeros stays one, and one that lies in the space of those before becomes one.
    """
    found = _unit(columns)
    for place in range(1, found.shape[1]):
        column = found[:, place]
        for _ in range(2):  # Once leaves a remainder where columns are nearly parallel.
            column -= found[:, :place] @ (found[:, :place].T @ column)
            length = torch.linalg.vector_norm(column)
            if float(length) < NOTHING:
                column.zero_()
                break
            column /= length
    return found


def _unit(columns: Tensor) -> Tensor:
    """Columns (n, r) of length 1, or 0 where they are zero."""
    largest = columns.abs().amax(0)
    # By the largest first: squares of small numbers are zero in float32.
    scaled = columns / torch.where(largest > 0, largest, torch.ones_like(largest))
    unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=0).clamp(min=NOTHING)
    return unit
