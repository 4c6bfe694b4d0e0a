"""Quantization-aware training: float twins before, integers after."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress._paths import map_with_paths
from jaxcompress.arrays import FakeQuantArray, LowRankArray, PrunedInputArray, is_compressed
from jaxcompress.arrays._fit import fit
from jaxcompress.arrays._quantized import replace
from jaxcompress.quantize._methods import check_learned
from jaxcompress.quantize._resolve import map_rules
from jaxcompress.quantize._specs import Spec

__all__ = ["convert", "freeze", "prepare_qat", "trainable"]


def prepare_qat(
    params: Any,
    rules: Mapping[str, Spec | None],
    *,
    layout: Any = None,
    stats: Any = None,
    learn_scale: bool = False,
) -> Any:
    """Makes the weights that `rules` name act as if they were quantized, and trainable.

    `y = x_hat @ w_hat`, `w_hat = s round(clip(w / s))`, and with quantized activations
    the same for `x`; the gradient is 1 within the range and at its bounds, 0 outside.

    Train the result like the original: wrap the model in `jaxcompress.accelerate` inside
    the loss, and use any Optax optimizer. `convert` then stores exactly what training saw.

    Args:
      params, rules, layout: as for `quantize`.
      stats: statistics for specs with static activations, as for `quantize`; the scales
        and offsets of the activations start there, and are trained.
      learn_scale: makes each weight's scales trained leaves too, starting from the
        absolute maxima; otherwise they follow the maxima. `lsq` starts elsewhere, and
        scales their gradient as published.

    Returns:
      A tree like `params` with `FakeQuantArray` leaves.

    Raises:
      ValueError, TypeError: as for `quantize`; learned scales need a symmetric spec.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = jc.quantize.prepare_qat({"w": jnp.eye(2)}, {"w": jc.quantize.int8()})
    >>> loss = lambda p: jc.accelerate(lambda p, x: (x @ p["w"]).sum())(p, jnp.ones((1, 2)))
    >>> jax.grad(loss)(params)["w"].weight
    Array([[1., 1.],
           [1., 1.]], dtype=float32)

    Bengio et al., 2013, arXiv:1308.3432; Esser et al., 2020, Learned Step Size
    Quantization, arXiv:1902.08153.
    """

    def make(w: jax.Array, *, act_scale: Any, act_offset: Any, **static: Any) -> FakeQuantArray:
        scale = None
        if learn_scale:
            check_learned(static["qtype"], static["path"])
            scale = fit(w, static["axis"], static["group_size"], static["qtype"]).scale
        return FakeQuantArray(w, scale, act_scale, act_offset, **static)

    return map_rules(make, params, rules, layout, stats)


def convert(params: Any) -> Any:
    """Turns `FakeQuantArray` leaves into the `QuantizedArray`s that training has simulated.

    Args:
      params: a tree from `prepare_qat`, trained.

    Returns:
      A tree like it; every other leaf as it is.

    Raises:
      ValueError: there is no `FakeQuantArray` in it.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = jc.quantize.prepare_qat({"w": jnp.eye(2)}, {"w": jc.quantize.w8a8()})
    >>> jc.quantize.convert(params)["w"]
    QuantizedArray(int8[2,2] as float32, axis=(-2,), path='w')
    """
    found = False

    def one(leaf: Any) -> Any:
        nonlocal found
        if isinstance(leaf, PrunedInputArray):
            return replace(leaf, array=one(leaf.array))
        found |= isinstance(leaf, FakeQuantArray)
        return leaf.convert() if isinstance(leaf, FakeQuantArray) else leaf

    converted = jax.tree.map(one, params, is_leaf=is_compressed)
    if not found:
        raise ValueError("convert found no FakeQuantArray; prepare_qat makes them")
    return converted


def trainable(params: Any) -> Any:
    """Labels every array in `params`: "weight", "scale" or "frozen".

    For `optax.multi_transform`: scales often want another learning rate than weights and
    no weight decay, and integers must not be touched by an optimizer at all. The weights
    are floating leaves, those inside `FakeQuantArray`s and `LowRankArray`s, and the shared
    values of `CodebookArray`s; the scales are those of `FakeQuantArray`s; frozen are integers,
    the scales that belong to them, and thresholds of activations.

    Returns:
      A tree of labels in the structure of `params`, the insides of containers included.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = jc.quantize.prepare_qat(
    ...     {"w": jnp.eye(2), "b": jnp.ones(2)}, {"w": jc.quantize.int8()}, learn_scale=True
    ... )
    >>> labels = jc.quantize.trainable(params)
    >>> labels["b"], labels["w"]
    ('weight', FakeQuantArray(weight=weight, scale=scale))
    """

    def label(path: str, leaf: Any) -> Any:
        if isinstance(leaf, FakeQuantArray):
            return jax.tree_util.tree_map_with_path(
                lambda key, _: "weight" if key[-1].name == "weight" else "scale", leaf
            )
        if isinstance(leaf, PrunedInputArray):
            frozen = jax.tree.map(lambda _: "frozen", leaf)
            return replace(frozen, array=label(path, leaf.array))
        if is_compressed(leaf):
            trained = lambda key: isinstance(leaf, LowRankArray) or key[-1].name == "codebook"
            return jax.tree_util.tree_map_with_path(
                lambda key, _: "weight" if trained(key) else "frozen", leaf
            )
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return "weight" if floating else "frozen"

    return map_with_paths(label, params)


def freeze() -> optax.GradientTransformation:
    """Zero updates in each parameter's own dtype, for what `trainable` labels "frozen".

    `jax.grad(..., allow_int=True)` gives integers a gradient of `float0`, which nothing
    can be added to, `optax.set_to_zero` included.

    >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
    >>> params = {"w": jnp.eye(2), "b": jnp.ones(2)}
    >>> params = jc.quantize.quantize(params, {"w": jc.quantize.int8()})
    >>> tx = optax.multi_transform(
    ...     {"weight": optax.sgd(1.0), "scale": optax.sgd(0.1), "frozen": jc.quantize.freeze()},
    ...     jc.quantize.trainable,
    ... )
    >>> loss = lambda p: jc.accelerate(lambda p: (jnp.ones(2) @ p["w"] + p["b"]).sum())(p)
    >>> grads = jax.grad(loss, allow_int=True)(params)
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["b"]
    Array([0., 0.], dtype=float32)
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("freeze needs params: tx.update(grads, state, params)")
        return jax.tree.map(jnp.zeros_like, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
