"""Compressed arrays inside unmodified functions."""

from jaxcompress._accelerate._accelerate import accelerate

__all__ = ["accelerate"]
