"""XLA's compiler for NVIDIA's GPUs, without one: its tools, and the chips in its words.

The CUDA plugin compiles for a chip that is described to it; ptxas and NVIDIA's library of
functions come with Triton. Importing this sets the flags that XLA reads when it starts.
"""

import atexit
import contextlib
import os
import shutil
import tempfile
import unittest.mock
from pathlib import Path
from typing import NamedTuple

import jax
import triton
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxcompress.ops import _kernels

FOLDER = Path(tempfile.mkdtemp())
DUMP = FOLDER / "dump"
_TOOLS = {
    "bin/ptxas": "bin/ptxas-blackwell",
    "nvvm/libdevice/libdevice.10.bc": "lib/libdevice.10.bc",
}
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
for place, source in _TOOLS.items():
    (FOLDER / place).parent.mkdir(parents=True, exist_ok=True)
    (FOLDER / place).symlink_to(Path(triton.__file__).parent / "backends" / "nvidia" / source)
os.environ |= {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # that wheels of CUDA itself are there
    "PATH": f"{FOLDER / 'bin'}{os.pathsep}{os.environ['PATH']}",
    # Nothing is timed: there is no device to time it on.
    "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={FOLDER} --xla_gpu_autotune_level=0 "
    f"--xla_dump_to={DUMP} {os.environ.get('XLA_FLAGS', '')}",
}

jax.config.update("jax_platforms", "cpu")


class Chip(NamedTuple):
    """What XLA wants to know of a GPU."""

    name: str
    capability: str
    multiprocessors: int
    lanes: int  # float32 operations of a multiprocessor at a time
    shared: tuple[int, int]  # KiB of shared memory: of a multiprocessor, of a block
    cache: int  # MiB
    memory: int  # GiB
    bandwidth: int  # GB/s
    clock: float  # GHz


# NVIDIA's datasheets and white papers of A100, H100 and Blackwell; shared memory from the
# table of compute capabilities in the CUDA programming guide; the clocks, and of B200 the
# multiprocessors and its cache, from XLA's own descriptions of these chips. The last four are
# for XLA's estimates of time.
CHIPS = [
    Chip("NVIDIA A100-SXM4-80GB", "8.0", 108, 64, (164, 163), 40, 80, 2039, 1.41),
    Chip("NVIDIA H100 80GB HBM3", "9.0", 132, 128, (228, 227), 50, 80, 3350, 1.98),
    Chip("NVIDIA B200", "10.0", 148, 128, (228, 227), 126, 180, 8000, 1.965),
]


def described(chip):
    """A device of JAX that can only be compiled for."""
    major, minor = chip.capability.split(".")
    # Instructions of this very architecture, as wgmma on sm_90a: all chips have them since.
    features = "ACCELERATED_FEATURES" if int(major) >= 9 else "NONE"
    text = f"""
        platform_name: "CUDA"
        device_description_str: "{chip.name}"
        gpu_device_info {{
          cuda_compute_capability {{
            major: {major} minor: {minor} feature_extension: {features}
          }}
          runtime_version: "13.0.0"  # of CUDA: without, cuBLAS is not trusted with float8
          core_count: {chip.multiprocessors}
          fpus_per_core: {chip.lanes}
          clock_rate_ghz: {chip.clock}
          memory_bandwidth: {chip.bandwidth * 10**9}
          device_memory_size: {chip.memory * 2**30}
          l2_cache_size: {chip.cache * 2**20}
          shared_memory_per_core: {chip.shared[0] * 2**10}
          shared_memory_per_block_optin: {chip.shared[1] * 2**10}
          shared_memory_per_block: {48 * 2**10}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=text
    )
    return topology.devices[0]


@contextlib.contextmanager
def at_hand(device):
    """As in a process that has this GPU: the ops choose for it."""
    _kernels.chip.cache_clear()
    with unittest.mock.patch.multiple(jax, default_backend=lambda: "gpu", devices=lambda: [device]):
        yield
    _kernels.chip.cache_clear()


def lowered(fn, args, device):
    """The program of `fn(*args)` for the device, as far as JAX makes it."""
    sharding = SingleDeviceSharding(device)
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    return jax.jit(fn).lower(*jax.tree.map(place, args))


def compiled(program, **options):
    """What XLA makes of it, and the PTX that it wrote for what is not a kernel of ours."""
    before = set(DUMP.glob("*.ptx"))
    made = program.compile(compiler_options=options or None)
    return made, "".join(f.read_text() for f in set(DUMP.glob("*.ptx")) - before)
