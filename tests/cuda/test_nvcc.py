"""What nvcc makes of the kernels where it is found: nothing in local memory, few registers, cells moved
sixteen bytes at a time.

Half of the minutes that this takes go into PTX. A module that was built for "90-virtual" with -no-compress carries it
as text, and that is taken then.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from host.build import ON_THE_DEVICE_ONLY, ROOT

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
ARCHITECTURE = "sm_90"
TO_PTX = ["-std=c++17", "-O3", "-fmad=false", "-arch=compute_90", "-Icsrc", "-ptx"]
TO_CODE = [f"-arch={ARCHITECTURE}", "-Xptxas", "-v", "-cubin"]

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

# How the kernels that move cells do it, as PTX writes it. Those that only finish sums handle a few doubles.
WIDE = {
    "load": ("ld.global.nc.L1::no_allocate.v4.u32", "cp.async.cg.shared.global"),
    "store": ("st.global.cs.v4.u32",),
}
MOVES = {
    "map_columns": ("load", "store"),
    "slice_moments": ("load",),
    "slice_sums": ("load",),
    "held_rows": ("load", "store"),
    "wide_params": ("load",),
    "lanes_forward": ("load", "store"),
    "cluster_forward": ("load", "store"),
    "lanes_backward": ("load", "store"),
    "cluster_backward": ("load", "store"),
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="needs nvcc")]


def kernels(text):
    """(name, registers, bytes of local memory: stack and spills) of each kernel in what ptxas says."""
    found = []
    for block in text.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", block)
        local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        found.append((block.partition("'")[0], int(registers[1]), sum(int(n) for n in local.groups())))
    return found


def bodies(ptx):
    """(name, text) of each kernel."""
    for part in re.split(r"\.entry\s+", ptx)[1:]:
        yield part.partition("(")[0].strip(), part


def narrow(ptx, names):
    """Kernels that move no cells, or not sixteen bytes at a time, or keep something of a thread in local memory."""
    wrong = []
    for mangled, text in bodies(ptx):
        for what in MOVES.get(name_in(mangled, names), ()):
            if not any(f"{access} " in text for access in WIDE[what]):
                wrong.append(f"{mangled}: no {what} of 16 bytes")
        if re.search(r"\b(ld|st)\.local", text):
            wrong.append(f"{mangled}: local memory")
    return wrong


def name_in(mangled, names):
    """Of the kernel, without its namespace and arguments."""
    matches = [n for n in names if f"{len(n)}{n}" in mangled]
    assert len(matches) == 1, f"no cap is stated for {mangled}"
    return matches[0]


def texts_in(module):
    """The PTX for this architecture in the bytes of a module."""
    whole = rb"\.version [0-9.]+\s+\.target " + ARCHITECTURE.encode() + rb"\b[^\0]*"
    return [found.decode() for found in re.findall(whole, module)]


@functools.cache
def carried():
    """That of the installed module, by the names of the kernels in it."""
    spec = importlib.util.find_spec("normfast._cuda")
    if spec is None:
        return {}
    names = {name for kernels_of_file in CAPS.values() for name in kernels_of_file}
    texts = texts_in(Path(spec.origin).read_bytes())
    return {frozenset(name_in(mangled, names) for mangled, _ in bodies(ptx)): ptx for ptx in texts}


def nvcc(*arguments):
    done = subprocess.run([NVCC, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_every_file_is_stated():
    files = {p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu") if p.name not in ON_THE_DEVICE_ONLY}
    assert files == set(CAPS)


# Most of the time goes to one file, a minute and a half.
@pytest.mark.parametrize("stem", [pytest.param(s, marks=pytest.mark.proof) if s == "rows" else s for s in CAPS])
def test_registers_and_spills(stem, tmp_path):
    file = tmp_path / "kernels.ptx"
    if (ptx := carried().get(frozenset(CAPS[stem]))) is not None:
        file.write_text(ptx)
    else:
        nvcc(*TO_PTX, "-o", file, f"csrc/cuda/{stem}.cu")
    said = nvcc(*TO_CODE, "-o", tmp_path / "kernels.cubin", file)
    found, wrong = set(), []
    for mangled, registers, local in kernels(said):
        name = name_in(mangled, CAPS[stem])
        found.add(name)
        if local or registers > CAPS[stem][name]:
            wrong.append(
                f"{mangled}: {registers} registers (at most {CAPS[stem][name]}), {local} bytes of local memory"
            )
    assert found == set(CAPS[stem])  # no stale names
    wrong += narrow(file.read_text(), CAPS[stem])
    assert not wrong, "\n".join(wrong)


def test_the_report_is_understood():
    """Negative controls: a report with a stack and a spill, as ptxas writes it; PTX that moves cells one at a time."""
    report = (
        "ptxas info    : Compiling entry function '_ZN2nf4cuda5copyIfEEvi' for 'sm_90'\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers\n"
    )
    assert kernels(report) == [("_ZN2nf4cuda5copyIfEEvi", 168, 36)]
    wide = ".visible .entry _Z11map_columnsv(\n.param .u64 p\n)\n{{\n{} %r;\nst.global.cs.v4.u32 [%r];\n}}\n"
    modules = b"\x7fELF\0.version 9.0\n.target sm_80\nold\0.version 9.0\n.target sm_90\nnew\0"
    assert texts_in(modules) == [".version 9.0\n.target sm_90\nnew"]
    names = ["map_columns"]
    assert narrow(wide.format("ld.global.nc.L1::no_allocate.v4.u32"), names) == []
    assert len(narrow(wide.format("ld.global.nc.L1::no_allocate.u32"), names)) == 1
    assert len(narrow(wide.format("st.local.u32 [%r];\nld.global.nc.L1::no_allocate.v4.u32"), names)) == 1
