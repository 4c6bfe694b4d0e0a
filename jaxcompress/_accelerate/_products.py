"""Products that meet a quantized weight: brought to the form that the ops take.

Each function returns the result, or, as text, the reason why the weight has to be
decoded first.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive

from jaxcompress._accelerate._fuse import fusible
from jaxcompress._quax import ragged_dot_general_p
from jaxcompress.arrays import NMSparseArray, PrepackedArray, PrepackedSparseArray, QuantizedArray
from jaxcompress.arrays._quantized import replace
from jaxcompress.arrays._reshape import reshape
from jaxcompress.arrays._uses import listener
from jaxcompress.arrays._views import groups, transpose
from jaxcompress.ops import _sparse_matmul
from jaxcompress.ops._activations import encode_activations, in_blocks
from jaxcompress.ops._gradients import quantized_gradient_convolution
from jaxcompress.ops._linear import Weight, linear, plan

__all__ = ["convolution", "dot_general", "note_product", "prepacked", "ragged_dot", "shaped"]

Result = jax.Array | str


def dot_general(
    x: jax.Array, w: QuantizedArray, dimension_numbers: Any, weight_first: bool, dtype: Any
) -> Result:
    """`lax.dot_general` of `x` and `w`, in this order or with `weight_first`."""
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    if weight_first:
        (w_contract, x_contract), (w_batch, x_batch) = dimension_numbers
    if x.size == 0 or w.size == 0:
        return "an empty product"
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"the other operand is {x.dtype}"
    stored, w = w, w.widened()
    if w.packed is not None and w.packed_axis % w.ndim not in w_contract:
        w = w.unpacked()  # the ops read bit planes along the contracted axis only
    w = _ungroup(w, [d for d in range(w.ndim) if d not in w_contract])
    folded = _fold_contracted_scale(x, w, x_contract, w_contract, x_batch, w_batch)
    if isinstance(folded, str):
        return folded
    x, w = folded
    # Groups and bit planes run along the last contracted axis, so it goes last.
    run = _run_dimension(w, w_contract)
    order = sorted(range(len(w_contract)), key=lambda i: w_contract[i] == run)
    w_contract, x_contract = ([c[i] for i in order] for c in (w_contract, x_contract))
    w_free = [d for d in range(w.ndim) if d not in w_contract and d not in w_batch]
    x_free = [d for d in range(x.ndim) if d not in x_contract and d not in x_batch]
    batch = [w.shape[d] for d in w_batch]
    one_batch = [math.prod(batch)] if batch else []
    k, n = (math.prod(w.shape[d] for d in dims) for dims in (w_contract, w_free))
    m = math.prod(x.shape[d] for d in x_free)
    # A weight that is stored output first is multiplied as it lies.
    transpose_w = bool(w_free) and [*w_batch, *w_free, *w_contract] == list(range(w.ndim))
    last = (w_free, w_contract) if transpose_w else (w_contract, w_free)
    permutation = [*w_batch, *last[0], *last[1]]
    turned = w if permutation == list(range(w.ndim)) else transpose(w, permutation)
    flat = reshape(turned, [*one_batch, *((n, k) if transpose_w else (k, n))])
    if flat is None:
        return "its scales do not follow the axes that the product merges"
    note_product(stored, flat, transpose_w, lax.dot_general_p, m, k, n, x.dtype.name)
    rows = lax.transpose(x, [*x_batch, *x_free, *x_contract]).reshape(*one_batch, m, k)
    multiply = lambda rows, flat, *then: linear(rows, flat, transpose_w, dtype, *then)
    free = [x.shape[d] for d in x_free], [w.shape[d] for d in w_free]
    out = shaped(multiply, (rows, flat), batch, *free)
    return _weight_first(out, len(batch), len(x_free)) if weight_first else out


def shaped(
    multiply: Callable[..., jax.Array],
    operands: tuple[Any, Any],
    batch: Sequence[int],
    x_free: Sequence[int],
    w_free: Sequence[int],
) -> jax.Array:
    """`multiply(*operands, bias, activation, residual)`, whose result is `[..., m, n]`, as the
    product `[*batch, *x_free, *w_free]`, for `accelerate` to put inside what follows.
    """
    lead, columns = [math.prod(batch)] * bool(batch), math.prod(w_free)

    def run(operands, bias, activation, residual):
        if bias is not None:
            spread = jnp.broadcast_to(bias, (*batch, *[1] * len(x_free), *w_free))
            bias = spread.reshape(*lead, 1, columns)
        if residual is not None:
            residual = residual.reshape(*lead, math.prod(x_free), columns)
        out = multiply(*operands, bias, activation, residual)
        return out.reshape(*batch, *x_free, *w_free)

    return fusible(run, operands, run(operands, None, None, None), len(w_free), len(batch))


def prepacked(
    x: jax.Array,
    w: PrepackedArray | PrepackedSparseArray,
    dimension_numbers: Any,
    weight_first: bool,
    dtype: Any,
) -> jax.Array | None:
    """`lax.dot_general` of exactly the product that `w` is packed for, else None."""
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    if weight_first:
        (w_contract, x_contract), (w_batch, x_batch) = dimension_numbers
    dense = jnp.issubdtype(x.dtype, jnp.floating) and x.size > 0
    lead = range(len(w.lead))
    if not dense or tuple(w_batch) != tuple(lead) or sorted(w_contract) != [*w.contracted_dims]:
        return None
    x_contract = [x_contract[list(w_contract).index(d)] for d in w.contracted_dims]
    x_free = [d for d in range(x.ndim) if d not in x_contract and d not in x_batch]
    free = [w.shape[d] for d in range(len(lead), w.ndim) if d not in w_contract]
    batch = [w.shape[d] for d in lead]
    one_batch = [math.prod(batch)] if batch else []
    m = math.prod(x.shape[d] for d in x_free)
    rows = lax.transpose(x, [*x_batch, *x_free, *x_contract]).reshape(*one_batch, m, w.k)
    flat = jax.tree.map(lambda a: a.reshape(*one_batch, *a.shape[len(batch) :]), w)
    if isinstance(w, PrepackedSparseArray):
        _note_sparse(w, m, x.dtype.name)
        multiply = lambda rows, flat, *then: _sparse_matmul.sparse_linear(rows, flat, dtype, *then)
    else:
        note_product(w, w, w.transpose_w, lax.dot_general_p, m, w.k, w.n, x.dtype.name)
        turned = w.transpose_w  # not `w` itself, which is of a trace that ends
        multiply = lambda rows, flat, *then: linear(rows, flat, turned, dtype, *then)
    out = shaped(multiply, (rows, flat), batch, [x.shape[d] for d in x_free], free)
    return _weight_first(out, len(batch), len(x_free)) if weight_first else out


def _weight_first(out: jax.Array, batch: int, x_free: int) -> jax.Array:
    """The result with the axes of the weight before those of `x`."""
    b, f = batch, batch + x_free
    return lax.transpose(out, [*range(b), *range(f, out.ndim), *range(b, f)])


def ragged_dot(
    x: jax.Array, w: QuantizedArray, group_sizes: jax.Array, params: dict[str, Any], dtype: Any
) -> Result:
    """`lax.ragged_dot`: rows of `x[m, k]` by runs with their own `w[g, k, n]`."""
    numbers = params["ragged_dot_dimension_numbers"]
    (contract, batch) = numbers.dot_dimension_numbers
    plain = tuple(map(tuple, contract)) == ((1,), (1,)) and not batch[0]
    if not plain or tuple(numbers.rhs_group_dimensions) != (0,):
        return "not the plain form of ragged_dot"
    if w.scale.shape[1] != 1 or w.zero_point is not None:
        return "groups or zero points in a ragged product"
    m, (_, k, n) = x.shape[0], w.shape
    as_floats = f"{w.qtype.name} as floats"
    note_product(w, w, False, ragged_dot_general_p, m, k, n, x.dtype.name, as_floats)
    x_scale = None
    if w.act is not None:
        x, x_scale = _centred(x, w)
    w, codes = w.widened(), w.numbers().astype(x.dtype)
    params = {**params, "preferred_element_type": jnp.dtype(jnp.float32)}
    sums = ragged_dot_general_p.bind(x, codes, group_sizes, **params)
    expert = jnp.repeat(jnp.arange(w.shape[0]), group_sizes, total_repeat_length=m)
    sums = sums if x_scale is None else sums * x_scale
    return (sums * w.scale.astype(jnp.float32)[:, 0][expert]).astype(dtype)


def convolution(x: jax.Array, w: QuantizedArray, params: dict[str, Any], dtype: Any) -> Result:
    """`lax.conv_general_dilated` with a scale for each output feature."""
    numbers = params["dimension_numbers"]
    out_dim = numbers.rhs_spec[0]
    if any(size != 1 for d, size in enumerate(w.scale.shape) if d != out_dim):
        return "a convolution takes one scale for each output feature"
    if w.zero_point is not None:
        return "a convolution takes no zero points"
    x_scale = None
    if w.act is not None and in_blocks(w.act):  # a token is a pixel: blocks are of its features
        feature = numbers.lhs_spec[1]
        rows = jnp.moveaxis(x, feature, -1)
        codes, _ = _centred(rows.reshape(-1, x.shape[feature]), w)
        x = jnp.moveaxis(codes.reshape(rows.shape), -1, feature)
    elif w.act is not None:  # a token is an example: one scale for each image
        first = numbers.lhs_spec[0]
        rows = jnp.moveaxis(x, first, 0)
        codes, x_scale = _centred(rows.reshape(x.shape[first], -1), w)
        x = jnp.moveaxis(codes.reshape(rows.shape), 0, first)
    why = f"XLA's float convolution of {w.qtype.name} as floats"
    w.note(lax.conv_general_dilated_p, "convolution", "reference", why)
    params = {**params, "preferred_element_type": None}
    convolve = lambda x, w: lax.conv_general_dilated_p.bind(x, w, **params)
    codes, grad_bits = w.numbers().astype(x.dtype), None if w.act is None else w.act.grad_bits
    if grad_bits is None:
        sums = convolve(x, codes)
    else:
        batch, feature = numbers.out_spec[:2]
        sums = quantized_gradient_convolution(grad_bits, convolve, batch, feature, x, codes)
    w, sums = w.widened(), sums.astype(jnp.float32)
    if x_scale is not None:
        per_example = [1] * sums.ndim
        per_example[numbers.out_spec[0]] = x_scale.shape[0]
        sums = sums * x_scale.reshape(per_example)
    per_feature = [1] * sums.ndim
    per_feature[numbers.out_spec[1]] = w.scale.size
    return (sums * w.scale.astype(jnp.float32).reshape(per_feature)).astype(dtype)


def _centred(x: jax.Array, w: QuantizedArray) -> tuple[jax.Array, jax.Array]:
    """`x[m, k]` in steps of its scale, zero at zero, which is what padding inserts."""
    first = lambda part: None if part is None else part.reshape(-1)[:1].reshape(1, 1)
    assert w.act is not None
    codes, scale, offset = encode_activations(x, w.act, first(w.act_scale), first(w.act_offset))
    return (codes if offset is None else codes + offset / scale), scale


def note_product(
    w: Weight | NMSparseArray,
    flat: Any,
    transpose_w: bool,
    primitive: Primitive,
    m: int,
    k: int,
    n: int,
    dtype: str,
    instead: str | None = None,
) -> None:
    """What `explain` says of `w`, whose matrices are `flat`."""
    here = listener()
    if here is None:
        return
    if instead:
        w.note(primitive, primitive.name, "reference", instead)
    else:
        op, (implementation, why) = plan(flat, transpose_w, m, k, n, dtype, here.platform)
        w.note(primitive, op, implementation.name, why)


def _note_sparse(w: PrepackedSparseArray, m: int, dtype: str) -> None:
    here = listener()
    if here is not None:
        implementation, why = _sparse_matmul.plan(w, m, dtype, here.platform)
        w.note(lax.dot_general_p, "sparse_matmul", implementation.name, why)


def _ungroup(w: QuantizedArray, dimensions: list[int]) -> QuantizedArray:
    """Groups along dimensions that are not contracted, as a scale for each index."""
    cut = [d for d, g in groups(w).items() if g > 1 and w.scale.shape[d] > 1 and d in dimensions]
    if not cut or w.group_size is None:
        return w

    def spread(part: jax.Array) -> jax.Array:
        for d in cut:
            part = jnp.repeat(part, groups(w)[d], axis=d)
            part = lax.slice_in_dim(part, 0, w.shape[d], axis=d)
        return part

    sizes = tuple(1 if a % w.ndim in cut else g for a, g in zip(w.axis, w.group_size))
    zero = None if w.zero_point is None else spread(w.zero_point)
    return replace(w, scale=spread(w.scale), zero_point=zero, group_size=sizes)


def _run_dimension(w: QuantizedArray, contract: list[int]) -> int | None:
    """The contracted dimension that groups or bit planes run along."""
    grouped = [d for d, g in groups(w).items() if g > 1 and d in contract]
    if grouped:
        return grouped[-1]
    return None if w.packed is None else w.packed_axis % w.ndim


def _fold_contracted_scale(x, w, x_contract, w_contract, x_batch, w_batch):
    """A scale for each index of a contracted axis moves over to the dense operand.

    Multiplied into the weight it would make it a float array, and again in the gradient.
    """
    grouped = any(groups(w).get(d, 1) > 1 for d in w_contract)
    if grouped or all(w.scale.shape[d] == 1 for d in w_contract):
        return x, w  # neighbouring groups merge with the axes
    free = [d for d in range(w.ndim) if d not in w_contract and d not in w_batch]
    if any(w.scale.shape[d] > 1 for d in free):
        return "its scales vary along contracted and other axes"
    if w.zero_point is not None:
        return "its zero points vary along a contracted axis"
    shape, source = [1] * x.ndim, {}
    for xd, wd in zip((*x_contract, *x_batch), (*w_contract, *w_batch)):
        shape[xd], source[xd] = w.scale.shape[wd], wd
    scale = lax.transpose(w.scale, [source[d] for d in sorted(source)] + free).reshape(shape)
    # What is left shares one scale; the packed axis has to stay the last in `axis`.
    axis = sorted(range(-w.ndim, 0), key=lambda a: a == (w.axis[-1] if w.axis else 0))
    one = jnp.ones((1,) * w.ndim, w.scale.dtype)
    plain = replace(w, scale=one, axis=tuple(axis), group_size=None)
    return x * scale.astype(x.dtype), plain
