"""The same linear layer in other libraries: those that are installed, as lists of calls."""

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["peers", "session", "sparse_peers"]

Calls = list[Callable[[], Any]]


def peers(x: Any, weights: list[Any]) -> dict[str, Calls]:
    """For each peer one call a weight, on as many threads as there are cores."""
    found: dict[str, Calls] = {}
    has = lambda *names: all(importlib.util.find_spec(name) for name in names)
    if has("onnx", "onnxruntime"):
        found |= _onnxruntime(x, weights)
    if has("onnx", "openvino"):
        found["OpenVINO f32"] = [_openvino(x, w) for w in weights]
    if has("torch"):
        found |= _torch(x, weights)
    return found


def sparse_peers(x: Any, weights: list[Any]) -> dict[str, Calls]:
    """The same for weights of which most are zero."""
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    columns = torch.from_numpy(x.T.copy())  # it multiplies from the left only

    def run(matrix: Any) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                return (matrix @ columns).numpy()

        return call

    rows = [torch.from_numpy(w.T.copy()).to_sparse_csr() for w in weights]
    return {"torch CSR": [run(matrix) for matrix in rows]}


def _onnx_model(w: Any) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    k, n = w.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(w, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def session(model: bytes | str) -> Any:
    """Of onnxruntime, for a model or the file of one, on as many threads as there are cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    # Threads that spin while they wait would slow down whoever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _onnxruntime(x: Any, weights: list[Any]) -> dict[str, Calls]:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.disable(logging.WARNING)  # its quantizers report every step
    calls: dict[str, Calls] = {name: [] for name in ("f32", "dynamic int8", "int4 g128, int8 sums")}
    run = lambda session: lambda: session.run(None, {"x": x})
    for w in weights:
        model = _onnx_model(w)
        calls["f32"].append(run(session(model.SerializeToString())))
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder, "int8.onnx"))
            quantize_dynamic(model, target, per_channel=True, weight_type=QuantType.QInt8)
            calls["dynamic int8"].append(run(session(target)))
        four = MatMulNBitsQuantizer(model, block_size=128, is_symmetric=True, accuracy_level=4)
        four.process()
        calls["int4 g128, int8 sums"].append(run(session(four.model.model.SerializeToString())))
    return {f"onnxruntime {name}": c for name, c in calls.items()}


def _openvino(x: Any, w: Any) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    model = core.read_model(_onnx_model(w).SerializeToString())
    request = core.compile_model(
        model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    ).create_infer_request()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)


def _torch(x: Any, weights: list[Any]) -> dict[str, Calls]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    row = torch.from_numpy(x)
    calls: dict[str, Calls] = {"f32": [], "dynamic int8": []}

    def run(layer: Any) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                return layer(row).numpy()

        return call

    for w in weights:
        layer = torch.nn.Linear(*w.shape, bias=False)
        layer.weight.data = torch.from_numpy(w.T.copy())
        calls["f32"].append(run(layer))
        model = torch.nn.Sequential(layer)
        quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
        calls["dynamic int8"].append(run(quantized))
    return {f"torch {name}": c for name, c in calls.items()}
