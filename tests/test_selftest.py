"""`nf.selftest`: it passes here, is quick, and notices each kind of broken promise."""

from __future__ import annotations

import importlib
import subprocess
import sys

import numpy as np
import pytest

import normfast as nf
from _checks import F32

selftest = importlib.import_module("normfast.selftest")


@pytest.mark.slow
def test_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "normfast.selftest"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every promise held" in done.stdout
    path = nf.show_config("dicts")["code_path"]
    assert f"{path}: " in done.stdout
    assert "batch_norm" in done.stdout


def test_name_is_callable_however_it_was_found():
    assert callable(nf.selftest)
    assert callable(selftest)


def examined():
    found = selftest.Findings()
    found.accuracy()
    found.constants()
    found.layouts()
    found.neighbours()
    found.threads()
    return found


@pytest.mark.slow
def test_nothing_to_find():
    found = examined()
    assert found.failures == []
    assert found.checks > 500


def broken(monkeypatch, name, change):
    """Let `nf.<name>` hand its results through `change(results, *args)`. float32 alone is enough to see that."""
    right = getattr(nf, name)
    monkeypatch.setattr(selftest, "_dtypes", lambda: {"float32": F32})

    def wrong(*args, **kwargs):
        return change(right(*args, **kwargs), *args)

    monkeypatch.setattr(nf, name, wrong)


def off_by_a_little(results, *_):
    y = results[0] if isinstance(results, tuple) else results
    y.reshape(-1)[-1:] += abs(y.reshape(-1)[-1:]) * 1e-6 + 1e-5
    return results


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"])
def test_wrong_y_is_noticed(op, monkeypatch):
    broken(monkeypatch, op, off_by_a_little)
    found = selftest.Findings()
    found.accuracy()
    assert any(failure.startswith(op) and "y is off" in failure for failure in found.failures)
    assert not any("gradients" in failure for failure in found.failures)


def test_wrong_gradient_is_noticed(monkeypatch):
    def change(gradients, *_):
        gradients[1].reshape(-1)[:1] += 1
        return gradients

    broken(monkeypatch, "group_norm_backward", change)
    found = selftest.Findings()
    found.accuracy()
    assert found.failures
    assert all(failure.startswith("group_norm") and "gradients" in failure for failure in found.failures)


def test_bits_that_depend_on_threads_are_noticed(monkeypatch):
    def change(results, *_):
        if nf.get_num_threads() == 3:
            results[0].reshape(-1)[:1] = np.nextafter(results[0].reshape(-1)[:1], np.float32(np.inf))
        return results

    broken(monkeypatch, "batch_norm", change)
    found = selftest.Findings()
    found.threads()
    assert found.failures
    assert all("with 3 threads" in failure for failure in found.failures)


def test_layouts_and_neighbours_are_noticed(monkeypatch):
    def change(results, x, *_):
        y = results[0] if isinstance(results, tuple) else results
        if not (x.flags.c_contiguous and x.dtype.isnative and len(x) == 37):
            y[:1] *= 2
        return results

    broken(monkeypatch, "layer_norm", change)
    found = selftest.Findings()
    found.layouts()
    for what in ("byteswapped", "strided", "reversed"):
        assert any(what in failure for failure in found.failures)
    found.failures.clear()
    found.neighbours()
    assert any("alone" in failure for failure in found.failures)


def test_a_child_that_dies_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "_examine_elsewhere", lambda path: "Segmentation fault")
    assert not nf.selftest()
    assert "FAILED: Segmentation fault" in capsys.readouterr().out


def test_paths_that_differ_are_a_failure(monkeypatch, capsys):
    found = {"checks": 1, "worst": {}, "failures": [], "threads": [1]}

    def examine(path):
        return {**found, "code_path": path, "digests": {"layer_norm": path}}

    config = nf.show_config("dicts") | {"code_paths": ["baseline", "x86-64-v3", "x86-64-v4"]}
    monkeypatch.setattr(selftest, "_examine_elsewhere", examine)
    monkeypatch.setattr(nf, "show_config", lambda mode: config)
    assert not nf.selftest()
    out = capsys.readouterr().out
    assert "x86-64-v3 and x86-64-v4: FAILED" in out
    assert "baseline and" not in out
