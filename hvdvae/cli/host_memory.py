"""How much memory this host, this job and this GPU have left."""

from pathlib import Path
from typing import NamedTuple

from hvdvae.errors import ConfigError

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_UNITS = {"": 1e6, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class Room(NamedTuple):
    """Bytes, and where the number is from."""

    bytes: float
    source: str


def given(text: str) -> Room:
    """Of --host-memory: megabytes, or a number with K, M, G or T. Pure. Raises ConfigError."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        return Room(float(number) * _UNITS[unit], "--host-memory")
    except (ValueError, KeyError):
        raise ConfigError(
            f"--host-memory is {text!r}, expected megabytes, or a number with K, M, G or T, as 64G"
        ) from None


def of_host(meminfo: Path = Path("/proc/meminfo")) -> Room:
    """What is available here: the kernel's MemAvailable, or what the control group of a job or container leaves. Local.

    Infinite where nobody says.
    """
    found = Room(float("inf"), "no limit is known")
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            found = Room(float(line.split()[1]) * 1024, "MemAvailable of this host")
    for folder in _control_groups():
        left = _left(folder, "memory.max", "memory.current") or _left(
            folder, "memory.limit_in_bytes", "memory.usage_in_bytes"
        )
        if left is not None and left < found.bytes:
            found = Room(left, f"the limit of the control group {folder}")
    return found


def of_gpu() -> Room | None:
    """Free memory of this process's first GPU; None where torch sees none. Local."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return Room(float(free), f"free on {torch.cuda.get_device_name()}")


def _control_groups() -> list[Path]:
    """Of this process, each level: Slurm and containers nest them. Version 2, and that of version 1 for memory."""
    found = [_CGROUPS, _CGROUPS / "memory"]
    for line in _lines(_OWN_CGROUP):
        _, controllers, group = line.split(":", 2)
        root = _CGROUPS if not controllers else _CGROUPS / "memory" if "memory" in controllers.split(",") else None
        if root is not None:
            found += [root / str(level).lstrip("/") for level in (Path(group), *Path(group).parents)]
    return found


def _left(folder: Path, limit: str, used: str) -> float | None:
    """Bytes that a control group has left; page cache, which is given up, counts as free. None: it has no limit."""
    most, now = _lines(folder / limit), _lines(folder / used)
    if not most or not now or not most[0].isdigit() or int(most[0]) >= 1 << 60:
        return None
    cache = [int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith("inactive_file ")]
    return float(int(most[0]) - int(now[0]) + sum(cache))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
