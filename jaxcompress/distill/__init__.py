"""Distillation: losses in the form of `optax.losses`, one value an example."""

from jaxcompress.distill._logits import kl

__all__ = ["kl"]
