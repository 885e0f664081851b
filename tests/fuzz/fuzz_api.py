"""Fuzzes the public functions, guided by atheris where asked for, and prints what happened as JSON.

    python tests/fuzz/fuzz_api.py --calls 100000 --seed 1                  # random bytes, nothing to install
    python tests/fuzz/fuzz_api.py --guided CORPUS --seconds 3600 --seed 1  # pip install atheris
    python tests/fuzz/fuzz_api.py --calls 100000 --seed 1 --around 1000    # 1000 quick ones around each: around.py
    python tests/fuzz/fuzz_api.py --replay 0a1b2c...                       # what a find was

Atheris sees the coverage of Python code: of normfast's own, which is thin, and of `calls.py`. The checks are in C++, so
each different outcome (a refusal's text without its numbers, a way of success) counts as a place in the code as well.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
import zlib
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

HANG = 60  # seconds for one call, which takes milliseconds
LENGTH = 160  # bytes: more than a call uses
OUTCOMES = 1 << 14
WARM = 1000  # calls after which caches are full
AGAIN = 200  # repetitions of a call to see whether it loses memory


class Report:
    """Counts, and one example of every kind of find."""

    def __init__(self):
        self.started = time.monotonic()
        self.calls = self.succeeded = self.around = self.around_succeeded = 0
        self.blocks_grown = self.early = None
        self.functions = {}
        self.outcomes = bytearray(OUTCOMES)  # nothing here may grow with the number of calls
        self.finds = {}

    def add(self, call, place):
        self.calls += 1
        self.succeeded += not call.wrong
        self.functions.setdefault(call.function, [0, 0])[bool(call.wrong)] += 1
        self.outcomes[place] = 1
        if self.calls == WARM:
            self.early = held()

    def find(self, data, call, text):
        self.finds.setdefault(
            f"{call.function} {kind_of(text)}", {"call": str(call), "text": text, "bytes": data.hex()}
        )

    def done(self, calls, seconds):
        return self.calls >= calls or (seconds is not None and time.monotonic() - self.started >= seconds)

    def __str__(self):
        return json.dumps(
            {
                "calls": self.calls,
                "seconds": round(time.monotonic() - self.started, 1),
                "succeeded": self.succeeded,
                "outcomes": sum(self.outcomes),
                "functions": self.functions,  # good calls and wrong ones of each
                "around": self.around,  # quick calls, see around.py
                "around succeeded": self.around_succeeded,
                "memory": [self.early, held()],  # MB of the process, blocks of Python's: once warm, and at the end
                "blocks grown": self.blocks_grown,  # see blocks_lost
                "finds": list(self.finds.values()),
            }
        )


def held():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1_000_000, sys.getallocatedblocks()


def kind_of(text):
    """Finds of one kind begin alike, numbers aside."""
    return re.sub(r"[0-9.e+-]+", "#", text)[:30]


def try_bytes(data, report, around):
    """Makes and judges one call, and so many around it; which outcome it was, for whoever guides."""
    from fuzz.around import try_around
    from fuzz.calls import drawn
    from fuzz.judge import Find, judge

    call = drawn(data)
    try:
        verdict = judge(call)
        if around:
            made, succeeded = try_around(data, LENGTH, around)
            report.around += made
            report.around_succeeded += succeeded
    except Find as find:
        report.find(data, call, str(find))
        verdict = kind_of(str(find))
    place = zlib.crc32(verdict.encode()) % OUTCOMES
    report.add(call, place)
    return place


def unguided(calls, seconds, seed, last, around):
    """Random bytes. What is being tried stands in the file `last`: after a crash it is the find."""
    random = np.random.Generator(np.random.PCG64(seed))
    report = Report()
    with open(last, "wb", buffering=0) if last else nullcontext() as file:
        while not report.done(calls, seconds):
            data = random.bytes(LENGTH)
            if file:
                file.seek(0)
                file.write(data)
            signal.alarm(HANG)
            try_bytes(data, report, around)
    signal.alarm(0)
    return report


def blocks_lost(seed):
    """The most blocks of memory that Python has more after AGAIN times the same call, over some calls."""
    from fuzz.calls import drawn
    from fuzz.judge import outcome

    random = np.random.Generator(np.random.PCG64(seed))
    grown = []
    for _ in range(100):
        call = drawn(random.bytes(LENGTH))
        for _ in range(AGAIN // 4):  # caches fill
            outcome(call)
        before = sys.getallocatedblocks()
        for _ in range(AGAIN):
            outcome(call)
        grown.append(sys.getallocatedblocks() - before)
    return max(grown)


def guided(corpus, calls, seconds, seed, around):
    """Atheris draws the bytes, and keeps in the folder `corpus` those that led somewhere new. Never returns."""
    import atheris

    with atheris.instrument_imports(include=["normfast", "fuzz.calls"]):
        import fuzz.calls
        import normfast  # noqa: F401
    import fuzz.around  # noqa: F401

    places = [atheris._reserve_counter() for _ in range(OUTCOMES)]
    report = Report()

    def one(data):
        atheris._trace_branch(places[try_bytes(data, report, around)])
        if report.done(calls, seconds):
            print(report, flush=True)
            os._exit(1 if report.finds else 0)

    options = [f"-seed={seed}", f"-timeout={HANG}", f"-max_len={LENGTH}", "-len_control=0"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus}.", corpus], one)
    atheris.Fuzz()


def replay(data, around):
    report = Report()
    try_bytes(data, report, around)
    from fuzz.calls import drawn

    print(drawn(data))
    for find in report.finds.values():
        print("find:", find["text"])
    return not report.finds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1 << 62)
    parser.add_argument("--seconds", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--around", type=int, default=0, help="quick calls around each")
    parser.add_argument("--memory", action="store_true", help="see whether calls lose memory")
    parser.add_argument("--last", help="file for the bytes of the present call")
    parser.add_argument("--guided", metavar="CORPUS", help="folder of what atheris found worth keeping")
    parser.add_argument("--replay", metavar="HEX", help="bytes, or a file of them")
    given = parser.parse_args()
    if given.replay:
        path = Path(given.replay)
        is_file = len(given.replay) < 200 and path.is_file()
        data = path.read_bytes() if is_file else bytes.fromhex(given.replay)
        sys.exit(0 if replay(data, given.around) else 1)
    if given.guided:
        Path(given.guided).mkdir(parents=True, exist_ok=True)
        guided(given.guided, given.calls, given.seconds, given.seed, given.around)
        return
    report = unguided(given.calls, given.seconds, given.seed, given.last, given.around)
    if given.memory:
        report.blocks_grown = blocks_lost(given.seed)
    print(report)
    sys.exit(1 if report.finds else 0)


if __name__ == "__main__":
    main()
