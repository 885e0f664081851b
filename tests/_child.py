"""Runs Python code in a fresh interpreter: environment variables, forks and peak memory need one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
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
