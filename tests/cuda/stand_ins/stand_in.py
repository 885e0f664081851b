# SPDX-License-Identifier: BSD-3-Clause

"""What `make gpu` calls, without a GPU: pip, pytest, compute-sanitizer, nvidia-smi and the board.

Each refuses options that the real one does not have. STAND_INS says in JSON how some of them behave: {"pytest streams":
"fail"}; without a word they do well. A name and, behind a blank, which of its calls.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

NORMFAST = """
__version__ = "0"
def show_config(mode):
    devices = [{"name": "stand-in", "compute_capability": "9.0"}] if PRESENT else []
    return {"version": "0", "cuda": {"available": PRESENT, "devices": devices, "reason": "cudaErrorNoDevice"}}
"""


def behave(name: str) -> None:
    """As STAND_INS wants; returns if it wants nothing."""
    how = json.loads(os.environ.get("STAND_INS", "{}")).get(name)
    if how == "fail":
        print(f"{name} failed")
        sys.exit(1)
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "found":
        print("========= ERROR SUMMARY: 2 errors")
        sys.exit(86)
    if how == "unsupported":
        print("========= Error: Device not supported. Please refer to the documentation")
        sys.exit(1)
    if how == "skip":
        print("4 skipped in 0.01s")
        sys.exit(0)
    if how == "hang":
        # What it has started does not end when it is told to.
        print(f"{name} hangs", flush=True)
        child = subprocess.Popen(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"])
        for pid in (child.pid, os.getpid()):
            Path(os.environ["STAND_INS_PIDS"]).joinpath(str(pid)).touch()
        time.sleep(600)


def parsed(parser: argparse.ArgumentParser, *options: str, values: str = "") -> argparse.Namespace:
    for option in options:
        parser.add_argument(option, action="store_true")
    for option in values.split():
        parser.add_argument(option, action="append", required=option in ("--target", "--tool", "--into"))
    return parser.parse_args()


def pip() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("install", choices=["install"])
    parser.add_argument("what", type=Path)
    flags = ("-v", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--upgrade")
    given = parsed(parser, *flags, values="--target -C")
    assert (given.what / "benchmarks").is_dir(), given.what.resolve()
    assert any(setting.startswith("build-dir=/") for setting in given.C)
    assert "cmake.define.NORMFAST_CUDA=ON" in given.C
    print(*(s for s in given.C if "ARCHITECTURES" in s))
    behave("pip")
    site = Path(given.target[0])
    if installed := os.environ.get("STAND_INS_INSTALLED"):
        shutil.copytree(installed, site)
        return
    (site / "normfast").mkdir(parents=True)
    present = "device" not in os.environ.get("STAND_INS", "")
    (site / "normfast" / "__init__.py").write_text(f"PRESENT = {present}\n{NORMFAST}")


def pytest() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path)
    given = parsed(parser, "-q", values="-p -W -m -k --tb --maxfail --durations")
    for file in given.files:
        assert file.name.startswith("test_device"), file
    import normfast

    assert Path(normfast.__file__).parts[-3:-1] == ("site", "normfast"), "not what was built"
    which = given.files[0].stem.removeprefix("test_device_") if given.k is None else given.k[0]
    behave(f"pytest {'rest' if which.startswith('not ') else which}")
    print("3 passed, 1 skipped in 0.01s")


def compute_sanitizer() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parsed(parser, values="--tool --error-exitcode --print-limit")
    assert given.error_exitcode == ["86"]
    (tool,) = given.tool
    assert tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    behave(f"compute-sanitizer {tool}")
    print("========= COMPUTE-SANITIZER", flush=True)
    if os.environ.get("STAND_INS_INSTALLED") and tool == "memcheck":  # once in a rehearsal of all
        status = subprocess.run(given.command).returncode
        if status != 0:
            sys.exit(status)
    print("========= RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "========= ERROR SUMMARY: 0 errors")


def nvidia_smi() -> None:
    given = parsed(argparse.ArgumentParser(allow_abbrev=False), values="--id --query-gpu --format")
    assert given.format == ["csv,noheader"]
    behave("nvidia-smi")
    asked = given.query_gpu[0].split(",")
    print(", ".join({"compute_cap": "8.6"}.get(name, "stand-in") for name in asked))


def board() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("command", choices=["run", "report"])
    if sys.argv[1] == "report":
        parser.add_argument("file", type=Path)
        file = parsed(parser).file
        behave("report")
        file.with_suffix(".md").write_text("drawn afterwards")
        file.with_suffix(".png").write_bytes(b"png")
        return
    given = parsed(parser, values="--minutes --into --only")
    assert float(given.minutes[0]) > 0
    file = Path(given.into[0]) / "gpu-stand-in-0123456789.json"
    file.write_text(json.dumps(given.only))
    print("layer_norm forward  1.0 us  3 GB/s  4 %", flush=True)
    behave("board")
    file.with_suffix(".md").write_text("drawn")
    file.with_suffix(".png").write_bytes(b"png")


def main(name: str) -> None:
    {"pip": pip, "pytest": pytest, "compute-sanitizer": compute_sanitizer, "nvidia-smi": nvidia_smi, "board": board}[
        name
    ]()
