"""The same program at smaller sizes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jaxcompress._program import body_of, step
from jaxcompress.prune._axes import Frame
from jaxcompress.prune._axes_rules import Place
from jaxcompress.prune._biases import Added, plus
from jaxcompress.prune._derivatives import DERIVATIVES, aval_of, is_float

__all__ = ["Kept", "Plan", "plan_of", "run", "take"]

Kept = tuple[np.ndarray | None, ...]  # of each axis which indices are kept; None: all


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is kept of every variable of a jaxpr, in order, and of the jaxprs inside.

    `added` are constants to add to the first result of an equation: what the removed
    channels, constant themselves, would have added.
    """

    primitives: list[str]
    kept: list[Kept]
    inner: dict[int, tuple["Plan", ...]]
    added: dict[int, Added]

    @property
    def smaller(self) -> bool:
        inside = any(plan.smaller for plans in self.inner.values() for plan in plans)
        return inside or bool(self.added) or any(_any(kept) for kept in self.kept)


def plan_of(frame: Frame, gone: np.ndarray, added: dict[Place, Added], place: Place = ()) -> Plan:
    """The plan that removes the atoms `gone`."""

    def kept(axis: np.ndarray) -> np.ndarray | None:
        return ~gone[axis] if gone[axis].any() else None

    inner = {
        i: tuple(plan_of(f, gone, added if k == 0 else {}, (*place, i)) for k, f in enumerate(fs))
        for i, fs in frame.inner.items()
    }
    by_var = {v: tuple(map(kept, frame.axes[v])) for v in frame.variables()}
    eqns = frame.jaxpr.eqns
    mine = {
        p[-1]: _smaller(value, by_var[eqns[p[-1]].outvars[0]])
        for p, value in added.items()
        if p[:-1] == place
    }
    return Plan([eqn.primitive.name for eqn in eqns], [*by_var.values()], inner, mine)


def _smaller(added: Added, kept: Kept) -> Added:
    value = take(added.value, tuple(k if n != 1 else None for k, n in zip(kept, added.value.shape)))
    return Added(value, tuple(f and n for f, n in zip(added.fits, value.shape)))


def take(value: Any, kept: Kept) -> Any:
    """What is kept of an array."""
    for d, which in enumerate(kept):
        if which is not None:
            value = value.take(np.flatnonzero(which), d)
    return value


def run(jaxpr: Jaxpr, consts: Sequence[Any], plan: Plan, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates `jaxpr`, traced at the original sizes, on inputs of the smaller ones."""
    kept = _kept(jaxpr, plan)
    env = {v: take(c, kept[v]) for v, c in zip(jaxpr.constvars, consts)}
    env.update(zip(jaxpr.invars, inputs))
    read = lambda v: v.val if isinstance(v, Literal) else env[v]
    for i, eqn in enumerate(jaxpr.eqns):
        values = [read(v) for v in eqn.invars]
        ins = [() if isinstance(v, Literal) else kept[v] for v in eqn.invars]
        made = [kept[v] for v in eqn.outvars]
        plans = plan.inner.get(i, ())
        if any(p.smaller for p in plans):
            outs = _call(eqn, plans, values)
        elif any(map(_any, (*ins, *made))):
            outs = _resized(eqn, values, ins, made)
        else:
            outs = step(eqn)(*values)
        if i in plan.added:
            outs = [plus(outs[0], plan.added[i]), *outs[1:]]
        env.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars]


def _any(kept: Kept) -> bool:
    return any(which is not None for which in kept)


def _kept(jaxpr: Jaxpr, plan: Plan) -> dict[Any, Kept]:
    """What is kept of each variable; the program may have been traced for other inputs."""
    variables = Frame(jaxpr).variables()
    if [eqn.primitive.name for eqn in jaxpr.eqns] != plan.primitives:
        raise ValueError(
            "for these arguments the function takes other steps than for the example that it "
            "was shrunk with; call shrink with arguments like these"
        )
    for v, kept in zip(variables, plan.kept):
        for n, which in zip(aval_of(v).shape, kept):
            if which is not None and n != len(which):
                raise ValueError(
                    f"an axis of {len(which)} that became smaller has {n} indices for these "
                    "arguments; call shrink with arguments like these"
                )
    return dict(zip(variables, plan.kept))


def _call(eqn: JaxprEqn, plans: Sequence[Plan], values: list[Any]) -> list[Any]:
    body = body_of(eqn)
    assert body is not None
    inside = lambda *values: run(body.jaxpr, body.consts, plans[0], values)
    name = eqn.primitive.name
    if len(plans) == 2:
        with_derivative = _with_jvp if name == "custom_jvp_call" else _with_vjp
        return with_derivative(eqn, inside, plans[1])(*values)
    if name in ("checkpoint", "remat", "remat2"):
        how = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
        return jax.checkpoint(inside, **how)(*values)
    return inside(*values)


def _floats(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    return [x for x, v in zip(values, eqn.invars) if is_float(v)]


def _with_jvp(eqn: JaxprEqn, inside: Callable, plan: Plan) -> Callable[..., list[Any]]:
    call = jax.custom_jvp(inside)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        derivative = DERIVATIVES["custom_jvp_call"](eqn)
        inputs = [*primals, *_floats(eqn, tangents)]
        return call(*primals), run(derivative.jaxpr, derivative.consts, plan, inputs)

    return call


def _with_vjp(eqn: JaxprEqn, inside: Callable, plan: Plan) -> Callable[..., list[Any]]:
    call = jax.custom_vjp(inside)

    def backward(values: Any, cotangents: Any) -> Any:
        derivative = DERIVATIVES["custom_vjp_call"](eqn)
        found = iter(run(derivative.jaxpr, derivative.consts, plan, [*values, *cotangents]))
        return tuple(next(found) if is_float(v) else None for v in eqn.invars)

    call.defvjp(lambda *values: (inside(*values), values), backward)
    return call


def _resized(eqn: JaxprEqn, values: list[Any], ins: list[Kept], made: list[Kept]) -> list[Any]:
    """The equation with its parameters for the smaller sizes."""
    name, sizes = eqn.primitive.name, _sizes(eqn.outvars[0], made[0])
    if name == "iota":
        return [take(out, made[0]) for out in step(eqn)()]
    changes = _CHANGES[name](eqn, ins, sizes, made) if name in _CHANGES else {}
    out = eqn.primitive.bind(*values, **eqn.params | changes)
    return list(out) if eqn.primitive.multiple_results else [out]


def _sizes(v: Any, kept: Kept) -> tuple[int, ...]:
    return tuple(n if k is None else int(k.sum()) for n, k in zip(aval_of(v).shape, kept))


def _count(which: np.ndarray | None, start: int, end: int) -> int:
    """How many of the indices from `start` to `end` are kept."""
    return end - start if which is None else int(which[start:end].sum())


def _shape(
    eqn: JaxprEqn, ins: list[Kept], sizes: tuple[int, ...], made: list[Kept]
) -> dict[str, Any]:
    return dict(shape=sizes)


def _new_sizes(
    eqn: JaxprEqn, ins: list[Kept], sizes: tuple[int, ...], made: list[Kept]
) -> dict[str, Any]:
    return dict(new_sizes=sizes)


def _slice(
    eqn: JaxprEqn, ins: list[Kept], sizes: tuple[int, ...], made: list[Kept]
) -> dict[str, Any]:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    return dict(
        start_indices=tuple(_count(which, 0, a) for which, a in zip(ins[0], start)),
        limit_indices=tuple(_count(which, 0, b) for which, b in zip(ins[0], limit)),
    )


def _split(
    eqn: JaxprEqn, ins: list[Kept], sizes: tuple[int, ...], made: list[Kept]
) -> dict[str, Any]:
    along = eqn.params["axis"]
    return dict(sizes=tuple(_sizes(v, kept)[along] for v, kept in zip(eqn.outvars, made)))


def _pad(
    eqn: JaxprEqn, ins: list[Kept], sizes: tuple[int, ...], made: list[Kept]
) -> dict[str, Any]:
    config = []
    for (low, high, interior), n, which in zip(
        eqn.params["padding_config"], aval_of(eqn.outvars[0]).shape, made[0]
    ):
        if which is not None:
            low, high = _count(which, 0, low), _count(which, n - high, n)
        config.append((low, high, interior))
    return dict(padding_config=tuple(config))


def _convolution(
    eqn: JaxprEqn, ins: list[Kept], sizes: tuple[int, ...], made: list[Kept]
) -> dict[str, Any]:
    groups, numbers = eqn.params["feature_group_count"], eqn.params["dimension_numbers"]
    channels = ins[0][numbers.lhs_spec[1]]
    if groups == 1 or channels is None:
        return {}
    return dict(feature_group_count=int(channels.reshape(groups, -1).any(1).sum()))


def _gather(
    eqn: JaxprEqn, ins: list[Kept], sizes: tuple[int, ...], made: list[Kept]
) -> dict[str, Any]:
    whole = zip(eqn.params["slice_sizes"], ins[0], strict=True)
    return dict(slice_sizes=tuple(n if which is None else int(which.sum()) for n, which in whole))


_CHANGES: dict[str, Callable[..., dict[str, Any]]] = {
    "broadcast_in_dim": _shape,
    "conv_general_dilated": _convolution,
    "dynamic_slice": _gather,
    "gather": _gather,
    "pad": _pad,
    "reshape": _new_sizes,
    "slice": _slice,
    "split": _split,
}
