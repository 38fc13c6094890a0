"""`python -m hvdvae`, the same as `hvdvae`."""

import sys

from hvdvae.cli import main

sys.exit(main())
