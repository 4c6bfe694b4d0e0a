"""What the distillation experiments compute besides training: data, corrections, resuming."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import _mnist
import _resume
import _users_data as users_data
import kd_digits


def test_purchases_of_a_day_are_one_and_free_ones_none():
    table = np.array([[7, 3, 1, 10.0], [7, 3, 2, 5.0], [7, 9, 1, 0.0], [8, 3, 1, 1.0]])
    np.testing.assert_array_equal(users_data.cleaned(table), [[7, 3, 3, 15.0], [8, 3, 1, 1.0]])


def test_features_know_nothing_after_the_cut():
    before = [[1, 0, 2, 20.0], [1, 40, 1, 30.0], [2, 272, 4, 5.0]]
    after = [[1, 273, 9, 900.0], [3, 300, 1, 1.0], [2, 546, 1, 1.0]]
    x, y = users_data.features(np.array(before + after))
    again, _ = users_data.features(np.array(before))
    np.testing.assert_array_equal(x, again)
    np.testing.assert_array_equal(y, [1, 0])  # 2 came back too late, 3 was not there
    assert x.shape == (2, len(users_data.NAMES))
    first = dict(zip(users_data.NAMES, x[0]))
    assert np.expm1(first["orders"]) == pytest.approx(2)
    assert np.expm1(first["dollars"]) == pytest.approx(50)
    assert np.expm1(first["largest order"]) == pytest.approx(30)
    assert (first["first order"], first["last order"], first["mean gap"]) == (0, 40, 40)
    assert np.expm1(first["CDs in Jan"]) == pytest.approx(2)
    assert np.expm1(first["CDs in Feb"]) == pytest.approx(1)
    assert np.expm1(dict(zip(users_data.NAMES, x[1]))["CDs in Sep"]) == pytest.approx(4)


def test_the_bias_is_corrected_to_the_middle_of_what_is_best():
    logits, labels = np.zeros((4, 10)), np.array([3, 3, 5, 5])
    logits[:2, 1], logits[:2, 3] = 4.0, 0.0  # right from 4 on
    logits[2:, 5], logits[2:, 3] = 6.0, 0.0  # and up to 6
    assert kd_digits.corrected(logits, labels) == pytest.approx(5.0, abs=0.11)


def idx(array):
    shape = np.array(array.shape, ">i4").tobytes()
    return b"\0\0\x08" + bytes([array.ndim]) + shape + array.astype(np.uint8).tobytes()


def test_real_mnist_is_read_from_a_folder(tmp_path):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (7, 28, 28)), random.integers(0, 10, 7)
    for part, n in (("train", 7), ("t10k", 3)):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:n])))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels[:n]))
    data = _mnist.mnist(tmp_path, validation=2)
    assert [len(part.y) for part in data] == [5, 2, 3]
    np.testing.assert_allclose(data.validation.x, images[5:].reshape(2, -1) / 255, rtol=1e-6)
    np.testing.assert_array_equal(data.test.y, labels[:3])


@pytest.mark.parametrize(
    ("data", "said"),
    [(None, "has neither"), (b"\0\0\x08\x01\0\0\0\x09abc", "truncated"), (b"no", "no idx file")],
)
def test_a_wrong_folder_is_one_line(tmp_path, capsys, data, said):
    if data is not None:
        (tmp_path / "train-images-idx3-ubyte").write_bytes(data)
    with pytest.raises(SystemExit):
        _mnist.mnist(tmp_path)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_runs_that_are_done_are_not_done_again(tmp_path):
    calls = []

    def run():
        calls.append(1)
        return {"errors": 3}

    once, done = _resume.resumable(tmp_path / "report", [5])
    assert once("a", run) == once("a", run) == {"errors": 3}
    again, _ = _resume.resumable(tmp_path / "report", [5])
    assert again("a", run) == {"errors": 3}
    assert len(calls) == 1
    other, _ = _resume.resumable(tmp_path / "report", [6])
    other("a", run)
    assert len(calls) == 2
    done()
    assert list(tmp_path.iterdir()) == []


def test_goal_of_user_behaviour():
    """AUC, recall and F1 of the ensemble kept within a point, in under 4 KB, over five seeds."""
    record = json.loads((ROOT / "experiments/results/user_behaviour.json").read_text())
    by_name = {row["name"]: row for row in record["rows"]}
    small, large = by_name["compressed"], by_name["ensemble"]
    assert small["file_bytes"] < 4096
    assert large["auc"] > 0.765
    for score in ("auc", "recall", "f1"):
        assert small[score] > large[score] - 0.01
    assert len(record["environment"]["seeds"]) == 5


def test_goal_of_kd_digits():
    """At least half of the student's gap closed, and a digit known that was never seen."""
    record = json.loads((ROOT / "experiments/results/kd_digits.json").read_text())
    by_name = {row["name"]: row for row in record["rows"]}
    gap = by_name["alone"]["errors"] - by_name["teacher"]["errors"]
    best = min(row["errors"] for row in record["rows"] if row["name"].startswith("T ="))
    assert gap > 0
    assert record["closed"] == pytest.approx((by_name["alone"]["errors"] - best) / gap)
    assert record["closed"] >= 0.5
    assert best < by_name["smoothed labels"]["errors"]
    assert len(by_name["alone"]["errors_each"]) == 5


def test_goal_of_kd_fashion():
    """At least half of the student's gap closed, for both pairs; who beats plain KD is said."""
    record = json.loads((ROOT / "experiments/results/kd_fashion.json").read_text())
    assert record["minutes"] < 60
    for pair in ("MLP", "CNN"):
        rows = {row["name"]: row for row in record["rows"] if row["pair"] == pair}
        teacher, alone = rows.pop("teacher")["accuracy"], rows["alone"]["accuracy"]
        for row in rows.values():
            assert row["closed"] == pytest.approx((row["accuracy"] - alone) / (teacher - alone))
            assert row["beats_kl"] == (row["points_over_kl"] > 2 * row["standard_error"] > 0)
        assert max(row["closed"] for row in rows.values()) >= 0.5


@pytest.mark.parametrize("name", ["distill_dataset", "distill_dataset_full"])
def test_goal_of_distill_dataset(name):
    """Learned sets beat images at random; one DSA's 70.6 at one."""
    record = json.loads((ROOT / f"experiments/results/{name}.json").read_text())
    rows = {(r["method"], r["per_class"], r["network"]): r for r in record["rows"]}
    learned = ("dm", "dc", "dsa", "kip", "frepo", "mtt")
    for (method, per_class, network), row in rows.items():
        base = rows["random", per_class, network]
        error = np.hypot(row["std"], base["std"]) / record["networks"] ** 0.5
        better = row["accuracy"] > base["accuracy"] + 2 * error
        assert row["beats_random"] == better
        assert better or method not in learned
    if name == "distill_dataset":
        assert max(rows[method, 1, "ConvNet"]["accuracy"] for method in learned) >= 0.706
    assert record["networks"] >= 20
    assert len(rows) == 9 * len(record["updates"]) * 2
