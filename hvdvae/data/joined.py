"""Several sources as one: all examples of a data set, split after split."""

from collections.abc import Sequence

import numpy as np

from hvdvae.data.source import Indices, Source, Values


class Joined(Source):
    """The examples of sources of one shape, dtype and scale, one source after the other. Copies no data."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """`sources`: at least one."""
        self._sources = list(sources)
        self._starts = np.cumsum([0, *map(len, sources)])
        first = sources[0]
        self.path, self.shape, self.dtype = first.path, first.shape, first.dtype
        self.stored, self.white_is_255, self.notes = first.stored, first.white_is_255, first.notes
        self.in_memory = all(source.in_memory for source in sources)
        low, high = zip(*(source.limits for source in sources), strict=True)
        self.limits = (min(low), max(high))

    def __len__(self) -> int:
        """Number of examples of all sources."""
        return int(self._starts[-1])

    def gather(self, indices: Indices) -> Values:
        """As Source's; each source reads its own."""
        batch = np.empty((len(indices), *self.shape), self.dtype)
        owners = np.searchsorted(self._starts, indices, side="right") - 1
        for number, source in enumerate(self._sources):
            mine = owners == number
            if mine.any():
                batch[mine] = source.gather(indices[mine] - self._starts[number])
        return batch
