"""The endpoint before clients that others wrote, a schema fuzzer, damaged bodies and a crowd.

    python -m tests.lab.serve_clients --python PROGRAM --node FOLDER [--output FILE]

PROGRAM is an interpreter whose environment has `openai`, `litellm` and `schemathesis`; FOLDER has a
node_modules with `openai`. lm-eval is that of the project's environment (the extra `eval`). The server is
ours on uvicorn, with 32 slots, 64 that may wait, and an engine that counts, so that answers are known. It is
no model and no Ray: tests/serving/test_deployment.py has these.
Prints each result, then one JSON object; exits with 1 if a check fails.
"""

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from cluster import cli, files, process
from cluster.cli import RunError
from cluster.measure import benchmark
from cluster.record import provenance
from serving.bench.latency import percentile
from serving.endpoint.chat import ChatTemplate
from tests.fake_engine import VOCABULARY, counting_engine, idle
from tests.lab.referees import save_tokenizer
from tests.serving.endpoint.server import Server

WHAT = "serve_clients"
SLOTS, WAITING = 32, 64
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
FOLDER = Path(__file__).with_name("clients")  # the programs that the clients' own interpreters run
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
CLIENT_SECONDS = 300.0
FUZZ_SECONDS = 1500.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.serve_clients", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--python", required=True, help="with openai, litellm and schemathesis")
    parser.add_argument("--node", type=Path, required=True, help="folder whose node_modules has openai")
    parser.add_argument("--cases", type=int, default=2500, help="of schemathesis, at least")
    parser.add_argument("--bodies", type=int, default=6000, help="damaged ones")
    parser.add_argument("--clients", type=int, default=1000, help="at once")
    parser.add_argument("--output", type=Path, help=f"default: tests/baselines/<hardware>_{WHAT}.json")
    options = parser.parse_args(arguments)

    def body() -> None:
        output = benchmark.prepare_output(options.output, WHAT)
        places = {options.python: "PROGRAM", str(options.node): "FOLDER"}
        command = [places.get(word, word) for word in sys.argv]
        about = provenance.collect(command=command, data_fingerprint=None)  # of the code that is loaded now
        result = measure(options)
        files.write_json(output, {**result, "provenance": about})
        print(f"written to {output}\n{json.dumps(result)}")

    return cli.run(body)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, one after the other. Raises `RunError`: a check failed."""
    engine = counting_engine(slots=SLOTS, waiting=WAITING, step_seconds=0.0)
    server = Server(engine, template=ChatTemplate(TEMPLATE, {}))
    python, url = options.python, server.url
    try:
        load = benchmark.load_average()
        found: dict[str, Any] = {"load_average_before": load, "slots": SLOTS, "waiting": WAITING}
        steps: dict[str, Callable[[], Any]] = {
            "openai_python": lambda: client([python, str(FOLDER / "openai_client.py"), url]),
            "openai_npm": lambda: client(
                ["node", str(FOLDER / "openai_client.mjs"), url, str(options.node.absolute())]
            ),
            "litellm": lambda: client([python, str(FOLDER / "litellm_client.py"), url]),
            "lm_eval": lambda: lm_eval(url),
            "schemathesis": lambda: fuzz(python, url, least_cases=options.cases),
            "damaged_bodies": lambda: asyncio.run(damaged(url, options.bodies)),
            "crowd": lambda: asyncio.run(crowd(url, options.clients)),
        }
        for name, step in steps.items():
            began = time.monotonic()
            try:
                found[name] = step()
            except (TimeoutError, aiohttp.ClientError) as error:
                raise RunError(f"{name}: {type(error).__name__} {error}".rstrip()) from error
            if not idle(engine) or engine.failure():
                raise RunError(f"{name}: the engine still holds a slot, or failed: {engine.failure()}")
            print(f"{name}: {found[name]} ({time.monotonic() - began:.0f} s)", flush=True)
        return found
    finally:
        server.close()


def client(command: Sequence[str]) -> dict[str, Any]:
    """What a client's program printed. Raises `RunError`: it failed."""
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_COLOR": "1"}
    done = run(command, seconds=CLIENT_SECONDS, env=environment)
    if done.returncode:
        raise RunError(f"{' '.join(command[:2])} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(command: Sequence[str], *, seconds: float, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end. Raises `RunError`: it is not there, or takes longer than `seconds`."""
    try:
        return process.run(command, timeout=seconds, **options)
    except FileNotFoundError as error:
        raise RunError(f"{command[0]}: no such program; see this command's --help") from error
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{' '.join(command[:2])} has not ended within {seconds:g} s") from error


def lm_eval(url: str) -> dict[str, Any]:
    """lm-eval's clients, which need the tokenizer. Raises `RunError`."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder), vocab_size=VOCABULARY)
        return client([sys.executable, str(FOLDER / "lm_eval_client.py"), url, folder])


def fuzz(python: str, url: str, *, least_cases: int) -> dict[str, Any]:
    """schemathesis against /openapi.json: cases and failures. Raises `RunError`: a 5xx, or too few cases."""
    command = [
        str(Path(python).absolute().with_name("schemathesis")), "run", f"{url}/openapi.json",
        "--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing",
        "--max-examples", str(least_cases // 4), "--seed", "1", "--no-color",
        "--suppress-health-check", "all",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # it leaves its caches where it runs
        done = run(command, seconds=FUZZ_SECONDS, cwd=folder)
    counts = re.search(r"([\d,]+) generated", done.stdout)
    cases = int(counts.group(1).replace(",", "")) if counts else 0
    if done.returncode or cases < least_cases:
        raise RunError(f"schemathesis: exit code {done.returncode}, {cases} cases\n{done.stdout[-4000:]}")
    return {"cases": cases, "server_errors": 0}


async def damaged(url: str, number: int) -> dict[str, Any]:
    """Statuses of bodies with something wrong in them. Raises `RunError` at a 5xx."""
    draw, statuses = random.Random(0), Counter[int]()
    bodies = iter([(draw.choice(PATHS), body_of(draw)) for _ in range(number)])

    async def send(session: aiohttp.ClientSession) -> None:
        for path, body in bodies:
            async with session.post(
                url + path, data=body, headers={"content-type": "application/json"}
            ) as answer:
                text = await answer.read()
                statuses[answer.status] += 1
                if answer.status >= 500:
                    raise RunError(f"{path}: {answer.status} {text[:300]!r} of {body[:300]!r}")

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(send(session) for _ in range(16)))
    return {"bodies": number, "statuses": {str(status): statuses[status] for status in sorted(statuses)}}


def body_of(draw: random.Random) -> bytes:
    """A request in which a field is wrong, or some bytes, or all of it."""
    request: dict[str, Any] = {
        "model": "counting", "prompt": draw.choice(["ab", [64], ["a", "b"], [[64], [65]]]), "max_tokens": 2,
        "messages": [{"role": "user", "content": "ab"}], "tokens": [64], "stream": draw.random() < 0.3,
    }  # fmt: skip
    odd = (
        None, True, -1, 0, 2, 1e308, 2**70, "", "a", "ñ" * 50, [], [[]], {}, {"a": []}, [None], ["a", 1],
        [{"role": "x"}], {"include_usage": 1}, [-1], [[1, "a"]], {"999999": 1}, {"5": 1e9}, "\x00", 0.5,
    )  # fmt: skip
    names = (
        *request, "n", "best_of", "logprobs", "top_logprobs", "echo", "stop", "stop_token_ids", "logit_bias",
        "temperature", "top_p", "top_k", "min_p", "min_tokens", "seed", "stream_options", "response_format",
        "presence_penalty", "repetition_penalty", "tools", "chat_template_kwargs", "suffix", "unknown",
    )  # fmt: skip
    for _ in range(draw.randint(1, 3)):
        request[draw.choice(names)] = draw.choice(odd)
    if not isinstance(request["max_tokens"], int) or request["max_tokens"] > 9:
        request["max_tokens"] = 9
    body = bytearray(json.dumps(request).encode())
    kind = draw.random()
    if kind < 0.2:
        body[draw.randrange(len(body))] = draw.randrange(256)
    elif kind < 0.3:
        del body[draw.randrange(len(body)) :]
    elif kind < 0.35:
        body = bytearray(draw.randbytes(draw.randrange(100)))
    return bytes(body)


async def crowd(url: str, number: int) -> dict[str, Any]:
    """All clients at once: the accepted end in bounded time, the rest get 429 at once.

    Raises `RunError`: another status, or fewer accepted than fit.
    """
    statuses, seconds = Counter[int](), dict[int, list[float]]()
    start = asyncio.Event()

    async def ask(session: aiohttp.ClientSession) -> None:
        await start.wait()
        began = time.perf_counter()
        request = {"model": "counting", "prompt": [64], "max_tokens": 20, "ignore_eos": True}
        async with session.post(f"{url}/v1/completions", json=request) as answer:
            await answer.read()
            statuses[answer.status] += 1
            seconds.setdefault(answer.status, []).append(time.perf_counter() - began)

    timeout = aiohttp.ClientTimeout(total=CLIENT_SECONDS)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        asked = [asyncio.create_task(ask(session)) for _ in range(number)]
        start.set()
        await asyncio.gather(*asked)
    if set(statuses) - {200, 429} or statuses[200] < min(number, SLOTS + WAITING):
        raise RunError(f"crowd: statuses {dict(statuses)}; expected 200 and 429 alone")
    return {
        "clients": number,
        "accepted": statuses[200],
        "refused_429": statuses[429],
        "accepted_p50_seconds": round(percentile(seconds[200], 50), 3),
        "accepted_p99_seconds": round(percentile(seconds[200], 99), 3),
        "refused_p99_seconds": round(percentile(seconds.get(429, [0.0]), 99), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
