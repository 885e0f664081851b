"""The emulation itself (tests/cuda/host): right kernels give right results, wrong ones are found out."""

from __future__ import annotations

import ctypes
import time

import numpy as np
import pytest
from host import build as builder
from host.library import BFLOAT16, EmulationError, Library, unwritten

pytestmark = pytest.mark.skipif(not builder.available(), reason="needs a C++ compiler")

FAULTS = ["nothing", "no_wait", "no_block_barrier", "no_cluster_barrier", "no_reuse_barrier", "no_last_barrier"]
MISTAKES = [
    *("divergent_block", "divergent_lines", "returned_early", "divergent_warp", "absent_lane", "foreign_lane"),
    *("misaligned_load", "misaligned_copy", "beyond_shared", "beyond_global", "beyond_cluster", "never_waited"),
    "before_shared",
]
SEEDS = range(11)  # 0 is the plain order
TYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 2: BFLOAT16}


def load(variant, **options):
    library = Library(builder.build(variant, selftest=True, **options))
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    for name, arguments in {
        "layer_norm": [number, pointer, pointer, long, long, number, number, number],
        "exchanges": [pointer],
        "copies": [pointer, pointer],
        "early_write": [pointer],
        "late_read": [pointer],
        "mistaken": [number, pointer, pointer],
        "launch": [ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, number, number, ctypes.c_size_t],
    }.items():
        getattr(library.dll, f"nf_selftest_{name}").argtypes = arguments
    return library


@pytest.fixture(scope="module")
def lib():
    library = load("plain")
    yield library
    library.set_schedule(0)
    library.set_max_cluster(8)


def layer_norm(lib, rows, n, threads, cluster, fault="nothing", kind=0, seed=0):
    """The largest error, in units of the last place; NaN counts as infinite."""
    x = np.random.default_rng(n).standard_normal((rows, n)).astype(TYPES[kind])
    y = unwritten(x.shape, x.dtype)
    lib.set_schedule(seed)
    call = lib.dll.nf_selftest_layer_norm
    lib.check(call(kind, x.ctypes.data, y.ctypes.data, rows, n, threads, cluster, FAULTS.index(fault)))
    exact = x.astype(np.float64)
    exact -= exact.mean(1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5)
    error = np.abs(y.astype(np.float64) - exact).max() / {0: 2.0**-22, 1: 2.0**-9, 2: 2.0**-6}[kind]
    return np.inf if np.isnan(error) else error


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("threads", "cluster"), [(32, 1), (256, 1), (64, 2), (96, 8)])
@pytest.mark.parametrize("kind", TYPES)
def test_right_kernel(lib, kind, threads, cluster, seed):
    assert layer_norm(lib, 3, 1536, threads, cluster, kind=kind, seed=seed) < 2


def outcome(lib, fault, seed):
    """What a faulty kernel comes to: "right", "wrong", or the message of the error."""
    try:
        return "right" if layer_norm(lib, 6, 1536, 96, 4, fault=fault, seed=seed) < 2 else "wrong"
    except EmulationError as e:
        return str(e)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("no_wait", "asynchronous copies under way"),
        ("no_block_barrier", "wrong"),
        ("no_cluster_barrier", "wrong"),
        ("no_reuse_barrier", "wrong"),
        ("no_last_barrier", "that block has returned"),
    ],
)
def test_fault_shows_under_some_schedule(lib, fault, expected):
    outcomes = [outcome(lib, fault, seed) for seed in SEEDS]
    assert any(expected in o for o in outcomes), outcomes
    if fault in ("no_wait", "no_cluster_barrier"):
        assert outcomes[0] != "right"  # under the plain order already


def test_same_seed_same_order(lib):
    def outcomes():
        return [outcome(lib, "no_reuse_barrier", seed) for seed in SEEDS]

    assert outcomes() == outcomes()


def test_substituted_source(tmp_path):
    """As the mutations of the kernels do it."""
    text = (builder.HERE / "selftest.cu").read_text()
    barrier = "if constexpr (fault != no_cluster_barrier) cluster_sync();"
    assert text.count(barrier) == 1
    (tmp_path / "selftest.cu").write_text(text.replace(barrier, ""))
    mutated = load("plain", substitutes=tmp_path)
    assert outcome(mutated, "nothing", 0) == "wrong"


def test_exchanges(lib):
    for seed in SEEDS:
        lib.set_schedule(seed)
        out = np.zeros((10, 32), np.int32)
        lib.check(lib.dll.nf_selftest_exchanges(out.ctypes.data))
        lane = np.arange(32)
        assert (out[0] == 5).all()
        assert (out[1] == lane // 8 * 8 + 1).all()
        assert (out[2] == lane ^ 3).all()
        assert (out[3] == np.where(lane & 8, lane - 8, lane)).all()
        assert (out[4] == np.where(lane + 3 < 32, lane + 3, lane)).all()
        assert (out[5] == np.where(lane % 8 + 3 < 8, lane + 3, lane)).all()
        assert (out[6].view(np.uint32) == sum(1 << i for i in range(0, 32, 3))).all()
        assert (out[7] == 2).all()
        eights = lane // 8 * 8 * 8 + 28
        assert (out[8] == np.where(lane < 16, 4 * (lane // 2) + 1, eights)).all()
        assert (out[9] == 3 + 5).all()


def test_asynchronous_copies(lib):
    x, out = np.arange(64, dtype=np.float32), np.zeros((4, 32), np.float32)
    lib.set_schedule(0)
    lib.check(lib.dll.nf_selftest_copies(x.ctypes.data, out.ctypes.data))
    assert np.isnan(out[0]).all()  # not waited for
    assert (out[1] == x[:32]).all()
    assert np.isnan(out[2]).all()  # the second group, the first being waited for
    assert (out[3] == x[32:]).all()


def test_write_before_the_peer_has_begun(lib):
    lib.set_schedule(0)
    out = np.zeros(2, np.float32)
    lib.check(lib.dll.nf_selftest_early_write(out.ctypes.data))
    assert np.isnan(out).any()


def test_read_after_the_peer_has_ended(lib):
    lib.set_schedule(0)
    out = np.zeros(32, np.float32)
    lib.check(lib.dll.nf_selftest_late_read(out.ctypes.data))
    assert np.isnan(out).any()


@pytest.mark.parametrize(
    ("mistake", "code", "message"),
    [
        ("divergent_block", 719, "divergent barrier"),
        ("divergent_lines", 719, "divergent barrier: waits for __syncthreads at selftest.cu"),
        ("returned_early", 719, "returned"),
        ("divergent_warp", 719, "divergent barrier: no thread can go on"),
        ("absent_lane", 719, "returned"),
        ("foreign_lane", 719, "not in the mask"),
        ("misaligned_load", 716, "load of 16 bytes"),
        ("misaligned_copy", 716, "copy of 8 bytes"),
        ("beyond_shared", 719, "past the end of the 256 bytes of shared memory"),
        ("beyond_cluster", 719, "cluster_peer(2) in a cluster of 2"),
        ("never_waited", 719, "asynchronous copies under way"),
        ("before_shared", 719, "outside the block's own shared memory"),
    ],
)
def test_mistakes(lib, mistake, code, message):
    x, out = np.zeros(64, np.float32), np.zeros(64, np.float32)
    for seed in SEEDS:
        lib.set_schedule(seed)
        with pytest.raises(EmulationError) as e:
            lib.check(lib.dll.nf_selftest_mistaken(MISTAKES.index(mistake), x.ctypes.data, out.ctypes.data))
        assert e.value.code == code
        assert message in str(e.value)
    assert layer_norm(lib, 2, 1536, 64, 2) < 2  # the emulation goes on


def test_limits_of_a_launch(lib):
    def launch(x=1, y=1, z=1, threads=32, cluster=1, shared=0):
        return lib.dll.nf_selftest_launch(x, y, z, threads, cluster, shared)

    assert launch(x=8, y=3, z=2, threads=1024, cluster=8, shared=227 * 1024) == 0
    assert launch(x=0) == launch(y=0, threads=33) == 0  # no work
    for bad in (
        *({"threads": 0}, {"threads": 33}, {"threads": 1056}, {"x": 3, "cluster": 2}, {"x": 16, "cluster": 16}),
        *({"shared": 227 * 1024 + 1}, {"y": 65536}, {"z": 65536}, {"x": 2**31}),
    ):
        assert launch(**bad) == 9, bad
    lib.set_max_cluster(1)
    assert launch(x=2, cluster=2) == 9
    lib.set_max_cluster(8)


def test_fast_enough(lib):
    layer_norm(lib, 16, 4096, 256, 1)
    start = time.perf_counter()
    layer_norm(lib, 16, 4096, 256, 1)
    assert time.perf_counter() - start < 2  # some milliseconds on an idle machine


# ---- under AddressSanitizer ----------------------------------------------------------------------------------------

CHILD = """
import sys
import numpy as np
import test_emulator as t
lib = t.load("asan")
x, out = np.zeros(64, np.float32), np.zeros(64, np.float32)
for what in sys.argv[1:]:
    if what in t.FAULTS:
        for seed in t.SEEDS:
            print(t.outcome(lib, what, seed))
    elif what == "late_read":
        lib.dll.nf_selftest_late_read(out.ctypes.data)
    else:
        mistake = t.MISTAKES.index(what)
        print(lib.dll.nf_selftest_mistaken(mistake, x.ctypes.data, out.ctypes.data))
"""


@pytest.fixture(scope="module")
def child():
    if not builder.sanitizer_available():
        pytest.skip("needs AddressSanitizer")
    return lambda *what: builder.sanitized(["-c", CHILD, *what])


def test_sanitizer_has_no_complaint(child):
    """Not about a right kernel, and not after launches that ended midway."""
    done = child("nothing", "divergent_block", "nothing", "returned_early", "nothing")
    right = ["right"] * len(SEEDS)
    assert done.returncode == 0, done.stderr
    complaints = [line for line in done.stderr.splitlines() if "makecontext" not in line]  # not on x86-64
    assert complaints == []
    assert done.stdout.split() == [*right, "719", *right, "719", *right]


@pytest.mark.parametrize(
    ("what", "report"),
    [
        ("beyond_shared", "heap-buffer-overflow"),
        ("beyond_global", "heap-buffer-overflow"),
        ("late_read", "heap-use-after-free"),
    ],
)
def test_sanitizer_reports(child, what, report):
    done = child(what)
    assert done.returncode != 0
    assert report in done.stderr
    assert "selftest.cu" in done.stderr  # the line at fault
