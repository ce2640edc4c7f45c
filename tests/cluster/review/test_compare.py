import math

import pytest

from cluster.review import compare
from cluster.review.compare import Comparison, Difference
from cluster.review.outcome import loss_at, tokens_to
from cluster.review.run_reader import Run
from tests.cluster.review.browser import CHROMIUM, look
from tests.cluster.review.factories import make_run, row
from tests.cluster.review.reading import Reading


def setting(folder, rule, finals, *, last=10):
    """A run for each final validation loss, with seeds 1, 2, ..."""
    made = []
    for seed, final in enumerate(finals, start=1):
        rows = [row(step, loss=final - 0.1 + (last - step) / 10) for step in range(2, last + 1, 2)]
        made.append(make_run(folder / f"{rule}-seed{seed}", rows, seed=seed, rule=rule))
    return made


def sentence(directories):
    return Comparison([Run(directory) for directory in directories]).sentence()


def test_seeds_that_agree_decide(tmp_path):
    runs = setting(tmp_path, "muon", [4.0, 4.1, 4.2]) + setting(tmp_path, "adamw", [4.5, 4.61, 4.7])
    said = sentence(runs)
    assert said.startswith(
        "muon is better than adamw, by 0.503 nats per token (40% lower perplexity) at 1,000"
    )
    assert "reaches adamw's loss with 50% of the tokens" in said
    assert "The seeds confirm this: the 95% interval of the difference between equal seeds" in said


def test_the_best_of_several_says_that_it_was_chosen(tmp_path):
    runs = [*setting(tmp_path, "muon", [4.0, 4.1]), *setting(tmp_path, "adamw", [4.5, 4.6])]
    assert "not corrected" not in sentence(runs)
    assert sentence([*runs, *setting(tmp_path, "sgd", [6.0])]).endswith("for being the best of 3.")


def test_seeds_that_scatter_do_not_decide(tmp_path):
    runs = setting(tmp_path, "muon", [4.0, 4.6]) + setting(tmp_path, "adamw", [4.5, 4.3])
    said = sentence(runs)
    assert said.startswith("muon has a lower validation loss than adamw, by 0.1 nats")
    assert "Not decided" in said and "includes zero; run more seeds" in said


def test_one_seed_each_does_not_decide_either(tmp_path):
    said = sentence([*setting(tmp_path, "muon", [4.0]), *setting(tmp_path, "adamw", [4.5])])
    assert "muon-seed1 has a lower validation loss than adamw-seed1, by 0.5 nats" in said
    assert said.endswith("Not decided: each ran with one seed, so the spread between seeds is unknown.")


def test_an_interval_is_of_equal_seeds_where_they_have_them():
    paired = Difference.of({1: 4.50, 2: 4.61}, {1: 4.0, 2: 4.1})
    apart = Difference.of({1: 4.50, 2: 4.61}, {3: 4.0, 4: 4.1})
    assert paired.mean == pytest.approx(0.505) and apart.mean == pytest.approx(0.505)
    # t = 12.706 at one degree of freedom; s of (0.50, 0.51) is 0.00707
    assert paired.low == pytest.approx(0.505 - 12.706 * 0.005, abs=1e-3) and paired.decided
    assert apart.low < 0 < apart.high and not apart.decided and apart.apart


def test_runs_are_compared_at_the_tokens_that_all_have_reached(tmp_path):
    short = make_run(tmp_path / "short", [row(step) for step in range(1, 6)], rule="adamw", finish=False)
    long = make_run(tmp_path / "long", [row(step, loss=4.9 - step / 10) for step in range(1, 11)])
    comparison = Comparison([Run(long), Run(short)])
    assert comparison.tokens == 400
    assert "long has a lower validation loss than short, by 0.1 nats per token" in comparison.sentence()


def test_a_diverged_run_and_one_without_rows_are_not_ranked(tmp_path):
    nan = make_run(tmp_path / "nan", [row(2, loss=math.nan)], rule="adamw", finish=False)
    empty = make_run(tmp_path / "empty", [], rule="sgd", finish=False)
    good = make_run(tmp_path / "good", [row(2)])
    assert "There is nothing to compare" in sentence([nan, empty, good])
    assert compare.main([str(nan), str(empty), str(good), "--output", str(tmp_path / "x.html")]) == 0
    text = Reading(tmp_path / "x.html").text
    assert "empty has not finished" in text and " nan running 1 nan - " in text


def test_the_page_shows_differences_only_and_what_makes_it_unfair(tmp_path, capsys):
    runs = setting(tmp_path, "muon", [4.0, 4.1]) + setting(tmp_path, "adamw<b>|", [4.5, 4.6])
    (runs[0] / "provenance.json").write_text('{"commit": "other", "data_fingerprint": "f00"}')
    assert (
        compare.main([",".join(map(str, runs[:3])), str(runs[3]), "--output", str(tmp_path / "c.html")]) == 0
    )
    page = Reading(tmp_path / "c.html")
    assert (
        "optim.matrix.rule" in page.text
        and "run.seed" not in page.text
        and "optim.matrix.lr" not in page.text
    )
    assert "The runs saw different data" in page.text and "of different commits" in page.text
    assert "adamw<b>|" in page.text and "b" not in page.tags and page.loads == []
    assert "Tokens to" in page.text and str(tmp_path / "c.html") in capsys.readouterr().out


def test_runs_of_one_name_carry_their_folder(tmp_path):
    runs = [make_run(tmp_path / folder / "a", [row(2)], rule=folder) for folder in ("one", "two")]
    assert "one/a" in sentence(runs) and "two/a" in sentence(runs)


@pytest.mark.parametrize("given", [["a"], ["a,a"], ["a", "missing"], ["a", "served"]])
def test_what_cannot_be_compared_is_one_message(tmp_path, capsys, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "outputs/a", [row(2)])
    make_run(tmp_path / "outputs/served", [row(2)])
    (tmp_path / "outputs/served/requests.jsonl").touch()
    assert compare.main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "outputs/compare.html").exists()


def test_losses_and_tokens_between_evaluations():
    curve = ((0, 6.0), (100, 5.0), (200, 4.0))
    assert loss_at(curve, 150) == 4.5 and loss_at(curve, 200) == 4.0 and loss_at(curve, 201) is None
    assert tokens_to(curve, 4.5) == 150 and tokens_to(curve, 3.9) is None


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_the_comparison_also_on_a_phone(tmp_path):
    runs = [run for rule in ("muon", "adamw", "sgd" * 30) for run in setting(tmp_path, rule, [4.0, 4.1])]
    assert compare.main([*map(str, runs), "--output", str(tmp_path / "c.html")]) == 0
    for width in (1280, 390):
        found = look(tmp_path / "c.html", width=width, folder=tmp_path)
        assert found["window"] == found["content"] == width
        assert found["charts"] == found["drawn"] == 6 and found["asked"] == found["refused"] == []
