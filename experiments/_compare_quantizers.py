"""The same work by this library, qwix and aqt: training steps, rounding, GPTQ, files."""

import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import serialization

import jaxcompress as jc
from _compare_models import Model
from _harness import peak_bytes

__all__ = ["gptq_seconds", "large_gptq", "post_training", "training"]

Training = tuple[Callable[..., jax.Array], Any]  # apply(params, x, key) and params
PEER_COLUMNS = 128  # of GPTQ in qwix, whose compile time grows with their square


def has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def training(model: Model) -> dict[str, Training]:
    """Eight-bit weights and activations in training, without and with int8 gradients."""
    x, _ = model.batch()
    plain = model.module()
    params = plain.init(jax.random.key(0), x)
    found: dict[str, Training] = {"dense f32": (lambda p, x, key: plain.apply(p, x), params)}
    layout = jc.layout(plain.apply, params, x)
    for name, bits in (("ours", None), ("ours, int8 gradients", 8)):
        rules = {".*kernel": jc.quantize.w8a8(grad_bits=bits)}
        apply = jc.accelerate(plain.apply)
        found[name] = (
            lambda p, x, key, apply=apply: apply(p, x),
            jc.quantize.prepare_qat(params, rules, layout=layout),
        )
    if has("qwix"):
        found["qwix"] = _qwix(plain, params)
        found["qwix, int8 gradients"] = _qwix(plain, params, bwd_qtype="int8")
    if has("aqt") and len(model.shape) < 4:  # its convolution gives kernels no gradient
        found["aqt"] = _aqt(model, params, None)
        found["aqt, int8 gradients"] = _aqt(model, params, 8)
    return found


def _qwix(plain: nn.Module, params: Any, **gradients: Any) -> Training:
    import qwix

    if gradients:
        gradients["bwd_stochastic_rounding"] = "uniform"
    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8", **gradients)
    module = qwix.quantize_model(plain, qwix.QtProvider([rule]))
    return lambda p, x, key: module.apply(p, x, rngs={"stochastic_rounding": key}), params


def _aqt(model: Model, params: Any, bits: int | None) -> Training:
    from aqt.jax.v2 import config
    from aqt.jax.v2.flax import aqt_flax

    made = config.config_v4(fwd_bits=8, dlhs_bits=bits, drhs_bits=bits)
    module = model.module(dot=functools.partial(aqt_flax.AqtDotGeneral, made))
    # Its modules keep nothing here; the names of the dense ones stay.
    return lambda p, x, key: module.apply(p, x, rngs={"params": key}), params


class Digits(nn.Module):
    """64-128-128-10."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (128, 128):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def _digits() -> tuple[nn.Module, Any, jax.Array, jax.Array]:
    """A module trained on scikit-learn's digits, 512 rows to calibrate on, 360 to test on."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = jnp.asarray(digits.data[order] / 16, jnp.float32)
    y = jnp.asarray(digits.target[order])
    module = Digits()
    params, tx = module.init(jax.random.key(0), x), optax.adam(1e-3)

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        params, opt = state
        rows = jax.random.randint(key, (128,), 0, 1437)
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(
            module.apply(p, x[rows]), y[rows]
        ).mean()
        updates, opt = tx.update(jax.grad(loss)(params), opt, params)
        return (optax.apply_updates(params, updates), opt), None

    run = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[0][0])
    params = run((params, tx.init(params)), jax.random.split(jax.random.key(1), 1500))
    return module, params, x[:512], x[1437:]


def post_training(with_gptq_of_peers: bool) -> list[dict[str, Any]]:
    """int4 weights of a digit classifier: relative error of the logits, bytes of a file."""
    module, params, calibration, x = _digits()
    dense = module.apply(params, x)
    error = lambda out: float(jnp.linalg.norm(out - dense) / jnp.linalg.norm(dense))
    rules = {".*kernel": jc.quantize.int4()}
    rows = []
    for name, quantized in {
        "ours, rounded": jc.quantize.quantize(params, rules),
        "ours, GPTQ": jc.quantize.gptq(module.apply, params, [calibration], rules),
    }.items():
        out = jc.accelerate(module.apply)(quantized, x)
        rows.append({"name": name, "error": error(out), "bytes": _our_bytes(quantized)})
    rows.append({"name": "dense f32", "error": 0.0, "bytes": _our_bytes(params)})
    if has("qwix"):
        rows += _qwix_post_training(module, params, calibration, x, error, with_gptq_of_peers)
    return rows


def _our_bytes(params: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "params.safetensors")
        jc.io.save(path, params)
        return path.stat().st_size


def _qwix_post_training(
    module: nn.Module,
    params: Any,
    calibration: jax.Array,
    x: jax.Array,
    error: Callable[[jax.Array], float],
    with_gptq: bool,
) -> list[dict[str, Any]]:
    import qwix
    from qwix.contrib import gptq

    rule = dict(weight_qtype="int4", act_qtype=None)
    small = qwix.quantize_model(module, qwix.PtqProvider([qwix.QuantizationRule(**rule)]))
    abstract = jax.eval_shape(small.init, jax.random.key(0), x)["params"]
    found = {"qwix, rounded": qwix.quantize_params(params["params"], abstract)}
    if with_gptq:
        watched = qwix.quantize_model(module, gptq.GptqCalibrationProvider([gptq.GptqRule(**rule)]))
        _, seen = watched.apply(params, calibration, mutable=True)
        run = jax.jit(lambda p, stats: gptq.quantize_params(p, abstract, stats))
        found["qwix, GPTQ"] = run(params["params"], seen["quant_stats"])
    rows = []
    for name, quantized in found.items():
        out = small.apply({"params": quantized}, x)
        # What Flax writes: its QArrays are pytrees, and an int4 takes a byte there.
        leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(quantized))}
        rows.append(
            {"name": name, "error": error(out), "bytes": len(serialization.to_bytes(leaves))}
        )
    return rows


def gptq_seconds(columns: int, with_peers: bool) -> list[dict[str, Any]]:
    """GPTQ of a `columns x 64` weight in int4: the first call, and a second one.

    Columns as its paper has it: the input features, one of which is rounded at a time.
    """
    x = jax.random.normal(jax.random.key(0), (512, columns))
    w = jax.random.normal(jax.random.key(1), (columns, 64))
    rules, fn = {"w": jc.quantize.int4()}, lambda p, x: x @ p["w"]
    runs = {"ours": lambda: jc.quantize.gptq(fn, {"w": w}, [x], rules)["w"].values}
    if with_peers and has("qwix") and columns <= PEER_COLUMNS:
        from qwix._src.core import qarray
        from qwix.contrib import gptq_core

        how = qarray.HowToQuantize(qtype="int4", channelwise_axes=[0])
        hessian = jax.jit(gptq_core.compute_hessian)(x.T)
        peer = jax.jit(lambda w, h: gptq_core.quantize_weight(w, h, how)[0].qvalue)
        runs["qwix"] = lambda: peer(w.T, hessian)
    rows = []
    for name, run in runs.items():
        first, second = _seconds(run), _seconds(run)
        rows.append({"name": name, "columns": columns, "first_s": first, "second_s": second})
    return rows


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


def large_gptq(size: int) -> dict[str, Any]:
    """GPTQ of a `size x size` layer in int4 with groups of 128; run it in a process of its own."""
    w = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
    batches = [jax.random.normal(jax.random.key(i), (1024, size)) for i in range(1, 6)]
    rules = {"w": jc.quantize.int4(group_size=128)}
    begin = time.perf_counter()
    new = jc.quantize.gptq(lambda p, x: x @ p["w"], {"w": w}, batches, rules)
    jax.block_until_ready(new["w"].values)
    return {
        "size": size,
        "rows": sum(len(x) for x in batches),
        "minutes": (time.perf_counter() - begin) / 60,
        "peak_gb": peak_bytes() / 1e9,
    }
