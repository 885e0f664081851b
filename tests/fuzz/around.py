"""Hundreds of quick calls around one that was drawn, which change an argument or two at a time.

To draw a call and to judge it in full takes most of a millisecond. What is seen of these at once: the type of an error
and how it begins; the kind, dtype and shape of results; and after all of them whether a byte beside the arrays was
written, a read-only array changed, a reference kept. Arguments come from the call itself (so arrays overlap, and are
given twice), from other drawn calls (so they do not fit), and from lists of good and bad ones. What succeeds is where
the next change begins: so the ways lead far from what is drawn. The same bytes are the same calls.
"""

from __future__ import annotations

import sys
from inspect import signature
from random import Random

import numpy as np

import normfast as nf
from _checks import F64

from .calls import CONTROLS, MARGIN, NOT_ARRAYS, OPS, SCALARS, described, drawn
from .judge import Find, require

DONORS = 3
PARAMETERS = {name: tuple(signature(getattr(nf, name)).parameters) for op in OPS for name in (op, op + "_backward")}
ARRAYS = ("x", "dy", "mean", "rstd", "weight", "bias", "running_mean", "running_var")
GOOD = {
    "eps": (1e-5, 0.0, 1e30),
    "momentum": (0.1, 1, 0),
    "decay": (None, 0.9),
    "running_ddof": (0, 1),
    "training": (False, True),
    "return_stats": (False, True),
    "needs": (None, ("x",), ("weight",), ("weight", "x"), ()),
    "num_groups": (1, 2, 3, 4),
    "channel_axis": (1, 0, -1, 2, -2),
    "axis": (-1, 0, 1, (0, 1), (-1, 0), ()),
}


def choices_for(name, own, donors):
    if name in GOOD:
        return (*GOOD[name], *GOOD[name], *SCALARS[name])
    others = [donor.arguments[name] for donor in donors if name in donor.arguments]
    return (*own, *others, None, NOT_ARRAYS[len(own) % len(NOT_ARRAYS)])


def foreign(arguments):
    """NumPy itself may refuse what stands for an array, in its own words."""
    values = [arguments[name] for name in ARRAYS if arguments.get(name) is not None]
    return any(not isinstance(v, np.ndarray) or v.dtype.kind not in "biufcV" or v.dtype.names for v in values)


def check_result(function, arguments, result):
    backward = function.endswith("_backward")
    many = backward or bool(arguments.get("return_stats"))
    require(isinstance(result, tuple) == many, "returns", type(result).__name__)
    first, x = result[0] if many else result, arguments["x"]
    if first is None:
        require("x" not in arguments["needs"], "returns None")
    elif arguments.get("out") is not None:
        require(first is arguments["out"], "does not return `out` itself")
    elif isinstance(x, np.ndarray):
        require(first.shape == x.shape, "returns", described(first), "for", described(x))
        right = F64 if x.dtype.kind in "biu" else x.dtype
        require(first.dtype == (right if right.isnative else right.newbyteorder("=")), "returns", described(first))


def check_error(function, arguments, error):
    kind, text = type(error), str(error)
    require(isinstance(error, (ValueError, TypeError)), f"raises {kind.__name__}: {text}")
    begins = text.startswith((f"{function}: ", f"{function}() "))
    require(begins or foreign(arguments), "does not begin with its name:", text)


def try_around(data, length, count):
    """Makes `count` calls, with arguments of others of `length` bytes; how many, how many succeeded. Raises Find."""
    random = Random(data)
    below = lambda n: int(random.random() * n)  # noqa: E731
    call = drawn(data)
    if call.function in CONTROLS:
        return 0, 0
    calls = [call, *(drawn(random.randbytes(length)) for _ in range(DONORS))]
    arrays = [a for c in calls for a in c.arguments.values() if isinstance(a, np.ndarray)]
    frozen = [(a, a.tobytes()) for a in arrays if not a.flags.writeable and a.dtype.kind in "fV"]
    references = [sys.getrefcount(a) for a in arrays]
    accepted = walk(call, calls[1:], below, count)
    require([sys.getrefcount(a) for a in arrays] == references, "keeps or loses a reference to an argument")
    for block in (block for c in calls for block in c.memory):
        clean = (block[:MARGIN] == 0xA5).all() and (block[-MARGIN:] == 0xA5).all()
        require(clean, "writes beside an array")
    for array, before in frozen:
        require(array.tobytes() == before, "writes to a read-only array")
    return count, accepted


def walk(call, donors, below, count):
    function, base, accepted = call.function, call.arguments, 0
    own = [a for a in base.values() if isinstance(a, np.ndarray)]
    choices = [(name, choices_for(name, own, donors)) for name in PARAMETERS[function]]
    real = getattr(nf, function)
    with np.errstate(all="ignore"):
        for _ in range(count):
            arguments = base.copy()
            for _ in range(1 + below(2)):
                name, values = choices[below(len(choices))]
                arguments[name] = values[below(len(values))]
            try:
                try:
                    result = real(**arguments)
                except Exception as error:
                    check_error(function, arguments, error)
                else:
                    check_result(function, arguments, result)
                    accepted, base = accepted + 1, arguments
            except Find as find:
                listed = ", ".join(f"{k}={described(v)}" for k, v in arguments.items())
                raise Find(f"{find} after {function}({listed})") from None
    return accepted
