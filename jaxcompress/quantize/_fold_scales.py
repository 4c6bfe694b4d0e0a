"""Scales of norms are taken into the weights behind them, so that what they scaled can rotate."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcompress.quantize._facts import Facts, Scale
from jaxcompress.quantize._spaces import CENTRED, FIXED, RIGID, Axes

__all__ = ["fold_scales"]

Leaves = dict[str, jax.Array]


class _StaysError(Exception):
    """Why a scale has to stay where it is."""


def fold_scales(facts: Facts, parameters: dict[str, Axes], leaves: Leaves) -> Leaves:
    """`(x g + b) w = (x + b / g) (g w)`: the leaves with `g` one wherever that is so.

    The axis before a scale and that behind it are one space then; of a scale that has to stay
    both are fixed. A scale that is the same number for all features may stay.
    """
    leaves, done = dict(leaves), set[int]()
    for last in reversed(facts.scales):  # what is behind it comes first
        if last.factor in done:
            continue
        done.add(last.factor)
        uses = [scale for scale in facts.scales if scale.factor == last.factor]
        open_scales = [scale for scale in facts.scales if scale.factor not in done]
        try:
            leaves |= _folded(facts, parameters, leaves, uses, open_scales)
        except _StaysError as stays:
            why = f"{facts.own[last.factor][0]!r} scales it and has to stay: {stays}"
            for scale in uses:
                for space in scale:
                    facts.spaces.mark(space, FIXED, why)
        else:
            for scale in uses:
                facts.spaces.unify(scale.before, scale.after)
                facts.spaces.mark(scale.factor, FIXED, "it is a scale")
    return leaves


def _folded(
    facts: Facts,
    parameters: dict[str, Axes],
    leaves: Leaves,
    uses: Sequence[Scale],
    open_scales: Sequence[Scale],
) -> Leaves:
    """The leaves that change."""
    spaces, factor = facts.spaces, uses[0].factor
    path, along = facts.own[factor]
    g = leaves[path]
    if (why := spaces.why(factor, FIXED)) is not None:
        raise _StaysError(why)
    alike = [space for space in facts.own if spaces.find(space) == spaces.find(factor)]
    if alike != [factor] or not spaces.is_whole(factor):
        raise _StaysError("it is used in another way too")
    if bool(jnp.all(g == jnp.take(g, jnp.array([0]), along))):
        return {}
    if factor in facts.other | facts.contracted:
        raise _StaysError("it is used in another way too")
    for d, label in enumerate(parameters[path]):
        if d != along and label is not None and spaces.why(label.space, FIXED) is None:
            raise _StaysError("it has a number for more than a feature and a layer")
    new = {path: jnp.ones_like(g)}
    for scale in uses:
        if spaces.find(scale.before) == spaces.find(scale.after):
            raise _StaysError("what it scales passes by as well")
    behind = {spaces.find(scale.after) for scale in uses}
    for scale in facts.scales:  # in the order of the program
        if spaces.find(scale.before) in behind:
            if scale in uses:
                raise _StaysError("it scales twice, one after the other")
            behind.add(spaces.find(scale.after))
    for root in {spaces.find(scale.after) for scale in uses}:
        _check(facts, root, open_scales)
        for space, (other, _) in facts.own.items():
            if spaces.find(space) != root:
                continue
            if other == path or {space} <= facts.contracted & facts.other:
                raise _StaysError(f"{other!r} is multiplied and used in another way too")
            w, numbers = (
                new.get(other, leaves[other]),
                _along(facts, parameters, path, along, g, space),
            )
            if space in facts.contracted:
                new[other] = w * numbers
            elif bool(jnp.any((numbers == 0) & (w != 0))):
                raise _StaysError(f"it is 0 where {other!r} is not")
            else:
                new[other] = jnp.where(numbers == 0, 0, w / jnp.where(numbers == 0, 1, numbers))
    return new


def _check(facts: Facts, root: int, open_scales: Sequence[Scale]) -> None:
    for mark in (FIXED, RIGID, CENTRED):
        if (why := facts.spaces.why(root, mark)) is not None:
            raise _StaysError(f"behind it, {why}")
    if not facts.spaces.is_whole(root):
        raise _StaysError("behind it, a reshape splits or merges its features")
    for scale in open_scales:
        if facts.spaces.find(scale.after) == root:
            raise _StaysError(f"{facts.own[scale.factor][0]!r} scales what meets the same weights")


def _along(
    facts: Facts, parameters: dict[str, Axes], path: str, along: int, g: jax.Array, space: int
) -> jax.Array:
    """The scale `g`, axis `along` of the parameter at `path`, so that it broadcasts against
    another's axis `space`; axes of layers that both are stacked along are found by their spaces.
    """
    other, axis = facts.own[space]
    of = lambda label: None if label is None else facts.spaces.find(label.space)
    stacks = [of(label) if d != axis else None for d, label in enumerate(parameters[other])]
    places, sizes = [], [1] * len(stacks)
    for d, (label, n) in enumerate(zip(parameters[path], g.shape)):
        if label is None:
            continue
        if d != along and of(label) not in stacks:
            raise _StaysError(f"{other!r} is not stacked as it is, along its axis {d}")
        places.append(axis if d == along else stacks.index(of(label)))
        sizes[places[-1]] = n
    dense = g.reshape([n for n in g.shape if n != 1])
    return jnp.transpose(dense, sorted(range(len(places)), key=places.__getitem__)).reshape(sizes)
