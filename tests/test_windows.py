"""The kernels, memory and threads on Windows: compiled for it here, run by Wine, with the bits of this system.

Needs Zig (pip install ziglang: Clang and the headers of Windows) and Wine (Debian: wine64). Python itself is not part
of it: `windows/kernels.cpp` calls the kernels and prints a hash of what each wrote.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import normfast as nf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.proof,
    pytest.mark.skipif(sys.platform == "win32", reason="the other tests run here"),
]

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
WINE = shutil.which("wine64") or shutil.which("wine") or shutil.which("wine64", path="/usr/lib/wine")
PATH = nf.show_config("dicts")["code_path"]
# As in CMakeLists.txt.
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", f"-I{CSRC}"]
KERNELS = ["rows", "rows_backward", "columns", "columns_backward", "affine"]


def program(folder, compiler, warnings, system, level, *link):
    """windows/kernels.cpp, with the kernels of this machine's code path."""
    name = PATH.replace("-", "_")
    march = [level] if level else []
    work = [(CSRC / "cpu" / f"{k}.cpp", [*march, f"-DNF_ISA={name}", "-fno-exceptions", "-fno-rtti"]) for k in KERNELS]
    others = [CSRC / "cpu" / f"{k}.cpp" for k in ("memory", "threads", "dispatch", system)]
    work += [(source, [f"-DNF_HAS_{name}"]) for source in (*others, HERE / "windows" / "kernels.cpp")]

    def compiled(source, options):
        target = folder / f"{source.parent.name}_{source.stem}.o"
        subprocess.run([*compiler, *FLAGS, *warnings, *options, "-c", source, "-o", target], check=True, timeout=1800)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda one: compiled(*one), work))
    subprocess.run([*compiler, *objects, *link, "-o", folder / "kernels.exe"], check=True, timeout=1800)
    return folder / "kernels.exe"


def printed(*command):
    done = subprocess.run(command, env=os.environ | {"WINEDEBUG": "-all"}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout.splitlines()


def differences(one, other):
    assert one[0] == other[0] == PATH
    assert len(one) == len(other) > 80
    return [line for line, same in zip(one, other, strict=True) if line != same]


def test_the_kernels_have_the_same_bits(tmp_path):
    if PATH not in ("baseline", "x86-64-v3", "x86-64-v4"):
        pytest.skip("Wine runs programs of its own processor")
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs Zig: pip install ziglang")
    if WINE is None:
        pytest.skip("needs Wine")
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-windows-gnu"]  # makes its libraries first
    strict = ["-Wall", "-Wextra", "-Werror"]
    level = "" if PATH == "baseline" else f"-march={PATH}"
    (tmp_path / "here").mkdir()
    (tmp_path / "windows").mkdir()
    here = printed(program(tmp_path / "here", [COMPILER], ["-w"], "system_posix", level, "-pthread"))
    windows = printed(
        WINE, program(tmp_path / "windows", zig, strict, "system_windows", level.replace("x86-64-v", "x86_64_v"))
    )
    assert differences(windows, here) == []
    # Negative control: another hash in one line.
    assert differences([*windows[:-1], windows[-1][:-1] + "x"], here) == [windows[-1][:-1] + "x"]
