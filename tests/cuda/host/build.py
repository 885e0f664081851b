"""Builds the CUDA kernels for the host: a shared library of csrc/cuda against the emulation, for ctypes.

    build("plain")                      every kernel file of csrc/cuda with entry.cpp
    build("asan", substitutes=folder)   with AddressSanitizer; files in `folder` (csrc/cuda/rows.cu or just rows.cu)
                                        take the place of those of the same name: mutated sources
    build("plain", selftest=True)       the emulation's own small kernels instead

What has been built before is not built again: objects and libraries are named by the content of all that went in.
`sanitized(...)` runs a Python script against a library of the variant "asan".
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CACHE = Path(os.environ.get("NORMFAST_EMULATION_CACHE", ROOT / "build" / "emulation"))

COMPILER = shlex.split(os.environ.get("CXX", "c++"))
# -fno-strict-aliasing: shared memory holds one type after the other.
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-I", "csrc", "-I", "tests/cuda/host"),
    *(["-mfma"] if platform.machine() in ("x86_64", "AMD64") else []),
]
VARIANTS = {
    "plain": [],
    # Only the runtime of GCC is looked for: these are its options. A call for each check: written in line, and with all
    # that a debugger asks for, they take twice as long to compile.
    "asan": [
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
        *("-g1", "--param=asan-instrumentation-with-call-threshold=0"),
    ],
}
ON_THE_DEVICE_ONLY = ("device.cu",)
PATTERNS = ("csrc/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh", "csrc/cuda/*.cu", "tests/cuda/host/*.h")
RUNNER = ("tests/cuda/host/engine.cpp", "tests/cuda/host/entry.cpp", "tests/cuda/host/selftest.cu")


class BuildError(Exception):
    """The compiler's message."""


def sources(substitutes=None):
    """All files that a build may need: their names in the repository, and their contents."""
    names = {str(p.relative_to(ROOT)) for pattern in PATTERNS for p in ROOT.glob(pattern)} | set(RUNNER)
    texts = {name: (ROOT / name).read_bytes() for name in sorted(names)}
    if substitutes is not None:
        for path in sorted(p for p in Path(substitutes).rglob("*") if p.is_file()):
            given = str(path.relative_to(substitutes))
            known = [name for name in texts if name == given or (os.sep not in given and Path(name).name == given)]
            if len(known) != 1:
                raise ValueError(f"{given} takes the place of no one file")
            texts[known[0]] = path.read_bytes()
    return texts


def build(variant="plain", *, substitutes=None, selftest=False):
    """The path of the library."""
    texts, units, flags, headers, keys = _plan(variant, substitutes, selftest)
    library = CACHE / f"{variant}-{_digest(*sorted(keys.values()))}.so"
    if library.exists():
        return library
    with _tree(texts, [*headers, *units]) as tree:
        # A mutated source may leave something unused.
        strict = substitutes is None
        objects = [_object(name, key, flags, tree, strict) for name, key in keys.items()]
        made = Path(tree) / "library.so"
        _run([*COMPILER, "-shared", *VARIANTS[variant], *map(str, objects), "-o", str(made), "-ldl"], tree)
        made.replace(library)
    return library


def objects():
    """What "plain" is linked from, without the functions for ctypes: the kernels for another library."""
    texts, units, flags, headers, keys = _plan("plain", None, False)
    with _tree(texts, [*headers, *units]) as tree:
        return [_object(name, key, flags, tree, True) for name, key in keys.items() if name != RUNNER[1]]


def _plan(variant, substitutes, selftest):
    """Contents of all files, what is compiled, with which flags, the headers, a digest for each object."""
    texts = sources(substitutes)
    if selftest:
        units = list(RUNNER)
    else:
        kernels = [n for n in texts if n.startswith("csrc/") and n.endswith(".cu")]
        units = [n for n in kernels if Path(n).name not in ON_THE_DEVICE_ONLY] + list(RUNNER[:2])
    flags = [*FLAGS, *VARIANTS[variant], *(["-DNF_SELFTEST_ONLY"] if selftest else [])]
    # A header belongs to every object: there are few of both.
    headers = {n: t for n, t in texts.items() if n.endswith((".h", ".cuh"))}
    common = _digest(_compiler_version(), " ".join([*COMPILER, *flags]), *(x for pair in headers.items() for x in pair))
    return texts, units, flags, headers, {name: _digest(common, name, texts[name]) for name in units}


@contextlib.contextmanager
def _tree(texts, names):
    """A folder with these files, as in the repository."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as tree:
        for name in names:
            (Path(tree) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(tree) / name).write_bytes(texts[name])
        yield tree


def _object(name, key, flags, tree, strict):
    wanted = CACHE / f"{Path(name).stem}-{key}.o"
    if not wanted.exists():
        made = Path(tree) / f"{key}.o"
        # -x c++: a .cu file means nothing, or something else, to a host compiler.
        _run([*COMPILER, *flags, "-x", "c++", "-c", name, "-o", str(made)], tree, strict)
        made.replace(wanted)
    return wanted


def _run(command, folder, strict=False):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0 or (strict and done.stderr):
        raise BuildError(f"{shlex.join(command)}\n{done.stderr}")


def _digest(*parts):
    h = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:24]


@functools.cache
def _compiler_version():
    return subprocess.run([*COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def available():
    """Is there a compiler to build with?"""
    return shutil.which(COMPILER[0]) is not None


@functools.cache
def _runtime(name):
    done = subprocess.run([*COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@functools.cache
def sanitizer_available():
    """Can a library of the variant "asan" be built and loaded?"""
    if not available() or not Path(_runtime("libasan.so")).exists():
        return False
    with contextlib.suppress(BuildError, OSError, subprocess.SubprocessError):
        return sanitized(["-c", f"import ctypes; ctypes.CDLL({str(build('asan', selftest=True))!r})"]).returncode == 0
    return False


def sanitized(args, *, timeout=600, **env):
    """Runs Python with these arguments (["-c", code], [script, ...], ["-m", module]) and AddressSanitizer's runtime.

    The folders of the tests are on its path. Returns the finished process: an error found is an exit status that is not
    zero and a report on standard error.
    """
    tests = HERE.parent
    paths = [str(tests), str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        # libstdc++ too: the sanitizer looks for the function that throws when it starts.
        "LD_PRELOAD": " ".join(_runtime(name) for name in ("libasan.so", "libstdc++.so")),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, env=environment | env, capture_output=True, text=True, timeout=timeout, check=False)
