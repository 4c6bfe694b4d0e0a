"""The data, the packing and the metrics of the experiments with a pretrained transformer."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))

import _minilm_data as data
import _minilm_model as model
import _minilm_tasks as tasks

LINES = [
    "  1 This software and database is being provided to you",
    '00005930 03 n 02 dwarf 0 bantam(a) 1 001 @ 00004475 n 0000 | a small animal; "a dwarf"  ',
    "00006269 40 v 01 hot_dog 0 000 | show off; do stunts  ",
    '00006270 02 r 01 so 0 000 | "an example only"  ',
]


def test_lines_of_wordnet():
    found = data.parse(LINES)
    assert found.definitions == ["a small animal", "show off; do stunts"]
    assert found.words == [("dwarf", "bantam"), ("hot dog",)]
    assert found.names == ["dwarf, bantam", "hot dog"]
    assert found.classes.tolist() == [3, 40]


def test_parts_share_no_text():
    words = [(f"word{i % 40}", f"other{i}") for i in range(60)]
    definitions = [f"Definition {i % 50}" for i in range(60)]
    entries = data.Entries(definitions, words, np.arange(60, dtype=np.int32))
    parts = data.split(entries, (10, 5, 4, 3))
    assert [len(part.words) for part in parts] == [10, 5, 4, 3]
    texts = [t for part in parts for t in part.definitions]
    assert len(set(texts)) == 22
    assert len({word for part in parts for both in part.words for word in both}) == 44
    again = data.split(entries, (10, 1, 1, 1))
    assert again.items.words == parts.items.words
    with pytest.raises(SystemExit):
        data.split(entries, (30, 20, 10, 10))


def test_a_folder_without_wordnet_says_what_to_install(tmp_path, capsys):
    with pytest.raises(SystemExit):
        data.read(tmp_path)
    assert "apt-get install wordnet-base" in capsys.readouterr().err


def test_packing_keeps_every_text():
    random = np.random.default_rng(0)
    tokens = [random.integers(1, 99, size).tolist() for size in random.integers(2, 64, 150)]
    batches, where = model.pack(tokens)
    assert all(part.shape == (model.ROWS, model.LENGTH) for b in batches for part in b)
    for ids, (b, row, number) in zip(tokens, where):
        mine = batches[b].text[row] == number
        assert batches[b].tokens[row][mine].tolist() == ids
        assert batches[b].place[row][mine].tolist() == list(range(len(ids)))
    assert sum((b.text >= 0).sum() for b in batches) == sum(map(len, tokens))


def small_params():
    """The model's parameters, at sixty features and a hundred words; two blocks."""
    random = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape) / 8, jnp.float32)
    norm = lambda *lead: {"scale": 1 + normal(*lead, 60), "bias": normal(*lead, 60)}
    sizes = dict.fromkeys(model.LINEAR, (60, 60)) | {"up": (60, 80), "down": (80, 60)}
    blocks = {n: {"kernel": normal(2, i, o), "bias": normal(2, o)} for n, (i, o) in sizes.items()}
    blocks |= {"attention_norm": norm(2), "mlp_norm": norm(2)}
    embedding = {"word": normal(100, 60), "place": normal(64, 60), "norm": norm()}
    return {"embedding": embedding, "blocks": blocks}


def test_texts_see_only_themselves():
    """A text has the same embedding alone as among others, and another in another order."""
    params, encoder = small_params(), jax.jit(model.encode)
    texts = [[5, 6, 7, 8], [9, 9, 3], [8, 7, 6, 5]]
    together = tasks.Texts.of(texts).encoded(encoder, params)
    alone = np.concatenate([tasks.Texts.of([t]).encoded(encoder, params) for t in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)  # float32 through two blocks
    np.testing.assert_allclose(np.linalg.norm(together, axis=-1), 1, atol=1e-5)
    assert np.abs(together[0] - together[2]).max() > 1e-3


def test_recall_and_probe():
    words = np.eye(4)
    definitions = np.array([[1, 0, 0, 0], [0, 0.9, 0.1, 0], [0, 0.6, 0.5, 0], [0, 0, 0.1, 0.9]])
    assert tasks.retrieved(definitions, words).tolist() == [True, True, False, True]
    probe = tasks.Probe.trained(np.repeat(np.eye(3), 9, 0), np.repeat([0, 2, 3], 9))
    right = probe.right(np.eye(3), np.array([0, 2, 1]))
    assert right.tolist() == [True, True, False]
    assert np.isneginf(probe.bias[1])  # a class that it never saw


def test_differences_are_paired():
    """Bootstrap means of independent items have the normal interval of their mean."""
    random = np.random.default_rng(2)
    dense = random.random(2000) < 0.5
    worse = dense & (random.random(2000) < 0.9)
    found = tasks.against(worse, dense)
    assert found["mean"] == worse.mean()
    assert found["difference"] == pytest.approx(worse.mean() - dense.mean())
    error = (worse.astype(float) - dense).std(ddof=1) / np.sqrt(2000)
    assert found["standard_error"] == pytest.approx(np.sqrt(0.45 * 0.55 / 2000), rel=0.02)
    # 10,000 draws know a quantile to about 3 % of the interval.
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)
