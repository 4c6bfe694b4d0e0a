"""Entropy-coded files: the same bits back, near the entropy, and damage is seen."""

import pathlib
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from checks import random
from jaxcompress.io import _coded, _save

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import trees
from trees import assert_same


def through(tmp_path, tree):
    jc.io.save(tmp_path / "file", tree, compress=True)
    return jc.io.load(tmp_path / "file")


def test_every_container_and_model(tmp_path):
    want = trees.compressed()
    got = through(tmp_path, want)
    assert_same(got, want)
    run = jax.jit(jc.accelerate(trees.model))
    np.testing.assert_array_equal(run(got, trees.BATCH), run(want, trees.BATCH))


def test_patterns_and_empty_arrays(tmp_path):
    w = jnp.asarray(random(64, 16))
    tree = {"none": w, "f": jnp.zeros((3, 0)), "s": jnp.float32(2)}
    params = {"half": w, "blocks": w}
    nm, block = jc.prune.nm(2, 4, axis=-2), jc.prune.block(8, 4)
    for name, pattern in (("half", nm), ("blocks", block)):
        q = jc.quantize.quantize({"w": params[name]}, {"w": jc.quantize.int4()})
        masks = jc.prune.mask({"w": jnp.abs(w)}, pattern, 1.0 if name == "half" else 0.5)
        tree[name] = jc.prune.pack(q, masks, pattern=pattern)["w"]
    tree["none"] = jc.prune.pack({"w": w}, {"w": jnp.zeros((64, 16), bool)})["w"]
    got = through(tmp_path, tree)
    assert_same(got, jax.tree.map(lambda x: x, tree))


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int32", "float16", "bfloat16", "float32", "complex64"]
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_dtypes_and_shapes(tmp_path, dtype, shape):
    tree = {"a": (jnp.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype)}
    assert_same(through(tmp_path, tree), tree)
    eight = {"a": jnp.zeros((2, 3), jnp.float8_e4m3fn)}
    assert_same(through(tmp_path, eight), eight)


def gaps_one_by_one(bits):
    """As documented: zeros before each one; 255 stands for as many zeros and no one."""
    out, zeros = [], 0
    for bit in bits:
        zeros += 1 - bit
        if bit:
            out += [255] * (zeros // 255) + [zeros % 255]
            zeros = 0
    return out


@pytest.mark.parametrize(
    "ones",
    [[], [0], [254], [255], [256], [0, 1, 2], [509], [510, 511], [3, 259, 1023], [767, 1022]],
    ids=str,
)
def test_gaps(ones):
    bits = np.zeros(1024, np.uint8)
    bits[ones] = 1
    data = np.packbits(bits, bitorder="little")
    gaps = _coded._gaps(data)
    assert gaps.tolist() == gaps_one_by_one(bits.tolist())
    np.testing.assert_array_equal(_coded._bits(gaps, 128), data)


def entropy(symbols):
    share = np.bincount(np.asarray(symbols).ravel()) / np.size(symbols)
    share = share[share > 0]
    return -np.sum(share * np.log2(share)) * np.size(symbols) / 8


def test_sizes_are_near_the_entropy(tmp_path):
    """Of the places and of the codes; what is in files counts, the head included."""
    w = jnp.asarray(random(256, 400))  # no row is filling
    masks = jc.prune.mask({"w": jnp.abs(w)}, jc.prune.unstructured(), 0.95)
    shared = jc.quantize.share({"w": w}, {"w": jc.quantize.codebook(bits=4)}, masks=masks)
    codes = np.asarray(shared["w"].codes())
    packed = jc.prune.pack(shared, masks)
    jc.io.save(tmp_path / "coded", packed, compress=True)
    jc.io.save(tmp_path / "plain", packed)
    sizes = {name: (tmp_path / name).stat().st_size for name in ("plain", "coded")}
    least = entropy(codes != 0) + entropy(codes[codes != 0]) + 15 * 4
    assert sizes["plain"] > packed["w"].nbytes
    # Huffman's codes are whole bits, and their tables and the head (about 350 bytes) count too.
    assert least < sizes["coded"] < 1.05 * least + 450
    # A dense array of five-bit codes is coded by its codes, not by the bytes of its planes.
    q = jc.quantize.quantize({"w": w}, {"w": jc.quantize.Spec(qtype=jc.arrays.IntType(5))})
    jc.io.save(tmp_path / "dense", q, compress=True)
    least = entropy(np.asarray(q["w"].codes()).astype(int) + 16)
    assert (tmp_path / "dense").stat().st_size < 1.02 * least + 4 * 400 + 450
    # Dense floats: the bytes of the exponents are worth coding, the rest is stored.
    jc.io.save(tmp_path / "floats", {"w": w}, compress=True)
    assert (tmp_path / "floats").stat().st_size < w.nbytes * 0.95


def test_repetitions_are_found(tmp_path):
    jc.io.save(tmp_path / "same", {"w": jnp.tile(jnp.asarray(random(64)), 1000)}, compress=True)
    assert (tmp_path / "same").stat().st_size < 2000


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    params = {"w": jnp.arange(60.0).reshape(20, 3) - 25, "b": [jnp.ones(5, jnp.bfloat16)]}
    path = tmp_path_factory.mktemp("coded") / "model"
    jc.io.save(path, params, compress=True)
    return path.read_bytes()


def test_no_damage_goes_unseen(saved, tmp_path):
    def survives(data):
        (tmp_path / "damaged").write_bytes(data)
        try:
            jc.io.load(tmp_path / "damaged")
        except jc.io.LoadError:
            return False
        return True

    assert survives(saved)
    for bits in (0xFF, 0x01):
        for at in range(len(saved)):
            assert not survives(saved[:at] + bytes([saved[at] ^ bits]) + saved[at + 1 :])
    for size in range(0, len(saved), 5):
        assert not survives(saved[:size])
    assert not survives(saved + b"\0")


def test_a_newer_file_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(_save, "_VERSION", 2)
    jc.io.save(tmp_path / "model", {"a": jnp.ones(3)}, compress=True)
    monkeypatch.undo()
    with pytest.raises(jc.io.LoadError, match=r"model: it has version 2.*upgrade jaxcompress"):
        jc.io.load(tmp_path / "model")


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise zlib.error("no memory")

    monkeypatch.setattr(_coded, "encode", full)
    with pytest.raises(zlib.error):
        jc.io.save(tmp_path / "model", {"a": jnp.ones(3)}, compress=True)
    assert not list(tmp_path.iterdir())
