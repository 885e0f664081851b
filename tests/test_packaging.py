"""From the source to a user: the source distribution builds alone, and its wheel works where there is no compiler.

Catches a file that the source distribution lacks, one that a wheel lacks or should not hold, and a dependency that is
installed on every developer's machine and declared nowhere. Needs what `make` installs to build, and pip to find NumPy.
"""

import email.parser
import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
CPU_ONLY = "--config-settings=cmake.define.NORMFAST_CUDA=OFF"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.proof,
    pytest.mark.skipif(importlib.util.find_spec("scikit_build_core") is None, reason="needs scikit-build-core"),
]


def run(*command, **kw):
    """Standard output of a command that must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **kw)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", "import sys, scikit_build_core.build as b; b.build_sdist(sys.argv[1])", folder, cwd=ROOT)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the source distribution alone, in a folder that holds nothing else."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (package,) = source.iterdir()
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", CPU_ONLY, "-w", built, package)
    (path,) = built.iterdir()
    return path


@pytest.fixture(scope="module")
def interpreter(wheel, tmp_path_factory):
    """Of an environment that holds the wheel and what the wheel itself asks for."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(python, "-m", "pip", "install", "--only-binary", ":all:", wheel)
    return python


def test_source_distribution(sdist):
    """All of the package and of its tests, and nothing that is heavy or that a build leaves behind."""
    with tarfile.open(sdist) as archive:
        sizes = {PurePosixPath(*PurePosixPath(m.name).parts[1:]): m.size for m in archive.getmembers() if m.isfile()}
    for folder in ("csrc", "python", "tests"):
        here = {PurePosixPath(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.is_file()}
        kept = {p for p in here if "__pycache__" not in p.parts and p.suffix not in (".pyc", ".pyd", ".so")}
        assert kept == {p for p in sizes if p.parts[0] == folder}
    assert {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"} <= {p.name for p in sizes if len(p.parts) == 1}
    assert not [
        p for p in sizes if p.parts[0] in ("build", "dist", ".venv") or p.parts[:2] == ("benchmarks", "results")
    ]
    assert sum(sizes.values()) < 4 << 20


def test_wheel(wheel):
    """The package with its types and its licence; no sources, no tests; NumPy is all that it needs."""
    with zipfile.ZipFile(wheel) as archive:
        names = [PurePosixPath(n) for n in archive.namelist() if not n.endswith("/")]
        (metadata,) = (n for n in names if n.name == "METADATA")
        headers = email.parser.HeaderParser().parsestr(archive.read(str(metadata)).decode())
    package = {n.name for n in names if n.parts[0] == "normfast"}
    modules = {n for n in package if n.startswith("_core.") and not n.endswith(".pyi")}
    assert len(modules) == 1
    assert package - modules == {
        p.name for p in (ROOT / "python/normfast").iterdir() if p.suffix in (".py", ".pyi", ".typed")
    }
    assert {n.parts[0] for n in names} == {"normfast", metadata.parts[0]}
    assert "LICENSE" in {n.name for n in names}
    assert [r for r in headers.get_all("Requires-Dist") if "extra ==" not in r] == ["numpy>=2.0"]
    assert not wheel.name.endswith("-any.whl")


def test_works_without_a_compiler(interpreter, tmp_path):
    """In the empty environment: that very package is imported, and keeps its promises."""
    quiet = {"cwd": tmp_path, "env": {"PATH": "/nonexistent", "SYSTEMROOT": os.environ.get("SYSTEMROOT", "")}}
    where = run(interpreter, "-c", "import normfast; print(normfast.__file__, normfast.__version__)", **quiet)
    assert where.startswith(str(interpreter.parents[1]))
    said = run(interpreter, "-m", "normfast.selftest", **quiet)
    assert "Every promise held" in said
