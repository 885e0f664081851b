"""The table of errors: its exact results, its units, and that the page can be made from what is measured."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from _cases import batch, group, instance, layer, rms
from _checks import ulp

OPS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "batch_norm_eval")
NAMES = ("exact", "inputs", "libraries", "report", "sweep", "charts")


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        return {name: import_module(f"benchmarks.accuracy.{name}") for name in NAMES}


def twin(case):
    """The same case as the other tests have it, with an oracle that shares no line with this one."""
    if case.op == "layer_norm":
        return layer(case.shape, axis=case.axis)
    if case.op == "rms_norm":
        return rms(case.shape, axis=case.axis)
    if case.op == "group_norm":
        return group(case.shape, case.groups, channel_axis=case.channel_axis)
    if case.op == "instance_norm":
        return instance(case.shape, channel_axis=case.channel_axis)
    return batch(case.shape, channel_axis=case.channel_axis, training=case.op == "batch_norm")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", OPS)
def test_exact_results(modules, op, dtype):
    """Every layout, near zero and far from it, against the oracle of the tests."""
    inputs = modules["inputs"]
    kinds = [kind for kind in inputs.KINDS if kind.name in ("offset 1", "offset 1e4", "spike of 1e4")]
    assert len(kinds) == 3
    for case in inputs.layouts(op, 100, dtype):
        for kind in kinds:
            s, other = inputs.draw(case, kind, 0), twin(case)
            running = {} if s.running is None else {"running": s.running}
            y = other.exact_forward(s.x, s.weight, s.bias, eps=s.eps, **running)
            gradients = other.exact_backward(s.dy, s.x, y.mean, y.rstd, s.weight)
            for name, got in modules["exact"].solve(s).items():
                want = y.y if name == "y" else getattr(gradients, name)
                scale = float(np.abs(want).max()) if name == "y" else getattr(gradients, name + "_terms")
                error = np.abs(got.value.reshape(want.shape) - want).max()
                assert error <= scale * (1e-11 if dtype == "float32" else 1e-14)
                if name == "y":
                    unit = np.broadcast_to(got.unit, s.view.shape).reshape(want.shape)
                    np.testing.assert_allclose(unit.astype(float), y.scale.astype(float), rtol=1e-9)


def test_ulps(modules):
    for dtype in ("float32", "float64", "float16"):
        values = np.array([1e-7, 0.3, 1, 1.99, 65504])
        assert (modules["exact"].ulp(values, dtype) == ulp(values, np.dtype(dtype))).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_an_error_is_seen(modules, dtype):
    """Negative control: ten ulps in one cell of each result."""
    exact, inputs = modules["exact"], modules["inputs"]
    s = inputs.draw(inputs.layouts("layer_norm", 100, dtype)[0], inputs.KINDS[0], 0)
    results = modules["libraries"].through_normfast(s)
    want = exact.solve(s, results["stats"])
    good = exact.errors(results, want, dtype)
    for name, result in want.items():
        assert good[name].ulps < 5
        cell = np.unravel_index(np.abs(results[name].astype(float)).argmax(), results[name].shape)
        results[name][cell] = float(results[name][cell]) + 10 * exact.ulp(result.unit.max(), dtype).item()
    bad = exact.errors(results, want, dtype)
    assert all(bad[name].ulps >= 8 for name in want)
    assert all(bad[name].norm > good[name].norm for name in want)


@pytest.fixture(scope="module")
def content(modules):
    """A run of next to nothing."""
    sweep, libraries = modules["sweep"], ["normfast", "NumPy"]
    case = modules["inputs"].Case
    parts = [sweep.worst(op, "float32", (3,)) for op in ("layer_norm", "rms_norm")]
    for offset in (0.0, 1e4):
        parts.append(sweep.beside("offset", case("layer_norm", (3, 16)), offset, 0, 1, libraries))
        parts.append(sweep.beside("offset", case("batch_norm", (8, 3, 2)), offset, 0, 1, libraries))
        parts.append(sweep.beside("size", case("layer_norm", (3, 16)), offset, 16, 1, libraries))
    parts.append(sweep.narrow(case("layer_norm", (64, 4)), "float16", libraries))
    found = {}
    for part in parts:
        for section, rows in part.items():
            found.setdefault(section, []).extend(rows)
    return found | {
        "date": "2026-01-02T03:04:05",
        "command": "python -m benchmarks.accuracy",
        "seconds": 61,
        "machine": {"cpu": "a CPU"},
        "normfast": {"commit": "0123456789abcdef", "config": {"code_path": "baseline"}},
        "libraries": {"normfast": "1.2", "NumPy": "3.4"},
    }


def test_pages(modules, content, tmp_path):
    """Both pages get their tables between the markers, and keep what stands around them."""
    report = modules["report"]
    for name, block in (("page", report.page(content)), ("readme", report.readme(content))):
        path = tmp_path / name
        path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
        report.replace(path, block)
        written = path.read_text(encoding="utf-8")
        assert written.startswith(f"before\n{report.BEGIN}\n")
        assert written.endswith(f"{report.END}\nafter\n")
        assert "old" not in written
        assert "| layer norm | 1e4 |" in written
        assert "normfast at 0123456789, 2026-01-02. normfast 1.2, NumPy 3.4." in written.replace("\n", " ")
        tables = [line for line in written.splitlines() if line.startswith("|")]
        prose = [line for line in written.splitlines() if not line.startswith("|")]
        assert len(tables) > 5
        assert max(map(len, prose)) <= 120


def test_a_label_finds_its_sample(modules, content):
    """What the page says gave the largest error gives it again."""
    row = content["worst"][0]
    value, label = row["largest"]["y ulps"]
    (sample,) = [s for _, s in modules["inputs"].samples(row["op"], row["dtype"], 3) if s.label == label]
    assert modules["sweep"].subject(sample)["y"].ulps == value


@pytest.mark.slow
def test_charts(modules, content, tmp_path):
    pytest.importorskip("matplotlib", reason="the charts need matplotlib")
    for path in modules["charts"].draw(content, tmp_path):
        assert path.stat().st_size > 5000
