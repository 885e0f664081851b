"""Promise 6 beside what else goes on in a process: signals, its end, forks, other processes, mapped files.

`_process.py` holds what is run in children. Forks of an idle process and of forked workers are in `test_fork.py`,
controls that change while others call in `test_threads.py`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest

import _child
import normfast as nf
from _cases import batch, group, instance, layer, rms
from _checks import BF16, F32, F64, assert_same_bits

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at threads in /proc")
RUN = "import sys, _process; getattr(_process, sys.argv[1])(*sys.argv[2:])"


def run(name, *arguments, timeout=1800):
    return _child.output(RUN, name, *arguments, timeout=timeout)


@linux
@pytest.mark.slow
def test_signals():
    """Hundreds, to the caller and to the threads of the pool, interrupt what they wait for and change no bit."""
    calls, alarms, others = map(int, run("signals", 300).split())
    assert min(alarms, others) >= 300
    assert calls > 0


@pytest.mark.slow
def test_interrupt():
    """KeyboardInterrupt comes after the call, with nothing half written, and the next call is right."""
    assert int(run("interrupt", 20)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("end", 0, ""),
        ("atexit", 0, "right"),
        ("atexit with other threads", 0, "right"),
        ("exit status", 3, ""),
        ("an error", 1, ""),
    ],
)
def test_the_end(how, status, said):
    """The interpreter ends while daemon threads are inside calls: its own status, no crash, no hang."""
    done = _child.spawn(RUN, "leave", how, timeout=1800)
    assert (done.returncode, done.stdout.strip()) == (status, said), done.stderr
    assert "Fatal" not in done.stderr
    assert "terminate" not in done.stderr


@linux
@pytest.mark.slow
def test_forks_at_any_moment():
    rounds, *statuses = map(int, run("forks", 5).split())
    assert statuses == [0] * 5
    assert rounds >= 4


@linux
@pytest.mark.slow
def test_programs_are_started():
    assert int(run("spawns", 20)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_multiprocessing(method):
    run("workers", method)


@pytest.mark.slow
def test_results_are_freed_by_others():
    run("handed_over", 10)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("_xxsubinterpreters") is None, reason="this Python's sub-interpreters have another name")
class TestSubinterpreters:
    """pybind11 loads a module once in a process, and NumPy is made for one interpreter: an ImportError, not a crash."""

    def said(self, first, file, **kw):
        message = run("interpreters", first, file, **kw)
        assert message == "layer_norm: weight must have shape (3,) to match the normalised axes of x, got (4,)"
        return file.read_text()

    def test_after_the_main_interpreter(self, tmp_path):
        assert self.said("main", tmp_path / "said") == "ImportError"

    def test_before_the_main_interpreter(self, tmp_path):
        """Python 3.11 waited for itself for ever."""
        assert self.said("sub", tmp_path / "said") == "ImportError"


# ---- files in memory

MAPPED = [
    (layer((257, 515)), F32),
    (rms((257, 515)), BF16),
    (layer((67, 1031), axis=0), F32),
    (group((3, 12, 61, 61), 3), F32),
    (instance((3, 61, 61, 5), channel_axis=-1), F64),
    (batch((5, 12, 47, 47)), F32),
]


def mapped(path, array, mode="r", offset=0):
    """The array in a file, mapped; with an offset that is no multiple of a cell, as behind some header."""
    with open(path, "wb") as file:
        file.write(b"h" * offset + array.tobytes())
    return np.memmap(path, array.dtype, mode, offset, array.shape)


@pytest.mark.parametrize("offset", [0, 64, 3])
@pytest.mark.parametrize(("case", "dtype"), MAPPED, ids=str)
def test_read_only_files(case, dtype, offset, tmp_path):
    """x, dy, the parameters and the statistics lie in files that nobody may write to."""
    given = (case.x(dtype), case.dy(dtype), case.weight(dtype), case.bias(dtype))
    y, mean, rstd = case.forward(given[0], *given[2:], return_stats=True)
    want = (y, *case.backward(given[1], given[0], mean, rstd, given[2]))
    files = [
        None if a is None else mapped(tmp_path / str(i), a, offset=offset) for i, a in enumerate((*given, mean, rstd))
    ]
    x, dy, weight, bias, mean, rstd = files
    assert not x.flags.writeable
    assert x.flags.aligned == (offset % x.itemsize == 0)
    assert_same_bits((case.forward(x, weight, bias), *case.backward(dy, x, mean, rstd, weight)), want)
    with pytest.raises(ValueError, match="out must be writable"):
        case.forward(x, weight, bias, out=x)


@pytest.mark.parametrize(("mode", "changes"), [("c", False), ("r+", True)])
@pytest.mark.parametrize(("case", "dtype"), MAPPED, ids=str)
def test_files_as_out(case, dtype, mode, changes, tmp_path):
    """Copy-on-write: the result is in memory and the file as it was. Else it is in the file."""
    x, dy = case.x(dtype), case.dy(dtype)
    y, mean, rstd = case.forward(x, return_stats=True)
    dx = case.backward(dy, x, mean, rstd)[0]
    out = mapped(tmp_path / "y", x, mode, offset=64)
    assert case.forward(out, out=out) is out
    assert_same_bits(np.asarray(out), y)
    into = mapped(tmp_path / "dx", dy, mode)
    assert case.backward(into, x, mean, rstd, out=into)[0] is into
    assert_same_bits(np.asarray(into), dx)
    for mapping in (out, into):
        mapping.flush()
    assert (tmp_path / "y").read_bytes() == b"h" * 64 + (y if changes else x).tobytes()
    assert (tmp_path / "dx").read_bytes() == (dx if changes else dy).tobytes()


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_a_file_larger_than_the_pool(limit, pool, tmp_path):
    """Its results are not kept, and it is not copied into the pool."""
    block = layer((1024, 1024)).x(F32)
    want = nf.layer_norm(block)
    nf.set_pool_limit(limit)
    nf.release_pool()
    x = mapped(tmp_path / "x", np.tile(block, (4, 1)))
    y = nf.layer_norm(x)
    for part in np.split(y, 4):
        assert_same_bits(part, want)
    del y, part
    assert pool() == {"limit": limit, "held": 0}
