"""One contender of `training.bench.race`, alone in its process, in its own interpreter.

    python -P training/bench/contenders.py ours|litgpt|litgpt_compiled|transformers

It reads one JSON command per line, first `load`, then any number of `run`, and answers each with one JSON
line. It ends with its input. The peers' interpreters lack the rest of our code, so only "ours" imports it.

load  {"hf_config": config.json of the model, "rule": "adamw" or "muon", "precision": one to take or null,
       "tokens": {"file", "dtype"}, "micro_sequences", "sequence_length", "accumulation", "keys": for ours}
      -> {"about": what runs, and how, as strings, "num_parameters", "first_loss": of the first step,
          "precision": the one that is used, "tried": seconds of a step in each precision that was tried}
run   {"seconds": least length of the turn}
      -> {"step_seconds": [...], "optimizer_seconds": [...] or null, "loss", "cpu_seconds": of this process}

Everyone takes whole training steps on the same tokens: forward and backward of `accumulation` micro-batches,
clipping at 1, the optimizer. A peer trains as its own documentation does: its model, its loss, its engine.
Without a precision it tries all that it has and keeps the fastest.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
MUON_LR, MOMENTUM = 0.02, 0.95
TABLES = ("wte", "lm_head")  # of LitGPT: two-dimensional, and not for Muon
ANSWERED = ("about", "num_parameters", "first_loss", "precision", "tried")  # by `load`
TRIED_STEPS = 2  # in each precision, after one that warms up


class Tokens:
    """The prepared corpus, one window after another, int64 [micro_sequences, sequence_length] each."""

    def __init__(self, load: dict[str, Any]) -> None:
        import numpy as np

        self._flat = np.memmap(load["tokens"]["file"], dtype=load["tokens"]["dtype"], mode="r")
        self._size = load["micro_sequences"], load["sequence_length"]
        self._at = 0

    def next(self) -> tuple[Any, Any]:
        """Inputs and targets of a micro-batch."""
        import torch

        rows, length = self._size
        if self._at + rows * length + 1 > len(self._flat):
            self._at = 0
        window = self._flat[self._at : self._at + rows * length + 1].astype("int64")
        self._at += rows * length
        inputs, targets = (torch.from_numpy(part.reshape(rows, length)) for part in (window[:-1], window[1:]))
        return inputs, targets


class Ours:
    """The steps of `training.run.loop`, in the precision that our configuration chooses for this CPU."""

    def __init__(self, load: dict[str, Any]) -> None:
        import tempfile
        from contextlib import ExitStack
        from pathlib import Path

        from training import config as training_config
        from training.plan import make_plan
        from training.run import workers
        from training.run.context import torch_context
        from training.run.loop import Trainer
        from training.run.start import Start

        self._stack = ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        config = training_config.load(dotlist=[*load["keys"], f"run.directory={folder}"])
        plan = make_plan(config)
        start = Start.of(config, plan, Path(load["tokens"]["file"]).parent)
        context = self._stack.enter_context(torch_context(workers.torch_ranks(config.workers), gpu=False))
        self._trainer = Trainer(start, context)
        self.num_parameters = plan.shape.num_parameters
        self.precision, self.tried = config.precision, dict[str, float]()
        self.optimizer_seconds = 0.0
        self.about = {"launcher": "one process, without Ray", "zero": str(config.zero.stage)}
        self.first_loss = self.step()

    def step(self) -> float:
        """Its loss. `optimizer_seconds` is of this step."""
        from contextlib import contextmanager

        self.optimizer_seconds = 0.0

        @contextmanager
        def phase(part: str) -> Any:
            started = time.perf_counter()
            yield
            if part == "optimizer":
                self.optimizer_seconds += time.perf_counter() - started

        return self._trainer.take_step(phase=phase).item()


class Peer:
    """A peer's model and optimizer in the precision that is asked for, else in the fastest one."""

    precisions: tuple[str, ...]

    def __init__(self, load: dict[str, Any]) -> None:
        self._load, self._tokens = load, Tokens(load)
        self.optimizer_seconds: float | None = None
        self.tried: dict[str, float] = {}
        for precision in [load["precision"]] if load["precision"] else self.precisions:
            step, num_parameters = self.build(precision)
            first_loss = step().item()
            started = time.perf_counter()
            for _ in range(0 if load["precision"] else TRIED_STEPS):
                step()
            self.tried[precision] = (time.perf_counter() - started) / TRIED_STEPS
            if precision == min(self.tried, key=self.tried.__getitem__):
                self.precision, self.first_loss = precision, first_loss
                self._step, self.num_parameters = step, num_parameters
        self.about = self.describe()

    def build(self, precision: str) -> tuple[Callable[[], Any], int]:
        """A function that takes one step and returns its loss, and the number of parameters."""
        raise NotImplementedError

    def describe(self) -> dict[str, str]:
        raise NotImplementedError

    def step(self) -> float:
        return self._step().item()


class LitGpt(Peer):
    """`litgpt.pretrain.fit` without its logging: GPT, Fabric, chunked_cross_entropy.

    torch.optim.AdamW is the fused one, which LitGPT takes on GPUs only: it is faster on CPUs too.
    """

    precisions = ("bf16-true", "bf16-mixed", "32-true")
    compiled = False

    def build(self, precision: str) -> tuple[Callable[[], Any], int]:
        import lightning
        import torch
        from litgpt.model import GPT
        from litgpt.utils import chunked_cross_entropy

        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        fabric.seed_everything(0, verbose=False)
        with fabric.init_module(empty_init=False):
            model: Any = GPT(self._config())
        if self._load["hf_config"]["tie_word_embeddings"]:
            model.transformer.wte.weight = model.lm_head.weight
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.02)
        model.max_seq_length = self._load["sequence_length"]
        num_parameters = sum(each.numel() for each in model.parameters())
        optimizers = [fabric.setup_optimizers(each) for each in self._optimizers(model)]
        model = fabric.setup(torch.compile(model) if self.compiled else model)
        accumulation = self._load["accumulation"]

        def step() -> Any:
            total = torch.zeros(())
            for _ in range(accumulation):
                inputs, targets = self._tokens.next()
                loss = chunked_cross_entropy(model(inputs), targets)
                fabric.backward(loss / accumulation)
                total += loss.detach() / accumulation
            fabric.clip_gradients(model, optimizers[0], max_norm=CLIP)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            return total

        return step, num_parameters

    def _optimizers(self, model: Any) -> list[Any]:
        import torch

        adamw: dict[str, Any] = {
            "lr": LR,
            "betas": BETAS,
            "eps": EPS,
            "weight_decay": WEIGHT_DECAY,
            "fused": True,
        }
        if self._load["rule"] == "adamw":
            return [torch.optim.AdamW(model.parameters(), **adamw)]
        named = dict(model.named_parameters())
        matrices = [
            each for name, each in named.items() if each.dim() == 2 and not any(t in name for t in TABLES)
        ]
        others = [each for each in named.values() if not any(each is matrix for matrix in matrices)]
        muon = torch.optim.Muon(matrices, lr=MUON_LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        return [torch.optim.AdamW(others, **adamw), muon]

    def _config(self) -> Any:
        from litgpt.config import Config

        hf = self._load["hf_config"]
        return Config(  # as those of LLaMA in litgpt/config.py
            name="race", block_size=hf["max_position_embeddings"], vocab_size=hf["vocab_size"],
            padded_vocab_size=hf["vocab_size"], n_layer=hf["num_hidden_layers"], n_embd=hf["hidden_size"],
            n_head=hf["num_attention_heads"], n_query_groups=hf["num_key_value_heads"],
            head_size=hf["head_dim"], rotary_percentage=1.0, parallel_residual=False, bias=False,
            norm_class_name="RMSNorm", norm_eps=hf["rms_norm_eps"], mlp_class_name="LLaMAMLP",
            intermediate_size=hf["intermediate_size"], rope_base=int(hf["rope_theta"]),
        )  # fmt: skip

    def describe(self) -> dict[str, str]:
        from importlib.metadata import version

        import torch

        about = {name: version(name) for name in ("litgpt", "lightning", "torch")}
        return {**about, "threads": str(torch.get_num_threads()), "compiled": str(self.compiled)}


class LitGptCompiled(LitGpt):
    """With torch.compile around the model, as `litgpt.pretrain` has it."""

    compiled = True


class Transformers(Peer):
    """LlamaForCausalLM with its own loss in DeepSpeed's engine, ZeRO-1, and DeepSpeed's own AdamW."""

    precisions = ("bf16", "fp32")

    def build(self, precision: str) -> tuple[Callable[[], Any], int]:
        import deepspeed
        import torch
        import transformers

        load = self._load
        if not torch.distributed.is_initialized():
            # It would compile, and one rank needs none.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        torch.manual_seed(0)
        keys = {**load["hf_config"], "use_cache": False, "attn_implementation": "sdpa"}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys))
        adamw = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config={
                "train_micro_batch_size_per_gpu": load["micro_sequences"],
                "gradient_accumulation_steps": load["accumulation"],
                "gradient_clipping": CLIP,
                "bf16": {"enabled": precision == "bf16"},
                "zero_optimization": {"stage": 1},
                "optimizer": {"type": "AdamW", "params": adamw},
                "steps_per_print": None,
            },
        )
        engine.train()

        def step() -> Any:
            total = torch.zeros(())
            for _ in range(load["accumulation"]):
                inputs, _ = self._tokens.next()
                loss = engine(input_ids=inputs, labels=inputs).loss
                engine.backward(loss)
                engine.step()
                total += loss.detach() / load["accumulation"]
            return total

        self._optimizer = type(engine.basic_optimizer).__name__
        return step, sum(each.numel() for each in model.parameters())

    def describe(self) -> dict[str, str]:
        from importlib.metadata import version

        import torch

        about = {name: version(name) for name in ("transformers", "deepspeed", "torch")}
        return {**about, "threads": str(torch.get_num_threads()), "optimizer": self._optimizer}


KINDS: dict[str, Any] = {
    "ours": Ours,
    "litgpt": LitGpt,
    "litgpt_compiled": LitGptCompiled,
    "transformers": Transformers,
}


def turn(contender: Any, seconds: float) -> dict[str, Any]:
    """Steps for at least so long: how long each took, and the last one's loss."""
    started, used = time.perf_counter(), time.process_time()
    step_seconds: list[float] = []
    optimizer_seconds: list[float] = []
    loss = 0.0
    while not step_seconds or time.perf_counter() < started + seconds:
        begun = time.perf_counter()
        loss = contender.step()
        step_seconds.append(time.perf_counter() - begun)
        if contender.optimizer_seconds is not None:
            optimizer_seconds.append(contender.optimizer_seconds)
    return {
        "step_seconds": step_seconds,
        "optimizer_seconds": optimizer_seconds or None,
        "loss": loss,
        "cpu_seconds": time.process_time() - used,
    }


def main() -> None:
    # Libraries print to standard output; that belongs in the log, which is standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "load":
            contender = KINDS[sys.argv[1]](command)
            answer = {name: getattr(contender, name) for name in ANSWERED}
        else:
            answer = turn(contender, command["seconds"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
