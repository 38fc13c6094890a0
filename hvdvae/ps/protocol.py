"""What workers and servers say to each other, on a communicator that is a duplicate of all ranks' and only theirs.

    tag      direction         payload                       dtype
    HEADER   worker -> server  fields of Request, then the   float64 (REQUEST + groups)
                               learning rate of each group
    HEADER   server -> worker  fields of Answer, then of     float64 (ANSWER + 2 * workers + BINS)
                               each worker its clock and
                               seconds a step, then pushes
                               by staleness 0, 1, ...
    OPTIONS  worker -> server  JSON: options of all groups   uint8, before the PUSH that they begin with
    VECTOR   worker -> server  gradient (or weights) of the  the model's, (shard,)
                               server's shard
    VECTOR   server -> worker  weights (or elastic force)    the model's, (shard,)
    VECTOR   both              with --compression: a codec's message       uint8 (ps/wire.py)
    TEXT     both              JSON: manifest of a state     uint8
    STATE    both              state of the optimizer        the model's, (piece of the shard,)

Worker and server on one host exchange vectors in shared memory, and no VECTOR is sent: a worker writes before it sends
the header, and a server before it answers. Nothing is pickled. Every request is answered, so that it can be sent again
to the backup of a server that died (ps/replica.py); a PUSH or DONE is known by its number, and counts once.

    kind      worker says                                        server answers
    INIT      worker 0: TEXT and STATE follow, weights first     once it has all of it
    PUSH      a step is done, its VECTOR follows                 when the policy says so, with weights
    NOTHING   a step is done, and was skipped: not finite        as PUSH, without its having been applied
    FREEZE    hold back pushes from now                          with the clocks of what was applied
    CUT       TEXT: apply up to these clocks, then send all,     weights; STATE: the workers' buffers (workers, F),
              and go on                                          from the last server; TEXT and STATE if wanted
    JOIN      I take a dead worker's place; TEXT: hello          weights; TEXT: epochs that the slowest has done, or
                                                                 why not
    DONE      I push no more, for now                            once all have said it, weights; TEXT: the ledger
    QUIT      worker 0: end                                      and ends
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Header = NDArray[np.float64]

HEADER, OPTIONS, VECTOR, TEXT, STATE = range(1, 6)
TOLD, CONFIRM = 6, 7
"""Between a server and its backup (ps/replica.py)."""


class Kind(IntEnum):
    """First field of both headers."""

    INIT = 1
    PUSH = 2
    NOTHING = 3
    FREEZE = 4
    CUT = 5
    DONE = 6
    QUIT = 7
    JOIN = 8
    BURY = 9
    LOST = 10
    """Only between a server and its backup."""


class Request(IntEnum):
    """Fields of a worker's header."""

    KIND = 0
    SEQUENCE = 1
    """Number of the request, per worker and server; a repeated one is recognized by it."""
    VERSION = 2
    """Updates that the weights had had which the worker computed with."""
    SIGNAL = 3
    """Of the operating system, to end the run; 0: none."""
    WANTS = 4
    """Of a PUSH: 1, the answer is to carry weights. Of a CUT: 1, the optimizer's state is wanted too."""
    STEPS = 5
    EXAMPLES = 6
    FINITE = 7
    LOSS = 8
    RATE = 9
    DISTORTION = 10
    """What was done since the last push; sums over the finite examples, nats."""
    DATA_SECONDS = 11
    BLOCKED_SECONDS = 12
    SECONDS = 13
    HAS_OPTIONS = 14
    """1: OPTIONS were sent before this."""
    GOES_ON = 15
    """Of a CUT: 1, the worker trains on with the weights that it gets."""
    EPOCHS = 16
    """That the worker has done, with the fraction."""
    HAS_EDIT = 17
    """1: STATE follows, weights that the worker has changed itself since its last pull (ps/edits.py)."""


REQUEST = len(Request)


class Answer(IntEnum):
    """Fields of a server's header. From UPDATES on: totals of all workers since the start."""

    KIND = 0
    SEQUENCE = 1
    VERSION = 2
    STALENESS = 3
    """Updates between this worker's pull and its push."""
    DROPPED_MINE = 4
    """The push was not applied. LATE: it came too late for its step; SKIPPED: another worker's made all skip that."""
    SIGNAL = 5
    """That some worker, or this server, got; 0: none."""
    SHORT = 6
    """1: the weights that follow are a codec's message."""
    UPDATES = 7
    DROPPED = 8
    STEPS = 9
    EXAMPLES = 10
    FINITE = 11
    LOSS = 12
    RATE = 13
    DISTORTION = 14
    DATA_SECONDS = 15
    BLOCKED_SECONDS = 16
    SECONDS = 17
    STALENESS_SUM = 18
    STALENESS_MAX = 19
    PUSHES = 20
    QUEUE_SECONDS = 21
    """From a push to its answer, summed over pushes."""
    BYTES_PUSHED = 22
    BYTES_PULLED = 23
    """Of vectors, also where they are in shared memory."""


ANSWER = len(Answer)
LATE, SKIPPED = 1, 2

BINS = 64
"""Of the staleness histogram; the last holds all that is beyond."""

REPORTED = slice(Request.STEPS, Request.SECONDS + 1)
TOTALS = slice(Answer.STEPS, Answer.SECONDS + 1)
"""Fields of a request, and of the answer that has their totals; the same fields in the same order."""
