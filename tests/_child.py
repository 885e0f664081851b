"""Runs Python code in a fresh interpreter, or in a fork: environment and peak memory need one of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# Settings of the surrounding shell that must not decide what a child does. A forced code path stays forced.
_OURS = ("NORMFAST_NUM_THREADS", "NORMFAST_POOL_BYTES", "OMP_NUM_THREADS")


def spawn(code, *args, timeout=120, **env):
    """Runs `code` (a script's text) and returns the finished process, whatever its exit status."""
    environment = {k: v for k, v in os.environ.items() if k not in _OURS} | env
    paths = [str(HERE), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-X", "faulthandler", "-c", code, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def output(code, *args, **kw):
    """Standard output of a child that must succeed."""
    done = spawn(code, *args, **kw)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def forked(work):
    """Forks; the child's exit status is 0 where `work()` is true, 2 where it is not, 1 for an error."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return pid


def ended(pid, seconds=60):
    """Exit status of a child; one that hangs must fail the test, not stall it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGABRT)  # faulthandler tells where it was
    os.waitpid(pid, 0)
    return "hangs"
