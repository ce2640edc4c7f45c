"""What the learning rate does where a run goes on with another schedule, such as more tokens."""

from dataclasses import asdict

from optim.schedule import lr_factor
from training.config import TrainConfig

NOTABLE_RISE = 1.1  # of the rate from one step to the next, above which there is advice


def describe_seam(before: TrainConfig, after: TrainConfig, *, applied_steps: int) -> str | None:
    """One sentence, and advice if the rate jumps up; None if the schedule and the peak rates are the same.

    Args:
        before: of the start that took the last step; `after`: of the one that takes the next.
        applied_steps: until now.
    """
    if before.schedule == after.schedule and _peaks(before) == _peaks(after):
        return None
    last, following = _rate(before, applied_steps - 1), _rate(after, applied_steps)
    num_steps, end = _num_steps(after), _rate(after, _num_steps(after) - 1)
    warm = round(after.schedule.warmup_fraction * num_steps)
    fall = num_steps - round(after.schedule.decay_fraction * num_steps)
    phases = [f"rises to step {warm:,}"] if applied_steps < warm else []
    phases += [f"stays until step {fall:,}"] if max(applied_steps, warm) < fall else []
    phases += [f"ends at {end:.3g} in step {num_steps:,}"]
    tokens = f"schedule.tokens was {before.schedule.tokens:,} and is {after.schedule.tokens:,}"
    changed = "the schedule" if before.schedule.tokens == after.schedule.tokens else tokens
    text = (
        f"{changed}: the learning rate (optim.matrix.lr) goes from {last:.3g} in step {applied_steps:,} "
        f"to {following:.3g} in step {applied_steps + 1:,}, {', '.join(phases)}"
    )
    if following > NOTABLE_RISE * last and applied_steps >= warm:
        rest = min((num_steps - applied_steps) / num_steps, 1 - after.schedule.warmup_fraction)
        share = last / after.optim.matrix.lr
        vector = after.optim.vector.lr * share
        smooth = (
            f"let it fall on from {last:.3g} instead, set schedule.decay_fraction={rest:.3g} "
            f"optim.matrix.lr={last:.3g} optim.vector.lr={vector:.3g}, or"
        )
        text += (
            f"; to {smooth if last else 'avoid the jump,'} go on from a checkpoint before its fall "
            "(checkpoint.keep_every_steps)"
        )
    return text


def _num_steps(config: TrainConfig) -> int:
    return config.schedule.tokens // config.batch.tokens


def _peaks(config: TrainConfig) -> tuple[float, float]:
    return config.optim.matrix.lr, config.optim.vector.lr


def _rate(config: TrainConfig, applied_steps: int) -> float:
    """Of the hidden matrices, in the step that follows `applied_steps`."""
    schedule = {name: value for name, value in asdict(config.schedule).items() if name != "tokens"}
    return config.optim.matrix.lr * lr_factor(applied_steps, num_steps=_num_steps(config), **schedule)
