"""What nvcc makes of the kernels, where it is found: no spills, and no more registers than stated."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from host.build import ON_THE_DEVICE_ONLY, ROOT

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
ARCHITECTURE = "sm_90"
FLAGS = ["-std=c++17", "-O3", "-fmad=false", f"-arch={ARCHITECTURE}", "-Icsrc", "-Xptxas", "-v", "-cubin"]

# Registers of a thread, at most: with the threads of a block, what decides how many blocks a multiprocessor holds.
CAPS = {
    "affine": {"map_columns": 128},
    "columns": {"slice_moments": 192, "finish_moments": 64},
    "columns_backward": {"slice_sums": 255, "finish_sums": 64, "map_columns": 255, "total_sums": 40},
    "copy": {"copy_all": 40},
    "row_params": {"held_rows": 128, "wide_params": 128, "total_params": 40},
    "rows": {"lanes_forward": 128, "cluster_forward": 128},
    "rows_backward": {"lanes_backward": 128, "cluster_backward": 128, "total_channels": 40},
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="needs nvcc")]


def kernels(text):
    """(name, registers, bytes spilled) of each kernel in what ptxas says."""
    found = []
    for block in text.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", block)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        found.append((block.partition("'")[0], int(registers[1]), int(spilled[1]) + int(spilled[2])))
    return found


def name_in(mangled, names):
    """Of the kernel, without its namespace and arguments."""
    matches = [n for n in names if f"{len(n)}{n}" in mangled]
    assert len(matches) == 1, f"no cap is stated for {mangled}"
    return matches[0]


def test_every_file_is_stated():
    files = {p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu") if p.name not in ON_THE_DEVICE_ONLY}
    assert files == set(CAPS)


@pytest.mark.parametrize("stem", CAPS)
def test_registers_and_spills(stem, tmp_path):
    command = [NVCC, *FLAGS, "-o", str(tmp_path / "kernels.cubin"), f"csrc/cuda/{stem}.cu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, wrong = set(), []
    for mangled, registers, spilled in kernels(done.stdout + done.stderr):
        name = name_in(mangled, CAPS[stem])
        found.add(name)
        if spilled or registers > CAPS[stem][name]:
            wrong.append(f"{mangled}: {registers} registers (at most {CAPS[stem][name]}), {spilled} bytes spilled")
    assert found == set(CAPS[stem])  # no stale names
    assert not wrong, "\n".join(wrong)


def test_the_report_is_understood():
    """Negative control: a report with a spill, as ptxas writes it."""
    report = (
        "ptxas info    : Compiling entry function '_ZN2nf4cuda5copyIfEEvi' for 'sm_90'\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers\n"
    )
    assert kernels(report) == [("_ZN2nf4cuda5copyIfEEvi", 168, 28)]
