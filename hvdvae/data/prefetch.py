"""Work one thread ahead: items are made in the background while the caller computes."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")

_DEPTH = 2
_STOP_SECONDS = 10.0


class _End:
    """Follows the last item; carries what ended the thread, if it failed."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(items: Iterable[T], depth: int = _DEPTH) -> Generator[T, None, None]:
    """Yield `items`, made by a thread that is at most `depth` + 1 items ahead.

    The thread starts with the first item asked for and ends with the last, or when the iterator is closed or
    collected, which waits for the item in the making. What the thread raises is raised here, at its place.
    """
    ready: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, ready, stop), name="hvdvae-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        _drain(ready)  # wakes a thread that waits for room
        thread.join(_STOP_SECONDS)


def _fill(items: Iterable[T], ready: "queue.Queue[T | _End]", stop: threading.Event) -> None:
    error: BaseException | None = None
    try:
        for item in items:
            if stop.is_set():
                return
            ready.put(item)
    except BaseException as raised:
        error = raised  # raised again by the caller, which must not wait for ever whatever it is
    if not stop.is_set():
        ready.put(_End(error))


def _drain(ready: "queue.Queue[T | _End]") -> None:
    try:
        while True:
            ready.get_nowait()
    except queue.Empty:
        return
