"""The version of this package that is installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hvdvae")
except PackageNotFoundError:  # A checkout that is on the path but not installed.
    __version__ = "0.0.0"
