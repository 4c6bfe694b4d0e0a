"""Pruning: what to keep, inside an optimizer or after training, and storing only that."""

from jaxcompress.prune._criteria import Criterion, magnitude
from jaxcompress.prune._mask import mask
from jaxcompress.prune._pack import pack
from jaxcompress.prune._patterns import Pattern, nm, unstructured
from jaxcompress.prune._schedules import Schedule, constant, polynomial
from jaxcompress.prune._transform import PruneState, SparsifyState, keep, masks, prune, sparsify

__all__ = [
    "Criterion",
    "Pattern",
    "PruneState",
    "Schedule",
    "SparsifyState",
    "constant",
    "keep",
    "magnitude",
    "mask",
    "masks",
    "nm",
    "pack",
    "polynomial",
    "prune",
    "sparsify",
    "unstructured",
]
