"""Data distillation: a handful of learned examples that train a fresh network."""

from jaxcompress.distill.dataset._augment import Augmentation, augment
from jaxcompress.distill.dataset._evaluate import evaluate
from jaxcompress.distill.dataset._gradients import dc
from jaxcompress.distill.dataset._matching import Learned, Method, dm
from jaxcompress.distill.dataset._ridge import frepo, kip, relu_ntk
from jaxcompress.distill.dataset._select import herding, k_centre, random
from jaxcompress.distill.dataset._trajectories import expert, mtt

__all__ = [
    "Augmentation",
    "Learned",
    "Method",
    "augment",
    "dc",
    "dm",
    "evaluate",
    "expert",
    "frepo",
    "herding",
    "k_centre",
    "kip",
    "mtt",
    "random",
    "relu_ntk",
]
