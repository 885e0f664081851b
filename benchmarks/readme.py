"""``python -m benchmarks.readme board.json ...``: a short table of boards, into README.md between its markers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from .results import Board, Cell, duration, geometric_mean

README = Path(__file__).parent.parent / "README.md"
MARKERS = ("<!-- board:begin -->", "<!-- board:end -->")

# A cell or two of each operation: what people run, small and large, good and bad.
SHOWN = (
    ("layer_norm", "1x768", "float32"),
    ("layer_norm", "32x768", "float32"),
    ("layer_norm", "4096x768", "float32"),
    ("layer_norm", "65536x1024", "float32"),
    ("layer_norm", "4096x4096", "bfloat16"),
    ("layer_norm_backward", "4096x768", "float32"),
    ("layer_norm_backward", "400000x16", "float32"),
    ("rms_norm", "4096x4096", "float32"),
    ("rms_norm_backward", "4096x4096", "float32"),
    ("layer_norm", "8x96x56x56 axis=1", "float32"),
    ("batch_norm", "32x64x112x112", "float32"),
    ("batch_norm", "32x2048x7x7", "float32"),
    ("batch_norm_eval", "1x256x14x14", "float32"),
    ("batch_norm", "32x56x56x256 channels-last", "float32"),
    ("batch_norm_backward", "32x64x112x112", "float32"),
    ("batch_norm_backward", "32x56x56x256 channels-last", "float32"),
    ("group_norm", "2x320x64x64", "float32"),
    ("group_norm_backward", "32x256x28x28", "float32"),
    ("instance_norm", "4x128x256x256", "float32"),
    ("instance_norm_backward", "32x64x112x112", "float32"),
)
BEST = "best"  # the fastest peer of each cell
# (heading, way of measuring, threads, peer)
RATIOS = (
    ("PyTorch", "recycled", 1, "torch"),
    ("PyTorch as installed", "installed", 1, "torch"),
    ("best peer", "recycled", 1, BEST),
    ("PyTorch, 2 threads", "recycled", 2, "torch"),
    ("best peer, 2 threads", "recycled", 2, BEST),
)


def _key(cell: Cell) -> tuple[str, str, str]:
    shape = "x".join(map(str, cell.case.shape))
    return cell.case.op, f"{shape} {cell.case.layout}".strip(), cell.case.dtype


def _against(cell: Cell, peer: str) -> float | None:
    return cell.ratios.get((cell.best_peer or "") if peer == BEST else peer)


def _ratio(cell: Cell | None, peer: str) -> str:
    value = None if cell is None else _against(cell, peer)
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def block(boards: list[Board]) -> str:
    every = [cell for board in boards for cell in board.cells]
    cells = {(cell.mode, cell.threads, *_key(cell)): cell for cell in every if cell.case.parameter_gradients}
    lines = [
        "| op | shape | dtype | time | GB/s | " + " | ".join(heading for heading, *_ in RATIOS) + " |",
        "|---|---|---|---:|---:|" + "---:|" * len(RATIOS),
    ]
    for key in SHOWN:
        one = cells.get(("recycled", 1, *key))
        if one is not None:
            ratios = [_ratio(cells.get((mode, threads, *key)), peer) for _, mode, threads, peer in RATIOS]
            first = [
                key[0],
                key[1].replace(" channels-last", " (NHWC)"),
                key[2],
                duration(one.seconds),
                f"{one.gbs:.0f}",
            ]
            lines.append("| " + " | ".join(first + ratios) + " |")
    means = []
    for heading, mode, threads, peer in RATIOS:
        group = [c for c in every if (c.mode, c.threads) == (mode, threads)]
        values = [value for c in group if (value := _against(c, peer)) is not None]
        if values:
            below = sum(value < 1 for value in values)
            means.append(f"{heading} {geometric_mean(values):.2f} over {len(values)} cells, {below} of them below 1")
    notes = (
        "Time of one normfast call on one thread; GB/s counts every input read once and every output written once. "
        "The other columns are the time of a peer over that of normfast with as many threads, in the same rounds: "
        "above 1, normfast is faster. PyTorch with recycled memory for its outputs, and as installed; the best peer is "
        f"the fastest of all those below, cell by cell.\nGeometric means over the whole board: {'; '.join(means)}.\n\n"
    )
    sources = [f"{b.machine_line()}. {b.versions_line()}. `{b.content['command']}`" for b in boards]
    return "\n".join(lines) + "\n\n" + notes + "\n".join(sources)


def main(*paths: str) -> None:
    if not paths:
        sys.exit("which boards? python -m benchmarks.readme benchmarks/results/networks-*.json")
    boards = [Board(json.loads(Path(path).read_text())) for path in paths]
    begin, end = MARKERS
    text = README.read_text()
    fresh, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{block(boards)}\n{end}", text, flags=re.DOTALL)
    if count != 1:
        sys.exit(f"{README} must hold {begin} ... {end} once")
    README.write_text(fresh)


if __name__ == "__main__":
    main(*sys.argv[1:])
