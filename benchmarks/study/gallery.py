"""The pictures of a report where matplotlib is installed, and none where it is not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.study.findings import Condition

NO_PICTURES = (
    "No pictures: matplotlib is not installed. After `pip install matplotlib` the same command with --report-only "
    "draws them."
)


class Gallery(Protocol):
    """Draws; each method returns an <svg> element, or nothing."""

    def curves(self, name: str, condition: Condition, key: str) -> str:
        """The bound over `key` (seconds or examples)."""

    def times(self, name: str, condition: Condition) -> str:
        """Seconds to the target."""

    def split(self, name: str, condition: Condition) -> str:
        """Where each rank's time went."""

    def staleness(self, name: str, condition: Condition) -> str:
        """Updates between pull and push."""

    def scaling(self, name: str, scenario: str, found: Sequence[Condition], cores: int) -> str:
        """Throughput over world size."""


class _Bare:
    """Draws nothing."""

    def curves(self, name: str, condition: Condition, key: str) -> str:
        """As Gallery's."""
        return ""

    times = split = staleness = scaling = lambda self, *_: ""


def has_matplotlib() -> bool:
    """Whether pictures can be drawn. Local."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def gallery_in(folder: Path, contenders: Sequence[str]) -> tuple[Gallery, str]:
    """What draws into a folder, for contenders in the study's order; and why it draws nothing, where it does not."""
    if not has_matplotlib():
        return _Bare(), NO_PICTURES
    from benchmarks.study.pictures import Pictures

    return Pictures(folder, contenders), ""
