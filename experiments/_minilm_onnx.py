"""The same network, with the same weights, in ONNX, and onnxruntime's dynamic int8 of it."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from _minilm_layers import HIDDEN
from _minilm_model import HEADS


class _Graph:
    """Nodes and constants, with a fresh name for each result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        from onnx import helper

        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def put(self, value: Any) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def onnx_model(params: Any) -> Any:
    """The graph of `encode_padded(params, tokens, mask)`; `mask` is 1 where a text is.

    The operators are those of a whole layer each (LayerNormalization, Gelu), which
    onnxruntime has kernels for; it fuses the biases itself.
    """
    from onnx import TensorProto, helper

    g = _Graph()
    float_of = lambda leaf: g.put(np.asarray(leaf, np.float32))
    shape = lambda *sizes: g.put(np.array(sizes, np.int64))

    def norm(x: str, leaf: Any) -> str:
        scale, bias = float_of(leaf["scale"]), float_of(leaf["bias"])
        return g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-12)

    def dense(x: str, layer: Any) -> str:
        return g.op("Add", g.op("MatMul", x, float_of(layer["kernel"])), float_of(layer["bias"]))

    def heads(x: str, order: tuple[int, ...]) -> str:
        split = g.op("Reshape", x, shape(0, 0, HEADS, HIDDEN // HEADS))
        return g.op("Transpose", split, perm=order)

    table = params["embedding"]
    place = g.op("Slice", float_of(table["place"]), shape(0), "size", shape(0))
    x = g.op("Add", g.op("Gather", float_of(table["word"]), "tokens"), place)
    x = norm(x, table["norm"])
    absent = g.op("Sub", g.op("Unsqueeze", "mask", shape(1, 2)), float_of(1.0))
    bias = g.op("Mul", absent, float_of(1e9))
    for layer in params["blocks"]:
        parts = g.op("Split", dense(x, layer["qkv"]), axis=-1, num_outputs=3, outputs=3)
        q, k, v = (heads(p, o) for p, o in zip(parts, ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3))))
        scores = g.op("Div", g.op("MatMul", q, k), float_of(np.sqrt(HIDDEN // HEADS)))
        weights = g.op("Softmax", g.op("Add", scores, bias), axis=-1)
        mixed = g.op("Transpose", g.op("MatMul", weights, v), perm=(0, 2, 1, 3))
        mixed = g.op("Reshape", mixed, shape(0, 0, HIDDEN))
        x = norm(g.op("Add", x, dense(mixed, layer["out"])), layer["attention_norm"])
        hidden = g.op("Gelu", dense(x, layer["up"]))
        x = norm(g.op("Add", x, dense(hidden, layer["down"])), layer["mlp_norm"])
    column = g.op("Unsqueeze", "mask", shape(2))
    total = g.op("ReduceSum", g.op("Mul", x, column), shape(1), keepdims=0)
    mean = g.op("Div", total, g.op("ReduceSum", column, shape(1), keepdims=0))
    g.nodes.append(helper.make_node("LpNormalization", [mean], ["vectors"], axis=-1, p=2))
    graph = helper.make_graph(
        g.nodes,
        "encoder",
        [
            helper.make_tensor_value_info("tokens", TensorProto.INT32, ["b", "n"]),
            helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["b", "n"]),
            helper.make_tensor_value_info("size", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["b", HIDDEN])],
        g.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def save(params: Any, path: Path, eight_bits: bool) -> None:
    """Writes the model; with `eight_bits` as its own `quantize_dynamic` makes it."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx_model(params)
    if not eight_bits:
        onnx.save(model, path)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "float.onnx")
        onnx.save(model, source)
        quantize_dynamic(
            source,
            path,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
        )
