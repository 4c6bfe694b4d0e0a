"""BRECQ: learn the rounding of all layers of a block from what the block returns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

from jaxcompress._accelerate import accelerate
from jaxcompress._neighbours import constants
from jaxcompress._program import Program, name_of
from jaxcompress._sequential import Tell, advance, first_values, observed, traced, unstacked, walk
from jaxcompress._statistics import Statistic
from jaxcompress.arrays._granularity import Axes, expand
from jaxcompress.arrays._qtype import IntType
from jaxcompress.quantize._adaround import pull, soft, start
from jaxcompress.quantize._blocks import in_blocks
from jaxcompress.quantize._posttrain import Layer, Layers, Progress
from jaxcompress.quantize._scales import full_scales, integers_only, searched_scales
from jaxcompress.quantize._specs import Spec

__all__ = ["brecq"]

Loss = Callable[[Any, Any], jax.Array]


def brecq(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Mapping[str, Spec | None],
    *,
    blocks: Sequence[str] | None = None,
    loss: Loss | None = None,
    stats: Any = None,
    steps: int = 2000,
    learning_rate: float = 0.01,
    clip: bool = True,
    resume: str | Path | None = None,
    progress: Progress = None,
) -> Any:
    """Learns up or down as `adaround`, for all layers of a block and what the block returns.

    `min_V sum F (z - z_hat)^2 + c sum(1 - |2 h(V) - 1|^b)`: `z` is all that later blocks get
    of a block in the dense model, `z_hat` the same with weights `s clip(floor(w / s) + h(V))`
    behind the blocks quantized before, `F = (d loss / d z)^2`, the diagonal of the Fisher
    information, with a mean of 1. A block whose error ends above that of nearest rounding,
    over all batches, keeps nearest rounding.

    Each step takes one batch, in turn. Activations of the block that is learned are in
    floats. For a `loss`, each block takes a backward pass through the rest of the model.

    Args:
      fn, params, batches, rules, stats, progress: as for `gptq`.
      blocks: patterns of paths, one for each block; its layers must follow each other.
        Layers that none matches are blocks of their own. None makes a block of the layers
        of one module (`block0` of `block0/dense1/kernel`); those at the top are alone. Each
        of stacked layers is one.
      loss: `loss(fn(params, batch), batch)`, a scalar; without it `F = 1`.
      steps, learning_rate: of Adam, for each block.
      clip: choose each scale by the error it makes instead of from the largest weight.
      resume: as for `gptq`; the function `loss` is not compared.

    Returns:
      A tree like `params` with `QuantizedArray` leaves.

    Raises:
      ValueError: as for `gptq`; a pattern of `blocks` that matches nothing, or layers that
        do not follow each other; a loss that is no scalar, or on which a block has no
        finite influence.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> a, b, x = jax.random.normal(jax.random.key(0), (3, 16, 16))
    >>> fn, params = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], {"a": a, "b": b}
    >>> rules = {"a|b": jc.quantize.int3()}
    >>> how = dict(blocks=["a|b"], steps=300, learning_rate=0.05)
    >>> new = jc.quantize.brecq(fn, params, [x], rules, **how)
    >>> error = lambda p: jnp.linalg.norm(jc.accelerate(fn)(p, x) - fn(params, x))
    >>> bool(error(new) < 0.7 * error(jc.quantize.quantize(params, rules)))
    True

    Li et al., 2021, BRECQ: Pushing the Limit of Post-Training Quantization by Block
    Reconstruction, arXiv:2102.05426.
    """
    if steps < 1:
        raise ValueError(f"steps is 1 or more; got {steps}")
    batches = list(batches)
    layers = Layers.of(fn, params, batches, rules, stats)
    program = traced(fn, layers.params, batches, set(layers.statics))
    program = in_blocks(program, layers.params, blocks)
    dense, dense_values, at = unstacked(program, layers.params), first_values(batches), 0

    def work(g: int, leaves: dict[str, Any], values: list[Any], _: Tell) -> dict[str, Any]:
        nonlocal dense_values, at
        while at < g:  # blocks that a run before has finished
            dense_values, at = advance(program, at, dense, dense_values), at + 1
        seen = observed(program, g, leaves, values, _SQUARES)
        grids = {}
        for unit in program.groups[g]:
            name = name_of(unit)
            grids[name] = _Grid.of(layers.layer(unit, leaves[name], seen[name]), clip)
        targets = advance(program, g, dense, dense_values)
        weights: list[Any] = [None] * len(targets)
        if loss is not None:
            weights = _fisher(program, g, dense, targets, batches, loss, _tree(fn, params, batches))
        codes = _learn(program, g, leaves, grids, values, targets, weights, steps, learning_rate)
        dense_values, at = targets, g + 1
        return {
            name: grid.layer.stored(codes[name], grid.scale, grid.zero)
            for name, grid in grids.items()
        }

    about = ["brecq", blocks, loss is None, steps, learning_rate, clip]
    return walk(
        program,
        layers.params,
        batches,
        work,
        identity=[about, sorted(layers.statics.items())],
        resume=resume,
        progress=progress,
    )


# One instance, because compiled functions are remembered by their statistic.
_SQUARES = Statistic(
    "squares", lambda rows: jnp.sum(jnp.square(rows.astype(jnp.float32)), -2), lambda k: (k,)
)


class _Grid(NamedTuple):
    """The numbers that the weights of a layer can become."""

    layer: Layer
    scale: jax.Array
    zero: jax.Array | None

    @classmethod
    def of(cls, layer: Layer, clip: bool) -> "_Grid":
        integers_only("brecq", layer.name, layer.static["qtype"])
        squares = layer.statistic(1)
        if not bool(jnp.isfinite(squares).all()):
            raise ValueError(
                f"the activations of {layer.name!r} are not finite; the batches, or the function, "
                "hold NaN or infinity"
            )
        w = layer.weight.astype(jnp.float32)
        grain = {name: layer.static[name] for name in ("axis", "group_size", "qtype")}
        if not clip:
            return cls(layer, *full_scales(w, **grain))
        floor = 1e-6 * squares.mean(-1, keepdims=True) + 1e-30
        importance = layer.matrices.features(jnp.maximum(squares, floor))
        return cls(layer, *searched_scales(w, importance, **grain))

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        return self.layer.weight, self.scale, self.zero

    @property
    def static(self) -> tuple[Axes, Axes | None, IntType]:
        static = self.layer.static
        return static["axis"], static["group_size"], static["qtype"]


def _learn(
    program: Program,
    g: int,
    leaves: dict[str, Any],
    grids: dict[str, _Grid],
    values: list[Any],
    targets: list[Any],
    weights: list[Any],
    steps: int,
    learning_rate: float,
) -> dict[str, jax.Array]:
    """Whole codes for every layer of block `g`."""
    units, segment = program.segment(g)
    rest = {name_of(u): leaves[name_of(u)] for u in units if name_of(u) not in grids}
    arrays = {name: grid.arrays for name, grid in grids.items()}
    static = {name: grid.static for name, grid in grids.items()}
    run, size = accelerate(segment), sum(grid.layer.weight.size for grid in grids.values())

    def spread(name: str, arrays: Any) -> tuple[jax.Array, jax.Array, Any]:
        """Weights, and the scale and zero point of each."""
        (w, scale, zero), (axis, group_size, _) = arrays[name], static[name]
        each = lambda part: expand(part.astype(jnp.float32), w.shape, axis, group_size)
        return w.astype(jnp.float32), each(scale), 0.0 if zero is None else each(zero)

    def real(name: str, arrays: Any) -> jax.Array:
        """The weights in units of their scale, zero point added."""
        w, scale, offset = spread(name, arrays)
        return w / scale + offset

    def chosen(codes: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {n: jnp.clip(c, static[n][2].low, static[n][2].high) for n, c in codes.items()}

    @jax.jit
    def error(codes: Any, arrays: Any, rest: Any, values: Any, target: Any, weight: Any) -> Any:
        new = {}
        for name, c in codes.items():
            _, scale, offset = spread(name, arrays)
            new[name] = ((c - offset) * scale).astype(arrays[name][0].dtype)
        pairs = zip(_floats(run(rest | new, values)), _floats(target), strict=True)
        parts = [jnp.square(z.astype(jnp.float32) - want.astype(jnp.float32)) for z, want in pairs]
        if weight is not None:
            parts = [part * f for part, f in zip(parts, weight, strict=True)]
        return sum(map(jnp.sum, parts), jnp.float32(0))

    def total(codes: Any) -> float:
        given = zip(values, targets, weights, strict=True)
        return sum(float(error(codes, arrays, rest, *batch)) for batch in given)

    @jax.jit
    def begin(arrays: Any) -> tuple[Any, Any]:
        found = {name: real(name, arrays) for name in arrays}
        nearest = chosen({name: jnp.round(r) for name, r in found.items()})
        return nearest, {name: start(r - jnp.floor(r)) for name, r in found.items()}

    nearest, v = begin(arrays)
    of_nearest = total(nearest)
    # In units of what nearest rounding costs a weight, as in AdaRound.
    unit = max(of_nearest / len(values) / size, 1e-30)
    tx = optax.adam(learning_rate)

    def objective(v: Any, t: Any, unit: Any, arrays: Any, *batch: Any) -> jax.Array:
        ups = {name: soft(part) for name, part in v.items()}
        codes = chosen({name: jnp.floor(real(name, arrays)) + up for name, up in ups.items()})
        pulls = sum((pull(up, t) for up in ups.values()), jnp.float32(0))
        return error(codes, arrays, *batch) / unit + pulls

    # Not one scan: XLA's convolutions are slow in loops on CPUs.
    @jax.jit
    def step(v: Any, state: Any, t: Any, unit: Any, arrays: Any, *batch: Any) -> Any:
        updates, state = tx.update(jax.grad(objective)(v, t, unit, arrays, *batch), state)
        return optax.apply_updates(v, updates), state

    state = tx.init(v)
    for i in range(steps):
        b = i % len(values)
        batch = rest, values[b], targets[b], weights[b]
        v, state = step(v, state, jnp.float32(i / steps), jnp.float32(unit), arrays, *batch)
    up = {name: soft(part) >= 0.5 for name, part in v.items()}
    learnt = chosen({name: jnp.floor(real(name, arrays)) + up[name] for name in arrays})
    return learnt if total(learnt) < of_nearest else nearest


def _floats(values: Iterable[Any]) -> list[Any]:
    return [x for x in values if jnp.issubdtype(x.dtype, jnp.floating)]


def _tree(fn: Callable[[Any, Any], Any], params: Any, batches: list[Any]) -> Any:
    return jax.tree.structure(eqx.filter_eval_shape(accelerate(fn), params, batches[0]))


def _fisher(
    program: Program,
    g: int,
    dense: dict[str, Any],
    targets: list[Any],
    batches: list[Any],
    loss: Loss,
    tree: Any,
) -> list[list[jax.Array]]:
    """The squared gradient of the loss to what block `g` returns, for each batch."""
    after = [program.segment(h)[1] for h in range(g + 1, len(program.groups))]
    results: list[Any] = list(program.jaxpr.outvars)
    fixed = [v for v in results if isinstance(v, Literal) or v not in program.moving]
    known = dict(zip(map(id, fixed), constants(program, dense, fixed)))

    def task(floats: list[Any], others: list[Any], dense: dict[str, Any], batch: Any) -> jax.Array:
        given = iter(floats), iter(others)
        values = [next(given[0 if f else 1]) for f in is_float]
        for run in after:
            values = accelerate(run)(dense, values)
        found = dict(zip(program.live[-1], values))
        leaves = [known[id(v)] if id(v) in known else found[v] for v in results]
        out = loss(jax.tree.unflatten(tree, leaves), batch)
        if jnp.shape(out) != ():
            raise ValueError(f"loss returns a scalar; got the shape {jnp.shape(out)}")
        return out

    is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in targets[0]]
    gradient = eqx.filter_jit(jax.grad(task))
    squares = []
    for target, batch in zip(targets, batches):
        others = [x for x, f in zip(target, is_float) if not f]
        found = gradient(_floats(target), others, dense, batch)
        squares.append([jnp.square(x.astype(jnp.float32)) for x in found])
    count = sum(x.size for part in squares for x in part)
    mean = sum(float(x.sum()) for part in squares for x in part) / max(count, 1)
    if not 0 < mean < float("inf"):
        raise ValueError(
            f"the squared gradient of the loss to what {name_of(program.groups[g][-1])!r} leads to "
            f"has the mean {mean:g}; the loss must depend on it and be finite"
        )
    return [[x / mean for x in part] for part in squares]
