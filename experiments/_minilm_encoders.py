"""A saved model as `encode(tokens, lengths)`, in this library or in onnxruntime.

As a program, `python _minilm_encoders.py MODEL TEXTS`: the most memory that a fresh process
takes to load the model and to encode the texts. Each library is imported where it is used, so
that neither pays for the other.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

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
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    # Threads that spin while they wait would slow down whoever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def encode(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        size = tokens.shape[1]
        mask = (np.arange(size) < lengths[:, None]).astype(np.float32)
        feeds = {"tokens": tokens, "mask": mask, "size": np.array([size])}
        return session.run(None, feeds)[0]

    return encode


def main() -> None:
    model, texts = map(Path, sys.argv[1:])
    encode = load(model)
    with np.load(texts) as batch:
        encode(batch["tokens"], batch["lengths"])
    print(peak_bytes())


if __name__ == "__main__":
    main()
