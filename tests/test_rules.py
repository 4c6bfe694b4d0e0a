"""Patterns of paths: the first that matches counts, and none may match nothing."""

import pytest

from jaxcompress._rules import assign, matched

TREE = {"a": {"kernel": 1.0, "bias": 2.0}, "b": {"kernel": 3.0}}


def test_the_first_rule_that_matches_counts():
    assert assign(TREE, {"a/.*": "first", ".*kernel": "second"}) == {
        "a/kernel": "first",
        "a/bias": "first",
        "b/kernel": "second",
    }


def test_none_leaves_its_leaves_alone_also_from_later_rules():
    assert assign(TREE, {"a/kernel": None, ".*kernel": 8}) == {"b/kernel": 8}


def test_a_pattern_matches_whole_paths():
    with pytest.raises(ValueError, match="'kernel' matches none of the paths 'a/bias', 'a/kernel'"):
        assign(TREE, {"kernel": 1})


def test_a_rule_that_is_shadowed_has_still_matched():
    assert set(assign(TREE, {".*": 1, "a/kernel": 2}).values()) == {1}


@pytest.mark.parametrize("pattern", ["(", "*", 3])
def test_no_regular_expression(pattern):
    with pytest.raises(ValueError, match="is no regular expression"):
        assign(TREE, {pattern: 1})


@pytest.mark.parametrize("rules", [["a"], ".*", None])
def test_rules_that_are_no_mapping(rules):
    with pytest.raises(TypeError, match="rules map patterns of paths to specs"):
        assign(TREE, rules)


def test_matched():
    assert matched(TREE, [".*bias", "b/.*"]) == {"a/bias", "b/kernel"}
    with pytest.raises(ValueError, match="matches none"):
        matched(TREE, [".*bias", "c"])


@pytest.mark.parametrize("patterns", [".*", {".*": 1}, 3])
def test_patterns_that_are_no_list(patterns):
    with pytest.raises(TypeError, match="patterns are a list of regular expressions"):
        matched(TREE, patterns)
