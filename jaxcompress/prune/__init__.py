"""Pruning: what to keep, inside an optimizer or after training, and storing only that."""

from jaxcompress.prune._criteria import (
    Criterion,
    fisher,
    gradient,
    magnitude,
    movement,
    random,
    taylor,
)
from jaxcompress.prune._distributions import Distribution, Leaf, by_rule, erk, global_, uniform
from jaxcompress.prune._mask import mask
from jaxcompress.prune._pack import pack
from jaxcompress.prune._patterns import Pattern, block, channel, column, nm, row, unstructured
from jaxcompress.prune._schedules import (
    Schedule,
    constant,
    cosine,
    geometric,
    one_shot,
    periodic,
    polynomial,
)
from jaxcompress.prune._transform import PruneState, SparsifyState, keep, masks, prune, sparsify

__all__ = [
    "Criterion",
    "Distribution",
    "Leaf",
    "Pattern",
    "PruneState",
    "Schedule",
    "SparsifyState",
    "block",
    "by_rule",
    "channel",
    "column",
    "constant",
    "cosine",
    "erk",
    "fisher",
    "geometric",
    "global_",
    "gradient",
    "keep",
    "magnitude",
    "mask",
    "masks",
    "movement",
    "nm",
    "one_shot",
    "pack",
    "periodic",
    "polynomial",
    "prune",
    "random",
    "row",
    "sparsify",
    "taylor",
    "uniform",
    "unstructured",
]
