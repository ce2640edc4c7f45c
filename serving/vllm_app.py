"""The vLLM engine behind Ray Serve, through `ray.serve.llm`: the same endpoint, for GPU nodes.

Requests reach vLLM's own completions unchanged, also `echo` with `logprobs` (read in Ray's source, not run).

An optional extra: `pip install -c constraints.txt -e ".[vllm]"` (vllm 0.29 shares our pin of torch).
"""

from pathlib import Path
from typing import Any

from cluster.cli import UserError
from serving.config import ServeConfig

# Ray Serve LLM gathers a stream's tokens for 50 ms by default, which makes every ITL 0 or 50 ms:
# https://github.com/ray-project/ray/issues/59681
STREAM_BATCHING_MILLISECONDS = 0


def vllm_app(config: ServeConfig, *, directory: Path | None, name: str) -> Any:
    """The Serve application. Its replicas start vLLM.

    Args:
        directory: a Hugging Face LLaMA directory with its tokenizer.
        name: what clients call the model.

    Raises:
        UserError: vLLM is not installed, or there is no checkpoint.
    """
    if directory is None:
        raise UserError(
            "engine.kind: vllm needs a checkpoint; for random weights make a directory with config.json and "
            "tokenizer, and set model.path to it"
        )
    try:
        from ray.serve.llm import LLMConfig, build_openai_app
    except ImportError as error:
        raise UserError(
            f"engine.kind: vllm cannot be used here ({error}); "
            'install it with pip install -c constraints.txt -e ".[vllm]", or use engine.kind=torch'
        ) from error
    return build_openai_app({"llm_configs": [LLMConfig(**llm_arguments(config, directory, name=name))]})


def llm_arguments(config: ServeConfig, directory: Path, *, name: str) -> dict[str, Any]:
    """The arguments of `ray.serve.llm.LLMConfig`. Raises nothing; needs no vLLM."""
    engine, deployment = config.engine, config.deployment
    device: dict[str, Any] = {"accelerator_type": deployment.accelerator}
    if deployment.gpus == 0:
        device = {"accelerator_config": {"kind": "cpu"}}
    return {
        "model_loading_config": {"model_id": name, "model_source": str(directory)},
        "engine_kwargs": {
            "dtype": engine.dtype,
            "max_num_seqs": engine.slots,
            "max_num_batched_tokens": engine.step_tokens_on("cuda" if config.deployment.gpus else "cpu"),
            "max_model_len": engine.context_tokens,
            "enable_chunked_prefill": True,
            # Otherwise a benchmark that sends a prompt twice would measure the cache of the first.
            "enable_prefix_caching": False,
        },
        "deployment_config": {
            **config.replica_options(),
            "max_ongoing_requests": engine.slots + engine.waiting,
            "max_queued_requests": engine.waiting,
        },
        "experimental_configs": {"stream_batching_interval_ms": STREAM_BATCHING_MILLISECONDS},
        **device,
    }
