"""Where the figures come from: machine, system, versions, the state of the repository."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from .native import HERE


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpu_model() -> str:
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in _read("/proc/cpuinfo").splitlines() if ":" in line
    )
    name = fields.get("model name", platform.processor() or platform.machine())
    where = [f"{key} {fields[full]}" for key, full in (("family", "cpu family"), ("model", "model")) if full in fields]
    return f"{name} ({', '.join(where)})" if where else name


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _read(index / "type")
        if kind != "Instruction":
            found[f"L{_read(index / 'level')}"] = _read(index / "size")
    return found


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def machine() -> dict:
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def repository() -> dict:
    """The commit that is measured, and whether the files differ from it."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "modified": None}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(HERE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
