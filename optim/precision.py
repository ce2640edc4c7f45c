"""In which precision a device computes. Models, kernels and ceilings all ask here.

Products of bf16 matrices accumulate in fp32 and round once, on every device. A CPU without bf16 arithmetic
multiplies them element by element, 40 to 100 times slower than fp32 (measured on AVX2, torch 2.13). There the
operands are widened, multiplied in fp32, and the result is rounded: the same precision, at fp32's speed.
"""

import functools
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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

    oneDNN also accepts bf16 on AVX-512 without such instructions, and emulates them there.
    """
    import torch

    emulated = platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not emulated
