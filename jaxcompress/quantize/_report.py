"""What quantization has cost: of each leaf its errors and its bits, of the whole its output."""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._accelerate import accelerate
from jaxcompress._layout import layout
from jaxcompress._matrices import Matrices
from jaxcompress._paths import leaves_with_paths, map_with_paths, subtrees
from jaxcompress._program import Unit, name_of
from jaxcompress._sequential import Tell, sequential
from jaxcompress._statistics import Observed, second_moment
from jaxcompress.arrays import is_compressed

__all__ = ["LeafReport", "Report", "report", "sensitivity"]


class LeafReport(NamedTuple):
    """One compressed leaf; see `report`.

    >>> import jaxcompress as jc
    >>> row = jc.quantize.LeafReport("w", "int4", (8, 8), 4.5, 36, 21.0, 0.09)
    >>> row.bits
    4.5
    """

    path: str
    format: str
    shape: tuple[int, ...]
    bits: float
    nbytes: int
    sqnr: float
    output_error: float | None


class Report(NamedTuple):
    """What `report` returns; prints as a table.

    >>> import jaxcompress as jc
    >>> row = jc.quantize.LeafReport("w", "int4", (8, 8), 4.5, 36, 21.0, None)
    >>> print(jc.quantize.Report((row,), 0.1, 36, 256))
    path  format  shape  bits  bytes  SQNR dB  output error
    w     int4    8x8    4.50  36     21.0     -
    all: 36 bytes of 256, output error 0.1000
    """

    leaves: tuple[LeafReport, ...]
    output_error: float
    nbytes: int
    dense_nbytes: int

    def json(self) -> str:
        """The same as JSON; an infinite ratio is null."""
        finite = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
        rows = [{k: finite(v) for k, v in row._asdict().items()} for row in self.leaves]
        return json.dumps({**self._asdict(), "leaves": rows}, indent=1)

    def __str__(self) -> str:
        head = ("path", "format", "shape", "bits", "bytes", "SQNR dB", "output error")
        rows = [
            (
                row.path,
                row.format,
                "x".join(map(str, row.shape)),
                f"{row.bits:.2f}",
                f"{row.nbytes:,}",
                f"{row.sqnr:.1f}",
                "-" if row.output_error is None else f"{row.output_error:.4f}",
            )
            for row in self.leaves
        ]
        share = f"{self.nbytes:,} bytes of {self.dense_nbytes:,}"
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip()
            for row in (head, *rows)
        ]
        return "\n".join([*lines, f"all: {share}, output error {self.output_error:.4f}"])


def report(
    fn: Callable[[Any, Any], Any], params: Any, qparams: Any, batches: Iterable[Any]
) -> Report:
    """Measures a compressed model against the dense one, leaf by leaf and as a whole.

    `SQNR = 10 log10(|w|^2 / |w - w_hat|^2)`;
    `output error = |x (w - w_hat)| / |x w|` over the activations `x` that the dense model
    feeds to the leaf, all rows together.

    Args:
      fn: called as `fn(params, batch)`.
      params: the dense parameters.
      qparams: the same with compressed leaves.
      batches: inputs, all of one shape, as floats are compared over all of them.

    Returns:
      A `Report`: for each compressed leaf its format, bits a weight (scales included),
      bytes, SQNR in decibels and output error (None where it meets no product, as a table
      that is only looked up; activations are not quantized in it); for the whole
      `|fn(qparams) - fn(params)| / |fn(params)|`, activations quantized where the specs
      say so, and the bytes of all arrays. `print` it, or take its `.json()`.

    Raises:
      ValueError: no batches, nothing compressed, or batches of several shapes.

    >>> import jax, jax.numpy as jnp, jaxcompress as jc
    >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.array([[1.0, 0.3], [0.2, 0.7]])}
    >>> qparams = jc.quantize.quantize(params, {"w": jc.quantize.int4()})
    >>> print(jc.quantize.report(fn, params, qparams, [jnp.eye(2)]))
    path  format  shape  bits    bytes  SQNR dB  output error
    w     int4    2x2    144.00  72     27.0     0.0449
    all: 72 bytes of 16, output error 0.0449
    """
    batches = list(batches)
    paths = [path for path, _ in leaves_with_paths(params)]
    dense = dict(zip(paths, (leaf for _, leaf in leaves_with_paths(params))))
    small = dict(zip(paths, subtrees(qparams, params)))
    small = {path: leaf for path, leaf in small.items() if is_compressed(leaf)}
    if not batches or not small:
        raise ValueError(
            "report needs batches" if small else "report found no compressed array in qparams"
        )
    found = dict(zip(paths, subtrees(layout(fn, params, batches[0]), params)))
    met = [path for path in small if found[path] is not None and found[path].contract is not None]
    sums: dict[str, list[float]] = {}

    def measure(unit: Unit, leaves: dict[str, Any], observed: Observed, _: Tell) -> dict[str, Any]:
        (path, row), leaf = unit, leaves[name_of(unit)]
        matrices = Matrices.of(leaf.shape, found[path])
        decoded = small[path].materialise()
        decoded = decoded if row is None else decoded[row]
        h = matrices.statistic(observed.of(path), 2)
        for i, part in enumerate((decoded.astype(jnp.float32) - leaf, leaf)):
            w = matrices.split(part.astype(jnp.float32))
            sums.setdefault(path, [0.0, 0.0])[i] += float(jnp.einsum("bkn,bkl,bln->", w, h, w))
        return {}

    sequential(fn, params, batches, met, second_moment(), measure, identity=None, skip_unmet=True)
    rows = tuple(_row(path, leaf, dense[path], sums.get(path)) for path, leaf in small.items())
    error = _output_error(fn, params, qparams, batches)
    nbytes = lambda tree: sum(
        leaf.nbytes for _, leaf in leaves_with_paths(tree) if hasattr(leaf, "nbytes")
    )
    return Report(rows, error, nbytes(qparams), nbytes(params))


def _row(path: str, leaf: Any, dense: Any, sums: list[float] | None) -> LeafReport:
    qtype = getattr(leaf, "qtype", None)
    w = np.asarray(dense, np.float64)
    noise = float(np.sum((w - np.asarray(leaf.materialise(), np.float64)) ** 2))
    signal = float(np.sum(w**2))
    return LeafReport(
        path,
        type(leaf).__name__ if qtype is None else qtype.name,
        tuple(leaf.shape),
        8 * leaf.nbytes / max(w.size, 1),
        leaf.nbytes,
        10 * math.log10(signal / noise) if signal and noise else math.inf,
        None if sums is None else _ratio(*sums),
    )


def _output_error(fn: Callable, params: Any, qparams: Any, batches: list[Any]) -> float:
    @eqx.filter_jit
    def squares(params: Any, qparams: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        floats = lambda tree: [
            x.astype(jnp.float32) for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x)
        ]
        want, got = floats(fn(params, batch)), floats(accelerate(fn)(qparams, batch))
        return (
            sum((jnp.sum((a - b) ** 2) for a, b in zip(got, want)), jnp.float32(0)),
            sum((jnp.sum(b**2) for b in want), jnp.float32(0)),
        )

    parts = np.asarray([squares(params, qparams, batch) for batch in batches], np.float64).sum(0)
    return _ratio(*parts)


def _ratio(noise: float, signal: float) -> float:
    """The square root of a ratio of sums of squares; sums in float32 may end below zero."""
    return math.sqrt(max(noise, 0.0) / signal) if signal else 0.0


def sensitivity(
    loss: Callable[[Any, Any], jax.Array], params: Any, qparams: Any, batches: Iterable[Any]
) -> dict[str, float]:
    """How much the loss grows when a single leaf is compressed and all others stay dense.

    `mean_batches loss(params with leaf) - loss(params)`, for each compressed leaf in turn,
    in one compiled sweep. Activations stay in floats.

    Args:
      loss: called as `loss(params, batch)`; a scalar.
      params: the dense parameters.
      qparams: the same with compressed leaves.
      batches: an iterable, read once.

    Returns:
      `{path: change}`, the most sensitive leaf first.

    Raises:
      ValueError: no batches, or nothing compressed.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> params = {"a": jnp.array([[1.0, 0.3]]), "b": jnp.array([[1.0], [1.0]])}
    >>> loss = lambda p, x: jnp.mean((x @ p["a"] @ p["b"] - 1.0) ** 2)
    >>> rules = {"a": jc.quantize.int2(axis=-1), "b": jc.quantize.int2()}
    >>> qparams = jc.quantize.quantize(params, rules)
    >>> found = jc.quantize.sensitivity(loss, params, qparams, [jnp.ones((1, 1))])
    >>> {path: round(change, 3) for path, change in found.items()}
    {'b': 0.0, 'a': -0.09}
    """
    pairs = leaves_with_paths(params)
    small = dict(zip((path for path, _ in pairs), subtrees(qparams, params)))
    paths = [path for path, leaf in small.items() if is_compressed(leaf)]
    if not paths:
        raise ValueError("sensitivity found no compressed array in qparams")
    decoded = {path: small[path].materialise() for path in paths}

    @eqx.filter_jit
    def sweep(params: Any, decoded: dict[str, jax.Array], batch: Any) -> jax.Array:
        def one(which: jax.Array) -> jax.Array:
            swap = lambda path, leaf: (
                jnp.where(which == paths.index(path), decoded[path], leaf)
                if path in decoded
                else leaf
            )
            return loss(map_with_paths(swap, params), batch)

        return jax.lax.map(one, jnp.arange(-1, len(paths)))

    losses = [np.asarray(sweep(params, decoded, batch), np.float64) for batch in batches]
    if not losses:
        raise ValueError("sensitivity got no batches")
    mean = np.mean(losses, 0)
    changes = zip(paths, (mean[1:] - mean[0]).tolist())
    return dict(sorted(changes, key=lambda pair: -pair[1]))
