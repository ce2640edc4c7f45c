"""The endpoint on a real Ray Serve: the protocol through its ingress, overload, clients that leave, death."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import torch
from hypothesis import given, settings
from openai import OpenAI
from safetensors.torch import save_file

from cluster.cli import RunError
from cluster.session import free_ports
from serving import checkpoints
from serving.config import load
from serving.deployment import _await_controller, _start_serve, _wait, build, serving
from serving.endpoint.metrics import FIGURES
from serving.endpoint.text import numbered_tokenizer
from tests import fake_engine, slow_clients
from tests.commands import ROOT
from tests.lab.serve_startup import part_of
from tests.listening import compare, documented, listening
from tests.serving.endpoint.test_any_body import BODIES, FIXTURES
from tests.waiting import PATIENCE_SECONDS, wait_until
from training.model.llama import Llama, initialize
from training.model.shapes import LlamaShape, to_hf_config

pytestmark = pytest.mark.stack
NAME = "llama-5m-random"
SLOTS, WAITING = 3, 3


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file: while it is there, no step of the endpoint's engine ends."""
    return tmp_path_factory.mktemp("engine") / "hold"


@pytest.fixture(scope="module")
def url(hold: Path) -> Iterator[str]:
    """An endpoint whose engine counts, 20 ms a token."""
    config = load(
        dotlist=[
            *("model.weights=random", "model.shape=llama-5m", "deployment.port=0", "deployment.cpus=1"),
            *(f"engine.slots={SLOTS}", f"engine.waiting={WAITING}", "deployment.receive_seconds=3"),
        ]
    )
    with serving(config, report=print, factory=partial(fake_engine.make, hold=hold)) as url:
        yield url
    assert [p for p in psutil.Process().children(recursive=True) if "haproxy" in p.name()] == []


@contextmanager
def held(hold: Path, *, steps: int = 0) -> Iterator[None]:
    """The engine stands still in the block, after so many steps."""
    hold.write_text(f"{steps:<9}")
    try:
        yield
    finally:
        hold.unlink()


def post(url: str, **fields: object) -> httpx.Response:
    body = {"model": NAME, "prompt": [1], "max_tokens": 3} | fields
    return httpx.post(f"{url}/v1/completions", json=body)


def test_what_listens_is_what_the_readmes_say(url):
    found = listening(os.getpid())
    assert {name for name, _, _ in found} >= {"driver", "raylet", "ray worker", "haproxy"}
    rows = documented("cluster/README.md", "What listens without a cluster")
    rows |= documented("serving/README.md", "What listens besides")
    assert compare(found, rows).get("untold") is None


def figures(url: str, *names: str) -> list[float]:
    """Figures of the engine, from one answer of /metrics."""
    lines = [line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines()]
    found = {line[0].partition("{")[0]: line[-1] for line in lines}
    return [float(found[FIGURES[name].name]) for name in names]


def figure(url: str, name: str) -> float:
    [found] = figures(url, name)
    return found


def ours(part: str) -> list[psutil.Process]:
    """Processes below this one with these words in their command lines."""
    below = {child.pid for child in psutil.Process().children(recursive=True)}
    # process_iter leaves out those that end meanwhile; a zombie's command line is None.
    processes = [process for process in psutil.process_iter(["cmdline"]) if process.pid in below]
    return [one for one in processes if part in " ".join(one.info["cmdline"] or [])]


def replicas() -> list[psutil.Process]:
    return ours("ServeReplica")


def haproxy() -> psutil.Process:
    [process] = [one for one in ours("haproxy.cfg") if one.name() == "haproxy"]
    return process


def engines() -> list[psutil.Process]:
    return ours("serving.engine.process")


def test_the_openai_client_streams_token_by_token(url, hold):
    """What is there of an answer arrives while the engine stands still before the rest."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with held(hold, steps=3):
        chunks = client.completions.create(model=NAME, prompt="ab", max_tokens=12, temperature=0, stream=True)
        texts = [next(chunks).choices[0].text for _ in range(3)]
    texts += [chunk.choices[0].text for chunk in chunks]
    assert texts == list("cdefghijklmn")


@settings(max_examples=50, deadline=None, suppress_health_check=FIXTURES)
@given(body=BODIES)
def test_no_body_is_a_server_error(url, body):
    body = {**body, "model": NAME if body["model"] == "counting" else body["model"]}
    if isinstance(body["max_tokens"], int):
        body["max_tokens"] = min(body["max_tokens"], 2)
    answer = httpx.post(
        f"{url}/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (200, 400, 404)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(url, hold, stream):
    body = json.dumps({"model": NAME, "prompt": [1], "max_tokens": 500, "stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    cancelled = figure(url, "cancelled")
    with held(hold, steps=3):
        with socket.create_connection(("127.0.0.1", urlsplit(url).port)) as sock:
            sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: figure(url, "running"))
        wait_until(lambda: figure(url, "running") == 0)
    assert figure(url, "cancelled") == cancelled + 1


def test_ten_times_what_fits_is_refused_with_429_and_the_admitted_do_not_wait_long(url, hold):
    fits = SLOTS + WAITING
    with ThreadPoolExecutor(10 * fits) as clients:
        with held(hold):
            asked = [clients.submit(post, url, max_tokens=20) for _ in range(10 * fits)]
            in_engine = []
            while sum(one.done() for one in asked) < 9 * fits:
                in_engine.append(sum(figures(url, "running", "waiting")))
            in_engine.append(sum(figures(url, "running", "waiting")))
        while not all(one.done() for one in asked):
            in_engine.append(sum(figures(url, "running", "waiting")))
    answers = [one.result() for one in asked]
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert all(answer.json()["error"]["type"] == "rate_limit_error" for answer in refused)
    assert len(answers) - len(refused) == fits
    assert max(in_engine) == fits  # so nobody waits for more than one turn of the slots
    assert post(url).status_code == 200
    wait_until(lambda: figure(url, "running") == 0)


def test_a_thousand_clients_that_never_finish_hold_up_nobody_and_hold_no_memory(url):
    """They come until others have been answered ten times, and would come for ever if these were held up."""
    server = [haproxy(), *replicas()]
    seen = slow_clients.measure(url, clients=1000, seconds=PATIENCE_SECONDS, server=server, others=10)
    print(seen)  # `python -m tests.slow_clients` measures how long they wait
    assert seen.failures == {} and seen.num_health >= 10 and seen.num_completions >= 10
    assert seen.peak_bytes < 2 * seen.idle_bytes
    # One that sends at full speed may find its connection closed before it reads the answer.
    ended = {status for answer in seen.answers for _, status in [answer.split(": ")]}
    assert sum(seen.answers.values()) % 1000 == 0 < len(ended) and ended <= {"408", "413", "closed"}
    slow = {answer for answer in seen.answers if "huge" not in answer and "endless" not in answer}
    assert {answer.split(": ")[1] for answer in slow} == {"408"}
    assert figure(url, "running") == figure(url, "waiting") == 0


@pytest.mark.parametrize(("length", "sent", "status"), [(100, 10, 408), (10**12, 20_000, 413)])
def test_what_haproxy_refuses_itself_is_an_openai_error(url, length, sent, status):
    """Of an unfinished or invalid head it says so in its own words: its parser has no others."""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=PATIENCE_SECONDS) as sock:
        sock.sendall(head.encode() + b" " * sent)
        answer = b""
        with suppress(ConnectionResetError):  # it need not read all that was sent
            while part := sock.recv(65536):
                answer += part
    head, _, body = answer.decode().partition("\r\n\r\n")
    assert int(head.split()[1]) == status and "application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_controller_that_does_not_end_is_reported(url, capsys):
    _await_controller(0.1)  # nobody has told it to
    assert "controller has not ended within 0.1 s" in capsys.readouterr().err


def test_http_is_served_on_loopback_alone(url):
    processes = (haproxy(), *replicas())
    sockets = [each.laddr for one in processes for each in one.net_connections() if each.status == "LISTEN"]
    talks_http = []
    for address in sockets:
        try:
            httpx.get(f"http://127.0.0.1:{address.port}/")
            talks_http.append(address.ip)
        except httpx.TransportError:  # gRPC of Ray, which wants its token
            pass
    # HAProxy's endpoint, statistics and metrics, and the replica's endpoint.
    assert talks_http == ["127.0.0.1"] * 4


def test_secrets_of_clients_are_in_no_log(url):
    import ray

    secret = "canary-of-a-client"
    headers = {"authorization": f"Bearer {secret}", "x-api-key": secret}
    for method, path in (
        ("GET", "/health"),
        ("GET", "/none"),
        ("POST", "/v1/completions"),
        ("GET", "/stats"),
    ):
        for body in (b"", b"{", json.dumps({"model": NAME, "prompt": [1], "max_tokens": 1}).encode()):
            httpx.request(
                method, f"{url}{path}?api_key={secret}", content=body,
                headers=headers | {"content-type": "application/json"},
            )  # fmt: skip
    words = haproxy().cmdline()
    config = Path(words[words.index("-f") + 1])
    assert "127.0.0.1:514" not in config.read_text()  # by default each URL goes to syslog
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = [*(session / "logs").rglob("*"), *config.parent.parent.rglob("*")]
    texts = []
    for file in logs:
        with suppress(FileNotFoundError):  # it has just been removed
            texts += [file.read_bytes()] if file.is_file() else []
    assert len(texts) > 10 and not any(secret.encode() in text for text in texts)


def test_ray_exports_the_figures_of_each_replica(url):
    import ray

    def exported(name: str) -> list[float]:
        text = httpx.get(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith(f"ray_{name}{{")]
        tags = ('deployment="completions"', "replica=", f'model_name="{NAME}"')
        assert all(tag in line for line in lines for tag in tags)
        return [float(line.rsplit(" ", 1)[1]) for line in lines]

    post(url)
    tokens = figure(url, "generated_tokens")
    total, running = "vllm_generation_tokens_total", "vllm_num_requests_running"
    wait_until(lambda: exported(total) == [tokens] and exported(running) == [0])
    assert exported("vllm_time_to_first_token_seconds_count")[0] > 0


def kill_midway(url: str, hold: Path, process: psutil.Process) -> tuple[str, object, Exception | None]:
    """Kill a process of ours while a request streams and another waits for its answer.

    Returns:
        What the stream said; the other's answer, or what it raised; what the stream raised, if anything.
    """
    body = {"model": NAME, "prompt": [1], "max_tokens": 400}
    outcomes: list[object] = []

    def ask() -> None:
        try:
            outcomes.append(post(url, **body))
        except httpx.TransportError as error:
            outcomes.append(error)

    whole = threading.Thread(target=ask)
    text, raised = b"", None
    with held(hold, steps=100):  # of the 400 that it takes
        whole.start()
        wait_until(lambda: figure(url, "running"))
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as answer:
                for part in answer.iter_raw():
                    text += part
                    if process.is_running() and text.count(b"data: ") >= 3:  # one read may bring two events
                        process.kill()
        except httpx.TransportError as error:
            raised = error
        whole.join()
    return text.decode(), outcomes[0], raised


def test_an_engine_that_is_killed_ends_its_streams_with_an_error_and_the_next_request_succeeds(url, hold):
    [replica], [engine] = replicas(), engines()
    text, other, raised = kill_midway(url, hold, engine)
    assert post(url).status_code == 200  # it waited
    *events, last, rest = text.split("\n\n")
    assert raised is None and rest == "" and len(events) >= 3 and "[DONE]" not in text
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "engine_failed")
    assert "killed by signal 9" in error["message"] and "Send the request again" in error["message"]
    assert isinstance(other, httpx.Response) and other.status_code == 503
    assert other.json() == {"error": error}
    assert replicas() == [replica] and engine not in engines() and len(engines()) == 1
    assert httpx.get(f"{url}/health").status_code == 200
    wait_until(lambda: figure(url, "running") == 0)


def test_a_replica_that_is_killed_ends_its_streams_unfinished_and_is_replaced(url, hold):
    [replica], [engine] = replicas(), engines()
    text, other, raised = kill_midway(url, hold, replica)
    # The process that could write an error event is gone; what is left is a body without its end.
    assert isinstance(raised, httpx.RemoteProtocolError)
    assert text.count("data: ") >= 3 and "[DONE]" not in text
    assert isinstance(other, httpx.TransportError) or other.status_code == 500
    engine.wait(PATIENCE_SECONDS)  # its engine is gone with it

    def answers() -> bool:
        status = post(url).status_code
        assert status in (200, 429, 502, 503)
        return status == 200

    wait_until(answers)
    assert replica not in replicas()


def test_a_replica_that_fails_to_start_is_one_message(url):
    from ray import serve

    keys = ["model.weights=random", "model.shape=llama-5m", f"engine.cache_tokens={10**12}"]
    large = load(dotlist=keys)
    # The replica that runs has the only core.
    large = replace(large, deployment=replace(large.deployment, cpus=0))
    application = build(large, checkpoints.find(large.model))
    target = serve.RunTarget(application, name="large", route_prefix="/large")
    serve.run_many([target], wait_for_applications_running=False)
    try:
        with pytest.raises(
            RunError, match=r"^the model cannot be served: [^\n]*; lower engine\.cache_tokens"
        ):
            _wait(f"{url}/large", "/health")
    finally:
        serve.delete("large")


def test_a_start_of_serve_that_takes_too_long_is_one_message(monkeypatch):
    from ray import serve

    def too_busy(**_: object) -> None:
        raise TimeoutError("HTTP proxies not available after 60s.")

    monkeypatch.setattr(serve, "start", too_busy)
    with (
        pytest.raises(RunError, match=r"not available after 60s\); if this machine is busy, start again"),
        ThreadPoolExecutor(1) as thread,
    ):
        _start_serve(None, thread, host="127.0.0.1", port=1, path="/health")


@contextmanager
def started(checkpoint: Path, *, port: int) -> Iterator[subprocess.Popen[str]]:
    """`python -m serving.app`, beside the endpoint above. A test that fails leaves nothing of it."""
    keys = [f"model.path={checkpoint}", f"deployment.port={port}", "deployment.cpus=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.app", *keys],
        cwd=checkpoint.parent, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                below = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                psutil.wait_procs(below, timeout=PATIENCE_SECONDS)
                process.kill()


def with_torch(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with suppress(OSError):  # it has ended since
            found += [process] if "libtorch" in Path(f"/proc/{process.pid}/maps").read_text() else []
    return found


def tiny_checkpoint(folder: Path) -> Path:
    """A Hugging Face directory of a model that fits a postage stamp."""
    shape = LlamaShape(
        vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn_size=64
    )
    model = Llama(shape)
    initialize(model, seed=0)
    folder.mkdir()
    tensors = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_hf_config(shape, dtype="bfloat16")))
    numbered_tokenizer(300).save(str(folder / "tokenizer.json"))
    return folder


def test_the_command_serves_a_checkpoint_until_it_is_told_to_stop(tmp_path):
    [port] = free_ports(1)
    with started(tiny_checkpoint(tmp_path / "tiny"), port=port) as process:
        assert process.stdout is not None
        parts = [part_of(process.stdout.readline()) for _ in range(3)]
        assert parts == ["command", "Ray", "Serve_and_engine"]  # a line before each of them ends
        asked = {"model": "tiny", "prompt": "a ship", "max_tokens": 5, "ignore_eos": True}
        answer = post(f"http://127.0.0.1:{port}", **asked)
        assert answer.json()["usage"] == {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11}
        below = psutil.Process(process.pid).children(recursive=True)
        # HTTP needs no torch.
        assert ["serving.engine.process" in one.cmdline() for one in with_torch(below)] == [True]
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)  # somebody who cannot wait breaks nothing off
        rest, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "graceful_shutdown failed" not in f"{rest}{errors}", "Ray's word for an end in good order"
    _, alive = psutil.wait_procs(below, timeout=PATIENCE_SECONDS)
    assert alive == []
