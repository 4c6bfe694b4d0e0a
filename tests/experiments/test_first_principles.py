"""The tour's equations against numpy in float64 and scikit-learn, its record, and its page."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import Lasso

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import _first_principles_compression as compression
import _first_principles_model as model
import _first_principles_training as training
import first_principles
import update_readme
from _data import Dataset, Split

RECORD = json.loads((ROOT / "experiments/results/first_principles.json").read_text())
NUMBERS = {lesson["name"]: lesson["numbers"] for lesson in RECORD["lessons"]}
SIZES = (6, 5, 3)
FLOAT32 = 1e-5  # relative: a hundred roundings of 6e-8 and their growth over a few updates


# ---- float64 oracles: one hidden layer, its gradient by the chain rule


def forward(params, x):
    a, c = (np.asarray(params[f"dense_{i}"]["kernel"], float) for i in (0, 1))
    b, d = (np.asarray(params[f"dense_{i}"]["bias"], float) for i in (0, 1))
    before = x @ a + b
    hidden = np.maximum(before, 0)
    scores = hidden @ c + d
    scores = scores - scores.max(1, keepdims=True)
    chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return before, hidden, c, chances


def gradient(params, x, y):
    """Loss and gradients of the mean cross-entropy, in the structure of `params`."""
    x = np.asarray(x, float)
    before, hidden, c, chances = forward(params, x)
    value = -np.log(chances[np.arange(len(y)), y]).mean()
    error = (chances - np.eye(chances.shape[1])[y]) / len(y)
    back = (error @ c.T) * (before > 0)
    return value, {
        "dense_0": {"kernel": x.T @ back, "bias": back.sum(0)},
        "dense_1": {"kernel": hidden.T @ error, "bias": error.sum(0)},
    }


def examples(count, width=SIZES[0], classes=SIZES[-1], seed=0):
    random = np.random.default_rng(seed)
    x = random.random((count, width)).astype(np.float32)
    return x, random.integers(0, classes, count).astype(np.int32)


def close(found, expected, rtol=FLOAT32):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max()),
        found,
        expected,
    )


# ---- the model and the update


def test_loss_and_gradient():
    params, (x, y) = model.init(jax.random.key(0), SIZES), examples(20)
    close(jax.value_and_grad(model.loss)(params, x, y), gradient(params, x, y))


def test_init_has_variance_two_over_inputs():
    kernel = model.init(jax.random.key(0), (400, 50, 10))["dense_0"]["kernel"]
    # 20,000 draws: the variance is known to 1 %; four of its deviations.
    assert np.var(kernel) == pytest.approx(2 / 400, rel=0.04)


def test_every_example_once_a_pass():
    order = np.asarray(model.batches(jax.random.key(0), 12, 4, 6))
    assert order.shape == (6, 4)
    for one in order.reshape(2, 12):
        assert sorted(one) == list(range(12))
    assert not np.array_equal(order[:3], order[3:])


def test_fit_is_the_textbook_loop():
    """Momentum by hand, with gradients by hand, three updates."""
    params, (x, y) = model.init(jax.random.key(1), SIZES), examples(20)
    order = np.asarray(model.batches(jax.random.key(2), 20, 5, 3))
    found, losses = model.fit(
        optax.sgd(0.3, momentum=0.9),
        params,
        jnp.asarray(order),
        lambda p, i: model.loss(p, jnp.asarray(x)[i], jnp.asarray(y)[i]),
    )
    w = jax.tree.map(lambda a: np.asarray(a, float), params)
    m = jax.tree.map(np.zeros_like, w)
    values = []
    for i in order:
        value, g = gradient(w, x[i], y[i])
        m = jax.tree.map(lambda m, g: 0.9 * m + g, m, g)
        w = jax.tree.map(lambda w, m: w - 0.3 * m, w, m)
        values.append(value)
    close(found, w)
    close(losses, np.array(values))


def textbook(name, gradients, lr):
    """The updates of Kingma and Ba's Algorithm 1, heavy ball, and plain descent."""
    m = v = 0.0
    for t, g in enumerate(np.asarray(gradients, float), 1):
        if name == "Adam":
            m = 0.9 * m + (1 - 0.9) * g
            v = 0.999 * v + (1 - 0.999) * g * g
            yield lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        elif name == "momentum":
            m = 0.9 * m + g
            yield lr * m
        else:
            yield lr * g


@pytest.mark.parametrize("name", training.OPTIMIZERS)
def test_equations_by_hand(name):
    gradients = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    m = v = jnp.zeros(4)
    for t, (g, expected) in enumerate(zip(gradients, textbook(name, gradients, 0.1)), 1):
        update, m, v = training.OPTIMIZERS[name].by_hand(jnp.asarray(g), m, v, t, 0.1)
        # 1 - 0.999^t keeps four digits fewer than float32 has, at t = 1.
        np.testing.assert_allclose(update, expected, rtol=1e-4)


def test_difference_is_the_largest():
    a = {"x": jnp.zeros(3), "y": jnp.ones((2, 2))}
    b = {"x": jnp.array([0.0, -0.5, 0.1]), "y": jnp.ones((2, 2))}
    assert model.difference(a, b) == 0.5


def test_devices_gradients():
    """Eight devices' own gradients against float64, as far from the whole batch's as shown."""
    x, y = examples(training.LARGE, 784, 10)
    split = Split(x, y)
    lesson = training.data_parallel(Dataset(split, split, split), jax.random.key(3), 1)
    k_init, k_order = jax.random.split(jax.random.key(3))
    params = model.init(k_init, training.SIZES)
    order = np.asarray(model.batches(k_order, len(y), training.LARGE, 1))[0]
    flat = lambda g: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)])
    whole = flat(gradient(params, x[order], y[order])[1])
    own = [flat(gradient(params, x[i], y[i])[1]) for i in np.split(order, training.PARTS)]
    away = [np.linalg.norm(g - whole) / np.linalg.norm(whole) for g in own]
    np.testing.assert_allclose(lesson.curves["one device alone"], away, rtol=1e-4)
    assert lesson.numbers["difference_after_one_update"] < 1e-6
    assert lesson.numbers["mean_gradient_off_by"] < FLOAT32
    assert lesson.numbers["summed_gradient_off_by"] == pytest.approx(training.PARTS - 1, rel=1e-5)


# ---- compression


def test_proximal_steps_are_lasso():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(60, 8)), random.normal(size=(60, 2))
    gram, cross = jnp.float32(a.T @ a / 60), jnp.float32(a.T @ b / 60)
    for alpha in (0.01, 0.1):
        found = compression.lasso(gram, cross, jnp.float32(alpha))
        expected = Lasso(alpha=alpha, fit_intercept=False, tol=1e-10).fit(a, b).coef_.T
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert np.array_equal(np.asarray(found) == 0, expected == 0)
        assert (expected == 0).any() or alpha < 0.1


def test_least_squares_of_what_a_mask_keeps():
    random = np.random.default_rng(1)
    a, b = random.normal(size=(60, 8)), random.normal(size=(60, 3))
    mask = random.random((8, 3)) < 0.5
    gram, cross = jnp.float32(a.T @ a / 60), jnp.float32(a.T @ b / 60)
    found = np.asarray(compression.least_squares(gram, cross, jnp.asarray(mask)))
    for column in range(3):
        keep = mask[:, column]
        expected = np.linalg.lstsq(a[:, keep], b[:, column], rcond=None)[0]
        np.testing.assert_allclose(found[keep, column], expected, rtol=0, atol=1e-5)
        assert not found[~keep, column].any()


def test_largest_of_each_example():
    h = np.random.default_rng(2).random((5, 8)).astype(np.float32)
    expected = np.zeros_like(h)
    for row, out in zip(h, expected):
        kept = sorted(range(8), key=lambda i: -row[i])[:2]
        out[kept] = row[kept]
    np.testing.assert_array_equal(compression._largest(2, jnp.asarray(h)), expected)


def test_small_digits_are_standardised_on_what_they_train_on():
    x, targets, test_x, labels = compression.small_digits()
    assert len(x) == 1200
    assert len(test_x) == len(labels) == 597
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(x.std(0), 1, atol=1e-9)
    assert np.array_equal(targets.sum(1), np.ones(1200))


# ---- the record that is checked in, and the page that shows it


def test_accumulated_and_parallel_steps_are_the_large_batch_step():
    for name in ("Gradient accumulation", "Data parallelism"):
        assert NUMBERS[name]["difference_after_one_update"] < 1e-6
        assert NUMBERS[name]["difference_at_the_end"] < 1e-5
    assert NUMBERS["Data parallelism"]["devices"] == 8


def test_results_of_the_tour():
    assert [lesson["name"] for lesson in RECORD["lessons"]] == [
        "Four optimizers",
        "Gradient accumulation",
        "Data parallelism",
        "Gradient clipping",
        "Quantization",
        "Pruning a linear model",
        "Activation pruning",
        "Distillation",
    ]
    assert all(n["difference_to_equation"] < 1e-5 for n in NUMBERS["Four optimizers"].values())
    assert NUMBERS["Pruning a linear model"]["lasso_difference"] < 1e-4
    for name, numbers in NUMBERS["Quantization"].items():
        # The bound is half a scale; float32 adds a few roundings of a weight.
        assert numbers.get("largest_error_over_half_a_scale", 0) < 1 + 1e-4, name
    distilled = NUMBERS["Distillation"]
    assert distilled["distilled_test_accuracy"] > distilled["alone_test_accuracy"]


def test_page_has_the_tour_of_its_json():
    page = update_readme.TOUR.read_text()
    block = update_readme.tour_block(RECORD)
    assert update_readme.replaced(page, "first_principles", block) == page
    assert RECORD["lessons"][5]["result"][1:] in page


# ---- the script


def recorded(seed, size):
    """The lessons of the checked-in record, which take no time."""
    for lesson in RECORD["lessons"]:
        yield model.Lesson(**{field: lesson[field] for field in model.Lesson._fields})


def test_run_prints_each_lesson_and_writes_record_and_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(first_principles, "lessons", recorded)
    first_principles.run(Namespace(seed=0, quick=True), tmp_path)
    said = capsys.readouterr().out
    for number, lesson in enumerate(RECORD["lessons"], 1):
        assert f"{number}  {lesson['name']}" in said
        assert all(line in said for line in [*lesson["equation"], lesson["result"]])
    assert len(RECORD["lessons"]) == first_principles.LESSONS
    written = json.loads((tmp_path / "first_principles.json").read_text())
    assert [lesson["numbers"] for lesson in written["lessons"]] == list(NUMBERS.values())
    assert (tmp_path / "first_principles.png").read_bytes().startswith(b"\x89PNG")


def script(*options, **environment):
    path = ROOT / "experiments" / "first_principles.py"
    return subprocess.run(
        [sys.executable, str(path), *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sead", "3"], "unrecognized arguments: --sead 3"),
        (["--seed", "-1"], "--seed is 0 or more"),
        (["--seed", "one"], "invalid int value: 'one'"),
        (["--out", "/proc/tour"], "cannot write to /proc"),
    ],
)
def test_wrong_use_is_one_line(options, said):
    done = script(*options)
    assert done.returncode != 0
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_too_few_devices_is_one_line(tmp_path):
    flags = "--xla_force_host_platform_device_count=2"
    done = script("--quick", "--out", str(tmp_path / "tour"), XLA_FLAGS=flags)
    assert done.returncode != 0
    assert "needs 8 devices and JAX sees 2" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_options():
    done = script("--help")
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--out", "--seed", "--quick"))
