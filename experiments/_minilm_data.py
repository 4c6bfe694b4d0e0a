"""WordNet as a reverse dictionary: definitions, the words they define, and their classes."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from _harness import fail

WORDNET = Path("/usr/share/wordnet")  # where Debian's package puts it
CLASSES = 45  # lexicographer files, as "noun.animal" or "verb.motion"


class Entries(NamedTuple):
    """Definitions, the words that each defines, and the class, int32."""

    definitions: list[str]
    words: list[tuple[str, ...]]
    classes: np.ndarray

    @property
    def names(self) -> list[str]:
        return [", ".join(words) for words in self.words]

    def part(self, rows: np.ndarray) -> "Entries":
        pick = lambda column: [column[i] for i in rows]
        return Entries(pick(self.definitions), pick(self.words), self.classes[rows])


class Parts(NamedTuple):
    """Entries to report on, to choose on, to calibrate with, and to train the probe on.

    No word and no definition is in two of them.
    """

    items: Entries
    validation: Entries
    calibration: Entries
    probe: Entries


def parse(lines: list[str]) -> Entries:
    """The entries in lines of WordNet's data files; lines of their licence start with a blank.

    A line is `offset class type count word 0 word 0 ... | definition; "example"`, the count in
    hexadecimal. Examples often hold the word itself, so they are left out.
    """
    definitions, words, classes = [], [], []
    for line in lines:
        if line.startswith(" ") or not line.strip():
            continue
        facts, _, gloss = line.partition(" | ")
        fields = facts.split(" ")
        definition = gloss.split('; "')[0].strip()
        if not definition or definition.startswith('"'):
            continue
        definitions.append(definition)
        synonyms = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        words.append(tuple(word.split("(")[0].replace("_", " ") for word in synonyms))
        classes.append(int(fields[1]))
    return Entries(definitions, words, np.array(classes, np.int32))


def read(folder: Path | None = None) -> Entries:
    """All 117,659 synsets of WordNet 3.0 (Fellbaum, 1998), in the order of its files."""
    folder = folder or WORDNET
    files = [folder / f"data.{kind}" for kind in ("adj", "adv", "noun", "verb")]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        fail(
            f"{folder} has no {', '.join(missing)}. WordNet comes with Debian's package: "
            "apt-get install wordnet-base"
        )
    lines = [line for file in files for line in file.read_text("latin-1").splitlines()]
    return parse(lines)


def split(entries: Entries, sizes: tuple[int, int, int, int]) -> Parts:
    """Disjoint random parts of these sizes: no word and no definition comes twice.

    The order is a fixed shuffle, so the items do not depend on the other sizes.
    """
    order = np.random.default_rng(0).permutation(len(entries.words))
    seen: set[str] = set()
    chosen: list[int] = []
    for i in order:
        texts = {text.lower() for text in (*entries.words[i], entries.definitions[i])}
        if len(chosen) == sum(sizes):
            break
        if not texts & seen:
            chosen.append(i)
        seen |= texts
    if len(chosen) < sum(sizes):
        fail(f"WordNet has {len(chosen):,} distinct entries, {sum(sizes):,} are needed")
    bounds = np.cumsum([0, *sizes])
    return Parts(*(entries.part(np.array(chosen[a:b])) for a, b in itertools.pairwise(bounds)))
