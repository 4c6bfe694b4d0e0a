"""Criteria: scores as their formulas say, in float32, without a memory that grows."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_magnitude_is_the_absolute_value(dtype):
    w = jnp.asarray([[-2.5, 0.0], [-0.0, 1e-3], [jnp.inf, -jnp.inf]], dtype)
    criterion = jc.prune.magnitude()
    memory = criterion.init(w)
    score, after = criterion.score(w, None, memory)
    assert score.dtype == jnp.float32  # whatever the weights are: bfloat16 scores would tie
    np.testing.assert_array_equal(score, np.abs(np.asarray(w, np.float32)))
    assert after == memory


def test_magnitude_needs_no_gradients():
    assert not jc.prune.magnitude().needs_gradients
    w = jnp.ones(3)
    with_gradient, _ = jc.prune.magnitude().score(w, 7 * w, ())
    np.testing.assert_array_equal(with_gradient, np.ones(3))
