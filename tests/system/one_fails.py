"""One rank of several ends the job while the others wait for it: RANK STATUS, and the ranks that have died before."""

import os
import signal
import sys
import time

from hvdvae.abort import abort_job
from hvdvae.world import World

world = World.create(device="cpu")
failing, status, *dead = map(int, sys.argv[1:])
if world.rank in dead:
    os.kill(os.getpid(), signal.SIGKILL)
if world.rank == failing:
    time.sleep(0.5)
    abort_job(status)
try:
    world.barrier("what never comes")
finally:
    time.sleep(30.0)
