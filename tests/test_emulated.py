"""Promise 1 on CPUs that are not at hand, under the user emulation of qemu: arm64, and x86-64 without AVX.

Needs qemu (Debian: qemu-user or qemu-user-static) and, for arm64, the cross compiler (g++-aarch64-linux-gnu) and
Debian's apt-get, from whose archive the Python of an arm64 machine is taken. Emulation shows bits and crashes, not
speed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import normfast as nf
from _hashes import committed

pytestmark = [pytest.mark.slow, pytest.mark.proof]

HERE = Path(__file__).parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "arm64"
SYSTEM = BUILD / "system"  # what of an arm64 Debian is needed
SITE = BUILD / "site"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # pip's cmake and ninja first
COMPILER = "aarch64-linux-gnu-g++"
PACKAGES = [
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libpython3.11-dev"),
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5"),
    *("libsqlite3-0", "libuuid1"),
]
# Without those that start interpreters of their own, which the emulator does not follow.
SUITE = [
    "test_forward.py",
    "test_backward.py",
    "test_numerics.py",
    "test_special_values.py",
    "test_batch_invariance.py",
]


def qemu(machine):
    found = shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")
    if found is None:
        pytest.skip(f"needs qemu-{machine}")
    return found


def run(*command, cwd=ROOT, timeout=1800, **env):
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=os.environ | {"PATH": PATH} | {k: str(v) for k, v in env.items()},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, (
        f"{command[0]}: exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def differences(text):
    """Which cases differ from the committed digests, from what `_hashes.py` printed; and the code path that ran."""
    ran = json.loads(text)
    wanted = committed(ran["code_path"])
    assert ran["hashes"].keys() == wanted.keys()
    return ran["code_path"], [name for name, digest in ran["hashes"].items() if digest != wanted[name]]


def test_without_avx():
    """On a CPU of 2008 the baseline is chosen, nothing else is executed, and its bits are those committed."""
    output = run(qemu("x86_64"), "-cpu", "Nehalem", sys.executable, HERE / "_hashes.py")
    assert differences(output) == ("baseline", [])


@pytest.fixture(scope="module")
def system():
    """An arm64 Debian in a folder: Python, NumPy and what the tests need."""
    if shutil.which("apt-get") is None or sys.version_info[:2] != (3, 11):
        pytest.skip("needs Debian 12's apt-get and Python 3.11")
    if not (SYSTEM / "usr/bin/python3.11").exists():
        state = BUILD / "apt"
        for folder in ("lists/partial", "cache/archives/partial", "packages"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        apt = ["apt-get", "-q"]
        options = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Sandbox::User": "",
            "Dir::State::lists": state / "lists",
            "Dir::Cache": state / "cache",
            "Dir::State::status": "/dev/null",
        }
        for name, value in options.items():
            apt += ["-o", f"{name}={value}"]
        run(*apt, "update")
        run(*apt, "download", *PACKAGES, cwd=state / "packages")
        for package in (state / "packages").glob("*.deb"):
            run("dpkg-deb", "-x", package, SYSTEM)
    if not (SITE / "numpy").exists():
        platforms = [f"--platform=manylinux{v}_aarch64" for v in ("_2_28", "_2_17", "2014")]
        wanted = ["numpy", "pytest", "hypothesis", "ml_dtypes"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--python-version=3.11"]
        run(*pip, *platforms, "--target", SITE, *wanted)
    return SYSTEM


@pytest.fixture(scope="module")
def python(system):
    """A script that runs Python as on an arm64 machine, with this clone's normfast built for it."""
    emulator = qemu("aarch64")
    if shutil.which(COMPILER) is None:
        pytest.skip(f"needs {COMPILER}")
    interpreter = BUILD / "python"
    interpreter.write_text(
        f'#!/bin/sh\nexec {emulator} -L {system} -E PYTHONPATH={SITE}:{HERE} {system}/usr/bin/python3.11 "$@"\n'
    )
    interpreter.chmod(0o755)
    pybind11 = run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    run(
        *("cmake", "-S", ROOT, "-B", BUILD / "cmake", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"),
        *("-DNORMFAST_CUDA=OFF", f"-Dpybind11_DIR={pybind11}", f"-DCMAKE_CXX_FLAGS=-idirafter {system}/usr/include"),
        "-DCMAKE_CROSSCOMPILING_EMULATOR=/usr/bin/env",  # the interpreter brings its own
        f"-DPython_EXECUTABLE={interpreter}",
        f"-DPython_INCLUDE_DIR={system}/usr/include/python3.11",
        f"-DPython_NumPy_INCLUDE_DIR={SITE}/numpy/_core/include",
    )
    run("cmake", "--build", BUILD / "cmake")
    package = SITE / "normfast"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "normfast", package)
    (built,) = (BUILD / "cmake").glob("_core*.so")
    shutil.copy(built, package / "_core.cpython-311-aarch64-linux-gnu.so")
    information = SITE / f"normfast-{nf.__version__}.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: normfast\nVersion: {nf.__version__}\n")
    return interpreter


def test_arm64_has_the_same_bits(python):
    assert differences(run(python, HERE / "_hashes.py")) == ("arm64", [])


def test_arm64_suite(python):
    tests = [HERE / name for name in SUITE]
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    output = run(python, "-m", "pytest", *options, *tests, timeout=7200)
    assert " passed" in output
    assert "skipped" not in output
    print(output.strip().splitlines()[-1])
