"""What the numbers were measured on: processor, cores, memory, load, and versions."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from hvdvae.cli import mpirun

PACKAGES = ("hvdvae", "torch", "horovod", "mpi4py", "numpy", "pythae")


def machine() -> dict[str, Any]:
    """Date, hardware and versions, JSON-able. Local."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
            "load_average_at_start": os.getloadavg()[0],
            "avx512_bf16": has_avx512_bf16(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {
            "python": platform.python_version(),
            "kernel": platform.release(),
            "mpi": _mpi(),
            **{name: _version(name) for name in PACKAGES},
        },
    }


def has_avx512_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware, by AVX-512."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _mpi() -> str:
    program = mpirun.find()
    return mpirun.name(program) if program is not None else "not installed"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
