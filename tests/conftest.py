"""No test asserts a time: machines are shared, and an example of hypothesis may take longer than it usually does."""

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
