"""The kernels for Hopper and Blackwell in Pallas' interpreter for GPUs, on the CPU.

Its memories and barriers are there, a program's warpgroups run beside each other, and two that
touch the same memory unordered are found. The instructions that multiply are those of
`wgmma.py`. `tests/kernels/run.py` runs this.
"""

import functools

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from int8_matmul_suite import Int8MatmulSuite
from jaxcompress.kernels.int8_matmul import pallas_gpu as int8_kernel
from wgmma import emulated

GPU = InterpretGPUParams(detect_races=True)


@pytest.fixture(autouse=True)
def _fresh_interpreter():
    with emulated():
        yield
    interpret_pallas_call.reset_gpu_interpret_mode_state()


def interpreted(kernel, arrays, options):
    options = {name: value for name, value in options.items() if value is not None}
    got = np.asarray(jax.jit(functools.partial(kernel, interpret=GPU, **options))(*arrays))
    if got.size and arrays[0].size:
        assert not interpret_pallas_call.get_races().races_found
    return got


class TestInt8Matmul(Int8MatmulSuite):
    chip = "9.0"

    def run(self, *arrays, **options):
        return interpreted(int8_kernel.int8_matmul, arrays, dict(chip=self.chip) | options)

    def block(self, m, n, k):
        # Few tiles: the interpreter compiles every warpgroup of every one of them anew.
        rows = 64 if m <= 64 else 128 if m < 1000 else 512
        return int8_kernel.Blocks(
            rows, 128 if n < 1000 else 512, 256 if k < 2000 else 32_768, slots=2
        )


class TestInt8MatmulOnBlackwell(TestInt8Matmul):
    chip = "10.0"


@pytest.mark.parametrize("chip", [None, "9.0", "10.0"])
@pytest.mark.parametrize("m", [1, 64, 65, 4096])
@pytest.mark.parametrize("n", [1, 128, 129, 4096])
def test_tiles_are_what_the_instruction_takes(chip, m, n):
    tile = int8_kernel.blocks(m, n, 4096, chip)
    assert tile.m == 128 or (tile.m, chip == "10.0") == (64, False)
    assert tile.n in (128, 256)
    assert (tile.k, tile.slots) == (128, 3)
