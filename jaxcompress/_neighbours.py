"""What stands before and after a product in a traced program: biases, activations, norms."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from jaxcompress._program import Program, Unit, name_of, step

__all__ = ["VIEWS", "Neighbours", "Product", "constants", "neighbours_of", "product_of"]

# They keep every element.
VIEWS = {"reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "copy", "transpose"}


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with one weight: where its channels are.

    `contract` and `output` are axes of the weight; `entering` and `leaving` the dimensions
    of the other operand and of the result that belong to them.
    """

    unit: Unit
    x: Any
    out: Var
    contract: int
    output: int
    entering: int
    leaving: int


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The uses and the makers of every variable of a program."""

    program: Program
    uses: dict[Var, list[JaxprEqn]]
    made: dict[Var, JaxprEqn]
    slots: dict[Var, Unit]

    def only_use(self, value: Var) -> JaxprEqn | None:
        """The equation that uses `value`, if one does and `value` is no result."""
        found = self.uses.get(value, [])
        return found[0] if len(found) == 1 and value not in self.program.jaxpr.outvars else None

    def parameter(self, value: Any) -> Unit | None:
        """The unit that `value` is a view of, if that is used for nothing else."""
        start, _ = self._views(value)
        return self.slots.get(start) if start is not None else None

    def view(self, value: Any) -> Callable[[Any], Any]:
        """What `value` does to the places of its parameter's elements, for any dtype."""
        _, eqns = self._views(value)

        def run(leaf: Any) -> Any:
            for eqn in eqns:
                if eqn.primitive.name != "convert_element_type":
                    leaf = eqn.primitive.bind(leaf, **eqn.params)
            return leaf

        return run

    def along(self, value: Any, dimension: int) -> bool:
        """Whether the parameter behind `value` has a number for each index of a dimension."""
        unit = self.parameter(value)
        if unit is None:
            return False
        start, _ = self._views(value)
        assert start is not None
        leaf: Any = start.aval
        size = value.aval.shape[dimension]
        if leaf.size != size:
            return False
        with jax.ensure_compile_time_eval():  # the program may be read within another trace
            seen = np.asarray(self.view(value)(jnp.arange(size).reshape(leaf.shape)))
        shape = [size if d == dimension else 1 for d in range(seen.ndim)]
        return bool(np.all(seen == np.arange(size).reshape(shape)))

    def _views(self, value: Any) -> tuple[Var | None, list[JaxprEqn]]:
        """The input that `value` is a view of, and the steps between; each used once."""
        eqns: list[JaxprEqn] = []
        while isinstance(value, Var) and self.only_use(value) is not None:
            eqn = self.made.get(value)
            if eqn is None:
                return value if value in self.slots else None, eqns[::-1]
            if eqn.primitive.name not in VIEWS:
                break
            eqns.append(eqn)
            value = eqn.invars[0]
        return None, []


def neighbours_of(program: Program) -> Neighbours:
    uses: dict[Var, list[JaxprEqn]] = {}
    made: dict[Var, JaxprEqn] = {}
    for eqn in program.jaxpr.eqns:
        made.update(dict.fromkeys(eqn.outvars, eqn))
        for v in dict.fromkeys(v for v in eqn.invars if isinstance(v, Var)):
            uses.setdefault(v, []).append(eqn)
    return Neighbours(program, uses, made, dict(zip(program.jaxpr.invars, program.units)))


def product_of(near: Neighbours, unit: Unit) -> Product | None:
    """The only product of `unit`, if it contracts one axis and has one of outputs.

    A convolution contracts its input features; its window is taken along.
    """
    at = near.program.products.get(unit, [])
    if len(at) != 1:
        return None
    eqn = near.program.jaxpr.eqns[at[0]]
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        plain = eqn.params["feature_group_count"] == eqn.params["batch_group_count"] == 1
        axes = _axes_of(near, eqn.invars[1], unit)
        if axes is None or not plain:
            return None
        return Product(
            unit,
            eqn.invars[0],
            eqn.outvars[0],
            axes[numbers.rhs_spec[1]],
            axes[numbers.rhs_spec[0]],
            numbers.lhs_spec[1],
            numbers.out_spec[1],
        )
    if eqn.primitive.name != "dot_general":
        return None
    contract, batch = eqn.params["dimension_numbers"]
    for which in (0, 1):
        x: Any = eqn.invars[1 - which]
        axes = _axes_of(near, eqn.invars[which], unit)
        if axes is None or len(axes) != 2 or batch[0] or len(contract[0]) != 1:
            continue
        [inner] = contract[which]
        leaving = 0 if which == 0 else len(x.aval.shape) - 1
        return Product(
            unit, x, eqn.outvars[0], axes[inner], axes[1 - inner], contract[1 - which][0], leaving
        )
    return None


def _axes_of(near: Neighbours, value: Any, unit: Unit) -> Sequence[int] | None:
    """For each dimension of `value` the axis of `unit` that it is, behind transpositions."""
    axes: Sequence[int] = range(len(value.aval.shape))
    while isinstance(value, Var) and near.only_use(value) is not None:
        eqn = near.made.get(value)
        if eqn is None:
            return axes if near.slots.get(value) == unit else None
        if eqn.primitive.name == "transpose":
            axes = [eqn.params["permutation"][a] for a in axes]
        elif eqn.primitive.name not in ("convert_element_type", "copy"):
            return None
        value = eqn.invars[0]
    return None


def constants(program: Program, leaves: dict[str, Any], wanted: Sequence[Any]) -> list[Any]:
    """The values of variables that do not depend on the batch."""
    env: dict[Any, Any] = dict(zip(program.jaxpr.constvars, program.consts))
    env |= dict(zip(program.jaxpr.invars, (leaves[name_of(unit)] for unit in program.units)))
    variables = [v for v in wanted if isinstance(v, Var)]
    for eqn in program.needed(variables, range(0)):
        inputs = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        env.update(zip(eqn.outvars, step(eqn)(*inputs)))
    return [v.val if isinstance(v, Literal) else env[v] for v in wanted]
