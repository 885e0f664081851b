"""What a cell of the board is bound by: one rule for all cells, from the measured figures and the shape."""

from __future__ import annotations

from .results import Board, Cell, bytes_of

CALL = 2e-6  # seconds: below, the call itself is a good part of the time
NEAR = 0.8  # share of the limit, or of what two reads leave of it, from which memory is the bound
FEW = 256  # cells of a statistic below which the work per statistic outweighs that per cell


def cells_of_a_statistic(cell: Cell) -> int:
    """How many cells one mean or variance is taken over."""
    case = cell.case
    if case.per_row:
        return case.channels
    per_channel = case.size // case.channels
    if case.family == "batch_norm":
        return per_channel
    groups = case.groups or case.channels
    return per_channel // case.shape[0] * (case.channels // groups)


def cache_bytes(board: Board, level: str) -> int:
    """Size of a cache of the measured machine."""
    return bytes_of(board.content["machine"]["caches"].get(level, "0"))


def reads_twice(cell: Cell, board: Board) -> bool:
    """Statistics down the columns of a matrix that does not stay in the second-level cache: two reads are the least."""
    case = cell.case
    down = case.family == "batch_norm" and (case.channels_last or len(case.shape) == 2)
    alone = case.op != "batch_norm_eval"
    return down and alone and case.nbytes * (case.streams - 1) > 1.5 * cache_bytes(board, "L2")


def floor_share(cell: Cell, board: Board) -> float:
    """The share of the limit that is left when everything but the output is read twice."""
    streams = cell.case.streams
    return streams / (2 * streams - 1) if reads_twice(cell, board) else 1.0


def bound_by(cell: Cell, board: Board) -> str:
    """What the time of a cell is made of, by the first rule that holds."""
    percent = cell.percent()
    if cell.seconds < CALL:
        return "the call"
    if percent is not None and percent / 100 >= NEAR * floor_share(cell, board):
        return "memory, read twice" if reads_twice(cell, board) else "memory"
    if cell.case.op != "batch_norm_eval" and cells_of_a_statistic(cell) < FEW:
        return "work per statistic"
    if cell.case.dtype in ("float16", "bfloat16"):
        return "conversions"
    if cell.case.streams * cell.case.nbytes <= cache_bytes(board, "L3"):
        return "arithmetic"
    return "reads and writes in turn" + (", read twice" if reads_twice(cell, board) else "")
