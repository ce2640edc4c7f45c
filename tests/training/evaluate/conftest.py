"""The fixtures of the evaluation's tests."""

from tests.training.evaluate.trained_run import model, no_ranks, tasks, tokenizer, trained, working_directory

__all__ = ["model", "no_ranks", "tasks", "tokenizer", "trained", "working_directory"]
