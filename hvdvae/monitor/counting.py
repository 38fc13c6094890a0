"""Progress of one long count: a bar on a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 20.0


@contextmanager
def counting(title: str, stream: TextIO) -> Iterator[Callable[[int, int], None]]:
    """Gives `show(done, total)`, which shows how far it is on `stream`; nothing without a title."""
    if title and stream.isatty():
        with tqdm(desc=title, unit="chunk", leave=False, file=stream) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield show
        return
    start = last = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if title and now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (total - done) * (now - start) / done
            stream.write(f"{title}: {done / total:.0%}, {clock(left)} left\n")
            stream.flush()

    yield say


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
