"""`keep_largest` against a stable sort: exactly as many, exactly the same ones."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles_pruning as oracles
from jaxcompress.prune._select import COLD, keep_largest, order_key

# A few shapes, so that few programs are compiled; what matters is in the values.
SHAPES = [((1,),), ((7,),), ((3, 5),), ((64,),), ((4,), (2, 3), (1,)), ((0,), (5,))]

# Drawn often, so that ties, signs of zero and the ends of the range meet each other. The
# smallest denormal, the largest denormal, the smallest normal, the largest finite number.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.125, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38]
SPECIAL += [3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan]
FLOATS = st.sampled_from(SPECIAL) | st.floats(width=32)
KEYS = st.just(COLD) | st.integers(0, 2**32 - 1).map(np.uint32)

select = jax.jit(lambda scores, keep, start: keep_largest(scores, keep, start))


def as_lists(masks):
    return [np.asarray(m).tolist() for m in masks]


@st.composite
def arrays(draw, dtype=np.float32):
    shapes = draw(st.sampled_from(SHAPES))
    return [draw(hnp.arrays(np.float32, shape, elements=FLOATS)).astype(dtype) for shape in shapes]


@hypothesis.settings(max_examples=300)
@hypothesis.given(arrays(), st.data())
def test_masks_are_those_of_a_stable_sort(scores, data):
    total = sum(s.size for s in scores)
    keep = data.draw(st.integers(-1, total + 2))
    masks, _ = select([jnp.asarray(s) for s in scores], keep, data.draw(KEYS))
    assert as_lists(masks) == as_lists(oracles.keep_largest(scores, keep))


@hypothesis.settings(max_examples=60)
@hypothesis.given(arrays(jnp.bfloat16), st.integers(0, 8))
def test_bfloat16_is_compared_by_value(scores, keep):
    masks, _ = select([jnp.asarray(s) for s in scores], keep, COLD)
    assert as_lists(masks) == as_lists(oracles.keep_largest(scores, keep))


@hypothesis.given(hnp.arrays(np.float32, 64, elements=FLOATS), st.integers(0, 64), KEYS)
def test_a_search_that_starts_from_its_own_result_finds_the_same(scores, keep, start):
    cold, threshold = select([jnp.asarray(scores)], keep, start)
    warm, again = select([jnp.asarray(scores)], keep, threshold)
    assert as_lists(warm) == as_lists(cold)
    assert again == threshold


@pytest.mark.parametrize("keep", [0, 1, 9999, 10_000, 10_001])
@pytest.mark.parametrize("kind", ["normal", "equal", "two values", "wide", "last bits"])
def test_large_arrays_of_every_distribution(kind, keep):
    random = np.random.default_rng(0)
    scores = {
        "normal": lambda: random.normal(size=10_000),
        "equal": lambda: np.full(10_000, 0.3),
        "two values": lambda: random.integers(0, 2, 10_000),
        "wide": lambda: np.exp(random.uniform(-87, 88, 10_000)) * random.choice([-1, 1], 10_000),
        # Neighbouring floats, where interpolation has nothing to hold on to.
        "last bits": lambda: (
            (np.uint32(0x3F800000) + random.integers(0, 99, 10_000))
            .astype(np.uint32)
            .view(np.float32)
        ),
    }[kind]().astype(np.float32)
    masks, _ = select([jnp.asarray(scores)], keep, COLD)
    assert as_lists(masks) == as_lists(oracles.keep_largest([scores], keep))


@pytest.mark.parametrize("keep", [1, 100, 399_999])
def test_hundreds_of_thousands_of_scores(keep):
    # More than 2^24 would not fit float32's whole numbers; the counts are integers anyway.
    scores = np.abs(np.random.default_rng(1).normal(size=400_000)).astype(np.float32)
    scores[::3] = 0.5  # a tie of a third of them
    masks, _ = select([jnp.asarray(scores)], keep, COLD)
    assert as_lists(masks) == as_lists(oracles.keep_largest([scores], keep))


def test_ties_are_broken_across_arrays_in_order():
    scores = [jnp.ones(3), jnp.ones((2, 2)), jnp.full(2, 2.0)]
    masks, _ = keep_largest(scores, 6)
    assert as_lists(masks) == [[True] * 3, [[True, False], [False, False]], [True, True]]


def test_vmap_selects_in_each_row():
    scores = np.random.default_rng(2).integers(-3, 4, (9, 40)).astype(np.float32)
    keep = np.arange(9) * 5
    starts = jnp.arange(9, dtype=jnp.uint32) << 28
    masks = jax.jit(jax.vmap(lambda s, k, t: keep_largest([s], k, t)[0][0]))(scores, keep, starts)
    want = [oracles.keep_largest([row], k)[0].tolist() for row, k in zip(scores, keep)]
    assert np.asarray(masks).tolist() == want


def test_jit_changes_nothing():
    # Outside jit every operation is its own program: denormals, for one, may fare otherwise.
    scores = [np.array(SPECIAL, np.float32)]
    for keep in range(len(SPECIAL) + 1):
        want = as_lists(oracles.keep_largest(scores, keep))
        assert as_lists(keep_largest([jnp.asarray(scores[0])], keep)[0]) == want
        assert as_lists(select([jnp.asarray(scores[0])], keep, COLD)[0]) == want


def test_keys_are_ordered_as_floats_are():
    finite = sorted({x for x in SPECIAL if not np.isnan(x)})
    for key in (order_key, jax.jit(order_key)):
        keys = np.asarray(key(jnp.array(finite, jnp.float32))).astype(np.int64)
        assert (np.diff(keys) > 0).all()
        assert key(jnp.float32(0.0)) == key(jnp.float32(-0.0))
        assert key(jnp.float32(np.nan)) == key(-jnp.float32(np.nan)) > keys[-1]


def test_no_array_at_all():
    masks, _ = keep_largest([], 3)
    assert masks == []


def test_too_many_scores_for_the_counts():
    huge = jax.ShapeDtypeStruct((2**31,), jnp.float32)
    with pytest.raises(ValueError, match=r"2\^31"):
        jax.eval_shape(functools.partial(keep_largest, keep=1), [huge])
