"""`explain`: what becomes of every compressed leaf, before anything runs."""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from jaxcompress._accelerate._accelerate import accelerate
from jaxcompress._paths import map_with_paths
from jaxcompress.arrays import is_compressed
from jaxcompress.arrays._quantized import replace
from jaxcompress.arrays._uses import Use, listen
from jaxcompress.ops._choice import PLATFORMS

__all__ = ["Explanation", "explain"]

_tokens = itertools.count()


class Explanation(tuple[Use, ...]):
    """The rows of `explain`, one `Use` each; prints as a table."""

    @property
    def materialised(self) -> "Explanation":
        """The rows whose weight is decoded to a dense float array."""
        return Explanation(use for use in self if use.implementation == "materialised")

    def __str__(self) -> str:
        head = ("path", "primitive", "op", "implementation", "bytes", "why")
        rows = [(u.path, u.primitive, u.op, u.implementation, f"{u.nbytes:,}", u.why) for u in self]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]])
            for row in (head, *rows)
        ]
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    fn: Callable[..., Any], params: Any, *args: Any, platform: str | None = None
) -> Explanation:
    """Says which implementation each compressed leaf gets in `fn(params, *args)`, and why.

    The function is traced, not run. A row is a leaf met by a primitive: the op and the
    implementation that take it, or "materialised" where the weight becomes a dense
    float array, with the reason and the bytes that the leaf is stored in.

    Args:
      fn: the function that `accelerate` would take.
      params: its first argument, with compressed leaves.
      *args: the others; `jax.ShapeDtypeStruct`s will do.
      platform: "cpu", "gpu" (or "cuda", "rocm"), "tpu"; the default backend if None.

    Returns:
      An `Explanation`: a tuple of `Use` rows that prints as a table.

    Raises:
      ValueError: an unknown platform, or no compressed leaf in `params`.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = jc.quantize.quantize({"w": jnp.ones((8, 4))}, {"w": jc.quantize.w8a8()})
    >>> [row] = jc.explain(lambda p, x: x @ p["w"], params, jnp.ones((32, 8)), platform="tpu")
    >>> row.path, row.op, row.implementation, row.nbytes
    ('w', 'int8_matmul', 'reference', 48)
    """
    platform = platform or jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform
    if platform not in PLATFORMS:
        raise ValueError(f"platform is one of gpu, {', '.join(PLATFORMS)}; got {platform!r}")
    if not any(map(is_compressed, jax.tree.leaves(params, is_leaf=is_compressed))):
        raise ValueError("explain found no compressed array in params")
    # JAX and quax remember traced functions by their static fields. A path that nobody
    # has used before makes them trace again, and every use is seen.
    token = f"#{next(_tokens)}"

    def mark(path: str, leaf: Any) -> Any:
        return replace(leaf, path=path + token) if is_compressed(leaf) else leaf

    with listen(platform) as uses:
        eqx.filter_eval_shape(accelerate(fn), map_with_paths(mark, params), *args)
    return Explanation(
        dict.fromkeys(use._replace(path=use.path.replace(token, "")) for use in uses)
    )
