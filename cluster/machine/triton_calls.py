"""What all Triton kernels share: whether a device runs them, and a launch that tests can compile.

The module imports anywhere: `unsupported` says where kernels run.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.machine import toolchain

try:
    import triton
except ImportError as error:
    TRITON_MISSING: str | None = f"triton cannot be imported: {error}"
    INTERPRETED = False
    jit: Callable[[Callable], Any] = lambda function: function  # noqa: E731
else:
    TRITON_MISSING = None
    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: numpy on any device, for tests
    jit = triton.jit


def unsupported(device: torch.device, capabilities: Collection[tuple[int, int]]) -> str | None:
    """Why kernels for these capabilities cannot run on `device`, in one sentence; None if they can."""
    if TRITON_MISSING is not None:
        return TRITON_MISSING
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"{device.type} is no CUDA device"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability not in capabilities:
        return f"there are tiles for compute capability {', '.join(map(str, capabilities))}, not {capability}"
    return toolchain.missing()  # else the first launch would fail


@dataclass(frozen=True)
class Call:
    """One launch. What Triton compiles follows from the kernel, the arguments' types and the options.

    Attributes:
        pdl: the kernel may begin while the one before it on the stream runs, and waits for its end itself
            (programmatic dependent launch, from sm_90 on).
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int
    pdl: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Triton's options. Fused multiply-add is asked for: its default changes between versions."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options | ({"launch_pdl": True} if self.pdl else {})

    def launch(self, *, like: Any = None) -> Any:
        """Launch it, and return what Triton compiled for it; None in the interpreter.

        Args:
            like: what an earlier launch returned, of the same kernel and options, with arguments of the same
                types and alignments on the current device. Triton then looks at none of them again, which
                takes longer than the launch.
        """
        if like is not None:
            like[(*self.grid, 1, 1)[:3]](*(self.arguments[name] for name in self.kernel.arg_names))
            return like
        tensor = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device, not on the tensors'
            return self.kernel[self.grid](**self.arguments, **self.options)
