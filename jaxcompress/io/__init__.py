"""Files: compressed checkpoints that come back to the same bits."""

from jaxcompress.io import _export  # noqa: F401  (registers the containers)
from jaxcompress.io._save import LoadError, load, save

__all__ = ["LoadError", "load", "save"]
