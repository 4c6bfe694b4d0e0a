"""Rotations that are folded into the weights on both sides, so that nothing is paid for them."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress._model import trace_model
from jaxcompress._paths import leaves_with_paths, rebuild
from jaxcompress._rules import Patterns, matched
from jaxcompress.arrays import is_compressed
from jaxcompress.arrays._rotated import mix
from jaxcompress.quantize._facts import Facts
from jaxcompress.quantize._find_spaces import find_spaces
from jaxcompress.quantize._fold_scales import fold_scales
from jaxcompress.quantize._spaces import CENTRED, FIXED, MET, Axes

__all__ = ["Rotatable", "Turn", "fold_rotations", "rotatable"]


class Turn(NamedTuple):
    """Of an axis of a weight that activations are multiplied along: whether they are rotated.

    `rotated` is the number of features that are rotated among each other, those of one head
    for instance; 0 if they stay.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> fn = lambda p, x: x @ p["a"]
    >>> [row] = jc.quantize.rotatable(fn, {"a": jnp.ones((2, 2))}, jnp.ones((1, 2)))
    >>> row.path, row.axis, row.size, row.rotated, row.why
    ('a', -2, 2, 0, 'the function takes it as an argument')
    """

    path: str
    axis: int
    size: int
    rotated: int
    why: str


class Rotatable(tuple[Turn, ...]):
    """The rows of `rotatable`, one `Turn` each; prints as a table.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params, fn = {n: jnp.ones((2, 2)) for n in "ab"}, lambda p, x: x @ p["a"] @ p["b"]
    >>> {row.path: row.rotated for row in jc.quantize.rotatable(fn, params, jnp.ones((1, 2)))}
    {'a': 0, 'b': 2}
    """

    def __str__(self) -> str:
        head = ("path", "axis", "size", "rotated", "why it stays")
        rows = [head, *(tuple(map(str, row)) for row in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
        lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
        return "\n".join(lines)

    __repr__ = __str__


def fold_rotations(
    fn: Callable[..., Any],
    params: Any,
    *example: Any,
    rules: Patterns | None = None,
    seed: int = 0,
) -> Any:
    """Rotates features between weights; outliers spread, the function stays what it is.

    `x w = (x Q) (Q^T w)`: what makes `x` is rotated as well, its biases and tables too, so
    that no rotation is left at run time. `fn` is traced; its operations say which axes of
    which leaves rotate together, through residual sums, reshapes and products on other axes:

    - a residual stream, from the table of words to the last layer, behind norms of the mean
      square and of variance. Their scales are first taken into the next weights,
      `(x g + b) w = (x + b / g) (g w)`, and what they take the mean of is rotated by a `Q` that
      keeps the vector of ones, so that `fn` may go on taking it away;
    - the values of each head of an attention, up to the output projection.

    What meets anything else feature by feature, an activation or a scale with a residual
    beside it, stays: `rotatable` says why. `rotate` does it at run time, and composes.

    `Q` is `diag(signs) H`, `H` as in `rotate`, or `H diag(signs) H` where it keeps ones.

    Args:
      fn: called as `fn(params, *args)`.
      params: dense leaves.
      *example: the other arguments; `jax.ShapeDtypeStruct`s will do.
      rules: patterns of the leaves that may change, scales and biases among them; all if
        None. Features that any other leaf shares stay.
      seed: of the signs.

    Returns:
      A tree like `params`, of the same shapes and dtypes; quantize it next. What depends on
      anything but the results of `fn`, as another head on the same stream, changes.

    Raises:
      ValueError: no features can be rotated, with the reasons.
      TypeError: a compressed leaf; fold first, then compress.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> a, b, x = jax.random.normal(jax.random.key(0), (3, 64, 64))
    >>> params = {"a": a.at[:, 5].mul(50.0), "b": b}  # the sixth feature between is large
    >>> fn = lambda p, x: x @ p["a"] @ p["b"]
    >>> new = jc.quantize.fold_rotations(fn, params, x)
    >>> rules = {"a": jc.quantize.int8(), "b": jc.quantize.w4a4()}
    >>> def error(p):
    ...     y = jc.accelerate(fn)(jc.quantize.quantize(p, rules), x)
    ...     return jnp.linalg.norm(y - fn(params, x))
    >>> bool(error(new) < 0.7 * error(params))
    True

    Ashkboos et al., 2024, QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs,
    arXiv:2404.00456.
    """
    found = _find(fn, params, example, rules)
    facts, spaces, new = found.facts, found.facts.spaces, {}
    signs: dict[int, jax.Array] = {}
    for path, axes in found.parameters.items():
        leaf = found.leaves[path]
        for d, label in enumerate(axes):
            parts = [] if label is None else spaces.parts(label.space)
            sizes = [spaces.sizes[part] for part in parts]
            for i, part in enumerate(parts):
                if not _turns(facts, part):
                    continue
                centred = spaces.why(part, CENTRED) is not None
                if part not in signs:
                    name = zlib.crc32(f"{path} {d} {i}".encode())
                    signs[part] = _signs(seed, name, sizes[i], centred)
                whole = leaf.shape
                split = leaf.reshape(*whole[:d], *sizes, *whole[d + 1 :])
                leaf = _turned(split, d + i, signs[part], centred).reshape(whole)
        new[path] = leaf
    if not signs:
        raise ValueError(f"no features of fn can be rotated:\n{found.report()}")
    changed = {path for path, leaf in new.items() if leaf is not found.before[path]}
    leaves = leaves_with_paths(params)
    return rebuild(params, [new[p].astype(x.dtype) if p in changed else x for p, x in leaves])


def rotatable(
    fn: Callable[..., Any], params: Any, *example: Any, rules: Patterns | None = None
) -> Rotatable:
    """What `fold_rotations` rotates of what enters each weight, and why the rest stays.

    Args:
      fn, params, *example, rules: as for `fold_rotations`.

    Returns:
      A `Rotatable`: a tuple of `Turn` rows that prints as a table.

    Raises:
      TypeError: as `fold_rotations`.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> params = {n: jnp.ones((2, 2)) for n in "abc"}
    >>> fn = lambda p, x: jax.nn.relu(x @ p["a"] @ p["b"]) @ p["c"]
    >>> jc.quantize.rotatable(fn, params, jnp.ones((1, 2)))
    path  axis  size  rotated  why it stays
    a     -2    2     0        the function takes it as an argument
    b     -2    2     2
    c     -2    2     0        max acts on each of its features
    """
    return _find(fn, params, example, rules).report()


class _Found(NamedTuple):
    facts: Facts
    parameters: dict[str, Axes]
    before: dict[str, jax.Array]
    leaves: dict[str, jax.Array]  # with the scales of norms taken into them

    def report(self) -> Rotatable:
        spaces, rows = self.facts.spaces, []
        for space in self.facts.contracted & self.facts.own.keys():
            path, d = self.facts.own[space]
            parts = spaces.parts(space)
            turned = [spaces.sizes[part] for part in parts if _turns(self.facts, part)]
            why = "" if turned else spaces.why(parts[-1], FIXED) or ""
            size, axis = spaces.sizes[space], d - len(self.parameters[path])
            rows.append(Turn(path, axis, size, max(turned, default=0), why))
        places = list(self.parameters)
        return Rotatable(sorted(rows, key=lambda row: (places.index(row.path), row.axis)))


def _find(fn: Callable[..., Any], params: Any, example: Any, rules: Patterns | None) -> _Found:
    for path, leaf in leaves_with_paths(params):
        if is_compressed(leaf):
            raise TypeError(f"{path!r} is a {type(leaf).__name__}: fold first, then compress")
    model = trace_model(fn, params, example)
    facts, parameters = find_spaces(
        model, set(model.paths) if rules is None else matched(params, rules)
    )
    arrays = {path: leaf for path, leaf in leaves_with_paths(params) if path in parameters}
    floats = {p: x for p, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    wide = {p: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)) for p, x in floats.items()}
    leaves = fold_scales(facts, parameters, wide)
    return _Found(facts, {path: parameters[path] for path in wide}, wide, leaves)


def _turns(facts: Facts, part: int) -> bool:
    """Whether a space that is no product is rotated: it may be, and weights gain by it."""
    return facts.spaces.why(part, FIXED) is None and facts.spaces.why(part, MET) is not None


def _signs(seed: int, name: int, size: int, centred: bool) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), name)
    signs = jax.random.rademacher(key, (size,), jnp.int8)
    return signs.at[0].set(1) if centred else signs  # the first row of H is that of ones


def _turned(x: jax.Array, axis: int, signs: jax.Array, centred: bool) -> jax.Array:
    """`x Q` along an axis."""
    along = signs.reshape([-1 if d == axis else 1 for d in range(x.ndim)])
    return mix((mix(x, (axis,)) if centred else x) * along, (axis,))
