"""What a key allows. How layers are merged, and their messages: tests/training/test_config.py."""

from dataclasses import dataclass

import pytest

from cluster.config import Allowed, ConfigError, key, load


@pytest.mark.parametrize(
    ("bounds", "taken", "refused", "problem"),
    [
        ({"least": 1}, [1, 1e9, (1, 2)], [0, (1, 0)], "must be at least 1, not "),
        ({"least": 1, "finite": False}, [float("inf")], [0, float("nan")], "must be at least 1, not "),
        ({"least": 0}, [0, None], [-1], "must not be negative, not "),
        ({"above": 0}, [0.1], [0, -1], "must be positive, not "),
        ({"above": 2}, [3], [2], "must be above 2, not "),
        ({"most": 2}, [-9, 2], [3], "must be at most 2, not "),
        ({"below": 2}, [1], [2], "must be below 2, not "),
        ({"least": 0, "most": 1}, [0, 1], [-0.1, 1.1], "must lie between 0 and 1, not "),
        ({"least": 0, "below": 1}, [0, 0.9], [1, -1], "must lie in [0, 1), not "),
        ({"above": 1, "most": 2}, [1.1, 2], [1, 3], "must lie in (1, 2], not "),
        ({"choices": ("y", "x")}, ["x", ("x", "y"), None], ["z"], "'z' is not one of: x, y"),
        ({"choices": (0, 1)}, [1], [2], "2 is not one of: 0, 1"),
        ({"pattern": ("[a-z]+", "is not a name")}, ["ab", None], ["a1"], "'a1' is not a name"),
        (
            {},
            [-1, "x", None, ()],
            [float("inf"), float("-inf"), float("nan"), (1.0, float("inf"))],
            "must be finite",
        ),
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


@dataclass(frozen=True)
class Written:
    steps: int = key(1, "")
    limit: int | None = key(None, "")
    name: str = key("x", "")
    group: str | None = key(None, "")
    rate: float = key(1.0, "")
    words: tuple[str, ...] = key((), "")
    counts: tuple[int, ...] = key((), "")
    parts: dict[str, Section] = key(dict, "")


def as_file(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return load(Written, file=file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=28.4e9", Written(steps=28_400_000_000)),
        ("steps=1e6", Written(steps=1_000_000)),
        ("limit=2.0", Written(limit=2)),
        ("counts=[1e3, 2]", Written(counts=(1000, 2))),
        ("rate=1e-3", Written(rate=0.001)),
        ("name='007'", Written(name="007")),
        ("name=7", Written(name="7")),
        ("name=None", Written(name="None")),
        ("group='None'", Written(group="None")),
        ("name=2026-11-26", Written(name="2026-11-26")),
        ("words=[a, '1e3']", Written(words=("a", "1e3"))),
        ("parts={a: {b: y}}", Written(parts={"a": Section("y")})),
    ],
)
def test_a_number_is_what_it_is_and_a_text_stays_as_it_is_written(text, expected, tmp_path):
    assert load(Written, dotlist=[text]) == expected
    assert as_file(tmp_path, text.replace("=", ": ", 1)) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("steps=1.5e0", "steps: "),
        ("steps=1e400", "steps: "),
        ("steps=1e308", "steps: "),
        ("name=~nobody-here/x", "name: ~nobody-here/x: there is no such user"),
        ("name=007", "name: YAML reads 007 as 7"),
        ("name=1e3", "name: YAML reads 1e3 as 1000.0"),
        ("name=on", "name: YAML reads on as True"),
        ("name=0x1F", "name: YAML reads 0x1F as 31"),
        ("words=[a, 007]", "words[1]: YAML reads 007 as 7"),
        ("limit=None", "limit: 'None' is a text; write null"),
        ("group=None", "group: 'None' is a text; write null"),
        ("rate=.inf", "rate: must be finite"),
        ("rate=.nan", "rate: must be finite"),
        (f"rate=1{'0' * 400}", "rate: a number of 401 digits is too large"),
    ],
)
def test_what_would_become_another_value_is_refused_by_key(text, problem, tmp_path):
    for wrong in (
        lambda: load(Written, dotlist=[text]),
        lambda: as_file(tmp_path, text.replace("=", ": ", 1)),
    ):
        with pytest.raises(ConfigError) as error:
            wrong()
        assert problem in str(error.value)


def test_anchors_have_a_place(tmp_path):
    found = as_file(
        tmp_path, "x-base: &base\n  b: y\nparts:\n  one: *base\n  two:\n    <<: *base\nsteps: 1e1\n"
    )
    assert found == Written(steps=10, parts={"one": Section("y"), "two": Section("y")})
