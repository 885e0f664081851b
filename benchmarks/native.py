"""Small C and C++ helpers, compiled on demand with the system's compiler and kept in ``benchmarks/.cache``."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"


class CannotBuild(Exception):
    """No compiler, or it refused; the text says what it said."""


def _cpu() -> str:
    """What the compiler may assume of this CPU: a cached helper of another machine must not be taken."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    return "\n".join(line for line in text.splitlines() if line.startswith(("flags", "Features")))[:20000]


def build(source: str, compiler: tuple[str, ...], flags: tuple[str, ...]) -> ctypes.CDLL:
    """Compile ``benchmarks/<source>`` into a shared library and load it. Unchanged sources are not compiled again."""
    path = HERE / source
    chosen = next((c for c in (os.environ.get(compiler[0].upper()), *compiler[1:]) if c and shutil.which(c)), None)
    if chosen is None:
        raise CannotBuild(f"no compiler: none of {', '.join(compiler[1:])} found")
    key = hashlib.sha256("\0".join((path.read_text(), chosen, *flags, _cpu())).encode()).hexdigest()[:16]
    library = CACHE / f"{path.stem}-{key}.so"
    if not library.exists():
        CACHE.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.tmp")
        command = [chosen, "-shared", "-fPIC", "-O3", str(path), "-o", str(partial), *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise CannotBuild(f"{' '.join(command)}\n{result.stderr.strip()}")
        partial.replace(library)
    return ctypes.CDLL(str(library))


C = ("cc", "cc", "gcc", "clang")
CXX = ("cxx", "c++", "g++", "clang++")
