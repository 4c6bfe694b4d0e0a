"""Sub-byte integers as uint8 bit planes, packed along one axis without moving it.

Codes are taken in blocks of 64 along the packed axis. A code of `b` bits is cut into
planes whose widths divide eight (3 = 2 + 1), and within a block a plane of width `w`
fills `8 w` bytes: byte `j` holds the codes `j, j + 8w, j + 16w, ...`, lowest first.
A block therefore takes exactly `8 b` bytes, any multiple of 64 can be cut in two for
sharding, and unpacking is shifts, masks and one concatenation along the axis.
"""

import functools

import jax
import jax.numpy as jnp

__all__ = ["BLOCK", "pack", "packed_size", "unpack"]

BLOCK = 64  # codes per block

# Widths that divide eight, widest first, for every code width below a byte.
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def packed_size(size: int, bits: int) -> int:
    """Bytes that `size` codes of `bits` bits take along the packed axis."""
    return -(-size // BLOCK) * BLOCK * bits // 8


@functools.partial(jax.jit, inline=True, static_argnums=(1, 2))
def pack(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """Packs the low `bits` bits of integer `codes` along `axis` into uint8."""
    axis %= codes.ndim
    blocks = -(-codes.shape[axis] // BLOCK)
    padding = [(0, 0, 0)] * codes.ndim
    padding[axis] = (0, blocks * BLOCK - codes.shape[axis], 0)
    unsigned = codes.astype(jnp.uint8) & ((1 << bits) - 1)
    unsigned = jax.lax.pad(unsigned, jnp.uint8(0), padding)
    lead, trail = codes.shape[:axis], codes.shape[axis + 1 :]
    planes, shift = [], 0
    for width in _PLANES[bits]:
        per_byte = 8 // width
        plane = (unsigned >> shift) & ((1 << width) - 1)
        plane = plane.reshape(*lead, blocks, per_byte, 8 * width, *trail)
        byte = jnp.zeros((*lead, blocks, 8 * width, *trail), jnp.uint8)
        for i in range(per_byte):
            part = jax.lax.index_in_dim(plane, i, axis + 1, keepdims=False)
            byte |= part << (width * i)
        planes.append(byte)
        shift += width
    packed = jnp.concatenate(planes, axis + 1)
    return packed.reshape(*lead, blocks * 8 * bits, *trail)


@functools.partial(jax.jit, inline=True, static_argnums=(1, 2, 3))
def unpack(packed: jax.Array, bits: int, size: int, axis: int) -> jax.Array:
    """The int8 codes, sign extended, of which `pack` made `packed`."""
    axis %= packed.ndim
    blocks = packed.shape[axis] // (8 * bits)
    lead, trail = packed.shape[:axis], packed.shape[axis + 1 :]
    packed = packed.reshape(*lead, blocks, 8 * bits, *trail)
    codes = jnp.zeros((*lead, blocks, BLOCK, *trail), jnp.uint8)
    shift = start = 0
    for width in _PLANES[bits]:
        byte = jax.lax.slice_in_dim(packed, start, start + 8 * width, axis=axis + 1)
        parts = [(byte >> (width * i)) & ((1 << width) - 1) for i in range(8 // width)]
        codes |= jnp.concatenate(parts, axis + 1) << shift
        start, shift = start + 8 * width, shift + width
    # The shift up and the arithmetic shift down extend the sign.
    signed = jax.lax.bitcast_convert_type(codes << (8 - bits), jnp.int8) >> (8 - bits)
    signed = signed.reshape(*lead, blocks * BLOCK, *trail)
    return jax.lax.slice_in_dim(signed, 0, size, axis=axis)
