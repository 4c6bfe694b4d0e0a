"""Fewer layers: those of a scan that change what goes through them least."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.extend.core.primitives import scan_p

from jaxcompress._model import Model, arrays_of, trace_model
from jaxcompress._paths import leaves_with_paths, map_with_paths, subtrees
from jaxcompress._program import body_of, step
from jaxcompress._quax import scan_sizes
from jaxcompress.arrays import is_compressed

__all__ = ["block_influence", "drop_layers"]

Stack = tuple[str | None, ...]  # what a scan runs over: paths of parameters, None for others


def block_influence(fn: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any]) -> Any:
    """How much each layer of a scan changes what goes through it: `1 - E[cos(x, layer(x))]`.

    Layers are found by tracing: a `lax.scan` (that of `nn.scan`, too) over the leading axis
    of parameters. `x` is its carry, of two dimensions or more; the cosine is that along the
    last axis, the mean over all the others and all `batches`.

    Args:
      fn: called as `fn(params, batch)`.
      params: dense leaves, some of which a scan runs over.
      batches: inputs, one in memory at a time.

    Returns:
      A tree like `params`, with `[layers]`, float32, for each leaf that a scan runs over, None
      for the others. Leaves of one scan have the same scores.

    Raises:
      ValueError: no batches; no scan over parameters, or one without such a carry.
      TypeError: a compressed leaf.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> def fn(params, x):
    ...     return jax.lax.scan(lambda x, w: (x + x @ w, None), x, params["layers"])[0]
    >>> turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> params = {"layers": jnp.stack([turn, 0 * turn, 2 * turn])}
    >>> jc.prune.block_influence(fn, params, [jnp.ones((4, 2))])["layers"].round(2)
    Array([0.29, 0.  , 0.55], dtype=float32)

    Men et al., 2024, ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect, arXiv:2403.03853.
    """
    run = eqx.filter_jit(lambda params, batch: _influences(fn, params, batch))
    total, count = None, 0
    for batch in batches:
        if total is None:
            _refuse_compressed(params)
        found, count = run(params, batch), count + 1
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("there are no batches to learn from")
    mean = {path: value / count for path, value in total.items()}
    return map_with_paths(lambda path, _: mean.get(path), params)


def drop_layers(
    fn: Callable[..., Any], params: Any, scores: Any, drop: int, *example: Any
) -> tuple[Callable[..., Any], Any]:
    """Takes the layers of least score out of the scans over parameters.

    `fn` is traced, as for `shrink`, and the program that is returned is the same one with
    shorter scans: `nn.scan` with a fixed length takes no other. Where `fn` reads the number
    of layers from its parameters, as a bare `lax.scan` does, `fn` takes the new ones as well.
    What a scan runs over besides parameters (keys of dropout, say) is taken at the layers
    that stay.

    Args:
      fn: called as `fn(params, *args)`.
      params: dense leaves.
      scores: a tree like `params`, as from `block_influence`: `[layers]` for leaves that a scan
        runs over, those of one scan alike; None elsewhere, or for scans to be left alone.
      drop: how many go, of all scans together; each keeps one.
      *example: the other arguments; `jax.ShapeDtypeStruct`s will do.

    Returns:
      `(small_fn, small_params)`; `small_fn` traces `fn` wherever it is traced, so call it
      under `jit`.

    Raises:
      ValueError: no scan over parameters; scores of another length, or that differ in one
        scan; more to drop than there is; parameters of a scan, or what it returns of each
        layer, that are used elsewhere in `fn`.
      TypeError: a compressed leaf; drop layers first, then compress.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> def fn(params, x):
    ...     return jax.lax.scan(lambda x, w: (x + x @ w, None), x, params["layers"])[0]
    >>> params, x = {"layers": jnp.stack([jnp.eye(2), jnp.zeros((2, 2))])}, jnp.ones((4, 2))
    >>> scores = jax.tree.map(lambda w: jnp.abs(w).sum((1, 2)), params)
    >>> small_fn, small = jc.prune.drop_layers(fn, params, scores, 1, x)
    >>> small["layers"].shape, bool((small_fn(small, x) == fn(params, x)).all())
    ((1, 2, 2), True)

    Men et al., 2024, ShortGPT: Layers in Large Language Models are More Redundant Than You
    Expect, arXiv:2403.03853.
    """
    _refuse_compressed(params)
    model = trace_model(fn, params, example)
    found = _Found({}, {})
    _look(model.jaxpr.jaxpr, _named(model), {}, found)
    paths = [path for path, _ in leaves_with_paths(params)]
    kept = _kept(found, dict(zip(paths, subtrees(scores, params))), drop)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x
    like = jax.tree.map(shape, params)
    cut = lambda path, x: jnp.asarray(x)[kept[path]] if path in kept else x

    def shorter(eqn: JaxprEqn, stack: Stack, values: list[Any]) -> list[Any]:
        rows = next(kept[path] for path in stack if path is not None)
        first = len(values) - len(stack)
        xs = [x[rows] if path is None else x for path, x in zip(stack, values[first:])]
        params = eqn.params | {"length": len(rows), "unroll": min(eqn.params["unroll"], len(rows))}
        return scan_p.bind(*values[:first], *xs, **params)

    def dropped(params: Any, *args: Any) -> Any:
        given = dict(leaves_with_paths(params))
        for path, rows in kept.items():
            if path not in given or given[path].shape[:1] != (len(rows),):
                there = given[path].shape if path in given else "nothing"
                raise ValueError(f"{path!r} must have {len(rows)} layers; it is {there}")

        def whole(path: str, leaf: Any) -> Any:
            if path not in kept:
                return given.get(path, leaf)
            return jax.ShapeDtypeStruct(leaf.shape, given[path].dtype)

        model = trace_model(fn, map_with_paths(whole, like), args)
        names = {v: path for v, path in _named(model).items() if path in kept}
        outs = _evaluate(
            model.jaxpr, [*(given[p] for p in model.paths), *arrays_of(args)], names, shorter
        )
        return model.result(outs)

    return dropped, map_with_paths(cut, params)


def _named(model: Model) -> dict[Var, str]:
    return dict(zip(model.jaxpr.jaxpr.invars, model.paths))


def _stack_of(eqn: JaxprEqn, names: Mapping[Var, str]) -> Stack | None:
    """What a scan over parameters runs over; None of any other step."""
    if eqn.primitive is not scan_p:
        return None
    first = sum(scan_sizes(eqn.params))
    stack = tuple(None if isinstance(v, Literal) else names.get(v) for v in eqn.invars[first:])
    return stack if any(path is not None for path in stack) else None


class _Found(NamedTuple):
    """The scans over parameters, with their lengths, and why a parameter has to stay."""

    stacks: dict[Stack, int]
    stay: dict[str, str]


def _look(
    jaxpr: Jaxpr, names: dict[Var, str], layered: dict[Var, Stack], found: _Found
) -> list[Stack | None]:
    """Finds scans over what `names` names; `layered` is what a scan returned of each layer.

    Returns which of the results are such.
    """
    names, layered = dict(names), dict(layered)

    def refuse(inputs: Iterable[Any], what: str) -> None:
        for v in inputs:
            if not isinstance(v, Literal) and v in names:
                found.stay[names[v]] = f"it is used by {what} too"
            if not isinstance(v, Literal) and v in layered:
                why = f"what the scan returns of each layer is used by {what}"
                found.stay.update((path, why) for path in layered[v] if path is not None)

    for eqn in jaxpr.eqns:
        inner, stack = body_of(eqn), _stack_of(eqn, names)
        if inner is not None:
            pairs = [(v, w) for v, w in zip(inner.jaxpr.invars, eqn.invars)]
            pairs = [(v, w) for v, w in pairs if not isinstance(w, Literal)]
            inside = {v: names[w] for v, w in pairs if w in names}
            outs = _look(
                inner.jaxpr, inside, {v: layered[w] for v, w in pairs if w in layered}, found
            )
            layered.update((v, out) for v, out in zip(eqn.outvars, outs) if out is not None)
        elif stack is not None:
            first, carry = len(eqn.invars) - len(stack), scan_sizes(eqn.params)[1]
            refuse(eqn.invars[:first], "a scan as a whole")
            refuse((v for v in eqn.invars[first:] if v not in names), "a scan")
            found.stacks[stack] = eqn.params["length"]
            layered.update(dict.fromkeys(eqn.outvars[carry:], stack))
        else:
            refuse(eqn.invars, eqn.primitive.name)
    return [None if isinstance(v, Literal) else layered.get(v) for v in jaxpr.outvars]


def _evaluate(
    program: ClosedJaxpr,
    args: Sequence[Any],
    names: Mapping[Var, str],
    scan: Callable[[JaxprEqn, Stack, list[Any]], list[Any]],
) -> list[Any]:
    """Runs a program, with `scan(eqn, stack, values)` for each scan over what `names` names."""
    jaxpr = program.jaxpr
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *args]))
    read = lambda v: v.val if isinstance(v, Literal) else env[v]
    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        inner, stack = body_of(eqn), _stack_of(eqn, names)
        inside = {}
        if inner is not None:
            named = [None if isinstance(v, Literal) else names.get(v) for v in eqn.invars]
            inside = {v: path for v, path in zip(inner.jaxpr.invars, named) if path is not None}
        if inner is not None and inside:
            outs = _evaluate(inner, values, inside, scan)
        else:
            outs = step(eqn)(*values) if stack is None else scan(eqn, stack, values)
        env.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def _influences(fn: Callable[[Any, Any], Any], params: Any, batch: Any) -> dict[str, jax.Array]:
    """The score of each layer for one batch, by the paths of what a scan runs over."""
    model = trace_model(fn, params, (batch,))
    found: dict[Stack, list[jax.Array]] = {}

    def scored(eqn: JaxprEqn, stack: Stack, values: list[Any]) -> list[Any]:
        consts, carry = scan_sizes(eqn.params)
        body = jaxpr_as_fun(eqn.params["jaxpr"])
        states = eqn.params["jaxpr"].in_avals[consts : consts + carry]
        through = [
            i for i, x in enumerate(states) if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 1
        ]
        if not through:
            return step(eqn)(*values)

        def layer(state: list[Any], xs: list[Any]) -> tuple[list[Any], Any]:
            outs = body(*values[:consts], *state, *xs)
            changes = [1 - jnp.mean(_cosine(state[i], outs[i])) for i in through]
            return outs[:carry], (outs[carry:], sum(changes) / len(changes))

        first, reverse = values[consts : consts + carry], eqn.params["reverse"]
        state, (ys, scores) = lax.scan(layer, first, values[consts + carry :], reverse=reverse)
        found.setdefault(stack, []).append(scores)
        return [*state, *ys]

    leaves = [leaf for _, leaf in leaves_with_paths(params) if hasattr(leaf, "dtype")]
    _evaluate(model.jaxpr, [*leaves, *arrays_of(batch)], _named(model), scored)
    if not found:
        raise ValueError(
            "block_influence found no lax.scan over the leading axis of parameters that carries "
            "a floating array of two dimensions or more"
        )
    mean = {stack: jnp.mean(jnp.stack(scores), 0) for stack, scores in found.items()}
    return {path: score for stack, score in mean.items() for path in stack if path is not None}


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Along the last axis; 1 where one of both is zero, as padding is."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norm = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.where(norm > 0, jnp.sum(a * b, -1) / jnp.where(norm > 0, norm, 1.0), 1.0)


def _kept(found: _Found, scores: Mapping[str, Any], drop: int) -> dict[str, np.ndarray]:
    """The layers that stay, by the paths of all scans that have scores."""
    if not found.stacks:
        raise ValueError("there is no lax.scan over the leading axis of parameters in the function")
    groups: list[tuple[list[str], np.ndarray]] = []
    for stack, length in found.stacks.items():
        paths = sorted({path for path in stack if path is not None})
        given = [(path, scores[path]) for path in paths if scores[path] is not None]
        if not given or any(paths == other for other, _ in groups):
            continue
        if len(given) < len(paths) or any(np.shape(s) != (length,) for _, s in given):
            shapes = {
                path: None if scores[path] is None else np.shape(scores[path]) for path in paths
            }
            raise ValueError(f"each of {paths} needs scores of {length} layers; got {shapes}")
        for path, score in given:
            if np.isnan(score).any():
                raise ValueError(f"the scores of {path!r} are NaN for some layers")
            if not np.array_equal(score, given[0][1]):
                raise ValueError(
                    f"{path!r} and {given[0][0]!r} are of one scan and differ in scores"
                )
        for path in paths:
            if path in found.stay:
                raise ValueError(f"the layers of {path!r} have to stay: {found.stay[path]}")
        groups.append((paths, np.asarray(given[0][1], np.float64)))
    _refuse_torn([paths for paths, _ in groups])
    total = sum(len(score) for _, score in groups)
    if not 1 <= drop <= total - len(groups):
        raise ValueError(
            f"drop is 1 to {total - len(groups)}, of {total} layers with scores in {len(groups)} "
            f"scans, each of which keeps one; got {drop}"
        )
    order = sorted((s, g, i) for g, (_, score) in enumerate(groups) for i, s in enumerate(score))
    gone: list[set[int]] = [set() for _ in groups]
    for _, g, i in order:
        if sum(map(len, gone)) < drop and len(gone[g]) + 1 < len(groups[g][1]):
            gone[g].add(i)
    return {
        path: np.array([i for i in range(len(score)) if i not in gone[g]])
        for g, (paths, score) in enumerate(groups)
        for path in paths
    }


def _refuse_torn(groups: Sequence[Collection[str]]) -> None:
    """Raises if a leaf is in two scans that run over different leaves."""
    owner: dict[str, Collection[str]] = {}
    for paths in groups:
        for path in paths:
            if path in owner:
                raise ValueError(
                    f"{path!r} is in two scans, over {owner[path]} and over {paths}; their "
                    "layers cannot go together"
                )
            owner[path] = paths


def _refuse_compressed(params: Any) -> None:
    for path, leaf in leaves_with_paths(params):
        if is_compressed(leaf):
            raise TypeError(
                f"{path!r} is a {type(leaf).__name__}: drop layers first, then compress"
            )
