"""The tests prove themselves: every barrier, guard and mask of the kernels that is taken away makes them fail.

All mutations are in one build; each runs in a child of its own (_mutants.py). What no test notices plainly is tried
again under AddressSanitizer. For what nothing can notice, mutations.py states the reason.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from host import build as builder
from mutations import EQUIVALENT, FOLDER, mutated_sources, mutations

RUNNER = Path(__file__).with_name("_mutants.py")


def code(path):
    return re.sub(r"//[^\n]*", "", path.read_text())


def test_ids():
    ids = [m.id for m in mutations()]
    assert len(ids) > 100
    assert len(set(ids)) == len(ids)


def test_every_barrier_is_in_the_list():
    for path in FOLDER.glob("*.cu*"):
        if path.name not in ("platform.cuh", *builder.ON_THE_DEVICE_ONLY):
            barriers = re.findall(r"(?:__syncthreads|__syncwarp|cluster_sync|copy_async_wait<\d+>)\(\);", code(path))
            assert len(barriers) == sum(m.is_barrier for m in mutations() if m.file == path.name), path.name


def test_no_stale_reasons():
    assert set(EQUIVALENT) <= {m.id for m in mutations()}
    assert all(len(reason) > 20 for reason in EQUIVALENT.values())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    if not builder.available():
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("mutated")
    mutated_sources(folder)
    return folder


def run(variant, sources, numbers):
    """Those that survive."""
    arguments = [RUNNER, builder.build(variant, substitutes=sources), variant, *sorted(numbers)]
    if variant == "asan":
        done = builder.sanitized(arguments, timeout=3600)
    else:
        command = [sys.executable, *map(str, arguments)]
        environment = builder.os.environ | {"PYTHONPATH": f"{RUNNER.parents[1]}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert "0" not in outcomes, f"fails without a mutation: {outcomes['0']}"
    assert set(outcomes) == set(map(str, numbers))
    return {int(number) for number, outcome in outcomes.items() if outcome == "survived"}


@pytest.mark.proof
@pytest.mark.slow
def test_every_mutation_is_noticed(sources):
    left = {m.number: m.id for m in mutations() if m.id not in EQUIVALENT}
    survivors = run("plain", sources, left)
    if survivors and builder.sanitizer_available():
        survivors = run("asan", sources, survivors)
    assert not survivors, "not noticed:\n" + "\n".join(left[n] for n in sorted(survivors))
