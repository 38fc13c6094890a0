"""What can go wrong, by who can mend it.

The command line prints these as one line without a traceback; anything else that escapes is a defect of ours.
"""


class HvdvaeError(Exception):
    """Base of all errors that a user can mend. The message names the thing, what was found, what was expected."""


class ConfigError(HvdvaeError):
    """A flag, a key of the configuration file, or a combination of them."""


class CopyError(ConfigError, TypeError):
    """Something that cannot be copied or pickled, as it belongs to this process among others."""


class DataError(HvdvaeError):
    """A file or array that cannot be trained on."""


class CheckpointError(HvdvaeError):
    """A checkpoint that is missing, torn, foreign, or of another model."""


class WorldError(HvdvaeError):
    """The launch: too few ranks, a launcher and an MPI that disagree, a missing MPI or Horovod."""


class MisfitError(HvdvaeError):
    """A new rank that those that train cannot take in, and go on without."""


class BusyError(HvdvaeError):
    """Another run holds what this one needs; it may have let go of it later."""


class RankLost(HvdvaeError):
    """A rank has died, as MPI (ULFM) or Horovod tells those that wait, where they can go on on all of them."""


class PartLost(RankLost):
    """Nobody is left who holds some part of a model that ranks hold together; raised on all that live."""


class HostsChanged(RankLost):
    """An elastic horovodrun has added hosts, or taken some away; raised on all ranks after the same step."""


class NonFiniteError(HvdvaeError):
    """Too many steps whose loss or gradient was not finite."""
