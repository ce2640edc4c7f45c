"""The GPU kit without a GPU: every block rehearsed on the CPU, and its checks seen to fail."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from optim.bench import step_race
from optim.kernels import gpu
from serving.engine.decoder import TorchDecoder
from serving.engine.scheduler import BLOCK_TOKENS
from tests.commands import ROOT, python
from tests.gpu import ablation, command, profiles, replay, sweep, wheels
from tests.gpu import kernels as kernel_checks
from tests.gpu.block import TINY, Run
from tests.gpu.command import BLOCKS, Block
from tests.waiting import PATIENCE_SECONDS, wait_until
from training.model.attention import sdpa
from training.model.llama import Llama, initialize
from training.planner.memory import POINTS
from training.run import engine as trained_engine

UNIT = re.compile(
    r"(^|_)(ms|gb|gb_per_s|tflops|nats|seconds_to_build|tokens_per_second|joules_per_step|elements|elements_beside"
    r"|percent_apart|times_as_long|chunk_tokens|launches|waits|graphs|cores|steps_that_only_decode|relative_\w+|relative_error|tolerance|gradient_norm)$"
    r"|^(percent_of|speedup)_\w+$"
)


def rows_of(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def in_memory(**ceilings: float) -> Run:
    return Run(torch.device("cpu"), io.StringIO(), ceilings)


# --- the rehearsal ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> dict[int, list[dict]]:
    """Rows of each block."""
    folder = tmp_path_factory.mktemp("kit")
    limit = 4 * PATIENCE_SECONDS
    done = python("tests.gpu", "--device", "cpu", "--out", folder, "--limit-seconds", limit)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads((folder / "rehearsal_gpu.json").read_text())
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last == {"output": str(folder / "rehearsal_gpu.json"), "blocks": list(BLOCKS), "failed": []}
    assert list(found["blocks"]) == [str(number) for number in BLOCKS]
    for number, block in BLOCKS.items():
        entry = found["blocks"][str(number)]
        assert entry["ok"] and entry["problem"] is None
        assert entry["seconds"] > 0 and entry["what"] == block.what in done.stdout
        assert entry["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
        assert len(entry["commit"]) == 40
    return {number: found["blocks"][str(number)]["rows"] for number in BLOCKS}


def figures(rows: list[dict], key: str) -> dict[str, float]:
    """Case -> the figure, of the rows that have it."""
    return {row["case"]: row[key] for row in rows if key in row}


@pytest.mark.stack
def test_every_figure_is_finite_and_has_its_unit_in_its_key(rehearsal):
    for rows in rehearsal.values():
        for row in rows:
            for key, value in row.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    assert math.isfinite(value) and UNIT.search(key), (key, row)


@pytest.mark.stack
def test_block_1_measures_ceilings_and_attention(rehearsal):
    rows = rehearsal[1]
    assert {row["ceiling"] for row in rows if "ceiling" in row} == {
        "product_tflops", "read_gb_per_s", "copy_gb_per_s",
    }  # fmt: skip
    assert all(row[row["ceiling"]] >= row[f"lowest_{row['ceiling']}"] > 0 for row in rows if "ceiling" in row)
    assert {name.rpartition(" ")[2] for name in figures(rows, "best_tflops")} == {
        "bf16",
        "fp16",
        "fp32",
        "tf32",
    }
    chosen = figures(rows, "chosen")
    assert len(chosen) == 5 and set(chosen.values()) == {"FLASH_ATTENTION"}  # what torch has on a CPU
    assert min(figures(rows, "flash_ms").values()) > 0 and set(figures(rows, "cudnn_ms").values()) == {None}


@pytest.mark.stack
def test_block_2_checks_every_kernel_and_the_decoder(rehearsal):
    rows = rehearsal[2]
    launching = {name for name in dir(gpu) if re.fullmatch(r"(?!check_)[a-z]\w*_(product|pass)", name)}
    assert launching == {"symmetric_product", "momentum_pass", "apply_pass", "adamw_pass", "scale_pass"}
    assert launching <= {re.match(r"\w*", row["case"])[0] for row in rows}
    errors, limits = figures(rows, "relative_error"), figures(rows, "tolerance")
    assert sum("_attention " in case for case in errors) == 4 and len(figures(rows, "ms")) == 2
    assert len(errors) >= 27 and all(0 < error <= limits[case] < 0.1 for case, error in errors.items())
    assert (
        set(figures(rows, "unwritten_elements").values())
        == {0}
        == set(figures(rows, "elements_beside").values())
    )
    [decoder] = [row for row in rows if row["case"].startswith("TorchDecoder")]
    assert 0 < decoder["eager_whole_relative_error"] < 1e-5 and decoder["steps_that_only_decode"] > 10


@pytest.mark.stack
def test_block_3_trains(rehearsal):
    rows = rehearsal[3]
    losses = [row for row in rows if "last_loss_nats" in row]
    assert [row["case"] for row in losses] == [
        "small step: 4 x 32, accumulated over 2",
        "large step: 4 x 32, accumulated over 4",
        "large step in 48 GB: 16 x 32, accumulated over 1",
    ]
    for step, tokens in zip(losses, (256, 512, 512), strict=True):
        assert step["first_loss_nats"] == pytest.approx(math.log(TINY.vocab_size), rel=0.02)
        assert step["last_loss_nats"] < step["first_loss_nats"] - 1
        assert step["tokens_per_second"] == pytest.approx(tokens / step["ms"] * 1e3)
    assert "batch.micro_sequences=16" in losses[2]["keys"].split()
    planned = figures(rows, "gb")
    points = [planned[f"small step: planned: {point}"] for point in POINTS]
    assert planned["small step: planned in all"] == max(points) > min(points) > 0
    assert all(0 < error < 0.5 for error in figures(rows, "relative_orthogonality_error").values())
    assert min(figures(rows, "orthogonalize_ms").values()) > 0
    named_kernels(rows, "training")


@pytest.mark.stack
def test_block_4_races_the_same_work(rehearsal):
    rows = rehearsal[4]
    [difference] = figures(rows, "relative_difference").values()
    assert 0 < difference < 0.05
    peer = "torch_muon" if step_race.multiplies_bf16(torch.device("cpu")) else "torch_fp32"
    speedups = figures(rows, f"speedup_{peer}")
    assert list(speedups) == ["ours", "ours_polar_express", peer] and speedups[peer] == 1
    assert min(figures(rows, "floor_ms").values()) > 0


@pytest.mark.stack
def test_block_5_has_every_variant_at_one_loss(rehearsal):
    rows = rehearsal[5]
    losses = figures(rows, "loss_nats")
    assert len(losses) >= 5 and all(
        any(case.endswith(name) for case in losses) for name in sweep.CHECKPOINTED.values()
    )
    assert all(loss == pytest.approx(math.log(TINY.vocab_size), rel=0.01) for loss in losses.values())
    assert figures(rows, "graphs") == {"graphs that were compiled": 2}  # for all layers


@pytest.mark.stack
def test_block_6_decodes_by_batch_and_context(rehearsal):
    rows = [row for row in rehearsal[6] if "decode_step_ms" in row]
    assert len(rows) == 5
    for row in rows:
        batch = int(re.match(r"batch (\d+)", row["case"])[1])
        assert row["decode_tokens_per_second"] == pytest.approx(1e3 * batch / row["decode_step_ms"])
        assert row["percent_of_measured_read_gb_per_s"] > 0 < row["percent_of_measured_product_tflops"]


@pytest.mark.stack
def test_block_7_names_what_takes_the_time(rehearsal):
    named_kernels(rehearsal[7], "decoding")


@pytest.mark.stack
def test_block_8_has_each_technique_off_in_turn(rehearsal):
    ratios = figures(rehearsal[8], "times_as_long")
    assert len(ratios) == 1 + len(ablation.TRAINING) + 2 * (1 + len(ablation.DECODING))
    assert [case for case, ratio in ratios.items() if ratio == 1] == [
        f"{work}, without nothing" for work in ("training", "decoding 1 x 24", "decoding 2 x 40")
    ]


def test_what_is_off_is_back_afterwards():
    before = trained_engine.deepspeed_config, gpu.unsupported
    for technique in ablation.TRAINING:
        with technique.off():
            after = trained_engine.deepspeed_config, gpu.unsupported
            assert (after == before) == (not technique.instead)
    assert (trained_engine.deepspeed_config, gpu.unsupported) == before


def test_attention_that_gathers_is_attention():
    """Grouped heads; the second request has one token in its second page."""
    cache = torch.randn(2, 4, 2, BLOCK_TOKENS, 16)
    q, blocks, lengths = torch.randn(2, 4, 16), torch.tensor([[0, 1], [3, 2]]), torch.tensor([40, 33])
    out = torch.empty_like(q)
    ablation.gathered_attention(q, cache, blocks, lengths, out)
    for row, (pages, length) in enumerate(zip(blocks, lengths, strict=True)):
        keys, values = (part[pages].transpose(0, 1).flatten(1, 2)[:, :length] for part in cache)
        expected = sdpa(q[row][None, :, None], keys[None], values[None], visible=torch.ones(1, length) > 0)
        torch.testing.assert_close(out[row], expected[0, :, 0])


def named_kernels(rows: list[dict], step: str) -> None:
    named = [row for row in rows if row["case"].startswith(f"{step}: ") and "percent_of_kernels" in row]
    shares = [row["percent_of_kernels"] for row in named]
    assert len(shares) == 12 and shares == sorted(shares, reverse=True) and 20 < sum(shares) <= 100.001
    assert any("mm" in row["case"] for row in named)


# --- blocks that fail ---------------------------------------------------------------------------------------

GOOD = "def measure(run): run.row('fine', x_ms=1.0)"
FAULTY = {
    "aborts": "import os\ndef measure(run):\n run.row('before', x_ms=2.0)\n os.abort()",
    "raises": "def measure(run):\n raise RuntimeError('CUDA error: an illegal memory access\\nmore')",
    "hangs": "import os, time\ndef measure(run):\n run.row('before', x_ms=3.0)\n"
    " open(os.environ['HANGS'], 'w')\n time.sleep(600)",
    "reports": "def measure(run):\n run.row('bad', x_ms=float('nan'))\n run.row('good', x_ms=1.0)",
    "silent": "def measure(run): pass",
    "good": GOOD,
}


@pytest.fixture
def faulty(tmp_path, monkeypatch) -> Path:
    """Blocks 1 to 6 are those of FAULTY. Returns the folder of the result.

    The clock jumps beyond a block's limit when the one that hangs does so.
    """
    for name, source in FAULTY.items():
        (tmp_path / f"kit_{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HANGS", str(tmp_path / "hangs"))
    now = lambda: time.monotonic() + PATIENCE_SECONDS * (tmp_path / "hangs").exists()  # noqa: E731
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))
    limit = PATIENCE_SECONDS / command.SLOWER
    blocks = {number: Block(name, (f"kit_{name}",), limit) for number, name in enumerate(FAULTY, start=1)}
    monkeypatch.setattr(command, "BLOCKS", blocks)
    monkeypatch.setattr(command, "LIMIT_SECONDS", 10 * PATIENCE_SECONDS)
    return tmp_path / "out"


@pytest.mark.stack
def test_a_block_that_fails_is_reported_the_others_run_and_a_later_call_keeps_them(faulty, capsys):
    assert command.main(["--device", "cpu", "--out", str(faulty)]) == 1
    entries = json.loads((faulty / "rehearsal_gpu.json").read_text())["blocks"]
    problems = {entry["what"]: entry["problem"] for entry in entries.values()}
    assert problems["aborts"].startswith("ended by SIGABRT")
    assert problems["raises"] == "kit_raises.measure: RuntimeError: CUDA error: an illegal memory access"
    assert problems["hangs"] == "did not end within 300 s"
    assert problems["reports"] == "bad: not finite: x_ms"
    assert problems["silent"] == "no rows" and problems["good"] is None
    rows = {entry["what"]: entry["rows"] for entry in entries.values()}
    assert rows["aborts"] == [{"case": "before", "x_ms": 2.0}] and rows["hangs"][0]["x_ms"] == 3.0
    assert rows["reports"][0] == {"case": "bad", "x_ms": "nan", "problem": "not finite: x_ms"}
    assert "raise RuntimeError" in "\n".join(entries["2"]["log"])
    assert "failed blocks: 1, 2, 3, 4, 5;" in capsys.readouterr().err
    # A later call keeps the blocks that it does not run.
    assert command.main(["--device", "cpu", "--out", str(faulty), "--blocks", "6"]) == 0
    later = json.loads((faulty / "rehearsal_gpu.json").read_text())["blocks"]
    assert list(later) == list(entries) and later["6"]["problem"] is None
    assert {**later, "6": None} == {**entries, "6": None}


def test_no_block_begins_without_time_and_an_unknown_one_is_refused(faulty, capsys):
    assert command.main(["--device", "cpu", "--out", str(faulty), "--limit-seconds", "0"]) == 1
    entries = json.loads((faulty / "rehearsal_gpu.json").read_text())["blocks"]
    assert {entry["problem"] for entry in entries.values()} == {"not run: no time was left"}
    assert command.main(["--blocks", "1,9", "--device", "cpu"]) == 2
    assert "--blocks: '9' is not one of: 1, 2" in capsys.readouterr().err


def test_without_a_gpu_no_baseline_is_begun(capsys, monkeypatch):
    monkeypatch.setattr(command, "describe_host", lambda: {"gpus": []})
    assert command.main([]) == 2
    assert "NVML names no GPU here" in capsys.readouterr().err


def test_a_result_is_named_by_its_card(tmp_path):
    card = command.card_of({"gpus": ["NVIDIA H100 80GB HBM3"]}, "cuda")
    assert command.output_file(card, tmp_path, "cuda") == tmp_path / "nvidia-h100-80gb-hbm3_gpu.json"
    assert command.output_file(card, None, "cuda").parent == ROOT / "tests" / "baselines"


@pytest.mark.stack
def test_a_killed_kit_leaves_what_ran_and_no_process(tmp_path):
    (tmp_path / "kit_hangs.py").write_text(
        "import os, time\ndef measure(run):\n run.row('before', process=os.getpid())\n time.sleep(600)"
    )
    script = (
        "from tests.gpu import command; command.BLOCKS = {1: command.Block('hangs', ('kit_hangs',), 500)}; "
        f"command.main(['--device', 'cpu', '--out', {str(tmp_path)!r}])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment) as kit:
        file = tmp_path / "rehearsal_gpu.json"
        wait_until(lambda: file.is_file() and json.loads(file.read_text())["blocks"]["1"]["rows"])
        kit.send_signal(signal.SIGKILL)
    [row] = json.loads(file.read_text())["blocks"]["1"]["rows"]
    wait_until(lambda: not Path(f"/proc/{row['process']}").exists())


# --- checks that can fail -----------------------------------------------------------------------------------


def test_a_share_above_100_percent_is_a_fault_of_the_ceiling():
    run = in_memory(product_tflops=2.0, read_gb_per_s=10.0)
    assert run.of_products(1.0) == {"percent_of_measured_product_tflops": 50.0}
    assert run.of_memory(1.0, measured="copy") == {}  # not measured
    run.row("high", **run.of_memory(11.0, measured="read"))
    [row] = rows_of(run.stream)
    assert row["fault"].startswith("above 100% of measured_read_gb_per_s") and "problem" not in row


def test_a_part_that_raises_does_not_end_the_next():
    def broken(run):
        raise ValueError("no\nmore")

    run = in_memory()
    run.attempt(broken, lambda run: run.row("next", x_ms=1.0))
    first, second = rows_of(run.stream)
    assert first["problem"] == "ValueError: no" and first["case"].endswith("broken")
    assert second == {"case": "next", "x_ms": 1.0}


def test_a_wrong_element_an_unwritten_one_and_one_beside_are_seen():
    exact = torch.randn(2, 5, 7, dtype=torch.float64)
    cases = {}
    for name in ("right", "wrong", "unwritten", "beside"):
        buffer, out = kernel_checks.framed(exact.float().mT.contiguous().mT)
        out.copy_(exact)
        if name == "wrong":
            out[1, 2, 3] += 1e-3
        if name == "unwritten":
            out[0, 4, 6] = math.nan
        if name == "beside":
            buffer[0, 0, 0] = 1.0
        worst, run = kernel_checks.Worst(), in_memory()
        worst.add(buffer, out, exact)
        worst.report(run, name, torch.float32)
        cases[name] = rows_of(run.stream)[0].get("problem")
    assert cases["right"] is None and cases["wrong"].startswith("relative error")
    assert "1 elements not written" in cases["unwritten"]
    assert cases["beside"] == "1 elements written beside the output"


@pytest.mark.parametrize(("factor", "error"), [(1.01, "0.01"), (math.nan, "nan")])
def test_a_decoder_that_is_wrong_is_seen(factor, error, monkeypatch):
    forward = TorchDecoder.forward
    monkeypatch.setattr(TorchDecoder, "forward", lambda self, spans: forward(self, spans) * factor)
    run = in_memory()
    replay.measure(run)
    [row] = rows_of(run.stream)
    assert f"eager_whole {error} above 0.0001" in row["problem"]


def test_a_loss_that_is_another_is_seen(monkeypatch):
    right = Llama.forward
    monkeypatch.setattr(
        Llama, "forward", lambda self, *given: right(self, *given) * (1.1 if self.lm_head.loss_tokens else 1)
    )
    model, run = Llama(TINY), in_memory()
    initialize(model, seed=0)
    expected = sweep.point(run, model, sweep.AS_THEY_ARE, sweep.PLAIN, 1)
    sweep.point(run, model, sweep.AS_THEY_ARE, sweep.CHUNKED, 1, expected=expected)
    right, other = rows_of(run.stream)
    assert "problem" not in right and "are not" in other["problem"]


def test_lines_in_which_the_host_waits_are_named_and_counted():
    def step():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    run = in_memory()
    profiles.host_waits(run, "training", step)
    profiles.host_waits(run, "training", lambda: None)
    waiting, free = rows_of(run.stream)
    assert waiting["waits"] == 2 and re.fullmatch(r"gpu/test_rehearsal.py:\d+ \(2\)", waiting["where"])
    assert free["waits"] == 0 and free["where"] == "nowhere"


# --- wheels -------------------------------------------------------------------------------------------------


def test_the_wheels_are_pinned_and_do_not_enter_the_repository():
    pinned = wheels.pins((ROOT / "constraints.txt").read_text())
    assert all(wheels.canonical(name) in pinned for name in (*wheels.PUBLISHED, wheels.SOURCE))
    assert wheels.pins("a_B==1.0\nc\n") == {"a-b": "1.0"}
    assert f"/{wheels.FOLDER.name}/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_readme_has_the_command_of_the_day():
    lines = (ROOT / "tests/gpu/README.md").read_text().splitlines()
    assert wheels.COMMAND.format(commit="COMMIT") in lines
    assert len(wheels.COMMAND) < 1900  # of 2000, the commit included
    assert f"--target /tmp/site {wheels.FOLDER.name}/*.whl" in wheels.COMMAND
