"""Right answers: numpy in float64, exact integers, or textbook loops.

Nothing here shares code with the library. The containers are read through their documented
fields only, so that a test can say what an array stands for without asking it.
"""

import itertools

import numpy as np

BLOCK = 64
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def pack(codes, bits, axis):
    """Bit planes as the documentation of the format describes them, one code at a time."""
    codes = np.moveaxis(np.asarray(codes, np.int64), axis, -1)
    lead, size = codes.shape[:-1], codes.shape[-1]
    blocks = -(-size // BLOCK)
    out = np.zeros((*lead, blocks * 8 * bits), np.uint8)
    for index in np.ndindex(*lead):
        row = [int(c) % 2**bits for c in codes[index]] + [0] * (blocks * BLOCK - size)
        stored = []
        for b in range(blocks):
            block, shift = row[b * BLOCK : (b + 1) * BLOCK], 0
            for width in PLANES[bits]:
                for j in range(8 * width):
                    parts = [(code >> shift) % 2**width for code in block[j :: 8 * width]]
                    stored.append(sum(part << (i * width) for i, part in enumerate(parts)))
                shift += width
        out[index] = stored
    return np.moveaxis(out, -1, axis)


def unpack(packed, bits, size, axis):
    """The signed codes that `pack` stored."""
    packed = np.moveaxis(np.asarray(packed, np.int64), axis, -1)
    lead, blocks = packed.shape[:-1], packed.shape[-1] // (8 * bits)
    codes = np.zeros((*lead, blocks * BLOCK), np.int64)
    for b in range(blocks):
        start, shift = b * 8 * bits, 0
        for width in PLANES[bits]:
            for j, i in itertools.product(range(8 * width), range(8 // width)):
                part = (packed[..., start + j] >> (i * width)) % 2**width
                codes[..., b * BLOCK + j + i * 8 * width] += part << shift
            start, shift = start + 8 * width, shift + width
    codes = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    return np.moveaxis(codes[..., :size], -1, axis)


def scale_index(shape, axis, group_size):
    """For every element of an array of `shape`, the index of its scale."""
    index = list(np.indices(shape, sparse=True))
    for i, a in enumerate(axis):
        index[a] = index[a] // group_size[i] if group_size else index[a] * 0
    return tuple(index)


def spread(scale, shape, axis, group_size=None):
    """One scale for each element."""
    if np.prod(shape) == 0:
        return np.zeros(shape)
    return np.asarray(scale)[scale_index(shape, axis, group_size)]


def dequantize(codes, scale, zero_point, axis, group_size=None):
    """`(codes - zero_point) * scale` in float64."""
    codes = np.asarray(codes, np.float64)
    if zero_point is not None:
        codes = codes - spread(np.asarray(zero_point, np.float64), codes.shape, axis, group_size)
    return codes * spread(np.asarray(scale, np.float64), codes.shape, axis, group_size)


def codes_of(q):
    """The integers that a `QuantizedArray` stores."""
    if q.packed is None:
        return np.asarray(q.values, np.int64)
    return unpack(q.values, q.qtype.bits, q.packed, q.axis[-1])


def dense(q):
    """What a `QuantizedArray` stands for, in float64."""
    return dequantize(codes_of(q), q.scale, q.zero_point, q.axis, q.group_size)


def group_extremes(w, axis, group_size=None):
    """The smallest and the largest number of each group, in the shape of the scales."""
    w = np.asarray(w, np.float64)
    sizes = list(w.shape)
    for i, a in enumerate(axis):
        sizes[a] = -(-w.shape[a] // group_size[i]) if group_size else 1
    low, high = np.full(sizes, np.inf), np.full(sizes, -np.inf)
    index = np.broadcast_arrays(*scale_index(w.shape, axis, group_size)) if w.ndim else ()
    np.minimum.at(low, tuple(index), w)
    np.maximum.at(high, tuple(index), w)
    return low, high


def activations(x, bits=8, *, axis=-1, scale=None):
    """`x` after it was quantized: with one scale over `axis`, or with the static one.

    In float32, as the definition is: which way a tie goes depends on it.
    """
    x, high = np.asarray(x, np.float32), np.float32(2 ** (bits - 1) - 1)
    if scale is None:
        largest = np.max(np.abs(x), axis=axis, keepdims=True)
        scale = largest * np.float32(1 / float(high))
        scale = np.where(largest == 0, np.float32(1), scale)
    codes = np.rint(np.clip(x / np.asarray(scale, np.float32), -high, high))
    return codes.astype(np.float64) * np.asarray(scale, np.float64)


def conv(x, w, strides=(1, 1), padding=((0, 0), (0, 0)), groups=1):
    """A convolution of NHWC by HWIO in loops."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    height, width, per_group, features = w.shape
    rows = (x.shape[1] - height) // strides[0] + 1
    columns = (x.shape[2] - width) // strides[1] + 1
    out = np.zeros((x.shape[0], rows, columns, features))
    for i, j, f in np.ndindex(rows, columns, features):
        channels = (f // (features // groups)) * per_group
        top, left = i * strides[0], j * strides[1]
        seen = x[:, top : top + height, left : left + width, channels : channels + per_group]
        out[:, i, j, f] = np.sum(seen * w[..., f], axis=(1, 2, 3))
    return out


def patches(x, height, width, strides=(1, 1), padding=((0, 0), (0, 0))):
    """The inputs of each output of a convolution of NHWC, `[m, height * width * channels]`."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    rows = []
    for n in range(x.shape[0]):
        for top in range(0, x.shape[1] - height + 1, strides[0]):
            for left in range(0, x.shape[2] - width + 1, strides[1]):
                rows.append(x[n, top : top + height, left : left + width].reshape(-1))
    return np.stack(rows)


def relu(x):
    return np.maximum(x, 0.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x, scale, bias, epsilon=1e-6):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale + bias


def attention(x, query, key, value, out):
    """Multi-head self-attention of `x[length, d]`; projections `[d, heads, size]`, no biases."""
    q, k, v = (np.einsum("td,dhs->hts", x, p) for p in (query, key, value))
    weights = softmax(np.einsum("hts,hus->htu", q, k) / np.sqrt(q.shape[-1]))
    return np.einsum("htu,hus,hsd->td", weights, v, out)


def finite_differences(fn, x, step=1e-6):
    """The gradient of the scalar `fn` at `x`, by central differences in float64."""
    x = np.array(x, np.float64)
    out = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        out[index] = (fn(up) - fn(down)) / (2 * step)
    return out
