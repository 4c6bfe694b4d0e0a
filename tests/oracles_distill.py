"""Right answers for the losses on logits: numpy in float64, one example at a time.

Nothing here shares code with the library. Classes that do not count are cut out before
anything is computed, so no formula knows of them.
"""

import numpy as np


def examples(*arrays, axis=-1, where=None):
    """`(index, rows)` of each example, each array cut down to the classes that count."""
    shape = np.shape(arrays[0])
    where = np.broadcast_to(True if where is None else where, shape)
    moved = [np.moveaxis(np.asarray(a).astype(np.float64), axis, -1) for a in arrays]
    keep = np.moveaxis(where, axis, -1)
    for index in np.ndindex(*moved[0].shape[:-1]):
        yield index, [m[index][keep[index]] for m in moved]


def per_example(fn):
    """A loss of all examples from the loss of one."""

    def loss(student, teacher, *, temperature=1.0, axis=-1, where=None, **kwargs):
        out = np.zeros(np.moveaxis(np.empty(np.shape(student)), axis, -1).shape[:-1])
        for index, (s, t) in examples(student, teacher, axis=axis, where=where):
            if s.size:
                out[index] = fn(s, t, temperature, **kwargs)
        return out

    return loss


def log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def relative_entropy(log_p, log_q):
    p = np.exp(log_p)
    return sum(p[c] * (log_p[c] - log_q[c]) for c in range(p.size) if p[c] > 0)


@per_example
def kl(s, t, temperature):
    return temperature**2 * relative_entropy(
        log_softmax(t / temperature), log_softmax(s / temperature)
    )


@per_example
def reverse_kl(s, t, temperature):
    return temperature**2 * relative_entropy(
        log_softmax(s / temperature), log_softmax(t / temperature)
    )


@per_example
def soft_cross_entropy(s, t, temperature):
    p, log_q = np.exp(log_softmax(t / temperature)), log_softmax(s / temperature)
    return -(temperature**2) * sum(a * b for a, b in zip(p, log_q) if a > 0)


@per_example
def jensen_shannon(s, t, temperature, beta=0.5):
    log_p, log_q = log_softmax(t / temperature), log_softmax(s / temperature)
    log_m = np.logaddexp(np.log(beta) + log_p, np.log(1 - beta) + log_q)
    first, second = relative_entropy(log_p, log_m), relative_entropy(log_q, log_m)
    return temperature**2 * (beta * first + (1 - beta) * second)


@per_example
def mse(s, t, temperature):
    return np.mean((s - t) ** 2)


def dkd(student, teacher, labels, *, alpha=1.0, beta=8.0, temperature=1.0, axis=-1, where=None):
    classes = np.arange(np.shape(student)[axis])
    where = np.broadcast_to(True if where is None else where, np.shape(student))
    numbers = np.moveaxis(np.broadcast_to(classes, np.moveaxis(where, axis, -1).shape), -1, axis)
    out = np.zeros(np.shape(labels))
    for index, (s, t, number) in examples(student, teacher, numbers, axis=axis, where=where):
        if not s.size:
            continue
        target = number == labels[index]
        log_p, log_q = log_softmax(t / temperature), log_softmax(s / temperature)
        if target.any() and not target.all():
            # log(1 - p_y), summed up from the others: the subtraction would cancel.
            rest = [
                np.log(np.exp(x[~target] - x[~target].max()).sum()) + x[~target].max()
                for x in (log_p, log_q)
            ]
            two = [np.array([x[target][0], r]) for x, r in zip((log_p, log_q), rest)]
            out[index] += alpha * relative_entropy(*two)
        if not target.all():
            others = [log_softmax(x[~target] / temperature) for x in (t, s)]
            out[index] += beta * relative_entropy(*others)
    return temperature**2 * out


def dist(student, teacher, *, beta=1.0, gamma=1.0, temperature=1.0, axis=-1, where=None):
    """For logits of two dimensions."""
    s, t = (np.asarray(a).astype(np.float64) for a in (student, teacher))
    keep = np.broadcast_to(True if where is None else where, s.shape)
    if axis % 2 == 0:
        s, t, keep = s.T, t.T, keep.T
    q, p = np.zeros(s.shape), np.zeros(s.shape)
    for i, row in enumerate(keep):
        if row.any():
            q[i, row], p[i, row] = (np.exp(log_softmax(x[i, row] / temperature)) for x in (s, t))
    inter = [uncorrelated(q[i, k], p[i, k]) for i, k in enumerate(keep)]
    intra = [uncorrelated(q[k, c], p[k, c]) for c, k in enumerate(keep.T) if k.any()]
    loss = beta * np.array(inter) + (gamma * np.mean(intra) if intra else 0)
    return temperature**2 * np.where(keep.any(1), loss, 0.0)


def uncorrelated(x, y):
    x, y = x - x.mean() if x.size else x, y - y.mean() if y.size else y
    # 1e-6 is far below any variation tested and far above what centring leaves of none.
    if np.abs(y).max(initial=0) < 1e-6:
        return 0.0
    if np.abs(x).max(initial=0) < 1e-6:
        return 1.0
    return 1 - np.sum(x * y) / np.sqrt(np.sum(x**2) * np.sum(y**2))


def top_k_kl(student, teacher, k, *, temperature=1.0, axis=-1, where=None):
    @per_example
    def loss(s, t, temperature):
        order = np.argsort(-t, kind="stable")
        log_p, log_q = (log_softmax(x / temperature)[order] for x in (t, s))
        if s.size > k:
            rest = [np.logaddexp.reduce(x[k:]) for x in (log_p, log_q)]
            log_p, log_q = (np.append(x[:k], r) for x, r in zip((log_p, log_q), rest))
        return temperature**2 * relative_entropy(log_p, log_q)

    return loss(student, teacher, temperature=temperature, axis=axis, where=where)


def multi_teacher_kl(student, teachers, weights, **kwargs):
    return sum(w * kl(student, t, **kwargs) for w, t in zip(weights, teachers))
