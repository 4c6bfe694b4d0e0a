"""Distillation, of models and of data: losses in the form of `optax.losses`, and recipes."""

from jaxcompress.distill import dataset
from jaxcompress.distill._cache import CacheError, cache_teacher, open_cache
from jaxcompress.distill._contrastive import CRDMemory, crd, crd_memory, crd_projectors
from jaxcompress.distill._correlation import dist
from jaxcompress.distill._decoupled import dkd
from jaxcompress.distill._features import (
    attention_transfer,
    fitnet,
    nst,
    project,
    projector,
    vid,
    vid_projector,
)
from jaxcompress.distill._intermediates import Product, intermediates
from jaxcompress.distill._logits import jensen_shannon, kl, mse, reverse_kl, soft_cross_entropy
from jaxcompress.distill._recipes import (
    born_again,
    ema_teacher,
    mutual_kl,
    step,
    teacher_assistants,
)
from jaxcompress.distill._relations import pkt, rkd_angle, rkd_distance, similarity_preserving
from jaxcompress.distill._teachers import multi_teacher_kl
from jaxcompress.distill._top_k import TopK, top_k, top_k_kl
from jaxcompress.distill._transformers import layerwise, self_relation, uniform_layers

__all__ = [
    "CRDMemory",
    "CacheError",
    "Product",
    "TopK",
    "attention_transfer",
    "born_again",
    "cache_teacher",
    "crd",
    "crd_memory",
    "crd_projectors",
    "dataset",
    "dist",
    "dkd",
    "ema_teacher",
    "fitnet",
    "intermediates",
    "jensen_shannon",
    "kl",
    "layerwise",
    "mse",
    "multi_teacher_kl",
    "mutual_kl",
    "nst",
    "open_cache",
    "pkt",
    "project",
    "projector",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "self_relation",
    "similarity_preserving",
    "soft_cross_entropy",
    "step",
    "teacher_assistants",
    "top_k",
    "top_k_kl",
    "uniform_layers",
    "vid",
    "vid_projector",
]
