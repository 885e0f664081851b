# SPDX-License-Identifier: BSD-3-Clause

"""``make gpu``: build, tests, compute-sanitizer, board, one after the other, in nine minutes and without a network.

A stage that fails does not stop the next ones. Each has its limit and its log; what remains of the time is the board's.
Variables: OUT, where the logs and results go (build/gpu); NORMFAST_COMMIT, what is measured, where there is no
repository; NORMFAST_GPU_MINUTES, for all stages together (8.7).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu"
OPS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86  # the exit status by which compute-sanitizer says that it found something
BUILD, TESTS, LARGE, SANITIZER = 200, 110, 70, 100  # seconds, at most
BOARD, BOARD_LEAST, GRACE = 210, 75, 35


class Stages:
    def __init__(self) -> None:
        self.end = monotonic() + 60 * float(os.environ.get("NORMFAST_GPU_MINUTES", "8.7"))
        self.out = Path(os.environ.get("OUT") or WORK).resolve()
        self.lines: list[str] = []
        self.failed = False
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

    def left(self, reserve: float = 0) -> float:
        return max(5.0, self.end - monotonic() - reserve)

    def note(self, text: str, *, bad: bool = False) -> None:
        self.failed |= bad
        self.lines.append(text)
        print(text, flush=True)

    def start(self, command: list[str], log: Path) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def finish(self, running: dict[str, subprocess.Popen], limit: float) -> dict[str, int | None]:
        """Exit statuses; None for what had to be ended."""
        until = monotonic() + limit
        while monotonic() < until and any(p.poll() is None for p in running.values()):
            sleep(0.2)
        statuses = {name: p.poll() for name, p in running.items()}
        for p in running.values():
            if p.poll() is None:
                _end(p)
        return statuses

    # ---- stages

    def build(self) -> None:
        began = monotonic()
        settings = [f"build-dir={WORK / 'cmake'}", "cmake.define.NORMFAST_CUDA=ON"]
        settings.append(f"cmake.define.CMAKE_CUDA_ARCHITECTURES={_architecture()}")
        command = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
        command += ["--disable-pip-version-check", "--upgrade", "--target", str(WORK / "site"), "."]
        log = self.out / "build.log"
        process = self.start(command + [part for s in settings for part in ("-C", s)], log)
        status = self.finish({"build": process}, min(BUILD, self.left(150)))["build"]
        self.note(f"build      {_word(status)}, {monotonic() - began:.0f} s", bad=status != 0)
        if status != 0:
            print("\n".join(_tail(log, 25)))

    def tests(self) -> None:
        began = monotonic()
        files = ["tests/cuda/test_device.py", "tests/cuda/test_device_numerics.py"]
        rest = " and ".join(f"not {op}" for op in OPS)
        # One process per norm: they share the host's CPUs, and a kernel that breaks its context breaks no other's.
        groups = {op: op for op in OPS} | {"rest": rest}
        running = {name: self._pytest(name, files, "-k", expression) for name, expression in groups.items()}
        statuses = self.finish(running, min(TESTS, self.left(BOARD_LEAST + SANITIZER)))
        for name in ("streams", "large"):
            process = self._pytest(name, [f"tests/cuda/test_device_{name}.py"])
            statuses |= self.finish({name: process}, min(LARGE, self.left(BOARD_LEAST + SANITIZER)))
        for name, status in statuses.items():
            last = _tail(WORK / f"tests-{name}.log", 1)
            self.note(f"tests      {_word(status)}  {name}: {last[0] if last else ''}", bad=status != 0)
        _join(self.out / "tests.log", [WORK / f"tests-{name}.log" for name in statuses])
        self.note(f"tests      {monotonic() - began:.0f} s")

    def _pytest(self, name: str, files: list[str], *more: str) -> subprocess.Popen:
        options = ["-q", "-p", "no:cacheprovider", "-W", "default", "-m", "cuda", "--tb=short", "--maxfail=40"]
        command = [sys.executable, "-m", "pytest", *options, "--durations=5", *more, *files]
        return self.start(command, WORK / f"tests-{name}.log")

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
        statuses = self.finish(running, min(SANITIZER, self.left(BOARD_LEAST)))
        for name, status in statuses.items():
            log = WORK / f"sanitizer-{name}.log"
            text = "\n".join(_tail(log, 400))
            if status not in (0, None) and "not supported" in text:
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
        seconds = min(BOARD, self.left(GRACE))
        log = self.out / "board.log"
        before = set((ROOT / "benchmarks" / "results").glob("gpu-*.json"))
        stamp = {path: path.stat().st_mtime for path in before}
        process = self.start([sys.executable, "-m", "benchmarks.gpu", "run", "--minutes", f"{seconds / 60:.2f}"], log)
        status = self.finish({"board": process}, self.left(8))["board"]
        made = [
            path
            for path in (ROOT / "benchmarks" / "results").glob("gpu-*.json")
            if path.stat().st_mtime > stamp.get(path, 0)
        ]
        for path in made:
            if status is None:  # ended before it could draw
                shown = self.start([sys.executable, "-m", "benchmarks.gpu", "report", str(path)], WORK / "report.log")
                self.finish({"report": shown}, 7)
            for suffix in (".json", ".md", ".png"):
                if path.with_suffix(suffix).exists():
                    shutil.copy2(path.with_suffix(suffix), self.out)
        cells = sum(" GB/s " in line for line in _tail(log, 2000))
        # Disagreements are told, and are no reason for another status than that of the tests.
        self.note(f"board      {_word(status)}, {cells} cells, {monotonic() - began:.0f} s")
        print("\n".join(_tail(log, 45)))

    def run(self) -> int:
        began = monotonic()
        for stage in (self.build, self.tests, self.sanitizer, self.board):
            try:
                stage()
            except Exception as error:
                self.note(f"{stage.__name__}: {type(error).__name__}: {error}", bad=True)
        self.lines.append(f"all        {'FAILED' if self.failed else 'ok'}, {monotonic() - began:.0f} s")
        text = "\n".join(self.lines)
        (self.out / "summary.txt").write_text(text + "\n")
        print(f"\n{text}\nLogs and results: {self.out}", flush=True)
        return int(self.failed)


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


def _end(process: subprocess.Popen) -> None:
    """With all that it started, which shares its process group and no one else's."""
    for number in (15, 9):  # the second also for what outlived its parent
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(4)


def _toolkit() -> Path | None:
    """The folder of nvcc."""
    found = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which("nvcc")
    if found:
        return Path(found).resolve().parent
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)
    homes += [str(p) for path in sys.path for p in Path(path or ".").glob("nvidia/cu1*")]
    return next((Path(h) / "bin" for h in homes if h and (Path(h) / "bin" / "nvcc").exists()), None)


def _sanitizer(path: str) -> str | None:
    name = "compute-sanitizer"
    places = [*Path("/usr/local").glob("cuda*/bin"), *Path("/usr/local").glob(f"cuda*/{name}")]
    return shutil.which(name, path=os.pathsep.join([path, *map(str, places)]))


def _architecture() -> str:
    """Of this machine's GPU alone, which takes a fraction of the time of all."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return f"{int(text.strip().splitlines()[0].replace('.', ''))}-real"
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return "90-real"


if __name__ == "__main__":
    sys.exit(Stages().run())
