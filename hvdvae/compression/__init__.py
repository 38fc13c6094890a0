"""Fewer bytes: vectors to short messages and back. Pure: who carries a message is not a codec's affair.

    codec      bytes for P elements   what it does                                      error feedback
    fp16       2 P                    IEEE half precision                               no: rounding alone
    bf16       2 P                    float32's range, 8 bits of mantissa               no
    int8       P + 4 P / 1024         stochastic rounding to 255 levels a chunk         no: unbiased
    sign       P / 8 + 4 P / 4096     one bit, and the mean size of a chunk             yes
    topk       8 share P              the largest, with their places                    yes
    randomk    4 share P              some at random, the same places on all ranks      yes
    powersgd   4 rank (rows + cols)   two thin matrices for each weight matrix          yes

Where ranks average, fp16 and bf16 are decoded slice by slice, each by one rank, int8 to topk by all; randomk and
powersgd are averaged as they are.
"""

from collections.abc import Sequence

from hvdvae.compression.bf16 import Bf16
from hvdvae.compression.codec import Averaged, Gathered
from hvdvae.compression.fp16 import Fp16
from hvdvae.compression.int8 import Int8
from hvdvae.compression.powersgd import PowerSgd
from hvdvae.compression.randomk import RandomK
from hvdvae.compression.sign import Sign
from hvdvae.compression.topk import TopK
from hvdvae.errors import ConfigError

CODECS = ("fp16", "bf16", "int8", "sign", "topk", "randomk", "powersgd")
WITH_SHARE, WITH_RANK = ("topk", "randomk"), ("powersgd",)
DEFAULT_SHARE, DEFAULT_RANK = 0.01, 2


def codec_of(
    name: str, shapes: Sequence[tuple[int, ...]], *, share: float | None = None, rank: int | None = None
) -> Gathered | Averaged:
    """The codec of this name for a vector of tensors of these shapes, one after the other.

    `share`: of the elements, that topk and randomk send; `rank`: of powersgd's matrices. Raises ConfigError.
    """
    if name not in CODECS:
        raise ConfigError(f"compression (--compression) is {name!r}, expected none or one of {', '.join(CODECS)}")
    if share is not None and name not in WITH_SHARE:
        raise ConfigError(f"--compression-share is for --compression {' and '.join(WITH_SHARE)}, found {name}")
    if rank is not None and name not in WITH_RANK:
        raise ConfigError(f"--compression-rank is for --compression {' and '.join(WITH_RANK)}, found {name}")
    length = sum(_count(shape) for shape in shapes)
    if name == "powersgd":
        return PowerSgd(shapes, DEFAULT_RANK if rank is None else rank)
    if name in WITH_SHARE:
        share = DEFAULT_SHARE if share is None else share
        return TopK(length, share) if name == "topk" else RandomK(length, share)
    plain: dict[str, type[Fp16 | Bf16 | Int8 | Sign]] = {"fp16": Fp16, "bf16": Bf16, "int8": Int8, "sign": Sign}
    return plain[name](length)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


__all__ = ["CODECS", "Averaged", "Gathered", "codec_of"]
