"""Right answers for the losses on features and relations: numpy in float64, plain loops."""

import numpy as np


def wide(*arrays):
    return [np.asarray(a).astype(np.float64) for a in arrays]


def softplus(x):
    return np.logaddexp(0, x)


def unit(x, axis=-1):
    x = np.asarray(x, np.float64)
    length = np.sqrt((x**2).sum(axis, keepdims=True))
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def linear(params, x):
    kernel, bias = wide(params["kernel"], params["bias"])
    return wide(x)[0] @ kernel + bias


def fitnet(s, t, projector=None, where=None):
    s, t = wide(s, t)
    s = s if projector is None else linear(projector, s)
    keep = np.broadcast_to(True if where is None else where, t.shape)
    out = np.zeros(t.shape[:-1])
    for i in np.ndindex(*out.shape):
        out[i] = np.mean((s[i][keep[i]] - t[i][keep[i]]) ** 2) if keep[i].any() else 0
    return out


def maps(x, keep):
    """Maps of one example, `[channels, positions that count]`."""
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])[keep.reshape(-1)].T


def attention_transfer(s, t, power=2.0, where=None):
    keep = np.broadcast_to(True if where is None else where, s.shape[:-1])
    attention = lambda x, k: unit((np.abs(maps(x, k)) ** power).sum(0))
    return np.array(
        [np.sum((attention(a, k) - attention(b, k)) ** 2) for a, b, k in zip(s, t, keep)]
    )


def nst(s, t, where=None):
    keep = np.broadcast_to(True if where is None else where, s.shape[:-1])
    out = []
    for a, b, k in zip(s, t, keep):
        u, v = unit(maps(a, k)), unit(maps(b, k))
        kernel = lambda x, y: np.mean([[(i @ j) ** 2 for j in y] for i in x])
        out.append(kernel(u, u) + kernel(v, v) - 2 * kernel(u, v))
    return np.array(out)


def vid(s, t, params, where=None):
    mean, t = linear(params["mean"], s), wide(t)[0]
    variance = softplus(wide(params["spread"])[0]) + 1e-5
    terms = ((t - mean) ** 2 / variance + np.log(variance)) / 2
    keep = np.broadcast_to(True if where is None else where, t.shape)
    total = np.where(keep, terms, 0).sum(-1)
    return np.divide(total, keep.sum(-1), out=np.zeros_like(total), where=keep.any(-1))


def relation(fn):
    """A loss of the examples that count, from one of all examples; the others get 0."""

    def loss(s, t, where=None):
        s, t = (x.reshape(len(x), -1) for x in wide(s, t))
        keep = np.broadcast_to(True if where is None else where, s.shape[:1])
        out = np.zeros(len(s))
        if keep.any():
            out[keep] = fn(s[keep], t[keep])
        return out

    return loss


@relation
def similarity_preserving(s, t):
    gram = lambda x: unit(x @ x.T)
    return np.mean((gram(s) - gram(t)) ** 2, -1)


def huber(x):
    return x**2 / 2 if abs(x) <= 1 else abs(x) - 0.5


@relation
def rkd_distance(s, t):
    n = len(s)

    def distances(x):
        d = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])
        mean = d.sum() / max(n * (n - 1), 1)
        return d / mean if mean > 0 else d

    d, e = distances(s), distances(t)
    rows = [[huber(d[i, j] - e[i, j]) for j in range(n) if j != i] for i in range(n)]
    return [np.mean(r) if r else 0.0 for r in rows]


@relation
def rkd_angle(s, t):
    n, out = len(s), []
    cosine = lambda x, i, j, k: unit(x[i] - x[j]) @ unit(x[k] - x[j])
    for j in range(n):
        found = [
            huber(cosine(s, i, j, k) - cosine(t, i, j, k))
            for i in range(n)
            for k in range(n)
            if i != j and k != j and i != k
        ]
        out.append(np.mean(found) if found else 0.0)
    return out


@relation
def pkt(s, t):
    def chosen(x):
        kernel = (1 + unit(x) @ unit(x).T) / 2
        np.fill_diagonal(kernel, 0)
        total = kernel.sum(-1, keepdims=True)
        return np.divide(kernel, total, out=np.zeros_like(kernel), where=total > 0)

    q, p = chosen(s), chosen(t)
    return np.sum(p * np.log((p + 1e-7) / (q + 1e-7)), -1)


def crd(s, t, projectors, memory, index, negatives, temperature=0.07, momentum=0.5):
    """Losses and the new memory, one example after another."""
    u, v = (unit(linear(projectors[k], x)) for k, x in (("student", s), ("teacher", t)))
    banks = wide(*memory)
    examples = len(banks[0])
    losses, new = [], [b.copy() for b in banks]
    for b, i in enumerate(index):
        loss = 0.0
        for x, bank in ((u[b], banks[1]), (v[b], banks[0])):
            h = lambda j: (
                1
                / (
                    1 + len(negatives[b]) / examples * np.exp(-(x @ bank[j]) / temperature)  # noqa: B023
                )
            )
            loss -= np.log(h(i)) + sum(np.log(1 - h(j)) for j in negatives[b] if j != i)
        losses.append(loss)
        for side, x in enumerate((u[b], v[b])):
            new[side][i] = unit(momentum * banks[side][i] + (1 - momentum) * x)
    return np.array(losses), new


def self_relation(s, t, heads, where=None):
    s, t = wide(s, t)
    keep = np.broadcast_to(True if where is None else where, s.shape[:-1])
    out = np.zeros(len(s))

    def attention(x):
        scores = x @ x.T / np.sqrt(x.shape[-1])
        scores -= scores.max(-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))  # its logarithm

    for b, k in enumerate(keep):
        if not k.any():
            continue
        cut = lambda x: np.split(x[b][k], heads, -1)  # noqa: B023
        for a, c in zip(cut(s), cut(t)):
            log_q, log_p = attention(a), attention(c)
            out[b] += np.sum(np.exp(log_p) * (log_p - log_q)) / (heads * k.sum())
    return out
