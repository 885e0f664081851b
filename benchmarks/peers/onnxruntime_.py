"""ONNX Runtime, forward only: a model of one node, built on the fly.

Recycled: inputs and output bound once. As installed: ``session.run`` with NumPy in and out.
"""

from __future__ import annotations

import numpy as np

from ..problem import Problem, aligned
from .base import Contender, Lacks, Peer, module

# family: (operator, first version of the operator set that has it)
_OPERATORS = {
    "layer_norm": ("LayerNormalization", 17),
    "rms_norm": ("RMSNormalization", 23),
    "batch_norm": ("BatchNormalization", 15),
    "group_norm": ("GroupNormalization", 21),
    "instance_norm": ("InstanceNormalization", 17),
}


class OnnxRuntime(Peer):
    name = "onnxruntime"

    def open(self, threads: int) -> str:
        self.runtime = module("onnxruntime")
        self.onnx = module("onnx")
        self.threads = threads
        self.runtime.set_default_logger_severity(4)
        return self.runtime.__version__

    def prepare(self, problem: Problem, recycled: bool) -> Contender:
        case, x = problem.case, problem.x
        if case.backward:
            raise Lacks("no backward")
        if case.op == "batch_norm":
            raise Lacks("no batch statistics on the CPU")
        if case.channels_last:
            raise Lacks("no channels-last layout")
        if case.per_row and case.axis != -1:
            raise Lacks("only trailing axes")
        model = self._model(problem)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4
        try:
            session = self.runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has no common base for what it raises
            raise Lacks(f"refuses the model: {str(error).splitlines()[0][:120]}") from error
        if not recycled:
            return Contender(lambda: session.run(None, {"x": x}), tuple, note="session.run")
        y = aligned(x.shape, x.dtype)
        binding = session.io_binding()
        for bind, array, name in ((binding.bind_input, x, "x"), (binding.bind_output, y, "y")):
            bind(name, "cpu", 0, problem.dtype.type, array.shape, array.ctypes.data)

        def call():
            session.run_with_iobinding(binding)
            return y

        return Contender(call, lambda y: (y,), note="inputs and output bound")

    def _model(self, problem: Problem) -> bytes:
        case, helper = problem.case, self.onnx.helper
        if problem.dtype.name == "bfloat16":
            raise Lacks("no bfloat16 arrays in its Python interface")
        operator, version = _OPERATORS[case.family]
        parameters = {"w": problem.weight}
        if case.family != "rms_norm":
            parameters["b"] = problem.bias
        attributes = {"epsilon": problem.eps}
        if case.per_row:
            attributes["axis"] = -1
        elif case.family == "group_norm":
            attributes["num_groups"] = case.groups
            if problem.dtype == np.float64:  # the default is to compute in float32 even then
                attributes["stash_type"] = self.onnx.TensorProto.DOUBLE
        elif case.family == "batch_norm":
            parameters |= {
                "m": problem.running_mean.astype(problem.dtype),
                "v": problem.running_var.astype(problem.dtype),
            }
        node = helper.make_node(operator, ["x", *parameters], ["y"], **attributes)
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(problem.dtype))
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info("x", kind, case.shape)],
            [helper.make_tensor_value_info("y", kind, case.shape)],
            [self.onnx.numpy_helper.from_array(value, name) for name, value in parameters.items()],
        )
        # The lowest version that has the operator: a runtime lags behind the newest operator sets.
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=10)
        return model.SerializeToString()


PEER = OnnxRuntime()
