"""The instruction counts of the benchmarks: reading callgrind's files, and the rule by which a check fails."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

DUMP = """\
version: 1
creator: callgrind-3.19.0
part: 2
desc: Trigger: Client Request: layer_norm 8x768 float32
positions: line
events: Ir

ob=/lib/libpython3.11.so
fl=ceval.c
fn=_PyEval_EvalFrameDefault
0 1000
cob=/site/normfast/_core.cpython-311.so
cfn=nf::layer_norm
calls=4 0
0 500

ob=/site/normfast/_core.cpython-311.so
fl=layer_norm.cpp
fn=nf::layer_norm
0 100
fi=arrays.h
0 20
cob=/lib/libc.so.6
cfn=memcpy
calls=4 0
0 77
0 3
fn=nf::rows
0 300

ob=/lib/libc.so.6
fl=???
fn=memcpy
0 77

ob=/site/numpy/_core/_multiarray_umath.so
fn=array_new
0 9000

totals: 10500
"""


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        return {name: import_module(f"benchmarks.{name}") for name in ("callgrind", "instructions")}


@pytest.fixture(scope="module")
def instructions(modules):
    return modules["instructions"]


def test_own_instructions_are_the_self_cost_inside_the_module(modules):
    label, total = modules["callgrind"].own_instructions(DUMP.splitlines())
    assert label == "layer_norm 8x768 float32"
    assert total == 100 + 20 + 3 + 300


def test_a_dump_without_the_module_counts_nothing(modules):
    foreign = DUMP.replace("_core.cpython", "_other.cpython")
    assert modules["callgrind"].own_instructions(foreign.splitlines())[1] == 0


@pytest.mark.parametrize(
    ("before", "now", "verdict", "fails"),
    [
        (1000, 1000, "", False),
        (1000, 1030, "", False),  # the limit itself
        (1000, 1031, "above", True),
        (100_000_000, 103_000_001, "above", True),
        (1000, 970, "", False),
        (1000, 969, "below", False),
        (None, 1000, "missing", True),
        (1000, None, "gone", False),
    ],
)
def test_rule(instructions, before, now, verdict, fails):
    line = instructions.Line("case", before, now)
    assert (line.verdict, line.fails) == (verdict, fails)


def test_compare_shows_every_case_of_either_side(instructions):
    lines = instructions.compare({"a": 1000, "b": 1000, "c": 1000}, {"d": 5, "a": 1031, "b": 1000})
    verdicts = [(line.label, line.verdict) for line in lines]
    assert verdicts == [("d", "missing"), ("a", "above"), ("b", ""), ("c", "gone")]


def test_advice_names_the_failing_cases_and_the_command(instructions):
    text = "\n".join(instructions.advice(instructions.compare({"slow": 1000, "same": 1}, {"slow": 1031, "same": 1})))
    assert re.search(r"\bslow\b", text)
    assert "same" not in text
    assert "python -m benchmarks.instructions write" in text
    assert not list(instructions.advice(instructions.compare({"same": 1}, {"same": 1})))


def test_write_keeps_the_baselines_of_other_builds(modules, instructions, tmp_path):
    file = tmp_path / "counts.json"
    assert instructions.load(file) == {}
    for compiler, value in (("GNU 12", 1), ("Clang 16", 2), ("GNU 12", 3)):
        facts = {"compiler": compiler, "code_path": "x86-64-v3"}
        instructions.write(file, modules["callgrind"].Counts(facts, {"case": value}))
    found = {key: build["instructions_per_call"] for key, build in instructions.load(file).items()}
    assert found == {"GNU 12, x86-64-v3": {"case": 3}, "Clang 16, x86-64-v3": {"case": 2}}


def test_cases_have_labels_of_their_own_and_fit_a_small_cache(instructions):
    cases = instructions.cases()
    assert len({case.label for case in cases}) == len(cases)
    assert max(2 * case.nbytes for case in cases) <= 512 << 10  # x and y, or x and dx


def test_every_baseline_has_every_case(instructions):
    if not instructions.BASELINE.parent.exists():
        pytest.skip("a source distribution comes without results")
    labels = {case.label for case in instructions.cases()}
    content = json.loads(instructions.BASELINE.read_text())
    assert content["builds"]
    for build in content["builds"].values():
        assert build["instructions_per_call"].keys() == labels
        assert all(isinstance(value, int) and value > 0 for value in build["instructions_per_call"].values())
