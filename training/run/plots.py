"""Pictures of a run, made from its files."""

from pathlib import Path

from cluster.display import figure, save
from cluster.record.record import read_metrics


def plot_losses(run_directory: Path) -> Path:
    """Training and validation loss against tokens: `plots/loss.png`, from `metrics.jsonl`."""
    rows = read_metrics(run_directory / "metrics.jsonl")
    drawn, [axes] = figure(8, 5)
    for name, style in (
        ("loss", {"alpha": 0.6, "linewidth": 1}),
        ("validation_loss", {"marker": "o", "markersize": 4}),
    ):
        points = [(row["tokens"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=run_directory.name)
    axes.legend()
    return save(drawn, run_directory / "plots" / "loss.png")
