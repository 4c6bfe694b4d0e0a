"""Runs a Triton kernel in Triton's interpreter on numpy arrays, with walls around them.

The interpreter asks for arrays of PyTorch; `_Tensor` has the few methods that it calls.
Every array lies between two walls of known bytes: what is read from there is wrong, and
what is written there is seen.
"""

import unittest.mock

import jax
import numpy as np
from triton.runtime import interpreter

from sparse_mma import inline_asm

_WALL = 4096  # bytes
_POISON = 0x7E  # 126 as int8, about 8e37 as float32


class _Storage:
    def __init__(self, array):
        self.array = array

    def data_ptr(self):
        return self.array.ctypes.data

    def cpu(self):
        return self

    def copy_(self, other):
        pass  # it is the same memory


class _Tensor:
    """As much of a `torch.Tensor` as the interpreter uses."""

    device = "cpu"

    def __init__(self, array):
        self.array = array
        self.dtype = str(array.dtype)

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return _Storage(self.array)

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def new_empty(self, *size, device):
        return _Tensor(np.empty(0, self.array.dtype))

    def set_(self, storage, offset, size, stride):
        self.array = storage.array


def _dot(a, b, d, *args):
    """The interpreter's own multiplies the bits of bfloat16 as integers: here as floats."""
    floats = [
        (h.data.view(jax.numpy.bfloat16) if h.dtype.scalar.is_bf16() else h.data) for h in (a, b)
    ]
    product = np.matmul(*(f.astype(d.data.dtype) for f in floats))
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _walled(shape, dtype):
    """An array, and the bytes around it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.full(size + 2 * _WALL, _POISON, np.uint8)
    return memory[_WALL : _WALL + size].view(dtype).reshape(shape), memory


def _cast(source, dtype):
    """The interpreter's own cuts float32 to bfloat16: here to the nearest, as devices do."""
    if source.dtype.scalar.is_fp32() and dtype.scalar.is_bf16():
        bits = source.data.astype(jax.numpy.bfloat16).view(np.uint16)
        return interpreter.TensorHandle(bits, dtype.scalar)
    return type(interpreter.interpreter_builder).cast_impl(
        interpreter.interpreter_builder, source, dtype
    )


def count_loads(run, operand):
    """How often `run()` loads each byte of the operand of that position, in all programs."""
    counts, load = [], interpreter.interpreter_builder.create_masked_load

    def counted(ptrs, mask, *args, **kwargs):
        base, size = _places[operand]
        at = (ptrs.data[mask.data].astype(np.int64) - base).ravel()
        at = at[(at >= 0) & (at < size)]
        counts.append(np.bincount(at, minlength=size))
        return load(ptrs, mask, *args, **kwargs)

    builder = interpreter.interpreter_builder
    with unittest.mock.patch.object(builder, "create_masked_load", counted):
        run()
    return np.sum(counts, 0)


_places = []  # where the operands of the call that runs lie, and how many bytes they have


def triton_call(
    *operands, kernel, out_shape, grid, num_warps=None, num_stages=None, name="", **constants
):
    """As `jax_triton.triton_call`, one program after another, on the CPU."""
    arrays, memories = [], []
    for operand in (*operands, None):
        kind = out_shape if operand is None else np.asarray(operand)
        array, memory = _walled(kind.shape, kind.dtype)
        if operand is not None:
            array[...] = kind
        arrays.append(array)
        memories.append(memory)
    _places[:] = [(array.ctypes.data, array.nbytes) for array in arrays]
    before = [array.copy() for array in arrays[:-1]]
    patched = {"create_dot": _dot, "cast_impl": _cast, "create_inline_asm": inline_asm}
    with unittest.mock.patch.multiple(interpreter.interpreter_builder, **patched):
        kernel[grid](*map(_Tensor, arrays), **constants)
    for memory in memories:
        walls = np.concatenate([memory[:_WALL], memory[-_WALL:]])
        assert np.all(walls == _POISON), "the kernel wrote outside of its arrays"
    for array, old in zip(arrays, before):
        assert array.tobytes() == old.tobytes(), "the kernel wrote to an operand"
    return jax.numpy.asarray(arrays[-1])
