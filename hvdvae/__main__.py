"""`python -m hvdvae`, the same as `hvdvae`."""

import sys

from hvdvae.cli import run

sys.exit(run())
