"""The report of a study in Markdown: claims in words, the numbers behind them, and their limits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.display import markdown, number
from cluster.machine.host import describe_host
from training.study.comparisons import comparisons
from training.study.config import StudyConfig
from training.study.plan import StudyPlan
from training.study.plots import COSTS_FILE, figure_file
from training.study.results import (
    Choice,
    Difference,
    Result,
    Spread,
    StudyResults,
    TokenRatio,
    difference,
    losses,
    token_ratio,
)

ENOUGH_SEEDS = 3  # for a band
DASH = "-"


@dataclass(frozen=True)
class About:
    """Where the results come from: the command, the tokens trained on, code, versions and machine."""

    command: str
    data_fingerprint: str
    provenance: dict[str, Any]


def describe_study(study: StudyResults, *, about: About, synthetic: str | None = None) -> str:
    """The whole report. `synthetic`: the section on the synthetic problem, in Markdown."""
    plan = study.plan
    sections = [f"# Study {plan.config.full_name}", *_warnings(study)]
    for noise in plan.config.noises:
        ending = "" if len(plan.config.noises) == 1 else f" under noise {noise}"
        sections += [
            f"## Claims{ending}",
            bullets(claims(study, noise=noise)),
            f"## Final validation losses{ending}",
            _losses(study, noise=noise),
            *comparisons(study, noise=noise),
            f"## Learning rates{ending}",
            _rates(study, noise=noise),
            *_token_section(study, noise=noise, ending=ending),
        ]
    sections += ["## Loss over gradients and over seconds", f"![loss_costs](figures/{COSTS_FILE})"]
    sections += ["## Runs that failed or diverged", _failures(study)]
    if synthetic is not None:
        sections += ["## Synthetic problem", synthetic, "![synthetic problem](figures/synthetic.png)"]
    sections += ["## How it was measured", _method(study, about), "## To repeat it", _repeat(plan, about)]
    sections += ["## What this does not show", bullets(_limits(study))]
    return "\n\n".join(sections) + "\n"


def _warnings(study: StudyResults) -> list[str]:
    """What a reader must know before the numbers."""
    config = study.plan.config
    found = []
    if config.smoke:
        found.append(
            f"**This is the miniature (`smoke=true`): {len(config.seeds)} seeds, the middle rates of each "
            f"grid, {' '.join(config.smoke_keys)}. It shows that the study runs, and nothing else.**"
        )
    if not config.equal_effort:
        sizes = ", ".join(f"{config.title(name)} {rule.num_points}" for name, rule in config.rules.items())
        found.append(f"**The tuning effort was allowed to be unequal: points per grid are {sizes}.**")
    if len(config.seeds) < ENOUGH_SEEDS:
        found.append(f"**{len(config.seeds)} seed(s) make no band; at least {ENOUGH_SEEDS} are needed.**")
    commits = {result.commit for result in study.results.values() if result.commit}
    if len(commits) > 1:
        found.append(
            f"**The runs were made by more than one state of the code: {', '.join(sorted(commits))}.**"
        )
    return found


def claims(study: StudyResults, *, noise: str) -> list[str]:
    """The claims in words, computed from the results."""
    config = study.plan.config
    asked, found = config.claims, []
    if asked.reference and asked.rule:
        ratio = token_ratio(
            study.finished(asked.rule, noise=noise),
            reference=study.finished(asked.reference, noise=noise),
        )
        names = config.title(asked.rule), config.title(asked.reference)
        found.append(claim_of_tokens(ratio, *names, target=asked.token_ratio))
    if asked.challenger and asked.baseline:
        found_difference = difference(
            study.finished(asked.challenger, noise=noise), study.finished(asked.baseline, noise=noise)
        )
        names = config.title(asked.challenger), config.title(asked.baseline)
        found.append(claim_of_difference(found_difference, *names))
    return found + _edges(study, noise=noise)


def claim_of_tokens(ratio: TokenRatio | None, rule: str, reference: str, *, target: float) -> str:
    """The share of the reference's tokens that a rule needs to reach its loss, compared with the target."""
    aim = f"the target, at most {target:g},"
    if ratio is None:
        return f"What share of {reference}'s tokens {rule} needs is not known: no report run of one finished."
    spread, num = ratio.spread, len(ratio.tokens)
    where = f"{reference}'s mean final validation loss, {ratio.target:.4f} nats per token"
    if spread is None:
        return f"{rule} never reaches {where}, within its budget; {aim} is missed."
    if ratio.num_unreached:
        return (
            f"{rule} does not reach {where} in {ratio.num_unreached} of {num} seeds; the others need "
            f"{_range(spread)} of {reference}'s tokens; {aim} is missed."
        )
    if spread.mean > target:
        verdict = "is missed"
    else:
        verdict = "is reached" if spread.high <= target else "is reached in the mean, but not by every seed"
    return (
        f"{rule} needs {spread.mean:.3f} of {reference}'s tokens (seeds {_range(spread)}) to {where}; "
        f"{aim} {verdict}."
    )


def claim_of_difference(found: Difference | None, challenger: str, baseline: str) -> str:
    """The challenger's final loss compared with the band of the baseline's seeds."""
    if found is None:
        return f"{challenger} minus {baseline} is not known: no seed finished under both."
    verdict = {
        "better": f"{challenger} is better than {baseline} by more than the seeds' band",
        "within": f"{challenger} equals {baseline} within the seeds' band",
        "worse": f"{challenger} is WORSE than {baseline} by more than the seeds' band",
    }[found.verdict]
    by_seed, base, mine = found.by_seed, found.baseline, found.challenger
    return (
        f"{challenger} minus {baseline}: {by_seed.mean:+.4f} nats per token in the mean (seed by seed "
        f"{by_seed.low:+.4f} to {by_seed.high:+.4f}, {by_seed.num} seeds). {challenger}'s mean is "
        f"{mine.mean:.4f}, {baseline}'s seeds lie between {base.low:.4f} and {base.high:.4f}: {verdict}."
    )


def _edges(study: StudyResults, *, noise: str) -> list[str]:
    """Notes on rates at the end of their grid, and on grids without a finished run."""
    config = study.plan.config
    found = []
    for of_noise, width in study.plan.settings:
        for rule in config.rules if of_noise == noise else ():
            choice = study.choice(rule, noise=noise, width=width)
            if text := edge_text(choice, config.title(rule), width=width):
                found.append(text)
    return found


def edge_text(choice: Choice | None, rule: str, *, width: str) -> str | None:
    """The note on a rate at the end of its grid; None if it lies inside."""
    if choice is None:
        return f"{rule} at {width}: no tuning run finished, so no rate was chosen."
    found = []
    if choice.edge == "only":
        found.append(f"its grid has one rate, {choice.lr:g}, so it was not tuned")
    elif choice.edge:
        where = f"is the {choice.edge} of its grid"
        found.append(f"the best rate, {choice.lr:g}, {where}, so a better one may lie beyond it")
    if choice.ratio_edge:
        found.append(
            f"the best vector ratio, {choice.vector_ratio:g}, is the {choice.ratio_edge} of those tried"
        )
    return f"{rule} at {width}: {'; '.join(found)}." if found else None


def _losses(study: StudyResults, *, noise: str) -> str:
    config = study.plan.config
    rows = []
    for rule in config.rules:
        results = study.report(rule, noise=noise)
        spread = Spread.of(losses(results))
        choice = study.choice(rule, noise=noise, width=config.widest)
        by_seed = ", ".join(f"{r.validation_loss:.4f}" if r.ok else r.status for r in results)
        band = (f"{spread.mean:.4f}", f"{spread.low:.4f}", f"{spread.high:.4f}") if spread else (DASH,) * 3
        rate = rate_text(choice) if choice else DASH
        rows.append([config.title(rule), rate, *band, by_seed or "no run"])
    head = ["rule", "rate", "mean", "min", "max", f"seeds {', '.join(map(str, config.seeds))}"]
    about = f"On {config.widest}, in nats per token, on validation sequences that chose no rate."
    return "\n\n".join([about, _table(head, rows), _picture("loss_tokens", config, noise=noise)])


def _rates(study: StudyResults, *, noise: str) -> str:
    """Each grid with its tuning losses on each width, the lowest in bold, and whether the rate transfers."""
    config = study.plan.config
    parts = [
        f"Tuning loss at the end, seed {config.tuning_seed}, on sequences that the claims do not use; the "
        "lowest in bold. A column is optim.matrix.lr; the ratio is optim.vector.lr as a share of it, and "
        "says nothing under Scion's rules."
    ]
    for rule in config.rules:
        rows = [
            [f"{width} x{ratio:g}", *_rate_cells(study, rule, ratio, noise=noise, width=width)]
            for of_noise, width in study.plan.settings
            for ratio in config.rules[rule].vector_ratios
            if of_noise == noise
        ]
        grid = [f"{lr:g}" for lr in config.rules[rule].grid]
        parts += [
            _table([f"{config.title(rule)}: width, ratio", *grid], rows),
            transfer_text(study, rule, noise=noise),
        ]
    parts.append(_picture("loss_rate", config, noise=noise))
    return "\n\n".join(part for part in parts if part)


def _rate_cells(study: StudyResults, rule: str, ratio: float, *, noise: str, width: str) -> list[str]:
    results = study.tuning(rule, noise=noise, width=width)
    by_rate = {r.run.lr: r for r in results if r.run.vector_ratio == ratio}
    choice = study.choice(rule, noise=noise, width=width)
    cells = []
    for lr in study.plan.config.rules[rule].grid:
        result = by_rate.get(lr)
        if result is None or not result.ok or result.tuning_loss is None:
            cells.append(result.status if result else "not run")
        else:
            cell = f"{result.tuning_loss:.4f}"
            chosen = choice and (choice.lr, choice.vector_ratio) == (lr, ratio)
            cells.append(f"**{cell}**" if chosen else cell)
    return cells


def transfer_text(study: StudyResults, rule: str, *, noise: str) -> str:
    """Whether the best rate is the same on every width; empty for a single width."""
    found = {
        width: rate_text(choice)
        for of_noise, width in study.plan.settings
        if of_noise == noise and (choice := study.choice(rule, noise=noise, width=width))
    }
    if len(found) < 2:
        return ""
    if len(set(found.values())) == 1:
        return f"The best rate is the same on every width: {next(iter(found.values()))}."
    listed = ", ".join(f"{rate} on {width}" for width, rate in found.items())
    return f"The best rate changes with the width: {listed}."


def rate_text(choice: Choice) -> str:
    """The rate of the matrices, and the ratio of the vectors' rate to it unless it is 1."""
    return f"{choice.lr:g}" if choice.vector_ratio == 1 else f"{choice.lr:g} x{choice.vector_ratio:g}"


def _token_section(study: StudyResults, *, noise: str, ending: str) -> list[str]:
    """Tokens of every rule to the reference's loss; empty without a reference."""
    config = study.plan.config
    reference = config.claims.reference
    if reference is None:
        return []
    rows = []
    for rule in config.rules:
        ratio = token_ratio(
            study.finished(rule, noise=noise), reference=study.finished(reference, noise=noise)
        )
        rows.append([config.title(rule), *_token_cells(ratio)])
    name = config.title(reference)
    about = (
        f"Tokens at which the validation curve of each seed first reaches {name}'s mean final validation "
        f"loss, linearly between evaluations, as shares of {name}'s budget. A seed that never reaches it "
        "counts in no mean. The learning rate of every run falls towards the end of its own budget, so a "
        "crossing before the end is one at a rate that is still high: a run planned for fewer tokens would "
        "do better there."
    )
    head = ["rule", "mean", "min", "max", "tokens of each seed", "never"]
    picture = _picture("tokens_to_reference", config, noise=noise)
    return [f"## Tokens to {name}'s loss{ending}", "\n\n".join([about, _table(head, rows), picture])]


def _token_cells(ratio: TokenRatio | None) -> list[str]:
    if ratio is None:
        return [DASH] * 5
    spread = ratio.spread
    band = [f"{spread.mean:.3f}", f"{spread.low:.3f}", f"{spread.high:.3f}"] if spread else [DASH] * 3
    each = ", ".join("never" if tokens is None else f"{tokens:,.0f}" for tokens in ratio.tokens)
    return [*band, each, str(ratio.num_unreached)]


def _failures(study: StudyResults) -> str:
    failed = study.failed()
    if not failed:
        return f"None of {len(study.results)}."
    rows = [[result.name, result.run.phase, result.status, _one_cell(result.error)] for result in failed]
    return f"{len(failed)} of {len(study.results)}.\n\n{_table(['run', 'phase', 'how', 'why'], rows)}"


def _one_cell(text: str | None) -> str:
    return (text or DASH).replace("|", "/").replace("\n", " ")


def _method(study: StudyResults, about: About) -> str:
    """Model, budget, corpus, code, machine; and every fragment."""
    plan, config = study.plan, study.plan.config
    run = plan.tuning_runs()[0]
    first, planned = plan.configs.of(run), plan.plan_of(run)
    widths = [_width(plan, width) for width in config.widths]
    provenance = about.provenance
    evaluation, schedule = first.evaluation, first.schedule
    rows = [
        ["phases", _phases(plan)],
        ["effort", _effort(study.results.values())],
        ["models", "; ".join(widths)],
        [
            "each run",
            f"{planned.num_steps * planned.tokens_per_step:,} tokens, {planned.num_steps} steps of "
            f"{planned.tokens_per_step:,}, sequences of {first.batch.sequence_length}, {first.precision}",
        ],
        [
            "learning rate",
            f"warm-up {schedule.warmup_fraction:.0%}, {schedule.decay} fall over the last "
            f"{schedule.decay_fraction:.0%} to {schedule.final_fraction:g} of the peak",
        ],
        [
            "held out",
            f"{evaluation.sequences} validation sequences for the claims, {evaluation.tuning_sequences} "
            "others for choosing rates",
        ],
        ["corpus", f"{first.data.source}, fingerprint {about.data_fingerprint}"],
        ["code", f"{provenance['commit']}{' with uncommitted changes' * bool(provenance['dirty'])}"],
        ["versions", ", ".join(f"{name} {version}" for name, version in provenance["packages"].items())],
        ["machine", _machine(provenance.get("host") or describe_host())],
    ]
    return (
        f"{_table(['what', 'value'], rows)}\n\nKeys of every run, and of each rule besides:\n\n{_keys(plan)}"
    )


def _phases(plan: StudyPlan) -> str:
    config = plan.config
    return (
        f"1. tuning: every rule on every rate of its grid, seed {config.tuning_seed}, in the settings "
        f"{', '.join(f'{width}/{noise}' for noise, width in plan.settings)}; 2. report: the best rate of "
        f"each rule on {config.widest}, seeds {', '.join(map(str, config.seeds))}"
    )


def _effort(results: Iterable[Result]) -> str:
    results = list(results)
    tokens, seconds = sum(r.tokens or 0 for r in results), sum(r.seconds or 0 for r in results)
    phases = [result.run.phase for result in results]
    counts = " + ".join(f"{phases.count(phase)} {phase}" for phase in dict.fromkeys(phases))
    return f"{len(results)} runs ({counts}), {tokens:,} tokens, {seconds / 60:.0f} minutes of training loops"


def _width(plan: StudyPlan, width: str) -> str:
    shape = plan.shape_of(width)
    return (
        f"{width}: {shape.num_parameters:,} parameters, {shape.num_layers} layers, hidden "
        f"{shape.hidden_size}, FFN {shape.ffn_size}, {shape.num_heads} heads, vocabulary {shape.vocab_size}"
    )


def _machine(host: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in host.items() if value and name != "hostname")


def _keys(plan: StudyPlan) -> str:
    config = plan.config
    lines = [f"all: {' '.join(config.common_keys)}"]
    lines += [f"tuning runs: {' '.join(config.tuning_keys)}"] * bool(config.tuning_keys)
    lines += [f"miniature: {' '.join(config.smoke_keys)}"] * (config.smoke and bool(config.smoke_keys))
    for name, rule in config.rules.items():
        ratios = " or ".join(f"{ratio:g}" for ratio in rule.vector_ratios)
        rates = f"optim.matrix.lr in {list(rule.grid)}, optim.vector.lr = {ratios} of it"
        lines.append(f"{name}: {' '.join(rule.keys)}; {rates}")
    lines += [f"noise {name}: {' '.join(noise.keys) or 'none'}" for name, noise in config.noises.items()]
    return "```\n" + "\n".join(lines) + "\n```"


def _repeat(plan: StudyPlan, about: About) -> str:
    runs = plan.config.study_directory / "runs"
    return (
        f"The whole study, or what is left of it:\n\n```\n{about.command}\n```\n\n"
        "One run alone, into a directory of its own, from the configuration that it left:\n\n"
        f"```\npython -m training.launch --config {runs}/RUN/config.yaml run.name=again\n```\n\n"
        "`results.csv` has a row for every run; `results.json` has their curves too."
    )


def _limits(study: StudyResults) -> list[str]:
    """What a reader must not conclude from the numbers."""
    plan, config = study.plan, study.plan.config
    run = plan.tuning_runs()[0]
    planned, first = plan.plan_of(run), plan.configs.of(run)
    tokens = planned.num_steps * planned.tokens_per_step
    share = tokens / planned.shape.num_parameters
    widths = len(config.widths)
    return [
        f"Models of {planned.shape.num_parameters:,} parameters and less, {number(share, digits=2)} tokens "
        "per parameter (about 20 are usual): the order of optimizers at this size and horizon need not hold "
        "at another.",
        f"One corpus ({first.data.source}), one tokenizer, one batch size, one form of schedule.",
        f"{len(config.seeds)} seeds: the bands are their extremes, not confidence intervals.",
        "Only learning rates were tuned, those of hidden matrices and of the other parameters in the ratios "
        "listed above; momentum, decay, clipping and the rest may suit one rule better than another.",
        f"A grid of {min(rule.num_points for rule in config.rules.values())} points and one tuning seed: a "
        "choice between neighbours can be chance.",
        f"Transfer of rates is seen on {widths} width(s)" + (", so nothing is." if widths == 1 else "."),
        "Tuning and validation sequences are different ones of the same held-out documents: rates are not "
        "chosen on the claims' sequences, but on text like them.",
        "Tokens, not time: what a step costs is measured by the benches.",
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str | None]]) -> str:
    return "\n".join(markdown(head, rows))


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines) or "None were asked for."


def _picture(name: str, config: StudyConfig, *, noise: str) -> str:
    return f"![{name}](figures/{figure_file(name, config, noise=noise)})"


def _range(spread: Spread) -> str:
    return f"{spread.low:.3f} to {spread.high:.3f}"
