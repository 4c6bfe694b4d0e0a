"""Data distillation: a handful of learned examples that train a fresh network."""

from jaxcompress.distill.dataset._augment import Augmentation, augment
from jaxcompress.distill.dataset._evaluate import evaluate
from jaxcompress.distill.dataset._matching import Learned, Method, dc, dm
from jaxcompress.distill.dataset._select import herding, k_centre, random

__all__ = [
    "Augmentation",
    "Learned",
    "Method",
    "augment",
    "dc",
    "dm",
    "evaluate",
    "herding",
    "k_centre",
    "random",
]
