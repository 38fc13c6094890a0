"""The prefetching iterator: order, errors, and an end in every case."""

import subprocess
import sys
import textwrap
import threading
import time

import pytest

from hvdvae.data.prefetch import prefetched


def test_items_come_in_order_and_are_made_while_the_caller_works():
    makers = set()

    def items():
        for number in range(20):
            makers.add(threading.current_thread().name)
            yield number

    assert list(prefetched(items())) == list(range(20))
    assert makers == {"hvdvae-prefetch"}


def test_nothing_starts_before_the_first_item_is_asked_for():
    started = []
    iterator = prefetched(started.append(n) or n for n in range(3))
    assert started == []
    assert next(iterator) == 0
    iterator.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_an_error_comes_at_its_place(depth):
    def items():
        yield 1
        yield 2
        raise RuntimeError("third")

    iterator = prefetched(items(), depth)
    assert [next(iterator), next(iterator)] == [1, 2]
    with pytest.raises(RuntimeError, match="third"):
        next(iterator)


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_close_ends_a_thread_that_waits_for_room_and_one_that_works(taken):
    for pause in (0.0, 0.02):
        ended = threading.Event()

        def items(pause=pause, ended=ended):
            try:
                while True:
                    time.sleep(pause)
                    yield 0
            finally:
                ended.set()

        iterator = prefetched(items())
        for _ in range(taken):
            next(iterator)
        iterator.close()
        assert not [t for t in threading.enumerate() if t.name == "hvdvae-prefetch"]
        assert ended.wait(5)


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(3)", "raise ValueError('mine')"])
def test_a_program_that_leaves_an_iterator_open_exits(ending):
    program = f"""
        import itertools
        from hvdvae.data.prefetch import prefetched
        iterator = prefetched(itertools.count())
        next(iterator)
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    expected = {"pass": 0, "raise SystemExit(3)": 3, "raise ValueError('mine')": 1}
    assert done.returncode == expected[ending], done.stderr
