"""The benchmarks beside other libraries: what they make of times and accuracies."""

import importlib.util
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))

import _compare_pruners
import _jaxpruner
import compare_pruners
from _compare_models import stepper
from _compare_report import step_rows, table

TIMES = {"dense": [1.0, 2.0, 4.0], "slow": [3.0, 4.0, 20.0]}


def test_ratios_are_to_the_dense_step():
    dense, slow = step_rows("mlp", TIMES, {"dense": 0.5, "slow": 1.5}, "dense")
    assert (dense["ratio_of_minima"], dense["ratio_of_medians"]) == (1, 1)
    assert dense["ratio_of_pairs"] == [1, 1]
    assert (slow["ratio_of_minima"], slow["ratio_of_medians"]) == (3, 2)
    # The rounds' ratios are 3, 2, 5: a tenth of the way from 2 to 5 by way of 3.
    assert slow["ratio_of_pairs"] == pytest.approx([2.2, 4.6])
    assert slow["compile_s"] == 1.5


def test_a_table_has_a_line_for_each():
    rows = step_rows("mlp", TIMES, {"dense": 0.5, "slow": 1.5}, "dense")
    assert table(rows).splitlines()[-1] == "| mlp | slow | 4.00 | 3.00 | 2.00 | 2.20-4.60 | 1.5 |"
    counted = table([row | {"cpu_ratio": 1.25} for row in rows]).splitlines()
    assert counted[-1].endswith("| 2.20-4.60 | 1.5 | 1.25 |")
    assert len({line.count("|") for line in counted}) == 1


def test_accuracies_are_compared_seed_by_seed():
    rows = compare_pruners.summary({"dense": [90.0, 94.0], "pruned": [89.0, 91.0]})
    assert rows["pruned"]["mean"] == 90
    assert rows["pruned"]["from_dense"] == -2
    assert rows["pruned"]["standard_error"] == pytest.approx(1)  # gaps -1 and -3
    assert compare_pruners.summary({"dense": [90.0]})["dense"]["standard_error"] is None


def test_a_step_sees_what_comes_before_and_leaves_what_comes_after():
    x, y = jnp.ones((1, 1)), jnp.zeros(1, int)
    params, zero = jnp.array([[2.0, 0.0]]), lambda params, state: jnp.zeros_like(params)
    first = math.log(1 + math.exp(-2))
    run = lambda **options: stepper(
        lambda p, x, key: x @ p, params, optax.sgd(0.0), x, y, **options
    )
    step, _ = run(after=zero)
    assert [float(step()), float(step())] == pytest.approx([first, math.log(2)])
    step, _ = run(before=zero)
    assert float(step()) == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", sorted(_compare_pruners._ours(1, 2)))
def test_each_of_ours_ends_at_the_same_sparsity(name):
    method = _compare_pruners._ours(1, 2)[name]  # no exchange yet: what comes is zero
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (20, 30))}}

    @jax.jit
    def step(params):
        state = method.tx.init(params)
        updates, state = method.tx.update(params, state, params)
        params = method.after(optax.apply_updates(params, updates), state)
        return method.before(params, state)

    assert int((step(params)["a"]["kernel"] == 0).sum()) == 540


def test_the_old_tree_map_passes_over_what_is_nothing_in_the_first_tree():
    add = _jaxpruner.old_tree_map(lambda a, b: a + b, {"a": 1, "b": None}, {"a": 2, "b": 3})
    assert add == {"a": 3, "b": None}
    other = lambda a, b: (a, b)  # nothing in another tree reaches the function
    assert _jaxpruner.old_tree_map(other, [1], [None]) == [(1, None)]
    pairs = _jaxpruner.old_tree_map(len, [(1, 2)], is_leaf=lambda x: isinstance(x, tuple))
    assert pairs == [2]


def test_a_peer_that_is_not_there_has_no_rows_and_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _compare_pruners._peers(10, 1) == {}
    assert _jaxpruner.about()["jaxpruner"].startswith("not installed: pip install git+")
