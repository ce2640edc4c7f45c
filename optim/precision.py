"""In which precision matrix products are worth doing on this device.

Products of bf16 matrices accumulate in fp32 and round once, on every device. A CPU without bf16 arithmetic
does them element by element, 50 to 100 times slower than in fp32 (measured on AVX2, torch 2.13); there the
operands are widened, multiplied in fp32, and the result is rounded: the same precision, at fp32's speed.
"""

import functools

import torch


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to multiply `dtype` operands in: itself, or fp32 on a CPU without such arithmetic."""
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not cpu_has_bf16():
        return torch.float32
    return dtype


def gram_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the Gram form: on a GPU fp16 in place of bf16.

    Its operands have singular values of at most 1.2 and so never leave fp16's range; its three more bits
    bring the result to that of fp32 at the same speed. A CPU has no fast fp16.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        return torch.float16
    return product_dtype(dtype, device)


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 matrices on this CPU (AVX-512 or better), as torch itself asks."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
