"""A product of a compressed weight and what follows it, as one call of its op.

Under `jit` the steps of a function are known before any is done. `accelerate` then traces it
once more: products are marked, and a marked product whose result goes nowhere but into an
added bias, an activation, a sum with an array of its shape, is done again by its op with that
inside. Nobody needs the plain product then, and it is dropped. Where one of these is missing,
or somebody else needs what lies between, the rest stays as it is. A derivative is that of the
steps as they were written, which are then done one by one.
"""

import contextlib
import contextvars
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var, jaxpr_as_fun
from jax.extend.core.primitives import jit_p, scan_p
from jax.interpreters import ad, batching, mlir

from jaxcompress import _quax
from jaxcompress.arrays import CompressedArray
from jaxcompress.arrays._uses import Use, listener
from jaxcompress.ops._epilogue import ACTIVATIONS, said

__all__ = ["fusible", "run"]

# `run(operands, bias, activation, residual)`: what made `out`, the last operand, which it is.
Run = Callable[[Any, jax.Array | None, str | None, jax.Array | None], jax.Array]

fusible_p = Primitive("fusible_product")
fusible_p.def_impl(lambda *operands, **_: operands[-1])
fusible_p.def_abstract_eval(lambda *operands, **_: operands[-1])
mlir.register_lowering(fusible_p, lambda ctx, *operands, **_: [operands[-1]])
ad.primitive_jvps[fusible_p] = lambda primals, tangents, **_: (primals[-1], tangents[-1])
batching.primitive_batchers[fusible_p] = lambda operands, axes, **_: (operands[-1], axes[-1])

_wanted: contextvars.ContextVar[bool] = contextvars.ContextVar("fusing", default=False)


@contextlib.contextmanager
def _marking() -> Iterator[None]:
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


class _Product(NamedTuple):
    """How a product was made: of operands of this structure; how many of the last axes of its
    result are those of the weight, how many of the first are of both; its row for `explain`; and
    the precision of float products at that place.
    """

    run: Run
    treedef: Any
    columns: int
    batch: int
    use: Use | None
    precision: str | None


def fusible(run: Run, operands: Any, out: jax.Array, columns: int, batch: int) -> jax.Array:
    """`out`, marked as the product that `run(operands, None, None, None)` gives."""
    if not _wanted.get() or out.dtype != jnp.float32 or not columns:
        return out
    leaves, treedef = jax.tree.flatten(operands)
    here = listener()
    use = here.uses[-1] if here and here.uses else None
    product = _Product(run, treedef, columns, batch, use, _quax.float_precision())
    return fusible_p.bind(*leaves, out, product=product)


def run(fn: Callable[..., Any], leaves: list[Any]) -> list[Any]:
    """`_quax.run(fn, leaves)`, with what follows products inside them if that is known."""
    values = [leaf for leaf in leaves if isinstance(leaf, quax.Value)]
    small = any(
        isinstance(v, CompressedArray) and any(a.dtype.kind in "iu" for a in jax.tree.leaves(v))
        for v in values
    )
    only = all(isinstance(v, CompressedArray) for v in values)
    if not (small and only and _quax.is_staged() and jax.sharding.get_abstract_mesh().empty):
        return _quax.run(fn, leaves)
    flat, treedef = jax.tree.flatten(leaves)
    traced = [isinstance(leaf, jax.core.Tracer) for leaf in flat]
    found: list[Any] = []

    def call(*tracers: Any) -> list[Any]:
        given = iter(tracers)
        mixed = [next(given) if is_traced else leaf for leaf, is_traced in zip(flat, traced)]
        outs, out_treedef = jax.tree.flatten(_quax.run(fn, jax.tree.unflatten(treedef, mixed)))
        is_traced = [isinstance(leaf, jax.core.Tracer) for leaf in outs]
        # Nothing of this trace is kept beyond it.
        found[:] = [None if t else leaf for leaf, t in zip(outs, is_traced)], is_traced, out_treedef
        return [leaf for leaf, t in zip(outs, is_traced) if t]

    tracers = [leaf for leaf, is_traced in zip(flat, traced) if is_traced]
    with _marking():
        closed = jax.make_jaxpr(call)(*tracers)
        results = iter(_evaluate(closed, tracers))
    outs, is_traced, out_treedef = found
    whole = [next(results) if t else leaf for leaf, t in zip(outs, is_traced)]
    return jax.tree.unflatten(out_treedef, whole)


@dataclasses.dataclass
class _Step:
    """Something to do: an equation, or a product with what follows it."""

    eqn: JaxprEqn
    out: list[Any]
    then: list[JaxprEqn] = dataclasses.field(default_factory=list)  # what it takes in
    bias: tuple[Any, list[int]] | None = None
    activation: str | None = None
    residual: Any = None

    @property
    def marked(self) -> bool:
        """Whether it is a marked product."""
        return self.eqn.primitive is fusible_p

    @property
    def inputs(self) -> list[Any]:
        if not self.follows:
            return self.eqn.invars[-1:] if self.marked else self.eqn.invars
        more = [] if self.bias is None else [self.bias[0]]
        more += [] if self.residual is None else [self.residual]
        return [*self.eqn.invars[:-1], *more]

    @property
    def follows(self) -> bool:
        """Whether there is anything that follows."""
        return self.bias is not None or self.activation is not None or self.residual is not None


def _evaluate(closed: ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """The results of a marked program, products with what follows them inside."""
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *arguments]))
    read = lambda atom: atom.val if isinstance(atom, Literal) else env[atom]
    for step in _needed(_steps(jaxpr), jaxpr.outvars):
        if step.marked:
            outs = [_product(jaxpr, step, read)]
        else:
            outs = _bind(jaxpr, step.eqn, list(map(read, step.eqn.invars)))
        env.update(zip(step.out, outs))
    return list(map(read, jaxpr.outvars))


def _bind(jaxpr: Jaxpr, eqn: JaxprEqn, inputs: list[Any]) -> list[Any]:
    params = eqn.params
    if eqn.primitive in (jit_p, scan_p) and _has_products(params["jaxpr"].jaxpr):
        closed = params["jaxpr"]
        again = lambda *arguments: _evaluate(closed, arguments)
        params = params | {"jaxpr": jax.make_jaxpr(again)(*closed.in_avals)}
    # A program of one step: what JAX does with parameters that are functions stays its own.
    slots: list[Any] = [Var(jax.typeof(x)) for x in inputs]
    one = jaxpr.replace(
        constvars=[],
        invars=slots,
        outvars=eqn.outvars,
        eqns=[eqn.replace(invars=slots, params=params)],
        effects=eqn.effects,
    )
    return jaxpr_as_fun(ClosedJaxpr(one, ()))(*inputs)


def _has_products(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive is fusible_p
        or (eqn.primitive in (jit_p, scan_p) and _has_products(eqn.params["jaxpr"].jaxpr))
        for eqn in jaxpr.eqns
    )


def _product(jaxpr: Jaxpr, step: _Step, read: Callable[[Any], Any]) -> jax.Array:
    product: _Product = step.eqn.params["product"]
    *leaves, out = step.eqn.invars
    if not step.follows:
        return read(out)
    here = listener()
    if here is not None and product.use in here.uses:
        words = said(step.bias is not None, step.activation, step.residual is not None)
        place = here.uses.index(product.use)
        here.uses[place] = product.use._replace(why=f"{product.use.why}; {words}")
    atoms = list(dict.fromkeys(_variables(step.inputs)))

    def reader(values: Sequence[Any]) -> tuple[dict[Any, Any], Callable[[Any], Any]]:
        env = dict(zip(atoms, values))
        return env, lambda atom: atom.val if isinstance(atom, Literal) else env[atom]

    def multiply(read: Callable[[Any], Any], *then: Any) -> jax.Array:
        operands = jax.tree.unflatten(product.treedef, list(map(read, leaves)))
        with _quax.as_written(step.eqn), jax.default_matmul_precision(product.precision):
            return product.run(operands, *then)

    @jax.custom_jvp
    def inside(*values: Any) -> jax.Array:
        _, read = reader(values)
        bias = None if step.bias is None else jnp.reshape(read(step.bias[0]), step.bias[1])
        residual = None if step.residual is None else read(step.residual)
        return multiply(read, bias, step.activation, residual)

    def apart(*values: Any) -> jax.Array:
        env, read = reader(values)
        env[step.eqn.outvars[0]] = multiply(read, None, None, None)
        for eqn in step.then:
            env.update(zip(eqn.outvars, _bind(jaxpr, eqn, list(map(read, eqn.invars)))))
        return env[step.out[0]]

    def derivative(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
        moving = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

        def of(*moved: Any) -> jax.Array:
            values = dict(enumerate(primals)) | dict(zip(moving, moved))
            return apart(*values.values())

        if not moving:
            return (out := of()), jnp.zeros_like(out)
        return jax.jvp(of, [primals[i] for i in moving], [tangents[i] for i in moving])

    inside.defjvp(derivative, symbolic_zeros=True)
    return inside(*map(read, atoms))


def _needed(steps: list[_Step], outs: Sequence[Any]) -> list[_Step]:
    """Those that lead to the results, or have an effect."""
    wanted, kept = set(_variables(outs)), []
    for step in reversed(steps):
        if step.eqn.effects or wanted.intersection(step.out):
            kept.append(step)
            wanted.update(_variables(step.inputs))
    return kept[::-1]


def _variables(atoms: Sequence[Any]) -> list[Var]:
    return [a for a in atoms if not isinstance(a, Literal)]


def _steps(jaxpr: Jaxpr) -> list[_Step]:
    """The equations, each product moved down to the last of those that it takes in."""
    made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    users: dict[Any, list[int]] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for v in _variables(eqn.invars):
            users.setdefault(v, []).append(i)
    for v in _variables(jaxpr.outvars):
        users.setdefault(v, []).append(len(jaxpr.eqns))
    steps: dict[int, list[_Step]] = {}
    taken: set[int] = set()
    for i, eqn in enumerate(jaxpr.eqns):
        step = _Step(eqn, list(eqn.outvars))
        last = i
        if step.marked:
            inside = _follow(step, jaxpr.eqns, users, made, taken)
            taken.update(inside)
            last = max([i, *inside])
        if i not in taken:
            steps.setdefault(last, []).append(step)
    return [step for i in sorted(steps) for step in steps[i]]


def _follow(
    step: _Step,
    eqns: Sequence[JaxprEqn],
    users: dict[Any, list[int]],
    made: dict[Any, JaxprEqn],
    taken: set[int],
) -> list[int]:
    """Takes into the product what alone uses its result; returns the equations taken."""
    inside: list[int] = []
    shape = _shape(step.out[0])
    product: _Product = step.eqn.params["product"]
    while step.residual is None:
        [v] = step.out
        by = users.get(v, [])
        if not by or by[-1] == len(eqns) or taken.intersection(by):
            break
        first = eqns[by[0]]
        if len(by) == 1 and first.primitive is lax.add_p and _shape(first.outvars[0]) == shape:
            [other] = [atom for atom in first.invars if atom is not v]
            bias = _bias(other, shape, product, made)
            if bias is not None and step.bias is None and step.activation is None:
                step.bias = bias[:2]
                step.then += bias[2]
            elif _shape(other) == shape:
                step.residual = other
            else:
                break
            here = [by[0]]
        elif step.activation is None:
            found = _activation(eqns, by[0], v)
            if found is None or set(by) - set(found[1]) or taken.intersection(found[1]):
                break
            step.activation, here = found
            if not _alone(eqns, here, users):
                step.activation = None
                break
        else:
            break
        inside += here
        step.then += [eqns[i] for i in here]
        step.out = list(eqns[here[-1]].outvars)
    return inside


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _alone(eqns: Sequence[JaxprEqn], here: list[int], users: dict[Any, list[int]]) -> bool:
    """Whether nobody else needs what lies between the first and the last of these."""
    between = [v for i in here[:-1] for v in eqns[i].outvars]
    return all(set(users.get(v, [])) <= set(here) for v in between)


def _bias(
    atom: Any, shape: Sequence[int], product: _Product, made: dict[Any, JaxprEqn]
) -> tuple[Any, list[int], list[JaxprEqn]] | None:
    """What a summand is made of, in which shape, and how, if it is the same for all rows."""
    rows = range(product.batch, len(shape) - product.columns)
    sizes = list(atom.aval.shape)
    eqn = None if isinstance(atom, Literal) else made.get(atom)
    spread: list[JaxprEqn] = []
    if eqn is not None and eqn.primitive is lax.broadcast_in_dim_p and len(eqn.invars) == 1:
        [atom], spread = eqn.invars, [eqn]
        sizes = [1] * len(shape)
        for place, size in zip(eqn.params["broadcast_dimensions"], atom.aval.shape):
            sizes[place] = size
    same = len(sizes) == len(shape) and all(sizes[d] == 1 for d in rows)
    return (atom, sizes, spread) if same else None


# What JAX calls by these names, and the other way to write one of them.
_FORMS = (*ACTIVATIONS.items(), ("relu", lambda x: jnp.maximum(x, 0)))


def _activation(eqns: Sequence[JaxprEqn], first: int, v: Any) -> tuple[str, list[int]] | None:
    """The activation of `v` that begins at an equation, and all its equations."""
    for form, (name, _) in enumerate(_FORMS):
        pattern = _pattern(form, v.aval.shape)
        here = list(range(first, first + len(pattern.eqns)))
        same = {pattern.invars[0]: v}
        if here[-1] < len(eqns) and all(
            _alike(wanted, eqns[i], same) for wanted, i in zip(pattern.eqns, here)
        ):
            return name, here
    return None


@functools.lru_cache(1024)
def _pattern(form: int, shape: tuple[int, ...]) -> Jaxpr:
    """The equations of an activation, as they come out of a function in `accelerate`."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.make_jaxpr(quax.quaxify(_FORMS[form][1]))(x).jaxpr


def _alike(wanted: JaxprEqn, eqn: JaxprEqn, same: dict[Any, Any]) -> bool:
    """Whether two equations are the same, if these variables are; then so are their results."""
    if wanted.primitive is not eqn.primitive or len(wanted.invars) != len(eqn.invars):
        return False
    for a, b in zip(wanted.invars, eqn.invars):
        if isinstance(a, Literal):
            if not isinstance(b, Literal) or a.val != b.val:
                return False
        elif same.get(a) is not b:
            return False
    if any(not _alike_params(key, value, eqn.params) for key, value in wanted.params.items()):
        return False
    same.update(zip(wanted.outvars, eqn.outvars))
    return True


def _alike_params(key: str, a: Any, params: dict[str, Any]) -> bool:
    b = params.get(key)
    if isinstance(a, (ClosedJaxpr, Jaxpr)):
        return type(a) is type(b) and _NAMES.sub("", str(a)) == _NAMES.sub("", str(b))
    # quax gives calls its own names; whatever their derivatives are, they stay.
    return key in ("name", "jvp_jaxpr_fun") or callable(a) or a == b


_NAMES = re.compile(r"name=\w+")
