"""An engine in a process of its own: it answers and refuses as one in this process does; what ends it."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from cluster.cli import RunError, UserError
from serving.checkpoints import Served
from serving.config import ServeConfig, load
from serving.engine.process import EngineProcess, make_engine
from serving.engine.protocol import (
    BrokenModel,
    Engine,
    EngineFailed,
    Overloaded,
    RequestError,
    Sampling,
    Token,
)
from tests import factories, fake_engine
from tests.commands import ROOT
from tests.fake_engine import FAILING, VOCABULARY, idle
from tests.reader import Reader
from tests.waiting import PATIENCE_SECONDS, wait_until
from training.model.shapes import LlamaShape, to_hf_config

pytestmark = pytest.mark.stack
SERVED = Served(None, "counting")
SLOTS, WAITING = 2, 3
DIVERGED = 14
TINY = LlamaShape(
    vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn_size=64
)


def keys(*changes: str) -> ServeConfig:
    return load(dotlist=["model.weights=random", "model.shape=llama-5m", *changes])


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file: while it is there, no step of `counting` ends."""
    return tmp_path_factory.mktemp("engine") / "hold"


@contextmanager
def held(hold: Path) -> Iterator[None]:
    hold.touch()
    try:
        yield
    finally:
        hold.unlink()


@pytest.fixture(scope="module")
def counting(hold: Path) -> Iterator[EngineProcess]:
    """5 ms a token; what follows the token DIVERGED is no number."""
    factory = partial(fake_engine.make, step_seconds=0.005, nan_from=DIVERGED, hold=hold)
    config = keys(f"engine.slots={SLOTS}", f"engine.waiting={WAITING}")
    made = EngineProcess(factory, config, SERVED)
    yield made
    made.close()


def processes() -> list[psutil.Process]:
    """Those of this process's engines, each below its guard. Ray's replicas have others, deeper down."""
    found = []
    for guard in psutil.Process().children():
        with suppress(psutil.Error):  # it has just ended
            found += [one for one in guard.children() if "serving.engine.process" in one.cmdline()]
    return found


def test_tokens_and_scores_are_those_of_the_engine_in_this_process(tmp_path):
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(to_hf_config(TINY, dtype="float32")))
    config = keys(f"model.shape={shape}", "engine.dtype=float32", "engine.device=cpu", "engine.threads=1")
    asked = [
        Sampling(max_tokens=20, temperature=0.0),
        Sampling(max_tokens=20, seed=5, logprobs=True),
        Sampling(max_tokens=3, temperature=0.0, logprobs=True, echo=True),
    ]

    def answers(engine: Engine) -> list[Reader]:
        found = []
        for sampling in asked:
            found.append(Reader(engine, [7, 8, 9], sampling))
            found[-1].wait()
        return found

    direct, beside = make_engine(config, SERVED), EngineProcess(make_engine, config, SERVED)
    assert beside.info == direct.info
    for ours, theirs in zip(answers(beside), answers(direct), strict=True):
        assert ours.tokens == theirs.tokens and ours.error is None
    assert ours.tokens[1].score is not None and len(ours.tokens) == 6
    assert beside.stats() == direct.stats()
    direct.close()
    [process] = processes()
    process.suspend()  # else it might be done before it is closed
    reader = Reader(beside, [7], Sampling(max_tokens=1900, ignore_eos=True))
    beside.close()
    reader.wait()
    assert "closed" in str(reader.error) and processes() == []
    with pytest.raises(EngineFailed, match="closed"):
        Reader(beside, [7], asked[0])


def test_what_is_refused_is_refused_at_once_and_what_is_cancelled_frees_its_slot(counting, hold):
    with pytest.raises(RequestError, match="prompt: token ids"):
        Reader(counting, [VOCABULARY], Sampling(max_tokens=1))
    with pytest.raises(RequestError, match="2 of prompt and"):
        Reader(counting, [1, 2], Sampling(max_tokens=10_000))
    with held(hold):
        readers = [Reader(counting, [20], Sampling(max_tokens=400)) for _ in range(SLOTS + WAITING)]
        with pytest.raises(Overloaded, match="3 requests are waiting") as refused:
            Reader(counting, [20], Sampling(max_tokens=1))
        assert refused.value.retry_after_seconds >= 1
        for reader in readers:
            reader.ticket.cancel()
    late = Reader(counting, [20], Sampling(max_tokens=2))
    assert late.wait() == [21, 22]
    assert idle(counting) and counting.stats().cancelled == len(readers)
    assert all(reader.error is None and reader.tokens == [] for reader in readers)


def test_nothing_is_delivered_once_cancel_has_returned(counting):
    """A step delivers to `blocking` before `other`, which is cancelled in between by another thread."""
    inside, cancelled = threading.Event(), threading.Event()
    other = Reader(counting, [20], Sampling(max_tokens=400))

    def block(arrived: Sequence[Token] | EngineFailed) -> None:
        if len(other.tokens) > 3:
            inside.set()
            cancelled.wait(0.2)  # in vain: until this returns, nobody else has the engine's lock

    blocking = counting.submit([20], Sampling(max_tokens=400), block)
    assert inside.wait(PATIENCE_SECONDS)
    other.ticket.cancel()
    heard = len(other.tokens)
    cancelled.set()
    blocking.cancel()
    assert idle(counting) and len(other.tokens) == heard


def test_logits_that_are_not_numbers_are_an_error_of_their_request_alone(counting):
    broken, sound = (Reader(counting, [token], Sampling(max_tokens=9)) for token in (DIVERGED - 2, 20))
    assert broken.wait() == [DIVERGED - 1, DIVERGED] and isinstance(broken.error, BrokenModel)
    assert len(sound.wait()) == 9 and counting.failure() is None


def test_an_engine_that_fails_is_started_again(counting, hold, capfd):
    [process] = processes()
    with held(hold):
        failing = Reader(counting, FAILING, Sampling(max_tokens=9))
        other = Reader(counting, [20], Sampling(max_tokens=400))
    failing.wait(), other.wait()
    assert len(failing.tokens) == 3 and "an unlucky number" in str(failing.error)
    assert 0 < len(other.tokens) <= 3 and "an unlucky number" in str(other.error)
    with held(hold):  # these wait for the next process
        waiting = [Reader(counting, [20], Sampling(max_tokens=3)) for _ in range(SLOTS + WAITING)]
        with pytest.raises(Overloaded):
            Reader(counting, [20], Sampling(max_tokens=3))
        stats = counting.stats()
        assert counting.failure() is None and stats.running + stats.waiting == len(waiting)
    assert [reader.wait() for reader in waiting] == [[21, 22, 23]] * len(waiting)
    assert counting.stats().finished == len(waiting) and process not in processes()
    assert "RuntimeError: an unlucky number" in capfd.readouterr().err  # it has this process's stderr


def test_one_that_cannot_be_started_again_has_failed(counting, hold, capfd):
    [process] = processes()
    with held(hold), held(hold.with_suffix(".making")):
        reader = Reader(counting, [20], Sampling(max_tokens=400))
        process.kill()
        reader.wait()
        late = Reader(counting, [20], Sampling(max_tokens=3))
        wait_until(lambda: [one for one in processes() if one != process])[0].kill()
        late.wait()
    assert "was killed by signal 9 (SIGKILL); " in str(reader.error)
    assert "lower engine.cache_tokens. Send the request again" in str(reader.error)
    assert "cannot be started again: RunError: " in str(late.error)
    assert "killed by signal 9" in str(counting.failure()) and counting.stats().waiting == 0
    with pytest.raises(EngineFailed, match="cannot be started again"):
        Reader(counting, [20], Sampling(max_tokens=3))
    assert processes() == []
    capfd.readouterr()


def test_nor_is_one_that_dies_before_it_has_delivered_anything():
    silent = EngineProcess(factories.silent, keys(), SERVED)
    assert silent.stats().running == 1
    reader = Reader(silent, [1], Sampling(max_tokens=3))
    processes()[0].send_signal(signal.SIGSEGV)
    reader.wait()
    assert str(reader.error) == silent.failure() == "the engine's process was killed by signal 11 (SIGSEGV)"
    assert processes() == []
    silent.close()


def test_an_engine_that_cannot_be_made_says_why_as_it_would_in_this_process(capfd):
    with pytest.raises(UserError, match=r"^engine.cache_tokens: 7000 of counting do not fit$"):
        EngineProcess(factories.refuse, keys("engine.cache_tokens=7000"), SERVED)
    with pytest.raises(RuntimeError, match=r"^Peculiar: peculiar, in every detail$"):
        EngineProcess(factories.break_peculiarly, keys(), SERVED)
    with pytest.raises(RunError, match=r"killed by signal 9 .*cache_tokens.*, while it made the engine$"):
        EngineProcess(factories.die, keys(), SERVED)
    assert processes() == []
    assert "in break_peculiarly" in capfd.readouterr().err


PARENT = """
from serving.checkpoints import Served
from serving.config import load
from serving.engine.process import EngineProcess
from tests import factories
config = load(dotlist=["model.weights=random", "model.shape=llama-5m"])
EngineProcess(factories.dawdle, config, Served(None, "counting"))
"""


def test_it_ends_with_its_parent_even_while_it_makes_the_engine():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "dawdling\n"
    below = psutil.Process(parent.pid).children(recursive=True)
    assert len(below) == 2  # the engine's process and its guard (cluster/process.py)
    parent.kill()
    parent.communicate()
    assert psutil.wait_procs(below, timeout=PATIENCE_SECONDS)[1] == []
