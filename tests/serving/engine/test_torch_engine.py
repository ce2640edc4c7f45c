"""The engine on a checkpoint against transformers; requests that join, leave, overflow; draws."""

import queue
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from serving.checkpoints import Served
from serving.config import EngineConfig, ModelConfig, ServeConfig
from serving.engine import native
from serving.engine.protocol import BrokenModel, EngineFailed, Overloaded, RequestError, Sampling, Token
from serving.engine.scheduler import Span
from serving.engine.torch_engine import TorchEngine, make_torch_engine
from tests.fake_engine import Gate
from tests.reader import Reader
from tests.waiting import PATIENCE_SECONDS, wait_until

CPU_REASON = native.unsupported(torch.device("cpu"), torch.bfloat16)
compiled = pytest.mark.skipif(CPU_REASON is not None, reason=str(CPU_REASON))
in_each_tier = pytest.mark.usefixtures("tier")
VOCABULARY, CONTEXT = 512, 160


@pytest.fixture(scope="module", params=[(4, 4), (6, 2), (8, 1)], ids=["4 of 4 heads", "6 of 2", "8 of 1"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with random weights, large enough for decided opinions."""
    heads, kv_heads = request.param
    torch.manual_seed(heads)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96 if heads == 6 else 64, intermediate_size=150,
        num_hidden_layers=3, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=heads == 8, initializer_range=0.2, eos_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def engine(checkpoint: Path, **options: object) -> TorchEngine:
    defaults = {"dtype": "float32", "slots": 8, "waiting": 100, "cache_tokens": 2048, "step_tokens": 40}
    config = ServeConfig(
        model=ModelConfig(path=str(checkpoint)), engine=EngineConfig(device="cpu", **{**defaults, **options})
    )
    return make_torch_engine(config, Served(checkpoint, "tiny"))


@pytest.fixture
def exact(checkpoint: Path) -> Iterator[TorchEngine]:
    made = engine(checkpoint)
    yield made
    made.close()


def prompts(number: int, *, longest: int = 100) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(2, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(number)]


def greedy(model: LlamaForCausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    with torch.no_grad():
        found = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=num_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return found[0, len(prompt) :].tolist()


GREEDY = Sampling(max_tokens=24, temperature=0.0)


def test_greedy_output_is_transformers_token_for_token(checkpoint, exact):
    """24 prompts, so many at a time, of which a new one joins whenever one ends."""
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    short = replace(GREEDY, max_tokens=16)
    expected = {tuple(prompt): greedy(model, prompt, 16) for prompt in prompts(24)}
    for at_once in (1, 3, 8):
        with ThreadPoolExecutor(at_once) as pool:
            found = pool.map(lambda prompt: (prompt, Reader(exact, list(prompt), short).wait()), expected)
        assert dict(found) == expected, at_once
    assert exact.stats().running == exact.stats().waiting == 0


def test_requests_that_join_in_the_middle_change_nothing(checkpoint, exact):
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    readers = []
    for prompt in prompts(12, longest=120):
        readers.append(Reader(exact, prompt, replace(GREEDY, max_tokens=24)))
        time.sleep(0.003)
    for reader in readers:
        assert reader.wait() == greedy(model, reader.prompt, 24)
    assert exact.stats().free_cache_tokens == 2048


ECHO = Sampling(max_tokens=0, temperature=0.0, logprobs=True, echo=True)


@pytest.mark.parametrize("step_tokens", [9, 400])
def test_a_prompt_is_scored_as_by_transformers_beside_requests_that_decode(checkpoint, step_tokens):
    """In chunks, and in slices of rows. The last token of a prompt may come in a step by itself.

    Scores are as near to transformers in fp64 as its own in fp32 are: how near depends on the CPU's products.
    """
    made = engine(checkpoint, step_tokens=step_tokens)
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    exact = LlamaForCausalLM.from_pretrained(checkpoint).double().eval()
    decoding = [Reader(made, prompt, GREEDY) for prompt in prompts(3)]
    lengths = (1, 2, 9, 10, 73, 120, 150)
    draw = random.Random(1)
    texts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
    readers = [Reader(made, text, replace(ECHO, max_tokens=4 * (i % 2))) for i, text in enumerate(texts)]
    for i, reader in enumerate(readers):
        whole = reader.wait()
        assert whole[: len(reader.prompt)] == reader.prompt
        assert whole[len(reader.prompt) :] == (greedy(model, reader.prompt, 4) if i % 2 else [])
        with torch.no_grad():
            normed, theirs = (m(torch.tensor([whole])).logits[0].log_softmax(-1) for m in (exact, model))
        near = max(2e-5, (theirs - normed).abs().max().item())
        assert near < 1e-4
        assert reader.tokens[0].score is None
        for row, token in zip(normed[:-1].tolist(), reader.tokens[1:], strict=True):
            assert token.score.logprob == pytest.approx(row[token.id], abs=near)
            assert token.score.top_logprob == pytest.approx(max(row), abs=near)
            assert row[token.score.top_id] == pytest.approx(max(row), abs=2 * near)
        assert [token.finish for token in reader.tokens] == [None] * (len(whole) - 1) + ["length"]
    for reader in decoding:
        assert reader.wait() == greedy(model, reader.prompt, 24)
    stats = made.stats()
    assert (stats.running, stats.waiting, stats.free_cache_tokens) == (0, 0, 2048)
    assert stats.prompt_tokens == sum(len(reader.prompt) for reader in decoding + readers)
    assert stats.generated_tokens == 3 * 24 + 3 * 4 and stats.finished == 10
    made.close()


def test_an_echo_without_scores_is_the_prompt(exact):
    reader = Reader(exact, [5, 6, 7], Sampling(max_tokens=2, temperature=0.0, echo=True, ignore_eos=True))
    assert reader.wait()[:3] == [5, 6, 7] and len(reader.tokens) == 5
    assert all(token.score is None for token in reader.tokens)


def test_a_prompt_may_be_given_up_while_it_is_scored(checkpoint):
    made = engine(checkpoint, slots=1, step_tokens=2)
    gate = Gate(made)
    with gate:
        first = Reader(made, [3] * 150, ECHO)
        second = Reader(made, [3, 4], ECHO)
        gate.wait()  # its first step of 75
        first.ticket.cancel()
    assert second.wait() == [3, 4] and not first.tokens
    assert made.stats().cancelled == 1 and made.stats().free_cache_tokens == 2048
    made.close()


def test_the_compiled_decoder_is_as_exact_as_transformers_in_bf16(checkpoint, tier):
    """Both against the same weights in fp32: logits along whole texts, and the tokens that follow."""
    made = engine(checkpoint, dtype="bfloat16", step_tokens=200)
    assert made.info.details["compiled decoder"] == f"used ({tier})"
    assert made.info.details["attention"] == "the compiled decoder's own"
    low = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    exact = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).float().eval()
    readers = [Reader(made, prompt, replace(GREEDY, logprobs=True)) for prompt in prompts(20)]
    scored = [Reader(made, prompt, ECHO) for prompt in prompts(20)]
    squares = {"ours": 0.0, "transformers": 0.0}
    same = {"ours": 0, "transformers": 0}
    for reader in readers:
        ids = torch.tensor(reader.wait())
        text = torch.tensor([[*reader.prompt, *ids]])
        with torch.no_grad():
            right, theirs = (model(text).logits[0, -len(ids) - 1 : -1].float() for model in (exact, low))
        logprobs = right.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        found = {
            "ours": torch.tensor([token.score.logprob for token in reader.tokens]),
            "transformers": theirs.log_softmax(-1).gather(1, ids[:, None])[:, 0],
        }
        for name, values in found.items():
            squares[name] += (values - logprobs).square().sum().item()
        same["ours"] += int((right.argmax(-1) == ids).sum())
        same["transformers"] += int((right.argmax(-1) == theirs.argmax(-1)).sum())
    prompt_squares = {"ours": 0.0, "transformers": 0.0}
    for reader in scored:
        ids = torch.tensor([reader.wait()])
        with torch.no_grad():
            right, theirs = (
                model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                for model in (exact, low)
            )
        ours = torch.tensor([token.score.logprob for token in reader.tokens[1:]])
        prompt_squares["ours"] += (ours - right).square().sum().item()
        prompt_squares["transformers"] += (theirs - right).square().sum().item()
    made.close()
    assert squares["ours"] < 1.5 * squares["transformers"]
    assert prompt_squares["ours"] < 1.5 * prompt_squares["transformers"]
    assert same["ours"] > same["transformers"] - 10  # of 480


@in_each_tier
def test_the_compiled_decoder_does_not_depend_on_threads_or_chunks(checkpoint):
    def run(**options: object) -> list[list[int]]:
        made = engine(checkpoint, dtype="bfloat16", **options)
        readers = [Reader(made, prompt, replace(GREEDY, ignore_eos=True)) for prompt in prompts(8)]
        found = [reader.wait() for reader in readers]
        made.close()
        return found

    expected = run(threads=2, step_tokens=400)
    for num_threads in (1, 3):
        assert run(threads=num_threads, step_tokens=9) == expected, num_threads


def test_a_text_ends_at_its_end_unless_told_to_go_on(exact):
    for seed in range(200):  # one of these draws token 1 before the tenth
        sampling = Sampling(max_tokens=60, temperature=3.0, seed=seed)
        ids = Reader(exact, [5, 6], sampling).wait()
        if ids[-1] == 1 and len(ids) < 60:
            break
    reader = Reader(exact, [5, 6], sampling)
    assert reader.wait() == ids and reader.tokens[-1].finish == "stop"
    on = Reader(exact, [5, 6], replace(sampling, ignore_eos=True))
    assert on.wait()[: len(ids)] == ids and len(on.tokens) == 60 and on.tokens[-1].finish == "length"
    assert all(token.finish is None for token in on.tokens[:-1])


def test_a_seed_draws_the_same_whatever_else_runs(exact):
    sampling = Sampling(max_tokens=30, temperature=1.3, top_p=0.9, seed=11)
    alone = Reader(exact, [9, 8, 7], sampling).wait()
    others = [Reader(exact, prompt, replace(sampling, seed=None)) for prompt in prompts(5)]
    assert Reader(exact, [9, 8, 7], sampling).wait() == alone
    assert Reader(exact, [9, 8, 7], replace(sampling, seed=12)).wait() != alone
    assert len({tuple(Reader(exact, [9, 8, 7], replace(sampling, seed=None)).wait()) for _ in range(3)}) == 3
    for other in others:
        other.wait()


@compiled
def test_with_the_compiled_decoder_a_seed_s_tokens_and_scores_are_the_same_to_the_bit(checkpoint):
    """Alone, and beside requests that are sampled otherwise, with other chunks of their prompts."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"top_p": 0.5}, {}, {"temperature": 2.0, "top_p": 0.99},
        {"top_k": 9, "min_p": 0.01, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    ]  # fmt: skip
    requests = [
        (prompt, Sampling(max_tokens=12, seed=seed, logprobs=True, ignore_eos=True, **kinds[seed % 5]))
        for seed, prompt in enumerate(prompts(16))
    ]

    def run(concurrency: int, **options: int) -> list[list[Token]]:
        made = engine(checkpoint, dtype="bfloat16", **options)
        found = []
        for start in range(0, len(requests), concurrency):
            readers = [Reader(made, *request) for request in requests[start : start + concurrency]]
            found += [reader.wait() and reader.tokens for reader in readers]
        made.close()
        return found

    assert run(1, step_tokens=400) == run(16, step_tokens=9)


@pytest.mark.parametrize("seeds", [(3, -3), (0, 1), (0, -1), (2**63 - 1, 1 - 2**63), (-1, -2)])
def test_different_seeds_draw_differently(exact, seeds):
    sampling = Sampling(max_tokens=30, temperature=2.0, ignore_eos=True)
    first, second = (Reader(exact, [5, 6], replace(sampling, seed=seed)).wait() for seed in seeds)
    assert first != second


def test_of_the_tokens_of_a_step_first_ones_are_told_first(exact):
    told: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()  # who, and in which step
    gate = Gate(exact)

    def submit(name: str, max_tokens: int) -> None:
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        exact.submit([5, 6, 7], sampling, lambda tokens: told.put((name, exact.stats().steps)))

    def hear() -> tuple[str, int]:
        return told.get(timeout=PATIENCE_SECONDS)

    submit("running", 60)
    with gate:
        gate.wait()
        submit("new", 1)
    order = [hear()]
    while order[-1][0] != "new":
        order.append(hear())
    order.append(hear())
    (_, before), new, after = order[-3:]
    assert before < new[1] and after == ("running", new[1])


def test_a_cancelled_request_frees_its_slot_within_a_step_and_hears_nothing_more(checkpoint):
    made = engine(checkpoint, slots=1)
    gate = Gate(made)
    with gate:
        first = Reader(made, [3, 4], Sampling(max_tokens=150, ignore_eos=True))
        second = Reader(made, [5, 6], Sampling(max_tokens=3, ignore_eos=True))
        gate.wait()
    wait_until(lambda: first.tokens)
    with gate:
        gate.wait()
        steps, heard = made.stats().steps, len(first.tokens)
        first.ticket.cancel()
        first.ticket.cancel()
    second.wait()
    assert made.stats().steps == steps + 1 + 3  # the one under way, and three of the second
    stats = made.stats()
    assert (stats.cancelled, stats.running, stats.free_cache_tokens) == (1, 0, 2048)
    assert len(first.tokens) == heard < 150 and first.tokens[-1].finish is None
    made.close()


@pytest.mark.parametrize("decoder", ["torch", pytest.param("compiled", marks=compiled)])
def test_a_cancel_in_the_middle_of_a_step_changes_nothing_for_the_others(checkpoint, decoder, monkeypatch):
    """After the step has been planned, before the decoder has read which blocks it writes to."""
    made = engine(checkpoint, dtype="bfloat16" if decoder == "compiled" else "float32", slots=6)
    assert made.info.details["compiled decoder"].startswith("used (") == (decoder == "compiled")
    texts = prompts(6)
    alone = [Reader(made, text, GREEDY).wait() for text in texts]
    readers: list[Reader] = []
    forward = made._decoder.forward

    def interrupted(spans: Sequence[Span]) -> torch.Tensor:
        if readers and readers[first].tokens:
            for reader in readers[:first]:
                reader.ticket.cancel()
        return forward(spans)

    monkeypatch.setattr(made._decoder, "forward", interrupted)
    gate = Gate(made)
    for first in range(4):
        with gate:
            readers[:] = [Reader(made, text, GREEDY) for text in [*texts[first:], *texts[:first]]]
        expected = [*alone[first:], *alone[:first]]
        assert [reader.wait() for reader in readers[first:]] == expected[first:]
        wait_until(lambda: made.stats().running == 0)
    stats = made.stats()
    assert stats.free_cache_tokens == 2048 and made.failure() is None
    assert stats.cancelled + stats.finished == 6 + 4 * 6 and stats.cancelled > 0
    made.close()


def test_a_full_queue_refuses_and_recovers(checkpoint):
    made = engine(checkpoint, slots=2, waiting=3)
    with Gate(made):
        readers = [Reader(made, [3, 4], Sampling(max_tokens=100, ignore_eos=True)) for _ in range(5)]
        with pytest.raises(Overloaded, match="requests are waiting") as refused:
            Reader(made, [3, 4], Sampling(max_tokens=100, ignore_eos=True))
    assert refused.value.retry_after_seconds >= 1
    for reader in readers:
        assert len(reader.wait()) == 100
    Reader(made, [3, 4], GREEDY).wait()
    made.close()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 5, "prompt: is empty"),
        ([1, VOCABULARY], 5, r"prompt: token ids must lie in \[0, 512\)"),
        ([-1], 5, "prompt: token ids"),
        ([1], 0, "max_tokens: must be at least 1, or 0 to echo the prompt alone"),
        ([1] * 100, CONTEXT - 99, "context length is 160 tokens, but 100 of prompt and 61 of max_tokens"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(exact, prompt, max_tokens, message):
    with pytest.raises(RequestError, match=message):
        Reader(exact, prompt, Sampling(max_tokens=max_tokens))


def test_the_longest_request_that_fits_is_served(exact):
    assert len(Reader(exact, [2] * 100, Sampling(max_tokens=CONTEXT - 100, ignore_eos=True)).wait()) == 60


def test_a_broken_engine_says_so_to_everyone(exact, monkeypatch, capfd):
    def fail(spans: object) -> None:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(exact._decoder, "forward", fail)
    reader = Reader(exact, [3], GREEDY)
    reader.wait()
    assert "RuntimeError: out of memory, say" in str(reader.error)
    assert "out of memory" in str(exact.failure())
    with pytest.raises(EngineFailed, match="out of memory"):
        Reader(exact, [3], GREEDY)
    assert "Traceback" in capfd.readouterr().err


@pytest.fixture(params=["torch", pytest.param("compiled", marks=compiled)])
def partly_broken(request, checkpoint, tmp_path) -> Iterator[TorchEngine]:
    """An engine whose model knows one token, BAD, by an embedding of NaN."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = float("nan")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().nan_to_num(0.0).clone())
    model.save_pretrained(tmp_path)
    dtype = "bfloat16" if request.param == "compiled" else "float32"
    made = engine(tmp_path, compiled=request.param == "compiled", dtype=dtype, slots=4, cache_tokens=256)
    assert made.info.details["compiled decoder"].startswith("used (") == (request.param == "compiled")
    yield made
    made.close()


BAD = 7


def test_a_request_whose_logits_are_not_numbers_ends_and_leaves_no_trace(partly_broken):
    """Its keys and values are NaN, in blocks that later requests get, also where it left before its end."""
    good = Sampling(max_tokens=20, temperature=0.0, ignore_eos=True)
    before = Reader(partly_broken, [3, 4, 5], good).wait()
    for _ in range(3):
        beside = Reader(partly_broken, [3, 4, 5], good)
        bad = [Reader(partly_broken, [BAD] * 40, good) for _ in range(3)]
        for reader in bad:
            reader.wait()
            assert isinstance(reader.error, BrokenModel) and reader.tokens == []
        assert beside.wait() == before and beside.error is None
        long = Reader(partly_broken, [BAD] * 120, good)  # three steps
        steps = partly_broken.stats().steps
        wait_until(lambda steps=steps: partly_broken.stats().steps > steps)
        long.ticket.cancel()
    readers = [Reader(partly_broken, [3, 4, 5], good) for _ in range(4)]
    assert [reader.wait() for reader in readers] == [before] * 4
    assert partly_broken.failure() is None and partly_broken.stats().running == 0


def test_closing_ends_what_runs(checkpoint):
    made = engine(checkpoint)
    gate = Gate(made)
    with gate, ThreadPoolExecutor(1) as pool:
        reader = Reader(made, [3], Sampling(max_tokens=150, ignore_eos=True))
        gate.wait()
        closing = pool.submit(made.close)  # waits for the step that is under way
        wait_until(lambda: made._closed)
        gate.release()
        closing.result()
    reader.wait()
    assert reader.error is not None and "closed" in str(reader.error)
