"""Parity reports from files that are written here: figures whose ratios are known beforehand."""

import copy
import html.parser
import json
import re

import pytest

from cluster.cli import UserError
from cluster.parity import command as parity
from cluster.parity import public
from cluster.parity.baseline_file import read_side
from cluster.parity.parity import compare
from tests.cluster.parity.sides import A40, FLOPS, H100, claims, figure, write
from tests.cluster.review.panel_keys import missing
from training.model.shapes import LlamaShape


def both(folder, ours, theirs):
    a = write(folder, A40, [figure(A40, kind, share) for kind, share in ours.items()])
    b = write(folder, H100, [figure(H100, kind, share) for kind, share in theirs.items()])
    return compare(read_side(str(a)), read_side(str(b)), tolerance=0.1)


def test_parity_is_the_ratio_of_the_shares_of_what_bounds_each(tmp_path):
    found = both(tmp_path, {"training": 0.36, "decode": 0.7}, {"training": 0.45, "decode": 0.7})
    training, decode = found.comparisons
    assert training.parity.centre == pytest.approx(0.8)
    assert training.bounds == ("compute", "compute")
    assert training.absolute.centre == pytest.approx(0.8 * 149.7 / 989)
    assert decode.bounds == ("bandwidth", "bandwidth")
    assert decode.parity.centre == pytest.approx(1.0)
    assert decode.absolute.centre == pytest.approx(696 / 3350)


def test_the_words_follow_from_the_intervals(tmp_path):
    found = both(tmp_path, {"training": 0.36, "decode": 0.7}, {"training": 0.45, "decode": 0.7})
    verdicts = {claim.text: claim.verdict for claim in found.claims}
    assert verdicts["decode: parity within 10% throughout"] == "supported"
    assert verdicts["training: parity within 10% throughout"] == "contradicted"
    near = both(tmp_path, {"training": 0.41}, {"training": 0.45})  # 0.911: the interval holds the border
    assert near.claims[0].verdict == "not decided"


def test_the_divisor_makes_a_parity_of_1_37_out_of_none(tmp_path):
    (decode,) = both(tmp_path, {"decode": 0.7}, {"decode": 0.7}).comparisons
    assert decode.divisors["per peak FLOP/s"] == pytest.approx(1.37, abs=0.005)
    assert decode.divisors["per peak byte/s"] == pytest.approx(1.0)
    assert decode.divisors["per watt of the power limit"] == pytest.approx(696 / 3350 * 700 / 300)
    assert decode.divisors["nothing (absolute)"] == pytest.approx(696 / 3350)


def test_against_a_datasheet_it_is_the_share_of_the_own_roofline(tmp_path):
    a = write(tmp_path, A40, [figure(A40, "training", 0.36), figure(A40, "decode", 0.7)])
    found = compare(read_side(str(a)), read_side("datasheet:a40"), tolerance=0.1)
    assert [each.parity.centre for each in found.comparisons] == pytest.approx([0.36, 0.7], rel=1e-3)
    assert found.comparisons[1].figures[1]["joules_per_token"] == pytest.approx([300 * 2.7e9 / 696e9])
    assert found.claims[0].verdict == "supported" and "0.360 [" in found.claims[0].text


def test_a_machine_without_a_datasheet_is_measured_against_its_own_ceilings_on_both_sides(tmp_path):
    unknown = write(tmp_path, A40, [figure(A40, "decode", 0.7)], name="NVIDIA B9999")
    known = write(tmp_path, A40, [figure(A40, "decode", 0.7)])
    found = compare(read_side(str(unknown)), read_side(str(known)), tolerance=0.1)
    assert all("measured by cluster.measure.probe" in peaks.source for peaks in found.peaks)
    assert found.comparisons[0].shares[0].centre == pytest.approx(0.7 / 0.9, rel=1e-3)
    assert "per watt of the power limit" not in found.comparisons[0].divisors


def test_figures_of_other_work_are_not_compared_and_it_says_so(tmp_path):
    b = write(tmp_path, H100, [
        figure(H100, "training", 0.4, tokens_per_step=524_288),
        figure(H100, "prefill", 0.4, flops=3.1e9),
        figure(H100, "decode", 0.4),
    ])  # fmt: skip
    a = write(tmp_path, A40, [figure(A40, kind, 0.4) for kind in FLOPS])
    found = compare(read_side(str(a)), read_side(str(b)), tolerance=0.1)
    assert [each.kind for each in found.comparisons] == ["decode"]
    assert (
        "training/llama-1b4/muon: not the same work on both (tokens_per_step 131072 and 524288)"
        in found.missing
    )
    assert any(line.startswith("prefill/llama-1b4/batch 1: not the same work") for line in found.missing)
    assert any("serving/llama-2-7b: out of memory: by count" in line for line in found.missing)


def test_other_numbers_of_devices_are_said_and_other_precisions_are_not_compared(tmp_path):
    a = write(tmp_path, A40, [figure(A40, "training", 0.4, devices=8, precision="bf16")])
    b = write(tmp_path, H100, [figure(H100, "training", 0.4, devices=1, precision="bf16")])
    found = compare(read_side(str(a)), read_side(str(b)), tolerance=0.1)
    assert any(claim.text.endswith("the same devices on both") for claim in found.claims)
    c = write(tmp_path, H100, [figure(H100, "training", 0.4, devices=8, precision="fp32")])
    with pytest.raises(UserError, match="precision bf16 and fp32"):
        compare(read_side(str(a)), read_side(str(c)), tolerance=0.1)


def test_a_ceiling_that_scatters_widens_the_shares_and_not_the_rates(tmp_path):
    sides = []
    for name, factor in (("NVIDIA B9998", 1.2), ("NVIDIA B9999", 1.0)):
        file = write(tmp_path, A40, [figure(A40, "decode", 0.5)], name=name)
        content = json.loads(file.read_text())
        for row, scatter in zip(content["peaks_of_rounds"], (1.0, factor, 1.0), strict=True):
            row["read_gb_per_s"] *= scatter
        file.write_text(json.dumps(content))
        sides.append(read_side(str(file)))
    (decode,) = compare(*sides, tolerance=0.1).comparisons
    assert decode.parity.high > 1.5 and decode.shares[0].high > 1.2 * decode.shares[1].high
    assert decode.absolute.high < 1.05


def test_one_run_supports_nothing(tmp_path):
    a = write(tmp_path, A40, [figure(A40, "decode", 0.5)])
    b = write(tmp_path, H100, [figure(H100, "decode", 0.5, values=[620.0])])
    (decode,) = compare(read_side(str(a)), read_side(str(b)), tolerance=0.1).comparisons
    assert (decode.parity.low, decode.parity.high) == (None, None)


def test_money_is_compared_in_one_currency_only(tmp_path):
    a = write(tmp_path, A40, [figure(A40, "decode", 0.5, cost_per_million_tokens=2.0, cost_of="USD")])
    for currency, known in (("USD", True), ("PYG", False)):
        cost = {"cost_per_million_tokens": 3.0, "cost_of": currency}
        b = write(tmp_path, H100, [figure(H100, "decode", 0.5, **cost)])
        (decode,) = compare(read_side(str(a)), read_side(str(b)), tolerance=0.1).comparisons
        assert ("per unit of money" in decode.divisors) == known


def test_what_would_mislead_is_said(tmp_path):
    sending = {"compute": 0.3, "communication": 0.6, "optimizer": 0.1, "data": 0.0, "other": 0.0}
    a = write(tmp_path, A40, [figure(A40, "training", 0.1, time_shares=sending), figure(A40, "decode", 1.2)])
    b = write(tmp_path, H100, [figure(H100, "training", 0.4), figure(H100, "decode", 0.7)])
    found = compare(read_side(str(a)), read_side(str(b)), tolerance=0.1)
    said = {claim.text: claim.because for claim in found.claims if claim.verdict == "contradicted"}
    assert "the link bounds it" in said["training/llama-1b4/muon: compute bounds it on A"]
    assert "a share of 120%" in said["decode/llama-1b4/batch 1: the ceiling of A is one"]


def against_itself(tmp_path, shares, **ceilings):
    """A CPU's file with these shares of its ceilings, and the same file with its ceilings scaled."""
    file = write(
        tmp_path, A40, [figure(A40, kind, 0.8 * share) for kind, share in shares.items()], name="CPU X1"
    )
    content = json.loads(file.read_text())
    content["hardware"] |= {"kind": "cpu", "cpu_cores": 2}
    content["ceilings"]["read_gb_per_s"]["best"] = A40.memory_gb_per_s * 0.8
    file.write_text(json.dumps(content))
    other = tmp_path / "other.json"
    for name, factor in ceilings.items():
        content["ceilings"][name]["best"] *= factor
        for row in content["peaks_of_rounds"]:
            row[name] *= factor
    other.write_text(json.dumps(content))
    return [read_side(str(file)), read_side(str(other))]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("names", [["product_tflops"], ["product_tflops", "read_gb_per_s"]])
def test_a_file_against_itself_with_its_ceilings_halved_decides_nothing_that_rests_on_them(
    tmp_path, names, reverse
):
    sides = against_itself(
        tmp_path, {"training": 0.4, "prefill": 0.9, "decode": 0.45}, **dict.fromkeys(names, 0.5)
    )
    found = compare(*sides[:: -1 if reverse else 1], tolerance=0.1)
    verdicts = {text: claim.verdict for text, claim in claims(found).items() if ": parity" in text}
    bandwidth = "not decided" if "read_gb_per_s" in names else "supported"
    assert len(verdicts) == 6
    for text, verdict in verdicts.items():
        assert verdict == (bandwidth if text.startswith("decode") else "not decided"), text
    assert claims(found)["prefill/llama-1b4/batch 1: the ceiling of " + "BA"[reverse] + " is one"]
    against = compare(sides[1], read_side("datasheet:a40"), tolerance=0.1)
    [training] = [claim for text, claim in claims(against).items() if text.startswith("training")]
    assert training.verdict == "not decided" and "prefill/llama-1b4/batch 1 reaches 180%" in training.because


def test_a_ceiling_is_void_for_figures_that_do_not_exceed_it_and_whatever_they_are_compared_with(tmp_path):
    """B's prefill, which A has not measured, exceeds B's peak: nothing is known of B's training either."""
    a = write(tmp_path, A40, [figure(A40, "training", 0.4), figure(A40, "decode", 0.4)])
    b = write(tmp_path, H100, [figure(H100, kind, share) for kind, share in
                               (("training", 0.4), ("decode", 0.4), ("prefill", 1.1))])  # fmt: skip
    found = compare(read_side(str(a)), read_side(str(b)), tolerance=0.1)
    training, decode = found.comparisons
    assert training.voids == ("", "prefill/llama-1b4/batch 1 reaches 110% of its ceiling, compute")
    assert decode.voids == ("", "")
    verdicts = {text: claim.verdict for text, claim in claims(found).items()}
    assert verdicts["training: parity within 10% throughout"] == "not decided"
    assert verdicts["decode: parity within 10% throughout"] == "supported"


def test_like_machines_whose_ceilings_are_far_apart_decide_nothing(tmp_path):
    """Without a figure that exceeds any: halved, the shares of half reach all of it."""
    found = compare(*against_itself(tmp_path, {"decode": 0.4}, read_gb_per_s=0.5), tolerance=0.1)
    assert "both are CPU X1" in found.comparisons[0].voids[0]
    assert claims(found)["decode: parity within 10% throughout"].verdict == "not decided"
    found = compare(*against_itself(tmp_path, {"decode": 0.4}, read_gb_per_s=0.99), tolerance=0.1)
    assert claims(found)["decode: parity within 10% throughout"].verdict == "supported"


@pytest.mark.parametrize(("kind", "verdict"), [("cpu", "not decided"), ("gpu", "supported")])
def test_a_busy_machine_is_said_and_decides_nothing_on_its_cpu(tmp_path, kind, verdict):
    about = {"name": "CPU X1", "num_devices": 1, "kind": kind, "cpu_cores": 2}
    load = {"hardware": about, "load_average_before": 1.5}
    busy = read_side(str(write(tmp_path, A40, [figure(A40, "decode", 0.4)], name="CPU X1", **load)))
    load["load_average_before"] = 0.4
    load["hardware"]["name"] = "CPU X2"
    quiet = read_side(str(write(tmp_path, A40, [figure(A40, "decode", 0.4)], name="CPU X2", **load)))
    found = claims(compare(quiet, busy, tolerance=0.1))
    assert found["B had nothing else to do"].verdict == "contradicted"
    assert "load average 1.5 on 2 cores" in found["B had nothing else to do"].because
    assert "A had nothing else to do" not in found
    assert found["decode: parity within 10% throughout"].verdict == verdict
    against = claims(compare(busy, read_side("datasheet:h100"), tolerance=0.1))
    [share] = [claim for text, claim in against.items() if text.startswith("decode/")]
    assert share.verdict == verdict


def test_the_finding_is_one_sentence_with_the_verdict_of_each_kind(tmp_path):
    found = both(tmp_path, {"training": 0.36, "decode": 0.7}, {"training": 0.45, "decode": 0.7})
    assert found.finding == (
        "Parity within 10% between 8 x NVIDIA A40 (A) and 8 x NVIDIA H100 80GB HBM3 (B), each against its "
        "own hardware, is supported in decode (1.00) and contradicted in training (0.800); in absolute "
        "terms a device of A runs at 0.121 to 0.208 times the rate of one of B."
    )
    a = write(tmp_path, A40, [figure(A40, "training", 0.36), figure(A40, "decode", 0.7)])
    assert compare(read_side("datasheet:h100"), read_side(str(a)), tolerance=0.1).finding == (
        "8 x NVIDIA A40 reaches 36% in training and 70% in decode of its own roofline (2 of 2 figures are "
        "known to within 10%)."
    )


def test_what_is_not_decided_comes_last(tmp_path):
    kinds = {"training": 0.41, "prefill": 0.5, "decode": 0.63}  # 0.911 and 0.9: the interval holds the border
    found = both(tmp_path, kinds, {"training": 0.45, "prefill": 0.5, "decode": 0.7})
    verdicts = [claim.verdict == "not decided" for claim in found.claims]
    assert verdicts == [False] * 2 + [True] * 4
    assert (
        "supported in prefill (1.00) and not decided in training (0.911) and decode (0.900)" in found.finding
    )


def test_public_evidence_uses_the_same_formulas():
    """By hand: 8.55e8 FLOPs per token x 524,288 tokens / (8 devices x step x peak)."""
    found = public.evidence()
    assert found.absolute.centre == pytest.approx(1 / 3.164, rel=1e-3)
    assert [share.centre for share in found.shares] == pytest.approx([0.360, 0.1725], rel=2e-3)
    assert found.parity.centre == pytest.approx(6.606 / 3.164, rel=1e-3)
    assert found.parity.low is None and found.bounds == ("compute", "compute")
    shape = LlamaShape(
        vocab_size=50304, hidden_size=768, num_layers=12, num_heads=6, num_kv_heads=6, head_dim=128,
        ffn_size=2048,
    )  # fmt: skip
    assert public.flops_per_token() == shape.flops_per_token(1024)  # its MLP has 3 x 2048 as much as 2 x 3072


def page_of(tmp_path, a, b):
    """The HTML page of two files."""
    folder = tmp_path / "out"
    assert parity.main([str(a), str(b), "--output", str(folder), "--wandb", "disabled"]) == 0
    return (folder / "report.html").read_text()


def test_the_page_opens_with_the_finding_the_rooflines_and_the_table(tmp_path):
    sides = [write(tmp_path, device, [figure(device, kind, 0.4) for kind in FLOPS]) for device in (A40, H100)]
    text = page_of(tmp_path, *sides)
    opening = ("<h1>", "<blockquote>", "Parity within 10%", 'alt="Rooflines"', "<table>", ">parity</th>")
    later = ("Public evidence, not measured", "3.16 times as fast", "6.61 times as high", "What may be said")
    places = [text.index(needed) for needed in (*opening, *later)]
    assert places == sorted(places)
    assert all(f"flash_attention of {device.name}" in text for device in (A40, H100))
    assert "e+0" not in re.sub(r'src="[^"]*"', "", text)


def test_names_from_a_file_are_text_and_not_markup(tmp_path):
    name = "NVIDIA <script>alert(1)</script>"
    a = write(tmp_path, A40, [figure(A40, "decode", 0.4)])
    content = json.loads(a.read_text())
    content["hardware"]["name"] = name
    content["figures"][0]["command"] = "python </code><img src=https://x.example/y.png>"
    a.write_text(json.dumps(content))
    text = page_of(tmp_path, a, a)
    assert "<script" not in text and "<img src=https" not in text and "&lt;script&gt;" in text


class Page(html.parser.HTMLParser):
    """What an HTML file would load, and its headings."""

    def __init__(self):
        super().__init__()
        self.loaded, self.text = [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.loaded += [named[key] for key in ("src", "href", "srcset") if key in named and tag != "a"]

    def handle_data(self, data):
        self.text.append(data)


def test_the_command_writes_a_report_that_needs_nothing_else(tmp_path, capsys):
    a = write(tmp_path, A40, [figure(A40, kind, 0.4) for kind in FLOPS])
    b = write(tmp_path, H100, [figure(H100, kind, 0.5) for kind in FLOPS])
    folder = tmp_path / "out"
    assert parity.main([str(a), str(b), "--output", str(folder), "--wandb", "offline"]) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["training/llama-1b4/muon"]["parity"][0] == pytest.approx(0.8)
    assert json.loads((folder / "summary.json").read_text())["figures"] == last
    text = (folder / "report.md").read_text()
    for needed in (
        "python -m measure training", str(a), "6·N_matmul", "cluster/measure/intervals.py", "0" * 12,
        "Where the time of a training step goes", "0.800 [", "not measured",
        "Public evidence, not measured by this project",
    ):  # fmt: skip
        assert needed in text, needed
    page = Page()
    page.feed((folder / "report.html").read_text())
    assert len(page.loaded) == 3 and all(part.startswith("data:image/png;base64,") for part in page.loaded)
    assert "What other divisors would have said" in page.text
    assert sorted(plot.name for plot in (folder / "plots").iterdir()) == [
        "parity.png",
        "roofline.png",
        "time.png",
    ]
    assert missing(folder, "parity") == set()


def edited(**changes):
    def change(content):
        content.update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited(format=1), "format 1, not 2"),
        (edited(ceilings={}), "ceilings.product_tflops"),
        (edited(load_average_before="busy"), "load_average_before: 'busy' is not a number"),
        (lambda content: content["peaks_of_rounds"][1].update(read_gb_per_s=0.0), "peaks_of_rounds must be"),
        (
            lambda content: content["ceilings"]["read_gb_per_s"].update(spread=[0.0, 1.0]),
            "ceilings.read_gb_per_s",
        ),
        (lambda content: content["figures"][0].update(values=[0.0]), "values and flops must be positive"),
        (lambda content: content["figures"][0].pop("bytes"), "has no bytes"),
        (lambda content: content["figures"][0].update(link_bytes=1.0), "link_bytes need a positive number"),
        (
            lambda content: content["ceilings"].update(links={"all_reduce_gb_per_s": 3.0}),
            "ceilings.links.all_reduce_gb_per_s: 3.0 is not a rate",
        ),
        (lambda content: content["figures"][0].update(kind="nap"), "kind 'nap'"),
        (lambda content: content.pop("figures"), "not a file of `make baseline`"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, change, message):
    file = write(tmp_path, A40, [figure(A40, "decode", 0.5)])
    content = copy.deepcopy(json.loads(file.read_text()))
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as raised:
        read_side(str(file))
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("datasheet:a40", "datasheet:h100", "two datasheets have nothing measured"),
        ("datasheet:a41", "datasheet:h100", "datasheet:a41: no such datasheet; there are datasheet:a40"),
        ("/nowhere.json", "datasheet:h100", "/nowhere.json: no such file"),
    ],
)
def test_bad_sides_are_one_message(a, b, message, capsys):
    assert parity.main([a, b, "--wandb", "disabled"]) == 2
    assert message in capsys.readouterr().err


def test_energy_that_a_board_cannot_draw_is_not_compared_and_says_so(tmp_path):
    """NVML's counter reads 0 J, or twice the limit, over a turn of a few milliseconds."""
    rate = figure(A40, "prefill", 0.4)["values"][0]
    for watts in (0.0, 700.0):
        a = write(tmp_path, A40, [figure(A40, "prefill", 0.4, joules_per_token=[watts / rate])])
        side = read_side(str(a))
        found = compare(side, side, tolerance=0.1)
        assert "per measured joule" not in found.comparisons[0].divisors
        assert any("energy of prefill/llama-1b4/batch 1" in line for line in found.missing)
        assert not any("NVML gives none" in line for line in found.missing)


def test_figures_that_stay_open_for_one_reason_are_one_claim(tmp_path):
    figures = [
        figure(A40, "decode", 0.4),
        figure(A40, "prefill", 0.4),
        figure(A40, "prefill", 0.5, id="prefill/x"),
    ]
    for each in figures:
        each["values"] = each["values"][:1]
    found = compare(read_side(str(write(tmp_path, A40, figures))), read_side("datasheet:a40"), tolerance=0.1)
    assert "each measured once" in found.finding
    assert [claim.text.partition(":")[0] for claim in found.claims] == ["prefill", "decode/llama-1b4/batch 1"]
