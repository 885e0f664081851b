"""Recycled memory in builds with sanitizers: what is nobody's is watched, and what is new holds NaN.

A pool hides reads of stale data and of what lies beyond a result from every tool, so csrc/cpu/memory.cpp tells
AddressSanitizer itself. Were it to stop doing so, the sanitized builds would go on passing; this is what notices.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
SOURCES = [CSRC / "cpu" / name for name in ("memory.cpp", "system_posix.cpp")]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="AddressSanitizer of GCC or Clang on Linux"),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """How a program ends that misuses recycled memory: its exit status, and what it printed."""
    program = tmp_path_factory.mktemp("poison") / "pool"
    command = [COMPILER, "-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=address", "-DNF_POISON", f"-I{CSRC}"]
    subprocess.run([*command, "-o", program, HERE / "faults" / "pool.cpp", *SOURCES], check=True)

    def run(misuse):
        # Preloaded runtimes (of a sanitized Python) would come before the program's own.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run([program, misuse], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_new_memory_holds_nan(pool):
    """Also what comes back from the pool; and whoever keeps to what is theirs is let alone."""
    assert pool("nothing") == (0, "NaN\n")


@pytest.mark.parametrize("misuse", ["beyond", "before", "returned"])
def test_misuse_is_reported(pool, misuse):
    status, text = pool(misuse)
    assert status != 0
    assert "use-after-poison" in text
