"""What holds for all tests, and for what they start.

No test asserts a time: machines are shared, and an example of hypothesis may take longer than it usually does.
"""

import os

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

# Open MPI's transport `ofi` sleeps a second in every MPI_Init that finds no network for it.
os.environ.setdefault("OMPI_MCA_btl", "^ofi")
