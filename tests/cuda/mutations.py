"""Every barrier, guard and mask of the kernels, taken away one at a time: the tests must notice.

`mutations()` reads csrc/cuda/ and finds what there is to take away: no list that could fall behind. All mutations go
into one build (`mutated_sources`): each place becomes `nf_mutant == 17 ? mutated : original`, and `nf_mutant` chooses
one at run time. EQUIVALENT says of those that nothing can notice why that is so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from host.build import ON_THE_DEVICE_ONLY, ROOT

FOLDER = ROOT / "csrc" / "cuda"
DECLARATION = '\nextern "C" {\ninline __attribute__((visibility("default"))) int nf_mutant = 0;\n}\n'


@dataclass(frozen=True)
class Mutation:
    number: int  # from 1
    file: str
    function: str
    text: str
    start: int
    end: int
    becomes: str  # "nothing", "true", "false" or "garbage"
    repeat: int  # of the same text in the same function

    @property
    def id(self):
        again = f" #{self.repeat + 1}" if self.repeat else ""
        return f"{self.stem}/{self.function}: {self.text}{again} -> {self.becomes}"

    @property
    def stem(self):
        return Path(self.file).stem

    @property
    def is_barrier(self):
        return self.becomes == "nothing"

    @property
    def parts(self):
        """What goes before and after the text."""
        if self.becomes == "nothing":
            return f"if (nf_mutant != {self.number}) {{ ", " }"
        if self.becomes == "garbage":
            value = self.text.split(" = ")[-1].rstrip(";")
            places = self.text.split(" = ")[:-1]
            spoil = " ".join(f"std::memset(&{p}, 0xff, sizeof {p});" for p in places)
            assert value.endswith("{}")
            return "", f" if (nf_mutant == {self.number}) {{ {spoil} }}"
        return f"(nf_mutant == {self.number} ? {self.becomes} : bool(", "))"


NAME = r"[\w.]+"
# Pattern, and what its group 1 becomes. Conditions of loops are left alone: without them there is no end.
RULES = [
    (r"(__syncthreads\(\);|(?<!void )cluster_sync\(\);|copy_async_wait<\d>\(\);)", "nothing"),
    (r"\bif \(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\) (?:return;|return Bits16|continue;)", "false"),
    # ragged ends: the smaller one of two
    (rf"({NAME}(?: - {NAME}| \+ {NAME})? < {NAME}) \? (?!all\b)", "true"),
    (rf"({NAME} >= {NAME}) \? 0 :", "false"),
    (r"if \(((?:from <|to >) [\w *]+)\) (?:from|to) =", "false"),
    (r"(?<=const bool near = )([\w *<]+);", "true"),
    (r"(?<=\|\| )(c >= f\.n|k == 0|!inside)(?=\))", "false"),
    # masks of cells and rows
    (r"\b([ij] < (?:k|at\.k|rows))\b(?! \?)", "true"),
    (r"(?<=[(&!?=] )(inside|now|counts)\b(?= [&?])", "true"),
    (r"(?<=[(!])(inside|now|counts)\b(?! =)", "true"),
    (rf"(?<=&& )((?:index|c \+ j|c|o) < {NAME})", "true"),
    (r"(o < to|o0 \+ int64_t\(i\) \* rows < to|c < f\.n)\b(?= \?|;|\)\n)", "true"),
    (r"(?<=[ (])(k > 0)(?=[ ;)])(?! \?)", "true"),
    # vectors moved at once
    (r"\b(k == V|k == vector_cells<T>|at\.k == vector_cells<T>)", "true"),
    (r"(?<=\()((?:f\.v\.)?aligned)(?= &&)", "true"),
    (r"(reinterpret_cast<uintptr_t>\(at\) % 16 == 0)", "true"),
    (r"(?<=[ (])(aligned16\(\w+(?:\.\w+)?\)|[\w.]+ % V == 0)", "true"),
    # missing cells
    (r"((?:\w+\[i\] = )+(?:Bits16|T)\{\};)", "garbage"),
]
# How large a launch is: a choice, not a guard.
CHOICES = ("cut_rows", "cut_sums", "SumCut", "Plan", "grid_of")


def _without_comments(text):
    return re.sub(r"//[^\n]*", lambda m: " " * len(m.group()), text)


def _functions(text):
    """(position, name) of what begins at the start of a line."""
    found = []
    for m in re.finditer(
        r"^(?=\S)(?!#|\}|//|namespace|constexpr|using)[^\n]*(?:\n(?: {8,}|template|__global__)[^\n]*)*", text, re.M
    ):
        head = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)", "", m.group())
        name = re.search(r"struct (\w+)|(\w+|operator\(\))\((?!\()", head)
        if name:
            found.append((m.start(), name.group(1) or name.group(2)))
    return found


def mutations():
    found, number = [], 0
    for path in sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh")]):
        if path.name in (*ON_THE_DEVICE_ONLY, "platform.cuh"):
            continue
        text = _without_comments(path.read_text())
        functions, seen, here = _functions(text), {}, {}
        for pattern, becomes in RULES:
            for m in re.finditer(pattern, text):
                if not re.search(r"\bfor \([^;\n]*; $", text[: m.start(1)]):
                    here.setdefault((m.start(1), m.end(1)), becomes)
        for (start, end), becomes in sorted(here.items()):
            function = [name for at, name in functions if at <= start][-1]
            if function in CHOICES:
                continue
            what = re.sub(r"\s+", " ", text[start:end])
            key = (function, what, becomes)
            number += 1
            repeat = seen[key] = seen.get(key, -1) + 1
            found.append(Mutation(number, path.name, function, what, start, end, becomes, repeat))
    return found


def mutated_sources(folder):
    """Writes the sources with all mutations in them, for `build(substitutes=folder)`."""
    texts = {}
    for m in mutations():
        texts.setdefault(m.file, []).append(m)
    for file, those in texts.items():
        text, inserts = (FOLDER / file).read_text(), []
        for m in those:
            before, after = m.parts
            # Of two places that begin or end together, the larger one goes around.
            inserts.append((m.start, 1, -(m.end - m.start), before))
            inserts.append((m.end, 0, m.end - m.start, after))
        for at, _, _, what in sorted(inserts, reverse=True):
            text = text[:at] + what + text[at:]
        (Path(folder) / file).write_text(text)
    platform = (FOLDER / "platform.cuh").read_text()
    mark = "#pragma once\n"
    assert platform.count(mark) == 1
    (Path(folder) / "platform.cuh").write_text(platform.replace(mark, mark + DECLARATION))


# What is guarded twice, so that either guard can go; the reasons of EQUIVALENT below.
EMPTY = "a vector past the end then has k <= 0 cells, and is neither read, nor added up, nor written"
LONG = "k is then more than a vector's cells, which are moved one by one instead of at once: slower, the same"
MASKED = "cells that do not count are masked wherever they are added up, and not stored"
ZERO = "the cells that do not count are zero bits already, and add exactly 0"
WHOLE = "where a geometry is aligned all its vectors are whole: the other condition says no less"
ALIKE = "all these threads hold the same sums and write the same values to the same place"
UNUSED = "the lanes of a row that is not there only compute: their sums go to no other row, nothing is stored"
NULL = "each is checked for null again where it is written or read: slower, the same"
FIRST = "an index within range is read instead, and what comes of it is not used"

ADDRESS = "it is an address, and nothing is read there"
COUNT = "the count then comes out as 0 anyway: to - o + rows - 1 lies between 0 and rows - 1"
FITS = "a row that is not there counts as one that float32 holds"
FOLLOWS = "columns: all three follow from the length of a run; rows: one run"
NOTHING = "a part without cells has no mean and no squares: it is merged with weight 0"
ORDERED = "the sum over the block, before anything is stored, has a barrier too"
PADDED = "what is written lies in the padding of the table, which ends at a multiple of 256 bytes"
PERIOD = "the parameters of a row that is not there are those of its place in the period: within range"
SPARE = "only grids of more than one row have blocks to spare: beyond 2^28 reductions"

# Id: why nothing can notice.
EQUIVALENT: dict[str, str] = {
    "affine/ForwardStats: a.mean_out == nullptr && a.rstd_out == nullptr -> false": NULL,
    "columns/Merged: n2 == 0 -> false": NOTHING,
    "columns/slice_moments: column >= f.width -> false": EMPTY,
    "columns/slice_moments: f.width - column < V -> true": LONG,
    "columns/slice_moments: k > 0 -> true": EMPTY,
    "columns/slice_moments: bits[i] = Bits16{}; -> garbage": MASKED,
    "columns/slice_moments: o < to -> true": COUNT,
    "columns_backward/slice_rows: dy[i] = x[i] = Bits16{}; -> garbage": MASKED,
    "columns_backward/slice_rows: inside -> true": ZERO,
    "columns_backward/slice_rows: inside #2 -> true": ZERO,
    "columns_backward/slice_sums: column >= f.width -> false": EMPTY,
    "columns_backward/slice_sums: f.width - column < V -> true": LONG,
    "columns_backward/slice_sums: k > 0 -> true": EMPTY,
    "columns_backward/finish_sums: inside #4 -> true": PADDED,
    "columns_backward/total_sums: threadIdx.x % 32 != 0 -> false": ALIKE,
    "maps/map_rows: x[i] = dy[i] = Bits16{}; -> garbage": MASKED,
    "maps/map_rows: k == 0 -> false": EMPTY,
    "maps/map_rows: k > 0 -> true": EMPTY,
    "maps/map_rows: inside -> true": ZERO,
    "maps/map_columns: column >= f.width -> false": EMPTY,
    "maps/map_columns: f.width - column < V -> true": LONG,
    "row_params/careful_row: inside #3 -> true": ADDRESS,
    "row_params/held_rows: c < f.n -> true": EMPTY,
    "row_params/held_rows: f.n - c < V -> true": LONG,
    "row_params/held_rows: c >= f.n -> false": EMPTY,
    "row_params/held_rows: f.n - c < V #2 -> true": LONG,
    "row_params/held_rows: now -> true": ZERO,
    "row_params/held_rows: c + j < f.n -> true": ZERO,
    "row_params/held_rows: counts -> true": ZERO,
    "row_params/held_rows: counts #2 -> true": ZERO,
    "row_params/held_rows: now #2 -> true": ZERO,
    "row_params/held_rows: c >= f.n #2 -> false": EMPTY,
    "row_params/held_rows: f.n - c < V #3 -> true": LONG,
    "row_params/held_rows: group != 0 -> false": ALIKE,
    "row_params/wide_params: c >= f.n -> false": EMPTY,
    "row_params/wide_params: f.n - c < V -> true": LONG,
    "row_params/wide_params: k == 0 -> false": EMPTY,
    "row_params/wide_params: y != 0 -> false": ALIKE,
    "rows/lanes_forward: cells[i] = Bits16{}; -> garbage": MASKED,
    "rows/lanes_forward: inside #2 -> true": UNUSED,
    "rows/lanes_forward: index < f.v.all -> true": EMPTY,
    "rows/lanes_forward: inside #3 -> true": UNUSED,
    "rows/lanes_forward: index < f.v.all #2 -> true": EMPTY,
    "rows/cluster_forward: r >= f.v.g.count -> false": SPARE,
    "rows/cluster_forward: at.k == vector_cells<T> -> true": WHOLE,
    "rows_backward/slope_sums: i < at.k -> true": ZERO,
    "rows_backward/slope_sums: i < at.k #2 -> true": ZERO,
    "rows_backward/reduction_backward: inside -> true": PERIOD,
    "rows_backward/reduction_backward: inside #2 -> true": FIRST,
    "rows_backward/reduction_backward: !inside -> false": UNUSED,
    "rows_backward/reduction_backward: inside #3 -> true": FIRST,
    "rows_backward/lanes_backward: inside -> true": ADDRESS,
    "rows_backward/lanes_backward: dy[i] = x[i] = Bits16{}; -> garbage": MASKED,
    "rows_backward/lanes_backward: inside #2 -> true": UNUSED,
    "rows_backward/lanes_backward: index < f.v.all -> true": EMPTY,
    "rows_backward/lanes_backward: now -> true": UNUSED,
    "rows_backward/lanes_backward: index < f.v.all #2 -> true": EMPTY,
    "rows_backward/lanes_backward: inside #6 -> true": FITS,
    "rows_backward/cluster_backward: r >= f.v.g.count -> false": SPARE,
    "rows_backward/cluster_backward: at.k == vector_cells<T> -> true": WHOLE,
    "rows_backward/cluster_backward: __syncthreads(); #2 -> nothing": ORDERED,
    "rows_backward/total_channels: threadIdx.x % 32 != 0 -> false": ALIKE,
    "runs/RunVectors: g.run % V == 0 -> true": FOLLOWS,
    "runs/RunVectors: g.pitch % V == 0 -> true": FOLLOWS,
    "runs/RunVectors: g.inner_step % V == 0 -> true": FOLLOWS,
    "runs/RunVectors: rest < V -> true": LONG,
    "warp/load_cells: k == vector_cells<T> -> true": WHOLE,
    "warp/load_cells: cells[i] = T{}; -> garbage": MASKED,
    "warp/store_cells: k == vector_cells<T> -> true": WHOLE,
}
