"""Batches on an accelerator: small sets live there, others come through pinned memory without blocking.

Both cross the bus in the form they are stored in (uint8) and become float32 on the device.
"""

from collections.abc import Generator, Iterable

import torch

from hvdvae.data.binarize import binarize, training_key
from hvdvae.data.inputs import to_input_on_device
from hvdvae.data.prefetch import prefetched
from hvdvae.data.read import read
from hvdvae.data.source import Indices, Source
from hvdvae.seeding import stream

RESIDENT_FRACTION = 10
"""A source lives on the device if it takes at most one part in so many of the device's free memory."""


class AcceleratorFeed:
    """Turns cuts of indices into batches on `device`. Uploads a small source once, in the constructor."""

    def __init__(self, source: Source, *, binarization: str, seed: int, device: torch.device) -> None:
        self._source, self._device, self._seed = source, device, seed
        self._static = binarization == "static"
        # Static noise belongs to the example, so it is drawn where examples have addresses, on the host.
        binary = self._static or (source.peak == 1 and source.dtype.kind == "u")
        self._binarization = "none" if binary else binarization
        self._peak = 1 if binary else source.peak
        self._generator = torch.Generator(device)
        self._resident = self._upload() if source.nbytes <= _free_bytes(device) // RESIDENT_FRACTION else None

    def batches(self, cuts: Iterable[Indices], epoch: int) -> Generator[torch.Tensor, None, None]:
        """One batch (B, *shape), float32, for each cut of indices (B,).

        The host does not wait for the device. Noise is drawn on the device, keyed by (seed, epoch, first
        example of the cut): each rank has its own.
        """
        if self._resident is not None:
            stored = ((cut, self._resident.index_select(0, self._send(torch.from_numpy(cut)))) for cut in cuts)
        else:
            pinned = prefetched((cut, self._pin(self._host(cut))) for cut in cuts)
            stored = ((cut, self._send(values)) for cut, values in pinned)
        for cut, values in stored:
            self._generator.manual_seed(stream(self._seed, epoch, int(cut[0])) >> 1)
            yield to_input_on_device(
                values,
                peak=self._peak,
                binarization=self._binarization,
                generator=self._generator,
            )

    def _host(self, examples: Indices) -> torch.Tensor:
        values = read(self._source, examples)
        if self._static:
            drawn = binarize(values, self._source.peak, training_key("static", self._seed, 0), examples)
            return torch.from_numpy(drawn).to(torch.uint8)
        return torch.from_numpy(values)

    def _pin(self, values: torch.Tensor) -> torch.Tensor:
        return values.pin_memory() if self._device.type == "cuda" else values

    def _send(self, values: torch.Tensor) -> torch.Tensor:
        return self._pin(values).to(self._device, non_blocking=True)

    def _upload(self) -> torch.Tensor:
        dtype = torch.uint8 if self._static or self._source.dtype.kind == "u" else torch.float32
        resident = torch.empty((len(self._source), *self._source.shape), dtype=dtype, device=self._device)
        for examples in self._source.spans():
            resident[int(examples[0]) : int(examples[-1]) + 1].copy_(self._host(examples))
        return resident


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
