"""Scales for known codes, against the normal equations in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from checks import random
from jaxcompress._layout import Layout
from jaxcompress._matrices import Matrices
from jaxcompress.quantize._refit import refitted

K, N = 12, 5
MATRICES = Matrices.of((K, N), Layout((-2,), (-1,), ()))


def problem(seed):
    """Activations that depend on each other, weights, and numbers that are near them."""
    x = random(40, K, seed=seed) @ (np.eye(K) + 0.3 * random(K, K, seed=seed + 1))
    w = random(K, N, seed=seed + 2)
    return x.astype(np.float64).T @ x, w, np.rint(2 * w + 0.3 * random(K, N, seed=seed + 3))


def solved(h, w, numbers, group):
    """Of each output the least-squares scales of its groups, `[groups, n]`, and what is lost."""
    count = -(-K // group)
    member = (np.arange(K)[:, None] // group == np.arange(count)).astype(float)
    scales = np.zeros((count, N))
    for n in range(N):
        c = numbers[:, n : n + 1] * member
        scales[:, n] = np.linalg.lstsq(c.T @ h @ c, c.T @ h @ w[:, n], rcond=None)[0]
    return scales, member


def lost(h, w, numbers, scales, member):
    error = w - numbers * (member @ scales)
    return np.einsum("kn,kl,ln->n", error, h, error)


@pytest.mark.parametrize("group", [K, 4, 5])
def test_scales_come_near_the_least_squares(group):
    h, w, numbers = problem(0)
    want, member = solved(h, w, numbers, group)
    start = np.full(want.shape, 0.4, np.float32)
    got = refitted(
        *(jnp.asarray(a, jnp.float32)[None] for a in (w, numbers)),
        jnp.asarray(start),
        jnp.asarray(h, jnp.float32)[None],
        matrices=MATRICES,
        axis=(-2,),
        group_size=None if group == K else (group,),
    )
    before, best = lost(h, w, numbers, start, member), lost(h, w, numbers, want, member)
    after = lost(h, w, numbers, np.asarray(got, np.float64), member)
    if group == K:  # exact in one step
        np.testing.assert_allclose(got, want, rtol=1e-5)
    # Six steps of descent: of what there is to gain, a tenth is left at most.
    assert np.all(after - best < 0.1 * (before - best) + 1e-6 * before)


def test_a_group_without_numbers_keeps_its_scale():
    h, w, numbers = problem(4)
    numbers[:4] = 0
    numbers[:, 2] = 0
    got = refitted(
        *(jnp.asarray(a, jnp.float32)[None] for a in (w, numbers)),
        jnp.full((3, N), 0.5),
        jnp.asarray(h, jnp.float32)[None],
        matrices=MATRICES,
        axis=(-2,),
        group_size=(4,),
    )
    assert np.all(np.asarray(got)[0] == 0.5)
    assert np.all(np.asarray(got)[:, 2] == 0.5)
    assert np.isfinite(got).all()
    assert np.any(np.asarray(got)[1:, 0] != 0.5)
