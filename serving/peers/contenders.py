"""One contender of `serving.peers.races`, alone in its process, in its own interpreter.

    python -P serving/peers/contenders.py ours|transformers|vllm

It reads one JSON command per line, first `load`, then any number of `run`, and answers each with one JSON
line. It ends with its input. The peers' interpreters lack the rest of our code, so only "ours" imports it.

load  {"model": a Hugging Face directory, "settings": of the contender, "slots": most requests at once}
      -> {"about": what runs, and how, as strings}
run   {"prompts": [[id]], "num_new": [number], "concurrency": number}
      -> {"times": [[seconds]], "tokens": [[id]], "cpu_seconds": of all threads of this process}

A run continues every prompt greedily by so many new tokens, past any end of text, with `concurrency` prompts
in work. Times are when each new token was known in this process, counted from just before the first prompt is
submitted. Tokens that arrive together share a time.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

Tokens = list[int]


class Sheet:
    """The times and ids of the tokens of a run, by request. The clock starts when it is made."""

    def __init__(self, num_requests: int) -> None:
        self.times: list[list[float]] = [[] for _ in range(num_requests)]
        self.tokens: list[Tokens] = [[] for _ in range(num_requests)]
        self._started = time.perf_counter()

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def add(self, request: int, ids: Sequence[int], at: float) -> None:
        """Write down new tokens of a request."""
        self.times[request] += [at] * len(ids)
        self.tokens[request] += ids


class Racer(Protocol):
    """A contender in its own process."""

    about: dict[str, str]

    def run(self, prompts: Sequence[Tokens], num_new: Sequence[int], concurrency: int) -> Sheet: ...


class Ours:
    """`serving.engine.torch_engine`; timed where it delivers. Settings: key=value of serving.config."""

    def __init__(self, model: Path, settings: dict[str, Any], slots: int) -> None:
        from serving import config
        from serving.checkpoints import Served
        from serving.engine.process import make_engine

        keys = [f"engine.slots={slots}", *(f"{name}={value}" for name, value in settings.items())]
        self._engine = make_engine(config.load(dotlist=keys), Served(model, "race"))
        info = self._engine.info
        self.about = {"dtype": info.dtype, "device": info.device, **info.details}

    def run(self, prompts: Sequence[Tokens], num_new: Sequence[int], concurrency: int) -> Sheet:
        from serving.engine.protocol import answer_all

        sheet = Sheet(len(prompts))
        answer_all(
            self._engine, prompts, num_new, concurrency=concurrency,
            note=lambda request, new: sheet.add(request, [token.id for token in new], sheet.now()),
        )  # fmt: skip
        return sheet


class Transformers:
    """`generate` on static batches of `concurrency`, in the order given, padded on the left.

    A stopping criterion, called after each token of the batch, takes the times. A batch runs to the longest
    of its answers; tokens beyond a shorter answer do not count.
    """

    def __init__(self, model: Path, settings: dict[str, Any], slots: int) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, **{"attn_implementation": "sdpa", **settings}
        ).eval()
        self._model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        self.about = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "attention": self._model.config._attn_implementation,
            "batches": "static",
        }

    def run(self, prompts: Sequence[Tokens], num_new: Sequence[int], concurrency: int) -> Sheet:
        sheet = Sheet(len(prompts))
        for first in range(0, len(prompts), concurrency):
            self._batch(sheet, range(first, min(first + concurrency, len(prompts))), prompts, num_new)
        return sheet

    def _batch(
        self, sheet: Sheet, requests: range, prompts: Sequence[Tokens], num_new: Sequence[int]
    ) -> None:
        import torch

        width = max(len(prompts[request]) for request in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            prompt = torch.tensor(prompts[request])
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        times: list[float] = []

        def note_time(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            times.append(sheet.now())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        longest = max(num_new[request] for request in requests)
        with torch.inference_mode():
            whole = self._model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=longest,
                stopping_criteria=[note_time],
            )
        for row, request in enumerate(requests):
            for at, token in zip(times[: num_new[request]], whole[row, width:].tolist(), strict=False):
                sheet.add(request, [token], at)


class Vllm:
    """`LLMEngine`, stepped here; times are taken as a step returns. Settings: of vllm.EngineArgs."""

    def __init__(self, model: Path, settings: dict[str, Any], slots: int) -> None:
        import torch
        import vllm

        options: dict[str, Any] = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "max_num_seqs": slots,
            "enable_prefix_caching": False,  # the next round asks the same
            "disable_log_stats": True,
            **settings,
        }
        self._engine: Any = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**options))
        config = self._engine.vllm_config
        self.about = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "compiled": f"{config.compilation_config.mode}, {config.compilation_config.backend}",
            "enforce_eager": str(config.model_config.enforce_eager),
            "engine process": "own" if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0" else "this",
            "max_num_batched_tokens": str(config.scheduler_config.max_num_batched_tokens),
            "async_scheduling": str(config.scheduler_config.async_scheduling),
            "block_size": str(config.cache_config.block_size),
        }
        self._served = 0  # request ids are never used twice

    def run(self, prompts: Sequence[Tokens], num_new: Sequence[int], concurrency: int) -> Sheet:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def add(request: int) -> None:
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=num_new[request],
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            name = str(self._served + request)
            self._engine.add_request(name, {"prompt_token_ids": prompts[request]}, sampling)

        sheet = Sheet(len(prompts))
        following = min(concurrency, len(prompts))
        for request in range(following):
            add(request)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            at = sheet.now()
            for output in outputs:
                sheet.add(int(output.request_id) - self._served, output.outputs[0].token_ids, at)
                if output.finished and following < len(prompts):
                    add(following)
                    following += 1
        self._served += len(prompts)
        return sheet


KINDS: dict[str, Any] = {"ours": Ours, "transformers": Transformers, "vllm": Vllm}


def main() -> None:
    # Libraries print to standard output; that belongs in the log, which is standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender: Racer | None = None
    for line in sys.stdin:
        command = json.loads(line)
        if command.pop("do") == "load":
            kind = KINDS[sys.argv[1]]
            contender = kind(Path(command["model"]), command["settings"], command["slots"])
            answer: dict[str, Any] = {"about": contender.about}
        else:
            assert contender is not None
            used = time.process_time()
            sheet = contender.run(command["prompts"], command["num_new"], command["concurrency"])
            used = time.process_time() - used
            answer = {"times": sheet.times, "tokens": sheet.tokens, "cpu_seconds": used}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
