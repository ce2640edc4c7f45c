"""Block 1: what runs here, what the device reaches at best, and which attention each shape gets."""

import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cluster.machine.host import describe_host
from cluster.measure import probe
from cluster.record import provenance
from optim.kernels import gpu
from optim.precision import product_dtype
from tests.gpu.block import Run
from tests.gpu.command import PACKAGES

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def measure(run: Run) -> None:
    run.attempt(versions, ceilings, products, attention)


def versions(run: Run) -> None:
    host = describe_host()
    run.row("versions", python=sys.version.split()[0], **provenance.versions(PACKAGES))
    run.row(
        "the machine",
        cpu=host["cpu"],
        cpu_cores=host["cpu_cores"],
        c_compiler=shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "none",
        python_h=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        triton_kernels=gpu.unsupported(run.device, torch.bfloat16) or "supported",
    )
    if run.gpu:
        properties = torch.cuda.get_device_properties(run.device)
        run.row(
            properties.name,
            memory_gb=properties.total_memory / 1e9,
            multiprocessors=properties.multi_processor_count,
            compute_capability=f"{properties.major}.{properties.minor}",
            driver=host.get("gpu_driver"),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            nccl=".".join(map(str, torch.cuda.nccl.version())),
        )


def ceilings(run: Run) -> None:
    """`cluster.measure.probe`, whose rates are the ceilings of all blocks."""
    small = {} if run.gpu else {"size": 512, "repeats": 2}
    for name, value in asdict(probe.measure(device=run.device.type, **small)).items():
        if isinstance(value, dict) and "best" in value:
            lowest, highest = value["spread"]
            figures = {name: value["best"], f"lowest_{name}": lowest, f"highest_{name}": highest}
            # Shares are of what short bursts of products reach; a GPU sustains less, by its limit of power.
            known = {} if name == "product_sustained_tflops" else {"ceiling": name}
            run.row("cluster.measure.probe", **known, **figures)


def products(run: Run) -> None:
    """Square products by dtype. tf32 is fp32 with torch's matmul precision "high"."""
    n = 8192 if run.gpu else 128
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("fp16", torch.float16, "highest"),
        ("fp32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = (run.random(n, n, dtype=product_dtype(dtype, run.device), seed=seed) for seed in (1, 2))
        out = torch.empty_like(a)
        middle, least, _ = run.seconds_of(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        tflops = 2 * n**3 / 1e12
        run.row(
            f"product {n} {name}",
            multiplied_in=str(a.dtype).removeprefix("torch."),
            median_tflops=tflops / middle,
            best_tflops=tflops / least,
            ms=1e3 * middle,
        )
    torch.set_float32_matmul_precision(before)


def attention(run: Run) -> None:
    """Milliseconds by backend, and the one that torch chooses by itself."""
    scale = 1 if run.gpu else 32
    long, channels = 2048 // scale, 128 if run.gpu else 16
    cases = {  # name -> (batch, heads, key heads, queries, keys, mask)
        "training, causal": (4, 16, 16, long, long, "causal"),
        "training, causal, 4 queries a key head": (4, 16, 4, long, long, "causal"),
        "prefilling, a mask": (1, 16, 16, long, long, "mask"),
        "decoding, a mask": (32, 16, 16, 1, long, "mask"),
        "decoding, a mask, 4 queries a key head": (32, 16, 4, 1, long, "mask"),
    }
    for name, (batch, heads, key_heads, queries, keys, kind) in cases.items():
        dtype = torch.bfloat16 if run.gpu else torch.float32
        q = run.random(batch, heads, queries, channels, dtype=dtype)
        k, v = (run.random(batch, key_heads, keys, channels, dtype=dtype, seed=s) for s in (1, 2))
        mask = None
        if kind == "mask":  # the decoder's: [B, 1, T, N]
            seen = torch.arange(keys - queries, keys, device=run.device)
            mask = (torch.arange(keys, device=run.device) <= seen[:, None]).expand(batch, 1, -1, -1)
        grouped = heads != key_heads
        given = {"is_causal": kind == "causal", "attn_mask": mask, "enable_gqa": grouped}
        chosen = torch._fused_sdp_choice(q, k, v, mask, 0.0, kind == "causal", enable_gqa=grouped)
        figures: dict[str, float | str | None] = {"chosen": SDPBackend(chosen).name}
        for label, backend in BACKENDS.items():
            forward = lambda q=q, k=k, v=v, given=given: F.scaled_dot_product_attention(q, k, v, **given)  # noqa: E731
            figures[f"{label}_ms"] = _milliseconds(run, forward, backend)
        if kind == "causal":
            figures["chosen_backward_ms"] = _backward_ms(run, q, k, v, given)
        run.row(f"attention, {name}, {batch}x{heads}x{queries}x{keys}x{channels}", **figures)


def _milliseconds(run: Run, forward: Callable[[], Tensor], backend: SDPBackend) -> float | None:
    """None: the backend does not take this shape here."""
    try:
        with sdpa_kernel(backend):
            return 1e3 * run.seconds_of(forward, repeats=5)[0]
    except RuntimeError:
        return None


def _backward_ms(run: Run, q: Tensor, k: Tensor, v: Tensor, given: dict) -> float:
    """Forward and backward, of the backend that torch chooses."""
    leaves = [each.detach().requires_grad_() for each in (q, k, v)]
    direction = torch.randn_like(q)

    def there_and_back() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(*leaves, **given), leaves, direction)

    return 1e3 * run.seconds_of(there_and_back, repeats=5)[0]
