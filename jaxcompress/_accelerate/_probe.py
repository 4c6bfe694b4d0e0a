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
    """The meetings of the probes that have this log.

    One is like no other, so that JAX, which remembers traced functions by the static
    fields of their arguments, traces them again for new probes and no meeting is missed.
    """

    meetings: list[Meeting] = dataclasses.field(default_factory=list)


class Probe(quax.ArrayValue):
    """A weight, its taps (there may be none), and where its axes came from.

    `origin` says, from the last dimension backwards, of which original axes (negative)
    each is made, and `sizes` what size those have. There are several `paths` and taps
    once weights are concatenated. A tap has the rank of the weight, size 1 or that of a
    leading axis, and the axes of the statistic after it. `observe(rows, tap)`, with the
    activations as `[..., m, k]`, is a zero that carries the statistic backwards.
    """

    weight: Any
    taps: tuple[Any, ...] = ()
    origin: tuple[Axes, ...] = eqx.field(static=True, kw_only=True)
    sizes: Axes = eqx.field(static=True, kw_only=True)
    paths: tuple[str, ...] = eqx.field(static=True, kw_only=True)
    observe: Callable[..., Any] | None = eqx.field(static=True, kw_only=True, default=None)
    log: Log | None = eqx.field(static=True, kw_only=True, default=None)

    def aval(self) -> jax.core.ShapedArray:
        return jax.core.ShapedArray(self.weight.shape, self.weight.dtype)

    def materialise(self) -> Any:
        return self.weight

    def origin_of(self, dimensions: Sequence[int]) -> Axes:
        """The original axes that these dimensions are made of."""
        return tuple(sorted({a for d in dimensions for a in self.origin[d - self.ndim]}))

    def meets(self, primitive: Primitive, **axes: Any) -> None:
        """Tells the log, if there is one."""
        if self.log is not None:
            self.log.meetings += [Meeting(path, primitive.name, **axes) for path in self.paths]

    def decoded_for(self, primitive: Primitive) -> Any:
        """The weight, for a primitive that no axis can be followed through."""
        self.meets(primitive)
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


def _view(primitive: Primitive, move: Callable[..., Probe | None]) -> None:
    """Registers `move(p, **params)`; what it does not do (None) is just noted."""

    def rule(p: Probe, *rest: Any, **params: Any) -> Any:
        moved = move(p, *rest, **params)
        return Probe.default(primitive, (p, *rest), params) if moved is None else moved

    quax.register(primitive)(rule)


def _elementwise(primitive: Primitive) -> None:
    def move(p: Probe, **params: Any) -> Probe:
        return _moved(p, primitive.bind(p.weight, **params), p.origin, lambda tap: tap)

    _view(primitive, move)


def _transpose(p: Probe, *, permutation: Sequence[int]) -> Probe:
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

    Matrices that are looked up, of one expert of several say, go on to their product; a
    tap does not go with them, since what it gets back would be summed over the lookups.
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
    return replace(p, weight=found, taps=(), origin=tuple(origin))


def concatenate(arrays: Sequence[Any], dimension: int) -> Any:
    """Probes, and dense arrays between them, as one probe if their axes are the same."""
    first, *others = probes = [a for a in arrays if isinstance(a, Probe)]
    taps = tuple(tap for p in probes for tap in p.taps)
    alike = all((p.origin, p.sizes) == (first.origin, first.sizes) for p in others)
    if not alike or any(leaf.shape[dimension] != 1 for leaf in jax.tree.leaves(taps)):
        return Probe.default(lax.concatenate_p, arrays, dict(dimension=dimension))
    dense = [a.materialise() if isinstance(a, quax.Value) else a for a in arrays]
    paths = tuple(path for p in probes for path in p.paths)
    return replace(first, weight=lax.concatenate(dense, dimension), taps=taps, paths=paths)


_view(
    pvary_p,
    lambda p, **params: _moved(
        p, pvary_p.bind(p.weight, **params), p.origin, lambda tap: pvary_p.bind(tap, **params)
    ),
)
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
    if p.observe is not None and _is_whole(p, contract[which]):
        # The contracted axes in the weight's original order, whatever this product's is.
        pairs = sorted(zip(contract[which], contract[1 - which]), key=lambda c: p.origin_of(c[:1]))
        x = _observed(p, x, [c[1] for c in pairs], batch[1 - which], batch[which])
    operands[which], operands[1 - which] = p.weight, x
    return lax.dot_general_p.bind(*operands, **params)


def _is_whole(p: Probe, contract: Sequence[int]) -> bool:
    """Whether a product contracts the axes as the parameter has them, no part, no more."""
    return math.prod(p.shape[d] for d in contract) == math.prod(
        p.sizes[a] for a in p.origin_of(contract)
    )


def _observed(
    p: Probe, x: Any, contract: Sequence[int], batch: Sequence[int], w_batch: Sequence[int]
) -> Any:
    """`x`, tied to the statistic of it as `[batch, m, k]`."""
    free = [d for d in range(x.ndim) if d not in contract and d not in batch]
    k = math.prod(x.shape[d] for d in contract)
    rows = lax.transpose(x, [*batch, *free, *contract])
    rows = rows.reshape(*(x.shape[d] for d in batch), -1, k)
    return _tied(p, x, rows, w_batch)


def _tied(p: Probe, x: Any, rows: Any, batch: Sequence[int]) -> Any:
    """`x` and the statistic of `rows`, for every tap: its batch axes, then its own."""
    assert p.observe is not None
    others = [d for d in range(p.ndim) if d not in batch]

    def turn(tap: Any) -> Any:
        own = range(p.ndim, tap.ndim)
        turned = lax.transpose(tap, [*batch, *others, *own])
        return turned.reshape(*turned.shape[: len(batch)], *(tap.shape[d] for d in own))

    for tap in p.taps:
        x = x + p.observe(rows, jax.tree.map(turn, tap)).astype(x.dtype)
    return x


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
    return _dot_general(lhs.weight, rhs, 1, params)


@quax.register(lax.conv_general_dilated_p)
def _(x: Any, p: Probe, **params: Any) -> Any:
    numbers = params["dimension_numbers"]
    contract = [d for d in range(p.ndim) if d != numbers.rhs_spec[0]]
    x = x.materialise() if isinstance(x, quax.Value) else x
    _meet(p, lax.conv_general_dilated_p, contract, ())
    ungrouped = params["feature_group_count"] == params["batch_group_count"] == 1
    if p.observe is not None and ungrouped and _is_whole(p, contract):
        x = _tied(p, x, _patches(x, p, contract, params), ())
    return lax.conv_general_dilated_p.bind(x, p.weight, **params)


def _patches(x: Any, p: Probe, contract: Sequence[int], params: dict[str, Any]) -> Any:
    """What each output of a convolution sees, `[m, k]`, `k` in the order of the weight."""
    numbers = params["dimension_numbers"]
    _, in_dim, *spatial = numbers.rhs_spec
    seen = lax.conv_general_dilated_patches(
        x,
        [p.shape[d] for d in spatial],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dimension_numbers=lax.ConvDimensionNumbers(
            numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
        ),
    )
    seen = jnp.moveaxis(seen, numbers.out_spec[1], -1)
    seen = seen.reshape(-1, *(p.shape[d] for d in (in_dim, *spatial)))
    order = [1 + (in_dim, *spatial).index(d) for d in contract]
    return lax.transpose(seen, [0, *order]).reshape(seen.shape[0], -1)


@quax.register(ragged_dot_general_p)
def _(x: Any, p: Probe, group_sizes: Any, **params: Any) -> Any:
    numbers = params["ragged_dot_dimension_numbers"]
    contract = numbers.dot_dimension_numbers[0][1]
    _meet(p, ragged_dot_general_p, contract, numbers.rhs_group_dimensions)
    x = x.materialise() if isinstance(x, quax.Value) else x
    return ragged_dot_general_p.bind(x, p.weight, group_sizes, **params)
