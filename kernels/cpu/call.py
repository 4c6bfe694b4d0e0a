"""The calls of the native library as one JAX primitive: mapped, sharded, exported.

Operands are `x[b, m, k]`, the weight's arrays with the same leading `b`, and whatever else a
kind of call takes, with it too. The result is `[b, m, n]`. A kind of call is a hashable
dataclass: `DenseCall` here, others beside their kernels.

A batch that only `x` has becomes rows; a weight is not copied for it. Sharded over devices,
each computes its rows, columns and batches, and `k` is gathered. A program that is exported
has to run where there is no native library, so there the primitive is what `otherwise` says:
the same product by XLA.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

__all__ = [
    "COLUMN_MAJOR",
    "PANELS",
    "ROW_MAJOR",
    "Call",
    "DenseCall",
    "Epilogue",
    "aligned",
    "native_matmul",
]

PANELS, ROW_MAJOR, COLUMN_MAJOR = 0, 1, 2  # as in matmul.h


_ACTIVATIONS = (None, "relu", "gelu", "gelu_exact", "silu")  # as in path.h


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What follows a scaled product, `activation(y + bias[b, 1, n]) + residual[b, m, n]`.

    Its arrays are the last operands of a call, if it has them.
    """

    activation: str | None = None
    has_bias: bool = False
    has_residual: bool = False

    @property
    def size(self) -> int:
        return self.has_bias + self.has_residual

    @property
    def with_rows(self) -> list[int]:
        """The place of the residual among the operands."""
        return [-1] * self.has_residual

    def arguments(self, arrays: Sequence[jax.Array]) -> tuple[list[jax.Array], dict[str, Any]]:
        """The two operands of the foreign call, empty where there is none, and its attribute."""
        rest, none = list(arrays), jnp.zeros(0, jnp.float32)
        bias = rest.pop(0) if self.has_bias else none
        residual = rest.pop(0) if self.has_residual else none
        return [bias, residual], dict(activation=np.int64(_ACTIVATIONS.index(self.activation)))

    def specs(self, batch: Any, m: Any, n: Any) -> list[Any]:
        return [(batch, None, n)] * self.has_bias + [(batch, m, n)] * self.has_residual

    def rule(self, n: str) -> list[str]:
        return [f"b o {n}"] * self.has_bias + [f"b m {n}"] * self.has_residual


class Call(Protocol):
    """What is static about a call, and what depends on its kind."""

    def __hash__(self) -> int: ...

    @property
    def dtype(self) -> Any:
        """Of the result."""

    @property
    def with_rows(self) -> list[int]:
        """The places of the operands, besides `x`, that have as many rows as it."""

    def columns(self, *operands: Any) -> int:
        """`n`, as far as the operands say it."""

    def columns_sharding(self, *operands: Any) -> Any:
        """The mesh axes along which the types of the operands cut `n`."""

    def run(self, *operands: jax.Array) -> jax.Array:
        """The foreign call itself."""

    def specs(self, mesh: Any, batch: Any, m: Any, n: Any, columns: int) -> tuple[Any, list[Any]]:
        """The axes of `n` that can be cut, of those asked for, and those of every operand."""

    def rule(self, columns: int) -> str:
        """The operands of the partitioner's rule, then `n` of the result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseCall:
    """A product of codes: the weight's bytes, and for a scaled one `scale[b, g, n]`,
    `zero[b, g, n]` and `x_scale[b, 1, 1]`, the last two only if the call has them.

    `integers` is the exact product of int8 rows, without scales. With `codes` the rows are int8
    codes too, but scaled, and `x_scale` is `[b, m, 1]`.
    """

    integers: bool
    layout: int
    path: str
    bits: int = 8
    group_size: int | None = None
    digits: int = 1
    high: int = 127
    has_zero: bool = False
    has_x_scale: bool = False
    codes: bool = False
    then: Epilogue = Epilogue()

    @property
    def dtype(self) -> Any:
        return jnp.dtype(jnp.int32 if self.integers else jnp.float32)

    @property
    def with_rows(self) -> list[int]:
        return [3 + self.has_zero] * self.codes + self.then.with_rows

    def columns(self, *operands: Any) -> int:
        # Panels are filled up to a multiple of 16.
        w_shape = operands[1].shape
        if not self.integers:
            return operands[2].shape[-1]
        return w_shape[1] if self.layout == COLUMN_MAJOR else w_shape[-1]

    def columns_sharding(self, *operands: Any) -> Any:
        return operands[1].sharding.spec[2 if self.layout == ROW_MAJOR else 1]

    def run(self, *operands: jax.Array) -> jax.Array:
        x, w, *rest = operands
        b, m, k = x.shape
        group = k if self.group_size is None else min(self.group_size, k)
        groups = -(-k // group) if k else 1
        rows = b * m * self.digits
        # As Problem::scratch_bytes has it: rows of codes, sums of the groups, scales.
        sizes = (rows * (-(-k // 64) * 64 + 64), 4 * rows * groups, 4 * b * m)
        scratch = jax.ShapeDtypeStruct((sum(map(aligned, sizes)),), jnp.uint8)
        out = jax.ShapeDtypeStruct((b, m, self.columns(*operands)), self.dtype)
        if self.integers:
            run = jax.ffi.ffi_call("jaxcompress_int8_matmul", (out, scratch))
            return run(x, w, layout=np.int64(self.layout), path=self.path)[0]
        scale, *rest = rest
        zero = rest.pop(0) if self.has_zero else jnp.zeros(0, jnp.int8)
        x_scale = rest.pop(0) if self.has_x_scale else jnp.zeros(0, jnp.float32)
        more, activation = self.then.arguments(rest)
        run = jax.ffi.ffi_call("jaxcompress_quantized_matmul", (out, scratch))
        return run(
            x,
            w,
            scale,
            zero,
            x_scale,
            *more,
            **activation,
            path=self.path,
            layout=np.int64(self.layout),
            bits=np.int64(self.bits),
            group_size=np.int64(group),
            digits=np.int64(self.digits),
            high=np.int64(self.high),
        )[0]

    def specs(self, mesh: Any, batch: Any, m: Any, n: Any, columns: int) -> tuple[Any, list[Any]]:
        n = n if self._cuts(mesh, n, columns) else None
        spec = {PANELS: (batch, n, None, None, None), ROW_MAJOR: (batch, None, n)}
        w = spec.get(self.layout, (batch, n, None))
        scales = [(batch, None, n)] * (0 if self.integers else 1 + self.has_zero)
        rows = m if self.codes else None
        scales += [(batch, rows, None)] * self.has_x_scale
        return n, [(batch, m, None), w, *scales, *self.then.specs(batch, m, n)]

    def _cuts(self, mesh: Any, axes: Any, n: int) -> bool:
        """Whether the columns can be cut: panels only between two of them."""
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[name] for name in names)
        return n % (parts * (16 if self.layout == PANELS else 1)) == 0

    def rule(self, columns: int) -> str:
        n, panels = "n", "b u q v i"
        if self.layout == PANELS and columns % 16 == 0:
            n, panels = "(p c)", "b p q c i"
        w = {PANELS: panels, ROW_MAJOR: f"b r {n}", COLUMN_MAJOR: f"b {n} r"}[self.layout]
        terms = ["b m k", w]
        terms += [f"b g {n}", f"b h {n}"][: 0 if self.integers else 1 + self.has_zero]
        terms += ["b m t" if self.codes else "b s t"] * self.has_x_scale
        return f"{', '.join(terms + self.then.rule(n))} -> b m {n}"


def aligned(size: int) -> int:
    """Bytes of a part of a scratch buffer, as the native side lays it out."""
    return -(-size // 64) * 64


def native_matmul(call: Call, otherwise: Callable[..., jax.Array], *operands: Any) -> jax.Array:
    """The product; `otherwise(*operands)` is what an exported program does instead.

    `otherwise` has to be hashable by value.
    """
    axes = frozenset().union(*map(_varying, operands))
    return _mapped(call, otherwise)(*(_vary(a, axes - _varying(a)) for a in operands))


def _varying(array: Any) -> frozenset:
    """The axes of a surrounding `shard_map` over which an array differs."""
    kind = jax.typeof(array)
    # Of two names, the one that this version of JAX has.
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def _vary(array: Any, axes: frozenset) -> Any:
    return lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array


_matmul_p = Primitive("native_matmul")


@functools.cache
def _compiled(call, otherwise):
    return jax.jit(functools.partial(_matmul_p.bind, call=call, otherwise=otherwise))


@_matmul_p.def_impl
def _impl(*operands, call, otherwise):
    with jax.disable_jit(False):  # which would come back here
        return _compiled(call, otherwise)(*operands)


@_matmul_p.def_abstract_eval
def _abstract(*operands, call, otherwise):
    x, n = operands[0], call.columns(*operands)
    spec = PartitionSpec(*x.sharding.spec[:2], call.columns_sharding(*operands))
    out = x.update(shape=(*x.shape[:2], n), dtype=call.dtype)
    return out.update(sharding=x.sharding.update(spec=spec), weak_type=False)


def _lower(ctx, *operands, call, otherwise):
    if ctx.module_context.lowering_parameters.for_export:
        return _lower_otherwise(ctx, *operands, call=call, otherwise=otherwise)
    return mlir.lower_fun(call.run, multiple_results=False)(ctx, *operands)


def _lower_otherwise(ctx, *operands, call, otherwise):
    return mlir.lower_fun(otherwise, multiple_results=False)(ctx, *operands)


mlir.register_lowering(_matmul_p, _lower_otherwise)
mlir.register_lowering(_matmul_p, _lower, platform="cpu")


@functools.cache
def _mapped(call: Call, otherwise: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The primitive with its rule for the partitioner and, around that, its rule for vmap."""
    run = custom_vmap(_partitioned(call, otherwise))

    @run.def_vmap
    def _(size, mapped, *operands):
        again = functools.partial(native_matmul, call, otherwise)
        with_rows = {0, *(i % len(operands) for i in call.with_rows)}
        if not any(is_mapped for i, is_mapped in enumerate(mapped) if i not in with_rows):
            # More rows; the weight is not repeated.
            out = again(
                *(
                    _more_rows(size, a, mapped[i]) if i in with_rows else a
                    for i, a in enumerate(operands)
                )
            )
            out = out.reshape(out.shape[0], size, out.shape[1] // size, out.shape[2])
            return jnp.moveaxis(out, 1, 0), True
        whole = (
            a if is_mapped else jnp.broadcast_to(a, (size, *a.shape))
            for a, is_mapped in zip(operands, mapped)
        )
        out = again(*(a.reshape(size * a.shape[1], *a.shape[2:]) for a in whole))
        return out.reshape(size, out.shape[0] // size, *out.shape[1:]), True

    return run


def _more_rows(size: int, a: Any, is_mapped: bool) -> Any:
    """`[b, size * m, k]` of `[size, b, m, k]`, or of one that is repeated."""
    a = a if is_mapped else jnp.broadcast_to(a, (size, *a.shape))
    _, b, m, *last = a.shape
    return jnp.moveaxis(a, 0, 1).reshape(b, size * m, *last)


def _partitioned(call: Call, otherwise: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Rows, columns and batches may be cut; what is contracted is gathered."""
    bind = functools.partial(_matmul_p.bind, call=call, otherwise=otherwise)
    run = custom_partitioning(lambda *operands: bind(*operands))

    def partition(mesh, args, result):
        batch, m, n = (*result.sharding.spec, None, None, None)[:3]
        n, specs = call.specs(mesh, batch, m, n, result.shape[-1])
        place = lambda s: NamedSharding(mesh, PartitionSpec(*s))
        return mesh, bind, place((batch, m, n)), tuple(map(place, specs))

    def rule(mesh, operand_types, result_types):
        return call.rule(result_types[0].shape[-1])

    run.def_partition(partition, sharding_rule=rule)
    return run
