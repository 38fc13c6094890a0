"""A data set: three sources that belong together."""

from dataclasses import dataclass

from hvdvae.data.source import Source


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Three splits of one shape, dtype and scale, the same on every rank."""

    name: str
    """The name or the file's, for summaries."""
    train: Source
    validation: Source
    test: Source

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example, (D,) or (C, H, W)."""
        return self.train.shape
