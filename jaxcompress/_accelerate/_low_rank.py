"""Products with a `LowRankArray`: through its rank, without the dense weight."""

from typing import Any

import jax
from jax import lax

from jaxcompress.arrays import LowRankArray

__all__ = ["low_rank"]


def low_rank(
    x: jax.Array, w: LowRankArray, dimension_numbers: Any, weight_first: bool, dtype: Any
) -> jax.Array | None:
    """`lax.dot_general` of `x` and `w`, or None unless it contracts all of one factor."""
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    if weight_first:
        (w_contract, x_contract), (w_batch, x_batch) = dimension_numbers
    lead, middle = w.leading, w.ndim - w.trailing
    if sorted(w_batch) != [*range(lead)]:
        return None
    if sorted(w_contract) == [*range(lead, middle)]:
        near, far, axes, far_rank = w.u, w.v, tuple(w_contract), lead
    elif sorted(w_contract) == [*range(middle, w.ndim)]:
        axes = tuple(d - middle + lead + 1 for d in w_contract)
        near, far, far_rank = w.v, w.u, middle
    else:
        return None
    why = f"two products, through a rank of {w.rank}"
    w.note(lax.dot_general_p, "low_rank", "reference", why)
    batch, b = tuple(w_batch), len(w_batch)
    # [batch, rows of x, rank], then [batch, rows of x, outputs].
    inner = lax.dot_general(
        x, near, ((tuple(x_contract), axes), (tuple(x_batch), batch)), preferred_element_type=dtype
    )
    last = ((inner.ndim - 1,), (far_rank,)), (tuple(range(b)), batch)
    out = lax.dot_general(inner, far, last, preferred_element_type=dtype)
    if not weight_first:
        return out
    free = inner.ndim - 1  # where the outputs begin
    return lax.transpose(out, [*range(b), *range(free, out.ndim), *range(b, free)])
