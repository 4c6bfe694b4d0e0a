"""The report and the sweep, against sums written out in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
import oracles
from checks import random


def fn(p, i):
    x = p["table"][i]
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])
    return x @ p["last"] + p["bias"]


@pytest.fixture(scope="module")
def case():
    params = {
        "table": random(10, 6),
        "stack": random(2, 6, 6, seed=1),
        "last": random(6, 3, seed=2),
        "bias": random(3, seed=3),
    }
    params = jax.tree.map(jnp.asarray, params)
    rules = {"table": jc.quantize.int8(axis=-1), "stack|last": jc.quantize.int3()}
    batches = [jnp.arange(5), jnp.arange(5, 10)]
    return params, jc.quantize.quantize(params, rules), batches


def activations(params, batches):
    """What enters each product, in float64."""
    dense = {k: np.asarray(v, np.float64) for k, v in params.items()}
    x = dense["table"][np.concatenate(batches)]
    seen = [x]
    for w in dense["stack"]:
        x = np.tanh(x @ w)
        seen.append(x)
    return dense, seen


def test_every_number_of_the_report(case):
    params, qparams, batches = case
    found = jc.quantize.report(fn, params, qparams, batches)
    rows = {row.path: row for row in found.leaves}
    assert list(rows) == ["last", "stack", "table"]
    dense, seen = activations(params, batches)
    small = {name: oracles.dense(qparams[name]) for name in rows}
    norm = np.linalg.norm
    for name, row in rows.items():
        noise = norm(dense[name] - small[name])
        # Sums in float32 on one side only.
        assert row.sqnr == pytest.approx(20 * np.log10(norm(dense[name]) / noise), rel=1e-4)
        assert row.nbytes == qparams[name].nbytes
        assert row.bits == 8 * qparams[name].nbytes / dense[name].size
    assert rows["table"].output_error is None
    assert (rows["table"].format, rows["last"].format) == ("int8", "int3")
    change = lambda x, w, v: (norm(x @ (w - v)) ** 2, norm(x @ w) ** 2)
    want = change(seen[2], dense["last"], small["last"])
    assert rows["last"].output_error == pytest.approx(np.sqrt(want[0] / want[1]), rel=1e-4)
    parts = [change(seen[i], dense["stack"][i], small["stack"][i]) for i in range(2)]
    noise, signal = np.sum(parts, 0)
    assert rows["stack"].output_error == pytest.approx(np.sqrt(noise / signal), rel=1e-4)
    before = seen[2] @ dense["last"] + dense["bias"]
    _, after = activations({**{k: params[k] for k in params}, **small}, batches)
    got = after[2] @ small["last"] + dense["bias"]
    assert found.output_error == pytest.approx(norm(got - before) / norm(before), rel=1e-4)
    assert found.nbytes == sum(row.nbytes for row in found.leaves) + 12
    assert found.dense_nbytes == 4 * (60 + 72 + 18 + 3)


def test_table_and_json(case):
    found = jc.quantize.report(fn, *case)
    lines = str(found).splitlines()
    assert len(lines) == 5
    assert lines[3].startswith("table")
    assert lines[3].endswith("-")
    read = json.loads(found.json())
    assert read["leaves"][0]["path"] == "last"
    assert read["output_error"] == found.output_error
    exact = found._replace(leaves=(found.leaves[0]._replace(sqnr=float("inf")),))
    assert json.loads(exact.json())["leaves"][0]["sqnr"] is None


def test_sensitivity_is_the_loss_with_one_leaf_replaced(case):
    params, qparams, batches = case
    loss = lambda p, i: jnp.mean(fn(p, i) ** 2)
    found = jc.quantize.sensitivity(loss, params, qparams, iter(batches))
    assert list(found.values()) == sorted(found.values(), reverse=True)
    mean = lambda p: np.mean([float(loss(p, b)) for b in batches])
    for path, change in found.items():
        swapped = {**params, path: jnp.asarray(oracles.dense(qparams[path]), jnp.float32)}
        assert change == pytest.approx(mean(swapped) - mean(params), abs=1e-5)


def test_nothing_to_measure_raises(case):
    params, qparams, batches = case
    for call in (
        lambda: jc.quantize.report(fn, params, params, batches),
        lambda: jc.quantize.sensitivity(fn, params, params, batches),
    ):
        with pytest.raises(ValueError, match="no compressed array in qparams"):
            call()
    with pytest.raises(ValueError, match="report needs batches"):
        jc.quantize.report(fn, params, qparams, [])
    with pytest.raises(ValueError, match="got no batches"):
        jc.quantize.sensitivity(lambda p, i: jnp.sum(fn(p, i)), params, qparams, [])
