"""The dense model of ptq_minilm and prune_minilm, what it is asked, and what it answers."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxcompress as jc
from _minilm_data import read, split
from _minilm_model import encode, folder, load, pack, tokenize
from _minilm_tasks import Probe, Task, Texts, against

SIZES = (1000, 1000, 800, 3000)  # items, validation, calibration, probe


class Dense(NamedTuple):
    """The dense model, what it is asked, and what it answers."""

    encoder: Any
    params: Any
    learn: list[Any]
    task: Any
    probe: Any
    embeddings: tuple[Any, Any]
    right: dict[str, Any]

    def judged(self, params: Any) -> dict[str, Any]:
        """How near the embeddings of `params` are, and each metric beside that of the dense."""
        found = self.task.encoded(self.encoder, params)
        right = self.task.right(*found, self.probe)
        cosine = float((found[0] * self.embeddings[0]).sum(-1).mean())
        return {"cosine": cosine} | {name: against(right[name], self.right[name]) for name in right}


def compressed_leaves(params: Any) -> list[Any]:
    leaves = jax.tree.leaves(params, is_leaf=jc.arrays.is_compressed)
    return [leaf for leaf in leaves if jc.arrays.is_compressed(leaf)]


def bits_a_weight(leaves: list[Any]) -> float:
    """What compressed leaves store of a weight: scales, places and masks included."""
    return 8 * sum(leaf.nbytes for leaf in leaves) / sum(leaf.size for leaf in leaves)


def dense_model(wordnet: Path | None, sizes: tuple[int, int, int, int]) -> Dense:
    where = folder()
    parts = split(read(wordnet), sizes)
    tokens = lambda texts: tokenize(where, texts)
    params, encoder = load(where), jax.jit(jc.accelerate(encode))
    task = Task.of(parts.items, tokens)
    probed = Texts.of(tokens(parts.probe.definitions)).encoded(encoder, params)
    probe = Probe.trained(probed, parts.probe.classes)
    # The last batch is not full, and padding is nothing to learn from.
    learn = pack(tokens(parts.calibration.definitions + parts.calibration.names))[0]
    embeddings = task.encoded(encoder, params)
    right = task.right(*embeddings, probe)
    return Dense(encoder, params, learn[: max(1, len(learn) - 1)], task, probe, embeddings, right)
