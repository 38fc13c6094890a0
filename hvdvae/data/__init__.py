"""Data: sources of examples, splits, the order of an epoch, and the batches of a rank.

Imports neither MPI nor models: rank and size come as plain integers.
"""

from hvdvae.data.check import check_choice, check_dataset, check_size, check_support
from hvdvae.data.dataset import Dataset
from hvdvae.data.inputs import evaluation_batch, input_limits, mean_example, to_input
from hvdvae.data.loader import Loader
from hvdvae.data.named import NAMES
from hvdvae.data.open import open_dataset
from hvdvae.data.sampler import epoch_order, local_batch, rank_indices, steps_left
from hvdvae.data.source import ArraySource, Source, Subset
from hvdvae.data.values import chosen_binarization, describe_values

__all__ = [
    "NAMES",
    "ArraySource",
    "Dataset",
    "Loader",
    "Source",
    "Subset",
    "check_choice",
    "check_dataset",
    "check_size",
    "check_support",
    "chosen_binarization",
    "describe_values",
    "epoch_order",
    "evaluation_batch",
    "input_limits",
    "local_batch",
    "mean_example",
    "open_dataset",
    "rank_indices",
    "steps_left",
    "to_input",
]
