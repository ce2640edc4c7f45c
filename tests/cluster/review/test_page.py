import json
import math
import shutil

import pytest

from cluster.record import events
from cluster.review import page
from tests.cluster.review.browser import CHROMIUM, look
from tests.cluster.review.factories import age, make_run, open_record, row
from tests.cluster.review.reading import Reading

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">|</script>${7*7}{{7*7}}\\u003c'


def read(directory):
    """The page of a run, made by the command."""
    assert page.main([str(directory)]) == 0
    return Reading(directory / "report.html")


def rows(last, **more):
    return [row(step, **more) for step in range(1, last + 1)]


def test_a_finished_run_is_told_in_one_sentence_and_its_figures(tmp_path, capsys):
    changes = {"optim.matrix.lr": [0.01, 0.02], "run.name": ["first-light", "a"]}
    read_page = read(make_run(tmp_path / "a", rows(10), changes=changes))
    said = "Finished at step 10 of 10: validation loss 4.1 after 1,000 tokens in 12s, commit 0123456789."
    assert said in read_page.text and said in capsys.readouterr().out
    for part in ("Parameters 1,420,000", "optim.matrix.lr 0.02 0.01", "Returns a list of <b>results</b>"):
        assert part in read_page.text
    for title in ("Loss", "Gradient norm", "Learning rate", "Throughput", "Step time"):
        assert f" {title} " in read_page.text
    assert " Skipped steps " not in read_page.text, "there were none"


def test_the_page_loads_nothing_and_runs_nothing_that_a_run_wrote(tmp_path):
    plain = read(make_run(tmp_path / "plain", rows(4)))
    directory = make_run(tmp_path / "hostile", rows(4), changes={HOSTILE: [HOSTILE, HOSTILE]})
    events.append(directory, "loss_spike", HOSTILE, step=2)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**row(5), HOSTILE: 1.5, "mfu_reason": HOSTILE, "noise": {HOSTILE: {"x": 1}}}))
        file.write("\n")
    summary = json.loads((directory / "summary.json").read_text())
    (directory / "summary.json").write_text(json.dumps({**summary, "samples": {HOSTILE: HOSTILE}}))
    named = tmp_path / "a<script>alert(1)<|b"
    shutil.copytree(directory, named)
    found = read(named)
    assert found.tags.count("script") == plain.tags.count("script") and "img" not in found.tags
    assert plain.loads == found.loads == []
    assert "url(" not in found.styles and "@import" not in found.styles
    assert found.text.count(HOSTILE) >= 5 and "a<script>alert(1)<|b" in found.text
    policy = (named / "report.html").read_text().partition("Content-Security-Policy")[2].partition(">")[0]
    assert "default-src 'none'" in policy and "http" not in policy


def test_an_event_is_marked_on_the_curves_and_says_how_the_loss_moved(tmp_path):
    logged = [row(step, loss=9.0 if step == 6 else 4.0) for step in range(1, 11)]
    directory = make_run(tmp_path / "a", logged)
    events.append(directory, "started", "the run begins", step=0)
    events.append(directory, "loss_spike", "the loss rose far above its recent values", step=6)
    events.append(directory, "resumed", "the run continues from step 8", step=8)
    text = read(directory).text
    assert "the loss rose far above its recent values 4 → 9 1 → 1" in text
    first = text.index("Step 6: the loss rose far above its recent values")
    assert first < text.index("Curves"), "a reader need not look for it"
    assert "1 routine event " in text
    charts = (directory / "report.html").read_text().rpartition("<script")[0]
    assert charts.count("the loss rose far above its recent values") >= 7, (
        "on top, in the table, on every chart"
    )


@pytest.mark.parametrize("events_there", [False, True])
def test_a_run_that_is_going_and_one_that_failed_are_told_apart(tmp_path, events_there):
    with open_record(tmp_path / "a") as record:
        (tmp_path / "a/config.yaml").write_text("batch: {tokens: 100}\nschedule: {tokens: 5000}\n")
        record.log(row(1))
        assert "Running at step 1 of 50" in read(tmp_path / "a").text
    if events_there:
        events.append(tmp_path / "a", "failed", "the gradient was not finite in 20 steps in a row", step=1)
    else:
        age(tmp_path / "a", 1000)
    text = read(tmp_path / "a").text
    assert "Failed at step 1 of 50" in text
    assert ("The gradient was not finite" if events_there else "It ended without a summary") in text


@pytest.mark.parametrize(
    "content",
    ["", '{"step": 0, "tokens": 0, "validation_loss": 9.0}\n', '{"step": 1, "lo', '{"step": 3}\n', "\n\n"],
)
def test_a_run_with_few_rows_or_torn_ones_has_a_page(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    text = read(tmp_path).text
    assert "Running" in text
    assert ("validation loss 9" in text) == ("validation" in content)


def test_values_that_are_not_finite_are_named(tmp_path):
    losses = {4: math.nan, 5: math.nan, 6: math.nan, 9: math.inf}
    logged = [row(step, loss=losses.get(step, 4.0)) for step in range(11)]
    text = read(make_run(tmp_path / "a", logged)).text
    assert "training: 4 values are not finite (step 4 to 6, 9)" in text


def test_a_run_of_an_older_version_has_a_page(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps({"step": step, "train_loss": 5 - step / 10}) + "\n" for step in range(9))
    (tmp_path / "config.yaml").write_text("model: llama\noptimizer:\n  lr: 0.1\n")
    (tmp_path / "provenance.json").write_text('{"commit": "abc", "host": null, "packages": null}')
    (tmp_path / "summary.json").write_text('{"loss": 4.2, "samples": null}')
    found = read(tmp_path)
    assert "Finished" in found.text and "Train loss" in found.text
    assert "did not record which keys differ" in found.text and "optimizer.lr 0.1" in found.text


def test_files_that_hold_nonsense_cost_only_their_part_of_the_page(tmp_path):
    directory = make_run(tmp_path / "a", rows(4))
    nonsense = [{"step": {}, "loss": []}, {"step": 5, "loss": 10**400, "tokens": "x"}, [1], 3, None]
    with (directory / "metrics.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(each)}\n" for each in nonsense)
    (directory / "provenance.json").write_text('{"host": "x", "packages": 3, "commit": []}')
    (directory / "summary.json").write_text('{"samples": 3, "wall_seconds": "x", "tokens_per_second": {}}')
    (directory / "events.jsonl").write_text(
        '{"time": 1, "kind": {}, "level": [], "step": "x", "text": null}\n'
    )
    text = read(directory).text
    assert "system: not shown: a file holds an unexpected value" in text
    assert "metrics.jsonl: 3 damaged lines left out" in text and " Learning rate " in text


def test_a_resumed_run_shows_its_starts_and_which_of_them_its_times_are_of(tmp_path):
    directory = make_run(tmp_path / "a", rows(6))
    assert "Time 12s (training 10s)" in read(directory).text
    with open_record(directory, resume_step=4) as record:
        record.log(row(5, loss=3.0))
        record.finish({"wall_seconds": 20.0, "training_seconds": 3.0})
    text = read(directory).text
    assert "at step 5" in text and "Earlier starts" in text and "Training loss 3" in text
    assert "Time 20s (the last start: training 3s)" in text


def test_a_key_that_nobody_knows_is_drawn_too(tmp_path):
    text = read(make_run(tmp_path / "a", rows(4, attention_logits_max=12.5))).text
    assert "Other measurements Attention logits max" in text


def test_the_slowest_requests_come_first_and_failed_ones_are_counted_before_them(tmp_path):
    with open_record(tmp_path / "s") as record:
        record.log({"step": 1, "load": "8 in flight", "goodput_per_second": 7.5, "attainment": 0.5})
        with (tmp_path / "s/requests.jsonl").open("w") as file:
            for index in range(40):
                tokens = [index + 0.1, index + 0.2 + (5.0 if index == 7 else 0.0)]
                about = {
                    "load": "8 in flight",
                    "measured": index > 0,
                    "index": index,
                    "scheduled": float(index),
                    "sent": index + 0.025,
                }
                error = "timeout" if index == 30 else None
                answer = {"tokens": [] if error else tokens, "prompt_tokens": 8, "output_tokens": 2}
                file.write(json.dumps({**about, **answer, "error": error}) + "\n")
        model = {"id": "night", "engine_info": {"engine": "torch", "device": "cpu", "dtype": "bfloat16"}}
        record.finish({"slo": {"ttft_ms": 200.0, "tpot_ms": 1000.0, "e2e_ms": None}, "model": model})
    text = read(tmp_path / "s").text
    assert "1 load measured, at most 7.5 requests per second within the SLO" in text
    assert "39 measured requests; 1 failed, 1 more missed the SLO" in text
    assert "SLO: TTFT 200 ms, TPOT 1,000 ms." in text
    assert "Model night, torch, cpu, bfloat16" in text
    table = text.partition(" Missed ")[2]
    slowest = "8 in flight 7 7 25 8 2 100 5,100 5,200 5,100 TPOT"
    assert table.startswith(slowest)
    assert "Failed with Requests First 8 in flight timeout 1 30 at 30 s" in text


def test_a_serving_run_whose_requests_all_failed_has_a_page(tmp_path):
    make_run(tmp_path / "s", [row(1)], finish=False)
    (tmp_path / "s/requests.jsonl").write_text('{"load": "x", "tokens": [], "error": "timeout"}\n')
    assert "1 measured request; 1 failed" in read(tmp_path / "s").text


def test_what_cannot_be_shown_is_one_message(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert page.main(["nothing"]) == 2
    assert "nothing: no such run directory" in capsys.readouterr().err
    directory = make_run(tmp_path / "outputs" / "a", rows(2))
    assert page.main(["a", "--output", str(directory / "config.yaml" / "x.html")]) == 1
    assert page.main(["a"]) == 0 and (directory / "report.html").is_file()


def test_a_page_is_small_and_thinned_where_a_run_is_long(tmp_path):
    directory = make_run(tmp_path / "a", rows(1), finish=False)
    spike = {"loss": 50.0, "gradient_norm": 1.0}
    with (directory / "metrics.jsonl").open("a") as file:
        for step in range(2, 20_001):
            values = spike if step == 12_345 else {"loss": 4.0, "gradient_norm": 1.0}
            file.write(json.dumps({"step": step, "tokens": 100 * step, **values}) + "\n")
    text = read(directory).text
    assert "training: 20,000 values, drawn as the lowest, the median and the highest of each 20" in text
    assert (directory / "report.html").stat().st_size < 3e6


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_every_chart_and_nothing_is_wider_than_a_phone(tmp_path):
    long = "a-very-long-name-of-a-run-" * 4
    phases = {f"optimizer_{name}_seconds": 0.01 for name in ("start", "exchange", "orthogonalize", "finish")}
    directory = make_run(tmp_path / long[:100], rows(10, **phases), changes={long: [long * 3, long]})
    events.append(directory, "node_lost", HOSTILE + long * 3, step=3)
    assert page.main([str(directory)]) == 0
    for width in (1280, 390):
        found = look(directory / "report.html", width=width, folder=tmp_path)
        assert found["window"] == found["content"] == width
        assert found["charts"] == found["drawn"] >= 6
        assert found["asked"] == found["refused"] == [] and found["alerts"] == 0


def test_a_page_names_every_commit_that_a_resumed_run_ran_on(tmp_path):
    directory = make_run(tmp_path / "a", rows(2))
    provenance = json.loads((directory / "provenance.json").read_text())
    old, new = "a" * 40, "b" * 40
    starts = [{**provenance, "commit": commit} for commit in (new, old)]
    (directory / "provenance.json").write_text(
        json.dumps({**provenance, "commit": new, "dirty": False, "earlier_starts": starts})
    )
    assert f"Commit {new[:10]}; earlier starts: {old[:10]}" in read(directory).text
