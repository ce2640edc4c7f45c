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
from tenacity import wait_none
from tokenizers import Tokenizer

from serving.checkpoints import Served
from serving.config import load as load_serving
from serving.endpoint.chat import ChatTemplate
from serving.endpoint.service import make_endpoint
from serving.engine.torch_engine import make_torch_engine
from tests.training.evaluate.trained_run import evaluate, metric, refusal, scores, write_task
from tests.waiting import wait_until
from training.evaluate.command import main
from training.evaluate.endpoint import PROMPT

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
    template = ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}", {})
    endpoint = make_endpoint(engine, tokenizer, template=template)
    server = uvicorn.Server(uvicorn.Config(endpoint, log_level="warning"))
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
        capsys, f"tasks=[{tasks / 'complete.yaml'}]", f"endpoint={ours}/v1", "output=there.json",
        "endpoint_batch=3",
    )  # fmt: skip
    assert scores(result)["complete"]["value"] == 6 / 8
    assert result["endpoint"] == {"url": f"{ours}/v1", "model": "tiny", "context_tokens": 256}
    assert result["model"]["run"] == str(trained / "outputs/tiny")  # it has the name of what is served
    assert last["perplexity"] is None and "perplexity left out: an endpoint" in out


def test_a_chat_scores_what_a_completion_does_if_its_template_adds_nothing(
    tasks: Path, ours: str, capsys: pytest.CaptureFixture
) -> None:
    chat = [f"endpoint={ours}", "endpoint_api=chat", "output=chat.json"]
    result, _, _ = evaluate(capsys, f"tasks=[{tasks / 'complete.yaml'}]", *chat)
    assert scores(result)["complete"]["value"] == 6 / 8
    error = refusal(capsys, [f"tasks=[{tasks / 'choose.yaml'}]", *chat])
    assert error.startswith(
        "error: tasks: choose: these need the log-probabilities of given text, which no chat"
    )
    assert "endpoint_batch: must be 1" in refusal(capsys, ["tasks=[x]", *chat, "endpoint_batch=2"])


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
    there, _, _ = evaluate(capsys, *keys, f"endpoint={ours}", "output=there.json", "endpoint_batch=5")
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
    listed: dict[str, Any] = {"id": "elsewhere", "max_model_len": 256}  # noqa: RUF012

    def do_GET(self) -> None:
        self._send(200, {"data": [self.listed]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._send(self.status, self.answer)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
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
        served = HttpServer(partial(server.serve_forever, 0.01), server.shutdown, server.server_port)
        error = refusal(capsys, [f"tasks=[{tasks}]", f"endpoint={served.url}", "output=no.json"])
        served.close()
    assert error.startswith("error: tasks: choose, continue: these need the log-probabilities of given text")
    assert reason in error and "evaluate the checkpoint here" in error
    assert not Path("no.json").exists()


class Choosy(Elsewhere):
    """An endpoint that takes four stops and no `top_k`, ignores `min_k`, and fails at one text."""

    prompts: list[Any]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.prompts.append(body["prompt"])
        if "top_k" in body:
            self._send(400, {"error": {"message": "top_k: this server does not know this parameter"}})
        elif len(body.get("stop") or ()) > 4:
            self._send(400, {"error": {"message": "stop: must be a text, or at most 4"}})
        elif "fails" in str(body["prompt"]):
            self._send(500, {"error": {"message": "out of memory"}})
        else:
            ignored = {"X-Ignored-Parameters": "min_k"} if "min_k" in body else {}
            self._send(200, {"choices": [{"text": "yes", "index": 0}]}, ignored)


@pytest.fixture
def choosy() -> Iterator[tuple[str, list[Any]]]:
    handler = type("Handler", (Choosy,), {"prompts": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        served = HttpServer(partial(server.serve_forever, 0.01), server.shutdown, server.server_port)
        yield served.url, handler.prompts
        served.close()


def generation(folder: Path, name: str, question: str = "a", **options: Any) -> str:
    """The file of a task that asks `question` four times and expects "yes"."""
    kwargs = {"max_gen_toks": 4, "until": ["Q:"], "do_sample": False, **options}
    return str(
        write_task(
            folder, name, [{"question": f"{question} {i}"} for i in range(4)], output_type="generate_until",
            doc_to_target="yes", generation_kwargs=kwargs, metric_list=[metric("exact_match")],
        )
    )  # fmt: skip


def test_options_that_the_endpoint_does_not_take_are_refused_before_anything_runs(
    choosy: tuple[str, list[Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # without runs
    url, prompts = choosy
    odd = {
        "five": {"until": list("abcde")}, "chosen": {"top_k": 5}, "beams": {"num_beams": 4},
        "new": {"max_new_tokens": 9}, "unknown": {"min_k": 2},
    }  # fmt: skip
    files = [generation(tmp_path, name, **options) for name, options in odd.items()]
    files += [generation(tmp_path, "plain"), generation(tmp_path, "alike", num_beams=1)]
    error = refusal(capsys, [f"tasks=[{','.join(files)}]", f"endpoint={url}", "output=no.json"])
    assert "five (400: stop: must be a text, or at most 4); chosen (400: top_k: this server" in error
    assert "beams (num_beams is an option of transformers" in error and "new (max_new_tokens is" in error
    assert "unknown (it ignores min_k)" in error and "plain" not in error and "alike" not in error
    assert set(prompts) == {PROMPT} and not Path("no.json").exists()


def test_a_task_that_fails_leaves_the_scores_of_the_others(
    choosy: tuple[str, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from lm_eval.models import api_models

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api_models, "wait_exponential", lambda **_: wait_none())  # between lm_eval's attempts
    files = [
        generation(tmp_path, name, question) for name, question in (("bad", "this fails"), ("good", "a"))
    ]
    keys = [f"tasks=[{','.join(files)}]", f"endpoint={choosy[0]}", "output=out.json", "wandb=disabled"]
    assert main([*keys, "concurrency=4"]) == 1
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert (
        last.startswith(f"error: tasks failed: {files[0]}: endpoint: it failed") and "out of memory" in last
    )
    result = json.loads(Path("out.json").read_text())
    assert scores(result)["good"]["value"] == 1 and set(result["failed"]) == {files[0]}
    assert "never retrieved" not in caplog.text + captured.err


def test_a_context_that_nobody_tells_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    handler = type("Handler", (Choosy,), {"prompts": [], "listed": {"id": "elsewhere"}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        served = HttpServer(partial(server.serve_forever, 0.01), server.shutdown, server.server_port)
        error = refusal(capsys, [f"tasks=[{generation(tmp_path, 'plain')}]", f"endpoint={served.url}"])
        served.close()
    assert error.startswith("error: endpoint_context_tokens: ") and handler.prompts == []
