"""Our engine: continuous batching over `serving.engine.decoder` or, on a CPU that can, the compiled decoder.

One thread runs the steps and delivers tokens; any thread hands in requests and cancels them. One lock guards
the scheduler, the counts and deliveries. It is not held while the model runs: the spans of a step carry all
that a cancel can change.
"""

import math
import random
import threading
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from cluster.cli import UserError
from optim.precision import compute_dtype, product_dtype
from serving.checkpoints import Served, eos_ids
from serving.config import EngineConfig, ModelConfig, ServeConfig
from serving.engine import native
from serving.engine.adjust import adjusted
from serving.engine.decoder import AheadDecoder, Chosen, StepDecoder, TorchDecoder, attention_kernel
from serving.engine.memory import says_what_does_not_fit
from serving.engine.protocol import (
    BrokenModel,
    Deliver,
    EngineFailed,
    EngineInfo,
    EngineStats,
    Finish,
    Sampling,
    Score,
    Ticket,
    Token,
    admit,
    check,
)
from serving.engine.sampling import BROKEN, choose, score
from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Scheduler, Span
from training.model import shapes
from training.model.llama import Llama, initialize, load_hf, widen_products
from training.model.shapes import LlamaShape


@dataclass(frozen=True)
class _Step:
    """A step that has begun: its spans, those of them that get a token, and what waits for these."""

    spans: list[Span]
    sampled: list[Span]
    chosen: Chosen


@dataclass(eq=False)
class _Running(ScheduledRequest):
    """A request, its sampling and where to deliver; `scores` are of its prompt's tokens after the first."""

    sampling: Sampling = field(kw_only=True)
    deliver: Deliver = field(kw_only=True)
    chance: random.Random = field(kw_only=True)
    scores: list[Score] = field(default_factory=list)

    def prompt(self) -> list[Token]:
        """All of the prompt, to be echoed; if no token is to follow, its last one ends the request."""
        scores = [None, *self.scores] if self.scored else [None] * self.prompt_tokens
        tokens = [Token(token, found, None) for token, found in zip(self.tokens, scores, strict=True)]
        if self.prompt_tokens == self.most_tokens:
            tokens[-1] = tokens[-1]._replace(finish="length")
        return tokens

    def finish(self, eos_ids: Collection[int]) -> Finish | None:
        """Of its newest token."""
        last = self.tokens[-1]
        if last in self.sampling.stop_ids or (last in eos_ids and not self.sampling.ignore_eos):
            return "stop"
        return "length" if len(self.tokens) == self.most_tokens else None


class TorchEngine:
    """See `serving.engine.protocol.Engine`.

    Args:
        decoder: runs the model; called from the engine's thread alone.
        scheduler: its cache is the decoder's.
        ahead: the decoder, if a step may begin before the last one's tokens are known.
        eos_ids: tokens that end a text.
    """

    def __init__(
        self,
        decoder: StepDecoder,
        scheduler: Scheduler,
        *,
        info: EngineInfo,
        eos_ids: Sequence[int],
        num_threads: int | None = None,
        ahead: AheadDecoder | None = None,
    ) -> None:
        self._decoder, self._scheduler, self._info = decoder, scheduler, info
        self._ahead = ahead
        self._next: _Step | None = None  # begun ahead
        self._eos_ids = frozenset(eos_ids)
        self._num_threads = num_threads
        self._lock = threading.Condition()
        self._closed = False
        self._failure: str | None = None
        counted = ("prompt_tokens", "generated_tokens", "finished", "cancelled", "steps")
        self._counts = dict.fromkeys(counted, 0)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._info

    def submit(self, prompt: Sequence[int], sampling: Sampling, deliver: Deliver) -> Ticket:
        """See `Engine`. A request must fit the context and the cache with all of its `max_tokens`."""
        check(prompt, sampling, self._info)
        request = _Running(
            list(prompt),
            most_tokens=len(prompt) + sampling.max_tokens,
            scored=sampling.echo and sampling.logprobs,
            sampling=sampling,
            deliver=deliver,
            # As text: of an integer Python takes the absolute value, so that 3 and -3 would draw alike.
            chance=random.Random(None if sampling.seed is None else str(sampling.seed)),
        )
        with self._lock:
            if self._closed or self._failure:
                raise EngineFailed(self._failure or "the engine is closed")
            scheduler = self._scheduler
            admit(len(scheduler.running) + len(scheduler.waiting), self._info)
            scheduler.add(request)
            self._lock.notify()
        return Ticket(lambda: self._cancel(request))

    def stats(self) -> EngineStats:
        with self._lock:
            return EngineStats(
                running=len(self._scheduler.running),
                waiting=len(self._scheduler.waiting),
                free_cache_tokens=self._scheduler.num_free_blocks * BLOCK_TOKENS,
                **self._counts,
            )

    def failure(self) -> str | None:
        with self._lock:
            return self._failure

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()

    def _cancel(self, request: _Running) -> None:
        with self._lock:
            if self._scheduler.remove(request):
                self._counts["cancelled"] += 1

    def _work(self) -> None:
        if self._num_threads:
            torch.set_num_threads(self._num_threads)  # OpenMP keeps this by thread
        try:
            while self._step():
                pass
            reason = "the engine was closed"
        except Exception as error:
            reason = f"the engine failed: {type(error).__name__}: {error}"
            traceback.print_exc()
        with self._lock:
            self._failure = reason
            for request in [*self._scheduler.running, *self._scheduler.waiting]:
                try:
                    self._tell(request, EngineFailed(reason))  # type: ignore[arg-type]
                except Exception:  # one client's; the others must still be told
                    traceback.print_exc()

    def _step(self) -> bool:
        """End one step, after a wait if there is nothing to do. False once the engine is closed."""
        step, self._next = self._next or self._begin(), None
        if step is None:
            return False
        # So the GPU computes while the host delivers; but a penalty counts tokens that the host must know.
        if self._ahead is not None and not any(_adjusts(span, after=1) for span in step.sampled):
            self._next = self._begin(wait=False)
        drawn = {span.request: found for span, *found in zip(step.sampled, *step.chosen(), strict=True)}
        with self._lock:
            self._counts["steps"] += 1
            for span in reversed(step.spans):  # prompts come last in a step: deliver first tokens first
                request: _Running = span.request  # type: ignore[assignment]
                ends_prompt = span.stop == request.prompt_tokens
                self._counts["prompt_tokens"] += span.stop if ends_prompt else 0
                # Else it was cancelled while the step ran.
                if request.is_running and (
                    outcome := self._outcome(request, drawn.get(request), ends_prompt=ends_prompt)
                ):
                    self._tell(request, outcome)
        return True

    def _begin(self, *, wait: bool = True) -> _Step | None:
        """The next step, after a wait if there is nothing to do. None once the engine is closed.

        wait: if it is False, None instead of a wait. The last step may still run.
        """
        with self._lock:
            while not self._closed and not (spans := self._scheduler.next_step()) and wait:
                self._lock.wait()
            if self._closed or not spans:
                return None
        logits = self._decoder.forward(spans)
        sampled = [span for span in spans if span.samples]
        chosen = self._choose(sampled, logits)
        self._score_prompts(spans)
        return _Step(spans, sampled, chosen)

    def _choose(self, sampled: Sequence[Span], logits: torch.Tensor) -> Chosen:
        requests: list[_Running] = [span.request for span in sampled]  # type: ignore[misc]
        samplings, chances = [r.sampling for r in requests], [r.chance for r in requests]
        changed = {
            row: adjusted(logits[row], r.sampling, r.tokens, r.prompt_tokens, eos_ids=self._eos_ids)
            for row, (span, r) in enumerate(zip(sampled, requests, strict=True))
            if _adjusts(span)
        }
        if self._ahead is not None:
            return self._ahead.choose(samplings, chances, changed)
        found = choose(logits, samplings, chances, changed)
        return lambda: found

    def _outcome(
        self, request: _Running, drawn: list[Any] | None, *, ends_prompt: bool
    ) -> list[Token] | BrokenModel:
        """What a step gives a request: no token if it was part of a prompt. drawn: a token's id and score."""
        tokens: list[Token] = []
        if ends_prompt:
            if not all(math.isfinite(each.logprob) for each in request.scores):
                return BrokenModel()
            if request.sampling.echo:
                tokens += request.prompt()
        if drawn is not None:
            token, found = drawn
            if token == BROKEN:
                return BrokenModel()
            request.tokens.append(token)
            self._counts["generated_tokens"] += 1
            tokens.append(Token(token, found, request.finish(self._eos_ids)))
        return tokens

    def _tell(self, request: _Running, outcome: list[Token] | EngineFailed) -> None:
        """Deliver, under the lock, so that nothing is delivered to a cancelled request."""
        if isinstance(outcome, EngineFailed):
            self._scheduler.remove(request)
        elif outcome[-1].finish is not None:
            self._scheduler.remove(request)
            self._counts["finished"] += 1
        request.deliver(outcome)

    def _score_prompts(self, spans: Sequence[Span]) -> None:
        """Give each request that is scored the scores of its prompt from this step."""
        scored = [span for span in spans if span.num_scored]
        if not scored:
            return
        following = [t for s in scored for t in s.request.tokens[s.start + 1 : s.start + 1 + s.num_scored]]
        ids, found = torch.tensor(following), list[Score]()
        most = max(span.request.sampling.num_likeliest for span in scored)  # type: ignore[attr-defined]
        for logits in self._decoder.scored():
            of_these = ids[len(found) :][: len(logits)].to(logits.device)
            found += score(logits, of_these, num_likeliest=most)
        rest = iter(found)
        for span in scored:
            span.request.scores += islice(rest, span.num_scored)  # type: ignore[attr-defined]


def _adjusts(span: Span, *, after: int = 0) -> bool:
    """Whether the token that follows the span, or the one `after` more, is drawn from other logits."""
    request: _Running = span.request  # type: ignore[assignment]
    return request.sampling.adjusts(span.stop - request.prompt_tokens + after)


@says_what_does_not_fit
def make_torch_engine(config: ServeConfig, served: Served) -> TorchEngine:
    """The engine that the configuration asks for.

    Raises:
        UserError: the checkpoint cannot be read, the device is missing, or its memory too small.
    """
    options = config.engine
    device = find_device(options.device)
    num_threads = options.threads or torch.get_num_threads()
    numbers = arithmetic(options, device)
    try:
        model, ends = _load(config.model, served.directory, dtype=numbers.dtype, device=device)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    shape = model.shape
    step_tokens = options.step_tokens_on(device.type)
    scheduler = Scheduler(slots=options.slots, cache_tokens=options.cache_tokens, step_tokens=step_tokens)
    cache_tokens = scheduler.num_blocks * BLOCK_TOKENS
    context = min(options.context_tokens or shape.max_positions, shape.max_positions, cache_tokens)
    size = {"num_blocks": scheduler.num_blocks, "slots": options.slots, "context_tokens": context}
    decoder: StepDecoder | None = None
    ahead, kernels, attention = None, "", "the compiled decoder's own"
    if numbers.not_compiled is None:
        try:
            decoder = native.NativeDecoder(model, step_tokens=step_tokens, num_threads=num_threads, **size)
        except ValueError as error:
            numbers = arithmetic(options, device, not_compiled=str(error))
    if decoder is None:
        model = model.to(device, numbers.dtype)
        widen_products(model)
        graphs = device.type == "cuda" and options.compiled
        ahead, kernels = (
            _gpu_decoder(model, size, step_tokens) if graphs else (None, "not used: engine.compiled=false")
        )
        decoder = ahead or TorchDecoder(model, graphs=graphs, **size)
        attention = "Triton kernels over pages" if ahead else attention_kernel(model)
    info = describe(shape, options, numbers, device=device.type, name=served.name, context=context)
    on_cpu = device.type == "cpu"
    gpu = {} if on_cpu else {"gpu": torch.cuda.get_device_name(), "decoder of Triton kernels": kernels}
    about = {"threads": str(num_threads)} if on_cpu else gpu
    info.details.update(about | {"compiled decoder": numbers.compiled_decoder, "attention": attention})
    threads = num_threads if on_cpu else None
    return TorchEngine(decoder, scheduler, info=info, eos_ids=ends, num_threads=threads, ahead=ahead)


def _gpu_decoder(model: Llama, size: dict[str, Any], step_tokens: int) -> tuple[AheadDecoder | None, str]:
    """The decoder of Triton kernels, and "used"; or None, and why there is none for this GPU and model."""
    from serving.engine.gpu import decoder  # it imports Triton

    weight = model.model.norm.weight
    reason = decoder.unsupported(weight.device, weight.dtype, model.shape)
    if reason is not None:
        return None, f"not used: {reason}"
    return decoder.GpuDecoder(model, step_tokens=step_tokens, **size), "used"


@dataclass(frozen=True)
class Arithmetic:
    """What an engine computes in.

    Attributes:
        dtype: of activations and cache.
        weights: of the matrices in memory; wider than `dtype` on a CPU that would widen them in each step.
        not_compiled: why the compiled decoder is not used, or None.
    """

    dtype: torch.dtype
    weights: torch.dtype
    not_compiled: str | None

    @property
    def compiled_decoder(self) -> str:
        """Such as "used (AVX2)", or why it is not used."""
        return f"not used: {self.not_compiled}" if self.not_compiled else f"used ({native.tier()})"


def arithmetic(options: EngineConfig, device: torch.device, *, not_compiled: str | None = None) -> Arithmetic:
    """What `engine.dtype` means on this device. `not_compiled`: a reason against the compiled decoder."""
    named = None if options.dtype == "auto" else getattr(torch, options.dtype)
    reason = not_compiled or (None if options.compiled else "engine.compiled=false")
    reason = reason or native.unsupported(device, named or torch.bfloat16)
    if reason is None:
        return Arithmetic(named or torch.bfloat16, named or torch.bfloat16, None)
    dtype = named or compute_dtype(device)
    return Arithmetic(dtype, product_dtype(dtype, device), reason)


def describe(
    shape: LlamaShape, options: EngineConfig, numbers: Arithmetic, *, device: str, name: str, context: int
) -> EngineInfo:
    """The info of an engine of this shape: what it reads and computes."""
    return EngineInfo(
        engine="torch",
        model=name,
        device=device,
        dtype=str(numbers.dtype).removeprefix("torch."),
        context_tokens=context,
        vocab_size=shape.vocab_size,
        num_parameters=shape.num_parameters,
        num_slots=options.slots,
        most_waiting=options.waiting,
        weight_bytes=numbers.weights.itemsize * shape.num_matmul_parameters,
        kv_bytes_per_token=shape.kv_bytes_per_token(numbers.dtype.itemsize),
        flops_per_token=2 * shape.num_matmul_parameters,
        head_flops=2 * shape.vocab_size * shape.hidden_size,
        last_token_flops=shape.last_token_flops,
        attention_flops=4 * shape.num_layers * shape.num_heads * shape.head_dim,
        last_attention_flops=4 * shape.num_heads * shape.head_dim,
        details={},
    )


def find_device(name: str) -> torch.device:
    """The device that `engine.device` names. Raises `UserError`: it asks for a GPU, and there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device: 'cuda', but torch finds no GPU here; use engine.device=cpu")
    return torch.device(name)


def _load(
    config: ModelConfig, directory: Path | None, *, dtype: torch.dtype, device: torch.device
) -> tuple[Llama, list[int]]:
    """The model and the ids of the tokens that end a text. Random weights are drawn on `device`."""
    if directory is not None:
        return load_hf(directory, dtype=dtype), eos_ids(directory)
    assert config.shape is not None
    shape = shapes.resolve(config.shape)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # else 1.4B weights would first take twice their memory
    try:
        with device:
            model = Llama(shape)
    finally:
        torch.set_default_dtype(default)
    initialize(model, seed=config.seed)
    return model, []
