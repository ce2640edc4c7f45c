"""How the fp32 masters stay unharmed by DeepSpeed's copy of them.

`step` writes what the model computes with: the masters rounded, or the point ahead. After it DeepSpeed copies
the masters onto the model's copy, which would erase that point. So until its step is over, the masters
(`flat`) show the memory of that copy (`model`), and DeepSpeed copies it onto itself:

                        flat.data                 model
    before our step     masters                   weights of the last step, or the point
    after our step      masters, updated          new weights, or the point
    lend                the memory of model       new weights, or the point
    DeepSpeed copies    model onto itself; then it gathers model from all ranks
    take_back           masters, updated          new weights, or the point
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from optim.step.fragments import Fragment


class Lending:
    """The masters that show the model's copy now."""

    def __init__(self) -> None:
        self._lent: list[tuple[Tensor, Tensor]] = []  # (flat, the masters' own memory)

    def lend(self, fragments: Iterable[Fragment]) -> None:
        """Let the flat tensors show the model's copy, where there is one, until `take_back`."""
        for flat, model in {id(f.flat): (f.flat, f.model) for f in fragments}.values():
            if model is not None:
                self._lent.append((flat, flat.data))
                flat.data = model

    def take_back(self) -> None:
        """Let them show the masters again."""
        for flat, masters in self._lent:
            flat.data = masters
        self._lent = []

    def ends_with(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """DeepSpeed's `step`, after which the masters are back, also if it raises."""

        @functools.wraps(step)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            try:
                return step(*arguments, **options)
            finally:
                self.take_back()

        return wrapped
