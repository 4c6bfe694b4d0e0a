"""Which atoms can go, against a search through all sets of them."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.prune._ties import Stay, Ties


def allowed(gone, pairs, merged, stays):
    """Whether every rule holds for this set, read off their definitions."""
    if any((a in gone) != (b in gone) for a, b in pairs) or gone & stays:
        return False
    for whole, parts in merged:
        for index in np.ndindex(whole.shape):
            members = [part[i] for part, i in zip(parts, index)]
            if whole[index] in gone and not any(m in gone for m in members):
                return False
        for k, part in enumerate(parts):
            for i, atom in enumerate(part):
                if atom in gone and not set(np.take(whole, i, k).ravel().tolist()) <= gone:
                    return False
    return True


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4),
    st.sets(st.integers(0, 9), max_size=4),
    st.sampled_from([((2, 3), (0, 6)), ((3, 2), (0, 6)), ((2, 2), (3, 7)), ((2, 1), (0, 2))]),
)
def test_the_largest_set_that_the_rules_allow(pairs, stays, merge):
    """Atoms 0 to 9, some of which are an axis that another ones are merged to."""
    (rows, columns), (start, after) = merge
    ties = Ties()
    ties.new(10)
    whole = np.arange(start, start + rows * columns).reshape(rows, columns)
    parts = (
        np.arange(after, after + rows) % 10,
        np.arange(after + rows, after + rows + columns) % 10,
    )
    for a, b in pairs:
        ties.tie(np.array([a]), np.array([b]))
    ties.merge(whole.ravel(), parts, "reshape")
    gone, roots, why = ties.solve(np.arange(10), [Stay(np.array(sorted(stays), int), "it must")])
    every = (
        set(some) for size in range(10, -1, -1) for some in itertools.combinations(range(10), size)
    )
    best = next(some for some in every if allowed(some, pairs, [(whole, parts)], stays))
    assert set(np.flatnonzero(gone).tolist()) == best
    assert {int(roots[atom]) for atom in range(10) if not gone[atom]} == set(why)


def test_only_what_has_to_do_with_the_hits():
    ties = Ties()
    axis, other, parts = ties.new(6), ties.new(6), (ties.new(2), ties.new(3))
    ties.tie(axis, other)
    ties.merge(other, parts, "reshape")
    gone, _, _ = ties.solve(axis[:3], [Stay(parts[1], "it must")])
    # Atom 0 of the rows goes with the first three; the second three nobody asked for.
    assert np.flatnonzero(gone).tolist() == [0, 1, 2, 6, 7, 8, 12]


def test_an_axis_keeps_its_first_index():
    ties = Ties()
    axis = ties.new(3)
    ties.axis(axis)
    gone, roots, why = ties.solve(axis, [])
    assert np.flatnonzero(gone).tolist() == [1, 2]
    assert why[int(roots[0])] == "nothing would be left of an axis"
