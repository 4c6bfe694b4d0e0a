"""Activation functions that do not matter: found, replaced by a line, and the layers merged."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._layout import is_weight
from jaxcompress._paths import leaves_with_paths, rebuild
from jaxcompress._program import Program, is_array, name_of, trace
from jaxcompress._rules import Patterns, matched
from jaxcompress._sequential import first_values, traced, unstacked
from jaxcompress.arrays import is_compressed
from jaxcompress.prune._between import Between, along, betweens, evaluate, merged, sizes, without

__all__ = ["ActivationRow", "Activations", "activations", "remove_activations"]

Fn = Callable[[Any, Any], Any]


class ActivationRow(NamedTuple):
    """One activation function between two layers; see `activations`.

    >>> import jaxcompress as jc
    >>> row = jc.prune.ActivationRow("a/kernel", "b/kernel", "max", 0.1, False, "")
    >>> row.change
    0.1
    """

    before: str
    after: str
    steps: str
    change: float
    merges: bool
    why: str


class Activations(tuple[ActivationRow, ...]):
    """The rows of `activations`, those that matter least first; prints as a table.

    >>> import jaxcompress as jc
    >>> jc.prune.Activations([jc.prune.ActivationRow("a", "b", "max", 0.1, False, "why")])
    before  after  steps  change  merges  why
    a       b      max    0.1000  no      why
    """

    def __str__(self) -> str:
        head = ("before", "after", "steps", "change", "merges", "why")
        rows = [
            (r.before, r.after, r.steps, f"{r.change:.4f}", "yes" if r.merges else "no", r.why)
            for r in self
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]]).rstrip()
            for row in (head, *rows)
        ]
        return "\n".join(lines)

    __repr__ = __str__


def activations(
    fn: Fn, params: Any, batches: Iterable[Any], *, rules: Patterns | None = None
) -> Activations:
    """How much each activation function between two linear layers matters.

    `h = s(z)` of each channel is replaced by the line `a z + c` that is nearest to it over
    the batches, `min sum (h - a z - c)^2`; its `change` is then `|f' - f| / |f|`, of all that
    the function returns. Activation functions are found by tracing: steps of single
    elements that lead from one product, and its bias, to one other product and nowhere
    else. A norm with running averages is such a step too. Two layers with nothing between
    them are found as well, with a change of zero.

    Args:
      fn: called as `fn(params, batch)`.
      params: dense leaves.
      batches: of one shape; read once and kept.
      rules: patterns of the weights before an activation function; all if None.

    Returns:
      An `Activations`: a tuple of `ActivationRow`, those of least change first. `merges`
      says whether one matrix would be smaller than the two, `why` compares them.

    Raises:
      ValueError: no batches, batches of several shapes, a pattern that matches nothing, or
        a function that returns NaN or infinity.
      TypeError: a compressed leaf.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = {"a": jnp.eye(4), "b": jnp.eye(4), "c": jnp.eye(4)}
    >>> def fn(p, x):
    ...     return jax.nn.relu(jax.nn.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
    >>> jc.prune.activations(fn, params, [jnp.abs(jax.random.normal(jax.random.key(0), (64, 4)))])
    before  after  steps  change  merges  why
    b       c      max    0.0000  yes     16 numbers in one matrix, 32 in two
    a       b      tanh   0.1661  yes     16 numbers in one matrix, 32 in two
    """
    batches = list(batches)
    found = _find(fn, params, batches, rules)
    changes = found.changes(_outputs(found, batches), batches)
    rows = [_row(b, change) for b, change in zip(found.betweens, changes)]
    return Activations(sorted(rows, key=lambda row: row.change))


def remove_activations(
    fn: Fn,
    params: Any,
    batches: Iterable[Any],
    *,
    count: int | None = None,
    tolerance: float | None = None,
    rules: Patterns | None = None,
) -> tuple[Fn, Any]:
    """Removes the activation functions that matter least, and merges the layers around them.

    One after the other, that of the least change (see `activations`) is replaced by its
    line `a z + c`, which goes into the layer before it, `w1' = w1 a`, `b1' = b1 a + c`. If
    it has fewer numbers, the product `w1' w2` becomes one layer; otherwise both stay,
    linear now. What is left is measured anew after each.

    Args:
      fn, params, batches, rules: as for `activations`.
      count: how many to remove; or
      tolerance: remove while all that the function returns has changed by no more,
        `|f' - f| / |f|` over the batches.

    Returns:
      `(new_fn, new_params)`, as `shrink` does: the latter a tree like `params`, where a
      merged matrix is in the place of the first and of the second an axis has size zero.
      `new_fn` traces `fn` wherever it is traced, so call it under `jit`; it takes batches
      of any size.

    Raises:
      ValueError: neither or both of count and tolerance; fewer than `count` are there, or
        none within `tolerance`, with their table; as for `activations`.
      TypeError: a compressed leaf; remove first, then compress.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = {"a": jnp.ones((2, 8)), "b": jnp.ones((8, 1))}
    >>> fn, x = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> linear, merged = jc.prune.remove_activations(fn, params, [x], tolerance=0.01)
    >>> merged["a"].tolist(), merged["b"].shape      # x is positive: relu did nothing
    ([[8.0], [8.0]], (0, 1))
    >>> linear(merged, x).tolist() == fn(params, x).tolist()
    True

    Dror et al., 2021, Layer Folding: Neural Network Depth Reduction using Activation
    Linearization, arXiv:2106.09309.
    """
    if (count is None) == (tolerance is None):
        raise ValueError("remove_activations takes one of count and tolerance")
    if (count is not None and count < 1) or (tolerance is not None and tolerance < 0):
        raise ValueError(
            f"count is 1 or more, tolerance not negative; got count={count}, tolerance={tolerance}"
        )
    batches = list(batches)
    before: Any = None
    removed = 0
    while count is None or removed < count:
        found = _find(fn, params, batches, rules)
        before = _outputs(found, batches) if before is None else before
        changes = found.changes(before, batches)
        best = int(np.argmin(changes)) if changes else None
        if best is None or (tolerance is not None and changes[best] > tolerance):
            break
        fn, params = _removed(fn, params, found, best)
        removed += 1
    if removed == 0 or (count is not None and removed < count):
        table = activations(fn, params, batches, rules=rules)
        asked = f"{count} to remove" if count is not None else f"one within {tolerance}"
        raise ValueError(f"there are {removed} activation functions, not {asked}:\n{table}")
    return fn, params


@dataclasses.dataclass(frozen=True)
class _Found:
    """What can be removed of a program, and the line of each: factors and shifts."""

    program: Program
    leaves: dict[str, Any]
    betweens: list[Between]
    lines: list[tuple[np.ndarray, np.ndarray]]

    def changes(self, before: list[Any], batches: list[Any]) -> list[float]:
        """What replacing each alone changes; compiled once for all of them."""

        @jax.jit
        def run(leaves: Any, values: Any, lines: Any, which: Any) -> Any:
            swaps = {
                b.inner: _blended(b, line, which == i)
                for i, (b, line) in enumerate(zip(self.betweens, lines))
                if b.steps
            }
            return evaluate(self.program, leaves, values, swaps)

        changes = []
        for i in range(len(self.betweens)):
            error = size = 0.0
            for values, want in zip(first_values(batches), before):
                out = run(self.leaves, values, self.lines, i)
                for a, b in zip(out, want):
                    if jnp.issubdtype(b.dtype, jnp.inexact):
                        a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
                        error, size = error + ((a64 - b64) ** 2).sum(), size + (b64**2).sum()
            if not np.isfinite(size):
                raise ValueError("the function returns NaN or infinity for these batches")
            if not np.isfinite(error):
                error = np.inf  # the worst there is
            changes.append(float(np.sqrt(error / size)) if size else float(error > 0))
        return changes


def _blended(b: Between, line: Any, chosen: Any) -> Any:
    """The line where it is chosen, else what the steps make."""

    def swap(env: Any) -> Any:
        z, plain = env[b.outer], env[b.inner]
        factor, shift = (along(part, z.ndim, b.channels) for part in line)
        return jnp.where(chosen, (z * factor + shift).astype(plain.dtype), plain)

    return [b.outer, b.inner], swap


def _find(fn: Fn, params: Any, batches: list[Any], rules: Patterns | None) -> _Found:
    for path, leaf in leaves_with_paths(params):
        if is_compressed(leaf):
            raise TypeError(f"{path!r} is a {type(leaf).__name__}: remove first, then compress")
    # A matrix that was merged away has no numbers left.
    wanted = {path for path, leaf in leaves_with_paths(params) if is_weight(leaf) and np.size(leaf)}
    named = wanted if rules is None else matched(params, rules)
    program = traced(fn, params, batches, wanted, skip_unmet=True)
    found = [b for b in betweens(program) if b.first.unit[0] in named]
    found = [b for b in found if b.steps or _merges(b)]
    leaves = unstacked(program, params)
    return _Found(program, leaves, found, _lines(program, leaves, found, first_values(batches)))


def _outputs(found: _Found, batches: list[Any]) -> list[Any]:
    run = jax.jit(lambda leaves, values: evaluate(found.program, leaves, values, {}))
    return [run(found.leaves, values) for values in first_values(batches)]


def _lines(
    program: Program, leaves: dict[str, Any], found: list[Between], batches: list[Any]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`a` and `c` of each channel that make `sum (h - a z - c)^2` least."""

    @jax.jit
    def moments(leaves: Any, values: Any) -> Any:
        outs = [v for b in found for v in (b.outer, b.inner)]
        pairs = iter(evaluate(program, leaves, values, {}, outs))
        return [_moments(z, h, b.channels) for b, z, h in zip(found, pairs, pairs)]

    total: list[Any] = [None] * len(found)
    for values in batches:
        for i, seen in enumerate(moments(leaves, values)):
            wide = [np.asarray(part, np.float64) for part in seen]
            total[i] = wide if total[i] is None else _joined(total[i], wide)
    lines = []
    for _, z, h, zz, zh, apart in total:
        factor = np.where(zz > 0, zh / np.where(zz > 0, zz, 1.0), 0.0)
        factor = np.where(apart == 0, 1.0, factor)  # exactly, where it does nothing
        lines.append((factor, np.where(apart == 0, 0.0, h - factor * z)))
    return lines


def _moments(z: jax.Array, h: jax.Array, channels: int) -> tuple[jax.Array, ...]:
    """Of each channel: count, means, sums of squares about them, and the largest `|h - z|`."""
    rows = lambda x: jnp.moveaxis(x, channels, -1).reshape(-1, x.shape[channels])
    z, h = rows(z).astype(jnp.float32), rows(h).astype(jnp.float32)
    z0, h0 = z.mean(0), h.mean(0)
    zc, hc = z - z0, h - h0
    count = jnp.full(z0.shape, z.shape[0], jnp.float32)
    return count, z0, h0, (zc * zc).sum(0), (zc * hc).sum(0), jnp.abs(h - z).max(0)


def _joined(a: Any, b: Any) -> list[np.ndarray]:
    """The moments of two sets together (Chan et al., 1983)."""
    n = a[0] + b[0]
    dz, dh, w = b[1] - a[1], b[2] - a[2], a[0] * b[0] / n
    means = [a[1] + dz * b[0] / n, a[2] + dh * b[0] / n]
    return [n, *means, a[3] + b[3] + w * dz * dz, a[4] + b[4] + w * dz * dh, np.maximum(a[5], b[5])]


def _merges(b: Between) -> bool:
    found = sizes(b)
    return found is not None and found[0] * found[2] < found[1] * (found[0] + found[2])


def _row(b: Between, change: float) -> ActivationRow:
    found = sizes(b)
    why = "a convolution is not merged"
    if found is not None:
        k, m, n = found
        why = f"{k * n} numbers in one matrix, {m * (k + n)} in two"
    before, after = name_of(b.first.unit), name_of(b.second.unit)
    return ActivationRow(before, after, " ".join(b.steps) or "-", change, _merges(b), why)


def _removed(fn: Fn, params: Any, found: _Found, index: int) -> tuple[Fn, Any]:
    """The function and the parameters without one activation function."""
    b = found.betweens[index]
    pair = name_of(b.first.unit), name_of(b.second.unit)
    merge, bias = _merges(b), None if b.bias is None else name_of(b.bias)
    new, shift = _new_leaves(found, index)
    old = leaves_with_paths(params)
    small = rebuild(params, [new.get(path, leaf) for path, leaf in old])
    shapes = {path: leaf.shape for path, leaf in new.items()}
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, params
    )

    def linear(params: Any, batch: Any) -> Any:
        leaves = {path: leaf for path, leaf in leaves_with_paths(params) if hasattr(leaf, "dtype")}
        for path, shape in shapes.items():
            if path not in leaves or leaves[path].shape != shape:
                there = leaves[path].shape if path in leaves else "nothing"
                raise ValueError(f"{path!r} must have the shape {shape}; it is {there}")
        program = trace(fn, like, batch, pair)
        [here] = [c for c in betweens(program) if (c.first.unit[0], c.second.unit[0]) == pair]
        swaps = merged(here, pair[0], bias, shift, leaves) if merge else without(here, shift)
        values = [x for x in jax.tree.leaves(batch) if is_array(x)]
        outs = evaluate(program, leaves, values, swaps)
        return jax.tree.unflatten(jax.tree.structure(eqx.filter_eval_shape(fn, like, batch)), outs)

    return linear, small


def _new_leaves(found: _Found, index: int) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """The leaves that change, and what is left to add where the first layer has no bias."""
    b, (factor, shift) = found.betweens[index], found.lines[index]
    one, two = name_of(b.first.unit), name_of(b.second.unit)
    exact = lambda name: np.asarray(found.leaves[name], np.float64)
    w1 = exact(one)
    new = {one: w1 * factor.reshape([-1 if d == b.first.output else 1 for d in range(w1.ndim)])}
    if b.bias is not None:
        shift = exact(name_of(b.bias)).reshape(-1) * factor + shift
    if _merges(b):
        turned = lambda w, p: w if p.contract == 0 else w.T
        w1, w2 = turned(new[one], b.first), turned(exact(two), b.second)
        shift = shift @ w2
        new = {one: turned(w1 @ w2, b.first), two: turned(np.zeros((0, w2.shape[1])), b.second)}
    elif b.bias is not None:
        shift = shift.reshape(exact(name_of(b.bias)).shape)
    if b.bias is not None:
        new[name_of(b.bias)] = shift
    cast = {name: jnp.asarray(x, found.leaves[name].dtype) for name, x in new.items()}
    return cast, jnp.asarray(shift, jnp.float32) if b.bias is None else None
