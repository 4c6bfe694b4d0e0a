"""One variant in a process of its own: what somebody who downloads the files would see.

Run by compress_digits.py: python experiments/_digits_evaluate.py FOLDER VARIANT
"""

import resource
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from _data import digits
from _digits_models import student
from _harness import interleaved, write_json

BATCHES = (1, 128)


@jax.jit
def logits(params: Any, x: jax.Array) -> jax.Array:
    """The unmodified model on compressed parameters."""
    return jc.accelerate(student.apply)(params, x)


def model_files(folder: Path, variant: str) -> list[Path]:
    """The files of a variant, one a seed, in the order of the seeds."""
    files = folder.glob(f"{variant}_seed*.safetensors")
    return sorted(files, key=lambda f: int(f.stem.rsplit("seed", 1)[1]))


def main(folder: Path, variant: str) -> None:
    test = digits().test
    load = lambda file: jc.prepack(jc.io.load(file))
    x = jnp.asarray(test.x)
    out = np.stack([np.asarray(logits(load(file), x)) for file in model_files(folder, variant)])
    np.save(folder / f"{variant}.npy", out)
    # Kilobytes on Linux. Read before the dense model, for comparison only, is loaded too.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ours, dense = (load(model_files(folder, name)[0]) for name in (variant, "dense"))
    latency = {}
    for batch in BATCHES:
        rows = x[:batch]
        times = interleaved(
            {"dense": lambda r=rows: logits(dense, r), "ours": lambda r=rows: logits(ours, r)},
            repeats=300,
        )
        median = {name: float(np.median(t)) for name, t in times.items()}
        latency[str(batch)] = {
            "median": median["ours"],
            "minimum": float(np.min(times["ours"])),
            "ratio_to_dense": median["ours"] / median["dense"],
            "ratio_of_minima": float(np.min(times["ours"]) / np.min(times["dense"])),
        }
    write_json(folder / f"{variant}.json", {"peak_rss": peak, "latency_ms": latency})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
