"""`python -m training.evaluate` through endpoints: ours, and one that refuses."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import yaml
from tokenizers import Tokenizer

from serving.checkpoints import Served
from serving.config import load as load_serving
from serving.endpoint.service import make_endpoint
from serving.engine.torch_engine import make_torch_engine
from tests.training.evaluate.trained_run import evaluate, refusal, scores
from tests.waiting import wait_until

pytestmark = [pytest.mark.stack, pytest.mark.usefixtures("no_ranks", "working_directory")]


class HttpServer:
    """An HTTP server in a thread."""

    def __init__(self, serve: Callable[[], None], stop: Callable[[], None], port: int) -> None:
        self.url, self._stop = f"http://127.0.0.1:{port}", stop
        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop()
        self._thread.join()


@pytest.fixture(scope="module")
def ours(trained: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Our endpoint over our engine, in this process."""
    keys = ("engine.device=cpu", "engine.dtype=float32", "engine.threads=1", "engine.compiled=false")
    engine = make_torch_engine(load_serving(dotlist=keys), Served(trained / "hf", "tiny"))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_endpoint(engine, tokenizer), log_level="warning"))
    run, stop = partial(server.run, [listening]), partial(setattr, server, "should_exit", True)
    served = HttpServer(run, stop, listening.getsockname()[1])
    wait_until(lambda: server.started)
    yield served.url
    engine.close()
    served.close()


def test_generation_through_our_endpoint_scores_as_it_does_here(
    trained: Path, tasks: Path, ours: str, capsys: pytest.CaptureFixture
) -> None:
    result, last, out = evaluate(
        capsys, f"tasks=[{tasks / 'complete.yaml'}]", f"endpoint={ours}/v1", "output=there.json"
    )
    assert scores(result)["complete"]["value"] == 6 / 8
    assert result["endpoint"] == {"url": f"{ours}/v1", "model": "tiny", "context_tokens": 256}
    assert result["model"]["run"] == str(trained / "outputs/tiny")  # it has the name of what is served
    assert last["perplexity"] is None and "perplexity left out: an endpoint" in out


def test_text_prompts_serve_where_the_tokenizer_is_not_known(
    tasks: Path, ours: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # without runs
    result, last, _ = evaluate(capsys, f"tasks=[{tasks / 'complete.yaml'}]", f"endpoint={ours}", "limit=4")
    assert scores(result)["complete"]["value"] == 3 / 4
    assert (scores(result)["complete"]["samples"], scores(result)["complete"]["of_samples"]) == (4, 8)
    assert last["file"] == str(tmp_path / "outputs/eval-tiny/eval.json")


def test_log_likelihoods_through_our_endpoint_are_those_of_the_checkpoint_here(
    trained: Path, tasks: Path, ours: str, capsys: pytest.CaptureFixture
) -> None:
    keys = [f"tasks=[{tasks / 'choose.yaml'},{tasks / 'continue.yaml'}]", f"model={trained / 'hf'}"]
    here, _, _ = evaluate(capsys, *keys, "device=cpu", "output=here.json")
    there, _, _ = evaluate(capsys, *keys, f"endpoint={ours}", "output=there.json")
    assert {score["task"] for score in there["scores"]} == {"choose", "continue"}
    for found, expected in zip(there["scores"], here["scores"], strict=True):
        close = {name: pytest.approx(expected[name], rel=1e-5) for name in ("value", "stderr")}
        assert found == expected | close
    assert there["endpoint"]["model"] == "tiny" and here["endpoint"] is None


def test_log_likelihoods_through_an_endpoint_need_its_tokenizer(
    tasks: Path, ours: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # without runs
    error = refusal(capsys, [f"tasks=[{tasks / 'continue.yaml'}]", f"endpoint={ours}"])
    assert error.startswith("error: model: continue: these count the tokens of given text")


class Elsewhere(BaseHTTPRequestHandler):
    """An endpoint that lists a model, and gives one answer to every completion."""

    status: int
    answer: dict[str, Any]

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "elsewhere", "max_model_len": 256}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._send(self.status, self.answer)

    def _send(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "answer", "reason"),
    [
        (400, {"error": {"message": "echo: not here"}}, "400: echo: not here"),
        (
            200,
            {"choices": [{"text": "", "logprobs": None}]},
            "without the prompt's logprobs and top_logprobs",
        ),
    ],
    ids=["refused", "ignored"],
)
def test_an_endpoint_is_asked_whether_it_tells_prompt_logprobs_and_the_tasks_are_named(
    tasks: Path, capsys: pytest.CaptureFixture, status: int, answer: dict[str, Any], reason: str
) -> None:
    handler = type("Handler", (Elsewhere,), {"status": status, "answer": answer})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        served = HttpServer(server.serve_forever, server.shutdown, server.server_port)
        error = refusal(capsys, [f"tasks=[{tasks}]", f"endpoint={served.url}", "output=no.json"])
        served.close()
    assert error.startswith("error: tasks: choose, continue: these need the log-probabilities of given text")
    assert reason in error and "evaluate the checkpoint here" in error
    assert not Path("no.json").exists()


def test_a_request_that_the_endpoint_refuses_is_told_with_its_answer(
    tasks: Path, ours: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    task = yaml.safe_load((tasks / "complete.yaml").read_text())
    task["generation_kwargs"]["top_k"] = -5
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(task))
    error = refusal(capsys, [f"tasks=[{tmp_path / 'odd.yaml'}]", f"endpoint={ours}", "limit=1"])
    assert "refuses a request" in error and "top_k: should be greater than or equal to -1" in error
