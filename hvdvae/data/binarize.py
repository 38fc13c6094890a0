"""Binary images from grey ones: each pixel is 1 with the probability that its value says, exactly.

dynamic: drawn anew in every epoch (Burda et al. 2016, as are the numbers published for MNIST);
static: drawn once, whatever the run's seed; none: grey values stay.
"""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from hvdvae.data.noise import uniform_bytes, uniform_floats
from hvdvae.data.source import Indices, Values
from hvdvae.seeding import stream

_DYNAMIC, _STATIC, _EVALUATION = 3, 4, 5  # tell the streams apart
EVALUATION_SEED = 0


def training_key(binarization: str, seed: int, epoch: int) -> int:
    """The noise's key in `epoch`: a new one each epoch if dynamic, always the same if static."""
    return stream(_DYNAMIC, seed, epoch) if binarization == "dynamic" else stream(_STATIC)


def evaluation_key(binarization: str, seed: int = EVALUATION_SEED) -> int:
    """The noise's key of validation and test, which are binarized once, the same at every world size."""
    return stream(_EVALUATION, seed) if binarization == "dynamic" else stream(_STATIC)


def binarize(values: Values, peak: int, key: int, examples: Indices) -> NDArray[np.bool_]:
    """Draw pixels (B, *shape), 1 with probability values / peak.

    The noise is addressed by key and examples (B,). Values that are 0 or `peak` are not changed by it.
    Floats must lie in [0, 1].
    """
    flat = values.reshape(len(values), -1)
    if values.dtype == np.float32:
        drawn = np.less(uniform_floats(key, examples, flat.shape[1]), flat)
    elif peak == 1:
        drawn = flat.astype(np.bool_)
    else:
        drawn = _binarize_bytes(cast(NDArray[np.uint8], flat), key, examples)
    return drawn.reshape(values.shape)


def _binarize_bytes(values: NDArray[np.uint8], key: int, examples: Indices) -> NDArray[np.bool_]:
    # A byte u of noise is below v with probability v / 256. Where u == v (1 / 256), a coin of v / 255 decides: v / 256
    # + (1 / 256) (v / 255) = v / 255, exactly. One less than u, where u is above the coin c of 0..254, is below v if u
    # is, or if u == v > c. All pixels of an example share the coin's number, which correlates them by less than 4e-6,
    # and spares the drawing anew of bytes, a third of all the work.
    noise, word = uniform_bytes(key, examples, values.shape[1])
    coin = (word % np.uint64(255)).astype(np.uint8)
    above = np.greater(noise, coin[:, None])
    return np.less(np.subtract(noise, above.view(np.uint8), order="C"), values, out=above)


def binarize_on_device(values: torch.Tensor, peak: int, generator: torch.Generator) -> torch.Tensor:
    """As `binarize`, on the tensor's own device with its generator; float32 of 0 and 1."""
    noise = torch.rand(values.shape, generator=generator, device=values.device)
    return (noise < values.float().div_(peak)).float()
