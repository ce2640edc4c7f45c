"""Factories of engines that come to little. No torch, so that their processes start quickly."""

import os
import signal
import time

from cluster.cli import UserError
from serving.checkpoints import Served
from serving.config import ServeConfig
from serving.engine.protocol import Engine, EngineInfo, EngineStats, Ticket


class Peculiar(Exception):
    """One that pickle cannot make again."""

    def __init__(self, *, detail: str) -> None:
        super().__init__(f"peculiar, in {detail}")


def refuse(config: ServeConfig, served: Served) -> Engine:
    raise UserError(f"engine.cache_tokens: {config.engine.cache_tokens} of {served.name} do not fit")


def break_peculiarly(config: ServeConfig, served: Served) -> Engine:
    raise Peculiar(detail="every detail")


def die(config: ServeConfig, served: Served) -> Engine:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def dawdle(config: ServeConfig, served: Served) -> Engine:
    print("dawdling", flush=True)
    time.sleep(600)
    raise AssertionError


class Silent:
    """An engine that takes every request and never says anything."""

    info = EngineInfo(
        engine="silent", model="silent", device="cpu", dtype="none", context_tokens=9, vocab_size=9,
        num_parameters=0, num_slots=1, most_waiting=1, weight_bytes=1, kv_bytes_per_token=1,
        flops_per_token=1, head_flops=0, attention_flops=0, details={},
    )  # fmt: skip

    def submit(self, prompt: object, sampling: object, deliver: object) -> Ticket:
        return Ticket(lambda: None)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=1, waiting=0, free_cache_tokens=0, prompt_tokens=0, generated_tokens=0, finished=0,
            cancelled=0, steps=0,
        )  # fmt: skip

    def failure(self) -> str | None:
        return None

    def close(self) -> None:
        pass


def silent(config: ServeConfig, served: Served) -> Engine:
    return Silent()
