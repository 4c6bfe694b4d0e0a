"""Recipes: who teaches whom, in a few lines each, around a training that you bring."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxcompress._accelerate import accelerate
from jaxcompress._paths import path_string
from jaxcompress.distill._logits import kl

__all__ = ["born_again", "ema_teacher", "mutual_kl", "step", "teacher_assistants"]

Network = TypeVar("Network")
Trained = TypeVar("Trained")


def step(
    apply: Callable[..., Any],
    loss: Callable[[Any, Any], jax.Array],
    tx: optax.GradientTransformation,
) -> Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]:
    """One jitted step of a student that may be pruned, quantized and distilled at once.

    `params <- params + tx(grad mean loss(apply(params, batch), batch))`. Each of the three
    is where it belongs: distillation in `loss`, quantization in `params` (leaves of
    `jaxcompress.quantize.prepare_qat`), pruning in `tx` (`jaxcompress.prune.prune` as the
    last link of the chain).

    Args:
      apply: `apply(params, batch)`, the student; it runs through `accelerate`.
      loss: `loss(outputs, batch)`, one value an example, or one in all. The batch carries
        what it needs: labels, the teacher's logits.
      tx: any Optax optimizer.

    Returns:
      `(params, state, batch) -> (params, state, loss)`; `state = tx.init(params)` to start
      with. It overwrites nothing: quantized parameters share arrays with those that they
      were made of. To save memory, put it into a `jax.jit` that donates.

    >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
    >>> params = jc.quantize.prepare_qat({"w": jnp.ones((4, 2))}, {"w": jc.quantize.int4()})
    >>> prune = jc.prune.prune(
    ...     jc.prune.magnitude(), jc.prune.unstructured(), jc.prune.constant(0.5)
    ... )
    >>> tx = optax.chain(optax.adam(1e-2), prune)
    >>> loss = lambda logits, batch: jc.distill.kl(logits, batch["teacher"], temperature=2.0)
    >>> run = jc.distill.step(lambda p, batch: batch["x"] @ p["w"], loss, tx)
    >>> batch = {"x": jnp.ones((3, 4)), "teacher": jnp.array([[1.0, 0.0]] * 3)}
    >>> params, state, value = run(params, tx.init(params), batch)
    >>> int((params["w"].weight == 0).sum())
    4
    """
    forward = accelerate(apply)

    def run(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        objective = lambda p: jnp.mean(loss(forward(p, batch), batch))
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(run)


def teacher_assistants(
    fit: Callable[[Network, Trained | None], Trained], networks: Iterable[Network]
) -> list[Trained]:
    """Trains a chain of ever smaller networks, each taught by the one before.

    A teacher that is far larger than its student teaches it less well than one in between.

    Args:
      fit: `fit(network, teacher)` trains one; the teacher is what it returned for the
        network before, None for the first.
      networks: from the teacher to the student, whatever `fit` takes.

    Returns:
      What `fit` returned for each; the student is the last.

    Raises:
      ValueError: no networks.

    >>> import jaxcompress as jc
    >>> jc.distill.teacher_assistants(lambda width, teacher: (width, teacher), [100, 30, 10])[-1]
    (10, (30, (100, None)))

    Mirzadeh et al., 2020, Improved Knowledge Distillation via Teacher Assistant,
    arXiv:1902.03393.
    """
    trained: list[Trained] = []
    for network in networks:
        trained.append(fit(network, trained[-1] if trained else None))
    if not trained:
        raise ValueError("there are no networks: give at least a teacher")
    return trained


def born_again(fit: Callable[[int, Trained | None], Trained], generations: int) -> list[Trained]:
    """Trains the same network again and again, each taught by the one before.

    Args:
      fit: `fit(generation, teacher)`; the generation, from 0, seeds the training, and the
        teacher is what it returned the last time, None for the first.
      generations: how many, with the first.

    Returns:
      What `fit` returned for each. The mean of all their answers is the paper's ensemble.

    Raises:
      ValueError: fewer than one.

    >>> import jaxcompress as jc
    >>> jc.distill.born_again(lambda seed, teacher: (seed, teacher), 3)[-1]
    (2, (1, (0, None)))

    Furlanello et al., 2018, Born Again Neural Networks, arXiv:1805.04770.
    """
    return teacher_assistants(fit, range(generations))


def ema_teacher(teacher: Any, student: Any, decay: float | jax.Array) -> Any:
    """Moves a teacher that is the average of its student's past a step on.

    `teacher <- decay teacher + (1 - decay) student`, for self-distillation: start with
    the student's own parameters, and teach with the result. Leaves that are not floating
    are taken over.

    Args:
      teacher: the average so far.
      student: parameters of the same tree; no gradient passes through.
      decay: from 0 to 1, near 1.

    Returns:
      The new teacher, in the dtypes of the old.

    Raises:
      ValueError: a decay out of range, or leaves of other shapes, with the path.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.distill.ema_teacher({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.75)["w"]
    Array([0.25, 0.25], dtype=float32)

    Tarvainen and Valpola, 2017, Mean Teachers, arXiv:1703.01780.
    """
    if isinstance(decay, (int, float)) and not 0 <= decay <= 1:
        raise ValueError(f"the decay must be from 0 to 1; got {decay}")

    def move(path: Any, old: jax.Array, new: jax.Array) -> jax.Array:
        if old.shape != new.shape:
            raise ValueError(
                f"{path_string(path)!r} is {old.shape} in the teacher and {new.shape} in the "
                "student"
            )
        new = jax.lax.stop_gradient(new)
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new.astype(old.dtype)
        # In float32: a thousandth of a bfloat16 weight is less than its spacing.
        wide = jnp.promote_types(old.dtype, jnp.float32)
        return (old.astype(wide) * decay + new.astype(wide) * (1 - decay)).astype(old.dtype)

    return jax.tree_util.tree_map_with_path(move, teacher, student)


def mutual_kl(
    logits: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """Mutual learning: each of several students learns from all the others.

    `T^2 sum_{k != i} KL(p_k || p_i) / (n - 1)` for student `i` of `n`; to it the others
    are teachers, constants.

    Args:
      logits: `[students, ..., classes]`, floating.
      temperature, axis, where: as for `kl`, in the shape of one student's logits.

    Returns:
      The loss of each student on each example, `[students, ...]`; their sum trains all.

    Raises:
      ValueError: fewer than two students, or a temperature that is out of range.
      TypeError: logits that are not floating.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> jc.distill.mutual_kl(jnp.array([[jnp.log(3.0), 0.0], [0.0, 0.0]])).round(2)
    Array([0.14, 0.13], dtype=float32)

    Zhang et al., 2018, Deep Mutual Learning, arXiv:1706.00384.
    """
    n = len(logits)
    if n < 2:
        raise ValueError(f"mutual learning takes two students or more; got {n}")
    one = lambda student, teacher: kl(
        student, teacher, temperature=temperature, axis=axis, where=where
    )
    # With itself a student has loss 0 and gradient 0.
    pairs = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(logits, logits)
    return jnp.sum(pairs, 1) / (n - 1)
