"""Are the nodes sound? Ray actors inspect and measure every node before a long run.

    python -m cluster.preflight [--config FILE] [key=value ...]

With session.address=auto on a cluster's head, otherwise on this machine alone. Prints a table and writes a
JSON report; exit code 1 if a check failed. Without GPUs the same checks run on CPUs, whose timings are noisy:
there an outlier is a warning and not a failure.
"""

import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from cluster import cli, files
from cluster import config as layered
from cluster.cli import RunError
from cluster.config import key
from cluster.display import show
from cluster.heart.drained import Drained, hold
from cluster.preflight.inspection import Inspector, Rank
from cluster.preflight.verdict import COLUMNS, ExpectConfig, Finding, LimitsConfig, judge, node_rows, table
from cluster.progress import Progress
from cluster.record import provenance
from cluster.record.record import WANDB_MODES
from cluster.record.result import record_result
from cluster.session import KIND, SessionConfig, ray_session

STEP_SECONDS = 300.0  # for each step of the preflight, on all nodes
CLOCK_READINGS = 5


@dataclass(frozen=True)
class SizeConfig:
    disk_megabytes: int = key(256, "file that is written and read on each disk", least=4)
    link_megabytes: int | None = key(None, "buffer of a collective; null: 256 on GPUs, 16 on CPUs", least=1)
    repeats: int = key(5, "of each measurement", least=1)


@dataclass(frozen=True)
class PreflightConfig:
    scratch: str = key("/tmp", "folder on each node's own disk")
    storage: str = key("outputs", "folder on the storage that all nodes share")
    output: str = key("outputs/preflight.json", "the report")
    wandb: str = key("auto", "W&B: auto is online with a key, else offline", choices=WANDB_MODES)
    project: str = key("asuncion", "W&B project")
    expect: ExpectConfig = key(ExpectConfig, "")
    limits: LimitsConfig = key(LimitsConfig, "")
    size: SizeConfig = key(SizeConfig, "")
    session: SessionConfig = key(SessionConfig, "")


def examine(config: PreflightConfig, drained: Sequence[Drained] = ()) -> dict[str, Any]:
    """Inspect and measure all nodes of the running Ray. Shows its progress on standard error.

    Args:
        drained: GPUs that are held, and so not measured.

    Returns:
        nodes: name -> facts (`inspection.Inspector`), accelerator (Ray's name), drained_gpus (their number),
        ceilings, clock_skew_seconds, links within the node or None; links: between all nodes, or None; pairs:
        "name name" -> links between neighbours of the ring, where there are three nodes or more. Links are
        `probe.MeasuredLinks`, or a `problem`.

    Raises:
        RunError: a node did not answer; the message names it.
    """
    import ray

    alive = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: n["NodeManagerAddress"])
    addresses = {node["NodeID"]: node["NodeName"] for node in alive}
    out = {
        node["NodeID"]: [each.gpu for each in drained if each.host == node["NodeManagerHostname"]]
        for node in alive
    }
    kinds = {node["NodeID"]: _kind(node["Resources"]) for node in alive}
    num_gpus = {
        node["NodeID"]: int(node["Resources"].get("GPU", 0)) - len(out[node["NodeID"]]) for node in alive
    }
    rounds = ring_rounds(list(addresses))
    with Progress(5 + len(rounds), unit="check") as progress:
        nodes = _examine(config, addresses, num_gpus, out, progress)
        within, between, pairs = _examine_links(config, addresses, num_gpus, rounds, progress)
    for node, facts in nodes.items():
        facts |= {"accelerator": kinds[node], "links": within[node]}
    return {
        "nodes": {addresses[node]: facts for node, facts in nodes.items()},
        "links": between,
        "pairs": pairs,
    }


def ring_rounds(ring: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The pairs of neighbours of a ring of three nodes or more, in rounds: no node is twice in one."""
    if len(ring) < 3:
        return []
    pairs = list(zip(ring, [*ring[1:], ring[0]], strict=True))
    even = len(pairs) - len(pairs) % 2
    return [each for each in (pairs[0:even:2], pairs[1:even:2], pairs[even:]) if each]


def _kind(resources: dict[str, float]) -> str | None:
    """Ray's name of a node's GPUs."""
    return next((name.removeprefix(KIND) for name in resources if name.startswith(KIND)), None)


def _examine(
    config: PreflightConfig,
    addresses: dict[str, str],
    num_gpus: dict[str, int],
    drained: dict[str, list[int]],
    progress: Progress,
) -> dict[str, Any]:
    """The facts of these nodes, without links. By Ray's id: names, numbers of GPUs, drained GPUs, facts."""
    import ray

    inspectors = {node: _actor(Inspector, node, num_gpus=num_gpus[node]) for node in addresses}
    mark = f"preflight-{uuid.uuid4().hex[:8]}"

    def everywhere(what: str, call: Callable[[str], Any]) -> dict[str, Any]:
        progress.advance(what, by=0)
        found = _answers({node: call(node) for node in addresses}, addresses, num_gpus, what)
        progress.advance()
        return found

    def clock_skew(node: str) -> float:
        one = partial(_answers, addresses=addresses, num_gpus=num_gpus, what="clock")
        return _clock_skew(lambda: one({node: inspectors[node].clock.remote()})[node])

    arguments = (config.scratch, config.storage, mark, config.size.disk_megabytes * 1_000_000)
    facts = everywhere(
        "versions, GPUs and disks", lambda node: inspectors[node].facts.remote(*arguments, drained[node])
    )
    sees = everywhere("shared storage", lambda node: inspectors[node].sees.remote(config.storage, mark))
    ceilings = everywhere(
        "matrix products and memory",
        lambda node: inspectors[node].ceilings.remote(num_gpus[node], config.size.repeats),
    )
    for node in addresses:
        facts[node]["storage"]["sees"] = sees[node]
        measured = ceilings[node]
        facts[node]["ceilings"] = measured["ceilings"]
        facts[node]["gpus_problem"] = facts[node]["gpus_problem"] or measured["problem"]
        for gpu in facts[node]["gpus"]:
            gpu["throttled"] = gpu["index"] in measured["throttled"]
        facts[node]["clock_skew_seconds"] = clock_skew(node)
        ray.kill(inspectors[node])  # the ranks need its GPUs
    for file in Path(config.storage).expanduser().glob(f".{mark}-*"):
        file.unlink(missing_ok=True)
    return facts


def _examine_links(
    config: PreflightConfig,
    addresses: dict[str, str],
    num_gpus: dict[str, int],
    rounds: Sequence[Sequence[tuple[str, str]]],
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
    """The links within each node, by Ray's id of it; those of all nodes; and the pairs, as in `examine`."""

    def links(what: str, groups: dict[Any, Sequence[str]], on_gpu: dict[Any, bool]) -> dict[Any, Any]:
        progress.advance(what, by=0)
        found = _links(groups, on_gpu, size=config.size)
        progress.advance()
        return found

    inside: dict[Any, Sequence[str]] = {node: [node] * (num_gpus[node] or 2) for node in addresses}
    within = links("links within each node", inside, {node: num_gpus[node] > 0 for node in addresses})
    gpu = all(num_gpus.values())
    between = links("links of all nodes", {"all": list(addresses)}, {"all": gpu})["all"]
    pairs: dict[str, Any] = {}
    for each in rounds:
        measured = links("links of neighbours", {pair: pair for pair in each}, dict.fromkeys(each, gpu))
        pairs |= {f"{addresses[left]} {addresses[right]}": measured[left, right] for left, right in each}
    return within, between, pairs


def _clock_skew(read: Callable[[], float]) -> float:
    """Seconds by which a node's clock is ahead of ours, from the reading with the shortest round trip."""
    readings = []
    for _ in range(CLOCK_READINGS):
        begin, there, end = time.time(), read(), time.time()
        readings.append((end - begin, there - (begin + end) / 2))
    return min(readings)[1]


def _actor(kind: type, node: str, *, num_gpus: int) -> Any:
    """An actor on this very node. It reserves no CPU, so that it never waits for one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(kind).options(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=place).remote()


def _answers(
    pending: dict[str, Any], addresses: dict[str, str], num_gpus: dict[str, int], what: str
) -> dict[str, Any]:
    import ray

    deadline = time.monotonic() + STEP_SECONDS
    found = {}
    for node, reference in pending.items():
        try:
            found[node] = ray.get(reference, timeout=max(1.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            why = "its GPUs are in use by a run, or it hangs" if num_gpus[node] else "it hangs"
            raise RunError(f"{addresses[node]}: {what}: no answer in {STEP_SECONDS:g} s; {why}") from None
        except ray.exceptions.RayError as error:
            raise RunError(f"{addresses[node]}: {what}: {_cause(error)}") from error
    return found


def _cause(error: Any) -> str:
    """First line of the error inside a Ray error; CUDA's last line is advice on debugging."""
    inner = getattr(error, "cause", None) or error
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return lines[0] if lines else repr(inner)


def _links(
    groups: dict[Any, Sequence[str]], on_gpu: dict[Any, bool], *, size: SizeConfig
) -> dict[Any, dict[str, Any] | None]:
    """Links between the ranks of each group, all groups at once; None for a single rank.

    Args:
        groups: name -> the node of each rank; a node may come several times.
    """
    import ray

    found: dict[Any, dict[str, Any] | None] = dict.fromkeys(groups)
    actors = {
        name: [_actor(Rank, node, num_gpus=int(on_gpu[name])) for node in nodes]
        for name, nodes in groups.items()
        if len(nodes) > 1
    }
    try:
        places = _collected({name: ranks[0].place.remote() for name, ranks in actors.items()})
        pending = {}
        for name, place in places.items():
            if "problem" in place:
                found[name] = place
                continue
            common = {
                "num_ranks": len(actors[name]),
                **place,
                "device": "cuda" if on_gpu[name] else "cpu",
                "num_bytes": (size.link_megabytes or (256 if on_gpu[name] else 16)) * 1_000_000,
                "repeats": size.repeats,
            }
            pending[name] = [
                actor.links.remote(rank=rank, **common) for rank, actor in enumerate(actors[name])
            ]
        return found | _collected(pending)
    finally:
        for actor in chain.from_iterable(actors.values()):
            ray.kill(actor)


def _collected(pending: dict[Any, Any]) -> dict[Any, dict[str, Any]]:
    """The answer of each, of several ranks that of the first; or its `problem`."""
    import ray

    deadline = time.monotonic() + STEP_SECONDS
    found: dict[Any, dict[str, Any]] = {}
    for name, answer in pending.items():
        try:
            each = ray.get(answer, timeout=max(1.0, deadline - time.monotonic()))
            found[name] = each[0] if isinstance(each, list) else each
        except ray.exceptions.RayError as error:
            found[name] = {"problem": _cause(error)}
    return found


def record(config: PreflightConfig, output: Path, verdict: dict[str, Any], found: dict[str, Any]) -> str:
    """Record a preflight as a run, beside its report. Returns W&B's status."""
    findings = [["failure", each] for each in verdict["failures"]]
    findings += [["warning", each] for each in verdict["warnings"]]
    return record_result(
        output.with_suffix(""), job_type="preflight", name=f"preflight-{verdict['time']}",
        project=config.project, wandb_mode=config.wandb, config=layered.to_dict(config),
        provenance=provenance.collect(command=sys.argv, data_fingerprint=None), summary=verdict,
        tables={"nodes_table": (COLUMNS, node_rows(found)), "findings": (("level", "finding"), findings)},
        attachments=[output], exit_code=int(not verdict["passed"]),
    )  # fmt: skip


def _hold_drained(config: PreflightConfig) -> list[Drained]:
    """The drained GPUs of the runs on this storage, held."""
    folder = Path(config.storage).expanduser()
    outputs = folder / "outputs" if (folder / "outputs").is_dir() else folder
    try:
        return hold(outputs)
    except TimeoutError as error:
        raise RunError(str(error)) from error


def _session() -> str:
    """The name of Ray's session. A verdict is valid until Ray is restarted."""
    import ray

    return ray.get_runtime_context().get_session_name()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("cluster.preflight", description=__doc__.splitlines()[0], keys=PreflightConfig())
    options = parser.parse_args(arguments)

    def body() -> None:
        config = layered.load(PreflightConfig, file=options.config, dotlist=options.overrides)
        if options.dry_run:
            print(layered.to_yaml(config))
            return
        output = Path(config.output).expanduser()
        output.parent.mkdir(parents=True, exist_ok=True)
        with ray_session(config.session, resources={"CPU": 1}, worker_env={}):
            drained = _hold_drained(config)
            found = examine(config, drained)
            session = _session()
        findings = judge(found, config.expect, config.limits)
        findings += [Finding(each.host, f"GPU {each}", is_failure=False) for each in drained]
        failures = [str(finding) for finding in findings if finding.is_failure]
        verdict = {
            "passed": not failures,
            "failures": failures,
            "warnings": [str(finding) for finding in findings if not finding.is_failure],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "session": session,
            "nodes": sorted(found["nodes"]),
        }
        files.write_json(output, {**verdict, "found": found})
        status = record(config, output, verdict, found)
        show(*table(found, findings), f"report: {output}", f"W&B: {status}")
        if failures:
            raise RunError(f"preflight failed: {len(failures)} of its checks, above")
        print(f"preflight passed on {len(found['nodes'])} nodes")

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
