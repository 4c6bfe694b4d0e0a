"""Quantization beside qwix and aqt: does training cost more, and what is left of a weight?

    python experiments/compare_quantizers.py            about 8 minutes on two idle cores
    python experiments/compare_quantizers.py --quick    few repeats, no large layer

Training steps of an MLP, a CNN and a transformer block with eight-bit weights and activations,
without and with int8 gradients rounded stochastically, in turns in one process, as multiples of
the float32 step. Then int4 after training: relative error of the logits of a digit classifier
and bytes of its file, rounded and by GPTQ; the time that GPTQ takes to compile as its columns
grow; and GPTQ of a 4096 x 4096 layer with groups of 128, in a process of its own. The peers
take part where they are installed: pip install -e '.[peers-jax]'.

Expected: a step at most 1.1 times that of float32, with int8 gradients at most twice; GPTQ
compiles in the same time for any number of columns, and does the large layer in less than ten
minutes and 1.5 GB. Writes compare_quantizers.json, table.md and compare_quantizers.png to --out.
"""

import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _compare_report import bars, step_rows, table
from _harness import (
    ROOT,
    Parser,
    environment,
    fail,
    interleaved,
    need,
    progress,
    staged,
    write_json,
)

COLUMNS = (32, 64, 128, 256)
LARGE = 4096


def arguments() -> Any:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "report" / "compare_quantizers")
    parser.add_argument("--quick", action="store_true", help="few repeats, no large layer")
    parser.add_argument("--large", type=int, help="only GPTQ of such a layer, as JSON")
    return parser.parse_args()


def versions() -> dict[str, str]:
    """Of the peers; "not installed" where they are not."""
    found = {}
    for name in ("qwix", "aqtp"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def large_in_its_own_process(size: int) -> dict[str, Any]:
    """Its peak of memory is then its own."""
    command = [sys.executable, __file__, "--large", str(size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        fail(f"GPTQ of a {size} x {size} layer failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def main() -> None:
    options = arguments()
    need("jax", "flax", "sklearn", "matplotlib", "rich")
    import optax

    from _compare_models import MODELS, stepper
    from _compare_quantizers import gptq_seconds, large_gptq, post_training, training

    if options.large:
        print(json.dumps(large_gptq(options.large)))
        return
    begin = time.perf_counter()
    repeats, budget = (5, 0.1) if options.quick else (200, 40.0)
    steps: list[dict[str, Any]] = []
    compiling: list[dict[str, Any]] = []
    with staged(options.out) as out, progress() as add:
        advance = add("training steps", len(MODELS))
        for work, model in MODELS.items():
            runs, compiled = {}, {}
            for name, (apply, params) in training(model).items():
                runs[name], compiled[name] = stepper(
                    apply, params, optax.adam(1e-3), *model.batch()
                )
            times = interleaved(runs, repeats, budget)
            steps += step_rows(work, times, compiled, "dense f32")
            advance()
        columns = COLUMNS[:2] if options.quick else COLUMNS
        advance = add("compiling GPTQ", len(columns))
        for number in columns:
            compiling += gptq_seconds(number, with_peers=not options.quick)
            advance()
        advance = add("int4 after training", 1)
        after = post_training(with_gptq_of_peers=not options.quick)
        advance()
        advance = add("GPTQ of a large layer", 1)
        large = large_in_its_own_process(256 if options.quick else LARGE)
        advance()
        record = {
            "environment": environment() | {"peers": versions()},
            "minutes": (time.perf_counter() - begin) / 60,
            "steps": steps,
            "gptq_compile": compiling,
            "int4_digits": after,
            "gptq_large": large,
        }
        write_json(out / "compare_quantizers.json", record)
        (out / "table.md").write_text(table(steps))
        bars(steps, dict.fromkeys(MODELS, 1.1), out / "compare_quantizers.png")
    print(table(steps))


if __name__ == "__main__":
    main()
