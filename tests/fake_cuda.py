"""A GPU of which only shapes, dtypes and devices exist (`FakeTensorMode`), and a log of the host's waits.

A wrong device raises here as it does on a GPU. What costs time there and none on a CPU is logged: copies
between host and GPU, and numbers that Python asks of a tensor. It shows that code is sound on a GPU in these
respects, not that it computes the right numbers there, nor how fast.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from optim.kernels import gpu, product
from optim.kernels.passes import SegmentTable

ROOT = Path(__file__).parents[1]
ROOMS = ("cluster", "optim", "training", "serving")
CAPABILITY = (9, 0)  # of the card that is played

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)


class HostTraffic(TorchDispatchMode):
    """Counts, by (kind, "file function") of ours, what passes between the host and the GPU.

    Kinds: "to device" and "to host" are copies for which the host waits, since its memory is not pinned or
    the copy blocks; with "async" before them it does not wait; "number" is a value that Python asks for, and
    "wait" an event or a device that it waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._pinned: list[torch.UntypedStorage] = []

    def note(self, kind: str) -> None:
        self.counts[kind, _caller()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func.namespace == "aten" and func._can_decompose():
            with self:  # in this mode composite operations arrive whole, and it is their parts that copy
                return func.decompose(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            if args[0].device.type == "cuda":
                self.note("number")
            return args[0].dtype.is_floating_point * 0.0
        result = func(*args, **kwargs)
        if func in COPIES:
            source, target = (args[0], result) if func is aten._to_copy.default else (args[1], args[0])
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            self._note_copy(source, target, blocking=blocking)
        if kwargs.get("pin_memory"):
            self._pinned.append(result.untyped_storage())
        return result

    def _note_copy(self, source: Tensor, target: Tensor, *, blocking: bool) -> None:
        there, here = source.device.type == "cuda", target.device.type == "cuda"
        if there != here:
            host = target if there else source
            pinned = any(host.untyped_storage()._cdata == storage._cdata for storage in self._pinned)
            waits = blocking or not pinned
            self.note(("" if waits else "async ") + ("to host" if there else "to device"))


def _caller() -> str:
    """The innermost function of ours on the stack, as "file function"."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in ROOMS:
            return f"{file.relative_to(ROOT)} {frame.f_code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]
    return "a test"


@contextmanager
def fake_cuda(*, with_kernels: bool = False) -> Iterator[HostTraffic]:
    """Fake tensors may be on "cuda" in this block; yields the log of what waits for the host.

    with_kernels: as if the Triton kernels ran there. Their operands are checked, and nothing is launched.
    """
    traffic = HostTraffic()

    class Event:
        def __init__(self, **_: Any) -> None:
            pass

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            traffic.note("wait")

        def elapsed_time(self, _: "Event") -> float:
            return 0.0

    def tolist(tensor: FakeTensor) -> Any:
        if tensor.device.type == "cuda":
            traffic.note("to host")
        return np.zeros(tuple(tensor.shape), dtype=float if tensor.is_floating_point() else int).tolist()

    def launch(call: gpu.Call, *, like: Any = None) -> None:
        places = {value.device.type for value in call.arguments.values() if isinstance(value, Tensor)}
        assert places == {"cuda"}, f"{call.kernel} has operands on {places}"

    def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
        known = with_kernels and device.type == "cuda" and dtype in gpu.PRODUCT_DTYPES
        return None if known else "not in this test"

    with ExitStack() as stack:
        stack.enter_context(_guard())
        # A real GPU is not to be touched.
        stack.enter_context(patch("torch.cuda.is_available", lambda: False))
        for module in (gpu, product):
            stack.enter_context(patch.object(module, "unsupported", unsupported))
        stack.enter_context(patch.object(FakeTensor, "tolist", tolist))
        stack.enter_context(patch("torch.cuda.Event", Event))
        stack.enter_context(patch("torch.cuda.synchronize", lambda *_: traffic.note("wait")))
        if with_kernels:
            stack.enter_context(patch("torch.cuda.get_device_capability", lambda *_: CAPABILITY))
            stack.enter_context(patch.object(gpu.Call, "launch", launch))
            build = partial(_build_table, SegmentTable.build)
            stack.enter_context(patch.object(SegmentTable, "build", build))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(traffic)
        yield traffic


def _build_table(build: Callable[..., SegmentTable], *lists: Any, device: torch.device) -> SegmentTable:
    """Its sizes follow from numbers, which fake tensors have not: made on the CPU, then faked on `device`."""
    with _disable_current_modes():
        real = build(*lists, device=torch.device("cpu"))

    def there(value: Any) -> Any:
        is_tensor = isinstance(value, Tensor)
        return torch.empty(value.shape, dtype=value.dtype, device=device) if is_tensor else value

    return SegmentTable(**{field.name: there(getattr(real, field.name)) for field in fields(real)})


@contextmanager
def _guard() -> Iterator[None]:
    """What FakeTensorMode sets up by itself where torch was built with CUDA. Skips without a C++ compiler."""
    if torch.version.cuda is not None:
        yield
        return
    library = _library()
    library.set_guard(True)
    try:
        yield
    finally:
        library.set_guard(False)


@cache
def _library() -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("fake CUDA tensors in a CPU build of torch need a C++ compiler: g++ is not on the path")
    source, torch_folder = Path(__file__).with_suffix(".cpp"), Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fake_cuda.so"
        command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
        command += ["-o", str(path), str(source), f"-L{torch_folder / 'lib'}", "-lc10"]
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(str(path))
