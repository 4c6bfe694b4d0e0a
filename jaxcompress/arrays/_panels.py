"""The layout of the CPU kernels: a weight's bytes, four of `k` and sixteen columns at a time.

A canonical weight is a matrix of bytes `[rows, n]`: a byte a code, or below eight bits the
bit planes along `k`. In panels it is `[n / 16, rows / 4, 16, 4]`: sixteen columns are one
stream of 64-byte lines, each with four neighbouring rows of every column, which is what one
dot product instruction takes. Rows and columns are filled up with zeros. Four neighbouring
rows of a bit plane hold four neighbouring codes in each of their parts, so the same move of
bytes serves every width. Whole codes also get their top bit flipped: the instruction wants
one operand unsigned, and it is the weight.
"""

import jax
import jax.numpy as jnp

from jaxcompress.arrays._packing import packed_size

__all__ = ["from_panels", "to_panels"]

_COLUMNS, _ROWS = 16, 4
_FLIP = 0x80


def to_panels(stored: jax.Array, *, transpose_w: bool = False) -> jax.Array:
    """Bytes `[..., rows, n]` (`[..., n, rows]` with `transpose_w`) as panels, uint8."""
    w = stored
    if stored.dtype == jnp.int8:
        w = jax.lax.bitcast_convert_type(stored, jnp.uint8) ^ jnp.uint8(_FLIP)
    w = w if transpose_w else jnp.swapaxes(w, -1, -2)
    n, rows = w.shape[-2:]
    lead = [(0, 0)] * (w.ndim - 2)
    w = jnp.pad(w, [*lead, (0, -n % _COLUMNS), (0, -rows % _ROWS)])
    w = w.reshape(*w.shape[:-2], w.shape[-2] // _COLUMNS, _COLUMNS, w.shape[-1] // _ROWS, _ROWS)
    return jnp.swapaxes(w, -2, -3)


def from_panels(
    panels: jax.Array, bits: int, k: int, n: int, *, transpose_w: bool = False
) -> jax.Array:
    """The bytes of which `to_panels` made `panels`: int8 codes, or uint8 bit planes."""
    rows = k if bits == 8 else packed_size(k, bits)
    w = jnp.swapaxes(panels, -2, -3)
    w = w.reshape(*w.shape[:-4], w.shape[-4] * _COLUMNS, w.shape[-2] * _ROWS)[..., :n, :rows]
    w = w if transpose_w else jnp.swapaxes(w, -1, -2)
    return jax.lax.bitcast_convert_type(w ^ jnp.uint8(_FLIP), jnp.int8) if bits == 8 else w
