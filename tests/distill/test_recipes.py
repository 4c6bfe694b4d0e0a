"""Recipes: the order of teaching, the averages, and three compressions in one step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
import oracles_distill as oracles


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_each_is_taught_by_the_one_before():
    calls = []

    def fit(network, teacher):
        calls.append((network, teacher))
        return f"trained {network}"

    trained = jc.distill.teacher_assistants(fit, ["large", "medium", "small"])
    assert trained == ["trained large", "trained medium", "trained small"]
    assert calls == [("large", None), ("medium", "trained large"), ("small", "trained medium")]
    calls.clear()
    assert jc.distill.born_again(fit, 2) == ["trained 0", "trained 1"]
    assert calls == [(0, None), (1, "trained 0")]
    with pytest.raises(ValueError, match="no networks"):
        jc.distill.born_again(fit, 0)


def test_mutual_kl_is_the_mean_over_the_others():
    logits = random(3, 4, 5)
    got = jax.jit(lambda x: jc.distill.mutual_kl(x, temperature=2.0))(jnp.asarray(logits))
    for i in range(3):
        others = [oracles.kl(logits[i], logits[k], temperature=2.0) for k in range(3) if k != i]
        np.testing.assert_allclose(got[i], np.mean(others, 0), rtol=1e-6, atol=1e-7)


def test_in_mutual_learning_the_others_are_constants():
    logits = jnp.asarray(random(2, 4, 5))
    got = jax.jit(jax.grad(lambda x: jc.distill.mutual_kl(x).sum()))(logits)
    alone = jax.jit(jax.vmap(jax.grad(lambda s, t: jc.distill.kl(s, t).sum())))(
        logits, logits[::-1]
    )
    np.testing.assert_allclose(got, alone, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="two students or more; got 1"):
        jc.distill.mutual_kl(logits[:1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ema_is_the_weighted_sum_of_the_past(dtype):
    students = random(6, 3)
    teacher = {"w": jnp.asarray(students[0], dtype), "n": jnp.int32(0)}
    want = np.asarray(teacher["w"], np.float64)
    for i, s in enumerate(students[1:]):
        student = {"w": jnp.asarray(s, dtype), "n": jnp.int32(i)}
        want = 0.75 * np.asarray(teacher["w"], np.float64) + 0.25 * np.asarray(
            student["w"], np.float64
        )
        teacher = jc.distill.ema_teacher(teacher, student, 0.75)
        # One rounding of the dtype a step, of numbers of this size.
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(teacher["w"], np.float64), want, rtol=eps, atol=eps)
    assert teacher["w"].dtype == dtype
    assert int(teacher["n"]) == 4
    to_student = jax.grad(
        lambda s: jc.distill.ema_teacher(teacher, {**teacher, "w": s}, 0.5)["w"].sum()
    )
    np.testing.assert_array_equal(to_student(teacher["w"]), 0)


def test_ema_of_a_fake_quantized_student_and_errors():
    student = jc.quantize.prepare_qat({"w": jnp.ones((4, 2))}, {"w": jc.quantize.int8()})
    zero = jax.tree.map(jnp.zeros_like, student)
    moved = jc.distill.ema_teacher(zero, student, 0.9)
    np.testing.assert_allclose(moved["w"].weight, 0.1, rtol=1e-6)
    with pytest.raises(ValueError, match=r"from 0 to 1; got 1\.5"):
        jc.distill.ema_teacher(zero, student, 1.5)
    with pytest.raises(
        ValueError, match=r"'a/w' is \(2,\) in the teacher and \(3,\) in the student"
    ):
        jc.distill.ema_teacher({"a": {"w": jnp.ones(2)}}, {"a": {"w": jnp.ones(3)}}, 0.5)


def test_one_step_distils_prunes_and_quantizes():
    """A student of half the weights, in four bits, comes near a teacher it could equal."""
    x = jnp.asarray(random(64, 8))
    params = {"w": jnp.asarray(random(8, 4, seed=1))}
    teacher = x @ jnp.asarray(random(8, 4, seed=2))
    tparams = jc.quantize.prepare_qat(params, {"w": jc.quantize.w4a8()})
    prune = jc.prune.prune(
        jc.prune.magnitude(), jc.prune.unstructured(), jc.prune.polynomial(0.5, begin=0, end=100)
    )
    tx = optax.chain(optax.adam(0.05), prune)
    loss = lambda logits, batch: jc.distill.kl(logits, batch["teacher"], temperature=2.0)
    step = jc.distill.step(lambda p, batch: batch["x"] @ p["w"], loss, tx)
    state, batch, values = tx.init(tparams), {"x": x, "teacher": teacher}, []
    for _ in range(150):
        tparams, state, value = step(tparams, state, batch)
        values.append(float(value))
    assert values[-1] < values[0] / 4
    weight = np.asarray(tparams["w"].weight)
    assert (weight == 0).sum() == 16
    # The loss of training is that of the integers which are stored, packed.
    packed = jc.prune.pack(tparams, jc.prune.masks(state))
    logits = jc.accelerate(lambda p, x: x @ p["w"])(packed, x)
    want = oracles.kl(np.asarray(logits), np.asarray(teacher), temperature=2.0).mean()
    _, _, again = step(tparams, state, batch)
    np.testing.assert_allclose(again, want, rtol=1e-4)
