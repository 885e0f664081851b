"""Counting instructions: a process under callgrind calls normfast, and what callgrind wrote is read back.

Only instructions of normfast's own extension module count. Python, NumPy and the C library may change their versions
without changing a count, and what valgrind itself does to the rest of the process does not matter.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import native
from .shapes import Case

OBJECT = "_core."  # the name of the file of the extension module begins with this
WARM_UP, CALLS = 3, 4
_TRIGGER = "desc: Trigger: Client Request: "
_FACTS = "facts.json"
# Nothing else of the environment reaches the counted process: a setting of normfast's would change what it does.
_KEPT = ("PATH", "HOME", "TMPDIR", "CC", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "VALGRIND_LIB", "NORMFAST_ISA")
_SET = {"LC_ALL": "C", "PYTHONHASHSEED": "0", "NORMFAST_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class CannotCount(Exception):
    """No valgrind, or the counted process failed; the text says what to do or what it said."""


@dataclass(frozen=True)
class Counts:
    """One run: what was counted, and the instructions of one call of each case, by its label."""

    facts: dict[str, Any]
    calls: dict[str, int]


def own_instructions(lines: Iterable[str], prefix: str = OBJECT) -> tuple[str, int]:
    """The label of a dump, and the instructions that ran in the object whose file name begins with the prefix.

    An ``ob=`` line says where the functions after it lie. A cost line is a position and a number. The one that follows
    a ``calls=`` line is what the callee took, which stands under the callee's own name as well.
    """
    label, total, inside, inclusive = "", 0, False, False
    for line in lines:
        if line.startswith(_TRIGGER):
            label = line.removeprefix(_TRIGGER).strip()
        elif line.startswith("ob="):
            inside = line.removeprefix("ob=").rpartition("/")[2].startswith(prefix)
        elif line.startswith("calls="):
            inclusive = True
        elif line[:1].isdigit():
            if inside and not inclusive:
                total += int(line.split()[1])
            inclusive = False
    return label, total


def count(cases: Sequence[Case], arrived: Callable[[str], None] = lambda label: None) -> Counts:
    """Count all cases, in one process. ``arrived`` is told the label of each case that is done."""
    if find_spec("normfast") is None:
        raise CannotCount("normfast is not installed in this environment: `pip install .` first.")
    if shutil.which("valgrind") is None:
        raise CannotCount("valgrind is not installed: `apt-get install valgrind`, or what your system calls it.")
    try:
        native.build("callgrind.c", native.C, ())  # here, so that the counted process finds it built
    except native.CannotBuild as error:
        raise CannotCount(f"{error}\nThe header callgrind.h comes with `apt-get install valgrind`.") from None
    orders = json.dumps([asdict(case) for case in cases])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", "--dump-line=no"]
        command += ["--compress-strings=no", "--compress-pos=no", f"--callgrind-out-file={folder / 'dump'}"]
        command += [sys.executable, "-m", __name__, name]
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ} | _SET
        with (
            (folder / "log").open("w") as log,
            subprocess.Popen(
                command,
                cwd=native.HERE.parent,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            ) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(orders)
            process.stdin.close()
            for line in process.stdout:
                arrived(line.strip())
        if process.returncode:
            raise CannotCount(f"The counted process failed:\n{(folder / 'log').read_text().strip()}")
        facts = json.loads((folder / _FACTS).read_text())
        found = dict(own_instructions(path.read_text().splitlines()) for path in folder.glob("dump*"))
    version = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    absent = [case.label for case in cases if not found.get(case.label)]
    if absent:
        raise CannotCount(f"{version} saw no instruction of normfast in: {', '.join(absent)}")
    return Counts({**facts, "valgrind": version}, {case.label: found[case.label] // CALLS for case in cases})


def _work(folder: Path) -> None:
    """The counted process: the problems are made without instrumentation, which would take a minute."""
    import normfast

    from . import peers
    from .problem import Problem

    library = native.build("callgrind.c", native.C, ())
    if not ctypes.c_int(library.callgrind_present()).value:
        raise SystemExit("this process is started by `python -m benchmarks.instructions`, under valgrind")
    subject = peers.load(peers.SUBJECT)
    subject.open(1)
    config = normfast.show_config(mode="dicts")
    facts = {key: config[key] for key in ("compiler", "code_path", "numpy")} | {"python": platform.python_version()}
    gc.disable()
    for fields in json.load(sys.stdin):
        case = Case(**{**fields, "shape": tuple(fields["shape"])})
        call = subject.prepare(Problem(case), True).call
        for _ in range(WARM_UP):
            call()
        library.callgrind_begin()
        for _ in range(CALLS):
            call()
        library.callgrind_end(case.label.encode())
        print(case.label, flush=True)
    (folder / _FACTS).write_text(json.dumps(facts))


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
