"""Pruning: what to keep, inside an optimizer or after training, and storing only that."""

from jaxcompress.arrays._activation_sparsity import (
    ActivationSparsity,
    nm_activations,
    threshold_activations,
    top_k_activations,
)
from jaxcompress.prune._activations import activation_sparsity, prune_activations
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
from jaxcompress.prune._iterative import iterative, lottery_ticket
from jaxcompress.prune._low_rank import low_rank
from jaxcompress.prune._mask import mask
from jaxcompress.prune._pack import pack
from jaxcompress.prune._patterns import Pattern, block, channel, column, nm, row, unstructured
from jaxcompress.prune._proximal import proximal
from jaxcompress.prune._regrow import regrow, rigl, set_
from jaxcompress.prune._schedules import (
    Schedule,
    constant,
    cosine,
    geometric,
    one_shot,
    periodic,
    polynomial,
)
from jaxcompress.prune._shrink import Removable, Removal, removable, shrink
from jaxcompress.prune._sparsegpt import sparsegpt
from jaxcompress.prune._straight_through import straight_through
from jaxcompress.prune._transform import PruneState, SparsifyState, keep, masks, prune, sparsify
from jaxcompress.prune._with_function import grasp, snip, synflow, wanda
from jaxcompress.prune._zeroing import apply

__all__ = [
    "ActivationSparsity",
    "Criterion",
    "Distribution",
    "Leaf",
    "Pattern",
    "PruneState",
    "Removable",
    "Removal",
    "Schedule",
    "SparsifyState",
    "activation_sparsity",
    "apply",
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
    "grasp",
    "iterative",
    "keep",
    "lottery_ticket",
    "low_rank",
    "magnitude",
    "mask",
    "masks",
    "movement",
    "nm",
    "nm_activations",
    "one_shot",
    "pack",
    "periodic",
    "polynomial",
    "proximal",
    "prune",
    "prune_activations",
    "random",
    "regrow",
    "removable",
    "rigl",
    "row",
    "set_",
    "shrink",
    "snip",
    "sparsegpt",
    "sparsify",
    "straight_through",
    "synflow",
    "taylor",
    "threshold_activations",
    "top_k_activations",
    "uniform",
    "unstructured",
    "wanda",
]
