"""Published ways to train quantized weights and activations; each is `params -> params`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.arrays import FakeQuantArray, FloatType, IntType, OddType, TernaryType
from jaxcompress.arrays._fit import fit, mean_magnitude
from jaxcompress.arrays._granularity import expand, reduce_groups
from jaxcompress.arrays._rounding import scale_of
from jaxcompress.quantize._resolve import map_rules
from jaxcompress.quantize._specs import Spec

__all__ = ["dorefa", "lsq", "lsq_plus", "pact"]

Rules = Mapping[str, Spec | None]


def lsq(params: Any, rules: Rules, *, layout: Any = None, stats: Any = None) -> Any:
    """Learned step sizes: scales of weights, and static ones of activations, are trained.

    `w_hat = s round(clip(w / s))`. The gradient to `s` is that of the rounded formula, times
    `1 / sqrt(N Q)`: `N` is the number of weights that share it, for activations the number of
    features, `Q` the largest code (of all, if they are unsigned). Weights start at
    `s = 2 mean |w| / sqrt(Q)`.

    Args:
      params, rules, layout, stats: as for `prepare_qat`; activations start where `stats`
        says, `jc.statistics.mse(bits)` for instance. Asymmetric ones are unsigned: they go
        from zero up, as after a ReLU.

    Returns:
      A tree like `params` with `FakeQuantArray` leaves, as from `prepare_qat`; train it with
      any optimizer, `trainable` labels the scales.

    Raises:
      ValueError, TypeError: as for `quantize`; a spec that is not symmetric, or whose scales
        are not float32.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = jc.quantize.lsq({"w": jnp.eye(2)}, {"w": jc.quantize.int4()})
    >>> params["w"].scale                                       # 2 (1/2) / sqrt(7)
    Array([[0.37796447, 0.37796447]], dtype=float32)

    Esser et al., 2020, Learned Step Size Quantization, arXiv:1902.08153.
    """

    def start(w: jax.Array, qtype: Any, axis: Any, group_size: Any) -> jax.Array:
        if isinstance(qtype, TernaryType) or qtype.bits == 1:
            return fit(w, axis, group_size, qtype).full()  # which is where the error is least
        return mean_magnitude(w, axis, group_size) * jnp.float32(2 / math.sqrt(qtype.high))

    return _learned(start, params, rules, layout, stats)


def lsq_plus(params: Any, rules: Rules, *, layout: Any = None, stats: Any = None) -> Any:
    """Learned step sizes, and learned offsets of the activations.

    `x_hat = s round(clip((x - o) / s)) + o`, for specs with static asymmetric activations,
    `w8a8(static=True, act_symmetric=False)`; gradients as in `lsq`. Weights start at
    `s = max(|m - 3 d|, |m + 3 d|) / 2^(b-1)`, with mean `m` and standard deviation `d`.

    Args:
      params, rules, layout, stats: as for `lsq`.

    Returns:
      A tree like `params` with `FakeQuantArray` leaves.

    Raises:
      ValueError, TypeError: as for `lsq`.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params, fn = {"w": jnp.eye(2)}, lambda p, x: x @ p["w"]
    >>> stats = jc.calibrate(fn, params, [jnp.array([[0.0, 2.55]])], jc.statistics.minmax())
    >>> spec = jc.quantize.w8a8(static=True, act_symmetric=False)
    >>> jc.quantize.lsq_plus(params, {"w": spec}, stats=stats)["w"].act_offset.round(2)
    Array([[1.28]], dtype=float32)

    Bhalgat et al., 2020, LSQ+: Improving low-bit quantization through learnable offsets and
    better initialization, arXiv:2004.09576.
    """

    def start(w: jax.Array, qtype: Any, axis: Any, group_size: Any) -> jax.Array:
        reals = w.astype(jnp.float32)
        total = lambda x: reduce_groups(x, axis, group_size, jnp.sum, 0.0)
        count = jnp.maximum(total(jnp.ones_like(reals)), 1.0)
        mean = total(reals) / count
        centred = reals - expand(mean, w.shape, axis, group_size)
        reach = jnp.abs(mean) + 3 * jnp.sqrt(total(centred**2) / count)
        return scale_of(reach, 2 ** (qtype.bits - 1))

    return _learned(start, params, rules, layout, stats, offsets=True)


def pact(params: Any, rules: Rules, *, layout: Any = None, stats: Any = None) -> Any:
    """Learned clipping of activations: `y = round(clip(x, 0, a) / s) s`, `s = a / (2^b - 1)`.

    The gradient to `a` is 1 for each activation at or above it, 0 for the others. For
    activations that are not negative, after a ReLU: all codes are for 0 to `a`.

    Args:
      params, layout: as for `prepare_qat`.
      rules: specs with static activations; their width is used.
      stats: where `a` starts: the upper end of a range, from `jc.statistics.minmax()`, say.

    Returns:
      A tree like `params` with `FakeQuantArray` leaves, whose `act_clip` is `a`. Decay it with
      the optimizer, as the paper does: `trainable` labels it "scale".

    Raises:
      ValueError, TypeError: as for `quantize`; a spec without static integer activations.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params, fn = {"w": jnp.eye(2)}, lambda p, x: x @ p["w"]
    >>> stats = jc.calibrate(fn, params, [jnp.array([[0.0, 2.0]])], jc.statistics.minmax())
    >>> t = jc.quantize.pact(params, {"w": jc.quantize.w8a8(static=True)}, stats=stats)
    >>> loss = lambda t, x: jc.accelerate(fn)(t, x).sum()
    >>> jax.grad(loss)(t, jnp.array([[1.0, 3.0]]))["w"].act_clip
    Array([[1.]], dtype=float32)

    Choi et al., 2018, PACT: Parameterized Clipping Activation for Quantized Neural Networks,
    arXiv:1805.06085.
    """

    def make(w: jax.Array, *, act_scale: Any, act_offset: Any, **static: Any) -> FakeQuantArray:
        act = static["act"]
        if act is None or not act.static or not isinstance(act.qtype, IntType):
            raise ValueError(
                f"{static['path']!r}: pact learns to clip static integer activations; its spec "
                "has none, use w8a8(static=True) or the like"
            )
        clip = act_scale * act.qtype.high + (0.0 if act_offset is None else act_offset)
        static["act"] = dataclasses.replace(
            act, qtype=IntType(act.qtype.bits, symmetric=False), clip_gradient=True
        )
        return FakeQuantArray(w, act_clip=clip, **static)

    return map_rules(make, params, rules, layout, stats)


def dorefa(params: Any, rules: Rules, *, layout: Any = None, stats: Any = None) -> Any:
    """Weights through a tanh, on odd levels: `w_hat = m (2 round_b(t / (2 m) + 1/2) - 1)`.

    `t = tanh(w)`, `m = max |t|` over the weights that share a scale, and `round_b` rounds to
    multiples of `1 / (2^b - 1)`; with one bit, `w_hat = sign(w) mean |w|`. The factor `m`
    keeps the size of the weights; the paper leaves that to batch normalisation. Activations
    are those of the spec, and so are gradients (`grad_bits`).

    Args:
      params, layout, stats: as for `prepare_qat`.
      rules: specs with integers, of 1 to 8 bits; `int4()` gives four bits of odd levels.

    Returns:
      A tree like `params` with `FakeQuantArray` leaves.

    Raises:
      ValueError, TypeError: as for `quantize`; a spec that is not of integers.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> w = jnp.array([[-1.0], [0.1], [1.0]])
    >>> jc.quantize.dorefa({"w": w}, {"w": jc.quantize.int2()})["w"].materialise().T.round(3)
    Array([[-0.762,  0.254,  0.762]], dtype=float32)

    Zhou et al., 2016, DoReFa-Net, arXiv:1606.06160.
    """

    def make(w: jax.Array, *, act_scale: Any, act_offset: Any, **static: Any) -> FakeQuantArray:
        qtype = static["qtype"]
        if not isinstance(qtype, (IntType, OddType)) or not qtype.symmetric:
            raise ValueError(
                f"{static['path']!r}: dorefa takes symmetric integers, not {qtype.name}"
            )
        act = static["act"]
        if qtype.bits == 8 and act is not None and act.grad_bits is not None:
            raise ValueError(
                f"{static['path']!r}: odd levels of 8 bits are no int8, so that gradients "
                "cannot be multiplied with them as integers; use 7 bits or fewer"
            )
        static["qtype"] = OddType(qtype.bits)
        return FakeQuantArray(w, None, act_scale, act_offset, through_tanh=qtype.bits > 1, **static)

    return map_rules(make, params, rules, layout, stats)


def _learned(
    start: Callable[..., jax.Array],
    params: Any,
    rules: Rules,
    layout: Any,
    stats: Any,
    offsets: bool = False,
) -> Any:
    def make(w: jax.Array, *, act_scale: Any, act_offset: Any, **static: Any) -> FakeQuantArray:
        check_learned(static["qtype"], static["path"])
        scale = start(w, static["qtype"], static["axis"], static["group_size"])
        if act_offset is not None and not offsets:
            # The same upper end, from zero.
            qtype = static["act"].qtype
            top = qtype.high * act_scale + act_offset
            act_scale, act_offset = top * jnp.float32(1 / (qtype.high - qtype.low)), None
        return FakeQuantArray(w, scale, act_scale, act_offset, gradient_scale=True, **static)

    return map_rules(make, params, rules, layout, stats)


def check_learned(qtype: Any, path: str) -> None:
    """Raises unless scales of this format can be trained."""
    if not qtype.symmetric or (isinstance(qtype, FloatType) and qtype.scales != "float32"):
        raise ValueError(
            f"{path!r}: learned scales need a symmetric spec with float32 scales, not {qtype.name}"
        )
