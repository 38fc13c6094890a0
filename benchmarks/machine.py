"""What the numbers were measured on: processor, cores, memory, load, and versions."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from mpi4py import MPI

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
            "mpi": MPI.Get_library_version().splitlines()[0].strip("\0 ").split(", package")[0],
            **{name: _version(name) for name in PACKAGES},
        },
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "HOROVOD_", "KMP_"))
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


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
