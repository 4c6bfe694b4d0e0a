"""What every kernel of a device needs around it: which chip, `vmap`, and sharding.

A kernel takes arrays of three dimensions, a batch first. Letters name them: `b m k` for
activations, `b k n` for weights, `b m n` for the result, if an op does not say otherwise.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.ops._choice import Problem

__all__ = [
    "CHIPS",
    "blocks_of",
    "call_kernel",
    "chip",
    "many_rows",
    "no_pallas_tpu",
    "no_triton",
    "not_cut",
    "small_weight",
]

# What the kernels are compiled for in every run of the checks, as `chip` names it.
CHIPS = {
    "tpu": ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"),
    "cuda": ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0"),
    "rocm": ("gfx90a", "gfx942", "gfx950"),
}


@functools.cache
def chip(platform: str) -> str | None:
    """The TPU's kind or the GPU's compute capability; None if this process has none."""
    backend = "tpu" if platform == "tpu" else "gpu"
    if jax.default_backend() != backend:
        return None
    device = jax.devices()[0]
    if platform == "tpu":
        return device.device_kind
    is_amd = device.compute_capability.startswith("gfx")
    return device.compute_capability.split(":")[0] if is_amd == (platform == "rocm") else None


def no_pallas_tpu(platform: str) -> str | None:
    """Why Pallas' kernels for TPUs cannot run there."""
    return "it is for TPUs" if platform != "tpu" else _unknown(platform)


def no_triton(platform: str) -> str | None:
    """Why Triton's kernels cannot run there."""
    if platform not in ("cuda", "rocm"):
        return "it is for GPUs"
    if not _has_jax_triton():
        return "jax_triton is not installed"
    if chip(platform) is None:
        return "it is compiled for the GPU at hand, and there is none"
    return _unknown(platform)


def not_cut(platform: str) -> str | None:
    """Why a kernel should not be taken among several TPUs: XLA does not cut it over them."""
    types = jax.sharding.get_abstract_mesh().axis_types
    if platform != "tpu" or chip("tpu") is None or jax.device_count() == 1:
        return None
    if AxisType.Explicit in types or AxisType.Manual in types:
        return None
    return "XLA cannot cut it over several TPUs; it needs shard_map or a mesh of explicit axes"


def many_rows(problem: Problem, platform: str) -> str | None:
    """Why a kernel that decodes a weight for every tile should not be taken on a GPU."""
    if platform in ("cuda", "rocm") and problem.m > _MANY_ROWS:
        return (
            f"of more than {_MANY_ROWS} rows XLA, which decodes the weight once, is faster (H100)"
        )
    return None


# Of a weight of 4096 x 4096 the kernel was faster at 64 rows, XLA at 256.
_MANY_ROWS = 64


def small_weight(problem: Problem) -> str | None:
    """Why a kernel is no gain there."""
    if problem.k < 256 or problem.n < 128:
        return f"{problem.k} x {problem.n} weights are less than one block of 256 x 128"
    return None


def blocks_of(
    op: str, backend: str, sizes: Callable[[Problem], tuple[Any, ...]]
) -> Callable[[Problem, str], str]:
    """What `explain` says of the blocks of a kernel, whose `blocks(*sizes, chip=)` chooses them."""

    def say(problem: Problem, platform: str) -> str:
        kernel, here = kernel_module(op, backend), chip(platform)
        cut = kernel.blocks(*sizes(problem), chip=here)
        return f"{_in_words(cut)}, {'by default' if here is None else f'for {here}'}"

    return say


def kernel_module(op: str, backend: str) -> Any:
    """The kernels of an op for a backend, imported where they are needed."""
    return importlib.import_module(f"jaxcompress.kernels.{op}.{backend}")


def _in_words(cut: Any) -> str:
    """Rows, columns, and what is summed; and on GPUs how many work on a tile, or lie ahead."""
    if isinstance(cut, int):
        return f"blocks of {cut} rows"
    size = " x ".join(map(str, cut[:3]))
    if len(cut) == 3:
        return f"blocks of {size}"
    named = zip(cut._fields[3:], cut[3:])
    more = (f"{n} {name.removeprefix('num_')}" for name, n in named if (name, n) != ("programs", 1))
    return f"tiles of {size}, {', '.join(more)}"


def _unknown(platform: str) -> str | None:
    here = chip(platform)
    if here is None or here in CHIPS[platform]:
        return None
    return f"it is proven for {', '.join(CHIPS[platform])}, not for {here}"


@functools.cache
def _has_jax_triton() -> bool:
    return importlib.util.find_spec("jax_triton") is not None


def call_kernel(
    kernel: Callable[..., jax.Array],
    letters: Sequence[str],
    *operands: jax.Array | None,
    is_cut: bool = True,
    result: str = "bmn",
) -> jax.Array:
    """`kernel(*operands)`, which `vmap` turns into more rows or a larger batch.

    Over several devices, each has its part of the letters of the result; the others are
    gathered. `is_cut` says whether XLA may see to that where axes are not explicit: libtpu
    has no means to.
    """
    there = [i for i, operand in enumerate(operands) if operand is not None]
    names = [letters[i] for i in there]

    def run(*arrays: jax.Array) -> jax.Array:
        given = dict(zip(there, arrays))
        return _vary(kernel(*(given.get(i) for i in range(len(operands)))), *arrays)

    run = run if is_cut else _for_tpus(run)
    explicit = _explicit_mesh(*(operands[i] for i in there))
    if explicit:
        mapped = custom_vmap(_mapped(run, names, explicit, result))
    else:
        mapped = custom_vmap(_partitioned(run, names, result) if is_cut else run)

    @mapped.def_vmap
    def rule(size, is_batched, *arrays):
        spread = [
            a if batched else jnp.broadcast_to(a, (size, *a.shape))
            for a, batched in zip(arrays, is_batched)
        ]
        b, m = arrays[0].shape[-3:-1]
        per_weight = any(batched for batched, name in zip(is_batched, names) if "m" not in name)
        if b == 1 and not per_weight and "m" in result:  # one weight for all: more rows
            rows = [
                s.reshape(1, size * m, s.shape[-1]) if "m" in name else a
                for s, a, name in zip(spread, arrays, names)
            ]
            out = call_kernel(run, names, *rows, is_cut=is_cut, result=result)
            out = out.reshape(size, 1, m, out.shape[-1])
        else:
            folded = (s.reshape(size * s.shape[1], *s.shape[2:]) for s in spread)
            out = call_kernel(run, names, *folded, is_cut=is_cut, result=result)
            out = out.reshape(size, b, *out.shape[1:])
        return out, True

    return mapped(*(operands[i] for i in there))


def _for_tpus(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`run`, in a program for several platforms too.

    There `jax` lowers each branch for all of them, and Pallas refuses to be on a CPU.
    """
    return lambda *arrays: _tpu_p.bind(*arrays, jaxpr=jax.make_jaxpr(run)(*arrays))


_tpu_p = Primitive("for_tpus")
_tpu_p.def_impl(lambda *arrays, jaxpr: jax.jit(jaxpr_as_fun(jaxpr))(*arrays)[0])
_tpu_p.def_abstract_eval(lambda *arrays, jaxpr: jaxpr.out_avals[0])


def _lower_for_tpus(ctx, *arrays, jaxpr):
    only = ctx.replace(module_context=ctx.module_context.replace(platforms=("tpu",)))
    return mlir.lower_fun(jaxpr_as_fun(jaxpr))(only, *arrays)


mlir.register_lowering(_tpu_p, _lower_for_tpus)


def _partitioned(
    run: Callable[..., jax.Array], names: Sequence[str], result: str
) -> Callable[..., jax.Array]:
    """`run`, which XLA may cut along the letters of the result that an operand has too."""
    call, given = custom_partitioning(run), "".join(names)

    def partition(mesh, operands, out):
        axes = {c: axis for c, axis in zip(result, _spec(out.sharding)) if c in given}
        place = lambda name: NamedSharding(mesh, P(*(axes.get(letter) for letter in name)))
        return mesh, run, place(result), tuple(place(name) for name in names)

    def infer(mesh, operands, out):
        axes = _axes(names, operands, result)
        return NamedSharding(mesh, P(*(axes.get(letter) for letter in result)))

    whole = dict.fromkeys(c for c in given if c not in result + "1")
    whole |= dict.fromkeys(c for c in result if c not in given)
    words = [" ".join(f"one{i}" if c == "1" else c for c in name) for i, name in enumerate(names)]
    call.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{', '.join(words)} -> {' '.join(result)}",
        need_replication_factors=tuple(whole),
    )
    return call


def _mapped(
    run: Callable[..., jax.Array], names: Sequence[str], mesh: Any, result: str
) -> Callable[..., Any]:
    """The same on a mesh of explicit axes, where the types say how everything is cut."""

    def call(*arrays: jax.Array) -> jax.Array:
        axes = _axes(names, [jax.typeof(a) for a in arrays], result)
        place = lambda name: P(*(axes.get(letter) for letter in name))
        cut = [
            jax.sharding.reshard(a, NamedSharding(mesh, place(n))) for a, n in zip(arrays, names)
        ]
        return jax.shard_map(
            run,
            mesh=mesh,
            in_specs=tuple(map(place, names)),
            out_specs=place(result),
            axis_names={
                n for n, t in zip(mesh.axis_names, mesh.axis_types) if t == AxisType.Explicit
            },
        )(*cut)

    return call


def _explicit_mesh(*arrays: Any) -> Any:
    """The mesh with explicit axes that any of the arrays lies on, or None."""
    meshes = [jax.typeof(a).sharding.mesh for a in arrays]
    return next((m for m in meshes if AxisType.Explicit in m.axis_types), None)


def _axes(names: Sequence[str], arrays: Sequence[Any], result: str) -> dict[str, Any]:
    """The mesh axes along which letters of the result are cut already; none of them twice."""
    axes: dict[str, Any] = {}
    for name, array in zip(names, arrays):
        for letter, axis in zip(name, _spec(array.sharding)):
            if letter in result and axis is not None and axis not in axes.values():
                axes.setdefault(letter, axis)
    return axes


def _spec(sharding: Any) -> tuple[Any, ...]:
    """The mesh axes of the three dimensions."""
    return (*sharding.spec, None, None, None)[:3]


def _vary(out: jax.Array, *arrays: jax.Array) -> jax.Array:
    """Within `shard_map`, as varying as all the operands; Triton's calls do not say so."""
    axes = frozenset().union(*(jax.typeof(a).mat.varying for a in arrays))
    missing = tuple(axes - jax.typeof(out).mat.varying)
    return lax.pcast(out, missing, to="varying") if missing else out
