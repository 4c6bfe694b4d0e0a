"""The kernels for GPUs in Triton's interpreter; run with TRITON_INTERPRET=1.

Not part of the tests proper, which need no Triton: `tests/kernels/run.py` runs it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from block_sparse_matmul_suite import BlockSparseMatmulSuite
from block_sparse_matmul_suite import problem as block_problem
from int8_matmul_suite import Int8MatmulSuite
from jaxcompress.kernels.block_sparse_matmul import triton as block_kernel
from jaxcompress.kernels.int8_matmul import triton as int8_kernel
from jaxcompress.kernels.nm_matmul import triton as nm_kernel
from jaxcompress.kernels.nm_matmul import triton_sparse as sparse_kernel
from jaxcompress.kernels.quantized_matmul import triton as quantized_kernel
from jaxcompress.kernels.triton_launch import Blocks, added, splits
from jaxcompress.kernels.w4a8_matmul import triton as w4a8_kernel
from jaxcompress.ops._kernels import CHIPS
from nm_matmul_suite import NMMatmulSuite, SparseTensorCoresSuite
from nm_matmul_suite import problem as nm_problem
from quantized_matmul_suite import QuantizedMatmulSuite, problem
from triton_on_numpy import count_loads, triton_call
from w4a8_matmul_suite import W4A8MatmulSuite
from w4a8_matmul_suite import problem as w4a8_problem


def interpreted(kernel, arrays, options):
    options = {name: value for name, value in options.items() if value is not None}
    return np.asarray(kernel(*arrays, interpret=triton_call, **options))


class TestInt8Matmul(Int8MatmulSuite):
    def run(self, *arrays, **options):
        return interpreted(int8_kernel.int8_matmul, arrays, options)

    def block(self, m, n, k):
        return int8_kernel.Blocks(64, 128, 256 if k < 2000 else 4096, 4, 2)


class TestQuantizedMatmul(QuantizedMatmulSuite):
    def run(self, *arrays, **options):
        return interpreted(quantized_kernel.quantized_matmul, arrays, options)

    def block(self, m, n, k):
        return None  # by the table: which steps it may take depends on the groups


class TestW4A8Matmul(W4A8MatmulSuite):
    def run(self, *arrays, **options):
        return interpreted(w4a8_kernel.w4a8_matmul, arrays, options)

    def block(self, m, n, k, group_size):
        if k > 2000:
            return w4a8_kernel.Blocks(16, 16, 4096, 4, 2)
        return None  # by the table: which steps it may take depends on the groups


class TestBlockSparseMatmul(BlockSparseMatmulSuite):
    def product(self, *arrays, **options):
        return interpreted(block_kernel.block_sparse_matmul, arrays, options)

    def sampled(self, *arrays, **options):
        return interpreted(block_kernel.sampled_matmul, arrays, options)


class TestNMMatmul(NMMatmulSuite):
    def run(self, *arrays, **options):
        return interpreted(nm_kernel.nm_matmul, arrays, options)


class TestSparseTensorCores(SparseTensorCoresSuite):
    """The instruction is emulated, from the manual."""

    def run(self, *arrays, **options):
        return interpreted(sparse_kernel.nm_matmul, arrays, options)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_few_rows_load_each_byte_of_the_weight_once(bits):
    """What the roofline assumes. The 1-bit plane of 3 bits is loaded again for each part of
    a wider byte: eight parts, of which one byte has two at a time."""
    arrays, *_ = problem(16, 256, 128, bits=bits, group_size=64, zero=False, dtype="bfloat16")
    run = lambda: quantized_kernel.quantized_matmul(
        *arrays, bits=bits, group_size=64, interpret=triton_call
    )
    loads = count_loads(run, 1).reshape(-1, 8 * bits, 128)
    wide = 8 * bits if bits in (8, 4, 2) else 16
    assert np.all(loads[:, :wide] == 1)
    assert np.all(loads[:, wide:] == 8)


def test_few_rows_load_each_byte_of_an_int4_weight_once_for_int8_activations():
    arrays, *_ = w4a8_problem(16, 256, 128, group_size=64)
    run = lambda: w4a8_kernel.w4a8_matmul(*arrays, group_size=64, interpret=triton_call)
    assert np.all(count_loads(run, 1) == 1)


def test_few_rows_load_each_kept_block_once():
    arrays, options = block_problem(16, 256, 128, block=(32, 64), dtype="bfloat16", weights="int8")
    run = lambda: block_kernel.block_sparse_matmul(*arrays, **options, interpret=triton_call)
    loads = count_loads(run, 1).reshape(-1, 32 * 64)
    lines, _, places = (a[0, 0] for a in arrays[2:])
    assert np.all(loads[places[lines < options["count"]]] == 1)
    assert np.all(loads[places[lines == options["count"]]] == 0)


def test_few_rows_load_each_kept_value_once_and_a_byte_of_places_for_each_place():
    arrays, *_ = nm_problem(16, 64, 128, weights="int8", dtype="bfloat16")
    run = lambda: nm_kernel.nm_matmul(*arrays, pattern=(2, 4), interpret=triton_call)
    assert np.all(count_loads(run, 1) == 1)
    assert np.all(count_loads(run, 2) == 4)


@pytest.mark.parametrize("m", [9, 70])
def test_lines_as_they_lie_are_those_of_the_sorted_lists(m):
    """Columns of four slots, of which some are unused and hold NaN, in the order of memory."""
    across, slots, counts = 3, 4, np.array([2, 0, 3], np.int32)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, m, 64)).astype(np.float32)
    w = rng.normal(size=(across, slots, 16, 32)).astype(np.float32)
    w[np.arange(slots) >= counts[:, None]] = np.nan
    rows = rng.integers(0, 4, (across, slots)).astype(np.int32)
    want = np.zeros((m, across * 32))
    for column, slot in np.argwhere(np.arange(slots) < counts[:, None]):
        piece = x[0, :, rows[column, slot] * 16 :][:, :16].astype(np.float64)
        want[:, column * 32 : column * 32 + 32] += piece @ w[column, slot]
    starts = np.arange(across, dtype=np.int32)[None, None] * slots
    every = np.arange(across * slots, dtype=np.int32)[None, None]
    arrays = x, w.reshape(1, -1, 32), every, rows.reshape(1, 1, -1), every, starts, starts + counts
    got = interpreted(block_kernel.block_sparse_matmul, arrays, dict(height=16, count=across))
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-5)  # float32 sums of 48


@pytest.mark.parametrize("m", [1, 16, 64, 256, 4096])
@pytest.mark.parametrize("n", [64, 1000, 4096])
@pytest.mark.parametrize("k", [64, 1000, 16384])
def test_a_sum_is_shared_by_as_many_programs_as_keep_a_gpu_busy(m, n, k):
    tile = Blocks(16, 64, 128, 4, 4, programs=512)
    parts = splits(tile, 1, m, n, k)
    tiles = -(-m // 16) * -(-n // 64)
    fits = lambda parts: (
        parts * tiles <= 512 and 2 * parts * 128 < k + 128 and parts * m * n * 4 <= k * n * 2
    )
    assert parts & (parts - 1) == 0
    assert parts == 1 or fits(parts)
    assert not fits(2 * parts)
    assert splits(tile._replace(programs=1), 1, m, n, k) == 1


def test_parts_are_added_before_they_are_scaled():
    """Whole numbers stay exact where each part times its scale would be rounded."""
    out = jax.ShapeDtypeStruct((1, 1, 2), "float32")
    found = jnp.array([2**24 + 1, -(2**24), 7, 1], jnp.int32).reshape(2, 1, 1, 2)
    x_scale, scale = jnp.full((1, 1, 1), 0.5), jnp.array([[[0.5, 2.0]]])
    got = added(found, out, x_scale, scale)
    np.testing.assert_array_equal(got, [[[(2**24 + 8) / 4, 1.0 - 2**24]]])
    assert added(got, out) is got


KERNELS = [block_kernel, int8_kernel, nm_kernel, quantized_kernel, w4a8_kernel]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_tables_have_the_chips_that_are_proven(kernel):
    assert set(kernel.BLOCKS) == {"default", *CHIPS["cuda"], *CHIPS["rocm"]}


@pytest.mark.parametrize("chip", [None, *CHIPS["cuda"], *CHIPS["rocm"]])
@pytest.mark.parametrize("m", [1, 16, 17, 4096])
@pytest.mark.parametrize("group", [None, 32, 64, 128, 1024])
def test_a_step_lies_within_a_group(chip, m, group):
    tile = quantized_kernel.blocks(m, 4096, 4096, group, chip)
    assert group is None or group % tile.k == 0
    tile = w4a8_kernel.blocks(m, 4096, 4096, group, chip)
    assert group is None or group % tile.k == 0 or (group, tile.k) == (32, 64)
