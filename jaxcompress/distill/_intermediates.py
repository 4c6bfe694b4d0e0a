"""`intermediates`: what an unmodified function computes on its way, by the names of weights.

A model names its parameters, not its activations. So an activation is named by the
parameter that makes it: "the output of the product with `params/Dense_0/kernel`", "the sum
with `params/Dense_0/bias`". No framework has to be known for this and nothing has to be
called in the model. The function is traced; in its program a value that is made of one
parameter alone (turned, cast, scaled, rounded, gathered by constants) is still that
parameter, and the operation in which it first meets data is the one looked for. The
program is then run with those operations' inputs and outputs as further results, through
`jit`, `scan` and `checkpoint`, so what comes out is differentiable like anything else.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jax.extend.core.primitives import (
    add_p,
    conv_general_dilated_p,
    div_p,
    dot_general_p,
    gather_p,
    mul_p,
    remat_p,
    scan_p,
    sub_p,
)

from jaxcompress._accelerate import accelerate
from jaxcompress._accelerate._accelerate import _refuse_lost_updates
from jaxcompress._accelerate._named import marking, product_p
from jaxcompress._paths import leaves_with_paths, map_with_paths
from jaxcompress._quax import ragged_dot_general_p, scan_sizes
from jaxcompress._rules import Patterns, matched
from jaxcompress.arrays import is_compressed
from jaxcompress.arrays._quantized import replace

__all__ = ["Product", "intermediates"]

Origin = frozenset[str | None]  # the paths of parameters that a value is made of
_DATA: Origin = frozenset([None])
_MEETINGS = {
    add_p,
    conv_general_dilated_p,
    div_p,
    dot_general_p,
    gather_p,
    mul_p,
    ragged_dot_general_p,
    sub_p,
}


class Product(NamedTuple):
    """What a named parameter was multiplied with, or added to, and the result.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.distill.Product(jnp.ones(3), jnp.zeros(2)).output.shape
    (2,)
    """

    input: jax.Array
    output: jax.Array


def intermediates(
    fn: Callable[..., Any], rules: Patterns
) -> Callable[..., tuple[Any, dict[str, Product]]]:
    """Makes `fn` return, besides its result, what named parameters take in and give out.

    For a dense or convolution kernel, `output` is the product and `input` what is
    multiplied, which is what the layer before gives out after its nonlinearity. For a
    bias, `output` has the bias added. For a table that is looked up, `output` are the
    rows. Under `lax.scan` they are stacked like the layers; `jit`, `grad` and `vmap`
    compose outside, and what is not used costs nothing under `jit`.

    A weight that is used again has its later uses as `path[1]`, `path[2]`, in the order of
    the program. Compressed weights, a student that is being quantized for instance, give
    the products that `jaxcompress.accelerate` computes.

    Args:
      fn: called as `fn(params, *args, **kwargs)`: `model.apply` of Linen or Haiku,
        `lambda model, x: model(x)` for NNX and Equinox, a bare function. What it is to
        work on has to come in as arguments.
      rules: patterns of the paths of parameters.

    Returns:
      A function of the same arguments that returns `(fn's result, {path: Product})`. The
      axes of a product are those of the input and then those of the weight, whichever of
      the two the function puts first.

    Raises:
      ValueError: a pattern that matches nothing; a parameter that meets no data, or only
        where it cannot be followed: in a `while_loop`, a `cond`, a function with a
        derivative of its own.
      TypeError: `fn` updates an argument in place and does not return it.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 2))}
    >>> model = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
    >>> logits, found = jax.jit(jc.distill.intermediates(model, ["w2"]))(params, jnp.ones((5, 3)))
    >>> found["w2"].input.shape, found["w2"].output.shape
    ((5, 4), (5, 2))
    """

    def captured(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Product]]:
        wanted = matched(params, rules)
        # Under the path that it has here, whatever it was quantized as.
        params = map_with_paths(
            lambda path, leaf: replace(leaf, path=path) if is_compressed(leaf) else leaf, params
        )
        paths = [path for path, leaf in leaves_with_paths(params) for _ in jax.tree.leaves(leaf)]
        leaves, treedef = jax.tree.flatten((params, args, kwargs))
        is_array = [isinstance(x, (jax.Array, np.ndarray, np.generic)) for x in leaves]
        out_tree, out_static = None, []

        def call(arrays: list[Any]) -> list[Any]:
            nonlocal out_tree, out_static
            rest = iter(arrays)
            given = [next(rest) if a else x for x, a in zip(leaves, is_array)]
            call_params, call_args, call_kwargs = jax.tree.unflatten(treedef, given)
            out = accelerate(fn)(call_params, *call_args, **call_kwargs)
            out_leaves, out_tree = jax.tree.flatten(out)
            after = (call_params, call_args, call_kwargs)
            _refuse_lost_updates(given, after, out_leaves)
            out_static = [None if isinstance(x, jax.Array) else x for x in out_leaves]
            return [x for x in out_leaves if isinstance(x, jax.Array)]

        arrays = [x for x, a in zip(leaves, is_array) if a]
        with marking():
            closed = jax.make_jaxpr(call)(arrays)
        origins = [frozenset([p]) for p in paths] + [_DATA] * (len(leaves) - len(paths))
        reader = _Reader(wanted, {p for p, x in leaves_with_paths(params) if is_compressed(x)})
        origins = [o for o, a in zip(origins, is_array) if a]
        outs, sites = reader.run(closed.jaxpr, closed.consts, arrays, origins)
        missing = sorted(wanted - {path for path, _ in sites})
        if missing:
            raise ValueError(
                f"{', '.join(map(repr, missing))} met no data that came in as an argument"
            )
        rest = iter(outs)
        out = [next(rest) if x is None else x for x in out_static]
        found: dict[str, Product] = {}
        uses: dict[str, int] = {}
        for path, product in sites:
            number = uses[path] = uses.get(path, -1) + 1
            found[path if number == 0 else f"{path}[{number}]"] = product
        return jax.tree.unflatten(out_tree, out), found

    return captured


Sites = list[tuple[str, Product]]


class _Reader(NamedTuple):
    """Runs jaxprs and keeps what the wanted parameters meet."""

    wanted: set[str]
    compressed: set[str]  # of these only marked products count

    def met(self, eqn: Any, origins: Sequence[Origin]) -> tuple[list[str], int, int]:
        """The wanted parameters that meet data in this equation, and which operand is what."""
        if eqn.primitive is product_p:
            return [eqn.params["path"]] if eqn.params["path"] in self.wanted else [], 1, 0
        if eqn.primitive in _MEETINGS:
            first, second = origins[:2]
            for a, b, which in ((first, second, 0), (second, first, 1)):
                if a and None not in a and None in b:
                    return self.named(a - self.compressed), which, 1 - which
        return [], 0, 0

    def named(self, origin: Origin) -> list[str]:
        return sorted(path for path in origin if path is not None and path in self.wanted)

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], origins: Sequence[Origin]
    ) -> tuple[list[Any], Sites]:
        values = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
        made_of = dict(zip(jaxpr.invars, origins))
        sites: Sites = []
        for eqn in jaxpr.eqns:
            ins = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
            of = [_origin(made_of, v) for v in eqn.invars]
            inside: list[str] = []
            out_of = self.follow(eqn, of, inside)
            if inside and eqn.primitive not in _MEETINGS | {product_p}:
                outs, new = self.inner(eqn, ins, of, inside)
                sites += new
            else:
                outs = _bind(eqn, ins)
                names, weight, data = self.met(eqn, of)
                if names:
                    product = Product(ins[data], _weight_last(eqn, ins, outs[0], weight))
                    sites += [(path, product) for path in names]
            values |= zip(eqn.outvars, outs)
            made_of |= zip(eqn.outvars, out_of)
        return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars], sites

    def follow(self, eqn: Any, origins: Sequence[Origin], met: list[str]) -> list[Origin]:
        """What the results are made of, without running; appends what meets data inside."""
        names, *_ = self.met(eqn, origins)
        met += names
        everything = frozenset[str | None]().union(*origins)
        out = [everything] * len(eqn.outvars)
        for body, at in _bodies(eqn):
            if len(body.invars) == len(origins[at:]):  # what enters where is known
                entering = list(origins[at:])
                first, count = _carry(eqn)
                while True:
                    inner_met: list[str] = []
                    made_of = dict(zip(body.invars, entering))
                    for inner in body.eqns:
                        of = [_origin(made_of, v) for v in inner.invars]
                        made_of |= zip(inner.outvars, self.follow(inner, of, inner_met))
                    left = [_origin(made_of, v) for v in body.outvars]
                    again = [
                        o | left[i - first] if first <= i < first + count else o
                        for i, o in enumerate(entering)
                    ]
                    if again == entering:
                        break
                    entering = again
                met += inner_met
                out = left if at == 0 else [a | b for a, b in zip(out, left)]
            elif None in everything:
                met += self.named(everything)
        return out

    def inner(
        self, eqn: Any, ins: list[Any], origins: list[Origin], inside: list[str]
    ) -> tuple[list[Any], Sites]:
        """Runs an equation that holds a program in which a wanted parameter meets data."""
        name, params = eqn.primitive.name, eqn.params
        if eqn.primitive is scan_p:
            return self.scan(eqn, ins, origins)
        if name in ("jit", "pjit", "closed_call", "core_call"):
            closed = params.get("jaxpr", params.get("call_jaxpr"))
            return self.run(closed.jaxpr, closed.consts, ins, origins)
        if eqn.primitive is remat_p:
            paths: list[str] = []

            def body(*args: Any) -> tuple[list[Any], list[Product]]:
                outs, sites = self.run(params["jaxpr"], (), args, origins)
                paths[:] = [path for path, _ in sites]
                return outs, [product for _, product in sites]

            again = jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])
            outs, products = again(*ins)
            return outs, list(zip(paths, products))
        raise ValueError(
            f"{', '.join(map(repr, sorted(set(inside))))} meets data inside {name}, where "
            "intermediates cannot follow it"
        )

    def scan(self, eqn: Any, ins: list[Any], origins: list[Origin]) -> tuple[list[Any], Sites]:
        params = eqn.params
        paths: list[str] = []
        first, count = _carry(eqn)
        closed = params["jaxpr"]
        left = self.follow(eqn, origins, [])
        entering = [
            o | left[i - first] if first <= i < first + count else o for i, o in enumerate(origins)
        ]

        def step(carry: Any, xs: Any) -> Any:
            args = [*ins[:first], *carry, *xs]
            outs, sites = self.run(closed.jaxpr, closed.consts, args, entering)
            paths[:] = [path for path, _ in sites]
            return outs[:count], (outs[count:], [product for _, product in sites])

        carry, (ys, products) = lax.scan(
            step,
            ins[first : first + count],
            ins[first + count :],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys], list(zip(paths, products))


def _origin(made_of: dict[Any, Origin], v: Any) -> Origin:
    """Constants are made of nothing: they leave a parameter what it is."""
    return frozenset() if isinstance(v, Literal) else made_of.get(v, frozenset())


def _bodies(eqn: Any) -> list[tuple[Any, int]]:
    """The programs inside an equation, and at which operand their arguments start."""
    at = 1 if eqn.primitive.name == "cond" else 0
    found = []
    for value in eqn.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                found.append((inner, at))
    return found


def _carry(eqn: Any) -> tuple[int, int]:
    """The first operand that a loop carries, and how many."""
    if eqn.primitive is scan_p:
        return scan_sizes(eqn.params)
    return 0, 0


def _bind(eqn: Any, ins: list[Any]) -> list[Any]:
    if eqn.primitive is product_p:
        return [ins[1]]
    with eqn.ctx.manager:
        bound = eqn.primitive.get_bind_params(eqn.params)
        if isinstance(bound, tuple):  # as JAX 0.10 and before have it
            out = eqn.primitive.bind(*bound[0], *ins, **bound[1])
        else:
            out = eqn.primitive.bind(*ins, **bound)
    return list(out) if eqn.primitive.multiple_results else [out]


def _weight_last(eqn: Any, ins: list[Any], out: jax.Array, weight: int) -> jax.Array:
    """A product with the axes of the weight after those of the data."""
    if eqn.primitive is not dot_general_p or weight != 0:
        return out
    (contract, _), (batch, _) = eqn.params["dimension_numbers"]
    b, free = len(batch), np.ndim(ins[0]) - len(contract) - len(batch)
    return jnp.moveaxis(out, range(b, b + free), range(out.ndim - free, out.ndim))
