"""Views against numpy on the decoded array: nothing but indices may change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jaxcompress as jc
import oracles
from checks import assert_valid, made, quantized, random
from jaxcompress.arrays import _views

# Shape, shared axes, group sizes: per channel, per tensor, groups, blocks, odd sizes.
LAYOUTS = [
    ((2, 70, 3), (-2,), None),
    ((2, 70, 3), (-2, -1), None),
    ((3, 70, 2), (-1,), None),
    ((2, 128, 3), (-2,), (64,)),
    ((2, 12, 6), (-2,), (4,)),
    ((2, 10, 6), (-2, -1), (4, 3)),
    ((1, 9, 1), (-3, -2), None),
]


@pytest.fixture(params=LAYOUTS, ids=str)
def layout(request):
    return request.param


@pytest.fixture(params=[(8, True), (4, True), (3, False)], ids=str)
def q(request, layout):
    return made(*layout, *request.param)


def views(fn, q):
    """`fn(q)`, a list of views, from one compilation."""
    return jax.jit(fn)(q)


def same(view, dense):
    """The view is a valid array, and decodes to the very numbers of the dense one."""
    assert view is not None
    assert_valid(view)
    assert view.shape == dense.shape
    np.testing.assert_array_equal(oracles.dense(view), dense)


def cuts_a_group(q, d):
    """Whether dimension `d` is in groups, so that a cut may fall within one."""
    return q.group_size is not None and q.group_size[q.axis.index(d - q.ndim)] > 1


def test_transpose(q):
    orders = [(0, 2, 1), (2, 0, 1), (1, 2, 0), (0, 1, 2)]
    for view, order in zip(views(lambda q: [_views.transpose(q, o) for o in orders], q), orders):
        same(view, oracles.dense(q).transpose(order))


def test_new_axes_of_size_one(q):
    dense, (a, b, c) = oracles.dense(q), q.shape
    first, both, repeated = views(
        lambda q: (
            _views.broadcast_in_dim(q, (1, a, b, c), (1, 2, 3)),
            _views.broadcast_in_dim(q, (a, 1, b, c, 1), (0, 2, 3)),
            _views.broadcast_in_dim(q, (5, a, b, c), (1, 2, 3)),
        ),
        q,
    )
    same(first, dense[None])
    same(both, dense[:, None, :, :, None])
    assert repeated is None


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (3, False)])
def test_squeeze(layout, bits, symmetric):
    shape, axis, sizes = layout
    for d in range(3):
        q = made(tuple(1 if i == d else n for i, n in enumerate(shape)), axis, sizes, bits)
        [view] = views(lambda q: [_views.squeeze(q, (d,))], q)  # noqa: B023 (called at once)
        same(view, oracles.dense(q).squeeze(d))
    q = made((1, 1, 1), axis, sizes, bits, symmetric)
    [view] = views(lambda q: [_views.squeeze(q, (0, 1, 2))], q)
    same(view, oracles.dense(q).squeeze())


def test_slice(q):
    """Each dimension cut in turn: its halves, every second, the last, nothing."""
    problems = []
    for d, n in enumerate(q.shape):
        for cut in sorted({(0, n // 2, 1), (n // 2, n, 1), (0, n, 2), (n - 1, n, 1), (0, 0, 1)}):
            slices = [slice(0, m, 1) for m in q.shape]
            slices[d] = slice(*cut)
            problems.append((d, slices))

    def all_cuts(q):
        fields = [
            ([s.start for s in p], [s.stop for s in p], [s.step for s in p]) for _, p in problems
        ]
        return [_views.slice_(q, *f) for f in fields]

    dense = oracles.dense(q)
    for (d, slices), view in zip(problems, views(all_cuts, q)):
        if view is None:
            assert cuts_a_group(q, d)
        else:
            same(view, dense[tuple(slices)])


def test_a_slice_of_whole_groups_and_blocks_stays_packed():
    q = made((256, 3), (-2,), (64,), bits=4)
    inner, tail = views(
        lambda q: (
            _views.slice_(q, (64, 0), (192, 3), None),
            _views.slice_(q, (192, 0), (256, 3), None),
        ),
        q,
    )
    same(inner, oracles.dense(q)[64:192])
    same(tail, oracles.dense(q)[192:])
    assert (inner.packed, tail.packed) == (128, 64)
    odd = made((200, 3), (-2,), (64,), bits=4)
    [tail] = views(lambda q: [_views.slice_(q, (128, 0), (200, 3), None)], odd)
    same(tail, oracles.dense(odd)[128:])
    assert tail.packed == 72


def test_a_slice_within_a_block_unpacks_to_bytes():
    q = made((128, 3), (-2,), None, bits=4)
    [view] = views(lambda q: [_views.slice_(q, (10, 0), (20, 3), None)], q)
    same(view, oracles.dense(q)[10:20])
    assert (view.packed, view.values.dtype) == (None, jnp.int8)


def test_dynamic_slice_clamps_as_lax_does(q):
    """The primitive knows no negative indices: jax.lax has added the size where they meant that."""
    starts = [-200, -1, 0, 1, 2, 200]
    one = [[1 if i == d else m for i, m in enumerate(q.shape)] for d in range(3)]

    def at(q, start, d):
        index = [start if i == d else jnp.int32(0) for i in range(3)]
        return _views.dynamic_slice(q, index, one[d])

    slices = jax.jit(lambda q, start: [at(q, start, d) for d in range(3)])
    for start in starts:
        for d, view in enumerate(slices(q, jnp.int32(start))):
            lo = min(max(start, 0), q.shape[d] - 1)  # the definition of lax.dynamic_slice_p
            if view is None:
                assert cuts_a_group(q, d)
            else:
                same(view, np.take(oracles.dense(q), [lo], axis=d))


def test_the_definition_of_a_dynamic_slice():
    """The reference of the test above, on a plain array."""
    slices = [
        lax.dynamic_slice_p.bind(jnp.arange(4.0), jnp.int32(i), slice_sizes=(1,)) for i in (-1, 9)
    ]
    assert [s.tolist() for s in slices] == [[0.0], [3.0]]


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (3, False)])
def test_concatenate(layout, bits, symmetric):
    shape, axis, sizes = layout
    parts = [made(shape, axis, sizes, bits, symmetric, seed=seed) for seed in range(2)]
    dense = [oracles.dense(p) for p in parts]
    joined = views(lambda parts: [_views.concatenate(parts, d) for d in range(3)], parts)
    for d, view in enumerate(joined):
        if d - 3 in axis:  # the scales would no longer be shared
            assert view is None
        else:
            same(view, np.concatenate(dense, d))


def test_concatenated_paths_are_joined():
    parts = [made((4, 2), path=name) for name in ("query", "key")]
    assert _views.concatenate(parts, 1).path == "query+key"


def test_arrays_of_other_formats_do_not_concatenate():
    whole = made((4, 6))
    others = [
        made((4, 6), bits=4),
        made((4, 6), symmetric=False),
        made((4, 6), sizes=(2,)),
        quantized(random(4, 6).astype(jnp.bfloat16), jc.quantize.int8()),
        quantized(random(4, 6), jc.quantize.w8a8()),
        # Codes of a training step are floats.
        jc.quantize.prepare_qat({"w": jnp.ones((4, 6))}, {"w": jc.quantize.int8()})["w"].simulate(),
    ]
    for other in others:
        assert _views.concatenate([whole, other], 1) is None
        assert _views.concatenate([other, whole], 1) is None


def test_packed_and_unpacked_arrays_concatenate():
    a, b = (made((70, 3), bits=4, seed=seed) for seed in range(2))
    view = _views.concatenate([a, b.unpacked()], 1)
    same(view, np.concatenate([oracles.dense(a), oracles.dense(b)], 1))


@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 65]), min_size=2, max_size=3),
    bits=st.sampled_from([8, 4, 3]),
    data=st.data(),
)
def test_views_of_empty_and_single_sizes(shape, bits, data):
    q = made(tuple(shape), bits=bits)
    order = data.draw(st.permutations(range(q.ndim)))
    starts = [data.draw(st.integers(0, max(n - 1, 0))) for n in shape]
    turned, wider, cut = views(
        lambda q: (
            _views.transpose(q, order),
            _views.broadcast_in_dim(q, (1, *shape), range(1, q.ndim + 1)),
            _views.slice_(q, starts, shape, None),
        ),
        q,
    )
    dense = oracles.dense(q)
    same(turned, dense.transpose(order))
    same(wider, dense[None])
    same(cut, dense[tuple(slice(a, None) for a in starts)])


def test_a_broadcast_of_nothing_to_more_of_nothing_is_no_view():
    assert _views.broadcast_in_dim(made((1, 0), (-1,)), (5, 0), (0, 1)) is None


def test_static_activation_scales_travel_along():
    x = np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    w = {"w": jnp.ones((2, 4, 3))}
    fn = lambda p, x: jnp.einsum("lk,lkn->ln", x, p["w"])
    stats = jc.calibrate(fn, w, [x], jc.statistics.absmax())
    q = jc.quantize.quantize(w, {"w": jc.quantize.w8a8(static=True)}, stats=stats)["w"]
    np.testing.assert_allclose(q.act_scale[:, 0, 0] * 127, [4, 8], rtol=1e-6)  # two roundings
    second, turned, picked = views(
        lambda q: (
            _views.slice_(q, (1, 0, 0), (2, 4, 3), None),
            _views.transpose(q, (0, 2, 1)),
            _views.squeeze(_views.dynamic_slice(q, [1, 0, 0], (1, 4, 3)), (0,)),
        ),
        q,
    )
    assert turned.act_scale.shape == (2, 1, 1)
    np.testing.assert_array_equal(second.act_scale, q.act_scale[1:])
    np.testing.assert_array_equal(picked.act_scale, q.act_scale[1])
