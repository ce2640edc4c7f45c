"""What the model computes with: its weights, the points ahead of them, or an average of its weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from optim.step import saved
from optim.step.after import AVERAGE
from optim.step.fused import FusedStep
from optim.step.lending import Lending


class Shown:
    """Changes it for a while, on every rank. Its methods are collective.

    Args:
        units: the steps of this rank.
        refresh: writes the model's weights, in their precision, from what the flat tensors show.
    """

    def __init__(
        self, units: Mapping[int, FusedStep], lending: Lending, *, refresh: Callable[[], None]
    ) -> None:
        self._units, self._lending, self._refresh = units, lending, refresh

    @contextmanager
    def weights(self, *, averaged: bool) -> Iterator[None]:
        """A block in which the model computes with the weights, also under rules that look ahead.

        It keeps this rank's share of the points aside for as long as the block lasts.

        averaged: with the averages of the weights.
        """
        units = self._units.values()
        points = saved.copy_points(units)
        if not (points or averaged):
            yield
            return
        masters = [(flat, flat.data) for unit in units for flat in unit.flats] if averaged else []
        if averaged:
            for unit in units:
                for flat, state in zip(unit.flats, unit.states, strict=True):
                    flat.data = state[AVERAGE]
        self._refresh()
        try:
            yield
        finally:
            for flat, own in masters:
                flat.data = own
        if averaged:
            self._refresh()
        self.write_points(points)

    @torch.no_grad()
    def write_points(self, points: list[tuple[Tensor, Tensor]]) -> None:
        """Write these into the model's copies of this rank's shards, and hand them to every rank.

        Refreshing gathers what the masters show. While they are lent, that is the points.
        """
        if any(unit.rule.looks_ahead for unit in self._units.values()):
            for model, point in points:
                model.copy_(point)
            for unit in self._units.values():
                self._lending.lend(unit.fragments)
            self._refresh()
            self._lending.take_back()
