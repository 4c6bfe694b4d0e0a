"""When quantization begins in training, when its ranges stop, and what keeps weights small."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress._accelerate import accelerate
from jaxcompress._paths import map_with_paths
from jaxcompress.arrays import FakeQuantArray, is_compressed
from jaxcompress.arrays._quantized import replace
from jaxcompress.quantize._qat import trainable

__all__ = ["clip_weights", "delayed", "freeze_ranges"]


def delayed(fn: Callable[..., Any], begin: int) -> Callable[..., Any]:
    """`fn` with float weights before step `begin`, and as `accelerate(fn)` from then on.

    Args:
      fn: called as `fn(params, *args)`.
      begin: the first step that is quantized.

    Returns:
      A function `(step, params, *args)`, with an integer `step`, traced or not; before
      `begin` a `FakeQuantArray` acts as its `weight`, and its scales get no gradient.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"w": jnp.array([[0.3], [1.0]])}
    >>> params = jc.quantize.prepare_qat(params, {"w": jc.quantize.int2()})
    >>> model = jc.quantize.delayed(lambda p: p["w"].sum(), begin=10)
    >>> model(9, params), model(10, params)
    (Array(1.3, dtype=float32), Array(1., dtype=float32))
    """

    def dense(leaf: Any) -> Any:
        return leaf.weight if isinstance(leaf, FakeQuantArray) else leaf

    def run(step: jax.Array, params: Any, *args: Any) -> Any:
        return jax.lax.cond(
            jnp.asarray(step) < begin,
            lambda p: accelerate(fn)(jax.tree.map(dense, p, is_leaf=is_compressed), *args),
            lambda p: accelerate(fn)(p, *args),
            params,
        )

    return run


class _Steps(NamedTuple):
    done: jax.Array


def freeze_ranges(begin: int) -> optax.GradientTransformation:
    """No more updates of learned scales, offsets and clipping from step `begin` on.

    The last link of a chain, so that momentum and decay do not move them either.

    Args:
      begin: the first step whose updates are left out.

    Returns:
      An Optax transformation; its updates have the structure of `params`.

    >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
    >>> params = jc.quantize.lsq({"w": jnp.eye(2)}, {"w": jc.quantize.int4()})
    >>> tx = optax.chain(optax.sgd(1.0), jc.quantize.freeze_ranges(1))
    >>> grads, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(grads, state, params)
    >>> updates["w"].scale[0, 0], updates["w"].weight[0, 0]
    (Array(-0., dtype=float32), Array(-1., dtype=float32))

    Krishnamoorthi, 2018, Quantizing deep convolutional networks for efficient inference,
    arXiv:1806.08342.
    """

    def update(updates: Any, state: _Steps, params: Any = None) -> tuple[Any, _Steps]:
        if params is None:
            raise ValueError("freeze_ranges needs params: tx.update(grads, state, params)")
        moves = state.done < begin
        stop = lambda u, label: u * moves.astype(u.dtype) if label == "scale" else u
        updates = jax.tree.map(stop, updates, trainable(params))
        return updates, _Steps(state.done + 1)

    return optax.GradientTransformation(lambda params: _Steps(jnp.zeros((), jnp.int32)), update)


def clip_weights(limit: float = 1.0) -> optax.GradientTransformation:
    """Keeps the float weights behind quantized ones in `[-limit, limit]`.

    The last link of a chain. A sign does not change with the size of its weight, which
    would otherwise grow without effect (BinaryConnect).

    Args:
      limit: the largest magnitude after an update.

    >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
    >>> params = jc.quantize.prepare_qat({"w": jnp.full((2, 2), 0.5)}, {"w": jc.quantize.binary()})
    >>> tx = optax.chain(optax.sgd(1.0), jc.quantize.clip_weights())
    >>> grads = jax.tree.map(lambda p: -jnp.ones_like(p), params)
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].weight[0, 0]
    Array(1., dtype=float32)

    Courbariaux et al., 2015, BinaryConnect, arXiv:1511.00363.
    """
    if not limit > 0:
        raise ValueError(f"limit must be positive; got {limit}")

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("clip_weights needs params: tx.update(grads, state, params)")

        def clip(path: str, leaf: Any, u: Any) -> Any:
            if not isinstance(leaf, FakeQuantArray):
                return u
            w = leaf.weight
            clipped = jnp.clip(w + u.weight.astype(w.dtype), -limit, limit)
            return replace(u, weight=clipped - w)

        return map_with_paths(clip, params, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
