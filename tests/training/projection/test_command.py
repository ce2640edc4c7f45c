"""The projection: batches, a baseline's rates, what is refused, the command."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import config as layered
from cluster.cli import UserError
from cluster.config import ConfigError
from cluster.display import number
from tests.cluster.review.panel_keys import missing
from tests.training.projection.test_step_model import job, links
from training.model.shapes import SHAPES
from training.projection import basis as projection_basis
from training.projection import command as projection
from training.projection import step_model
from training.projection.basis import basis_of, link_choices
from training.projection.command import divide
from training.projection.config import LinkConfig, ProjectionConfig
from training.projection.step_model import (
    Network,
    basis_from_row,
)
from training.projection.traffic import (
    ownership,
)


def test_nvlink_pairs_carry_twice_pcie_unless_the_bridge_is_slower():
    network = Network(2e9, "test")
    given = LinkConfig(pcie_gb_per_s=20, nvlink_gb_per_s=56.25)
    measured, pcie, pairs = link_choices(given, links(7), network)
    assert measured.bytes_per_s["all_reduce"] == 7e9
    assert pcie.bytes_per_s["all_reduce"] == 20e9 and pairs.bytes_per_s["all_reduce"] == 40e9
    assert pairs.bytes_per_s["all_to_all"] == 20e9
    assert pcie.node_bytes_per_s == pairs.node_bytes_per_s == 2e9
    [_, slow] = link_choices(LinkConfig(pcie_gb_per_s=20, nvlink_gb_per_s=30), None, network)
    assert slow.bytes_per_s["all_gather"] == 30e9


# --- batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_gpus", "tokens", "micro", "accumulation"),
    [(8, 524_288, 4, 8), (64, 524_288, 4, 1), (24, 24 * 11 * 2048, 1, 11), (512, 512 * 2048, 1, 1),
     (4096, 4096 * 2048, 1, 1)],
)  # fmt: skip
def test_a_batch_grows_to_the_least_that_divides(num_gpus, tokens, micro, accumulation):
    batch = divide(ProjectionConfig(), num_gpus)
    assert (batch.tokens, batch.micro_sequences, batch.accumulation) == (tokens, micro, accumulation)


# --- a baseline -------------------------------------------------------------------------------------------


def row(**changes: Any) -> dict[str, Any]:
    return {
        "num_workers": 2,
        "tokens_per_step": 1000,
        "flops_per_token": SHAPES["llama-1b4"].flops_per_token(2048),
        "accumulation": 1,
        "zero_stage": 1,
        "precision": "bf16",
        "step_seconds": 2.0,
        "phased_step_seconds": 2.5,
        "seconds_compute": 1.5,
        "seconds_data": 0.25,
        "seconds_optimizer": 0.5,
        "seconds_communication": 0.25,
        **changes,
    }


CEILINGS = {"product_tflops": {"best": 100.0}, "copy_gb_per_s": {"best": 500.0}, "links": None}


def baseline(**changes: Any) -> dict[str, Any]:
    cells = [
        {"id": "training/llama-1b4/muon", "kind": "training", "shape": "llama-1b4", "rule": "muon",
         "status": "measured", "reason": None, "rounds": [row()]},
        {"id": "training/llama-2-7b/muon", "kind": "training", "shape": "llama-2-7b", "rule": "muon",
         "status": "out of memory", "reason": "needs 90 GB", "rounds": []},
        {"id": "serving/llama-1b4", "kind": "serving", "shape": "llama-1b4", "status": "measured",
         "rounds": [{}]},
    ]  # fmt: skip
    hardware = {"name": "NVIDIA A40", "kind": "gpu", "num_devices": 8, "num_nodes": 1}
    return {
        "format": 2,
        "hardware": hardware,
        "ceilings": CEILINGS,
        "cells": cells,
        "figures": [],
        "provenance": {},
        **changes,
    }


def write(folder: Path, content: Any) -> str:
    file = folder / "here_baseline.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def test_shares_of_the_phased_step_scale_the_measured_one():
    one = job(1, 2)
    rows = [row(), row(step_seconds=3.0), row(step_seconds=1.0)]
    basis = basis_from_row(rows, CEILINGS, job=one, source="test", flops_ratio=3.0)
    assert basis.compute_seconds_per_token == pytest.approx(3.0 * 1.75 * (2.0 / 2.5) * 2 / 1000)
    # so that the step it was measured in comes out again
    assert step_model.optimizer_seconds(one, ownership(one), basis) == pytest.approx(0.5 * 2.0 / 2.5)


def test_a_baseline_gives_compute_and_links(tmp_path):
    found = {"num_ranks": 8, "all_reduce_gb_per_s": {"best": 9.0}, "all_to_all_gb_per_s": {"best": 6.0},
             "all_reduce_latency_us": 140.0}  # fmt: skip
    path = write(tmp_path, baseline(ceilings={**CEILINGS, "links": found}))
    basis = basis_of(ProjectionConfig(baseline=path))
    assert basis.compute_seconds_per_token == pytest.approx(1.75 * 0.8 * 2 / 1000)
    assert basis.source.startswith("measured: ") and basis.peak_tflops == 149.7
    assert basis.links.bytes_per_s["all_reduce"] == 9e9 and basis.links.bytes_per_s["all_to_all"] == 6e9
    assert basis.links.protocols[0][0] == pytest.approx(10e-6)


BETWEEN = {"num_ranks": 3, "all_reduce_gb_per_s": {"best": 2.5, "spread": [2.0, 2.5]},
           "all_to_all_gb_per_s": {"best": 2.0, "spread": [1.0, 2.0]}, "all_reduce_latency_us": 60.0,
           "num_bytes": 256_000_000}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "keys", "rate", "source"),
    [
        (
            BETWEEN,
            [],
            2.5e9,
            "measured by the preflight, in here_baseline.json: all-reduce over 3 nodes, one",
        ),
        (BETWEEN, ["links.node_gb_per_s=3.1"], 3.1e9, "as links.node_gb_per_s says"),
        (None, ["links.node_gb_per_s=12"], 12e9, "as links.node_gb_per_s says"),
        (None, [], 3.1e9, "ASSUMED, 25 GbE at its best"),
        ({"problem": "NCCL error"}, [], 3.1e9, "ASSUMED, 25 GbE at its best; the preflight's measurement f"),
    ],
)
def test_the_network_is_the_keys_else_the_preflights_else_assumed(found, keys, rate, source, tmp_path):
    inside = {**BETWEEN, "num_ranks": 8}
    path = write(tmp_path, baseline(ceilings={**CEILINGS, "links": inside, "links_between_nodes": found}))
    config = layered.load(ProjectionConfig, dotlist=[f"baseline={path}", *keys])
    basis = basis_of(config)
    assert basis.network.bytes_per_s == pytest.approx(rate) and basis.network.source.startswith(source)
    assert basis.links.node_bytes_per_s == pytest.approx(rate)
    assert all(
        each.node_bytes_per_s == pytest.approx(rate)
        for each in link_choices(config.links, basis.links, basis.network)
    )


def test_a_baseline_from_before_links_between_nodes_still_counts(tmp_path):
    assert "links_between_nodes" not in CEILINGS
    assert basis_of(ProjectionConfig(baseline=write(tmp_path, baseline()))).network.source.startswith(
        "ASSUMED"
    )


def test_the_measured_network_decides_the_time_between_nodes(tmp_path, capsys):
    """A ring over two nodes sends 15/16 of its buffers twice (or once) through the slower of both."""
    slow = {**BETWEEN, "all_reduce_gb_per_s": {"best": 1.25, "spread": [1.0, 1.25]}}
    seconds = []
    for found in (BETWEEN, slow):
        path = write(tmp_path, baseline(ceilings={**CEILINGS, "links_between_nodes": found}))
        assert projection.main([f"baseline={path}", "nodes=[2]", "stages=[1]", "rule=muon"]) == 0
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["between_nodes"].startswith(
            f"{number(found['all_reduce_gb_per_s']['best'])} GB/s per node each"
        )
        seconds.append(last["projection"][0]["seconds"]["inter-node link"])
    assert seconds[1] == pytest.approx(2 * seconds[0])
    ring = 15 / 16 * (2 + 1) * 2 * 1_420_396_544 / 2.5e9
    assert ring < seconds[0] < 1.5 * ring  # and the matrices to their owners and back


def test_another_shape_of_the_baseline_is_scaled_by_its_flops_and_said_so(tmp_path):
    flops = SHAPES["llama-60m"].flops_per_token(2048)
    content = baseline()
    content["cells"][0] |= {"shape": "llama-60m", "rounds": [row(flops_per_token=flops)]}
    basis = basis_of(ProjectionConfig(baseline=write(tmp_path, content), baseline_shape="llama-60m"))
    ratio = SHAPES["llama-1b4"].flops_per_token(2048) / flops
    assert basis.compute_seconds_per_token == pytest.approx(ratio * 1.75 * 0.8 * 2 / 1000)
    assert "ASSUMED: llama-1b4 at the same FLOP/s" in basis.source


def test_without_a_baseline_the_datasheet_counts_and_the_output_says_so(monkeypatch):
    monkeypatch.setattr(projection_basis, "_found_baseline", lambda device: None)
    basis = basis_of(ProjectionConfig())
    assert basis.source.startswith("ASSUMED, nothing measured: MFU 40% of 149.7 TFLOP/s")
    assert basis.compute_seconds_per_token == pytest.approx(9_111_601_152 / (0.4 * 149.7e12))


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (None, {}, "no such file; write one with `make baseline`"),
        ("no json", {}, "cannot be read as JSON"),
        ({"bench": "optim"}, {}, "not a file of `make baseline`"),
        (baseline(format=1), {}, "format 1, not 2; run `make baseline` again"),
        (baseline(), {"rule": "adamw"}, "no measured training cell of llama-1b4 with adamw; it has "
         "llama-1b4 with muon (measured), llama-2-7b with muon (out of memory: needs 90 GB); set baseline_"),
        (baseline(ceilings={"product_tflops": None}), {}, "is incomplete"),
        (baseline(), {"shape": "llama-2-7b"}, "no measured training cell of llama-2-7b with muon"),
        (baseline(), {"baseline_shape": "llama-9t"}, "baseline_shape: 'llama-9t' is not one of"),
        (baseline(), {"device": "NVIDIA H200"}, "was measured on NVIDIA A40, and device is NVIDIA H200"),
    ],
)  # fmt: skip
def test_a_baseline_that_cannot_be_used_is_an_error_with_its_remedy(content, keys, message, tmp_path):
    path = str(tmp_path / "none.json") if content is None else write(tmp_path, content)
    with pytest.raises(UserError) as error:
        basis_of(ProjectionConfig(baseline=path, **keys))
    assert message in str(error.value) and path in str(error.value) + path * ("baseline_shape" in keys)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("assumed.mfu=1.5", "assumed.mfu"),
        ("assumed.mfu=0", "assumed.mfu"),
        ("links.node_gb_per_s=0", "links.node_gb_per_s"),
        ("nodes=[]", "nodes"),
        ("nodes=[0]", "nodes"),
        ("stages=[0]", "stages"),
        ("batch_tokens=5000", "batch_tokens"),
        ("tokens=0", "tokens"),
        ("shape=llama-9t", "shape"),
        ("rule=scion", "rule"),
        ("node=[1]", "unknown key 'node'"),
    ],
)
def test_an_impossible_key_is_named(key, name):
    with pytest.raises(ConfigError, match=name):
        layered.load(ProjectionConfig, dotlist=[key])


def test_a_device_that_nobody_knows_needs_a_baseline():
    with pytest.raises(UserError, match="no datasheet entry and no baseline; known: NVIDIA A40"):
        basis_of(ProjectionConfig(device="NVIDIA A41"))


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_prints_tables_and_one_json_line(capsys, tmp_path):
    path = write(tmp_path, baseline())
    run = tmp_path / "run"
    keys = [f"baseline={path}", "nodes=[1,512]", "stages=[1]", f"directory={run}", "wandb=offline"]
    assert projection.main(keys) == 0
    assert missing(run, "projection") == set()
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    one, _, many, _ = found["projection"]
    assert (one["gpus"], many["gpus"]) == (8, 4096)
    assert one["seconds"]["compute"] == pytest.approx(65_536 * 1.75 * 0.8 * 2 / 1000)
    assert one["days"] == pytest.approx(28e9 / 524_288 * one["step_seconds"] / 86400)
    assert one["mfu"] == pytest.approx(one["tokens_per_second"] * 9_111_601_152 / (8 * 149.7e12))
    assert one["sent_bytes"]["gradients"] == pytest.approx(2 * 7 / 8 * 2 * 1_420_396_544)
    assert one["bottleneck"] == "compute" and many["batch_tokens"] == 4096 * 2048
    text = "\n".join(lines)
    assert (
        "measured: here_baseline.json" in text
        and "between nodes  3.10 GB/s per node each way: ASSUMED" in text
    )
    assert "batch_tokens=524,288 does not divide over 4,096 GPUs" in text


def test_dry_run_and_bad_input(capsys, tmp_path):
    assert projection.main(["--dry-run", f"baseline={write(tmp_path, baseline())}"]) == 0
    assert "micro_sequences: 4" in capsys.readouterr().out
    assert projection.main([f"baseline={tmp_path / 'none.json'}"]) == 2
    assert "no such file" in capsys.readouterr().err
    assert projection.main(["assumed.mfu=2"]) == 2
    assert "assumed.mfu" in capsys.readouterr().err
