"""What a model of sentences is asked: which word is defined, and of which class it is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from _minilm_data import Entries
from _minilm_model import Batch, pack

Encoder = Callable[[Any, Batch], Any]


class Texts(NamedTuple):
    """Tokenized texts, packed, and where each lies."""

    batches: list[Batch]
    where: np.ndarray

    @classmethod
    def of(cls, tokens: list[list[int]]) -> "Texts":
        return cls(*pack(tokens))

    def encoded(self, encoder: Encoder, params: Any) -> np.ndarray:
        """`[n, 384]` in the order of the texts."""
        found = np.stack([np.asarray(encoder(params, batch)) for batch in self.batches])
        return found[tuple(self.where.T)]


class Probe(NamedTuple):
    """A linear classifier of embeddings: trained once, on those of the dense model."""

    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def trained(cls, embeddings: np.ndarray, classes: np.ndarray) -> "Probe":
        from sklearn.linear_model import LogisticRegression

        fitted = LogisticRegression(C=10.0, max_iter=300).fit(embeddings, classes)
        weight = np.zeros((embeddings.shape[1], int(classes.max()) + 1))
        bias = np.full(weight.shape[1], -np.inf)  # of classes that it never saw
        weight[:, fitted.classes_], bias[fitted.classes_] = fitted.coef_.T, fitted.intercept_
        return cls(weight, bias)

    def right(self, embeddings: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return (embeddings @ self.weight + self.bias).argmax(-1) == classes


def retrieved(definitions: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Whether the word nearest to each definition, among all of them, is its own."""
    return (definitions @ words.T).argmax(-1) == np.arange(len(words))


class Task(NamedTuple):
    """Entries as the model reads them: definitions and words."""

    definitions: Texts
    words: Texts
    classes: np.ndarray

    @classmethod
    def of(cls, entries: Entries, tokenize: Callable[[list[str]], list[list[int]]]) -> "Task":
        texts = [Texts.of(tokenize(t)) for t in (entries.definitions, entries.names)]
        return cls(*texts, entries.classes)

    def encoded(self, encoder: Encoder, params: Any) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of the definitions and of the words."""
        return self.definitions.encoded(encoder, params), self.words.encoded(encoder, params)

    def right(
        self, definitions: np.ndarray, words: np.ndarray, probe: Probe
    ) -> dict[str, np.ndarray]:
        """Of each item, whether it is retrieved and whether the probe has its class."""
        return {
            "recall": retrieved(definitions, words),
            "probe": probe.right(definitions, self.classes),
        }


def against(right: np.ndarray, dense: np.ndarray, draws: int = 10_000) -> dict[str, float]:
    """The mean, its standard error, and the paired difference to the dense model.

    The interval holds 95 % of the differences over bootstrap draws of the items.
    """
    difference = right.astype(np.float64) - dense
    rows = np.random.default_rng(0).integers(0, len(right), (draws, len(right)))
    means = difference[rows].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "mean": float(right.mean()),
        "standard_error": float(right.std(ddof=1) / np.sqrt(len(right))),
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
    }
