"""Which scores are the largest, counted exactly and without sorting.

The k-th largest of n floats is found by bisection on their bits: floats, as unsigned
integers with the sign sorted out, are ordered as they are. Each step counts how many
scores reach a candidate, so a step costs one pass and, over sharded scores, one scalar
all-reduce. Between two updates of a mask the threshold hardly moves: the search starts
from the last one, interpolates, and stops as soon as the count is right: while Adam trains,
after three passes over 5,000 scores and eight over 400,000, a few more while a schedule moves
the count. Ties are kept in the order of their linear index, found by a second
bisection (a cumulative sum would gather sharded scores).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["COLD", "keep_largest", "order_key"]

COLD = np.uint32(0xBE000000)  # the key of 0.125: where a search without a past begins
_TOP = np.uint32(0xFFFFFFFF)  # above every key
_EXACT = 2**24  # float32 counts so far
_INFINITE = np.uint32(0xFF000000)  # the bits of infinity without the sign; NaN is above


@jax.jit  # called outside of one, its loops would be compiled at every call
def keep_largest(
    scores: Sequence[jax.Array], keep: jax.Array | int, start: jax.typing.ArrayLike = COLD
) -> tuple[list[jax.Array], jax.Array]:
    """Masks of exactly the `keep` largest of all `scores` together.

    Ties go to the lower index, earlier arrays first; NaN counts as larger than anything.

    Args:
      scores: floating arrays; compared in float32.
      keep: how many, clipped to what there is; may be traced.
      start: the threshold that the last call returned, to begin the search from.

    Returns:
      The masks, and the threshold (a uint32 key) that found them.
    """
    total = sum(s.size for s in scores)
    if total >= 2**31:
        raise ValueError(f"a mask counts up to 2^31 - 1 scores together; got {total}")
    keys = [order_key(s) for s in scores]
    keep = jnp.clip(jnp.asarray(keep, jnp.int32), 0, total)
    threshold, count = _search(keys, keep, total, jnp.asarray(start, jnp.uint32))
    # A branch, because XLA makes what is constant in a loop before it, whether it runs or not:
    # the index of every key here.
    limit = lax.cond(
        count == keep,
        lambda: jnp.uint32(total),
        lambda: _tie_limit(keys, threshold, keep, total),
    )
    masks, offset = [], 0
    for key in keys:
        tie = (key == threshold) & (_index(key, offset) < limit)
        masks.append((key > threshold) | tie)
        offset += key.size
    return masks, threshold


def order_key(score: jax.Array) -> jax.Array:
    """Float32 as uint32 in the same order, with one zero."""
    score = score.astype(jnp.float32)
    bits = lax.bitcast_convert_type(score, jnp.uint32)
    magnitude = bits << 1  # compared in bits: to XLA's floats denormals are zeros
    bits = jnp.where(magnitude == 0, 0, bits)
    key = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))
    return jnp.where(magnitude > _INFINITE, _TOP - 1, key)


def _count(hits: jax.Array) -> jax.Array:
    """How many are true; as floats while they count exactly, XLA's CPU does it 2-3x as fast."""
    if hits.size > _EXACT:
        return jnp.sum(hits, dtype=jnp.int32)
    return jnp.sum(hits.astype(jnp.float32)).astype(jnp.int32)


def _index(key: jax.Array, offset: int) -> jax.Array:
    return lax.iota(jnp.uint32, key.size).reshape(key.shape) + jnp.uint32(offset)


def _search(
    keys: Sequence[jax.Array], keep: jax.Array, total: int, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A threshold that `keep` keys reach, or under ties the largest that at least so many do.

    `low` is reached by at least `keep` keys, `high` by fewer, or it is the top.
    """

    def unsettled(state):
        low, low_count, high, _, _, _, _ = state
        return (low_count != keep) & (high - low > 1)

    def step(state):
        low, low_count, high, high_count, probe, stride, i = state
        count = sum(_count(key >= probe) for key in keys)
        enough = count >= keep
        low, low_count = jnp.where(enough, probe, low), jnp.where(enough, count, low_count)
        high, high_count = jnp.where(enough, high, probe), jnp.where(enough, high_count, count)
        width = high - low
        # Far from both ends of the range, walk outwards from the start in growing steps.
        walk = jnp.where(
            enough,
            probe + jnp.minimum(stride, _TOP - probe),
            probe - jnp.minimum(stride, probe),
        )
        share = (low_count - keep + 0.5) / jnp.maximum(low_count - high_count, 1)
        inside = low + (share * width.astype(jnp.float32)).astype(jnp.uint32)
        # Interpolation is fast and may creep; every third step halves.
        near = jnp.where(i % 3 == 2, low + width // 2, inside)
        probe = jnp.where((width > np.uint32(1 << 24)) & (i < 12), walk, near)
        probe = jnp.clip(probe, low + 1, jnp.maximum(high, low + 2) - 1)
        return low, low_count, high, high_count, probe, stride * 4, i + 1

    state = (
        jnp.uint32(0),
        jnp.int32(total),
        jnp.asarray(_TOP),
        jnp.int32(0),
        jnp.clip(start, np.uint32(1), _TOP - 1),
        jnp.uint32(1 << 14),
        jnp.int32(0),
    )
    low, low_count, *_ = lax.while_loop(unsettled, step, state)
    return low, low_count


def _tie_limit(
    keys: Sequence[jax.Array], threshold: jax.Array, keep: jax.Array, total: int
) -> jax.Array:
    """The index below which as many keys equal the threshold as are to be kept of them."""
    need = keep - sum(_count(key > threshold) for key in keys)

    def unsettled(state):
        low, high = state
        return high - low > 1

    def step(state):  # at most `need` ties lie below `low`, more below `high`
        low, high = state
        middle, count, offset = low + (high - low) // 2, jnp.int32(0), 0
        for key in keys:
            count += _count((key == threshold) & (_index(key, offset) < middle))
            offset += key.size
        fits = count <= need
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    low, _ = lax.while_loop(unsettled, step, (jnp.uint32(0), jnp.uint32(total + 1)))
    return low
