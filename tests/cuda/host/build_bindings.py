# SPDX-License-Identifier: BSD-3-Clause

"""Build `normfast._cuda` for the host: the bindings of csrc/, with a device that is the host's memory.

    python tests/cuda/host/build_bindings.py FOLDER

writes the module into FOLDER. What has not changed since the last time there is not compiled again. Its kernels are
plain loops, which log how they are called; `emulated(FOLDER)` links those of csrc/cuda and their emulation instead.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[3]
SOURCES = [
    *sorted((ROOT / "csrc/bindings").glob("cuda*.cpp")),
    ROOT / "csrc/bindings/arrays.cpp",
    ROOT / "csrc/bindings/overlap.cpp",
    *sorted((ROOT / "tests/cuda/bindings").glob("*.cpp")),
]
HEADERS = [
    header
    for folder in ("csrc", "csrc/bindings", "csrc/cpu", "csrc/cuda", "tests/cuda/bindings")
    for header in (ROOT / folder).glob("*.h")
]
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-ffp-contract=off"]
MODULE = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
DEFINES = ["-DNPY_NO_DEPRECATED_API=NPY_2_0_API_VERSION", "-DNPY_TARGET_VERSION=NPY_2_0_API_VERSION"]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def build(folder: Path, extra: list[str] | None = None) -> Path:
    """Compile what is out of date and link; return the module's path."""
    import numpy
    import pybind11

    flags = FLAGS + DEFINES + (extra or [])
    includes = [ROOT / "csrc", ROOT / "tests/cuda/bindings", numpy.get_include(), pybind11.get_include()]
    flags += [f"-I{path}" for path in includes] + [f"-isystem{sysconfig.get_path('include')}"]
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(header.stat().st_mtime for header in [*HEADERS, Path(__file__)])
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    for source, target in zip(SOURCES, objects, strict=True):
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            run(["-c", str(source), "-o", str(target), *flags])
    module = folder / MODULE
    if not module.exists() or module.stat().st_mtime < max(target.stat().st_mtime for target in objects):
        run(["-shared", "-o", str(module), *map(str, objects), *(extra or [])])
    return module


def emulated(folder: Path) -> Path:
    """The same from what `build` left in the folder, with the kernels themselves: slow, and all of the backend."""
    from host import build as kernels

    build(folder)
    own = [folder / f"{source.stem}.o" for source in SOURCES if source.stem != "plain_kernels"]
    module = folder / "emulated" / MODULE
    module.parent.mkdir(exist_ok=True)
    run(["-shared", "-o", str(module), *map(str, [*own, *kernels.objects()]), "-ldl"])
    return module


def run(arguments: list[str]) -> None:
    command = [*shlex.split(compiler() or "c++"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
