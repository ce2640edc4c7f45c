"""In which precision a device computes. Models, kernels and ceilings all ask here.

Products of bf16 matrices accumulate in fp32 and round once, on every device. A CPU without bf16 arithmetic
multiplies them element by element, 40 to 100 times slower than fp32 (measured on AVX2, torch 2.13). There the
operands are widened, multiplied in fp32, and the result is rounded: the same precision, at fp32's speed.
"""

import functools
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BELOW_AVX512 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2")  # values of ONEDNN_MAX_CPU_ISA


def product_dtype(dtype: "torch.dtype", device: "torch.device") -> "torch.dtype":
    """The dtype to multiply `dtype` operands in: itself, or fp32 on a CPU without such arithmetic."""
    import torch

    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not cpu_has_bf16():
        return torch.float32
    return dtype


def gram_dtype(dtype: "torch.dtype", device: "torch.device") -> "torch.dtype":
    """The dtype of the Gram form: on a GPU fp16 in place of bf16.

    Its operands have singular values of at most 1.2 and so never leave fp16's range; its three more bits
    bring the result to that of fp32 at the same speed. A CPU has no fast fp16.
    """
    import torch

    if device.type == "cuda" and dtype == torch.bfloat16:
        return torch.float16
    return product_dtype(dtype, device)


def compute_dtype(device: "torch.device") -> "torch.dtype":
    """The default dtype of weights and activations: bf16, or fp32 on a CPU without bf16 arithmetic.

    On such a CPU bf16 saves memory and no time: every product would widen its operands first.
    """
    import torch

    return product_dtype(torch.bfloat16, device)


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 matrices, and oneDNN uses them.

    oneDNN also accepts bf16 on AVX-512 without such instructions, and emulates them there. On Linux on x86-64
    the kernel says it, so that a plan need not import torch.
    """
    flags = _cpu_flags()
    if flags is not None:
        held_to = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
        return "avx512_bf16" in flags and held_to not in BELOW_AVX512
    import torch

    emulated = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not emulated


def _cpu_flags() -> set[str] | None:
    """What this x86-64 CPU can do, in the words of Linux; None anywhere else."""
    with suppress(OSError):
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return set(found[1].split()) if found else None
    return None
