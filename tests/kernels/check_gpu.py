"""The kernels in Triton on the GPU at hand: the suites that the interpreter runs, on a device.

    python -m pytest -n 8 tests/kernels/check_gpu.py

Needs a GPU, jax with CUDA and jax_triton, so no other check runs it. A product is compiled for
each problem; several processes share the GPU.
"""

import functools

import jax
import numpy as np
import pytest

from block_sparse_matmul_suite import BlockSparseMatmulSuite
from int8_matmul_suite import Int8MatmulSuite
from jaxcompress.kernels.block_sparse_matmul import triton as block_kernel
from jaxcompress.kernels.int8_matmul import triton as int8_kernel
from jaxcompress.kernels.nm_matmul import triton as nm_kernel
from jaxcompress.kernels.nm_matmul import triton_sparse as sparse_kernel
from jaxcompress.kernels.quantized_matmul import triton as quantized_kernel
from jaxcompress.kernels.w4a8_matmul import triton as w4a8_kernel
from jaxcompress.ops._kernels import chip
from nm_matmul_suite import NMMatmulSuite
from nm_matmul_suite import check as nm_check
from nm_matmul_suite import check_scaled as nm_check_scaled
from nm_matmul_suite import integers as nm_integers
from nm_matmul_suite import problem as nm_problem
from quantized_matmul_suite import QuantizedMatmulSuite
from w4a8_matmul_suite import W4A8MatmulSuite


def on_the_gpu(kernel, arrays, options):
    assert jax.default_backend() == "gpu"
    options = {name: value for name, value in options.items() if value is not None}
    call = functools.partial(kernel, chip=chip("cuda") or chip("rocm"), **options)
    return np.asarray(jax.jit(call)(*arrays))


class TestInt8Matmul(Int8MatmulSuite):
    def run(self, *arrays, **options):
        return on_the_gpu(int8_kernel.int8_matmul, arrays, options)

    def block(self, m, n, k):
        return None


class TestQuantizedMatmul(QuantizedMatmulSuite):
    def run(self, *arrays, **options):
        return on_the_gpu(quantized_kernel.quantized_matmul, arrays, options)

    def block(self, m, n, k):
        return None


class TestW4A8Matmul(W4A8MatmulSuite):
    def run(self, *arrays, **options):
        return on_the_gpu(w4a8_kernel.w4a8_matmul, arrays, options)

    def block(self, m, n, k, group_size):
        return None


class TestBlockSparseMatmul(BlockSparseMatmulSuite):
    def product(self, *arrays, **options):
        return on_the_gpu(block_kernel.block_sparse_matmul, arrays, options)

    def sampled(self, *arrays, **options):
        return on_the_gpu(block_kernel.sampled_matmul, arrays, options)


class TestNMMatmul(NMMatmulSuite):
    def run(self, *arrays, **options):
        return on_the_gpu(nm_kernel.nm_matmul, arrays, options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 20, 66), (65, 250, 129)])
def test_two_of_four_by_the_sparse_instruction(dtype, shape):
    """The fragments of `mma.sp` are as the manual has them, on the chip too."""
    arrays, x, w = nm_problem(*shape, dtype=dtype)
    options = {} if dtype == "int8" else dict(dtype=dtype)
    nm_check(on_the_gpu(sparse_kernel.nm_matmul, arrays, options), x, w, dtype)


@pytest.mark.parametrize("sides", ["x", "w", "xw"])
def test_scales_after_the_sparse_instruction(sides):
    (*arrays, scale), x, w = nm_integers(9, 20, 66, dtype="int8")
    x_scale = np.linspace(0.01, 0.1, 9, dtype=np.float32)[None, :, None]
    scales = scale if "w" in sides else None, x_scale if "x" in sides else None
    got = on_the_gpu(sparse_kernel.nm_matmul, (*arrays, *scales), dict(dtype="bfloat16"))
    codes = np.round(w / scale.astype(np.float64))
    nm_check_scaled(got, x.astype(np.int64) @ codes.astype(np.int64), scales, "bfloat16")
