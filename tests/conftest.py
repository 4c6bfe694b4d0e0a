"""What holds for every test: eight virtual devices, and property tests that repeat."""

import os
import pathlib
import sys

# Before jax is imported: it reads both once. Most of the time goes into compiling small
# programs; LLVM's optimizations are a fifth of it, and a setting from outside has them back.
flags = os.environ.get("XLA_FLAGS", "")
if "xla_backend_optimization_level" not in flags:
    flags += " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = flags + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tests are collected with --import-mode=importlib, which leaves sys.path alone; the modules
# that they share (oracles, checks) lie next to this file.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import chex
import hypothesis
import jax
import pytest

# The library is for float32 and below; float64 belongs to the oracles, in numpy.
jax.config.update("jax_enable_x64", False)

hypothesis.settings.register_profile(
    "suite",
    deadline=None,  # a new shape compiles
    derandomize=True,  # the same examples on every run and machine
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _traces_are_counted_anew():
    """chex counts the traces of a function by where it stands, which a parameter leaves alone."""
    chex.clear_trace_counter()
