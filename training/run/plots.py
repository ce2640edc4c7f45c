"""Pictures of a run, made from its files."""

from pathlib import Path

from cluster.display import figure, save
from cluster.review.run_reader import Run


def plot_losses(run_directory: Path) -> Path:
    """Training and validation loss against tokens: `plots/loss.png`, from `metrics.jsonl`."""
    run = Run(run_directory)
    drawn, [axes] = figure(8, 5)
    for name, style in (
        ("loss", {"alpha": 0.6, "linewidth": 1}),
        ("validation_loss", {"marker": "o", "markersize": 4}),
    ):
        tokens, losses = run.curve(name, over="tokens")
        if tokens:
            axes.plot(tokens, losses, label=name.replace("_", " "), **style)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=run_directory.name)
    axes.legend()
    return save(drawn, run_directory / "plots" / "loss.png")
