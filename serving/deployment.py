"""The endpoint as a Ray Serve deployment: each replica answers HTTP and runs the engine in a second process.

If the engine fails or its process dies, its streams end with an error event, its other requests get a 503,
and it is started again; requests that arrive in between wait. An engine that cannot be started again, or dies
before it has delivered anything, fails the health check, and Serve replaces the replica.

If the replica's own process is killed or its node is lost, open streams end without [DONE]: the chunked body
has no end, so clients raise. Its other requests get a 500 from HAProxy or break off too, and later ones wait
until Serve has started another replica. The engine ends with its replica.
"""

import asyncio
import logging
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from cluster import display, endpoint_client
from cluster.cli import RunError, UserError, sigterm_as_interrupt
from cluster.process import no_leftovers
from cluster.record import origins
from cluster.session import (
    HAPROXY,
    environment,
    free_ports,
    ray_session,
    serve_environment,
    worker_environment,
)
from serving import checkpoints
from serving.checkpoints import Served
from serving.config import DeploymentConfig, ServeConfig
from serving.endpoint import haproxy
from serving.endpoint.chat import load_template
from serving.endpoint.hosts import allowed_hosts
from serving.endpoint.keys import digest_of
from serving.endpoint.metrics import BUCKETS, FIGURES, LABEL, LATENCIES, Figure
from serving.endpoint.service import EndpointOptions, make_endpoint
from serving.endpoint.text import load_tokenizer, numbered_tokenizer
from serving.engine.process import EngineProcess, Factory, make_engine
from serving.engine.protocol import EngineStats
from training.model import shapes

NAME = "completions"
# Requests at a replica at once. The endpoint limits them itself (`serving.endpoint.bodies`, `Engine.submit`),
# so that unfinished bodies block no other request; this exceeds HAProxy's limit (4096 connections).
MOST_REQUESTS = 8192
READY_SECONDS = 600.0  # a large checkpoint from slow storage; a failure is seen at once
POLL_SECONDS = 0.2
STOP_SECONDS = 5.0
SERVE_ENDS_SECONDS = 30.0  # as Serve itself waits for its controller


class RayMetrics:
    """A replica's figures among the metrics that Ray exports for Prometheus, on each node's metrics port.

    The endpoint's /metrics answers for the replica that got the request, these for every replica. Ray puts
    "ray_" before their names and tags them with deployment and replica.
    """

    def __init__(self, model: str) -> None:
        from ray.serve.metrics import Counter, Gauge, Histogram

        self._latencies = {
            name: Histogram(_ray_name(figure), description=figure.text, boundaries=BUCKETS, tag_keys=(LABEL,))
            for name, figure in LATENCIES.items()
        }
        self._figures: dict[str, Any] = {
            name: (Counter if figure.total else Gauge)(
                _ray_name(figure), description=figure.text, tag_keys=(LABEL,)
            )
            for name, figure in FIGURES.items()
        }
        for each in (*self._latencies.values(), *self._figures.values()):
            each.set_default_tags({LABEL: model})
        self._totals = dict.fromkeys(FIGURES, 0)

    def observe(self, name: str, seconds: float) -> None:
        """Note one of LATENCIES."""
        self._latencies[name].observe(seconds)

    def record(self, stats: EngineStats) -> None:
        """Report what the engine is doing now."""
        for name, figure in self._figures.items():
            value = getattr(stats, name)
            if not FIGURES[name].total:
                figure.set(value)
                continue
            before, self._totals[name] = self._totals[name], value
            if (more := value - before if value >= before else value) > 0:  # less: the engine was restarted
                figure.inc(more)


def _ray_name(figure: Figure) -> str:
    """Ray takes no colon, and ends the names of counters in _total itself."""
    return figure.name.replace(":", "_").removesuffix("_total")


class Replica:
    """What Ray Serve runs."""

    def __init__(self, config: ServeConfig, served: Served, factory: Factory, key_digest: str | None) -> None:
        self._engine = EngineProcess(factory, config, served)
        self._metrics = RayMetrics(self._engine.info.model)
        self._options, self._key_digest, self._template = config.deployment, key_digest, None
        self._origin = origins.without_places(checkpoints.origin_of(config.model, served))
        if served.directory is None:
            self._tokenizer = numbered_tokenizer(self._engine.info.vocab_size)
        else:
            self._tokenizer = load_tokenizer(served.directory)
            self._template = load_template(served.directory)

    def __serve_build_asgi_app__(self) -> FastAPI:
        options = self._options
        return make_endpoint(
            self._engine,
            self._tokenizer,
            template=self._template,
            options=EndpointOptions(
                hosts=allowed_hosts(options.host, options.allowed_hosts),
                origins=options.cors_origins,
                key_digest=self._key_digest,
                refuses_unknown=options.unknown_parameters == "refuse",
                body_seconds=options.receive_seconds,
            ),
            observe=self._metrics.observe,
            origin=self._origin,
        )

    async def check_health(self) -> None:
        """Called by Serve every few seconds; it replaces a replica that keeps raising."""
        self._metrics.record(await asyncio.to_thread(self._engine.stats))
        if problem := self._engine.failure():
            raise RuntimeError(problem)

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


def build(config: ServeConfig, served: Served, *, factory: Factory = make_engine) -> Any:
    """The Serve application of `config`."""
    if config.engine.kind == "vllm":
        from serving.vllm_app import vllm_app

        return vllm_app(config, directory=served.directory, name=served.name)
    from ray import serve
    from ray.serve.config import BackpressureConfig

    options = config.deployment
    resources: dict[str, Any] = {"num_cpus": options.cpus, "num_gpus": options.gpus}
    if options.accelerator is not None:
        resources["accelerator_type"] = options.accelerator
    deployment: Any = serve.deployment(serve.ingress()(Replica))
    return deployment.options(
        name=NAME,
        ray_actor_options=resources,
        max_ongoing_requests=MOST_REQUESTS,
        max_queued_requests=MOST_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_constructor_retry_count=1,  # a checkpoint that cannot be read now cannot be read on a second try
        graceful_shutdown_timeout_s=STOP_SECONDS,
        health_check_period_s=2.0,
        **config.replica_options(),
    ).bind(config, served, factory, digest_of(options.api_key))


def describe(config: ServeConfig) -> display.Table:
    """What would be served, and its size. Exports and starts nothing. Raises `UserError`."""
    from serving.engine import torch_engine

    served, engine = checkpoints.find(config.model), config.engine
    lines = [("model", f"{served.name}, from {served.directory or 'random weights'}")]
    if served.stale_run is not None:
        lines.append(("to be exported first", str(served.stale_run)))
    if served.directory is None or (served.directory / "config.json").is_file():
        fresh = served.stale_run is None  # else the export is not there yet
        shape = (checkpoints.check if fresh else checkpoints.shape_of)(config.model, served)
        context = engine.context_tokens or shape.max_positions
        numbers = torch_engine.arithmetic(engine, torch_engine.find_device(engine.device))
        info = torch_engine.describe(shape, engine, numbers, device="", name="", context=context)
        weights = info.weight_bytes + numbers.dtype.itemsize * (
            shape.num_parameters - shape.num_matmul_parameters  # the table of a tied head is the head
        )
        kept = str(numbers.weights).removeprefix("torch.")
        cache = info.kv_bytes_per_token * engine.cache_tokens
        lines += [
            ("parameters", f"{shape.num_parameters:,} ({shape.num_parameters / 1e9:.4f}B)"),
            ("weights", f"{weights / 1e6:,.1f} MB in {kept}"),
            ("compiled decoder", numbers.compiled_decoder),
            ("read in each step", f"{info.weight_bytes / 1e6:,.1f} MB: all weights but the input embedding"),
        ]
        if engine.kind == "torch":
            tokens = f"{engine.cache_tokens:,} tokens, {info.kv_bytes_per_token:,} bytes each"
            lines.append(("cache", f"{cache / 1e6:,.1f} MB: keys and values of {tokens}"))
    return display.pairs(lines)


@contextmanager
def serving(
    config: ServeConfig, *, report: Callable[[str], None], factory: Factory = make_engine
) -> Iterator[str]:
    """Serve for the length of a `with` block; the value is the endpoint's URL, which answers by then.

    Args:
        report: called with one line before anything that takes long.
        factory: makes a replica's engine, in a process of its own; pickled by its name. Tests give another.

    Raises:
        UserError, ConfigError: no such model, or the cluster lacks the resources.
        RunError: the replicas did not start; the message is the replica's own.
    """
    served = checkpoints.find(config.model)
    checkpoints.export_if_stale(served, report=report)
    checkpoints.check(config.model, served)  # fail here rather than in a replica
    config = _absolute(config)
    options = config.deployment
    digest_of(options.api_key)  # refuses a variable that is not set, before anything starts
    port = options.port or free_ports(1)[0]
    _check_free(options.host, port)
    worker_env = worker_environment(gpu=options.gpus > 0, threads=max(1, int(options.cpus)))
    needed = {"CPU": options.cpus * options.replicas}
    if (
        config.session.address == "local"
    ):  # an embedded Ray has only the cores that it is given: leave room to grow
        needed["CPU"] = options.cpus * (options.max_replicas or options.replicas)
    if config.engine.kind == "vllm":
        needed["CPU"] += 1  # for its ingress, a deployment of its own
    if options.gpus:
        needed["GPU"] = options.gpus * options.replicas
    session = ray_session(
        config.session,
        resources=needed,
        worker_env=worker_env,
        imports="ray.serve",
        smaller="deployment.cpus or deployment.replicas",
    )
    report(f"starting Ray for {served.name}")
    with (
        # In /tmp, because a socket's path has 97 bytes at most.
        tempfile.TemporaryDirectory(prefix="serve-", dir="/tmp") as folder,
        no_leftovers(f"{folder}/"),  # HAProxy keeps its log open there
        environment(_serve_environment(Path(folder), options)),
        session,
        ThreadPoolExecutor(1, "serve.start") as thread,  # whose work ends with Serve
        _orderly(_end_serve),
    ):
        report(f"starting Ray Serve and loading {served.name} into {options.replicas} engine(s)")
        path = "/v1/models" if config.engine.kind == "vllm" else "/health"
        application = build(config, served, factory=factory)
        yield _start_serve(application, thread, host=options.host, port=port, path=path)


def _start_serve(application: Any, thread: Executor, *, host: str, port: int, path: str) -> str:
    """Start Serve, and wait until it answers at `path` for the application. Returns its URL.

    `serve.start` returns when every proxy is ready, also the one that takes requests while there is no
    replica. So it runs in `thread`, and the replicas start meanwhile.

    Raises:
        RunError: a replica failed, with its error, or it took too long.
    """
    from ray import serve
    from ray.serve.schema import LoggingConfig

    logging.getLogger(serve.__name__).setLevel(logging.WARNING)  # at INFO it reports that it has started
    url = f"http://{host}:{port}"
    try:
        proxies = thread.submit(
            serve.start,
            http_options={"host": host, "port": port},
            logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        )
        _await_controller_start(proxies)
        target = serve.RunTarget(application, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        _wait(url, path, proxies)
        proxies.result()
    except TimeoutError as error:
        raise RunError(
            f"Ray Serve did not start ({str(error).rstrip('.')}); if this machine is busy, start again when "
            "it has less to do, else see Ray's logs"
        ) from error
    return url


def _await_controller_start(proxies: "Future[Any]") -> None:
    """Wait until `serve.start`, in another thread, has made Serve's controller. Raises what it raised."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    while not futures.wait([proxies], timeout=0.05).done:
        with suppress(ValueError):  # there is no such actor yet
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            return
    proxies.result()


def _serve_environment(folder: Path, options: DeploymentConfig) -> dict[str, str]:
    haproxy.install(folder / HAPROXY, seconds=options.receive_seconds)
    return serve_environment(folder, haproxy=options.haproxy)


def _end_serve() -> None:
    """`serve.shutdown`, without a call that is open when the controller is killed.

    `serve.shutdown` makes a call that ends only when Ray kills the controller. Ray then reports it as failed
    on standard error.
    """
    import ray
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve import context

    client, _ = context._check_cached_client_alive()
    if client is None:
        serve.shutdown()
        return
    client.shutdown_cached_handles()
    with suppress(RayActorError, TimeoutError):  # as Serve's own: it is gone already, or too busy to answer
        ray.get(client._controller.graceful_shutdown.remote(wait=False), timeout=SERVE_ENDS_SECONDS)
    _await_controller(SERVE_ENDS_SECONDS)
    context._disconnect()


def _await_controller(seconds: float) -> None:
    """Wait until Serve's controller has ended, or say that it has not."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    until = time.monotonic() + seconds
    with suppress(ValueError):  # there is no such actor any more
        while ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE) and time.monotonic() < until:
            time.sleep(0.05)
        print(
            f"Ray Serve's controller has not ended within {seconds:g} s: replicas may still hold GPUs and "
            "ports. An embedded Ray ends them now; on a cluster run `serve shutdown -y` on the head",
            file=sys.stderr,
        )


@contextmanager
def _orderly(end: Callable[[], None]) -> Iterator[None]:
    """Call `end` after the block. SIGTERM ends the block as Ctrl-C does, and neither interrupts `end`.

    Ray's own handler of SIGTERM, or a second Ctrl-C, would leave Serve's HAProxy behind.
    """
    with sigterm_as_interrupt():
        try:
            yield
        finally:
            with _unbroken():
                end()


@contextmanager
def _unbroken() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM inside the block, if this is the main thread."""
    mine = threading.current_thread() is threading.main_thread()  # which alone may set handlers
    numbers = (signal.SIGINT, signal.SIGTERM) if mine else ()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _absolute(config: ServeConfig) -> ServeConfig:
    """`config` with an absolute path in `model.shape`: a replica has another working directory."""
    model = config.model
    if model.shape is None or model.shape in shapes.SHAPES:
        return config
    return replace(config, model=replace(model, shape=str(Path(model.shape).expanduser().absolute())))


def _check_free(host: str, port: int) -> None:
    """Raise `UserError` if the port is taken. Serve itself would retry without end."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"deployment.port: {host}:{port} cannot be bound ({error.strerror}); stop what listens "
                "there, or choose another deployment.host or port (0: any that is free)"
            ) from error


def _wait(url: str, path: str, proxies: "Future[Any] | None" = None) -> None:
    """Wait until the endpoint answers at `path`.

    Raises:
        RunError: with the replica's error.
        TimeoutError: what `serve.start` raised, whose result `proxies` is.
    """
    from ray import serve

    deadline = time.monotonic() + READY_SECONDS
    while True:
        if proxies is not None and proxies.done():
            proxies.result()
        for application in serve.status().applications.values():
            for deployment in application.deployments.values():
                if deployment.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    raise RunError(f"the model cannot be served: {_reason(deployment.message)}")
            if application.status == "DEPLOY_FAILED":
                raise RunError(f"the model cannot be served: {_reason(application.message)}")
        # Until a replica is there, HAProxy says 404 or 503.
        if endpoint_client.answers(f"{url}{path}"):
            return
        if time.monotonic() > deadline:
            raise RunError(f"{url}: no answer within {READY_SECONDS:g} s; see Ray's logs of the replicas")
        time.sleep(POLL_SECONDS)


def _reason(message: str) -> str:
    """The last line of a traceback that names an error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error:" in line or "Exception:" in line]
    return (errors or lines or ["no reason given"])[-1]
