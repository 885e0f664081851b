"""The public surface: names, signatures, documentation, types and controls."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import importlib.util
import inspect
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import normfast as nf
from normfast import _core, reference

PACKAGE = Path(nf.__file__).parent
SOURCE = Path(__file__).parents[1] / "python" / "normfast"

# The contract, word for word.
CONTRACT = """
layer_norm(x, weight=None, bias=None, *, axis=-1, eps=1e-5, out=None, return_stats=False)
rms_norm(x, weight=None, *, axis=-1, eps=1e-6, out=None, return_stats=False)
group_norm(x, num_groups, weight=None, bias=None, *, channel_axis=1, eps=1e-5, out=None, return_stats=False)
instance_norm(x, weight=None, bias=None, *, channel_axis=1, eps=1e-5, out=None, return_stats=False)
batch_norm(x, running_mean=None, running_var=None, weight=None, bias=None, *, training=False, momentum=0.1, decay=None, running_ddof=1, eps=1e-5, channel_axis=1, out=None, return_stats=False)
layer_norm_backward(dy, x, mean, rstd, weight=None, *, axis=-1, needs=None, out=None)
rms_norm_backward(dy, x, rstd, weight=None, *, axis=-1, needs=None, out=None)
group_norm_backward(dy, x, mean, rstd, weight=None, *, channel_axis=1, needs=None, out=None)
instance_norm_backward(dy, x, mean, rstd, weight=None, *, channel_axis=1, needs=None, out=None)
batch_norm_backward(dy, x, mean, rstd, weight=None, *, training=True, channel_axis=1, needs=None, out=None)
"""  # noqa: E501
OPS = {line.partition("(")[0]: line.partition("(")[2].rstrip(")") for line in CONTRACT.split("\n") if line}
CONTROLS = {
    "set_num_threads": "n",
    "get_num_threads": "",
    "threads": "n",
    "set_pool_limit": "nbytes",
    "release_pool": "",
    "show_config": "mode='stdout'",
}
FUNCTIONS = OPS | CONTROLS


def parameters(function):
    """Name, kind and default of every parameter."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def parsed(arguments):
    """What `parameters` gives for a function with these arguments."""
    return parameters(eval(f"lambda {arguments}: None"))


def stub(name):
    """The functions of a stub file and the text of their arguments without types."""
    functions = {}
    for node in ast.parse((PACKAGE / name).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            for argument in node.args.posonlyargs + node.args.args + node.args.kwonlyargs:
                argument.annotation = None
            functions[node.name] = ast.unparse(node.args)
    return functions


# ---- Names and signatures --------------------------------------------------------------------------------------------


def test_all():
    assert sorted(nf.__all__) == sorted([*FUNCTIONS, "cuda", "reference", "selftest", "__version__"])
    assert sorted(dir(nf)) == sorted(nf.__all__)
    assert sorted(reference.__all__) == sorted(OPS)
    for name in FUNCTIONS:
        assert callable(getattr(nf, name)), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name):
    assert parameters(getattr(nf, name)) == parsed(FUNCTIONS[name])
    if name in OPS:
        assert parameters(getattr(reference, name)) == parsed(OPS[name])
        assert parsed(stub("reference.pyi")[name]) == parsed(OPS[name])


def test_stub_of_the_compiled_module():
    stubs = stub("_core.pyi")
    assert sorted(stubs) == sorted(name for name in dir(_core) if not name.startswith("_"))
    for name, arguments in OPS.items():
        names = [p[0] for p in parsed(arguments)]
        assert parsed(stubs[name]) == [(n, inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.empty) for n in names]


def test_stub_of_the_cuda_module():
    """Its norms are called as those of the host; it is not in every build."""
    stubs = stub("_cuda.pyi")
    assert {name: stubs[name] for name in OPS} == {name: stub("_core.pyi")[name] for name in OPS}
    if nf.show_config("dicts")["cuda"]["built"]:
        module = importlib.import_module("normfast._cuda")
        assert sorted([*stubs, "DeviceArray"]) == sorted(name for name in dir(module) if not name.startswith("_"))


def test_cuda_without_a_backend():
    """nf.cuda is there in every build; what it cannot do says why."""
    if nf.show_config("dicts")["cuda"]["available"]:
        pytest.skip("there is a device")
    for name, call in {"to_device": lambda: nf.cuda.to_device(np.ones(3)), "synchronize": nf.cuda.synchronize}.items():
        with pytest.raises(RuntimeError, match=rf"^{name}: .*CUDA"):
            call()
    assert isinstance(nf.cuda.DeviceArray, type)
    with pytest.raises((RuntimeError, TypeError)):
        nf.cuda.DeviceArray()


@pytest.mark.parametrize("name", OPS)
def test_every_argument_reaches_the_compiled_function(name, monkeypatch):
    """In the order of the signature, by position and untouched."""
    monkeypatch.setattr(_core, name, lambda *args: args)
    names = [p[0] for p in parsed(OPS[name])]
    given = {n: object() for n in names}
    assert getattr(nf, name)(**given) == tuple(given.values())
    defaults = [p[2] for p in parsed(OPS[name])]
    required = [object() for d in defaults if d is inspect.Parameter.empty]
    assert getattr(nf, name)(*required) == (*required, *defaults[len(required) :])


def test_functions_are_not_hidden_by_modules_of_their_name():
    for name in ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm"):
        module = importlib.import_module(f"normfast.{name}")
        assert inspect.isfunction(getattr(nf, name))
        assert inspect.ismodule(sys.modules[f"normfast.{name}"])
        for function in (getattr(nf, name), getattr(nf, f"{name}_backward")):
            assert pickle.loads(pickle.dumps(function)) is function
        assert module is not None


def test_version():
    assert nf.__version__ == importlib.metadata.version("normfast")


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'normfast' has no attribute 'layernorm'"):
        nf.layernorm  # noqa: B018


def test_import_brings_nothing_but_numpy_and_what_it_has_loaded():
    """A light import; the reference and the metadata of packages come on first use."""
    code = """
import sys
import numpy
before = set(sys.modules)
import normfast
new = {n for n in set(sys.modules) - before if n.partition(".")[0] not in ("normfast", "numpy", "__future__")}
assert not new, new
for name in ("reference", "cuda", "_cuda"):
    assert f"normfast.{name}" not in sys.modules
assert normfast.reference.layer_norm is not normfast.layer_norm
assert normfast.reference is sys.modules["normfast.reference"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- Documentation ---------------------------------------------------------------------------------------------------

MODULES = [
    "normfast",
    *(f"normfast.{m.name}" for m in pkgutil.iter_modules([str(SOURCE)]) if m.name not in ("_core", "_cuda")),
]


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    importlib.import_module(module)
    result = doctest.testmod(sys.modules[module])
    assert result.failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings(name):
    """Every function is summed up in a line, names all its arguments and errors, and has an example."""
    doc = inspect.getdoc(getattr(nf, name))
    summary, _, rest = doc.partition("\n")
    assert summary.endswith(".")
    assert rest.startswith("\n")
    arguments = [p[0] for p in parsed(FUNCTIONS[name])]
    sections = ["Examples"] + (["Parameters", "Raises"] if arguments else [])
    sections += ["Returns", "See Also", "Notes"] if name in OPS else []
    for section in sections:
        assert f"\n{section}\n{'-' * len(section)}\n" in doc, section
    assert doctest.DocTestParser().get_examples(doc)
    entries = [line.partition(" : ")[0] for line in doc.split("\n") if " : " in line and not line.startswith(" ")]
    assert set(arguments) <= {entry.strip() for line in entries for entry in line.split(",")}


# ---- Types -----------------------------------------------------------------------------------------------------------


def mypy(*arguments, tmp_path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=SOURCE.parent, env={"MYPYPATH": str(SOURCE.parent)}
    )


@pytest.mark.slow
def test_the_package_is_typed(tmp_path):
    assert (PACKAGE / "py.typed").exists()
    done = mypy("-p", "normfast", tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


CALLER = """
from typing import Any, assert_type
import numpy as np
import numpy.typing as npt
import normfast as nf

A = npt.NDArray[Any]
x = np.ones((4, 6), np.float32)
flag = bool(x.size)
assert_type(nf.layer_norm(x), A)
assert_type(nf.layer_norm([[1, 2, 3]], axis=(0, 1), out=x, return_stats=False), A)
assert_type(nf.layer_norm(x, return_stats=True), tuple[A, A, A])
assert_type(nf.layer_norm(x, return_stats=flag), A | tuple[A, A, A])
assert_type(nf.rms_norm(x, x[0]), A)
assert_type(nf.rms_norm(x, return_stats=True), tuple[A, A])
assert_type(nf.group_norm(x, 2), A)
assert_type(nf.group_norm(x, 2, return_stats=True), tuple[A, A, A])
assert_type(nf.instance_norm(x), A)
assert_type(nf.instance_norm(x, return_stats=True), tuple[A, A, A])
assert_type(nf.batch_norm(x, x[0], x[0]), A)
assert_type(nf.batch_norm(x, training=True, decay=0.9, return_stats=True), tuple[A, A, A])
y, mean, rstd = nf.layer_norm(x, return_stats=True)
dx, dweight, dbias = nf.layer_norm_backward(y, x, mean, rstd, needs=("x", "weight"))
x -= 0.1 * dx
assert_type(nf.show_config("dicts"), dict[str, Any])
assert_type(nf.get_num_threads(), int)
assert_type(nf.__version__, str)
with nf.threads(2):
    nf.reference.layer_norm(x, eps=0)
"""
# Each is an error, of the kind in the second column.
WRONG = [
    ("nf.layer_norm_backward(y, x, mean, rstd, needs='x')", "arg-type"),
    ("nf.layer_norm_backward(y, x, mean, rstd, needs=('y',))", "arg-type"),
    ("nf.layer_norm(x, axis=1.0)", "call-overload"),
    ("nf.layer_norm(x, None, None, -1)", "call-overload"),
    ("nf.group_norm(x)", "call-overload"),
    ("nf.show_config('json')", "call-overload"),
    ("nf.layernorm(x)", "attr-defined"),
]


@pytest.mark.slow
def test_types_that_a_caller_sees(tmp_path):
    if sys.version_info < (3, 11):
        pytest.skip("typing.assert_type is new in Python 3.11")
    caller = tmp_path / "caller.py"
    caller.write_text(CALLER + "\n".join(f"{line}  # type: ignore[{kind}]" for line, kind in WRONG) + "\n")
    # Strict mode reports ignores that ignore nothing, so every line of WRONG must be an error.
    done = mypy(str(caller), tmp_path=tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr


# ---- Controls --------------------------------------------------------------------------------------------------------


def test_threads_restores():
    before = nf.get_num_threads()
    with nf.threads(before + 1) as nothing:
        assert nothing is None
        assert nf.get_num_threads() == before + 1
        with nf.threads(before + 2):
            nf.set_num_threads(before + 3)
        assert nf.get_num_threads() == before + 1
    assert nf.get_num_threads() == before


def test_threads_restores_after_an_exception():
    before = nf.get_num_threads()
    with pytest.raises(KeyError, match="out of here"), nf.threads(before + 1):
        raise KeyError("out of here")
    assert nf.get_num_threads() == before


def test_threads_can_be_used_again_and_within_itself():
    before = nf.get_num_threads()
    context = nf.threads(before + 1)
    for _ in range(2):
        with context, context:
            assert nf.get_num_threads() == before + 1
        assert nf.get_num_threads() == before


@pytest.mark.parametrize(
    ("n", "error"), [(0, ValueError), (-1, ValueError), ("2", TypeError), (1.0, TypeError), (None, TypeError)]
)
def test_threads_refuses_at_once(n, error):
    before = nf.get_num_threads()
    with pytest.raises(error, match=r"^threads: n must .*got"):
        nf.threads(n)
    with pytest.raises(error, match=r"^set_num_threads: n must .*got"):
        nf.set_num_threads(n)
    assert nf.get_num_threads() == before


def test_pool_limit():
    before = nf.show_config("dicts")["pool"]["limit"]
    try:
        nf.set_pool_limit(12345678)
        assert nf.show_config("dicts")["pool"]["limit"] == 12345678
        with pytest.raises(ValueError, match=r"^set_pool_limit: nbytes must .*got"):
            nf.set_pool_limit(-1)
        with pytest.raises(TypeError, match=r"^set_pool_limit: nbytes must .*got"):
            nf.set_pool_limit(1.5)
        assert nf.show_config("dicts")["pool"]["limit"] == 12345678
    finally:
        nf.set_pool_limit(before)
    nf.release_pool()
    assert nf.show_config("dicts")["pool"]["held"] == 0


KEYS = ["version", "code_path", "code_paths", "threads", "pool", "cuda", "compiler", "numpy"]


def test_show_config_dicts():
    config = nf.show_config(mode="dicts")
    assert list(config) == KEYS
    assert config["version"] == nf.__version__
    assert config["numpy"] == np.__version__
    assert config["code_path"] in config["code_paths"]
    assert set(config["code_paths"]) <= {"baseline", "x86-64-v3", "x86-64-v4", "arm64"}
    assert sorted(config["pool"]) == ["held", "limit"]
    assert config["compiler"]
    with nf.threads(config["threads"] + 1):
        assert nf.show_config("dicts")["threads"] == config["threads"] + 1


def test_show_config_cuda():
    cuda = nf.show_config("dicts")["cuda"]
    if not cuda["built"]:
        assert cuda == {"built": False, "available": False, "reason": cuda["reason"]}
        assert "NORMFAST_CUDA" in cuda["reason"]
        return
    assert list(cuda) == ["built", "available", "toolkit", "architectures", "devices", "reason"]
    assert cuda["architectures"]
    assert cuda["available"] == bool(cuda["devices"]) == (cuda["reason"] is None)
    for device in cuda["devices"]:
        assert sorted(device) == ["compute_capability", "name"]
    assert cuda["available"] or cuda["reason"].startswith("cudaError")


def test_show_config_prints(capsys):
    assert nf.show_config() is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == KEYS
    assert lines[0].split() == ["version:", nf.__version__]
    assert all(line.partition(":")[2].strip() for line in lines)


@pytest.mark.parametrize(
    ("mode", "error"), [("json", ValueError), ("", ValueError), (None, TypeError), (["dicts"], TypeError)]
)
def test_show_config_refuses(mode, error):
    with pytest.raises(error, match=r"^show_config: mode must be 'stdout' or 'dicts', got"):
        nf.show_config(mode)
