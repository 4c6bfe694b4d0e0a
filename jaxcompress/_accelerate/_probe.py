"""A dense weight under observation: which product it meets, along which axes.

`layout` reads the axes off it; `calibrate` gives it a tap, whose cotangent is a
statistic of the activations that met the weight. Both trace the user's function as
`accelerate` does, so what they see is what a compressed weight will see.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core import Primitive

from jaxcompress._accelerate._observe import (
    observe_convolution,
    observe_product,
    observe_ragged,
)
from jaxcompress._quax import pvary_p, ragged_dot_general_p, stop_gradient_p
from jaxcompress.arrays._quantized import replace
from jaxcompress.arrays._reshape import blocks_of

__all__ = ["Log", "Meeting", "Probe", "concatenate", "probe"]

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Meeting:
    """A weight met `primitive`: its contracting, output and batch axes, all negative."""

    path: str
    primitive: str
    contract: Axes = ()
    output: Axes = ()
    batch: Axes = ()
    lookup: bool = False


@dataclasses.dataclass(eq=False)
class Log:
    """The meetings of the probes that have this log, and why some saw no statistic.

    One is like no other, so that JAX, which remembers traced functions by the static
    fields of their arguments, traces them again for new probes and no meeting is missed.
    """

    meetings: list[Meeting] = dataclasses.field(default_factory=list)
    missed: dict[str, str] = dataclasses.field(default_factory=dict)


class Picked(eqx.Module):
    """Matrices that were looked up with `indices`, along `axis` of an array of this `rank`.

    The dimensions of the indices are now those at `places`.
    """

    indices: Any
    places: Axes = eqx.field(static=True)
    axis: int = eqx.field(static=True)
    rank: int = eqx.field(static=True)


class Probe(quax.ArrayValue):
    """A weight, its taps (there may be none), and where its axes came from.

    `origin` says, from the last dimension backwards, of which original axes (negative)
    each is made, and `sizes` what size those have. There are several `paths` and taps
    once weights are concatenated. A tap has the rank of the weight, size 1 or that of a
    leading axis, and the axes of the statistic after it. `observe(rows, tap, mine)`, with the
    activations as `[..., m, k]`, is a zero that carries the statistic backwards; with
    `mine[e, m]`, that of the rows which belong to each expert.
    """

    weight: Any
    taps: tuple[Any, ...] = ()
    picked: Picked | None = None
    origin: tuple[Axes, ...] = eqx.field(static=True, kw_only=True)
    sizes: Axes = eqx.field(static=True, kw_only=True)
    paths: tuple[str, ...] = eqx.field(static=True, kw_only=True)
    observe: Callable[..., Any] | None = eqx.field(static=True, kw_only=True, default=None)
    log: Log | None = eqx.field(static=True, kw_only=True, default=None)

    def aval(self) -> jax.core.ShapedArray:
        return jax.typeof(self.weight)  # within `shard_map`, with the devices that it is apart on

    def materialise(self) -> Any:
        return self.weight

    def origin_of(self, dimensions: Sequence[int]) -> Axes:
        """The original axes that these dimensions are made of."""
        return tuple(sorted({a for d in dimensions for a in self.origin[d - self.ndim]}))

    def meets(self, primitive: Primitive, **axes: Any) -> None:
        """Tells the log, if there is one."""
        if self.log is not None:
            self.log.meetings += [Meeting(path, primitive.name, **axes) for path in self.paths]

    def missed(self, why: str) -> None:
        """Tells the log that a product was not observed."""
        if self.log is not None and self.observe is not None:
            self.log.missed |= dict.fromkeys(self.paths, why)

    def decoded_for(self, primitive: Primitive) -> Any:
        """The weight, for a primitive that no axis can be followed through."""
        self.meets(primitive)
        if primitive.name in ("shard_map", "custom_vjp_call"):
            self.missed(f"it goes into a {primitive.name}, into which nobody looks")
        return self.weight

    @staticmethod
    def default(primitive: Primitive, values: Sequence[Any], params: dict[str, Any]) -> Any:
        dense = [
            v.decoded_for(primitive)
            if isinstance(v, Probe)
            else v.materialise()
            if isinstance(v, quax.Value)
            else v
            for v in values
        ]
        return primitive.bind(*dense, **params)


def probe(path: str, weight: Any, taps: tuple[Any, ...] = (), **how: Any) -> Probe:
    """A probe of a whole parameter."""
    origin = tuple((a,) for a in range(-weight.ndim, 0))
    return Probe(weight, taps, origin=origin, sizes=tuple(weight.shape), paths=(path,), **how)


def _moved(p: Probe, weight: Any, origin: Sequence[Axes], move: Callable[[Any], Any]) -> Probe:
    """`p` with its axes moved; `move` does to the taps what was done to the weight."""
    return replace(p, weight=weight, taps=jax.tree.map(move, p.taps), origin=tuple(origin))


# What matrices that were looked up may go through on the way to their product.
_FOLLOWED = {
    lax.convert_element_type_p,
    lax.copy_p,
    lax.sharding_constraint_p,
    lax.transpose_p,
    pvary_p,
    stop_gradient_p,
}


def _view(primitive: Primitive, move: Callable[..., Probe | None]) -> None:
    """Registers `move(p, **params)`; what it does not do (None) is just noted."""

    def rule(p: Probe, *rest: Any, **params: Any) -> Any:
        if params.get("shape", params.get("new_sizes")) == p.shape and not params.get("dimensions"):
            return p  # as indexing leaves one behind it
        if p.picked is not None and primitive not in _FOLLOWED:
            p.missed(f"matrices of it are looked up and go through {primitive.name}")
            p = replace(p, taps=(), picked=None)
        moved = move(p, *rest, **params)
        return Probe.default(primitive, (p, *rest), params) if moved is None else moved

    quax.register(primitive)(rule)


def _elementwise(primitive: Primitive) -> None:
    def move(p: Probe, **params: Any) -> Probe:
        return _moved(p, primitive.bind(p.weight, **params), p.origin, lambda tap: tap)

    _view(primitive, move)


def _transpose(p: Probe, *, permutation: Sequence[int]) -> Probe:
    if p.picked is not None:
        places = tuple(list(permutation).index(d) for d in p.picked.places)
        p = replace(p, picked=replace(p.picked, places=places))
        turned, origin = (
            lax.transpose(p.weight, permutation),
            [p.origin[d - p.ndim] for d in permutation],
        )
        return _moved(p, turned, origin, lambda tap: tap)
    return _moved(
        p,
        lax.transpose(p.weight, permutation),
        [p.origin[d - p.ndim] for d in permutation],
        lambda tap: lax.transpose(tap, [*permutation, *range(p.ndim, tap.ndim)]),
    )


def _reshape(p: Probe, *, new_sizes: Sequence[int], dimensions: Any, **_: Any) -> Probe | None:
    """Axes may merge and split as long as the tap has size one along them."""
    if dimensions is not None or p.size == 0:
        return None
    core = [d for d in range(p.ndim) if p.shape[d] != 1]
    blocks = blocks_of([p.shape[d] for d in core], [n for n in new_sizes if n != 1])
    origin: list[Axes] = [()] * len(new_sizes)
    moved: list[tuple[int, int]] = []  # dimensions that stay whole, from and to
    targets = iter([d for d, n in enumerate(new_sizes) if n != 1])
    for old, new in blocks:
        dims, core = core[: len(old)], core[len(old) :]
        to = [next(targets) for _ in new]
        merged = tuple(a for d in dims for a in p.origin[d - p.ndim])
        for d in to:
            origin[d] = merged
        if old == new:
            moved.append((dims[0], to[0]))
        elif any(tap.shape[d] != 1 for tap in jax.tree.leaves(p.taps) for d in dims):
            return None

    def reshape_tap(tap: Any) -> Any:
        sizes = [1] * len(new_sizes)
        for old_dim, new_dim in moved:
            sizes[new_dim] = tap.shape[old_dim]
        return tap.reshape(*sizes, *tap.shape[p.ndim :])

    return _moved(p, p.weight.reshape(new_sizes), origin, reshape_tap)


def _squeeze(p: Probe, *, dimensions: Sequence[int]) -> Probe | None:
    gone = {d % p.ndim for d in dimensions}
    sizes = [n for d, n in enumerate(p.shape) if d not in gone]
    return _reshape(p, new_sizes=sizes, dimensions=None)


def _broadcast(p: Probe, *, shape: Any, broadcast_dimensions: Any, **_: Any) -> Probe | None:
    if math.prod(shape) != p.size or list(broadcast_dimensions) != sorted(broadcast_dimensions):
        return None
    return _reshape(p, new_sizes=shape, dimensions=None)


def _cut(p: Probe, cut: Callable[[Any, int], Any]) -> Probe:
    """Cuts the weight along every dimension, and the taps where they have its size."""

    def all_dimensions(leaf: Any) -> Any:
        for d in range(p.ndim):
            if leaf.shape[d] == p.shape[d]:
                leaf = cut(leaf, d)
        return leaf

    return _moved(p, all_dimensions(p.weight), p.origin, all_dimensions)


def _slice(p: Probe, *, start_indices: Any, limit_indices: Any, strides: Any) -> Probe | None:
    if strides is not None and p.taps:
        return None

    def cut(leaf: Any, d: int) -> Any:
        if strides is not None:
            return lax.slice_in_dim(leaf, start_indices[d], limit_indices[d], strides[d], d)
        # The gradient of a static slice is padded, which no array of maxima can be.
        return lax.dynamic_slice_in_dim(
            leaf, start_indices[d], limit_indices[d] - start_indices[d], d
        )

    return _cut(p, cut)


def _dynamic_slice(p: Probe, *start: Any, slice_sizes: Any) -> Probe:
    def cut(leaf: Any, d: int) -> Any:
        return lax.dynamic_slice_in_dim(
            leaf, start[d], slice_sizes[d], d, allow_negative_indices=False
        )

    return _cut(p, cut)


def _gather(
    p: Probe, indices: Any, *, slice_sizes: Any, dimension_numbers: Any, **params: Any
) -> Any:
    """A table that is looked up: its rows count as contracted, so each has a scale.

    Matrices that are looked up, of one expert of several say, go on to their product, and
    with them which ones they are.
    """
    whole = [d for d in range(p.ndim) if slice_sizes[d] == p.shape[d]]
    rows = [d for d in range(p.ndim) if d not in whole]
    params |= dict(slice_sizes=slice_sizes, dimension_numbers=dimension_numbers)
    found = lax.gather_p.bind(p.weight, indices, **params)
    collapsed, kept = dimension_numbers.collapsed_slice_dims, dimension_numbers.offset_dims
    batched = dimension_numbers.operand_batching_dims
    if len(whole) < 2 or batched or sorted(collapsed) != rows:
        p.meets(lax.gather_p, contract=p.origin_of(whole), batch=p.origin_of(rows), lookup=True)
        return found
    origin: list[Axes] = [p.origin_of(rows)] * found.ndim
    for d, source in zip(kept, whole):
        origin[d] = p.origin_of([source])
    taps, picked = p.taps, None
    if p.picked is not None or len(rows) != 1:
        p.missed("matrices of it are looked up along more than one axis")
        taps = ()
    elif taps:
        chosen = indices[..., 0]
        if params["mode"] == lax.GatherScatterMode.CLIP:
            chosen = jnp.clip(chosen, 0, p.shape[rows[0]] - 1)
        places = tuple(d for d in range(found.ndim) if d not in kept)
        picked = Picked(chosen, places, rows[0], p.ndim)
    return replace(p, weight=found, taps=taps, picked=picked, origin=tuple(origin))


def concatenate(arrays: Sequence[Any], dimension: int) -> Any:
    """Probes, and dense arrays between them, as one probe if their axes are the same."""
    first, *others = probes = [a for a in arrays if isinstance(a, Probe)]
    taps = tuple(tap for p in probes for tap in p.taps)
    alike = all((p.origin, p.sizes) == (first.origin, first.sizes) for p in others)
    alike = alike and all(p.picked is None for p in probes)
    if not alike or any(leaf.shape[dimension] != 1 for leaf in jax.tree.leaves(taps)):
        return Probe.default(lax.concatenate_p, arrays, dict(dimension=dimension))
    dense = [a.materialise() if isinstance(a, quax.Value) else a for a in arrays]
    paths = tuple(path for p in probes for path in p.paths)
    return replace(first, weight=lax.concatenate(dense, dimension), taps=taps, paths=paths)


_elementwise(pvary_p)  # a tap is spread where it meets the rows of a device
_elementwise(lax.convert_element_type_p)
_elementwise(lax.copy_p)
_elementwise(lax.sharding_constraint_p)
_elementwise(stop_gradient_p)
_view(lax.transpose_p, _transpose)
_view(lax.reshape_p, _reshape)
_view(lax.squeeze_p, _squeeze)
_view(lax.broadcast_in_dim_p, _broadcast)
_view(lax.slice_p, _slice)
_view(lax.dynamic_slice_p, _dynamic_slice)
_view(lax.gather_p, _gather)


def _meet(p: Probe, primitive: Primitive, contract: Sequence[int], batch: Sequence[int]) -> None:
    output = [d for d in range(p.ndim) if d not in contract and d not in batch]
    axes = dict(contract=contract, output=output, batch=batch)
    p.meets(primitive, **{name: p.origin_of(dims) for name, dims in axes.items()})


def _dot_general(lhs: Any, rhs: Any, which: int, params: dict[str, Any]) -> Any:
    operands = [lhs, rhs]
    p, x = operands[which], operands[1 - which]
    if isinstance(x, quax.Value):
        x = x.materialise()
    contract, batch = params["dimension_numbers"]
    _meet(p, lax.dot_general_p, contract[which], batch[which])
    if p.observe is not None:
        x = observe_product(p, x, which, params["dimension_numbers"])
    operands[which], operands[1 - which] = p.weight, x
    return lax.dot_general_p.bind(*operands, **params)


@quax.register(lax.dot_general_p)
def _(lhs: Any, rhs: Probe, **params: Any) -> Any:
    return _dot_general(lhs, rhs, 1, params)


@quax.register(lax.dot_general_p)
def _(lhs: Probe, rhs: Any, **params: Any) -> Any:
    return _dot_general(lhs, rhs, 0, params)


@quax.register(lax.dot_general_p)
def _(lhs: Probe, rhs: Probe, **params: Any) -> Any:
    contract, batch = params["dimension_numbers"]
    _meet(lhs, lax.dot_general_p, contract[0], batch[0])
    lhs.missed("it is multiplied with another weight, not with activations")
    return _dot_general(lhs.weight, rhs, 1, params)


@quax.register(lax.conv_general_dilated_p)
def _(x: Any, p: Probe, **params: Any) -> Any:
    numbers = params["dimension_numbers"]
    contract = [d for d in range(p.ndim) if d != numbers.rhs_spec[0]]
    x = x.materialise() if isinstance(x, quax.Value) else x
    _meet(p, lax.conv_general_dilated_p, contract, ())
    if p.observe is not None:
        x = observe_convolution(p, x, params)
    return lax.conv_general_dilated_p.bind(x, p.weight, **params)


@quax.register(ragged_dot_general_p)
def _(x: Any, p: Probe, group_sizes: Any, **params: Any) -> Any:
    numbers = params["ragged_dot_dimension_numbers"]
    contract = numbers.dot_dimension_numbers[0][1]
    _meet(p, ragged_dot_general_p, contract, numbers.rhs_group_dimensions)
    x = x.materialise() if isinstance(x, quax.Value) else x
    if p.observe is not None:
        x = observe_ragged(p, x, group_sizes, numbers)
    return ragged_dot_general_p.bind(x, p.weight, group_sizes, **params)
