"""The report's statistics and sentences, and the README's table against its JSON."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import _bench_peak
import _digits_report as report
import _harness as harness
import update_readme
from jaxcompress.arrays._uses import Use

ROWS = [
    Use("a", "QuantizedArray", "dot_general", "int8_matmul", "xla", "integers by XLA", 10),
    Use("b", "QuantizedArray", "dot_general", "int8_matmul", "xla", "integers by XLA", 10),
    Use("c", "BitmapSparseArray", "expand", "bitmap", "reference", "zeros are put back", 10),
]


def test_why_follows_the_measurement():
    """The sentence is derived: another measurement, another sentence."""
    slow, fast, same = (report.why(ROWS, ratio, 128) for ratio in (2.5, 0.4, 1.02))
    assert "2.5 times as long as dense" in slow
    assert "2.5 times as fast as dense" in fast
    assert "1.02 of the time of dense" in same
    assert len({slow, fast, same}) == 3


def test_why_follows_explain():
    sentence = report.why(ROWS, 2.0, 1)
    assert "integers by XLA, for 2 weights" in sentence
    assert "zeros are put back, for 1 weights" in sentence
    assert report.why([], 1.0, 1) != sentence


def test_paired_interval_is_that_of_the_difference():
    random = np.random.default_rng(1)
    dense = random.random((5, 1000)) < 0.9
    worse = dense & (random.random((5, 1000)) < 0.98)
    found = report.accuracy_against(worse, dense)
    assert found["points"] == pytest.approx(100 * (worse.mean() - dense.mean()))
    assert found["low"] < found["points"] < found["high"] < 0
    # Against itself nothing varies, whatever the accuracy: the interval is a point.
    assert report.accuracy_against(dense, dense) == {"points": 0, "low": 0, "high": 0}
    # Unpaired, the standard error alone would be 100 * sqrt(2 * .9 * .1 / 5000) = 0.6 points.
    assert found["high"] - found["low"] < 1.2


def test_readme_has_the_table_of_its_json():
    record = json.loads((ROOT / "experiments/results/compress_digits.json").read_text())
    readme = (ROOT / "README.md").read_text()
    block = update_readme.digits_block(record)
    assert update_readme.replaced(readme, "compress_digits", block) == readme


def test_the_tables_of_the_cpu_have_a_column_for_each_work():
    row = lambda work, name, ratio: dict(work=work, name=name, min_ms=2.0, ratio_of_minima=ratio)
    rows = [row("a", "XLA f32", 1.0), row("a", "w8a8", 4.5), row("b", "XLA f32", 1.0)]
    rows += [row("c, pruned", "XLA f32", 1.0), row("c, pruned", "90%", 6.0)]
    rows[1] |= _bench_peak.share("w8a8", 100, 200, 300, 2.0, dict(int8_gops=24.0, read_gb_s=1.0))
    most = dict(int8_gops=24.0, float32_gflops=6.0, read_gb_s=1.0)
    environment = dict(
        command="python x", versions=dict(jax="1"), machine=dict(cores=2, processor="P")
    )
    record = dict(rows=rows, native="portable", environment=environment, peak=most)
    block = update_readme.cpu_block(record)
    assert "| w8a8 | 25% |" in block.splitlines()  # 12 million operations in 2 ms: 6 GOP/s
    one_row = _bench_peak.share("XLA f32", 1, 1000, 500, 4.0, most)  # 2 MB in 4 ms
    assert one_row == {"of_peak": 0.5, "bound": "read_gb_s"}
    for line in ("| | a | b |", "| XLA f32 | 2.000 ms | 2.000 ms |", "| w8a8 | 4.50 |  |"):
        assert line in block.splitlines()
    assert {"| | c |", "| 90% | 6.00 |"} <= set(block.splitlines())
    for results in (ROOT / "experiments/results").glob("bench_cpu.json"):
        page, block = (
            update_readme.CPU.read_text(),
            update_readme.cpu_block(json.loads(results.read_text())),
        )
        assert update_readme.replaced(page, "bench_cpu", block) == page


def test_the_page_of_kernels_has_the_table_of_its_json():
    record = json.loads((ROOT / "experiments/results/bench_kernels.json").read_text())
    page, block = update_readme.KERNELS.read_text(), update_readme.kernels_block(record)
    assert update_readme.replaced(page, "bench_kernels", block) == page
    row = next(r for r in record["rows"] if r["product"] == "1 x 4096 x 4096 4 bits by 128")
    times = row["milliseconds"]
    ratio = times["bfloat16"] / times["triton"]
    assert f"{1e3 * times['triton']:.0f} µs, " in block
    assert f", {ratio:.2f} |" in block
    assert all(r["right"] for r in record["rows"])


@pytest.mark.parametrize("name", ["distill_dataset", "distill_dataset_full"])
def test_the_page_of_distillation_has_the_table_of_its_json(name):
    record = json.loads((ROOT / f"experiments/results/{name}.json").read_text())
    page, block = update_readme.DISTILLATION.read_text(), update_readme.dataset_block(record, name)
    assert update_readme.replaced(page, name, block) == page
    assert f"results/{name}.png" in block
    one = next(r for r in record["rows"] if r["method"] == "dm")
    assert f"| dm | {100 * one['accuracy']:.1f} ± {100 * one['std']:.1f} | " in page


def test_goal_of_the_main_job():
    """At least 20 times smaller, within half a point of dense."""
    record = json.loads((ROOT / "experiments/results/compress_digits.json").read_text())
    by_name = {v["name"]: v for v in record["variants"]}
    small, dense = by_name["pruned_int4"], by_name["dense"]
    assert dense["file_bytes"] / small["file_bytes"] >= 20
    assert small["accuracy_vs_dense"]["points"] >= -0.5
    assert small["sparsity"] >= 0.9
    assert len(record["environment"]["seeds"]) == 5


def test_staged_output_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "report"

    def fail_half_way():
        with harness.staged(out) as folder:
            (folder / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with harness.staged(out) as folder:
            (folder / "all").write_text(text)
        assert (out / "all").read_text() == text
    assert list(tmp_path.iterdir()) == [out]


def test_staged_output_leaves_foreign_folders_alone(tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(SystemExit), harness.staged(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
    assert "choose another folder" in capsys.readouterr().err


def test_reports_inside_a_report_stay(tmp_path):
    """The tour's report lies in report/, which the main job replaces, in either order."""
    outer, inner = tmp_path / "report", tmp_path / "report" / "tour"
    for _ in range(2):
        with harness.staged(inner) as folder:
            (folder / "picture").write_text("tour")
        with harness.staged(outer) as folder:
            (folder / "table").write_text("job")
        assert (inner / "picture").read_text() == "tour"
        assert (outer / "table").read_text() == "job"
        (outer / "left from before").touch()
    with harness.staged(outer):
        pass
    assert {path.name for path in outer.iterdir()} == {harness.OURS, "tour"}
    assert list(tmp_path.iterdir()) == [outer]


def test_a_failed_run_leaves_the_old_report(tmp_path):
    out = tmp_path / "report"
    with harness.staged(out) as folder:
        (folder / "all").write_text("old")

    def interrupted():
        with harness.staged(out) as folder:
            (folder / "all").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (out / "all").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("file", "is no report of an experiment"),
        ("file/report", "cannot write to"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(tmp_path, capsys, out, said):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as exit, harness.staged(tmp_path / out):
        pytest.fail("it ran before it knew where to write")
    assert exit.value.code != 0
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_write_json_replaces_whole_files(tmp_path):
    path = tmp_path / "record.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        harness.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        harness.write_json(tmp_path / "folder", {"a": 2})
    assert {found.name for found in tmp_path.iterdir()} == {"record.json", "folder"}


def test_environment_says_how_to_repeat_a_run(monkeypatch):
    script = str(ROOT / "experiments" / "compress_digits.py")
    monkeypatch.setattr(sys, "argv", [script, "--seeds", "2"])
    found = harness.environment(range(2))
    assert found["command"] == "python experiments/compress_digits.py --seeds 2"
    assert found["seeds"] == [0, 1]
    assert {"jax", "optax", "quax", "numpy", "python"} <= set(found["versions"])
    assert found["machine"]["processor"]
    assert found["machine"]["cores"] >= 1


def test_interleaved_runs_each_in_turn():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = harness.interleaved(runs, repeats=6)
    assert calls == ["a", "b"] * 7  # one more, to compile
    assert {name: len(t) for name, t in times.items()} == {"a": 6, "b": 6}
    calls.clear()
    assert len(harness.interleaved(runs, repeats=50, budget=0)["a"]) == 5
    calls.clear()
    times = harness.interleaved(runs, repeats=5, in_a_row=2)
    assert "".join(calls) == "ab" + 5 * "aaabbb"  # the first of three does not count
    assert len(times["b"]) == 10


def test_markers_hold_one_block_each():
    page = "a\n<!-- x: from -->\nold\n<!-- /x -->\nb\n<!-- y: from -->\nother\n<!-- /y -->\n"
    assert update_readme.replaced(page, "x", "new\n") == page.replace("old", "new")
    assert update_readme.replaced(page, "y", "new\n") == page.replace("other", "new")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sedes", "3"], "unrecognized arguments: --sedes"),
        (["--seeds", "0"], "--seeds and --epochs are 1 or more"),
        (["--quick", "--out", "/proc/report"], "cannot write to /proc"),
    ],
)
def test_wrong_use_is_one_line(arguments, said):
    script = ROOT / "experiments" / "compress_digits.py"
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["compress_digits.py", "first_principles.py"])
def test_without_packages(script, tmp_path):
    """-S hides what is installed: help still comes, a run says what to install."""
    command = [sys.executable, "-S", str(ROOT / "experiments" / script)]
    run = lambda *options: subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False
    )
    asked = run("--help")
    assert asked.returncode == 0
    assert all(option in asked.stdout for option in ("--out", "--quick"))
    done = run("--quick", "--out", str(tmp_path / "report"))
    assert done.returncode != 0
    assert done.stderr.startswith("error: this experiment needs jax, optax, flax, matplotlib")
    assert "pip install" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_one_line():
    code = (
        "import sys; sys.path.insert(0, 'experiments'); from _harness import need; need('absent')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode != 0
    assert done.stderr.startswith("error: this experiment needs absent: pip install")
    assert done.stderr.count("\n") == 1
