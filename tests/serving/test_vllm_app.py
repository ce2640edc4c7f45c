"""What `ray.serve.llm` is asked for. vLLM itself is not installed where these tests run."""

import importlib.util
from pathlib import Path

import pytest

from cluster.cli import UserError
from serving.config import load
from serving.vllm_app import llm_arguments, vllm_app
from tests.commands import ROOT

CHECKPOINT = Path("/models/tiny")
GPU = ROOT / "serving/configs/a40_vllm.yaml"


def test_a_gpu_replica_autoscales_and_streams_every_token_by_itself():
    found = llm_arguments(load(file=GPU), CHECKPOINT, name="a40-1b4")
    assert found["model_loading_config"] == {"model_id": "a40-1b4", "model_source": "/models/tiny"}
    assert found["accelerator_type"] == "A40" and "accelerator_config" not in found
    assert found["experimental_configs"] == {"stream_batching_interval_ms": 0}
    assert found["engine_kwargs"]["max_num_seqs"] == 64
    assert found["engine_kwargs"]["enable_prefix_caching"] is False
    scaling = found["deployment_config"]["autoscaling_config"]
    assert scaling == {"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 66.0}
    assert found["deployment_config"]["max_queued_requests"] == 256  # bounded: Serve's own default is not


def test_our_engine_and_vllm_scale_alike():
    for dotlist in ([], ["deployment.replicas=2"], ["deployment.max_replicas=3"]):
        config = load(dotlist=dotlist)
        ours, theirs = config.replica_options(), llm_arguments(config, CHECKPOINT, name="tiny")
        assert ours.items() <= theirs["deployment_config"].items()


def test_without_gpus_it_asks_for_the_cpu_and_a_fixed_number_of_replicas():
    found = llm_arguments(load(dotlist=["engine.kind=vllm"]), CHECKPOINT, name="tiny")
    assert found["accelerator_config"] == {"kind": "cpu"} and "accelerator_type" not in found
    assert found["deployment_config"]["num_replicas"] == 1


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_what_is_missing_is_said():
    config = load(dotlist=["engine.kind=vllm"])
    with pytest.raises(UserError, match=r"engine.kind: vllm cannot be used here .* pip install"):
        vllm_app(config, directory=CHECKPOINT, name="tiny")
    with pytest.raises(UserError, match="vllm needs a checkpoint"):
        vllm_app(config, directory=None, name="tiny")
