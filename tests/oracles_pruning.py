"""Right answers for pruning, packing and distillation: numpy, exact fractions, plain loops.

Nothing here shares code with the library, and no function here sorts in the way that the
library counts.
"""

import math
from fractions import Fraction

import numpy as np


def keep_largest(scores, keep):
    """Masks of the `keep` largest of all `scores` together, by a stable sort.

    NaN is larger than anything, the zeros are equal, and ties go to the lower index.
    """
    flat = np.concatenate([np.asarray(s).astype(np.float64).ravel() for s in scores])
    nan = np.isnan(flat)
    order = np.lexsort((np.arange(flat.size), -np.where(nan, 0.0, flat), ~nan))
    mask = np.zeros(flat.size, bool)
    mask[order[: max(0, keep)]] = True
    ends = np.cumsum([np.size(s) for s in scores])[:-1]
    return [m.reshape(np.shape(s)) for m, s in zip(np.split(mask, ends), scores)]


def kept(sparsity, size):
    """`size - floor(sparsity * size + 1/2)`, exactly, for a sparsity such as "0.9"."""
    return size - math.floor(Fraction(sparsity) * size + Fraction(1, 2))


def nm_mask(scores, n, m, axis):
    """The `n` largest of each `m` neighbours along `axis`; the earlier of equal ones."""
    rows = np.moveaxis(np.asarray(scores, np.float64), axis, -1)
    mask = np.zeros(rows.shape, bool)
    for index in np.ndindex(*rows.shape[:-1]):
        for start in range(0, rows.shape[-1], m):
            group = list(rows[index][start : start + m])
            best = sorted(range(m), key=lambda i: (-group[i], i))[:n]
            for i in best:
                mask[(*index, start + i)] = True
    return np.moveaxis(mask, -1, axis)


def updates_that_choose(begin, end, every, steps):
    """After which of `steps` updates a schedule chooses the mask anew, one by one."""
    chosen, following = [], begin
    for count in range(steps):
        if end is not None and count >= end:
            break
        if count == following:
            following += every
            chosen.append(count)
        elif end is not None and count == end - 1:
            chosen.append(count)
    return chosen


def bitmap_dense(array):
    """Codes or values of a `BitmapSparseArray` whose values are not bit-packed, zeros put back.

    Bit `i % 8` of byte `i // 8` says whether element `i` of the core is kept; the kept ones
    lie in `values` in that order.
    """
    bitmap, values = np.asarray(array.bitmap), np.asarray(array.values)
    lead, size = bitmap.shape[:-1], math.prod(array.core)
    out = np.zeros((*lead, size), values.dtype)
    for index in np.ndindex(*lead):
        following = 0
        for i in range(size):
            if (int(bitmap[index][i // 8]) >> (i % 8)) & 1:
                out[(*index, i)] = values[index][following]
                following += 1
    return out.reshape((*lead, *array.core))


def log_softmax(x, axis=-1, where=None):
    """Log-softmax in float64; minus infinity where a class does not count."""
    x = np.asarray(x, np.float64)
    x = x if where is None else np.where(where, x, -np.inf)
    top = np.max(x, axis, keepdims=True, initial=-np.inf)
    x = x - np.where(np.isfinite(top), top, 0.0)
    total = np.sum(np.exp(x), axis, keepdims=True)
    return x - np.log(np.where(total == 0, 1.0, total))


def kl(student, teacher, temperature=1.0, axis=-1, where=None):
    """`T^2 sum p (log p - log q)` in float64, `0 log 0 = 0`."""
    student, teacher = (np.asarray(a, np.float64) / temperature for a in (student, teacher))
    log_p, log_q = log_softmax(teacher, axis, where), log_softmax(student, axis, where)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return temperature**2 * np.sum(terms, axis)


def kl_gradient(student, teacher, temperature=1.0, axis=-1, where=None):
    """The gradient of the sum of `kl` to the student: `T (q - p)`."""
    student, teacher = (np.asarray(a, np.float64) / temperature for a in (student, teacher))
    q = np.exp(log_softmax(student, axis, where))
    return temperature * (q - np.exp(log_softmax(teacher, axis, where)))
