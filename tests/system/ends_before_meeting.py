"""Rank 1 ends, however, before it meets the others: python ends_before_meeting.py {killed,exits} DEADLINE."""

import os
import signal
import sys

if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    if sys.argv[1] == "exits":
        sys.exit(0)
    os.kill(os.getpid(), signal.SIGKILL)

from hvdvae import World

world = World.create(device="cpu", deadline=float(sys.argv[2]))
print("they have met", flush=True)
