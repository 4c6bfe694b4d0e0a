"""How each primitive ties the indices of its results to those of its inputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn

from jaxcompress._primitives import CUMULATIVE, ELEMENTWISE, REDUCTIONS, WINDOWS
from jaxcompress.arrays._reshape import blocks_of
from jaxcompress.prune._derivatives import aval_of
from jaxcompress.prune._ties import Ties

__all__ = ["RULES", "Axes", "Place", "Step", "Sum", "fresh", "opaque", "tie"]

Axes = tuple[np.ndarray, ...]  # the atoms of each axis of a value
Place = tuple[int, ...]  # an equation: its number in each of the jaxprs that it lies in


class Sum(NamedTuple):
    """An equation adds up over `atoms`; what goes has to add a constant."""

    place: Place
    atoms: tuple[np.ndarray, ...]  # of each axis that is summed
    what: str


class Step(NamedTuple):
    """What a rule is told of its equation."""

    ties: Ties
    eqn: JaxprEqn
    place: Place
    sums: list[Sum]
    names: list[str]  # the paths of the inputs that are parameters, "" of others

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    def stay(self, atoms: Sequence[np.ndarray], what: str) -> None:
        for axis in atoms:
            self.ties.stay(axis, what)

    def adds_up(self, atoms: Sequence[np.ndarray]) -> None:
        named = [name for name in self.names if name]
        what = self.eqn.primitive.name + (f" with {named[0]!r}" if named else "")
        self.sums.append(Sum(self.place, tuple(atoms), what))


def fresh(ties: Ties, v: Any) -> Axes:
    return tuple(ties.new(n) for n in aval_of(v).shape)


def tie(ties: Ties, a: Axes, b: Axes) -> None:
    for x, y in zip(a, b):
        ties.tie(x, y)


def opaque(step: Step, ins: list[Axes]) -> list[Axes]:
    outs = [fresh(step.ties, v) for v in step.eqn.outvars]
    for axes in (*ins, *outs):
        step.stay(axes, f"{step.eqn.primitive.name} needs it")
    return outs


def _elementwise(step: Step, ins: list[Axes]) -> list[Axes]:
    """Sizes of one are broadcast."""
    [out] = step.eqn.outvars
    result: list[np.ndarray] = []
    for d, n in enumerate(aval_of(out).shape):
        alike = [axes[d] for axes in ins if axes and len(axes[d]) == n]
        for other in alike[1:]:
            step.ties.tie(alike[0], other)
        result.append(alike[0] if alike else step.ties.new(n))
    return [tuple(result)]


def _barrier(step: Step, ins: list[Axes]) -> list[Axes]:
    return ins


def _iota(step: Step, ins: list[Axes]) -> list[Axes]:
    return [fresh(step.ties, step.eqn.outvars[0])]


def _transpose(step: Step, ins: list[Axes]) -> list[Axes]:
    return [tuple(ins[0][d] for d in step.params["permutation"])]


def _squeeze(step: Step, ins: list[Axes]) -> list[Axes]:
    gone = {d % len(ins[0]) for d in step.params["dimensions"]}
    return [tuple(axis for d, axis in enumerate(ins[0]) if d not in gone)]


def _broadcast(step: Step, ins: list[Axes]) -> list[Axes]:
    result = list(fresh(step.ties, step.eqn.outvars[0]))
    for axis, d in zip(ins[0], step.params["broadcast_dimensions"]):
        if len(axis) == len(result[d]):
            result[d] = axis
    return [tuple(result)]


def _reshape(step: Step, ins: list[Axes]) -> list[Axes]:
    """Axes merge and split; several that become several others have to stay."""
    [out] = step.eqn.outvars
    if step.params["dimensions"] is not None or aval_of(out).size == 0:
        return opaque(step, ins)
    old = [axis for axis in ins[0] if len(axis) != 1]
    result: list[np.ndarray | None] = [None] * aval_of(out).ndim
    targets = iter([d for d, n in enumerate(aval_of(out).shape) if n != 1])
    for before, after in blocks_of(
        [len(axis) for axis in old], [n for n in aval_of(out).shape if n != 1]
    ):
        axes, old = old[: len(before)], old[len(before) :]
        to = [next(targets) for _ in after]
        if before == after:
            result[to[0]] = axes[0]
            continue
        made = [step.ties.new(n) for n in after]
        if len(before) == 1:
            step.ties.merge(axes[0], made, "reshape")
        elif len(after) == 1:
            step.ties.merge(made[0], axes, "reshape")
        else:
            step.stay([*axes, *made], f"a reshape makes {after} of {before}")
        for d, axis in zip(to, made):
            result[d] = axis
    return [tuple(step.ties.new(1) if axis is None else axis for axis in result)]


def _concatenate(step: Step, ins: list[Axes]) -> list[Axes]:
    along = step.params["dimension"]
    for axes in ins[1:]:
        for d, axis in enumerate(axes):
            if d != along:
                step.ties.tie(ins[0][d], axis)
    joined = np.concatenate([axes[along] for axes in ins])
    return [(*ins[0][:along], joined, *ins[0][along + 1 :])]


def _pad(step: Step, ins: list[Axes]) -> list[Axes]:
    result = []
    for axis, (low, high, interior) in zip(ins[0], step.params["padding_config"]):
        if interior or min(low, high) < 0:
            new = step.ties.new(len(axis) + low + high + interior * max(len(axis) - 1, 0))
            step.stay([axis, new], "pad spreads it")
        elif low or high:
            new = np.concatenate([step.ties.new(low), axis, step.ties.new(high)])
        else:
            new = axis
        result.append(new)
    return [tuple(result)]


def _slice(step: Step, ins: list[Axes]) -> list[Axes]:
    starts, limits = step.params["start_indices"], step.params["limit_indices"]
    strides = step.params["strides"] or (1,) * len(starts)
    for axis, stride in zip(ins[0], strides):
        if stride != 1:
            step.stay([axis], "slice takes it with a stride")
    return [
        tuple(
            axis if (a, b, s) == (0, len(axis), 1) else axis[a:b:s]
            for axis, a, b, s in zip(ins[0], starts, limits, strides)
        )
    ]


def _split(step: Step, ins: list[Axes]) -> list[Axes]:
    along, ends = step.params["axis"], np.cumsum(step.params["sizes"])[:-1]
    parts = np.split(ins[0][along], ends)
    return [(*ins[0][:along], part, *ins[0][along + 1 :]) for part in parts]


def _rev(step: Step, ins: list[Axes]) -> list[Axes]:
    turned = step.params["dimensions"]
    return [tuple(axis[::-1] if d in turned else axis for d, axis in enumerate(ins[0]))]


def _reduce(step: Step, ins: list[Axes]) -> list[Axes]:
    gone = [ins[0][d] for d in step.params["axes"]]
    if step.eqn.primitive.name == "reduce_sum":
        step.adds_up(gone)
    else:
        step.stay(gone, f"{step.eqn.primitive.name} looks at all of it")
    kept = tuple(axis for d, axis in enumerate(ins[0]) if d not in step.params["axes"])
    return [kept] * len(step.eqn.outvars)


def _ordered(step: Step, ins: list[Axes]) -> list[Axes]:
    """Along one axis the order matters: sums so far, sorting."""
    along = step.params["dimension" if "dimension" in step.params else "axis"]
    step.stay([axes[along] for axes in ins], f"{step.eqn.primitive.name} goes along it")
    for axes in ins[1:]:
        tie(step.ties, ins[0], axes)
    return ins


def _window(step: Step, ins: list[Axes]) -> list[Axes]:
    [out], p, result = step.eqn.outvars, step.params, []
    for d, axis in enumerate(ins[0]):
        settings = p["window_dimensions"][d], p["window_strides"][d], p["base_dilation"][d]
        if settings == (1, 1, 1) and tuple(p["padding"][d]) == (0, 0):
            result.append(axis)
            continue
        result.append(step.ties.new(aval_of(out).shape[d]))
        step.stay([axis, result[-1]], f"{step.eqn.primitive.name} moves along it")
    return [tuple(result)]


def _dot_general(step: Step, ins: list[Axes]) -> list[Axes]:
    (left, right), batch = step.params["dimension_numbers"]
    lhs, rhs = ins
    for a, b in [*zip(left, right), *zip(*batch)]:
        step.ties.tie(lhs[a], rhs[b])
    step.adds_up([lhs[a] for a in left])
    free = [
        axis
        for axes, c, b in ((lhs, left, batch[0]), (rhs, right, batch[1]))
        for d, axis in enumerate(axes)
        if d not in c and d not in b
    ]
    return [(*(lhs[d] for d in batch[0]), *free)]


def _convolution(step: Step, ins: list[Axes]) -> list[Axes]:
    """Channels, and of a grouped convolution whole groups."""
    numbers, groups = step.params["dimension_numbers"], step.params["feature_group_count"]
    if step.params["batch_group_count"] != 1:
        return opaque(step, ins)
    lhs, rhs = ins
    out = list(fresh(step.ties, step.eqn.outvars[0]))
    spatial = [
        *(lhs[d] for d in numbers.lhs_spec[2:]),
        *(rhs[d] for d in numbers.rhs_spec[2:]),
        *(out[d] for d in numbers.out_spec[2:]),
    ]
    step.stay(spatial, "a convolution moves along it")
    out[numbers.out_spec[0]] = lhs[numbers.lhs_spec[0]]
    out[numbers.out_spec[1]] = made = rhs[numbers.rhs_spec[0]]
    channels, inside = lhs[numbers.lhs_spec[1]], rhs[numbers.rhs_spec[1]]
    if groups == 1:
        step.ties.tie(channels, inside)
        step.adds_up([channels])
    else:
        step.stay([inside], "only whole groups of a grouped convolution can go")
        group = step.ties.new(groups)
        step.ties.axis(group)
        step.ties.merge(channels, [group, inside], "grouped convolution")
        each = step.ties.new(len(made) // groups)
        step.ties.merge(made, [group, each], "grouped convolution")
    return [tuple(out)]


def _gather(step: Step, ins: list[Axes]) -> list[Axes]:
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    table, indices = ins
    if numbers.operand_batching_dims:
        return opaque(step, ins)
    [out] = step.eqn.outvars
    step.stay(indices[-1:], "gather needs it")
    windows = [d for d in range(len(table)) if d not in numbers.collapsed_slice_dims]
    result: list[np.ndarray | None] = [None] * aval_of(out).ndim
    for d, place in zip(windows, numbers.offset_dims):
        whole = sizes[d] == len(table[d])
        result[place] = table[d] if whole else step.ties.new(sizes[d])
        if not whole:
            step.stay([table[d], result[place]], "gather looks it up")
    step.stay([table[d] for d in numbers.collapsed_slice_dims], "gather looks it up")
    rest = iter(indices[:-1])
    return [tuple(next(rest) if axis is None else axis for axis in result)]


def _dynamic_slice(step: Step, ins: list[Axes]) -> list[Axes]:
    result = []
    for axis, n in zip(ins[0], step.params["slice_sizes"]):
        result.append(axis if n == len(axis) else step.ties.new(n))
        if n != len(axis):
            step.stay([axis, result[-1]], "dynamic_slice moves along it")
    return [tuple(result)]


def _dynamic_update(step: Step, ins: list[Axes]) -> list[Axes]:
    for axis, new in zip(ins[0], ins[1]):
        if len(axis) == len(new):
            step.ties.tie(axis, new)
        else:
            step.stay([axis, new], "dynamic_update_slice moves along it")
    return [ins[0]]


RULES: dict[str, Callable[[Step, list[Axes]], list[Axes]]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys([*REDUCTIONS, "argmax", "argmin"], _reduce),
    **dict.fromkeys([*CUMULATIVE, "sort"], _ordered),
    **dict.fromkeys(WINDOWS, _window),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    "iota": _iota,
    "optimization_barrier": _barrier,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
