"""What the compilers are given of each op: shapes and options, by the sizes of a product."""

import jax
import jax.numpy as jnp

Shape = jax.ShapeDtypeStruct


def int8_case(m, k, n, *, transpose_w=False, zero=False, codes=False, dtype="bfloat16"):
    """The arguments and options of `int8_matmul` with both scales."""
    args = [
        Shape((1, m, k), jnp.int8),
        Shape((1, n, k) if transpose_w else (1, k, n), jnp.int8),
        Shape((1, m, 1), jnp.float32),
        Shape((1, 1, n), jnp.float32),
    ]
    args += [Shape((1, 1, n), jnp.int8)] if zero else []
    if codes:  # with a bias, an activation, and rounded to int8
        args += [None, *[Shape((1, 1, n), jnp.float32)] * 2]
    activation = "gelu" if codes else None
    return args, dict(transpose_w=transpose_w, activation=activation, dtype=dtype)


def quantized_case(m, k, n, bits, group=None, *, transpose_w=False, zero=False, dtype="bfloat16"):
    """The arguments and options of `quantized_matmul`."""
    rows = k if bits == 8 else -(-k // 64) * 8 * bits
    scales = (1, -(-k // group) if group else 1, n)
    args = [
        Shape((1, m, k), dtype),
        Shape((1, n, rows) if transpose_w else (1, rows, n), jnp.int8 if bits == 8 else jnp.uint8),
        Shape(scales, jnp.float32),
    ]
    args += [Shape(scales, jnp.int8)] if zero else []
    return args, dict(bits=bits, group_size=group, transpose_w=transpose_w)


def w4a8_case(m, k, n, group=None, *, zero=False):
    """The arguments and options of `w4a8_matmul` with a scale for each row."""
    scales = (1, -(-k // group) if group else 1, n)
    args = [
        Shape((1, m, k), jnp.int8),
        Shape((1, -(-k // 64) * 32, n), jnp.uint8),
        Shape(scales, jnp.float32),
        Shape((1, m, 1), jnp.float32),
    ]
    args += [Shape(scales, jnp.int8)] if zero else []
    return args, dict(group_size=group, dtype="bfloat16")


def block_case(m, k, n, block, *, weights=None, turned=False, dtype="bfloat16"):
    """The arguments and options of `block_sparse_matmul`, with a quarter of the blocks."""
    (height, width), lists = block, Shape((1, 1, entries(k, n, block)), jnp.int32)
    args = [
        Shape((1, m, n if turned else k), dtype),
        Shape((1, lists.shape[2] * height, width), weights or dtype),
        *[lists] * 3,
    ]
    count = -(-k // height) if turned else -(-n // width)
    return args, dict(height=height, count=count, transpose_w=turned, dtype=dtype)


def sampled_case(m, k, n, block, dtype="bfloat16"):
    """The arguments and options of `sampled_matmul` of the same."""
    lists = Shape((1, 1, entries(k, n, block)), jnp.int32)
    args = [Shape((1, m, k), dtype), Shape((1, m, n), dtype), lists, lists]
    return args, dict(height=block[0], width=block[1])


def entries(k, n, block):
    """A quarter of the blocks."""
    return -(-k // block[0]) * -(-n // block[1]) // 4


def nm_case(
    m, k, n, pattern=(2, 4), *, weights=None, bits=8, group=None, scaled=False, dtype="bfloat16"
):
    """The arguments and options of `nm_matmul`; with a `group` values have scales.

    `scaled` integers have one for each row and each column, and a result in bfloat16.
    """
    kept = k // pattern[1] * pattern[0]
    down = lambda bits: -(-kept // 64) * 8 * bits
    args = [
        Shape((1, m, k), dtype),
        Shape((1, down(bits), n), jnp.uint8) if bits < 8 else Shape((1, kept, n), weights or dtype),
        Shape((1, down(max(1, (pattern[1] - 1).bit_length())), n), jnp.uint8),
    ]
    args += [Shape((1, k // group, n), jnp.float32)] if group else []
    options = dict(pattern=pattern, dtype="float32" if dtype == "int8" else dtype)
    if scaled:
        args += [Shape((1, 1, n), jnp.float32), Shape((1, m, 1), jnp.float32)]
        options |= dict(bits=bits, dtype="bfloat16")
    return args, options | (dict(bits=bits, group_size=group) if group else {})
