"""Counts the bytes that a rank sends in torch.distributed's collectives."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


class Traffic:
    """Bytes that this rank sends in torch.distributed's collectives, by the formulas in SHARES.

    Wraps the collectives for the life of the process; outside `counting` they cost nothing more.
    """

    SHARES: Mapping[str, tuple[str, Callable[[int], float]]] = {
        # collective: (argument that holds the payload, multiple of it that a rank of W sends)
        "all_reduce": ("tensor", lambda w: 2 * (w - 1) / w),
        "reduce": ("tensor", lambda w: (w - 1) / w),  # on average over the ranks, as in broadcast
        "broadcast": ("tensor", lambda w: (w - 1) / w),
        "all_gather": ("tensor", lambda w: w - 1),
        "all_gather_single": ("input_tensor", lambda w: w - 1),
        "reduce_scatter": ("input_list", lambda w: (w - 1) / w),
        "reduce_scatter_single": ("input", lambda w: (w - 1) / w),
        "all_to_all_single": ("input", lambda w: (w - 1) / w),  # if the parts are equal
    }

    def __init__(self) -> None:
        self.sent_bytes = 0.0
        self._counting = False
        for name in self.SHARES:
            wrapped = self._wrap(name, getattr(dist, name))
            for module in (dist, dist.distributed_c10d):  # in the latter torch's functions call each other
                setattr(module, name, wrapped)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count from zero."""
        self.sent_bytes, self._counting = 0.0, True
        try:
            yield
        finally:
            self._counting = False

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._counting:
                given = signature.bind(*args, **kwargs).arguments
                self.sent_bytes += self._bytes(name, given)
            return function(*args, **kwargs)

        return wrapped

    def _bytes(self, name: str, given: Mapping[str, Any]) -> float:
        argument, share = self.SHARES[name]
        payload, group = given[argument], given.get("group")
        total = sum(t.nbytes for t in (payload if isinstance(payload, list) else [payload]))
        splits = given.get("input_split_sizes")
        if splits:
            row_bytes = payload.nbytes / max(1, payload.size(0))
            return total - splits[dist.get_rank(group)] * row_bytes
        return total * share(dist.get_world_size(group))
