"""The team's W&B workspaces as code: what each shows, of which runs. `cluster.review.dashboard` saves them.

Keys are W&B's (`cluster.record.wandb_keys`). Tests check that the commands log each of them. W&B's own
samples of the hardware begin with `system/`.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

MOST_RUNS = 100  # drawn in one panel; W&B's default is 10, fewer than a study has
PARITY_PLOTS = ("parity/plot", "parity/roofline_plot", "parity/time_plot")
# of a study with one setting of noise
STUDY_FIGURES = ("loss_tokens", "loss_costs", "loss_rate", "tokens_to_reference", "final_losses")
MOST_GPUS = 8  # of a node; W&B names each GPU's metrics by its number


@dataclass(frozen=True)
class View:
    """One workspace.

    Attributes:
        slug: names the view in its URL and its file.
        job_types: whose runs it lists; none: all runs.
        columns: of the list of runs, beside the name.
    """

    slug: str
    title: str
    job_types: tuple[str, ...]
    sections: Callable[[], list[ws.Section]]
    columns: tuple[str, ...] = ()


def build(view: View, *, entity: str, project: str) -> ws.Workspace:
    """The workspace, the same at each call. Needs no network and no key."""
    found = ws.Workspace(
        entity=entity,
        project=project,
        name=view.title,
        sections=view.sections(),
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=MOST_RUNS, group_by_prefix="first"),
        runset_settings=ws.RunsetSettings(
            filters=job_filter(view.job_types), pinned_columns=list(view.columns)
        ),
    )
    found._internal_name = internal_name(view)
    for section in found.sections:
        panels: list[Any] = section.panels
        for panel in panels:
            panel._id = id_of(view.slug, section.name, repr(panel))
    return found


def internal_name(view: View) -> str:
    """The view's name in W&B's table of views; its URL ends with `?nw=asuncion<slug>`."""
    return f"nw-asuncion{view.slug}-v"


def job_filter(job_types: Iterable[str]) -> str:
    """W&B's filter expression for runs of these job types; empty for none."""
    names = list(job_types)
    return f"JobType in {names!r}" if names else ""


def id_of(*parts: str) -> str:
    """A panel keeps its id from one build to the next, so that saving again changes nothing."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _section(name: str, *panels: Any, columns: int = 3, is_open: bool = True) -> ws.Section:
    """A section that shows all its panels on one page."""
    layout = ws.SectionLayoutSettings(columns=columns, rows=-(-len(panels) // columns))
    return ws.Section(name=name, panels=list(panels), is_open=is_open, layout_settings=layout)


def curve(title: str, *keys: str, x: str = "step", **more: Any) -> wr.LinePlot:
    """Keys over an axis, a line for each run."""
    return wr.LinePlot(title=title, x=x, y=list(keys), max_runs_to_show=MOST_RUNS, **more)


def bars(title: str, *keys: str) -> wr.BarPlot:
    """A bar for each run, from the runs' summaries."""
    return wr.BarPlot(title=title, metrics=list(keys), max_runs_to_show=MOST_RUNS)


def table(key: str) -> wr.WeavePanelSummaryTable:
    """A table that the runs logged."""
    return wr.WeavePanelSummaryTable(table_name=key)


def pictures(title: str, *keys: str) -> wr.MediaBrowser:
    """The newest pictures of each run."""
    return wr.MediaBrowser(title=title, media_keys=list(keys), num_columns=len(keys))


def text(markdown: str) -> wr.MarkdownPanel:
    """A panel that explains the others."""
    return wr.MarkdownPanel(markdown=markdown)


def _training() -> list[ws.Section]:
    phases = [f"optimizer/{phase}_seconds" for phase in ("start", "exchange", "orthogonalize", "finish")]
    return [
        _section(
            "Loss",
            curve("Training loss", "train/loss", x="tokens"),
            curve("Validation loss", "validation/loss", x="tokens"),
            curve("Validation loss over wall time", "validation/loss", x="seconds"),
        ),
        _section(
            "Throughput",
            curve("Tokens per second, all workers", "throughput/tokens_per_second"),
            curve("MFU, share of the datasheet's peak", "throughput/mfu"),
            curve("MFU, share of the measured product", "throughput/mfu_of_measured"),
        ),
        _section(
            "Where a step's time goes",
            curve("Seconds per step", "throughput/step_seconds"),
            curve("Rank 0 waits for data, seconds per step", "throughput/data_wait_seconds"),
            curve("Optimizer, seconds by phase, slowest rank", *phases, plot_type="stacked-area"),
        ),
        _section(
            "A jump of the loss, by step",
            curve("Training loss", "train/loss"),
            curve("Gradient norm", "train/gradient_norm", log_y=True),
            curve("Skipped steps", "train/skipped_steps"),
            curve("Learning rates", "train/lr", "train/lr_vector"),
            curve("Largest attention logit", "optimizer/attention_logit_max"),
            curve("Orthogonality error, worst matrix", "optimizer/orthogonality_error_max", log_y=True),
        ),
        _section("Differences between runs", wr.RunComparer(diff_only="split"), columns=1, is_open=False),
    ]


def _optimizer() -> list[ws.Section]:
    return [
        _section(
            "Updates",
            curve("Orthogonality error, mean of the matrices", "optimizer/orthogonality_error", log_y=True),
            curve("Orthogonality error, worst matrix", "optimizer/orthogonality_error_max", log_y=True),
            curve("RMS of the scaled updates", "optimizer/update_rms"),
            curve("Orthogonalisations per step, all ranks", "optimizer/orthogonalisations"),
            curve("Imbalance of the owners' FLOPs", "optimizer/imbalance"),
            curve("Gradient norm", "train/gradient_norm", log_y=True),
        ),
        _section(
            "Each matrix",
            curve("Orthogonality error: histogram", "optimizer/orthogonality_error_by_layer"),
            curve("RMS of the scaled updates: histogram", "optimizer/update_rms_by_layer"),
            table("optimizer/layers"),
        ),
        _section(
            "Attention logits",
            curve("Largest logit of the model", "optimizer/attention_logit_max"),
            curve("Largest logit: histogram over the layers", "optimizer/attention_logit_max_by_layer"),
            table("optimizer/attention"),
        ),
        _section(
            "Gradient noise",
            curve("Tail index, median of the matrices", "noise/tail_index_median"),
            curve("Noise to signal in the dual norm, median", "noise/to_signal_dual_median", log_y=True),
            curve("Tail index: histogram over the matrices", "noise/tail_index_by_layer"),
            table("noise/layers"),
        ),
    ]


def study_panels(figures: Iterable[str] = STUDY_FIGURES) -> list[Any]:
    """What compares the runs of one study: loss by rule, loss by rate, everything against everything.

    figures: names of the study's own.
    """
    rule, width = wr.Config("optim.matrix.rule"), wr.Config("model.hidden_size")
    matrix_lr, vector_lr = wr.Config("optim.matrix.lr"), wr.Config("optim.vector.lr")
    loss = wr.SummaryMetric("validation/loss.min")
    column = wr.ParallelCoordinatesPlotColumn
    columns = [
        column(metric=rule, display_name="rule"),
        column(metric=width, display_name="hidden size"),
        column(metric=matrix_lr, display_name="matrix lr", log=True),
        column(metric=vector_lr, display_name="vector lr", log=True),
        column(metric=loss, display_name="validation loss"),
    ]
    by_rule = {"groupby": rule, "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    return [
        curve("Validation loss by rule: mean and range", "validation/loss", x="tokens", **by_rule),
        curve("Validation loss, each run", "validation/loss", x="tokens"),
        wr.ScatterPlot(
            title="Loss over the matrix rate; color: hidden size", x=matrix_lr, y=loss, z=width, log_x=True
        ),
        wr.ParallelCoordinatesPlot(title="Rule, size, rates and loss", columns=columns),
        table("study/rules"),
        table("study/runs"),
        pictures("The study's figures", *(f"study/{name}" for name in figures)),
    ]


def _study() -> list[ws.Section]:
    by_rule, each, by_rate, parallel, rules, runs, figures = study_panels()
    return [
        _section(
            "Tokens to a loss",
            text(
                "Choose one study: filter the list of runs by **Group**. A rule needs fewer tokens to a loss "
                "if its curve reaches that loss further to the left. `token_share` in the table of rules is "
                "the tokens that it needs to the reference's loss, as a share of the reference's."
            ),
            by_rule,
            each,
        ),
        _section("Rules", rules, columns=1),
        _section("Figures", figures, columns=1),
        _section("Transfer of the learning rate", by_rate, parallel, columns=2),
        _section("Every run", runs, columns=1, is_open=False),
        _section("Differences between runs", wr.RunComparer(diff_only="split"), columns=1, is_open=False),
    ]


def _serving() -> list[ws.Section]:
    def percentiles(name: str, title: str) -> wr.LinePlot:
        keys = [f"serve/{name}_p{percent}_ms" for percent in (50, 90, 99)]
        return curve(f"{title}: p50, p90, p99, ms", *keys, x="serve/requests_per_second", log_y=True)

    return [
        _section(
            "Latency over load (completed requests per second)",
            percentiles("ttft", "Time to first token"),
            percentiles("tpot", "Time per output token"),
            percentiles("itl", "Gap between tokens"),
            percentiles("e2e", "Whole request"),
        ),
        _section(
            "Goodput",
            curve("Goodput over offered rate", "serve/goodput_per_second", x="serve/rate"),
            curve("Share of requests that meet the SLO", "serve/attainment", x="serve/requests_per_second"),
            curve(
                "Output tokens per second", "serve/output_tokens_per_second", x="serve/requests_per_second"
            ),
            bars("Highest rate that met the SLO", "serve/highest_rate_meeting_slo"),
        ),
        _section(
            "Load generator",
            curve("Lag of its event loop, p99, ms", "serve/client_loop_lag_p99_ms"),
            curve("Cores that it used", "serve/client_cores"),
        ),
        _section(
            "Loads",
            table("serve/loads"),
            pictures("Latency over load, gaps between tokens", "serve/latency_plot", "serve/itl_plot"),
            columns=1,
        ),
        _section("Every request", table("serve/requests"), columns=1, is_open=False),
    ]


def parity_panels() -> list[Any]:
    """What W&B shows of a parity."""
    plots = pictures("Parity, rooflines, time of a training step", *PARITY_PLOTS)
    return [table("parity/claims"), table("parity/parity"), plots]


def _parity() -> list[ws.Section]:
    about = text(
        "Each row is one figure of machine A against machine B: parity is A's share of its own ceiling over "
        "B's. 1 is parity. `low` and `high` are the ends of the 95% interval."
    )
    return [_section("Parity", about, *parity_panels(), columns=1)]


def _measurements() -> list[ws.Section]:
    return [
        _section("Baselines", table("baseline/figures_table"), columns=1),
        _section("Benches and races: ratios and medians", table("bench/medians"), columns=1),
        _section("Evaluations", table("evaluation/scores_table"), columns=1),
        _section("Projections", table("projection/rows"), columns=1),
    ]


def _fleet() -> list[ws.Section]:
    def each_gpu(title: str, metric: str) -> wr.LinePlot:
        keys = [f"system/gpu.{number}.{metric}" for number in range(MOST_GPUS)]
        return curve(title, *keys, x="RelativeTime(Wall)")

    return [
        _section(
            "GPUs of the node that rank 0 runs on",
            each_gpu("Utilisation, %", "gpu"),
            each_gpu("Memory in use, %", "memoryAllocated"),
            each_gpu("Power, W", "powerWatts"),
            each_gpu("Temperature, °C", "temp"),
            each_gpu("Clock of the SMs, MHz", "smClock"),
            each_gpu("Memory errors that ECC could not correct", "uncorrectedMemoryErrors"),
        ),
        _section(
            "Host of rank 0",
            curve("CPU, %", "system/cpu", x="RelativeTime(Wall)"),
            curve("Memory, %", "system/memory_percent", x="RelativeTime(Wall)"),
        ),
        _section(
            "Health of the nodes of a training run",
            curve("GPUs that are drained", "health/bad_gpus"),
            curve("GPUs that heat or power throttle", "health/throttled_gpus"),
            curve("Open problems of GPUs, disks and clocks", "health/problems"),
            curve("Seconds of a step that the slowest rank costs", "health/straggler_seconds"),
        ),
        _section("Preflights", table("preflight/findings"), table("preflight/nodes_table"), columns=1),
        _section(
            "What the runs reached",
            curve("Tokens per second", "throughput/tokens_per_second", x="RelativeTime(Wall)"),
            curve("Seconds per step", "throughput/step_seconds", x="RelativeTime(Wall)"),
        ),
    ]


LOSS, RULE = "summary:validation/loss.min", "config:optim.value.matrix.rule"
MEASUREMENTS = ("baseline", "race", "optim-bench", "launcher-bench", "evaluation", "projection")
COMMIT, DATA = "config:provenance.value.commit", "config:provenance.value.data_fingerprint"
VIEWS = (
    View(
        "training",
        "Training",
        ("train",),
        _training,
        columns=(LOSS, "summary:throughput/tokens_per_second.mean", RULE, COMMIT, DATA, "run:state"),
    ),
    View("optimizer", "Optimizer health", ("train",), _optimizer, columns=(RULE, LOSS, "run:group")),
    View("study", "Study: rules compared", ("train", "study"), _study, columns=("run:group", RULE, LOSS)),
    View(
        "serving", "Serving", ("serve-bench",), _serving, columns=("summary:serve/highest_rate_meeting_slo",)
    ),
    View("parity", "Parity", ("parity",), _parity),
    View("measurements", "Measurements", MEASUREMENTS, _measurements, columns=("run:jobType", COMMIT)),
    View("fleet", "Fleet", (), _fleet, columns=("run:jobType", "run:state", "tags:__ALL__")),
)
