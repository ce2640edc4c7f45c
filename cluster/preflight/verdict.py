"""The preflight's verdict: which node is unsound, and what to do. Pure; it reads what `preflight` found."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import key
from cluster.display import Table, number, pairs
from cluster.display import table as text_table
from cluster.machine.host import KIB
from cluster.measure import hardware

RATES = {"product_tflops": "TFLOP/s", "copy_gb_per_s": "GB/s"}  # of `probe.Ceilings`
COLUMNS = ("node", "GPUs", "TFLOP/s", "copy GB/s", "scratch w/r", "storage w/r", "links GB/s", "skew ms")


@dataclass(frozen=True)
class NodeExpectConfig:
    gpus: int | None = key(None, "expect.gpus", least=0)
    accelerator: str | None = key(None, "expect.accelerator")


@dataclass(frozen=True)
class ExpectConfig:
    nodes: int | None = key(None, "number of nodes; null: any")
    gpus: int | None = key(None, "GPUs of every node; null: as many as most have")
    accelerator: str | None = key(None, "what the GPUs' names must contain, such as A40")
    differs: dict[str, NodeExpectConfig] = key(
        dict, "node -> gpus, accelerator: what is expected of it alone"
    )
    drained: tuple[str, ...] = key((), "nodes that stay out; a warning names them")


@dataclass(frozen=True)
class LimitsConfig:
    scratch_free_gb: float = key(20.0, "least free space on each node's own disk, GB", least=0)
    storage_free_gb: float = key(50.0, "least free space on the shared storage, GB", least=0)
    clock_skew_seconds: float = key(1.0, "largest difference to this machine's clock", least=0)
    of_median: float = key(
        0.85, "a node below this share of the nodes' median is an outlier", least=0, most=1
    )
    of_datasheet: float = key(
        0.6, "a GPU below this share of its datasheet's FLOP/s or GB/s is unsound", least=0, most=1
    )


@dataclass(frozen=True)
class Finding:
    """What is wrong with a node, and the remedy. A failure closes the gate, a warning does not."""

    node: str
    message: str
    is_failure: bool = True

    def __str__(self) -> str:
        return f"{self.node}: {self.message}"


def measured_tflops(report: dict[str, Any], kind: str | None = None) -> float | None:
    """TFLOP/s of a product on the median GPU (of this kind) of a preflight's report; None if it saw none.

    As the peak of `hardware.mfu` it gives the share of what this GPU reaches, beside the datasheet's share.
    """
    rates = [
        row["product_tflops"]["best"]
        for facts in report["found"]["nodes"].values()
        if facts["gpus"]
        for row in facts["ceilings"]
        if row["product_tflops"] and (kind or "") in row["device"]
    ]
    return statistics.median(rates) if rates else None


def judge(found: dict[str, Any], expect: ExpectConfig, limits: LimitsConfig) -> list[Finding]:
    """All findings on what `preflight.examine` found, failures first."""
    nodes = found["nodes"]
    counts = Counter(len(facts["gpus"]) + facts["drained_gpus"] for facts in nodes.values())
    num_gpus = expect.gpus if expect.gpus is not None else counts.most_common(1)[0][0]
    usual = NodeExpectConfig(num_gpus, expect.accelerator)
    findings = [
        *_number(nodes, expect),
        *_versions(nodes),
        *(finding for node in nodes for finding in _gpus(node, nodes[node], expect.differs.get(node, usual))),
        *(finding for node in nodes for finding in _disks(node, nodes, limits)),
        *(finding for node in nodes for finding in _clock(node, nodes[node], limits)),
        *_speeds(nodes, limits, is_gpu=num_gpus > 0),
        *_links(found, limits, is_gpu=num_gpus > 0),
    ]
    return sorted(findings, key=lambda finding: not finding.is_failure)


def _number(nodes: dict[str, Any], expect: ExpectConfig) -> Iterable[Finding]:
    if expect.nodes is not None and len(nodes) != expect.nodes:
        there = f"{len(nodes)} nodes and not {expect.nodes}: {', '.join(nodes)}"
        yield Finding("cluster", f"{there}; `make status` shows the others")
    for node in expect.drained:
        yield Finding(node, "is drained in the inventory, and was not looked at", is_failure=False)


def _versions(nodes: dict[str, Any]) -> Iterable[Finding]:
    versions = {
        node: facts["versions"] | ({"driver": facts["gpus"][0]["driver"]} if facts["gpus"] else {})
        for node, facts in nodes.items()
    }
    for name in dict.fromkeys(name for version in versions.values() for name in version):
        usual = Counter(version.get(name) for version in versions.values()).most_common(1)[0][0]
        remedy = "install the same driver" if name == "driver" else "`make up` brings the same environment"
        for node, version in versions.items():
            if version.get(name) != usual:
                yield Finding(node, f"{name} is {version.get(name)}, and {usual} on other nodes; {remedy}")


def _gpus(node: str, facts: dict[str, Any], expect: NodeExpectConfig) -> Iterable[Finding]:
    gpus = facts["gpus"]
    if facts["gpus_problem"]:
        yield Finding(node, f"{facts['gpus_problem']}; `dmesg | grep -i nvrm` there says more")
    if gpus and facts["toolchain_problem"]:
        yield Finding(node, facts["toolchain_problem"])
    if expect.gpus is not None and len(gpus) != (expected := max(0, expect.gpus - facts["drained_gpus"])):
        there = ", ".join(str(gpu["index"]) for gpu in gpus) or "none"
        yield Finding(
            node,
            f"{len(gpus)} GPUs (index {there}) and not {expected}: has one fallen off the bus? See "
            "`nvidia-smi` and `dmesg | grep -i xid` there; a reboot often brings it back. Or set node.gpus",
        )
    for gpu in gpus:
        name = f"GPU {gpu['index']}"
        device = hardware.lookup(gpu["name"])
        if expect.accelerator and expect.accelerator not in gpu["name"]:
            yield Finding(node, f"{name} is a {gpu['name']}, not {expect.accelerator}; set node.accelerator")
        if device and gpu["memory_gib"] * KIB**3 < 0.9 * device.memory_gb * 1e9:
            size = f"{gpu['memory_gib']} GiB, and its datasheet says {device.memory_gb:g} GB"
            yield Finding(node, f"{name} has {size}; is it partitioned?")
        if gpu["ecc_errors"]:
            errors = f"{gpu['ecc_errors']} uncorrected ECC errors since boot"
            yield Finding(node, f"{name}: {errors}; reset it, and have it replaced if they return")
        if gpu["throttled"]:
            yield Finding(
                node, f"{name} is throttled by heat or power; see `nvidia-smi -q -d PERFORMANCE` there"
            )
        for user, pid in gpu.get("others", ()):
            used = f"{name} is used by user {user}, pid {pid}, and nothing was done to that"
            yield Finding(node, used, is_failure=False)
        if not gpu["persistence"]:
            slow = "is not in persistence mode, which makes the start of every process slow"
            yield Finding(node, f"{name} {slow}; `nvidia-smi -pm 1`", is_failure=False)


def _disks(node: str, nodes: dict[str, Any], limits: LimitsConfig) -> Iterable[Finding]:
    facts = nodes[node]
    for name in ("scratch", "storage"):
        folder, least = facts[name], getattr(limits, f"{name}_free_gb")
        if folder["problem"]:
            yield Finding(node, f"{name}: {folder['problem']}; make room, or set {name} in the inventory")
        elif folder["free_gb"] < least:
            free = f"{folder['free_gb']:.1f} GB free, below limits.{name}_free_gb={least:g}"
            yield Finding(node, f"{name}: {free}; make room")
    if facts["storage"]["problem"]:
        return
    others = {row["hostname"] for row in nodes.values() if not row["storage"]["problem"]}
    if missing := sorted(others - set(facts["storage"]["sees"])):
        elsewhere = f"its storage is another place than that of {', '.join(missing)}"
        yield Finding(node, f"{elsewhere}; mount the same on every node, or set storage in the inventory")


def _clock(node: str, facts: dict[str, Any], limits: LimitsConfig) -> Iterable[Finding]:
    skew = facts["clock_skew_seconds"]
    if abs(skew) > limits.clock_skew_seconds:
        yield Finding(node, f"its clock is off by {skew:+.1f} s; start chrony or ntpd there")


def _speeds(nodes: dict[str, Any], limits: LimitsConfig, *, is_gpu: bool) -> Iterable[Finding]:
    for name, unit in RATES.items():
        rates = {
            (node, index): row[name]["best"]
            for node, facts in nodes.items()
            for index, row in enumerate(facts["ceilings"])
            if row[name]
        }
        kinds = {place: nodes[place[0]]["ceilings"][place[1]]["device"] for place in rates}
        for (node, index), rate in rates.items():
            median = _median_of_kind(rates, kinds, (node, index))
            gpu = nodes[node]["ceilings"][index].get("gpu", index)
            reaches = f"{f'GPU {gpu}' if is_gpu else 'its CPU'} reaches {number(rate)} {unit}"
            if rate < limits.of_median * median:
                what = f"{reaches} where the median is {number(median)}; what else runs there?"
                yield Finding(node, what, is_failure=is_gpu)
            device = hardware.lookup(nodes[node]["ceilings"][index]["device"])
            peak = device and (device.bf16_tflops if unit == "TFLOP/s" else device.memory_gb_per_s)
            if peak and rate < limits.of_datasheet * peak:
                share = f"below {limits.of_datasheet:.0%} of its datasheet's {peak:g}"
                yield Finding(node, f"{reaches}, {share}; look at its clocks and power limit")


def _links(found: dict[str, Any], limits: LimitsConfig, *, is_gpu: bool) -> Iterable[Finding]:
    within = {node: facts["links"] for node, facts in found["nodes"].items() if facts["links"]}
    for node, links in within.items():
        if "problem" in links:
            what = f"all-reduce within the node failed: {links['problem']}"
            yield Finding(node, f"{what}; is ACS or the IOMMU on? (github.com/NVIDIA/nccl/issues/2079)")
    if found["links"] and "problem" in found["links"]:
        what = f"all-reduce between the nodes failed: {found['links']['problem']}"
        yield Finding("cluster", f"{what}; is a firewall between them, or node.interface wrong?")
    neighbours: dict[str, float] = {}
    for pair, links in found["pairs"].items():
        rate = 0.0 if "problem" in links else links["all_reduce_gb_per_s"]["best"]
        for node in pair.split():
            neighbours[node] = max(neighbours.get(node, 0.0), rate)
    inside = {
        node: links["all_reduce_gb_per_s"]["best"] for node, links in within.items() if "problem" not in links
    }
    kinds = {
        node: facts["ceilings"][0]["device"] if facts["ceilings"] else ""
        for node, facts in found["nodes"].items()
    }
    for what, rates in (("within it", inside), ("with its better neighbour", neighbours)):
        for node, rate in rates.items():
            if sum(kinds[other] == kinds[node] for other in rates) < 3:  # of two, which is the outlier?
                continue
            median = _median_of_kind(rates, kinds, node)
            if rate < limits.of_median * median:
                slow = f"all-reduce {what}: {number(rate)} GB/s where the median is {number(median)}"
                yield Finding(node, f"{slow}; look at its cable, port and PCIe width", is_failure=is_gpu)


def _median_of_kind(rates: dict[Any, float], kinds: dict[Any, str], place: Any) -> float:
    """The median rate of the nodes or GPUs of the same kind as that at `place`."""
    return statistics.median(rate for other, rate in rates.items() if kinds[other] == kinds[place])


def table(found: dict[str, Any], findings: Sequence[Finding]) -> list[str | Table]:
    """The measurements by node, the links, and the findings."""
    lines: list[str | Table] = [text_table(COLUMNS, node_rows(found))]
    for name, links in (("all nodes", found["links"]), *found["pairs"].items()):
        if links and "problem" not in links:
            reduced, exchanged = (links[f"{what}_gb_per_s"]["best"] for what in ("all_reduce", "all_to_all"))
            latency = f"latency {links['all_reduce_latency_us']:.0f} us"
            lines.append(
                f"{name}: all-reduce {number(reduced)} GB/s (bus), all-to-all {number(exchanged)} GB/s, "
                f"{latency}"
            )
    said = [("FAILED" if finding.is_failure else "warning", str(finding)) for finding in findings]
    return [*lines, *([pairs(said)] if said else [])]


def node_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row under COLUMNS for each node. Disks in GB/s, written and read."""
    rows = []
    for node, facts in found["nodes"].items():
        rates = [[row[name]["best"] for row in facts["ceilings"] if row[name]] for name in RATES]
        cells = (
            node,
            str(len(facts["gpus"])),
            *(number(min(each)) if each else "-" for each in rates),
        )
        disks = (_disk(facts["scratch"]), _disk(facts["storage"]))
        rows.append((*cells, *disks, _link(facts["links"]), f"{facts['clock_skew_seconds'] * 1e3:+.1f}"))
    return rows


def _disk(folder: dict[str, Any]) -> str:
    return (
        "-"
        if folder["problem"]
        else "/".join(number(folder[f"{way}_gb_per_s"], digits=2) for way in ("write", "read"))
    )


def _link(links: dict[str, Any] | None) -> str:
    return "-" if not links or "problem" in links else number(links["all_reduce_gb_per_s"]["best"])
