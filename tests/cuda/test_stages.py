# SPDX-License-Identifier: BSD-3-Clause

"""`make gpu` without a GPU: what it starts, what it says of what failed, what it leaves behind.

The stage runner is the real one, and so are its processes; it lies in a copy of the repository on a machine of
stand-ins (stand_ins/). A device would find out a wrong path or a lost result as well, at the price of its minutes.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from host import build as kernels
from host import build_bindings

import normfast as nf

ROOT = Path(__file__).parents[2]
STAND_INS = Path(__file__).with_name("stand_ins")
PROGRAMS, MODULES = ("compute-sanitizer", "nvidia-smi", "nvcc"), ("pip", "pytest")
LOGS = {"build.log", "tests.log", "sanitizer.log", "board.log", "summary.txt"}
BOARD = {f"gpu-stand-in-0123456789.{kind}" for kind in ("json", "md", "png")}
TESTS = ["layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "rest", "streams", "large"]
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="`make gpu` is for Linux: process groups")


class Machine:
    """Stand-ins on the PATH and the PYTHONPATH, and a copy of what the stages need of the repository."""

    def __init__(self, folder, modules=MODULES):
        self.root, self.out, self.pids = folder / "repository", folder / "out", folder / "pids"
        self.work = self.root / "build" / "gpu"
        programs, site = folder / "bin", folder / "site"
        for made in (self.root / "benchmarks" / "gpu", self.pids, programs, site):
            made.mkdir(parents=True)
        for name in ("__init__.py", "gpu/__init__.py", "gpu/stages.py", "gpu/device.py"):
            shutil.copy(ROOT / "benchmarks" / name, self.root / "benchmarks" / name)
        shutil.copy(STAND_INS / "stand_in.py", site)
        call = "import sys\nimport stand_in\nstand_in.main({!r})\n"
        for name in PROGRAMS:
            (programs / name).write_text(f"#!{sys.executable}\n{call.format(name)}")
            (programs / name).chmod(0o755)
        for name in modules:
            (site / f"{name}.py").write_text(call.format(name))
        (self.root / "benchmarks" / "gpu" / "__main__.py").write_text(call.format("board"))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("NORMFAST_", "CUDA"))},
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": f"{site}",
            "OUT": f"{self.out}",
            "STAND_INS_PIDS": f"{self.pids}",
        }

    def command(self, **environment):
        command = [sys.executable, "-m", "benchmarks.gpu.stages"]
        return {"args": command, "cwd": self.root, "env": self.environment | environment}

    def make_gpu(self, **environment):
        """The finished process, and the lines of its summary."""
        done = subprocess.run(**self.command(**environment), capture_output=True, text=True, timeout=900, check=False)
        return done, self.summary()

    def summary(self):
        path = self.out / "summary.txt"
        return path.read_text().splitlines() if path.exists() else []

    def files(self):
        return {path.name for path in self.out.iterdir()}

    def hangs(self):
        return any(self.is_ours(int(path.name)) for path in self.pids.iterdir())

    def orphans(self):
        """What stand-ins that hung have started and is still there, a moment later."""
        pids = [int(path.name) for path in self.pids.iterdir()]
        assert pids, "nothing hung"
        for path in self.pids.iterdir():
            path.unlink()
        for _ in range(100):
            if not (alive := [pid for pid in pids if self.is_ours(pid)]):
                break
            time.sleep(0.05)
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        return alive

    def is_ours(self, pid):
        """A number may have gone to another process; one that has ended has no environment."""
        try:
            return str(self.pids).encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def stages(machine, monkeypatch):
    """The module, of the copy; `stages.on(how, minutes)` is a runner whose stages can be called one by one."""
    spec = importlib.util.spec_from_file_location("stages_of_the_copy", machine.root / "benchmarks/gpu/stages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in set(os.environ) - set(machine.environment):
        monkeypatch.delenv(name)

    def on(how=None, minutes=100.0):
        for name, value in (machine.environment | {"STAND_INS": json.dumps(how or {})}).items():
            monkeypatch.setenv(name, value)
        return module.Stages(minutes)

    module.on = on
    return module


@pytest.fixture
def hanging(stages, machine, monkeypatch):
    """A runner whose clock stands still, and leaps once whenever something hangs: no machine is too slow for that."""
    now = asked = 0

    def clock():
        nonlocal now, asked
        asked = asked + 1 if machine.hangs() else 0
        now += 10**6 * (asked == 2)  # the first may ask when to stop waiting
        return now

    def on(how):
        whole = stages.on(how)
        whole.end = math.inf
        return whole

    monkeypatch.setattr(stages, "monotonic", clock)
    return on


# ---- the parts, in process -------------------------------------------------------------------------------------------


def test_limits(stages, monkeypatch):
    """Every stage gets its share of whatever the whole may take, and the later ones keep their reserve."""
    monkeypatch.setattr(stages, "monotonic", lambda: 0.0)
    for scale in (0.5, 1, 2):
        whole = stages.on(minutes=scale * stages.MINUTES)
        assert whole.limit(200, 150) == 200 * scale
        assert whole.limit(600, 150) == pytest.approx((522 - 150) * scale)
        assert whole.limit(200, 600) == 0
    # A run in which every stage takes all it may comes to the board in time, and the board to its end.
    left = 60 * stages.MINUTES
    takes = [(stages.BUILD, 150), (stages.TESTS, 175), (stages.LARGE, 175), (stages.LARGE, 175), (stages.SANITIZER, 75)]
    for most, reserve in takes:
        left -= max(0, min(most, left - reserve))
    assert left >= stages.BOARD_LEAST > stages.GRACE


@pytest.mark.parametrize("text", ["nine", "0", "-3", "nan", "inf"])
def test_minutes_that_are_none(stages, monkeypatch, text):
    monkeypatch.setenv("NORMFAST_GPU_MINUTES", text)
    with pytest.raises(SystemExit, match=f"NORMFAST_GPU_MINUTES must be a positive number, got '{text}'"):
        stages._minutes()


def test_what_takes_too_long_is_ended_with_all_it_started(stages, hanging, machine):
    whole = hanging({})
    script = f"(trap '' TERM; exec sleep 60) & : > {machine.pids}/$!; wait"
    running = {"short": whole.start(["sh", "-c", "exit 7"], machine.out / "short.log")}
    running["short"].wait()
    running["long"] = whole.start(["sh", "-c", script], machine.out / "long.log")
    assert whole.finish(running, 1) == {"short": 7, "long": None}
    assert machine.orphans() == []
    assert stages._word(None) == "TIMED OUT"
    assert stages._word(-11) == "FAILED (-11)"
    assert stages._word(0) == "ok"


def test_no_time_left(stages):
    """Said, and bad: what did not run has shown nothing."""
    whole = stages.on(minutes=1e-9)
    assert whole.run() == 1
    assert whole.lines[:4] == [f"{name:<10} NOT RUN: no time left" for name in ("build", "tests", "sanitizer", "board")]
    assert whole.lines[4].startswith("all        FAILED")


def test_a_stage_that_raises(stages, monkeypatch):
    whole, called = stages.on(), []

    def build():
        raise OSError("no room")

    monkeypatch.setattr(whole, "build", build)
    build.__name__ = "build"
    for name in ("tests", "sanitizer", "board"):
        stage = lambda name=name: called.append(name)  # noqa: E731
        stage.__name__ = name
        monkeypatch.setattr(whole, name, stage)
    assert whole.run() == 1
    assert whole.lines[0] == "build      OSError: no room"
    assert called == ["tests", "sanitizer", "board"]


# ---- each stage, with processes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_build_that_fails(stages, machine, capfd):
    """What an earlier run has built must not be measured in its place, and there is nothing to run."""
    whole = stages.on()
    whole.build()
    assert (machine.work / "site" / "normfast").exists()
    assert whole.lines[0].endswith(", for 86-real")
    assert not whole.failed
    assert not whole.stop
    whole = stages.on({"pip": "fail", "nvidia-smi": "fail"})
    assert whole.run() == 1
    assert whole.lines[0].startswith("build      FAILED (1)")
    assert whole.lines[0].endswith(", for 90-real, a guess: nvidia-smi did not say")
    assert [line.split(":")[0] for line in whole.lines[1:4]] == [
        f"{name:<10} NOT RUN" for name in ("tests", "sanitizer", "board")
    ]
    assert not (machine.work / "site").exists()
    assert "pip failed" in capfd.readouterr().out  # the end of the log is shown
    assert machine.files() == {"build.log", "summary.txt"}


@pytest.mark.slow
def test_no_device(stages):
    whole = stages.on({"device": "absent"})
    assert whole.run() == 1
    assert whole.lines[1].startswith("device     FAILED (1)  NONE: cudaErrorNoDevice; normfast 0 in ")
    assert "NOT RUN" in whole.lines[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "word"),
    [
        ({"pytest group_norm": "fail"}, "FAILED (1)  group_norm: pytest group_norm failed"),
        ({"pytest rest": "crash"}, "FAILED (-11)  rest: "),
        ({"pytest large": "skip"}, "NOTHING RAN  large: 4 skipped in 0.01s"),
    ],
    ids=str,
)
def test_tests(stages, machine, how, word):
    """A group that fails fails the run and stops no other; one that skipped everything does not look like success."""
    (machine.work / "site" / "normfast").mkdir(parents=True)
    (machine.work / "site" / "normfast" / "__init__.py").touch()
    whole = stages.on(how)
    whole.tests()
    assert whole.failed == ("skip" not in how.values())
    want = [f"tests      ok  {name}: 3 passed, 1 skipped in 0.01s" for name in TESTS]
    want[TESTS.index(word.split(":")[0].split()[-1])] = f"tests      {word}"
    assert whole.lines[:-1] == want
    text = (machine.out / "tests.log").read_text()
    assert [line for line in text.splitlines() if line.startswith("====")] == [f"==== tests-{name}" for name in TESTS]


@pytest.mark.slow
def test_sanitizer(stages, machine):
    whole = stages.on({"compute-sanitizer racecheck": "found", "compute-sanitizer initcheck": "crash"})
    whole.sanitizer()
    assert whole.failed
    assert whole.lines[:-1] == [
        "sanitizer  memcheck: ok  ERROR SUMMARY: 0 errors",
        "sanitizer  racecheck: found errors  ERROR SUMMARY: 2 errors",
        "sanitizer  initcheck: FAILED (-11)  ",
        "sanitizer  synccheck: ok  ERROR SUMMARY: 0 errors",
    ]
    text = (machine.out / "sanitizer.log").read_text()
    assert [f"==== sanitizer-{name}" in text for name in TOOLS] == [True] * 4


@pytest.mark.slow
def test_sanitizer_that_is_of_no_use_here(stages, machine, monkeypatch):
    """Told, and no fault of the kernels."""
    whole = stages.on({f"compute-sanitizer {tool}": "unsupported" for tool in TOOLS})
    whole.sanitizer()
    assert whole.lines[:-1] == [f"sanitizer  {name}: it does not support this device" for name in TOOLS]
    assert not whole.failed
    (Path(machine.environment["PATH"].partition(":")[0]) / "compute-sanitizer").unlink()
    monkeypatch.setattr(stages, "LOCAL", machine.out)  # a real toolkit may have one
    monkeypatch.setitem(machine.environment, "PATH", machine.environment["PATH"].partition(":")[0])
    whole = stages.on()
    whole.sanitizer()
    assert whole.lines == ["sanitizer  absent: no compute-sanitizer beside nvcc or on the PATH"]
    assert not whole.failed


@pytest.mark.slow
def test_board_that_fails(stages, machine, monkeypatch):
    """Also where it had nothing to say; its results up to then are kept, and drawn."""
    monkeypatch.setitem(machine.environment, "NORMFAST_GPU_BOARD", "--only 'rms_norm forward'")
    whole = stages.on({"board": "fail"})
    whole.board()
    assert whole.failed
    assert whole.lines[0] == "report     ok, gpu-stand-in-0123456789.json"
    assert whole.lines[1].startswith("board      FAILED (1), 1 cells, ")
    assert whole.lines[1].endswith(": board failed")
    assert {*BOARD, "board.log"} <= machine.files()
    assert json.loads((machine.out / "gpu-stand-in-0123456789.json").read_text()) == ["rms_norm forward"]
    whole = stages.on({"board": "fail", "report": "fail"})
    whole.board()
    assert whole.lines[0] == "report     FAILED (1), gpu-stand-in-0123456789.json"


@pytest.mark.slow
def test_hanging(hanging, machine):
    """Every stage has its limit, nothing it started outlives it, the others run, and the report is drawn."""
    how = {"pytest streams": "hang", "compute-sanitizer memcheck": "hang", "board": "hang"}
    (machine.work / "site" / "normfast").mkdir(parents=True)
    (machine.work / "site" / "normfast" / "__init__.py").touch()
    whole = hanging(how)
    whole.tests()
    assert whole.lines[-3:-1] == [
        "tests      TIMED OUT  streams: pytest streams hangs",
        "tests      ok  large: 3 passed, 1 skipped in 0.01s",
    ]
    assert whole.failed
    assert machine.orphans() == []
    whole = hanging(how)
    whole.sanitizer()
    assert whole.lines[0] == "sanitizer  memcheck: TIMED OUT  compute-sanitizer memcheck hangs"
    assert whole.failed
    assert machine.orphans() == []
    whole = hanging(how)
    whole.board()
    assert whole.lines[0] == "report     ok, gpu-stand-in-0123456789.json"
    assert whole.lines[1].startswith("board      TIMED OUT, 1 cells, ")
    assert whole.failed
    assert (machine.out / "gpu-stand-in-0123456789.md").read_text() == "drawn afterwards"
    assert machine.orphans() == []


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_is_well(machine):
    done, lines = machine.make_gpu()
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine.files() == LOGS | BOARD
    assert [line.split()[:2] for line in lines] == [
        ["build", "ok,"],
        ["device", "ok"],
        *[["tests", "ok"]] * len(TESTS),
        ["tests", lines[10].split()[1]],
        *(["sanitizer", f"{tool}:"] for tool in TOOLS),
        ["sanitizer", lines[15].split()[1]],
        ["board", "ok,"],
        ["all", "ok,"],
    ]
    assert "\n".join(lines) in done.stdout
    assert (machine.out / "gpu-stand-in-0123456789.md").read_text() == "drawn"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_interrupted(machine, number):
    """What it has found so far is there, what it has started is not."""
    with subprocess.Popen(
        **machine.command(STAND_INS=json.dumps({"pytest rest": "hang"})),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    ) as process:
        while not machine.hangs():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(30) != 0
    assert machine.orphans() == []
    lines = machine.summary()
    assert lines[0].startswith("build      ok")
    assert lines[-1].startswith("all        INTERRUPTED")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """`make gpu` itself: real tests (some), sanitize.py and board on the emulated kernels behind the real bindings."""
    if not kernels.available() or build_bindings.compiler() is None:
        pytest.skip("needs a C++ compiler")
    pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("rehearsal")
    machine = Machine(folder, modules=("pip",))
    built = build_bindings.emulated(ROOT / "build" / f"bindings-{sys.implementation.cache_tag}")
    installed, leave = folder / "installed", shutil.ignore_patterns("__pycache__", "results", "out", ".cache", "faults")
    package = installed / "normfast"
    shutil.copytree(Path(nf.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "_cuda.*.so"))
    shutil.copy(built, package)
    (installed / "normfast-0.dist-info").mkdir()
    (installed / "normfast-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: normfast\nVersion: 0\n")
    for name in ("benchmarks", "tests"):
        shutil.copytree(ROOT / name, machine.root / name, dirs_exist_ok=True, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", machine.root)
    shutil.copy(STAND_INS / "some_tests.py", folder / "site")
    done, lines = machine.make_gpu(
        STAND_INS_INSTALLED=f"{installed}",
        PYTEST_ADDOPTS="-p some_tests",
        NORMFAST_COMMIT="0123456789abcdef",
        NORMFAST_GPU_MINUTES="60",  # however slow this machine is
        NORMFAST_GPU_BOARD="--peers torch --only 8192x128 --only 'batch_norm stats'",
    )
    return machine, done, lines


@pytest.mark.slow
@pytest.mark.proof
def test_the_tests_on_emulated_kernels(rehearsed):
    _, done, lines = rehearsed
    assert "device     ok  host memory (0.0), host memory (1.0); normfast " in "\n".join(lines), done.stdout
    told = {line.split(":")[0].split()[-1]: line for line in lines if line.startswith("tests") and ":" in line}
    assert list(told) == TESTS
    for name in TESTS[:-2]:
        assert told[name].startswith("tests      ok"), done.stdout
    for name in TESTS[-2:]:  # they need a library that sees the device
        assert told[name].startswith("tests      NOTHING RAN"), done.stdout
    assert "sanitizer  memcheck: ok  ERROR SUMMARY: 0 errors" in lines, done.stdout


@pytest.mark.slow
@pytest.mark.proof
def test_the_board_on_emulated_kernels(rehearsed):
    machine, done, lines = rehearsed
    (told,) = (line for line in lines if line.startswith("board"))
    if importlib.util.find_spec("torch") is None:
        assert told.startswith("board      FAILED (2)")
        assert "It needs PyTorch" in told
        assert done.returncode == 1
        return
    assert told.startswith("board      ok"), (machine.out / "board.log").read_text()
    assert done.returncode == 0, done.stdout
    (file,) = machine.out.glob("gpu-*.json")
    assert file.name == "gpu-rehearsal-0123456789.json"
    content = json.loads(file.read_text())
    assert content["rehearsal"]
    assert content["troubles"] == []
    assert content["normfast"]["commit"] == "0123456789abcdef"
    assert len(content["overhead"]) > 5
    assert [row["unit"] for row in content["ceilings"]] == ["GB/s"] * 10 + ["MB"]
    assert all(row["value"] > 0 for row in content["ceilings"][:10])
    reached = [cell["label"] for cell in content["cells"]]
    assert reached == [
        "rms_norm forward 32x128 bfloat16",
        "rms_norm backward 32x128 bfloat16",
        "batch_norm stats 2x64x8x8 float16",
    ]
    assert content["not_reached"] == []
    assert ", 3 cells, " in told
    for cell in content["cells"]:
        assert cell["results"]["normfast"]["us"] > 0
        assert cell["results"]["normfast"]["samples"] >= 5
        assert cell["errors"]["normfast"] < 0.01
    table = file.with_suffix(".md").read_text()
    assert "A rehearsal on the host: the figures mean nothing." in table
    assert all(f"| {label} |" in table for label in reached)
    if importlib.util.find_spec("matplotlib") is not None:
        assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.proof
def test_a_board_that_got_nowhere_is_drawn(rehearsed, tmp_path):
    """It may be ended before its first cell."""
    machine, *_ = rehearsed
    if importlib.util.find_spec("torch") is None:
        pytest.skip("the board needs PyTorch")
    (file,) = machine.out.glob("gpu-*.json")
    content = json.loads(file.read_text()) | {"cells": [], "overhead": []}
    early = tmp_path / file.name
    early.write_text(json.dumps(content))
    command = [sys.executable, "-m", "benchmarks.gpu", "report", str(early)]
    environment = machine.environment | {"PYTHONPATH": f"{machine.work / 'site'}"}
    subprocess.run(command, cwd=machine.root, env=environment, check=True, capture_output=True, timeout=120)
    assert early.with_suffix(".md").read_text().startswith("rehearsal, ")
