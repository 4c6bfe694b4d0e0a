"""all-MiniLM-L6-v2 for inference: a list of blocks, and query, key and value in one product.

A scan would copy each layer's weights out of the stack before it multiplies with them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from _minilm_model import HEADS, LAYERS, norm

LINEAR = r"blocks/\d+/(qkv|out|up|down)/kernel"
HIDDEN = 384


def unstacked(params: Any) -> Any:
    """The parameters of `_minilm_model.load`, in the form that `encode_padded` takes."""
    blocks = []
    for i in range(LAYERS):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        parts = [block.pop(name) for name in ("query", "key", "value")]
        together = lambda name, parts=parts: jnp.concatenate([p[name] for p in parts], -1)
        blocks.append(block | {"qkv": {name: together(name) for name in ("kernel", "bias")}})
    return {"embedding": params["embedding"], "blocks": blocks}


def encode_padded(params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Unit vectors `[b, 384]` of texts `[b, longest]`, of which the first `lengths` count."""
    table = params["embedding"]
    size = tokens.shape[1]
    x = norm(table["word"][tokens] + table["place"][:size], table["norm"])
    there = jnp.arange(size) < lengths[:, None]
    bias = jnp.where(there, 0.0, -1e9)[:, None, None]
    for layer in params["blocks"]:
        dense = lambda name, x, layer=layer: x @ layer[name]["kernel"] + layer[name]["bias"]
        heads = dense("qkv", x).reshape(*tokens.shape, 3, HEADS, HIDDEN // HEADS)
        q, k, v = (heads[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(HIDDEN // HEADS) + bias
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = norm(x + dense("out", mixed.reshape(x.shape)), layer["attention_norm"])
        hidden = jax.nn.gelu(dense("up", x), approximate=False)
        x = norm(x + dense("down", hidden), layer["mlp_norm"])
    mean = (x * there[..., None]).sum(1) / lengths[:, None]
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
