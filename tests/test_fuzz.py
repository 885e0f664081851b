"""Fuzzing: calls out of random bytes, good ones and spoiled ones, each judged as `fuzz/judge.py` says.

`fuzz/fuzz_api.py` runs in a child process, which leaves behind the bytes that it died of. What it once found stays in
`fuzz/cases`.
"""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path

import numpy as np
import pytest

import _child
import normfast as nf
from _cases import batch, group, instance, layer, rng
from _checks import F32, F64, assert_forward, assert_gradients
from fuzz.around import try_around
from fuzz.calls import CONTROLS, OPS, Draw, drawn
from fuzz.fuzz_api import LENGTH
from fuzz.judge import Find, judge

FUZZ = "from fuzz.fuzz_api import main; main()"
CASES = sorted((Path(__file__).parent / "fuzz" / "cases").glob("*.hex"))
FUNCTIONS = {*OPS, *(op + "_backward" for op in OPS)}


def fuzzed(tmp_path, *options, code=FUZZ, timeout=600):
    """The report of a child process that fuzzes."""
    last = tmp_path / "last"
    last.touch()  # guided, the bytes of a crash stand in corpus.crash-* instead
    done = _child.spawn(code, "--last", last, *options, timeout=timeout)
    assert done.returncode in (0, 1), f"died of {last.read_bytes().hex()}\n{done.stderr}"
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    return report


def test_some_calls(tmp_path):
    """Every norm, forward and backward, well and badly called."""
    report = fuzzed(tmp_path, "--calls", 200, "--seed", 1, "--around", 100)
    assert report["finds"] == []
    assert report["calls"] == 200
    assert report["around"] > 19_000
    assert report["around succeeded"] > 2000
    assert all(min(report["functions"][name]) > 0 for name in FUNCTIONS)


@pytest.mark.slow
def test_many_calls(tmp_path):
    """Every function well and badly called, many different outcomes, and no memory lost."""
    report = fuzzed(tmp_path, "--calls", 8_000, "--seed", 2, "--memory", "--around", 50)
    assert report["finds"] == []
    assert report["functions"].keys() == FUNCTIONS | CONTROLS.keys()
    assert all(min(counts) > 0 for counts in report["functions"].values())
    assert report["succeeded"] > 2000
    assert report["outcomes"] > 2000
    assert report["blocks grown"] < 100


@pytest.mark.slow
@pytest.mark.proof
def test_ten_minutes(tmp_path):
    """Guided by atheris where that is installed."""
    guided = ["--guided", tmp_path / "corpus"] if importlib.util.find_spec("atheris") else []
    report = fuzzed(tmp_path, "--seconds", 600, "--seed", 3, "--around", 1000, *guided, timeout=900)
    assert report["finds"] == []
    assert report["calls"] > 1000


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_what_was_once_found(path, threads):
    """A file holds comments, and the bytes of one call in hexadecimal."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    judge(drawn(bytes.fromhex("".join(lines))))


def test_any_bytes_are_a_call(threads):
    """No bytes, few and many; the same bytes are the same call."""
    for data in (b"", b"\0", b"\xff" * 3, b"\x07" * 1000, bytes(range(256))):
        call = drawn(data)
        assert str(call) == str(drawn(data))
        judge(call)
    assert [Draw(b"\x01\x02\x03").below(n) for n in (1, 7, 256, 300, 1 << 16)] == [0, 1, 1, 0x102 % 300, 0x102]


# ---- negative controls: each of these must be noticed ----------------------------------------------------------------


def fail(error):
    def broken(real, arguments):
        raise error

    return broken


def beside(real, arguments):
    """Writes the byte before the margin's end, wherever that is."""
    y = real(**arguments)
    memory = arguments.get("out")
    while isinstance(getattr(memory, "base", None), np.ndarray):
        memory = memory.base
    if isinstance(memory, np.ndarray) and memory.dtype == np.uint8:
        memory[-1] ^= 1
    return y


def changing(real, arguments):
    y = real(**arguments)
    x = arguments["x"]
    if isinstance(x, np.ndarray) and x.flags.writeable and x.size and x is not arguments.get("out"):
        x[...] = 3
    return y


def thawing(real, arguments):
    y = real(**arguments)
    x = arguments["x"]
    if isinstance(x, np.ndarray) and not x.flags.writeable and x.size:
        x.flags.writeable = True
        x[...] = 3
        x.flags.writeable = False
    return y


def accepting(real, arguments):
    try:
        return real(**arguments)
    except ValueError:
        return arguments["x"]


def writing_first(real, arguments):
    try:
        return real(**arguments)
    except (TypeError, ValueError):
        if isinstance(arguments.get("out"), np.ndarray) and arguments["out"].flags.writeable:
            arguments["out"].view(np.ndarray).fill(1)
        raise


def rewording(real, arguments):
    try:
        return real(**arguments)
    except (TypeError, ValueError) as error:
        raise type(error)("one of the arguments is not good") from None


def copying(real, arguments):
    got = real(**arguments)
    return (got[0].copy(), *got[1:]) if isinstance(got, tuple) else got.copy()


def results(change):
    """Changes what is returned, where nothing is written to `out`."""

    def broken(real, arguments):
        got = real(**arguments)
        if arguments.get("out") is not None:
            return got
        return (change(got[0]), *got[1:]) if isinstance(got, tuple) else change(got)

    return broken


kept = []
BROKEN = {
    "another error": (fail(KeyError("x")), "raises KeyError"),
    "refuses all": (fail(ValueError("layer_norm: x is not to its taste")), "is refused"),
    "no memory": (fail(MemoryError()), "MemoryError for a small call"),
    "beside out": (beside, "writes"),
    "into an input": (changing, "writes"),
    "into a read-only one": (thawing, "writes"),
    "before a check": (writing_first, "writes"),
    "accepts": (accepting, "succeeds"),
    "other words": (rewording, "does not begin"),
    "value": (results(lambda y: y + y.dtype.type(0.125)), "wrong"),
    "dtype": (results(lambda y: y.astype(np.longdouble)), "result 0 is"),
    "shape": (results(lambda y: y[..., None]), "result 0 is"),
    "order": (results(lambda y: np.repeat(y[..., None], 2, -1)[..., 0]), "memory order"),
    "a view": (lambda real, arguments: np.asarray(arguments["x"]), "shares memory"),
    "a copy of out": (copying, "does not return `out`"),
    "a reference": (lambda real, arguments: (kept.append(arguments["x"]), real(**arguments))[1], "reference"),
}


AROUND = {  # what of these the quick calls around a drawn one notice, and how they tell
    "another error": "raises KeyError",
    "no memory": "raises MemoryError",
    "beside out": "writes beside",
    "into a read-only one": "read-only",
    "other words": "does not begin",
    "dtype": "returns",
    "shape": "returns",
    "a copy of out": "does not return `out`",
    "a reference": "reference",
}
NOTICED = [(name, told, False) for name, (_, told) in BROKEN.items()]
NOTICED += [(name, told, True) for name, told in AROUND.items()]


@pytest.mark.parametrize(("name", "told", "around"), NOTICED, ids=[n + " around" * a for n, _, a in NOTICED])
def test_what_is_noticed(name, told, around, monkeypatch):
    real, broken = nf.layer_norm, BROKEN[name][0]
    monkeypatch.setattr(nf, "layer_norm", lambda **arguments: broken(real, arguments))
    random, texts = rng(5), set()
    for _ in range(400):
        data = bytes(3) + random.bytes(150)  # three zeros: layer norm, forward
        call = drawn(data)
        assert call.function == "layer_norm"
        try:
            try_around(data, LENGTH, 30) if around else judge(call)
        except Find as find:
            texts.add(str(find))
            if told in str(find):
                return
    pytest.fail(f"not noticed; instead: {texts}")


@pytest.mark.slow
def test_lost_memory_is_noticed(tmp_path):
    """Negative control: one object for every call of one function."""
    code = f"""
import normfast as nf
real, kept = nf.rms_norm, []
nf.rms_norm = lambda **arguments: (kept.append(object()), real(**arguments))[1]
{FUZZ}
"""
    assert fuzzed(tmp_path, "--calls", 1, "--seed", 2, "--memory", code=code)["blocks grown"] >= 200


@pytest.mark.slow
def test_a_crash_leaves_its_bytes(tmp_path):
    """Negative control: the process dies in a call."""
    code = f"import os, normfast as nf\nnf.rms_norm = lambda **arguments: os.abort()\n{FUZZ}"
    done = _child.spawn(code, "--last", tmp_path / "last", "--calls", 500, "--seed", 1)
    assert done.returncode == -signal.SIGABRT
    assert drawn((tmp_path / "last").read_bytes()).function == "rms_norm"


# ---- what fuzzing found ---------------------------------------------------------------------------------------------


def test_overlap_behind_a_memoryview():
    """The array-like itself was held against `out`, not the array that stands for it."""
    a = rng().standard_normal((9, 8), np.float32)
    with pytest.raises(ValueError, match="out must be x itself or not overlap it"):
        nf.layer_norm(memoryview(a[:-1]), out=a[1:])


@pytest.mark.slow
def test_a_subclass_with_an_index_of_its_own():
    """What its __getitem__ returned was taken for an array."""
    code = """
import numpy as np, normfast as nf
class Odd(np.ndarray):
    def __getitem__(self, key):
        return 7
x = np.arange(630.0).reshape(3, 5, 6, 7)
assert (nf.layer_norm(x.view(Odd), axis=(1, 3)) == nf.layer_norm(x, axis=(1, 3))).all()
"""
    assert _child.spawn(code).returncode == 0


def test_interleaved_out():
    """Strides were taken to overlap where they only interleave."""
    out = np.lib.stride_tricks.as_strided(np.zeros(8, F32), (2, 3), (12, 8))  # cells 0, 2, 4 and 3, 5, 7
    x = rng().standard_normal((2, 3), np.float32)
    assert (nf.layer_norm(x, out=out) == nf.layer_norm(x)).all()


@pytest.mark.parametrize("case", [group((2, 1, 20_000), 1, channel_axis=2), instance((6, 1, 2, 7, 64), channel_axis=2)])
def test_float64_channels_last(case):
    """The columns of a channel were added one after another: 23 ulp with 289 cells to a group, 884 with 20000."""
    x = np.minimum(rng().geometric(0.4, case.shape), 9).astype(F64) - 1
    assert_forward(case.forward(x), case.exact_forward(x))


def test_weights_of_many_sizes():
    """Five cells, the one that counts close to the mean: the constant of the map was rounded, and 1288 ulp lost."""
    case = layer((1, 5))
    x = np.array([[0.5, -3, 1.7, 2.9, 0.5251]], F32)
    weight = np.array([1e-6, 1e-6, 1e-6, 1e-6, 1e3], F32)
    assert_forward(case.forward(x, weight), case.exact_forward(x, weight))


@pytest.mark.xfail(strict=True, reason="float32 sums of a dozen cells are rounded more than once where they cancel")
def test_dbias_of_twelve_cells():
    """1.24e-6 of a sum that is 0.108 of the norm of its terms; 1e-6 is promised."""
    case = batch((12, 1))
    x = "0.12573022 -0.13210486 0.64042264 0.10490011 -0.5356694 0.36159506 1.304 0.94708097 "
    x += "-0.70373523 -1.2654215 -0.62327445 0.04132598"
    x = np.array(x.split(), F32).reshape(12, 1)
    arguments = x, x, *case.exact_stats(x), np.ones(1, F32)
    assert_gradients(case.backward(*arguments), case.exact_backward(*arguments))
