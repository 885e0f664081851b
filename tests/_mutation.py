"""A mutation run over the library for the CPU: kernels, bindings, threads and memory, one small change at a time.

    python tests/_mutation.py --sample 200 --seed 1 --out mutants.json

reads csrc/ and finds what can be changed (RULES); takes a sample; builds one library that holds all of it, each place
as `nf_mutant == 17 ? changed : original`; then runs the fast tests once for each mutant, in a process of its own, until
the first failure. What no test notices is listed: it is equivalent, or a test is missing.

The kernels on a GPU have their own list, whole instead of sampled: tests/cuda/mutations.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
FILES = [
    path.relative_to(ROOT)
    for folder in ("csrc", "csrc/cpu", "csrc/bindings")
    for path in sorted((ROOT / folder).glob("*.*"))
    if not path.name.startswith("cuda") and path.name not in ("dlpack.h", "module.cpp", "system_windows.cpp")
]
# First what compares numbers, then what compares bits. What builds or draws something is not here, nor what compares
# code paths: there is one only.
TESTS = [
    *["bounds", "forward", "layouts", "errors", "out", "columns", "backward", "parameter_gradients", "batch_norm"],
    *["special_values", "memory", "threads", "batch_invariance", "streaming", "layer_norm", "group_norm"],
    *["instance_norm", "rms_norm", "controls", "faults", "guards", "fork", "large", "published_crashes", "fuzz"],
    *["properties", "selftest", "process"],
]

HEADER = """#pragma once
#include <cstdlib>
extern "C" {
inline __attribute__((visibility("default"))) int nf_mutant =
    std::getenv("NORMFAST_MUTANT") ? std::atoi(std::getenv("NORMFAST_MUTANT")) : 0;
}
"""

NAME = r"[A-Za-z_]\w*(?:(?:\.|->)[A-Za-z_]\w*)*(?:\[\w+\])?"
TERM = rf"(?:{NAME}|\d+)"
SIDE = rf"{TERM}(?: [-+*/%] {TERM})*"
# What may stand before and behind an expression that is put in parentheses.
BEFORE = r"(?:(?<=[(!])|(?<=&& )|(?<=\|\| )|(?<=return )|(?<= = )|(?<=; )|(?<=\? )|(?<= : )|(?<=, ))"
BEHIND = r"(?=\)|;|,| &&| \|\|| \?| :|\])"
CONDITION = r"(?:[^();=]|[=!<>]=|\((?:[^();=]|[=!<>]=|\((?:[^();=]|[=!<>]=|\([^();=]*\))*\))*\))+"
SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "+": "-", "-": "+", "*": "+", "/": "*", "%": "*",
}  # fmt: skip
RULES = {
    "comparison": rf"{BEFORE}({SIDE}) (<|<=|>|>=|==|!=) ({SIDE}){BEHIND}",
    "arithmetic": rf"{BEFORE}({TERM}) ([-+*/%]) ({TERM}){BEHIND}",
    "true": rf"\bif \(({CONDITION})\)",
    "false": rf"\bif \(({CONDITION})\)",
    "either": rf"{BEFORE}(!?{NAME}(?:\([\w., ]*\))?) (&&|\|\|) (!?{NAME}(?:\([\w., ]*\))?){BEHIND}",
    "statement": rf"(?<=\n)(?: +)({NAME}\([^;{{}}\n]*\));\n",
}


@dataclass(frozen=True)
class Mutation:
    file: str
    line: int
    start: int
    end: int
    rule: str
    original: str
    becomes: str

    def text(self, number):
        if self.rule == "statement":
            return f"{{ if (nf_mutant != {number}) {{ {self.original}; }} }}"
        if self.rule in ("true", "false"):
            return f"(nf_mutant == {number} ? {self.rule} : bool({self.original}))"
        return f"(nf_mutant == {number} ? ({self.becomes}) : ({self.original}))"

    def __str__(self):
        return f"{self.file}:{self.line}: {self.original} -> {self.becomes}"


def without_comments(text):
    """The same text and the same places, with blanks for comments, strings and lines of the preprocessor."""
    blank = re.compile(r"//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|^#(?:[^\n]*\\\n)*[^\n]*", re.M)
    return blank.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def mutations_of(file, text):
    """Every change of every rule; places of several overlap."""
    code = without_comments(text)
    for rule, pattern in RULES.items():
        for m in re.finditer(pattern, code):
            line = code.count("\n", 0, m.start()) + 1
            around = code[code.rfind("\n", 0, m.start()) + 1 : code.find("\n", m.end() - 1)]
            if re.search(r"\bconstexpr\b|static_assert|\btemplate\b|^ *case |\bdelete\b", around):
                continue
            if rule in ("comparison", "arithmetic", "either"):
                operator = {"&&": "||", "||": "&&"}.get(m[2]) or SWAPS[m[2]]
                yield Mutation(str(file), line, m.start(1), m.end(3), rule, text[m.start(1) : m.end(3)],
                               f"{m[1]} {operator} {m[3]}")  # fmt: skip
            else:
                end = m.end(1) + 1 if rule == "statement" else m.end(1)
                becomes = rule if rule in ("true", "false") else "nothing"
                yield Mutation(str(file), line, m.start(1), end, rule, text[m.start(1) : m.end(1)], becomes)


def sample_of(count, seed):
    """Mutations whose places do not overlap, drawn from all of them."""
    found = [m for file in FILES for m in mutations_of(file, (ROOT / file).read_text())]
    random.Random(seed).shuffle(found)
    taken = []
    for m in found:
        if len(taken) == count:
            break
        if all(m.file != o.file or m.end <= o.start or o.end <= m.start for o in taken):
            taken.append(m)
    return taken, len(found)


def write(folder, numbered):
    for file in FILES:
        text = (ROOT / file).read_text()
        here = [(number, m) for number, m in numbered.items() if m.file == str(file)]
        for number, m in sorted(here, key=lambda pair: -pair[1].start):
            text = text[: m.start] + m.text(number) + text[m.end :]
        path = folder / file
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def build(folder, mutations, code_path):
    """The library with those mutations that compile: what cannot be a constant expression, say, is dropped."""
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"
    for name in ("csrc", "python"):
        shutil.copytree(ROOT / name, source / name)
    shutil.copy(ROOT / "CMakeLists.txt", source)
    (folder / "mutant.h").write_text(HEADER)
    dirs = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True)
    configure = ["cmake", "-S", source, "-B", folder / "build", "-G", "Ninja", "-DNORMFAST_CUDA=OFF",
                 f"-DNORMFAST_CODE_PATHS={code_path}", f"-DPython_EXECUTABLE={sys.executable}",
                 f"-Dpybind11_DIR={dirs.stdout.strip()}", f"-DCMAKE_CXX_FLAGS=-include {folder / 'mutant.h'}",
                 "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]  # fmt: skip
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    numbered = dict(enumerate(mutations, start=1))
    for _ in range(12):
        write(source, numbered)
        command = ["cmake", "--build", folder / "build", "--", "-k", "0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
        said = re.findall(rf"^{re.escape(str(source))}/(\S+?):(\d+):(?:\d+:)? +error", done.stdout, re.M)
        # A mutation does not move lines.
        refused = {n for n, m in numbered.items() if (m.file, str(m.line)) in said}
        refused |= {n for n, m in numbered.items() for file, at in said if m.file == file and spans(m, int(at))}
        if not refused:
            raise RuntimeError(f"does not compile, and no mutation is to blame:\n{done.stdout[-4000:]}")
        for n in refused:
            del numbered[n]
    else:
        raise RuntimeError("does not compile")
    compiled = numbers_in(folder / "build")
    numbered = {n: m for n, m in numbered.items() if n in compiled}
    package = folder / "site" / "normfast"
    package.mkdir(parents=True)
    for path in [*(folder / "build").glob("_core*.so"), *(ROOT / "python" / "normfast").glob("*.py")]:
        shutil.copy(path, package)
    return numbered


def numbers_in(folder):
    """The mutations that are in what is compiled: much of vec.h is for other instruction sets."""
    numbers = set()
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        command = re.sub(r" -o \S+ -c ", " -E ", entry["command"])
        done = subprocess.run(command, shell=True, cwd=entry["directory"], capture_output=True, text=True, check=True)
        numbers |= {int(n) for n in re.findall(r"nf_mutant [!=]= (\d+)", done.stdout)}
    return numbers


def spans(mutation, line):
    return mutation.line <= line <= mutation.line + mutation.original.count("\n")


def try_one(folder, number, code_path, seconds):
    """Of one mutant: what noticed it, or None."""
    environment = os.environ | {
        "NORMFAST_MUTANT": str(number),
        "NORMFAST_ISA": code_path,
        "NORMFAST_CODE_PATHS": code_path,
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
    }
    files = [str(HERE / f"test_{name}.py") for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-m", "not slow", "-p", "no:cacheprovider",
               "--tb=no", *files]  # fmt: skip
    try:
        done = subprocess.run(["prlimit", f"--as={12 << 30}", *command], env=environment, cwd=ROOT, capture_output=True,
                              text=True, timeout=seconds, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return None
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.M)
    return failed[0] if failed else f"ends with status {done.returncode}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--code-path", default="x86-64-v3")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=600, help="for the tests of one mutant")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    chosen, of = sample_of(given.sample, given.seed)
    numbered = build(given.folder.resolve(), chosen, given.code_path)
    print(f"{len(numbered)} of {of} mutations; {len(chosen) - len(numbered)} more are not compiled here", flush=True)
    start = time.monotonic()
    if (noticed := try_one(given.folder.resolve(), 0, given.code_path, given.seconds)) is not None:
        sys.exit(f"fails without a mutation: {noticed}")
    print(f"the tests pass without a mutation in {time.monotonic() - start:.0f} s", flush=True)
    results = []
    with ThreadPoolExecutor(given.workers) as executor:
        tasks = {
            n: executor.submit(try_one, given.folder.resolve(), n, given.code_path, given.seconds) for n in numbered
        }
        for n, task in tasks.items():
            noticed = task.result()
            results.append(asdict(numbered[n]) | {"noticed": noticed})
            print(f"{'SURVIVED' if noticed is None else 'noticed'} {numbered[n]} {noticed or ''}", flush=True)
            if given.out:
                given.out.write_text(json.dumps(results, indent=1) + "\n")
    killed = sum(r["noticed"] is not None for r in results)
    print(f"{killed} of {len(results)} noticed ({killed / len(results):.1%})")
    for rule, count in sorted(Counter(r["rule"] for r in results).items()):
        print(f"  {rule}: {sum(r['rule'] == rule and r['noticed'] is not None for r in results)} of {count}")


if __name__ == "__main__":
    main()
