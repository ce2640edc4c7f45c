"""The Ray session: an embedded local one, or a running cluster; and every environment variable we set.

Nothing else in the project calls `ray.init` or sets an environment variable of Ray, DeepSpeed or torch.
"""

import logging
import os
import random
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

from cluster import private
from cluster.config import ConfigError, key
from cluster.head.reap import processes
from cluster.process import no_leftovers

ROOT = Path(__file__).resolve().parents[1]

# Set before Ray starts; each keeps a value that the user has set.
DRIVER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no report leaves the cluster
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default; without it Ray warns at each start
    "RAY_worker_niceness": "0",  # Ray's default of 15 lets any other process starve the workers
    # Ray Train polls its workers this often. At its default of 2 s each ray.train.report costs about 1.5 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_AUTH_MODE": "token",  # Ray's default from 2.61 on; set, so that 2.60 does not warn
}
KIND = "accelerator_type:"  # before a kind of GPU: Ray's resource of a node that has them
# Of an embedded Ray's folder: Linux allows 107 bytes for the path of a socket.
LONGEST_FOLDER = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")

# Set in every training process, under Ray and under torchrun alike.
WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # a worker forks after the tokenizer has threads
    "WANDB_SILENT": "true",
    "LOCAL_RANK": "0",  # DeepSpeed insists on it; the launchers overwrite it
    # ASUNCION_COMMIT, from cluster.record.provenance, carries the commit to workers without a git folder
}
CPU_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",  # else DeepSpeed searches, and warns in every process
}
# Memory that the allocator has cut up and cannot join again would be lost: of an A40's 48 GB, 41 are planned
# for. The two names are one setting (torch 2.13 reads the older one first), so the user's own is left alone.
GPU_ENVIRONMENT = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

HAPROXY = "haproxy"


@dataclass(frozen=True)
class SessionConfig:
    address: str = key("local", "'local' starts an embedded Ray; 'auto' or host:port joins a running cluster")
    object_store_megabytes: int = key(200, "local: size of the shared-memory object store", least=80)


def serve_environment(folder: Path, *, haproxy: bool) -> dict[str, str]:
    """Environment variables for the start of Ray Serve in an embedded session (see `environment`).

    Args:
        folder: for HAProxy's files, its admin socket among them: at Ray's default place anyone may use that.
            The program itself is expected there, as HAPROXY (`serving.endpoint.haproxy`).
        haproxy: Serve's ingress is HAProxy and not Serve's own proxy.
    """
    metrics, statistics, http, grpc, fallback_http, fallback_grpc = free_ports(6)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(haproxy)),
        # Replicas' HTTP servers without Serve's event-loop monitoring and metrics of each request.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Replicas share ports: at Serve's default of 30000 those of two sessions would answer for each other.
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(http + 100),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc + 100),
        # HAProxy's last resort, a proxy of Serve. At its default of 8500 it too answers for other sessions.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        # Serve's default of 30 s gives load balancers time to forget a replica; here there are none.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),  # its defaults collide with any other HAProxy
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / HAPROXY),
        # A stalled client's connection is closed after so long; Serve's default is an hour.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        # By default HAProxy tells syslog each request's URL, secrets in it too. Nobody listens here.
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(folder / "no-log.sock"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }


def free_ports(number: int) -> list[int]:
    """TCP ports of this machine that nothing listens on now, for a process that will be given them.

    They lie above Ray's own and below those that the system gives to whoever asks for any port: such a one
    could be given away again before it is used.
    """
    asked = Path("/proc/sys/net/ipv4/ip_local_port_range")
    end = int(asked.read_text().split()[0]) if asked.exists() else 0
    quiet = range(20_000, end)
    tries = random.Random().sample(quiet, len(quiet))
    with ExitStack() as stack:
        found: list[int] = []
        for port in [*tries, *[0] * number]:
            each = stack.enter_context(socket.socket())
            with suppress(OSError):
                each.bind(("127.0.0.1", port))
                found.append(each.getsockname()[1])
            if len(found) == number:
                break
        return found


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the length of a `with` block, then restore what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def set_defaults(environment: Mapping[str, str]) -> None:
    """Set environment variables of this process that are not set yet."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def worker_environment(*, gpu: bool, threads: int) -> dict[str, str]:
    """The environment of a process that computes; on CPU, `threads` compute threads.

    What the user has set of the GPU's memory allocator and of torch's compiler, in this process's
    environment, stays.
    """
    # torch's own choice, /tmp/torchinductor_<user>, can be another user's: what lies in it is loaded and run
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(home / "asuncion" / "torchinductor")
    common = {**WORKER_ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": compiled}
    if gpu:
        own = {name: os.environ[name] for name in ALLOCATOR_NAMES if name in os.environ}
        return {**common, **(own or GPU_ENVIRONMENT)}
    return {**common, **CPU_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}


@contextmanager
def ray_session(
    config: SessionConfig,
    *,
    resources: Mapping[str, float],
    worker_env: Mapping[str, str],
    imports: str | None = None,
    smaller: str = "workers.count or workers.cpus",
) -> Iterator[None]:
    """Ray for the length of a `with` block; an embedded one is shut down at its end.

    Args:
        resources: what the work needs in all, by Ray's names, such as {"CPU": 2, "GPU": 2}. An embedded Ray
            is given these CPUs.
        worker_env: environment variables of every worker.
        imports: a module that is needed next; it is imported while Ray's processes start.
        smaller: the keys that ask for these resources, for the message that there are too few.

    Raises:
        ConfigError: no cluster answers at `session.address`, or it lacks the resources. Ray itself would
            wait for them for ever.
    """
    set_defaults(DRIVER_ENVIRONMENT)
    import ray

    worker_env = {**worker_env, "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:
        if config.address == "local":
            folder = stack.enter_context(_ray_folder())
            stack.enter_context(no_leftovers(f"{folder}/"))
            stack.enter_context(environment(_embedded_environment(folder)))
        stack.callback(ray.shutdown)
        with _importing(imports):
            if config.address == "local":
                _start(config, resources, folder, worker_env)
            else:
                _join(config, worker_env)
        _check_resources(ray.cluster_resources(), resources, smaller=smaller)
        yield


@contextmanager
def _importing(module: str | None) -> Iterator[None]:
    """Import a module in a thread during the block, which waits for other processes. None: nothing."""
    thread = threading.Thread(target=import_module, args=[module], name=f"import {module}")
    if module is not None:
        thread.start()
    try:
        yield
    finally:
        if module is not None:
            thread.join()


@contextmanager
def _ray_folder() -> Iterator[Path]:
    """A folder for an embedded Ray, closed to other users. After an error it stays, for Ray's logs.

    Ray opens all of its own folders to everyone (0777), its sessions and the code of workers among them.

    Raises:
        ConfigError: RAY_TMPDIR is too long.
        PermissionError: others can write to the folder for temporary files.
    """
    base = _temporary()
    base.mkdir(mode=0o755, parents=True, exist_ok=True)
    private.require_safe_above(base / "ray")
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=base))
    try:
        yield folder
    except (ConfigError, KeyboardInterrupt, SystemExit, GeneratorExit):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _temporary() -> Path:
    """RAY_TMPDIR, else Ray's default, or /tmp if that path is too long. Raises `ConfigError`."""
    from ray._common.utils import get_default_system_temp_dir

    base = Path(get_default_system_temp_dir()).absolute()
    if len(os.fsencode(base / "ray-12345678/r")) <= LONGEST_FOLDER:
        return base
    if "RAY_TMPDIR" in os.environ:
        raise ConfigError(f"RAY_TMPDIR: {base} is too long a path for Ray's sockets; set it to /tmp, say")
    return Path("/tmp")


def _embedded_environment(folder: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_TOKEN_PATH": str(_make_token(folder)),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # see `_start`: for the processes that Ray starts
        # Otherwise Ray Train starts a process that watches for the preemption of other nodes.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }


def _make_token(folder: Path) -> Path:
    """The token of one embedded Ray, which no other Ray accepts. Ray would share ~/.ray/auth_token, 0644."""
    place = folder / "token"
    place.touch(mode=0o600, exist_ok=False)
    place.write_text(secrets.token_hex(32))
    return place


def _start(
    config: SessionConfig, resources: Mapping[str, float], folder: Path, worker_env: Mapping[str, str]
) -> None:
    """An embedded Ray, reachable from this machine alone.

    Its workers inherit `worker_env`. With a `runtime_env` those that Ray starts ahead, one for each CPU,
    would serve nobody.
    """
    import ray
    from ray._private import ray_constants

    module: Any = import_module("ray._private.node")

    with suppress(PermissionError):  # it is not this Ray's; mend only what an earlier version has left
        private.read_token()
    _forget_token()
    # `_node_ip_address=` takes no loopback address. With this switch, which Ray has for Windows and macOS,
    # every port is bound to 127.0.0.1.
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    theirs, module.Node = module.Node, _small(module.Node)
    try:
        with environment(worker_env):
            ray.init(
                address="local",
                **_options({}),
                num_cpus=ceil(resources["CPU"]),
                object_store_memory=config.object_store_megabytes * 1_000_000,
                include_dashboard=False,
                _temp_dir=str(folder / "r"),
            )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER, module.Node = before, theirs


def _small(node: Any) -> Any:
    """Ray's `Node` without three processes that `ray.init` always starts and nobody here needs.

    Each imports much of Ray, and the raylet starts after them.
    """

    class Small(node):
        def start_monitor(self) -> None:
            """Of the autoscaler."""

        def start_log_monitor(self) -> None:
            """Which copies workers' output to the driver (`log_to_driver`)."""

        def start_api_server(self, **_: Any) -> None:
            """The dashboard. Without `include_dashboard` it still starts, to report usage."""

    return Small


def _join(config: SessionConfig, worker_env: Mapping[str, str]) -> None:
    """A running cluster."""
    import ray

    private.read_token()
    _forget_token()
    address = config.address
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _own_address()
    try:
        ray.init(address=address, **_options({"env_vars": dict(worker_env)}))
    except ConnectionError as error:
        raise ConfigError(
            f"session.address: no Ray cluster answers at {config.address!r} "
            f"({str(error).splitlines()[0]}); start one with `ray up` or `ray start --head`, "
            "or use session.address=local"
        ) from error


def _own_address() -> str:
    """The cluster of which this machine is a node. Ray's own search would also join another user's Ray.

    Raises:
        ConfigError: no Ray of this user runs here, or several do.
    """
    words = [process.command.split() for process in processes().values() if "/raylet " in process.command]
    found = {word.partition("=")[2] for line in words for word in line if word.startswith("--gcs-address=")}
    if len(found) != 1:
        raise ConfigError(
            f"session.address: 'auto', but {len(found) or 'no'} Ray clusters of yours run on this machine "
            f"({', '.join(sorted(found)) or 'start one with `ray start --head`'}); set host:port, or local"
        )
    return found.pop()


def _options(runtime_env: dict[str, Any]) -> dict[str, Any]:
    return {
        "log_to_driver": False,  # workers report through the run's files
        "logging_level": logging.WARNING,
        "runtime_env": runtime_env,
    }


def _forget_token() -> None:
    """Drop the token of an earlier Ray, which this process remembers."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled

    AuthenticationTokenLoader.instance().reset_cache()


def _check_resources(available: Mapping[str, float], needed: Mapping[str, float], *, smaller: str) -> None:
    for name, amount in needed.items():
        has = available.get(name, 0)
        if has < amount:
            raise ConfigError(
                f"{smaller.split()[0]}: the workers need {amount:g} {name} in all, but Ray has {has:g}; "
                f"lower {smaller}, or set session.address to a larger cluster"
            )
