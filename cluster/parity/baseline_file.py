"""The file of `make baseline`: its schema, and one machine's side of a comparison read from it.

`training.baseline` writes it, `cluster.parity` and `training.projection` read it. Its keys:

    format, complete        FORMAT; false while rounds are missing
    hardware                name, kind (cpu or gpu), num_devices, num_nodes, cpu_cores, datasheet
    ceilings                best rates with spreads (`cluster.measure.probe`), links, disk, problems
    peaks_of_rounds         the same peaks in each round, for intervals
    load_average_before     of the machine, before it was measured
    cells                   the commands that were run: id, status, reason, rounds
    figures                 rates of one device, of KINDS: values (one per round), flops and bytes per token,
                            and FIGURE_KEYS; in training also ranks, nodes and link_bytes per token
    ceiling_faults          ceilings that figures exceed
    config, provenance      keys of `make baseline`; commit, time and command
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.cli import UserError
from cluster.measure import benchmark, hardware
from cluster.measure.hardware import Device
from cluster.measure.probe import LINK_PEAK, PEAKS
from cluster.record import origins
from cluster.record.origins import Origin

FORMAT = 2
KEYS = {"hardware", "ceilings", "cells", "figures"}  # without which a file is not one of ours
KINDS = ("training", "prefill", "decode")
DATASHEET = "datasheet:"
MOST_POWER = 1.1  # times the board's limit, which a measured mean may exceed by its own error
FIGURE_KEYS = {"bytes", "joules_per_token", "cost_per_million_tokens", "command", "peak_memory_bytes"}


def new(
    *,
    hardware: Mapping[str, Any],
    ceilings: Mapping[str, Any],
    load_average_before: float,
    cells: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of a file before the first round."""
    return {
        "format": FORMAT,
        "complete": False,
        "hardware": hardware,
        "ceilings": ceilings,
        "config": config,
        "load_average_before": load_average_before,
        "provenance": provenance,
        "cells": cells,
        "figures": [],
        "ceiling_faults": [],
        "peaks_of_rounds": [],
    }


def read(path: Path, *, instead: str, key: str = "") -> dict[str, Any]:
    """The content of a file.

    Args:
        instead: what can be done without such a file, for the message.
        key: of the configuration that names the file, if one does.

    Raises:
        UserError: there is no such file, or `make baseline` did not write it in this format.
    """
    origin = f"{key}: {path}" if key else str(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{origin}: no such file; write one with `make baseline`, {instead}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{origin}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        raise UserError(f"{origin}: not a file of `make baseline`")
    if (given := content.get("format")) != FORMAT:
        raise UserError(f"{origin}: format {given!r}, not {FORMAT}; run `make baseline` again")
    return content


@dataclass(frozen=True)
class Link:
    """What ranks of one node send through, or nodes: bytes/s by the bus bandwidth of an all-reduce.

    Attributes:
        ends: ranks, or nodes with one rank on each, that it was measured with.
        bytes_per_s_of_rounds: of each; of a network, which is measured once, the slowest and the fastest, and
            one value where these are the same.
    """

    bytes_per_s: float
    ends: int
    bytes_per_s_of_rounds: tuple[float, ...]


@dataclass(frozen=True)
class Peaks:
    """What a side is measured against: FLOP/s, bytes/s, and where both come from; links, if measured."""

    flops: float
    bytes_per_s: float
    source: str
    is_datasheet: bool
    flops_of_rounds: tuple[float, ...] = ()
    bytes_per_s_of_rounds: tuple[float, ...] = ()
    link: Link | None = None
    network: Link | None = None

    def link_of(self, figure: Mapping[str, Any]) -> Link | None:
        """The link through which the ranks of a figure send."""
        return self.network if figure.get("nodes", 1) > 1 else self.link

    def measurements(self, figure: Mapping[str, Any], bound: str) -> tuple[float, ...]:
        """One value per round of the peak that bounds a figure; empty for a datasheet's."""
        if bound == "link":
            link = self.link_of(figure)
            assert link is not None
            return link.bytes_per_s_of_rounds
        return self.flops_of_rounds if bound == "compute" else self.bytes_per_s_of_rounds


@dataclass(frozen=True)
class Side:
    """One machine. `content` is its file, empty for a datasheet; `origin` is what the command named."""

    name: str
    origin: str
    datasheet: Device | None
    content: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_roofline(self) -> bool:
        return not self.content

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """Id -> figure. Energy that cannot be, of a turn too short for the driver's counter, is None."""
        found = {figure["id"]: figure for figure in self.content.get("figures", ())}
        return found | {name: {**found[name], "joules_per_token": None} for name in self.energy_in_doubt}

    @property
    def energy_in_doubt(self) -> list[str]:
        """Ids of figures whose energy means no power at all, or more than the board's limit."""
        limit = MOST_POWER * self.datasheet.power_watts if self.datasheet else math.inf
        return [
            figure["id"]
            for figure in self.content.get("figures", ())
            if (joules := figure["joules_per_token"])
            and not 0 < statistics.median(joules) * statistics.median(figure["values"]) <= limit
        ]

    @property
    def busy(self) -> str | None:
        """That this machine had other work; None if not, or if its load was not recorded."""
        load, about = self.content.get("load_average_before"), self.content.get("hardware", {})
        return None if load is None else benchmark.busy(load, cores=about.get("cpu_cores"))

    @property
    def disturbed(self) -> str | None:
        """Why figures of this machine decide nothing: its cores had other work. Else None."""
        return self.busy if self.content and self.content["hardware"].get("kind") == "cpu" else None

    def peaks(self, *, datasheet: bool) -> Peaks:
        """The datasheet's peaks, or those measured on this machine."""
        if datasheet or self.is_roofline:
            assert self.datasheet is not None
            sheet = self.datasheet
            return Peaks(
                sheet.bf16_tflops * 1e12,
                sheet.memory_gb_per_s * 1e9,
                f"datasheet, {sheet.source}",
                True,
                link=self.link("links"),
                network=self.link("links_between_nodes"),
            )
        ceilings = self.content["ceilings"]
        return Peaks(
            ceilings["product_tflops"]["best"] * 1e12,
            ceilings["read_gb_per_s"]["best"] * 1e9,
            f"measured by cluster.measure.probe in {ceilings['product_dtype']}, in {self.origin}",
            False,
            self._of_rounds(PEAKS[0]),
            self._of_rounds(PEAKS[1]),
            self.link("links"),
            self.link("links_between_nodes"),
        )

    def link(self, key: str) -> Link | None:
        """What was measured under this key of the ceilings, or None."""
        links = (self.content.get("ceilings") or {}).get(key) or {}
        if LINK_PEAK not in links:  # not measured, or the problem that kept it from being
            return None
        peak, rounds = links[LINK_PEAK], self._of_rounds(LINK_PEAK)
        if key == "links_between_nodes":
            rounds = tuple(dict.fromkeys(peak["spread"]))
        return Link(peak["best"] * 1e9, links["num_ranks"], rounds)

    def _of_rounds(self, name: str) -> tuple[float, ...]:
        return tuple(row[name] for row in self.content["peaks_of_rounds"] if name in row)


def read_side(origin: str) -> Side:
    """One side of a comparison: a file of `make baseline`, or "datasheet:NAME".

    Raises:
        UserError: there is no such file or datasheet, or `make baseline` did not write the file.
    """
    if origin.startswith(DATASHEET):
        device = hardware.by_short_name(origin.removeprefix(DATASHEET))
        if device is None:
            known = ", ".join(f"{DATASHEET}{name}" for name in hardware.SHORT_NAMES)
            raise UserError(f"{origin}: no such datasheet; there are {known}")
        return Side(f"{device.name} (roofline of its datasheet)", origin, device)
    content = read(Path(origin), instead=f"or say {DATASHEET}h100")
    try:
        problem = _problem(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"a figure or ceiling has another form ({type(error).__name__}: {error})"
    if problem is not None:
        raise UserError(f"{origin}: {problem}; run `make baseline` again on that machine")
    about = content["hardware"]
    number = "" if about["num_devices"] == 1 else f"{about['num_devices']} x "
    return Side(f"{number}{about['name']}", origin, hardware.lookup(about["name"]), content)


def _problem(content: Mapping[str, Any]) -> str | None:
    """The first figure or ceiling that is not as `make baseline` writes it, or None."""
    ceilings = content.get("ceilings") or {}
    rates = {name: ceilings.get(name) for name in ("product_tflops", "read_gb_per_s", "copy_gb_per_s")}
    rates |= {f"disk.{name}": rate for name, rate in (ceilings.get("disk") or {}).items()}
    for key in ("links", "links_between_nodes"):
        if LINK_PEAK in (links := ceilings.get(key) or {}):
            rates[f"{key}.{LINK_PEAK}"] = links[LINK_PEAK]
    problems = ceilings.get("problems") or {}
    for name, rate in rates.items():
        if rate is None and name in problems:
            return f"ceilings.{name} could not be measured ({problems[name]})"
        values = [rate.get("best"), *rate.get("spread", ())] if isinstance(rate, dict) else []
        if len(values) != 3 or not all(map(_positive, values)):
            return f"ceilings.{name}: {rate!r} is not a rate with its spread"
    if not content.get("peaks_of_rounds"):
        return "has no peaks_of_rounds"
    if not all(_positive(value) for row in content["peaks_of_rounds"] for value in row.values()):
        return "peaks_of_rounds must be positive numbers"
    if not isinstance(content.get("load_average_before") or 0.0, int | float):
        return f"load_average_before: {content['load_average_before']!r} is not a number"
    for figure in content["figures"]:
        name = figure.get("id", "a figure without id")
        if figure.get("kind") not in KINDS:
            return f"{name}: kind {figure.get('kind')!r} is not one of {', '.join(KINDS)}"
        if not figure.get("values") or not all(map(_positive, [*figure["values"], figure.get("flops")])):
            return f"{name}: values and flops must be positive numbers"
        if figure.get("link_bytes") is not None and not _positive(figure.get("ranks")):
            return f"{name}: link_bytes need a positive number of ranks"
        if left := FIGURE_KEYS - figure.keys():
            return f"{name}: has no {', '.join(sorted(left))}"
    made = (*content.get("provenance", {}).get("inputs", ()), *(f.get("input") for f in content["figures"]))
    try:
        for each in filter(None, made):
            origins.checked(each)
    except (ValueError, TypeError) as error:
        return f"its lineage is damaged: {error}"
    return None


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")


def origin_of(side: Side) -> Origin:
    """Where a side's figures come from. Raises `UserError`: the file says it in a form that is not ours."""
    if side.is_roofline:
        return origins.origin("datasheet", side.name)
    return origin(Path(side.origin), side.content)


def origin(path: Path, content: Mapping[str, Any]) -> Origin:
    """Of a file. Raises `UserError`: what it says of its lineage is damaged."""
    try:
        return origins.of_results(path, content)
    except ValueError as error:
        raise UserError(f"{path}: {error}; run `make baseline` again") from error


def commit_of(side: Side) -> str:
    """Commit, time and command behind a side's file."""
    if side.is_roofline:
        return "arithmetic on cluster/measure/hardware.py"
    about = side.content["provenance"]
    dirty = ", with uncommitted changes" if about.get("dirty") else ""
    return f"commit {about['commit'][:12]}{dirty}, {about['time']}, `{' '.join(about['command'])}`"
