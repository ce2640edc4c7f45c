"""The keys of an evaluation (`python -m training.evaluate`). No torch."""

from dataclasses import dataclass

from cluster.config import key, require
from cluster.record.record import WANDB_MODES
from cluster.runs import NEWEST


@dataclass(frozen=True)
class EvaluateConfig:
    model: str = key(
        NEWEST,
        "a run's name or directory, exported where needed; a Hugging Face LLaMA or Qwen3 directory; or "
        "'newest'. With endpoint: what is served there, for its tokenizer; default: the run of that name, if "
        "there is one",
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
        None, "examples before each question; default: the task's own. A task that says 0 keeps it", least=0
    )
    limit: int | None = key(
        None, "evaluate only the first N questions of each task, to try it out; default: all", least=1
    )
    bootstrap_iters: int = key(
        1000,
        "resamples for the standard error of a metric that is not a mean (lm_eval's own default: 100000)",
        least=1,
    )
    data: str | None = key(
        None, "prepared folder whose validation split the perplexity is of; default: that of the run"
    )
    sequences: int = key(
        1024, "held-out sequences for the perplexity, at most, evenly spaced; 0: all", least=0
    )
    sequence_length: int | None = key(
        None, "tokens of each; default: the run's, else 1024 or the model's longest", least=1
    )
    device: str = key("auto", "'auto' is a GPU if there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = key(
        "auto",
        "'auto' is the checkpoint's (bfloat16 for a float16 one)",
        choices=("auto", "bfloat16", "float32"),
    )
    batch_size: int = key(8, "sequences in one forward pass", least=1)
    endpoint: str | None = key(
        None,
        "evaluate through this OpenAI-compatible endpoint, such as http://127.0.0.1:8000, ours or vLLM's",
        pattern=("https?://.*", "must begin with http:// or https://"),
    )
    endpoint_model: str | None = key(None, "the model's name there; default: the first that it lists")
    endpoint_context_tokens: int | None = key(
        None, "endpoint: most tokens of prompt and answer, if neither it nor the model here says so", least=2
    )
    endpoint_api: str = key(
        "completions",
        "endpoint: what is asked of it; chat: the model's template frames each question, and only tasks that "
        "generate can be scored",
        choices=("completions", "chat"),
    )
    endpoint_batch: int = key(1, "endpoint: prompts in one request, of completions", least=1)
    concurrency: int = key(8, "endpoint: requests in flight", least=1)
    output: str | None = key(
        None, "file of the result; default: eval.json in the run's directory, else in outputs/eval-<model>/"
    )

    wandb: str = key("auto", "W&B: auto is online with a key, else offline", choices=WANDB_MODES)
    project: str = key("asuncion", "W&B project")

    def __post_init__(self) -> None:
        require(bool(self.model), "model", "is empty")
        require(all(self.tasks), "tasks", "one of them is empty")
        if self.endpoint is None:
            require(self.endpoint_model is None, "endpoint_model", "only with endpoint")
            require(self.endpoint_context_tokens is None, "endpoint_context_tokens", "only with endpoint")
            return
        alone = self.endpoint_api == "completions" or self.endpoint_batch == 1
        require(alone, "endpoint_batch", "must be 1 with endpoint_api=chat: a chat has one question")
        require(bool(self.tasks), "tasks", "an endpoint is evaluated by tasks alone; name some")
        require(self.data is None, "data", "perplexity is measured locally; leave out endpoint")
