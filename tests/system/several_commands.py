"""Runs several `hvdvae` commands one after another in the same ranks: a launch takes seconds, a tiny run none.

The argument is a JSON list of command lines. Ends with the first status that is not 0.
"""

import json
import sys

from hvdvae.cli import main

for words in json.loads(sys.argv[1]):
    status = main(words)
    if status:
        sys.exit(status)
