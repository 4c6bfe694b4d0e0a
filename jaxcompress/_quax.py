"""Every touch of quax's and JAX's internals, in one file.

quax interprets a function and lets `quax.register`ed rules see compressed arrays
where the function has dense ones. Three things that its trace cannot do yet are given
to it here, each only where it is absent: functions with a custom backward pass,
`shard_map`, and `jax.checkpoint`. And what a jitted function returns untouched stays
the object that it was.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import quax
from jax._src import config, core, source_info_util
from jax._src.interpreters import ad, batching
from jax._src.interpreters import partial_eval as pe
from jax._src.lax.lax import ragged_dot_general_p
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jax.extend.core.primitives import jit_p, remat_p, stop_gradient_p
from jax.typing import ArrayLike
from quax._primitives import jit_quax
from quax._trace import _QuaxTrace, _QuaxTracer
from quax._values import _dense, _DenseArrayValue

__all__ = [
    "as_written",
    "differentiated_inside",
    "float_precision",
    "held_by",
    "is_staged",
    "pvary_p",
    "ragged_dot_general_p",
    "run",
    "stop_gradient_p",
]

pvary_p = core.pvary_p  # within `shard_map`: what was alike on all devices may differ from now on


def run(fn: Callable[..., Any], leaves: list[Any]) -> list[Any]:
    """`fn(leaves)`, where compressed leaves act as the dense arrays they stand for."""
    return quax.quaxify(fn)(leaves)


def _dense_inputs(trace: _QuaxTrace, primitive: Any, tracers: Any) -> list[Any]:
    """The inputs of an opaque call: compressed ones decoded, and `explain` told so."""
    values = [trace.to_value(t) for t in tracers]
    return [
        v.decoded_for(primitive) if hasattr(v, "decoded_for") else type(v).materialise(v)
        for v in values
    ]


def _process_custom_vjp_call(self, primitive, fun, fwd, bwd, tracers, **params):
    with core.set_current_trace(self.parent_trace):
        arrays = _dense_inputs(self, primitive, tracers)
        out = primitive.bind_with_trace(
            self.parent_trace,
            tuple(arrays),
            tuple(jax.typeof(a) for a in arrays),
            dict(subfuns=(fun, fwd, bwd), **params),
        )
    return [_QuaxTracer(self, _dense(o)) for o in out]


def _process_shard_map(self, primitive, fun, tracers, **params):
    with core.set_current_trace(self.parent_trace):
        arrays = _dense_inputs(self, primitive, tracers)
        out = primitive.bind_with_trace(
            self.parent_trace,
            tuple(arrays),
            tuple(jax.typeof(a) for a in arrays),
            dict(subfuns=(fun,), **params),
        )
    wrap = lambda o: _QuaxTracer(self, _dense(o))
    return out.map(wrap) if hasattr(out, "map") else [wrap(o) for o in out]


if "process_custom_vjp_call" not in vars(_QuaxTrace):
    _QuaxTrace.process_custom_vjp_call = _process_custom_vjp_call
if "process_shard_map" not in vars(_QuaxTrace):
    _QuaxTrace.process_shard_map = _process_shard_map


@quax.register(remat_p)
def _checkpoint(*args, jaxpr, prevent_cse, differentiated, policy, **params):
    leaves, treedef = jax.tree.flatten(args)
    body = quax.quaxify(jaxpr_as_fun(ClosedJaxpr(jaxpr, ())))
    inner = lambda *leaves: body(*jax.tree.unflatten(treedef, leaves))
    return jax.checkpoint(inner, prevent_cse=prevent_cse, policy=policy)(*leaves)


@quax.register(jit_p, precedence=1)
def _jit(*args: ArrayLike | quax.ArrayValue, jaxpr: Any, **params: Any) -> Any:
    """quax's own rule. `nnx.jit` returns the whole module: only what it changed is new."""
    passed = {id(var): arg for var, arg in zip(jaxpr.jaxpr.invars, args)}
    out = jit_quax(*args, jaxpr=jaxpr, **params)
    outvars = jaxpr.jaxpr.outvars
    return [o if isinstance(v, Literal) else passed.get(id(v), o) for v, o in zip(outvars, out)]


def held_by(leaf: Any) -> Any:
    """The array that a leaf of a traced function stands for, the same for each of its tracers."""
    if not isinstance(leaf, _QuaxTracer):
        return leaf
    return leaf.value.array if isinstance(leaf.value, _DenseArrayValue) else leaf.value


def differentiated_inside(array: Any) -> bool:
    """Whether a derivative with respect to `array` is being taken inside `accelerate`.

    A rule is called with the primal values only, the tracers that carry tangents are
    out of its reach. They are arguments of the differentiating trace that called it,
    so its frames are looked at, up to the one that entered quax. This happens once, at
    trace time.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not run.__code__:
        trace = frame.f_locals.get("self")
        if isinstance(trace, (ad.JVPTrace, ad.LinearizeTrace)):
            for tracer in frame.f_locals.get("tracers", ()):
                if isinstance(tracer, (ad.JVPTracer, ad.LinearizeTracer)):
                    primal = tracer.primal
                    value: Any = primal.value if isinstance(primal, _QuaxTracer) else None
                    if type(value) is type(array) and value.path == array.path:
                        return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def as_written(eqn: JaxprEqn) -> Iterator[None]:
    """The names and the context that an equation was written in, for what replaces it."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    trace = eqn.source_info.traceback
    with source_info_util.user_context(trace, name_stack=names), eqn.ctx.manager:
        yield


def float_precision() -> Any:
    """What `jax.default_matmul_precision` says at the moment."""
    return config.default_matmul_precision.value


def is_staged() -> bool:
    """Whether steps are written down at the moment, or are those of `vmap`."""
    return isinstance(core.trace_ctx.trace, (pe.DynamicJaxprTrace, batching.BatchTrace))


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants a scan has, and how many values it carries."""
    if "num_consts" in params:  # JAX before 0.12
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))
