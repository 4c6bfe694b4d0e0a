"""What is saved comes back to the same bits: containers, dtypes, trees, another process."""

import pathlib
import subprocess
import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc
from checks import random

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
import trees
from trees import assert_same


def through(tmp_path, tree, **kwargs):
    jc.io.save(tmp_path / "file.safetensors", tree)
    return jc.io.load(tmp_path / "file.safetensors", **kwargs)


def test_every_container(tmp_path):
    assert_same(through(tmp_path, trees.compressed()), trees.compressed())


def test_a_fresh_process_computes_the_same_bits(tmp_path):
    params = trees.compressed()
    want = jax.jit(jc.accelerate(trees.model))(params, trees.BATCH)
    jc.io.save(tmp_path / "model.safetensors", params)
    command = [sys.executable, HERE / "reload.py", tmp_path / "model.safetensors"]
    done = subprocess.run([*command, tmp_path / "logits.npy"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), want)
    assert np.isfinite(want).all()


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32"]
    + ["float16", "bfloat16", "float32", "complex64"],
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_dtypes_and_shapes(tmp_path, dtype, shape):
    tree = {"a": (jnp.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype)}
    assert_same(through(tmp_path, tree), tree)


def test_special_numbers_keep_their_bits(tmp_path):
    bits = np.uint32([0x7FC00001, 0xFFC00000, 0x80000000, 0x00000001, 0x7F800000])
    tree = [jnp.asarray(bits.view(np.float32))]
    assert_same(through(tmp_path, tree), tree)


def test_arrays_of_numpy_however_they_lie_in_memory(tmp_path):
    x = random(4, 6)
    got = through(tmp_path, {"t": x.T, "s": x[::2, ::-1], "big": x.astype(">f4")})
    for name, want in {"t": x.T, "s": x[::2, ::-1], "big": x}.items():
        np.testing.assert_array_equal(got[name], want)


TREES = {
    "an array": jnp.arange(3.0),
    "lists of lists": [jnp.ones(1), [jnp.zeros(2), {"a": jnp.ones(2)}]],
    "numbers as keys": {0: jnp.ones(1), 10: jnp.zeros(1)},
    "awkward names": {
        "a/b": jnp.ones(1),
        "": jnp.ones(2),
        "[0]": jnp.ones(3),
        "ü.value": jnp.ones(4),
    },
    "a name and its field": {"a": {"values": jnp.ones(1)}, "a/scale": jnp.ones(2)},
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_trees(tmp_path, tree):
    assert_same(through(tmp_path, tree), tree)


def test_a_container_alone_and_beside_names_like_its_fields(tmp_path):
    twin = jc.quantize.prepare_qat({"w": jnp.ones((4, 2))}, {"w": jc.quantize.int8()})["w"]
    assert_same(through(tmp_path, twin), twin)
    tree = {"w": twin, "w/scale": jnp.ones(3)}  # the twin's own scale is None
    assert_same(through(tmp_path, tree), tree)


def test_tuples_come_back_as_lists_and_holes_as_none(tmp_path):
    got = through(tmp_path, (jnp.ones(1), None, (jnp.zeros(1),)))
    assert_same(got, [jnp.ones(1), None, [jnp.zeros(1)]])


def test_linen(tmp_path):
    model = nn.Sequential([nn.Dense(8), nn.Dense(3)])
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))
    params = jc.quantize.quantize(params, {".*kernel": jc.quantize.int8()})
    assert_same(through(tmp_path, params), params)


def test_nnx_state_with_and_without_like(tmp_path):
    make = lambda: nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1))
    )
    graph, state = nnx.split(make())
    quantized = jc.quantize.quantize(state, {".*kernel": jc.quantize.int4()})
    got = through(tmp_path, quantized, like=nnx.state(make()))  # dense, of another model
    assert_same(got, quantized)
    x = random(2, 4)
    run = jc.accelerate(lambda state, x: nnx.merge(graph, state)(x))
    np.testing.assert_array_equal(run(got, x), run(quantized, x))
    plain = jc.io.load(tmp_path / "file.safetensors")
    assert plain["layers"][0]["kernel"].shape == (4, 8)


def test_equinox_with_like(tmp_path):
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    quantized = jc.quantize.quantize(params, {".*weight": jc.quantize.int8(axis=-1)})
    like = eqx.filter(eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(1)), eqx.is_array)
    got = through(tmp_path, quantized, like=like)
    assert_same(got, quantized)
    x = random(4)
    run = jc.accelerate(lambda p, x: eqx.combine(p, static)(x))
    np.testing.assert_array_equal(run(got, x), run(quantized, x))


def test_like_of_other_paths(tmp_path):
    with pytest.raises(jc.io.LoadError, match=r"not in the file: \['c'\], not in like: \['b'\]"):
        through(tmp_path, {"a": jnp.ones(1), "b": jnp.ones(1)}, like={"a": 0, "c": 0})


def test_a_path_of_str_and_an_existing_file(tmp_path):
    name = str(tmp_path / "file")
    for value in (1.0, 2.0):
        jc.io.save(name, {"a": jnp.full(2, value)})
    np.testing.assert_array_equal(jc.io.load(name)["a"], [2, 2])
