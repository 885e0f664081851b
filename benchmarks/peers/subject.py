"""normfast itself, called as its users call it. Its own pool recycles large results in both modes."""

from __future__ import annotations

from functools import partial

from ..problem import Problem, present
from .base import Contender, Peer


class Subject(Peer):
    name = "normfast"

    def open(self, threads: int) -> str:
        import normfast as nf

        self.nf = nf
        nf.set_num_threads(threads)
        return nf.__version__

    def prepare(self, problem: Problem, recycled: bool) -> Contender:
        nf, case = self.nf, problem.case
        x, weight, bias, eps = problem.x, problem.weight, problem.bias, problem.eps
        if case.backward:
            statistics = (problem.rstd,) if case.family == "rms_norm" else (problem.mean, problem.rstd)
            where = {"axis": case.axis} if case.per_row else {"channel_axis": case.channel_axis}
            if not case.parameter_gradients:
                where["needs"] = problem.needs
            call = partial(getattr(nf, case.op), problem.dy, x, *statistics, weight, **where)
            return Contender(call, present)
        if case.family == "layer_norm":
            call = partial(nf.layer_norm, x, weight, bias, axis=case.axis, eps=eps)
        elif case.family == "rms_norm":
            call = partial(nf.rms_norm, x, weight, axis=case.axis, eps=eps)
        elif case.family == "group_norm":
            call = partial(nf.group_norm, x, case.groups, weight, bias, channel_axis=case.channel_axis, eps=eps)
        elif case.family == "instance_norm":
            call = partial(nf.instance_norm, x, weight, bias, channel_axis=case.channel_axis, eps=eps)
        else:
            evaluation = case.op == "batch_norm_eval"
            running = (problem.running_mean, problem.running_var) if evaluation else (None, None)
            call = partial(
                nf.batch_norm,
                x,
                *running,
                weight,
                bias,
                training=not evaluation,
                channel_axis=case.channel_axis,
                eps=eps,
            )
        return Contender(call, lambda y: (y,))


PEER = Subject()
