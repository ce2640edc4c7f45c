"""What the hardware can do according to its datasheet, and how much of that was used.

Every peak carries its source. A GPU that is not in the table has no MFU, rather than a wrong one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.machine.host import KIB


@dataclass(frozen=True)
class Device:
    """Datasheet figures of one GPU.

    Attributes:
        name: as `torch.cuda.get_device_name` and `nvidia-smi` give it.
        bf16_tflops: peak of the tensor cores in TFLOP/s, bf16 with fp32 accumulation, dense (the larger
            figure "with sparsity" is twice this).
        memory_gb_per_s: bandwidth of the device memory, GB/s (1e9 bytes).
        memory_gb: size of the device memory as sold, GB.
        power_watts: highest board power, W.
        compute_capability: such as (8, 6) for sm_86.
        shared_memory_per_block_bytes: what one thread block may opt in to, bytes.
        source: URL of the datasheet or whitepaper.
    """

    name: str
    bf16_tflops: float
    memory_gb_per_s: float
    memory_gb: float
    power_watts: float
    compute_capability: tuple[int, int]
    shared_memory_per_block_bytes: int
    source: str


# Shared memory per block: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_SHARED_MEMORY_BYTES = {(8, 0): 163 * KIB, (8, 6): 99 * KIB, (8, 9): 99 * KIB, (9, 0): 227 * KIB}

_NVIDIA = "https://www.nvidia.com/content/dam/en-zz/Solutions"
_A40 = f"{_NVIDIA}/Data-Center/a40/nvidia-a40-datasheet.pdf"
_A100 = f"{_NVIDIA}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_GA102 = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_L40S = "https://www.nvidia.com/en-us/data-center/l40s/"
_H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"


def _device(
    name: str, tflops: float, gb_per_s: float, gb: float, watts: float, sm: tuple[int, int], source: str
) -> Device:
    return Device(name, tflops, gb_per_s, gb, watts, sm, _SHARED_MEMORY_BYTES[sm], source)


DEVICES = (
    _device("NVIDIA A40", 149.7, 696, 48, 300, (8, 6), _A40),
    _device("NVIDIA RTX A6000", 154.8, 768, 48, 300, (8, 6), _GA102),
    _device("NVIDIA A100-SXM4-40GB", 312, 1555, 40, 400, (8, 0), _A100),
    _device("NVIDIA A100-SXM4-80GB", 312, 2039, 80, 400, (8, 0), _A100),
    _device("NVIDIA L40S", 362.05, 864, 48, 350, (8, 9), _L40S),
    _device("NVIDIA H100 PCIe", 756, 2000, 80, 350, (9, 0), _H100),
    _device("NVIDIA H100 80GB HBM3", 989, 3350, 80, 700, (9, 0), _H100),  # the SXM5 module
    _device("NVIDIA H200", 989, 4800, 141, 700, (9, 0), _H200),  # the SXM5 module
)


def lookup(device_name: str) -> Device | None:
    """The datasheet of the GPU that its driver calls `device_name`, or None if we do not have it.

    The whole name must match, but for case, spacing and a leading "NVIDIA" (older drivers leave it out):
    'A400', a MIG slice ('... MIG 1g.10gb') and a vGPU ('A40-48Q') are other devices with other peaks.
    """
    return {_plain(device.name): device for device in DEVICES}.get(_plain(device_name))


SHORT_NAMES = {
    "a40": "NVIDIA A40",
    "a6000": "NVIDIA RTX A6000",
    "a100-40gb": "NVIDIA A100-SXM4-40GB",
    "a100-80gb": "NVIDIA A100-SXM4-80GB",
    "l40s": "NVIDIA L40S",
    "h100-pcie": "NVIDIA H100 PCIe",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
}


def by_short_name(name: str) -> Device | None:
    """The datasheet that people call "a40" or "h100" (the SXM5 module), or None."""
    return lookup(SHORT_NAMES.get(name.lower(), ""))


def roofline_seconds(
    *,
    flops: float,
    num_bytes: float | None,
    peak_flops: float,
    bytes_per_s: float,
    link_bytes: float = 0.0,
    link_bytes_per_s: float = math.inf,
) -> tuple[float, str]:
    """The least time of some work, and what bounds it: "compute", "bandwidth" or "link".

    max(flops / peak_flops, num_bytes / bytes_per_s, link_bytes / link_bytes_per_s), as if all three ran at
    once; `num_bytes` None: memory does not bound it. `link_bytes` are what a rank sends to others.
    Source: Williams, Waterman, Patterson, Roofline, CACM 52(4), 2009, https://doi.org/10.1145/1498765.1498785.
    """
    seconds = {
        "compute": flops / peak_flops,
        "bandwidth": (num_bytes or 0.0) / bytes_per_s,
        "link": link_bytes / link_bytes_per_s,
    }
    bound = max(seconds, key=lambda resource: seconds[resource])
    return seconds[bound], bound


def _plain(name: str) -> str:
    return " ".join(name.lower().split()).removeprefix("nvidia ")


def mfu(*, tokens_per_second: float, flops_per_token: float, num_devices: int, peak_tflops: float) -> float:
    """Model FLOPs utilisation, as a fraction of 1.

    mfu = tokens_per_second * flops_per_token / (num_devices * peak_tflops * 1e12), where `tokens_per_second`
    is the rate of all devices together and recomputed activations do not count as FLOPs.
    Source: Chowdhery et al., PaLM, appendix B, https://arxiv.org/abs/2204.02311.
    """
    return tokens_per_second * flops_per_token / (num_devices * peak_tflops * 1e12)


def mbu(*, bytes_per_step: float, step_seconds: float, gb_per_s: float) -> float:
    """Memory bandwidth utilisation of decoding, as a fraction of 1.

    mbu = bytes_per_step / step_seconds / (gb_per_s * 1e9), where one step reads the weights once and the
    keys and values of every running sequence.
    Source: https://www.databricks.com/blog/llm-inference-performance-engineering-best-practices.
    """
    return bytes_per_step / step_seconds / (gb_per_s * 1e9)


def ceiling_fault(shares: Mapping[str, float], *, ceiling: str) -> str | None:
    """Why a ceiling is void if something reached more than 100% of it, or None.

    Such a ceiling was measured too low, or the work was counted too high: it bounds nothing.

    Args:
        shares: name of what was measured -> its share of the ceiling, as a fraction of 1.
        ceiling: its name.
    """
    name, share = max(shares.items(), key=lambda item: item[1], default=("", 0.0))
    if share <= 1:
        return None
    return f"{ceiling}: {name} reaches {share:.0%} of it, so it is no ceiling, and no share of it counts"
