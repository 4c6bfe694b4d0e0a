"""A saved model as `encode(tokens, lengths)`, in this library or in onnxruntime.

As a program, `python _minilm_encoders.py MODEL TEXTS`: the most memory that a fresh process
takes to load the model and to encode the texts. Each library is imported where it is used, so
that neither pays for the other.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from _bench_peers import session
from _harness import peak_bytes

Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


def load(path: Path) -> Encode:
    return _onnxruntime(path) if path.suffix == ".onnx" else _jaxcompress(path)


def _jaxcompress(path: Path) -> Encode:
    import jax

    import jaxcompress as jc
    from _minilm_layers import encode_padded

    params = jc.prepack(jc.io.load(path))
    run = jax.jit(jc.accelerate(encode_padded))
    return lambda tokens, lengths: np.asarray(run(params, tokens, lengths))


def _onnxruntime(path: Path) -> Encode:
    run = session(str(path)).run

    def encode(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        size = tokens.shape[1]
        mask = (np.arange(size) < lengths[:, None]).astype(np.float32)
        feeds = {"tokens": tokens, "mask": mask, "size": np.array([size])}
        return run(None, feeds)[0]

    return encode


def main() -> None:
    model, texts = map(Path, sys.argv[1:])
    encode = load(model)
    with np.load(texts) as batch:
        encode(batch["tokens"], batch["lengths"])
    print(peak_bytes())


if __name__ == "__main__":
    main()
