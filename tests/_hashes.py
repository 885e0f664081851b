"""SHA-256 of the results of every norm, dtype and layout: those of this machine, to be held against `digests.json`.

    python tests/_hashes.py            # prints the code path that ran, its threads and one hash per case as JSON
    python tests/_hashes.py --write    # makes them the committed ones, after a change of the order of summation

The data are made of random bits by operations that are rounded correctly everywhere: no library's logarithm goes in.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

import normfast as nf
from _cases import LAYOUTS, batch, group, instance, layer, rms
from _checks import DTYPES, F32, F64, bits

COMMITTED = Path(__file__).with_name("digests.json")

# Beyond the small layouts: every width around the lanes, and enough cells for blocks, flushes and pieces.
CASES = [
    *LAYOUTS,
    *(layer((3, width)) for width in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 255, 257, 768, 1023)),
    *(rms((3, width)) for width in (1, 5, 16, 33, 100, 1025)),
    *(layer((37, width), axis=0) for width in (1, 7, 16, 33, 67)),
    *(batch((7, width)) for width in (1, 7, 16, 33, 67)),
    *(instance((2, 3, plane)) for plane in (1, 4, 9, 49, 196, 3136)),
    *(instance((2, plane, 3), channel_axis=-1) for plane in (4, 49, 196)),
    group((2, 32, 7, 7), 8),
    group((2, 7, 7, 32), 8, channel_axis=-1),
    layer((2, 40_009)),
    layer((40_009, 2), axis=0),
    batch((3, 2, 20_011)),
    batch((20_011, 3)),
]


def numbers(shape, dtype, seed, *, mean, std):
    """Sums of four numbers between 0 and 1, nearly normal; one in a hundred nine times as far from the mean."""
    raw = np.random.PCG64(seed).random_raw(4 * int(np.prod(shape)))
    one, two, three, four = ((raw >> np.uint64(11)) * 2.0**-53).reshape(4, *shape)
    z = (one + two + three + four - 2.0) * np.sqrt(3.0)
    z = np.where(raw[: z.size].reshape(shape) % np.uint64(100) == 0, z * 9, z)
    return (z * std + mean).astype(dtype)


def results(case, dtype):
    dy = case.ordered(numbers(case.shape, dtype, 1, mean=0.05, std=1.0))
    for mean, param_dtype in ((0.7, dtype), (1e3, F32), (30.0, F64)):
        x = case.ordered(numbers(case.shape, dtype, 0, mean=mean, std=1.3))
        weight = numbers(case.param_shape, param_dtype, 2, mean=1.0, std=0.3)
        bias = numbers(case.param_shape, param_dtype, 3, mean=0.1, std=0.3) if case.has_bias else None
        running = None
        if case.op == "batch_norm":
            spread = np.abs(numbers(case.param_shape, F32, 5, mean=1.3, std=0.1))
            running = (numbers(case.param_shape, F32, 4, mean=0.6, std=0.1), spread)
        kw = {"running": running} if running else {}
        y, *stats = case.forward(x, weight, bias, return_stats=True, **kw)
        yield from (y, *stats, *(running or ()))
        yield from case.backward(dy, x, *stats, weight)
        yield from case.backward(dy, x, *stats, needs=case.names)
        yield case.forward(x, eps=0.0)


def digest(arrays):
    sha = hashlib.sha256()
    for a in arrays:
        if a is not None:
            sha.update(f"{a.dtype}{a.shape}".encode())
            sha.update(bits(a))
    return sha.hexdigest()


def kind(code_path):
    """Which of the committed digests a code path owes: all that have fused multiply-add owe the same."""
    return "baseline" if code_path == "baseline" else "fused"


def measured():
    """The code path that ran, and the digest of every case."""
    hashes = {f"{case}-{dtype}": digest(results(case, dtype)) for case in CASES for dtype in DTYPES}
    return nf.show_config("dicts")["code_path"], hashes


def committed(code_path):
    return json.loads(COMMITTED.read_text())[kind(code_path)]


def main():
    code_path, hashes = measured()
    if "--write" in sys.argv[1:]:
        known = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
        COMMITTED.write_text(json.dumps(known | {kind(code_path): hashes}, indent=1, sort_keys=True) + "\n")
    else:
        print(json.dumps({"code_path": code_path, "threads": nf.get_num_threads(), "hashes": hashes}))


if __name__ == "__main__":
    main()
