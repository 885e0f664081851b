"""SHA-256 of the results of every norm and dtype, for comparison between code paths.

    python tests/_hashes.py

prints the code path that ran and one hash per case as JSON. Nothing random goes in: the data come from PCG64 with fixed
seeds, as everywhere in the tests.
"""

from __future__ import annotations

import hashlib
import json

import normfast as nf
from _cases import LAYOUTS, batch, group, instance, layer, rms
from _checks import DTYPES, F32, F64, bits

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


def results(case, dtype):
    for mean, param_dtype in ((0.7, dtype), (1e3, F32), (30.0, F64)):
        x, dy = case.x(dtype, mean=mean), case.dy(dtype)
        weight, bias = case.weight(param_dtype), case.bias(param_dtype)
        running = case.running(F32)
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


def main():
    hashes = {f"{case}-{dtype}": digest(results(case, dtype)) for case in CASES for dtype in DTYPES}
    print(json.dumps({"code_path": nf.show_config("dicts")["code_path"], "hashes": hashes}))


if __name__ == "__main__":
    main()
