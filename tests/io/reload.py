"""Loads a checkpoint in a process of its own: `reload.py checkpoint logits`."""

import sys

import jax
import numpy as np
import trees

import jaxcompress as jc

params = jc.io.load(sys.argv[1])
np.save(sys.argv[2], jax.jit(jc.accelerate(trees.model))(params, trees.BATCH))
