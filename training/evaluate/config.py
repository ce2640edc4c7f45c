"""The keys of an evaluation (`python -m training.evaluate`). No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import config as layered
from cluster.config import key, require, require_choice
from cluster.runs import NEWEST

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class EvaluateConfig:
    model: str = key(
        NEWEST,
        "a run's name or directory, exported where needed; a Hugging Face LLaMA directory; or 'newest'. With "
        "endpoint: what is served there, for its tokenizer; default: the run of that name, if there is one",
    )
    tasks: tuple[str, ...] = key(
        (),
        "[name,file,folder,...]: lm-evaluation-harness's own tasks and groups by name, whose data come from "
        "the Hugging Face hub; task YAMLs; folders of them. None: perplexity alone",
    )
    task_code: bool = key(
        False, "let task files run the Python code that they name: !function, and metrics that are scripts"
    )
    num_fewshot: int | None = key(
        None, "examples before each question; default: the task's own. A task that says 0 keeps it"
    )
    limit: int | None = key(None, "first questions of each task only, to try it out; default: all")
    bootstrap_iters: int = key(
        1000, "resamples for the standard error of a metric that is no mean (lm_eval's own default: 100000)"
    )
    data: str | None = key(
        None, "prepared folder whose validation split the perplexity is of; default: that of the run"
    )
    sequences: int = key(1024, "most held-out sequences for the perplexity, evenly spaced; 0: all")
    sequence_length: int | None = key(
        None, "tokens of each; default: the run's, else 1024 or the model's longest"
    )
    device: str = key("auto", "'cuda', 'cpu', or 'auto': a GPU if there is one")
    dtype: str = key("auto", "bfloat16, float32, or 'auto': the checkpoint's (of float16: bfloat16)")
    batch_size: int = key(8, "sequences in one forward pass")
    endpoint: str | None = key(
        None,
        "evaluate through this OpenAI-compatible endpoint, such as http://127.0.0.1:8000, ours or vLLM's",
    )
    endpoint_model: str | None = key(None, "the model's name there; default: the first that it lists")
    concurrency: int = key(8, "endpoint: requests in flight")
    output: str | None = key(
        None, "file of the result; default: eval.json in the run's directory, else in outputs/eval-<model>/"
    )

    def __post_init__(self) -> None:
        require_choice("device", self.device, DEVICES)
        require_choice("dtype", self.dtype, DTYPES)
        require(bool(self.model), "model", "is empty")
        require(all(self.tasks), "tasks", "one of them is empty")
        for name in ("batch_size", "concurrency", "bootstrap_iters"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("limit", "sequence_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "must be at least 1")
        require((self.num_fewshot or 0) >= 0, "num_fewshot", "must be 0 or more")
        require(self.sequences >= 0, "sequences", "must be 0 or more")
        if self.endpoint is None:
            require(self.endpoint_model is None, "endpoint_model", "goes with endpoint, and only")
            return
        web = self.endpoint.startswith(("http://", "https://"))
        require(web, "endpoint", f"{self.endpoint!r} must begin with http:// or https://")
        require(bool(self.tasks), "tasks", "an endpoint is evaluated by tasks alone; name some")
        require(self.data is None, "data", "perplexity is measured locally; leave out endpoint")


def load(*, file: Path | None = None, dotlist: Sequence[str] = ()) -> EvaluateConfig:
    """Defaults <- YAML <- dotlist. Raises `ConfigError`."""
    return layered.load(EvaluateConfig, file=file, dotlist=dotlist)
