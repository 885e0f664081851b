# SPDX-License-Identifier: BSD-3-Clause

"""``make gpu``: build, tests, compute-sanitizer, board, one after the other, in nine minutes and without a network.

Without a build, or without a device, there is nothing to try, and minutes on a GPU are dear: the rest is then not run.
Any other stage that fails does not stop the next ones. Each has its limit and its log; what remains of the time is the
board's. The status is 0 when every stage did all it should; a tool that is not there is told, and is no failure.

Variables: OUT, where the logs and results go, as they are made (build/gpu); NORMFAST_COMMIT, what is measured, where
there is no repository; NORMFAST_GPU_MINUTES, for all stages together (8.7): all limits grow and shrink with it;
NORMFAST_GPU_BOARD, further arguments of the board, such as ``--only batch_norm --peers torch``.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu"
LOCAL = Path("/usr/local")  # where CUDA toolkits usually are
OPS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86  # the exit status by which compute-sanitizer says that it found something
# Of so many minutes each stage may take so many seconds.
MINUTES = 8.7
BUILD, TESTS, LARGE, SANITIZER = 200, 110, 70, 100
BOARD, BOARD_LEAST, GRACE = 210, 75, 35
POLL, PATIENCE, DRAWING = 0.1, 4.0, 20.0  # seconds: between two looks; to end when told to; for a report afterwards


class Stages:
    def __init__(self, minutes: float = MINUTES) -> None:
        self.scale = minutes / MINUTES
        self.end = monotonic() + 60 * minutes
        self.out = Path(os.environ.get("OUT") or WORK).resolve()
        self.lines: list[str] = []
        self.started: list[subprocess.Popen] = []
        self.failed = self.stop = False
        for folder in (WORK, self.out):
            folder.mkdir(parents=True, exist_ok=True)
        toolkit = _toolkit()
        paths = [str(toolkit)] if toolkit else []
        self.environment = os.environ | {
            "PATH": os.pathsep.join([*paths, os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join([str(WORK / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 8),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        if toolkit:
            self.environment.setdefault("CUDACXX", str(toolkit / "nvcc"))

    def limit(self, most: float, reserve: float = 0) -> float:
        """Seconds for a stage that takes at most so many, where those to come need a reserve; 0 if none are left."""
        return max(0.0, min(most * self.scale, self.end - monotonic() - reserve * self.scale))

    def note(self, text: str, *, bad: bool = False) -> None:
        """At once: who is ended from outside leaves what he knows."""
        self.failed |= bad
        self.lines.append(text)
        (self.out / "summary.txt").write_text("\n".join(self.lines) + "\n")
        print(text, flush=True)

    def start(self, command: list[str], log: Path) -> subprocess.Popen:
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.started.append(process)
        return process

    def finish(self, running: dict[str, subprocess.Popen], limit: float) -> dict[str, int | None]:
        """Exit statuses; None for what had to be ended."""
        until = monotonic() + limit
        while monotonic() < until and any(p.poll() is None for p in running.values()):
            sleep(POLL)
        statuses = {name: p.poll() for name, p in running.items()}
        _end([p for name, p in running.items() if statuses[name] is None])
        return statuses

    # ---- stages

    def build(self) -> None:
        began = monotonic()
        self.stop = True
        shutil.rmtree(WORK / "site", ignore_errors=True)  # what is measured below is what is built here, or nothing
        architecture, known = _architecture()
        settings = [f"build-dir={WORK / 'cmake'}", "cmake.define.NORMFAST_CUDA=ON"]
        settings.append(f"cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}")
        command = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
        command += ["--disable-pip-version-check", "--upgrade", "--target", str(WORK / "site"), "."]
        log = self.out / "build.log"
        process = self.start(command + [part for s in settings for part in ("-C", s)], log)
        status = self.finish({"build": process}, self.limit(BUILD, 150))["build"]
        guess = "" if known else ", a guess: nvidia-smi did not say"
        took = f"{monotonic() - began:.0f} s, for {architecture}{guess}"
        self.note(f"build      {_word(status)}, {took}", bad=status != 0)
        if status != 0:
            print("\n".join(_tail(log, 25)))
            return
        log = WORK / "device.log"
        process = self.start([sys.executable, "-m", "benchmarks.gpu.device"], log)
        status = self.finish({"device": process}, self.limit(BUILD, 150))["device"]
        self.note(f"device     {_word(status)}  {''.join(_tail(log, 1))}", bad=status != 0)
        self.stop = status != 0

    def tests(self) -> None:
        began = monotonic()
        files = ["tests/cuda/test_device.py", "tests/cuda/test_device_numerics.py"]
        rest = " and ".join(f"not {op}" for op in OPS)
        # One process per norm: they share the host's CPUs, and a kernel that breaks its context breaks no other's.
        groups = {op: op for op in OPS} | {"rest": rest}
        logs = {name: WORK / f"tests-{name}.log" for name in (*groups, "streams", "large")}
        limit = self.limit(TESTS, BOARD_LEAST + SANITIZER)
        running = {name: self._pytest(logs[name], files, "-k", expression) for name, expression in groups.items()}
        statuses = self.finish(running, limit)
        for name in ("streams", "large"):
            limit = self.limit(LARGE, BOARD_LEAST + SANITIZER)
            process = self._pytest(logs[name], [f"tests/cuda/test_device_{name}.py"])
            statuses |= self.finish({name: process}, limit)
        for name, status in statuses.items():
            last = "".join(_tail(logs[name], 1))
            word = "NOTHING RAN" if status == 0 and " passed" not in last else _word(status)
            self.note(f"tests      {word}  {name}: {last}", bad=status != 0)
        _join(self.out / "tests.log", list(logs.values()))
        self.note(f"tests      {monotonic() - began:.0f} s")

    def _pytest(self, log: Path, files: list[str], *more: str) -> subprocess.Popen:
        # -W default, where the project's own setting is "error": what other versions of libraries on that machine warn
        # of is no fault of the kernels, and must not cost a run.
        options = ["-q", "-p", "no:cacheprovider", "-W", "default", "-m", "cuda", "--tb=short", "--maxfail=40"]
        return self.start([sys.executable, "-m", "pytest", *options, "--durations=5", *more, *files], log)

    def sanitizer(self) -> None:
        began = monotonic()
        tool = _sanitizer(self.environment["PATH"])
        if tool is None:
            self.note("sanitizer  absent: no compute-sanitizer beside nvcc or on the PATH")
            return
        script = [sys.executable, "tests/cuda/sanitize.py"]
        running = {}
        for name in TOOLS:
            options = ["--tool", name, "--error-exitcode", str(FOUND), "--print-limit", "20"]
            running[name] = self.start([tool, *options, *script], WORK / f"sanitizer-{name}.log")
        statuses = self.finish(running, self.limit(SANITIZER, BOARD_LEAST))
        for name, status in statuses.items():
            log = WORK / f"sanitizer-{name}.log"
            text = "\n".join(_tail(log, 400))
            if status not in (0, None) and "device not supported" in text.lower():
                self.note(f"sanitizer  {name}: it does not support this device")
                continue
            said = [line for line in text.splitlines() if "SUMMARY" in line][-1:] if status in (0, FOUND) else []
            said = said or _tail(log, 1)
            what = "found errors" if status == FOUND else _word(status)
            self.note(f"sanitizer  {name}: {what}  {said[0].strip('= ') if said else ''}", bad=status != 0)
        _join(self.out / "sanitizer.log", [WORK / f"sanitizer-{name}.log" for name in TOOLS])
        self.note(f"sanitizer  {monotonic() - began:.0f} s")

    def board(self) -> None:
        began = monotonic()
        log = self.out / "board.log"
        before = {path: path.stat().st_mtime_ns for path in self.out.glob("gpu-*.json")}
        # It writes where the results belong, so that they are there whoever ends it.
        command = [sys.executable, "-m", "benchmarks.gpu", "run", "--into", str(self.out)]
        command += ["--minutes", f"{self.limit(BOARD, GRACE) / 60:.3f}"]
        command += shlex.split(os.environ.get("NORMFAST_GPU_BOARD", ""))
        status = self.finish({"board": self.start(command, log)}, self.limit(BOARD + GRACE, 8))["board"]
        for path in self.out.glob("gpu-*.json"):
            if path.stat().st_mtime_ns == before.get(path):
                continue
            table = path.with_suffix(".md")
            if not table.exists() or table.stat().st_mtime_ns < path.stat().st_mtime_ns:  # ended before it could draw
                command = [sys.executable, "-m", "benchmarks.gpu", "report", str(path)]
                drawn = self.finish({"report": self.start(command, WORK / "report.log")}, DRAWING)["report"]
                self.note(f"report     {_word(drawn)}, {path.name}", bad=drawn != 0)
        cells = sum(" GB/s " in line for line in _tail(log, 2000))
        said = "" if status in (0, None) else "".join(f": {line}" for line in _tail(log, 1))
        self.note(f"board      {_word(status)}, {cells} cells, {monotonic() - began:.0f} s{said}", bad=status != 0)
        print("\n".join(_tail(log, 45)))

    def run(self) -> int:
        began = monotonic()
        stages: list[tuple[Callable[[], None], float]] = [
            (self.build, 150),
            (self.tests, BOARD_LEAST + SANITIZER),
            (self.sanitizer, BOARD_LEAST),
            (self.board, GRACE),
        ]
        done = False
        try:
            for stage, reserve in stages:
                self._try(stage, reserve)
            done = True
        finally:  # also when it is interrupted: nothing is left behind, and the summary says so
            _end([p for p in self.started if p.poll() is None])
            word = "INTERRUPTED" if not done else "FAILED" if self.failed else "ok"
            self.note(f"all        {word}, {monotonic() - began:.0f} s")
        print("\n" + "\n".join(self.lines) + f"\nLogs and results: {self.out}", flush=True)
        return int(self.failed)

    def _try(self, stage: Callable[[], None], reserve: float) -> None:
        name = f"{stage.__name__:<10}"
        if self.stop:
            self.note(f"{name} NOT RUN: there is no build, or no device", bad=True)
        elif self.limit(math.inf, reserve) == 0:
            self.note(f"{name} NOT RUN: no time left", bad=True)
        else:
            try:
                stage()
            except Exception as error:
                self.note(f"{name} {type(error).__name__}: {error}", bad=True)


def _word(status: int | None) -> str:
    return "TIMED OUT" if status is None else "ok" if status == 0 else f"FAILED ({status})"


def _tail(path: Path, lines: int) -> list[str]:
    try:
        return [line for line in path.read_text(errors="replace").splitlines() if line.strip()][-lines:]
    except OSError:
        return []


def _join(target: Path, parts: list[Path]) -> None:
    """Into one file, none of the parts beyond a size that can be read."""
    target.write_text("".join(f"==== {p.stem}\n" + "\n".join(_tail(p, 3000)) + "\n\n" for p in parts))


def _end(processes: list[subprocess.Popen]) -> None:
    """With all that they started, which shares their process groups and no one else's."""
    for number in (signal.SIGTERM, signal.SIGKILL):  # the second also for what outlived its parent
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        until = monotonic() + PATIENCE
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - monotonic()))


def _toolkit() -> Path | None:
    """The folder of nvcc."""
    found = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which("nvcc")
    if found:
        return Path(found).resolve().parent
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), str(LOCAL / "cuda")]
    homes += sorted(map(str, LOCAL.glob("cuda-*")), reverse=True)
    homes += [str(p) for path in sys.path for p in Path(path or ".").glob("nvidia/cu1*")]
    return next((Path(h) / "bin" for h in homes if h and (Path(h) / "bin" / "nvcc").exists()), None)


def _sanitizer(path: str) -> str | None:
    name = "compute-sanitizer"
    places = [*LOCAL.glob("cuda*/bin"), *LOCAL.glob(f"cuda*/{name}")]
    return shutil.which(name, path=os.pathsep.join([path, *map(str, places)]))


def _architecture() -> tuple[str, bool]:
    """Of this machine's GPU alone, which takes a fraction of the time of all; and whether that is known."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return f"{int(text.strip().splitlines()[0].replace('.', ''))}-real", True
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return "90-real", False


def _minutes() -> float:
    text = os.environ.get("NORMFAST_GPU_MINUTES") or str(MINUTES)
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise SystemExit(f"NORMFAST_GPU_MINUTES must be a positive number, got {text!r}")
    return minutes


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(Stages(_minutes()).run())
