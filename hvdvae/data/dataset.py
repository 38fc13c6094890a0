"""A data set: three sources that belong together."""

from dataclasses import dataclass

from hvdvae.data.joined import Joined
from hvdvae.data.source import Source, base_of


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Three splits of one shape, dtype and scale, the same on every rank."""

    name: str
    """The name or the file's, for summaries."""
    train: Source
    validation: Source
    test: Source
    brought: tuple[str, ...] = ("train", "validation", "test")
    """Splits that the data brings; the others are cut from train."""

    @property
    def whole(self) -> Source:
        """All examples: as the data has them, split after split. Copies no data."""
        # What was cut from train is in it.
        sources = [base_of(self.train), *(getattr(self, split) for split in self.brought if split != "train")]
        return sources[0] if len(sources) == 1 else Joined(sources)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example, (D,) or (C, H, W)."""
        return self.train.shape
