"""Teacher's answers on disk: the same bits, complete or not there, and no silent mixing."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

CacheError = jc.distill.CacheError


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BATCHES = [jnp.asarray(random(n, 9, seed=n)) for n in (4, 4, 3)]


def teacher(x):
    return {"top": jc.distill.top_k(x, 2), "features": x.astype(jnp.bfloat16)}


LIKE = jax.eval_shape(teacher, BATCHES[0])


class StopError(Exception):
    pass


def failing_after(n):
    left = [n]

    def fn(x):
        if left[0] == 0:
            raise StopError
        left[0] -= 1
        return teacher(x)

    return fn, left


def test_every_bit_comes_back(tmp_path):
    jc.distill.cache_teacher(tmp_path / "c", teacher, BATCHES)
    cache = jc.distill.open_cache(tmp_path / "c", LIKE)
    want = teacher(jnp.concatenate(BATCHES))
    for got, expected in zip(jax.tree.leaves(cache), jax.tree.leaves(want)):
        assert isinstance(got, np.memmap)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    assert cache["top"].temperature == 1.0
    batch = jax.tree.map(lambda a: a[np.array([7, 0])], cache)
    loss = jax.jit(jc.distill.top_k_kl)(jnp.zeros((2, 9)), batch["top"])
    want = jax.jit(jc.distill.top_k_kl)(jnp.zeros((11, 9)), want["top"])
    np.testing.assert_allclose(loss, want[np.array([7, 0])], rtol=1e-6)


def test_it_goes_on_where_it_stopped(tmp_path):
    fn, _ = failing_after(1)
    with pytest.raises(StopError):
        jc.distill.cache_teacher(tmp_path / "c", fn, BATCHES)
    assert not (tmp_path / "c").exists()
    # A batch that was being written when the machine stopped.
    with open(tmp_path / "c.partial" / "0.bin", "ab") as file:
        file.write(b"half")
    ticks = []
    fn, left = failing_after(2)
    jc.distill.cache_teacher(tmp_path / "c", fn, BATCHES, progress=lambda: ticks.append(1))
    assert (left, len(ticks)) == ([0], 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    got = jc.distill.open_cache(tmp_path / "c", LIKE)
    np.testing.assert_array_equal(
        np.asarray(got["features"]), np.asarray(jnp.concatenate(BATCHES).astype(jnp.bfloat16))
    )
    fn, left = failing_after(0)  # complete: the teacher is not asked
    jc.distill.cache_teacher(tmp_path / "c", fn, BATCHES)


def test_a_crash_within_the_first_batch(tmp_path):
    with pytest.raises(StopError):
        jc.distill.cache_teacher(tmp_path / "c", failing_after(0)[0], BATCHES)
    (tmp_path / "c.partial" / "0.bin").write_bytes(b"half")
    jc.distill.cache_teacher(tmp_path / "c", teacher, BATCHES)
    jc.distill.open_cache(tmp_path / "c", LIKE)


def test_without_like(tmp_path):
    jc.distill.cache_teacher(tmp_path / "one", lambda x: x, BATCHES)
    np.testing.assert_array_equal(jc.distill.open_cache(tmp_path / "one"), np.concatenate(BATCHES))
    jc.distill.cache_teacher(tmp_path / "two", lambda x: {"a": x, "b": [x[:, 0]]}, BATCHES)
    assert sorted(jc.distill.open_cache(tmp_path / "two")) == ["a", "b/0"]


def spoil(path, position=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_damage_is_one_typed_error(tmp_path):
    jc.distill.cache_teacher(tmp_path / "c", lambda x: x, BATCHES)

    def damaged(change, **kwargs):
        shutil.copytree(tmp_path / "c", tmp_path / "d")
        change(tmp_path / "d")
        try:
            with pytest.raises(CacheError) as error:
                jc.distill.open_cache(tmp_path / "d", **kwargs)
            return str(error.value)
        finally:
            shutil.rmtree(tmp_path / "d")

    longer = lambda d: (d / "0.bin").write_bytes((d / "0.bin").read_bytes() + b"x")
    shorter = lambda d: (d / "0.bin").write_bytes((d / "0.bin").read_bytes()[:-1])
    record = lambda d: (d / "record.json").write_text(
        (d / "record.json").read_text().replace('"rows": 4', '"rows": 5', 1)
    )
    assert "batch 1 was altered" in damaged(lambda d: spoil(d / "0.bin", 5 * 36))
    assert "longer" in damaged(longer)
    assert "altered" in damaged(shorter)
    assert "not as long" in damaged(shorter, verify=False)
    assert "record of" in damaged(record)
    assert "no intact record" in damaged(lambda d: (d / "record.json").write_text("{"))
    assert "like has" in damaged(lambda d: None, like={"a": BATCHES[0]})


def test_another_teacher_or_other_batches_are_refused(tmp_path):
    fn, _ = failing_after(2)
    with pytest.raises(StopError):
        jc.distill.cache_teacher(tmp_path / "c", fn, BATCHES, about={"teacher": 1})
    with pytest.raises(CacheError, match=r"is about \{'teacher': 1\}, not about \{'teacher': 2\}"):
        jc.distill.cache_teacher(tmp_path / "c", teacher, BATCHES, about={"teacher": 2})
    with pytest.raises(CacheError, match="has 2 batches, and there are 1"):
        jc.distill.cache_teacher(tmp_path / "c", teacher, BATCHES[:1], about={"teacher": 1})
    spoil(tmp_path / "c.partial" / "0.bin")
    with pytest.raises(CacheError, match="batch 0 was altered"):
        jc.distill.cache_teacher(tmp_path / "c", teacher, BATCHES, about={"teacher": 1})
    (tmp_path / "c.partial" / "0.bin").write_bytes(b"")
    with pytest.raises(CacheError, match="shorter"):
        jc.distill.cache_teacher(tmp_path / "c", teacher, BATCHES, about={"teacher": 1})


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: jnp.float32(1), "arrays"),
        (lambda x: {"a": x, "b": x[:1]}, "arrays"),
        (lambda x: x[:, : x.shape[0]], "the first with"),
    ],
)
def test_answers_have_one_number_of_examples(tmp_path, fn, message):
    with pytest.raises(ValueError, match=message):
        jc.distill.cache_teacher(tmp_path / "c", fn, BATCHES)
    with pytest.raises(ValueError, match="no batches"):
        jc.distill.cache_teacher(tmp_path / "d", fn, [])


def test_a_newer_version_is_refused(tmp_path):
    from jaxcompress.distill import _cache

    jc.distill.cache_teacher(tmp_path / "c", lambda x: x, BATCHES)
    record = json.loads((tmp_path / "c" / "record.json").read_text())["record"]
    _cache._write(tmp_path / "c", {**record, "version": 2})
    with pytest.raises(CacheError, match="version 2; this library reads 1"):
        jc.distill.open_cache(tmp_path / "c")
