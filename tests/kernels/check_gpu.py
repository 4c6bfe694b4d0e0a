"""The kernels in Triton on the GPU at hand: the suites that the interpreter runs, on a device.

    python -m pytest -n 8 tests/kernels/check_gpu.py

Needs a GPU, jax with CUDA and jax_triton, so no other check runs it. A product is compiled for
each problem; several processes share the GPU.
"""

import functools

import jax
import numpy as np

from block_sparse_matmul_suite import BlockSparseMatmulSuite
from int8_matmul_suite import Int8MatmulSuite
from jaxcompress.kernels.block_sparse_matmul import triton as block_kernel
from jaxcompress.kernels.int8_matmul import triton as int8_kernel
from jaxcompress.kernels.nm_matmul import triton as nm_kernel
from jaxcompress.kernels.nm_matmul import triton_sparse as sparse_kernel
from jaxcompress.kernels.quantized_matmul import triton as quantized_kernel
from jaxcompress.kernels.w4a8_matmul import triton as w4a8_kernel
from jaxcompress.ops._kernels import chip
from nm_matmul_suite import NMMatmulSuite, SparseTensorCoresSuite
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


class TestSparseTensorCores(SparseTensorCoresSuite):
    def run(self, *arrays, **options):
        return on_the_gpu(sparse_kernel.nm_matmul, arrays, options)
