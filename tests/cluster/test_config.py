"""What a key allows. How layers are merged, and their messages: tests/training/test_config.py."""

from dataclasses import dataclass

import pytest

from cluster.config import Allowed, ConfigError, key, load


@pytest.mark.parametrize(
    ("bounds", "taken", "refused", "problem"),
    [
        ({"least": 1}, [1, 1e9, (1, 2)], [0, float("nan"), (1, 0)], "must be at least 1, not "),
        ({"least": 0}, [0, None], [-1], "must not be negative, not "),
        ({"above": 0}, [0.1, float("inf")], [0, -1], "must be positive, not "),
        ({"above": 2}, [3], [2], "must be above 2, not "),
        ({"most": 2}, [-9, 2], [3], "must be at most 2, not "),
        ({"below": 2}, [1], [2], "must be below 2, not "),
        ({"least": 0, "most": 1}, [0, 1], [-0.1, 1.1], "must lie between 0 and 1, not "),
        ({"least": 0, "below": 1}, [0, 0.9], [1, -1], "must lie in [0, 1), not "),
        ({"above": 1, "most": 2}, [1.1, 2], [1, 3], "must lie in (1, 2], not "),
        ({"choices": ("y", "x")}, ["x", ("x", "y"), None], ["z"], "'z' is not one of: x, y"),
        ({"choices": (0, 1)}, [1], [2], "2 is not one of: 0, 1"),
        ({"pattern": ("[a-z]+", "is not a name")}, ["ab", None], ["a1"], "'a1' is not a name"),
        ({}, [-1, "x", None, ()], [], ""),
    ],
)
def test_a_value_outside_of_what_a_key_allows_is_refused_with_that(bounds, taken, refused, problem):
    allowed = Allowed(**bounds)
    assert [allowed.problem(value) for value in taken] == [None] * len(taken)
    assert all((allowed.problem(value) or "").startswith(problem) for value in refused)


def test_the_help_says_what_is_allowed():
    shown = [{"least": 1}, {"least": 0}, {"above": 0}, {"least": 0, "below": 1}, {"choices": ("y", "x")}, {}]
    expected = ["at least 1", "not negative", "positive", "in [0, 1)", "one of: x, y", ""]
    assert [str(Allowed(**each)) for each in shown] == expected


@dataclass(frozen=True)
class Section:
    b: str = key("x", "a choice", choices=("y", "x"))


@dataclass(frozen=True)
class Schema:
    a: Section = key(Section, "")


def test_load_refuses_what_a_key_does_not_allow_and_lists_the_choices():
    with pytest.raises(ConfigError, match=r"^a\.b: 'z' is not one of: x, y$"):
        load(Schema, dotlist=["a.b=z"])
    assert load(Schema, dotlist=["a.b=y"]).a.b == "y"
