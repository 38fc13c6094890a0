"""`hvdvae` in which a rank kills itself before the data are compared: python dies_at_start.py VICTIM ARGUMENTS..."""

import os
import signal
import sys

from hvdvae.cli import assemble, main


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if os.environ["OMPI_COMM_WORLD_RANK"] == sys.argv[1]:
        assemble.check_same_data = die
    sys.exit(main(sys.argv[2:]))
