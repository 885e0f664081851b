"""Promise 1, the code paths: the same bits from each that has fused multiply-add; forcing one works, or is refused."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import pytest

import _child
import normfast as nf
from _cases import layer
from _checks import F32, nudged
from _hashes import CASES, committed, digest

ALL = ["baseline", "x86-64-v3", "x86-64-v4", "arm64"]
BUILT = nf.show_config("dicts")["code_paths"]
NEEDS = {
    "x86-64-v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
HASHES = "import _hashes; _hashes.main()"
WHICH = "import normfast as nf; print(nf.show_config('dicts')['code_path'])"


@cache
def missing(path):
    """Why this machine cannot run a path, or None."""
    if path not in BUILT:
        return f"the {path} path was not built"
    if path not in NEEDS:
        return None
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"cannot tell whether this CPU has {path}"
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "").split()
    lacking = NEEDS[path] - set(flags)
    return f"this CPU lacks {', '.join(sorted(lacking))} of {path}: not run" if lacking else None


def require(path):
    if reason := missing(path):
        pytest.skip(reason)


@cache
def hashes(path):
    ran = json.loads(_child.output(HASHES, NORMFAST_ISA=path, timeout=600))
    assert ran["code_path"] == path
    return ran["hashes"]


def test_this_build():
    assert nf.show_config("dicts")["code_path"] in BUILT
    assert set(BUILT) <= set(ALL)
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        assert "arm64" not in BUILT
        wanted = os.environ.get("NORMFAST_CODE_PATHS") or "baseline x86-64-v3 x86-64-v4"  # as the build was told
        assert wanted.split() == BUILT


@pytest.mark.parametrize("path", ALL)
def test_forced_path_runs(path):
    require(path)
    assert _child.output(WHICH, NORMFAST_ISA=path) == path


def test_best_path_by_default():
    """Without the variable: the last path that this CPU has."""
    runnable = [path for path in ALL if missing(path) is None]
    plain = "import os; os.environ.pop('NORMFAST_ISA', None)\n" + WHICH
    assert _child.output(plain) == runnable[-1]
    assert _child.output(WHICH, NORMFAST_ISA="") == runnable[-1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("path", ALL)
def test_committed_digests(path, dtype):
    """Every case of every norm in this dtype has the bits of digests.json: the same for all paths with fused
    multiply-add, others for the baseline."""
    require(path)
    wanted, got = committed(path), hashes(path)
    assert got.keys() == wanted.keys()
    names = [name for name in got if name.endswith(f"-{dtype}")]
    assert len(names) == len(set(map(str, CASES)))
    differ = [name for name in names if got[name] != wanted[name]]
    assert not differ, f"{len(differ)} of {len(names)} cases differ: {differ[:10]}"


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3, 5, 7, 8, 16])
@pytest.mark.parametrize("path", ALL)
def test_committed_digests_with_threads(path, threads):
    """All of them once more, with as many threads as that."""
    require(path)
    ran = json.loads(_child.output(HASHES, NORMFAST_ISA=path, NORMFAST_NUM_THREADS=str(threads), timeout=600))
    assert (ran["code_path"], ran["threads"]) == (path, threads)
    assert ran["hashes"] == committed(path)


def test_the_baseline_has_bits_of_its_own():
    """Negative control: the comparison above sees a path that rounds differently."""
    fused, baseline = committed("x86-64-v3"), committed("baseline")
    assert fused.keys() == baseline.keys()
    differ = [name for name in fused if fused[name] != baseline[name] and name.endswith("-float32")]
    assert len(differ) > len(fused) // 8


def test_hashes_notice_one_cell():
    """Negative control: one cell moved to the next number changes the hash."""
    y = layer((3, 17)).forward(layer((3, 17)).x(F32))
    assert digest([y]) == digest([y.copy()])
    assert digest([y]) != digest([nudged(y)])
    assert digest([y]) != digest([y.reshape(17, 3)])


SHORT_SUITE = """
import sys, normfast as nf, pytest
assert nf.show_config("dicts")["code_path"] == sys.argv[1]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-c", sys.argv[2], *sys.argv[3:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", ALL)
def test_accuracy_of_every_path(path):
    """The tests of the promises on accuracy and special values, once more on each path that is not the default."""
    require(path)
    if path == nf.show_config("dicts")["code_path"]:
        pytest.skip("the suite at hand runs on this path")
    here = Path(__file__).parent
    files = ["test_forward.py", "test_backward.py", "test_numerics.py", "test_special_values.py", "test_out.py"]
    arguments = [here.parent / "pyproject.toml", "-m", "not slow", *(here / f for f in files)]
    _child.output(SHORT_SUITE, path, *arguments, NORMFAST_ISA=path, timeout=900)


LOADER = Path("/lib64/ld-linux-x86-64.so.2")


@pytest.mark.skipif(not LOADER.exists(), reason="asks glibc's loader, of x86-64")
def test_the_levels_are_those_that_glibc_sees():
    """A path that the CPU has and normfast does not see costs nothing but time, and nobody would notice."""
    said = subprocess.run([LOADER, "--help"], capture_output=True, text=True, check=False).stdout
    if "x86-64-v3" not in said:
        pytest.skip("this glibc does not know the levels")
    levels = {path for path in NEEDS if path in BUILT}
    seen = {path for path in levels if _child.spawn("import normfast", NORMFAST_ISA=path).returncode == 0}
    assert seen == {path for path in levels if f"{path} (supported" in said}
    best = _child.output(WHICH, NORMFAST_ISA="")
    assert best == max(seen, default="baseline" if "baseline" in BUILT else best)


@pytest.mark.parametrize("path", ["x86-64-v9", "avx2", "X86-64-V3", "baseline,x86-64-v3"])
def test_unknown_path_is_refused(path):
    """At import, with a message that names the variable, the value and the choices."""
    done = _child.spawn("import normfast", NORMFAST_ISA=path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("ImportError", "ValueError", "RuntimeError"))
    assert "NORMFAST_ISA" in last
    assert path in last
    assert all(built in last for built in BUILT)


@pytest.mark.parametrize("path", [path for path in ALL if missing(path)])
def test_unavailable_path_is_refused(path):
    """A path that was not built, or that this CPU lacks, is no crash at the first call but an error at import."""
    if path in BUILT and path in NEEDS and "lacks" not in missing(path):
        pytest.skip(missing(path))
    done = _child.spawn("import normfast", NORMFAST_ISA=path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("ImportError", "RuntimeError"))
    assert "NORMFAST_ISA" in last
    assert path in last
