"""One process of a run: one way of measuring, one number of threads, all cases. ``python -m benchmarks.worker``

The allocator's settings and several libraries' threads are fixed when a process starts, hence a process for each
combination. It reads its orders as JSON from standard input and writes one JSON object per line.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
from dataclasses import asdict
from typing import TextIO

from . import limits, native, peers
from .agreement import Disagreement, check
from .counters import Neighbours
from .measure import measure, paired_ratio
from .problem import Problem
from .shapes import Case


class Worker:
    def __init__(self, orders: dict, output: TextIO) -> None:
        self.threads: int = orders["threads"]
        self.recycled: bool = orders["mode"] == "recycled"
        self.check_only: bool = orders["check_only"]
        self.rounds, self.budget = orders["rounds"], orders["budget"]
        self.cases = [Case(**{**c, "shape": tuple(c["shape"])}) for c in orders["cases"]]
        self._output = output
        self.peers, self.lacking = {}, {}
        self.limits = None
        self._orders = orders

    def say(self, event: str, **content: object) -> None:
        print(json.dumps({"event": event, **content}), file=self._output, flush=True)

    def run(self) -> None:
        versions = {}
        for name in (peers.SUBJECT, *self._orders["peers"]):
            self.say("doing", text=f"loading {name}")
            peer = peers.load(name)
            try:
                versions[name] = peer.open(self.threads)
                self.peers[name] = peer
            except peers.Lacks as reason:
                if name == peers.SUBJECT:
                    raise
                self.lacking[name] = str(reason)
        note = ""
        if not self.check_only:
            try:
                self.limits = limits.load()
            except native.CannotBuild as error:
                note = str(error)
        config = self.peers[peers.SUBJECT].nf.show_config(mode="dicts")
        self.say("ready", versions=versions, lacking=self.lacking, limits=note, config=config)
        for number, case in enumerate(self.cases):
            self.say("doing", text=case.label)
            self.one(number, case)
            gc.collect()
        self.say("end")

    def one(self, number: int, case: Case) -> None:
        """Prepare everybody, compare everybody, then time those that agree."""
        problem = Problem(case)
        expected = problem.expected
        contenders, errors, lacks, disagree = {}, {}, dict(self.lacking), {}
        for name, peer in self.peers.items():
            self.say("doing", text=f"{case.label}: {name}")
            try:
                contender = peer.prepare(problem, self.recycled)
                errors[name] = check(name, case.dtype, case.backward, contender.arrays(contender.call()), expected)
                contenders[name] = contender
            except peers.Lacks as reason:
                lacks[name] = str(reason)
            except Disagreement as reason:
                disagree[name] = str(reason)
        del expected
        problem.forget()
        cell = {"case": asdict(case), "lacks": lacks, "disagree": disagree, "errors": errors}
        if not self.check_only and peers.SUBJECT in contenders:
            self.say("doing", text=case.label)
            cell |= self._time(problem, contenders)
        self.say("cell", number=number, cell=cell)

    def _time(self, problem: Problem, contenders: dict) -> dict:
        bounds = limits.prepare(self.limits, problem, self.threads) if self.limits is not None else {}
        neighbours = Neighbours()
        series = measure(contenders | bounds, self.threads, self.rounds, self.budget)
        others = neighbours.cpus()
        subject = series[peers.SUBJECT]
        least = problem.case.least_bytes
        results = {}
        for name, contender in contenders.items():
            one = series[name].summary()
            one["gbs"] = least / one["seconds"] / 1e9
            one["ratio"] = paired_ratio(subject, series[name])
            one["note"] = contender.note
            results[name] = one
        limit = {}
        for name, bound in bounds.items():
            one = series[name].summary()
            one["gbs"] = bound.nbytes / one["seconds"] / 1e9
            limit[name] = one
        return {"least_bytes": least, "results": results, "limits": limit, "others_cpus": others}


def main() -> None:
    # Standard output belongs to the protocol; what libraries print goes where errors go.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    faulthandler.enable()  # should a peer crash, the log says where
    Worker(json.load(sys.stdin), output).run()


if __name__ == "__main__":
    main()
