"""What multiplies on Hopper and Blackwell, in Pallas' interpreter for GPUs, on int8.

The interpreter's own `wgmma` knows no operand that is turned, and it has no `tcgen05` at all,
nor the memory that holds its sums. Both instructions take int8 that lies along `k` on both
sides: `a[m, k]`, `b[n, k]`. Nothing here has been compared with a device.
"""

import contextlib
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.pallas.mosaic.interpret.utils import to_range
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.state.types import TransformedRef, TransposeTransform
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def emulated():
    """A context in which the interpreter has these."""
    blackwell = dict(
        TMEM=plgpu.SMEM,
        tcgen05_mma=_tcgen05_mma,
        tcgen05_commit_arrive=plgpu.barrier_arrive,
        async_load_tmem=lambda ref: ref[...],
    )
    with (
        unittest.mock.patch.object(gpu_callbacks, "wgmma", _wgmma),
        unittest.mock.patch.multiple(plgpu, **blackwell),
    ):
        yield


def _tcgen05_mma(total, a, b, barrier, *, accumulate):
    """At once, where the device would be asynchronous; what it arrives at is the same."""
    *before, turn = b.transforms
    assert isinstance(turn, TransposeTransform), "both lie along k"
    b = TransformedRef(b.ref, tuple(before))
    contract = (((1,), (1,)), ((), ()))
    product = lax.dot_general(a[...], b[...], contract, preferred_element_type=jnp.int32)
    total[...] = jnp.where(accumulate, total[...], 0) + product
    plgpu.barrier_arrive(barrier)


def _wgmma(
    *,
    token,
    device_id,
    thread_id,
    acc_allocation_key_as_array,
    acc_transforms,
    acc_dtype,
    a_allocation_key_as_array,
    a_transforms,
    b_allocation_key_as_array,
    b_transforms,
    **_,
):
    memory = gpu_callbacks._get_shared_memory()
    thread = memory.get_global_thread_id(int(device_id), int(thread_id))

    def place(key, transforms):
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        turned = [t for t in transforms if isinstance(t, TransposeTransform)]
        plain = tuple(t for t in transforms if t not in turned)
        return (gpu_callbacks.HostAllocationKey.from_array(key), to_range(plain), thread), turned

    total, _ = place(acc_allocation_key_as_array, acc_transforms)
    (a, turned_a), (b, turned_b) = (
        place(a_allocation_key_as_array, a_transforms),
        place(b_allocation_key_as_array, b_transforms),
    )
    assert [t.permutation for t in turned_a + turned_b] == [(1, 0)], "both lie along k"
    assert turned_b, "it is w that is turned"
    assert acc_dtype == np.int32
    a, b, before = (memory.get_buffer_content(*at)[0] for at in (a, b, total))
    assert a.dtype == b.dtype == np.int8
    product = np.einsum("mk,nk->mn", a.astype(np.int32), b.astype(np.int32))
    key, where, thread = total
    memory.store_buffer_content(key, where, before + product, thread)
    return token
