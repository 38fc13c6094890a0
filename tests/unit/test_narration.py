"""What a run says of itself at its start."""

from typing import Any

import pytest

from hvdvae.cli.narration import in_software

AVX2 = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False}


@pytest.mark.parametrize(
    ("precision", "device", "processor", "warns"),
    [
        ("bf16", "cpu", AVX2, True),
        ("fp16", "cpu", AVX2 | {"avx512_bf16": True}, True),
        ("bf16", "cpu", AVX2 | {"avx512_bf16": True}, False),
        ("bf16", "cpu", AVX2 | {"amx_bf16": True}, False),
        ("fp32", "cpu", AVX2, False),
        ("bf16", "cuda", AVX2, False),
        ("bf16", "cpu", {"architecture": "aarch64"}, False),
    ],
)
def test_a_precision_without_instructions_is_warned_of(
    precision: str, device: str, processor: dict[str, Any], warns: bool
) -> None:
    found = in_software(precision, device, processor)
    assert bool(found) == warns
    if warns:
        assert found.startswith(f"\nhvdvae: warning: --precision {precision}: this processor has no instructions")
