"""`shrink`: remove channels that are pruned, and everything that goes with them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress._model import Model, arrays_of, trace_model
from jaxcompress._paths import leaves_with_paths, rebuild, subtrees
from jaxcompress.arrays import is_compressed
from jaxcompress.prune._axes import Frame, follow
from jaxcompress.prune._axes_rules import Sum
from jaxcompress.prune._biases import distribute
from jaxcompress.prune._constants import Known, constants
from jaxcompress.prune._smaller import Plan, plan_of, run, take
from jaxcompress.prune._ties import Stay, Ties
from jaxcompress.prune._zeroing import apply, complete_checked, is_nothing

__all__ = ["Removable", "Removal", "removable", "shrink"]


class Removal(NamedTuple):
    """Of one axis of one leaf: its size, how many indices are masked, how many can go.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> masks = {"a": jnp.array([[True, False]])}
    >>> fn = lambda p, x: x @ p["a"]
    >>> [row] = jc.prune.removable(fn, {"a": jnp.ones((1, 2))}, masks, jnp.ones((1, 1)))
    >>> row.path, row.axis, row.masked, row.removed, row.why
    ('a', -1, 1, 0, 'the function returns it')
    """

    path: str
    axis: int
    size: int
    masked: int
    removed: int
    why: str


class Removable(tuple[Removal, ...]):
    """The rows of `removable`, one `Removal` each; prints as a table.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 1))}
    >>> masks = {"a": jnp.array([[True, False]] * 2), "b": jnp.ones((2, 1), bool)}
    >>> rows = jc.prune.removable(lambda p, x: x @ p["a"] @ p["b"], params, masks, jnp.ones((1, 2)))
    >>> {(row.path, row.axis): row.removed for row in rows}
    {('a', -1): 1, ('b', -2): 1}
    """

    def __str__(self) -> str:
        head = ("path", "axis", "size", "masked", "removed", "why the rest stays")
        rows = [head, *(tuple(map(str, row)) for row in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]]).rstrip()
            for row in rows
        ]
        return "\n".join(lines)

    __repr__ = __str__


def shrink(
    fn: Callable[..., Any], params: Any, masks: Any, *example: Any
) -> tuple[Callable[..., Any], Any]:
    """Removes what `masks` drop in whole slices: the same function at smaller dense sizes.

    `fn` is traced. Its operations say which axes of which leaves shrink together, through
    residual sums, concatenation, reshapes, normalization, attention heads and grouped
    convolutions; names say nothing. A channel can go where it is a constant for every
    input once the masks are applied. What a constant other than zero adds to the next
    layer (an activation of a bias, say) is added to that layer's bias, or if it has none,
    or at the border of an image it is another, by `small_fn`. Where a channel cannot go
    it stays, masked; `removable` says why. So that, up to float rounding,

        small_fn(small_params, *args) = fn(apply(params, masks), *args)

    Args:
      fn: called as `fn(params, *args)`; `model.apply`, or a function of an NNX state.
      params: dense leaves.
      masks: what `masks` or `mask` returned: True keeps, `optax.MaskedNode()` where
        nothing is pruned. Bias and normalization need none.
      *example: the other arguments; `jax.ShapeDtypeStruct`s will do. Later ones may have
        other batch sizes; two is a good size for an example.

    Returns:
      `(small_fn, small_params)`, the latter a tree like `params`. `small_fn` traces `fn`
      wherever it is traced, so call it under `jit`. It has gradients, custom ones too.

    Raises:
      ValueError: no mask drops a whole slice; nothing can go, with the reasons; a mask of
        another shape than its leaf. Later, arguments for which `fn` takes other steps.
      TypeError: a compressed leaf; shrink first, then compress.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = {"a": jnp.array([[1.0, 5.0], [2.0, 6.0]]), "b": jnp.array([[3.0], [4.0]])}
    >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> masks = jc.prune.mask(params, jc.prune.channel(), 0.5, rules=["a"])
    >>> small_fn, small = jc.prune.shrink(fn, params, masks, jnp.ones((1, 2)))
    >>> small["a"].shape, small["b"].shape
    ((2, 1), (1, 1))
    >>> small_fn(small, jnp.ones((3, 2))).tolist()
    [[44.0], [44.0], [44.0]]

    Fang et al., 2023, DepGraph: Towards Any Structural Pruning, arXiv:2301.12900.
    """
    found = _analyse(fn, params, masks, example)
    if not found.gone.any():
        raise ValueError(f"nothing that the masks drop can be removed:\n{found.report()}")
    kept = dict(zip(found.model.paths, found.plan.kept[len(found.model.consts) :]))

    def smaller(path: str, leaf: Any) -> Any:
        if path in found.biases:
            leaf = leaf + found.biases[path].astype(leaf.dtype)
        return take(leaf, kept[path]) if path in kept else leaf

    small = [smaller(path, leaf) for path, leaf in leaves_with_paths(found.masked)]
    shapes = {
        path: x.shape for path, x in leaves_with_paths(rebuild(params, small)) if path in kept
    }
    like, plan = _without_values(params), found.plan

    def shrunk(params: Any, *args: Any) -> Any:
        given = {path: leaf for path, leaf in leaves_with_paths(params) if path in shapes}
        for path, shape in shapes.items():
            if path not in given or given[path].shape != shape:
                there = given[path].shape if path in given else "nothing"
                raise ValueError(f"{path!r} must have the shape {shape}; it is {there}")
        dtypes = {path: leaf.dtype for path, leaf in given.items()}
        model = trace_model(fn, _with_dtypes(like, dtypes), args)
        inputs = [*(given[path] for path in model.paths), *arrays_of(args)]
        return model.result(run(model.jaxpr.jaxpr, model.consts, plan, inputs))

    return shrunk, rebuild(params, small)


def removable(fn: Callable[..., Any], params: Any, masks: Any, *example: Any) -> Removable:
    """What `shrink` would remove of each axis of each leaf, and why the rest stays.

    Args:
      fn, params, masks, *example: as for `shrink`.

    Returns:
      A `Removable`: a tuple of `Removal` rows that prints as a table.

    Raises:
      ValueError, TypeError: as `shrink`, except that nothing has to go.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"a": jnp.array([[1.0, 5.0], [2.0, 6.0]]), "b": jnp.array([[3.0], [4.0]])}
    >>> masks = jc.prune.mask(params, jc.prune.channel(), 0.5, rules=["a"])
    >>> jc.prune.removable(lambda p, x: x @ p["a"] @ p["b"], params, masks, jnp.ones((1, 2)))
    path  axis  size  masked  removed  why the rest stays
    a     -1    2     1       1
    b     -2    2     0       1
    """
    return _analyse(fn, params, masks, example).report()


def _without_values(params: Any) -> Any:
    """Shapes instead of arrays, so that no parameter is held."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x
    return jax.tree.map(shape, params)


def _with_dtypes(params: Any, dtypes: dict[str, Any]) -> Any:
    leaves = [
        jax.ShapeDtypeStruct(x.shape, dtypes[path]) if path in dtypes else x
        for path, x in leaves_with_paths(params)
    ]
    return rebuild(params, leaves)


@dataclasses.dataclass(frozen=True)
class _Analysis:
    """What goes of a masked model. `slices[path][axis]` are the indices that are masked."""

    model: Model
    masked: Any
    slices: dict[str, list[np.ndarray]]
    frame: Frame
    gone: np.ndarray
    reasons: Callable[[np.ndarray], list[str]]
    plan: Plan
    biases: dict[str, np.ndarray]  # to add to parameters

    def report(self) -> Removable:
        rows = []
        for path, v in zip(self.model.paths, self.frame.jaxpr.invars):
            for d, axis in enumerate(self.frame.axes[v]):
                gone = self.gone[axis]
                masked = self.slices[path][d] if path in self.slices else np.zeros_like(gone)
                if gone.any() or masked.any():
                    why = "; ".join(self.reasons(axis[masked & ~gone]))
                    counts = int(masked.sum()), int(gone.sum())
                    rows.append(Removal(path, d - len(self.frame.axes[v]), len(axis), *counts, why))
        return Removable(rows)


def _analyse(fn: Callable[..., Any], params: Any, masks: Any, example: Any) -> _Analysis:
    for path, leaf in leaves_with_paths(params):
        if is_compressed(leaf):
            raise TypeError(f"{path!r} is a {type(leaf).__name__}: shrink first, then compress")
    slices = _masked_slices(params, masks)
    masked = apply(params, masks)
    model = trace_model(fn, params, example)
    jaxpr, count = model.jaxpr.jaxpr, len(model.paths)
    ties, sums = Ties(), list[Sum]()
    inputs = [tuple(map(ties.new, v.aval.shape)) for v in jaxpr.invars]
    frame = follow(jaxpr, inputs, ties, sums, model.paths)
    for arguments in inputs[count:]:
        for axis in arguments:
            ties.stay(axis, "the function takes it as an argument")
    for v in jaxpr.outvars:
        for axis in frame.of(v):
            ties.stay(axis, "the function returns it")
    of_leaf = dict(zip(model.paths, inputs))
    hits = [
        axis[which] for path, found in slices.items() for axis, which in zip(of_leaf[path], found)
    ]

    leaves = [leaf for _, leaf in leaves_with_paths(masked) if hasattr(leaf, "dtype")]
    unknown = [Known(None, False)] * (len(jaxpr.invars) - count)

    @jax.jit
    def evaluate(consts: Any, leaves: Any, gone: Any) -> Any:
        known = [*map(Known, leaves), *unknown]
        found = constants(jaxpr, consts, known, dict(zip(places, gone)))
        return [[found.known[p], found.removed.get(p)] for p in places]

    places = [found.place for found in sums]
    nothing = [tuple(np.zeros(len(axis), bool) for axis in found.atoms) for found in sums]
    known = [which for which, _ in evaluate(model.consts, leaves, nothing)]
    stays = [
        Stay(axis[~np.asarray(which)], f"{found.what} sums it, and it is not a constant there")
        for found, flags in zip(sums, known)
        for axis, which in zip(found.atoms, flags)
    ]
    gone, roots, why = ties.solve(np.concatenate(hits), stays)

    removed = [tuple(gone[axis] for axis in found.atoms) for found in sums]
    removed_sums = [value for _, value in evaluate(model.consts, leaves, removed)]
    adds = {place: np.asarray(x) for place, x in zip(places, removed_sums) if x is not None}
    biases, added = distribute(jaxpr, dict(zip(jaxpr.invars, model.paths)), adds)
    reasons = lambda atoms: sorted({why[int(root)] for root in roots[atoms]})
    plan = plan_of(frame, gone, added)
    return _Analysis(model, masked, slices, frame, gone, reasons, plan, biases)


def _masked_slices(params: Any, masks: Any) -> dict[str, list[np.ndarray]]:
    """Of each masked leaf and axis, the indices that are masked as a whole."""
    whole = subtrees(complete_checked(masks, params), params)
    found = {}
    for (path, _), mask in zip(leaves_with_paths(params), whole):
        if not is_nothing(mask):
            kept, dims = np.asarray(mask), range(np.ndim(mask))
            found[path] = [np.logical_not(kept.any(tuple(o for o in dims if o != d))) for d in dims]
    if not any(which.any() for axes in found.values() for which in axes):
        raise ValueError(
            "the masks drop no whole slice of any leaf, so no array can become smaller; make "
            "them with channel(), row() or column(), or pack() what they leave"
        )
    return found
