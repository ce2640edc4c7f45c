"""optim/native.cpp: compiled at first use, and called. A CPU with AVX-512 BF16 and a C++ compiler needed.

Without either everything runs on torch alone, and `unsupported` says why. The library is kept in
$XDG_CACHE_HOME/asuncion (~/.cache/asuncion) under a name that changes with source, compiler and flags.
ASUNCION_NATIVE=0 turns it off.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
)
COMPILE_SECONDS = 120  # after which a compiler has failed; 2 s is usual
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_MATRIX = (_POINTER, _LONG, _LONG, _LONG)  # data, strides


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `symmetric_product` cannot run there, in one sentence; None if it can. The first call compiles."""
    if device.type != "cpu":
        return f"{device.type} is no CPU"
    if dtype != torch.bfloat16:
        return f"products of {dtype} stay with torch"
    return _library()[1]


def symmetric_product(
    a: Tensor, b: Tensor, *, alpha: float = 1.0, c: Tensor | None = None, beta: float = 0.0
) -> Tensor:
    """alpha·A·Bᵀ + beta·C, known to be symmetric: half of it is computed, and written twice.

    As `optim.kernels.symmetric_product`, on the CPU. Sums are fp32 and rounded once.

    Args:
        a, b: [B, n, k], bf16, any strides. Packing is fastest where rows are contiguous to each other
            (stride(-2) == 1), next where columns are.
        c: [B, n, n], contiguous, symmetric: its upper half is not read.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or `unsupported`.
    """
    library, reason = _library()
    if library is None:
        raise ValueError(reason)
    tensors = (a, b) if c is None else (a, b, c)
    if any(tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu" for tensor in tensors):
        raise ValueError("operands must be bf16, on the CPU")
    size, n, k = a.shape
    if b.shape != a.shape or (c is not None and (c.shape != (size, n, n) or not c.is_contiguous())):
        raise ValueError(f"{tuple(a.shape)} and {tuple(b.shape)} have no symmetric product like C")
    out = a.new_empty(size, n, n)
    library.symmetric_product(
        a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), None if c is None else c.data_ptr(),
        out.data_ptr(), size, n, k, alpha, beta, torch.get_num_threads(),
    )  # fmt: skip
    return out


@cache
def _library() -> tuple[Any, str | None]:
    """(the library, None) or (None, why there is none)."""
    if os.environ.get("ASUNCION_NATIVE") == "0":
        return None, "ASUNCION_NATIVE=0 turned it off"
    if not torch.cpu._is_avx512_bf16_supported():
        return None, "this CPU has no AVX-512 BF16"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None, f"no C++ compiler: {os.environ.get('CXX', 'g++')} is not on the path"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        return None, f"{compiler} failed: {next((line for line in lines if 'error' in line), error)}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{SOURCE.name} cannot be compiled or loaded: {error}"
    library.symmetric_product.argtypes = (
        *_MATRIX, *_MATRIX, _POINTER, _POINTER, *[_LONG] * 3, _FLOAT, _FLOAT, _LONG
    )  # fmt: skip
    library.symmetric_product.restype = None
    return library, None


def _compiled(compiler: str) -> Path:
    """The shared library, made if it is not there. Ranks that make it at once replace it by its like."""
    cache_root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    run: Any = partial(subprocess.run, capture_output=True, check=True, timeout=COMPILE_SECONDS)
    version = run([compiler, "--version"])
    key = hashlib.sha256(SOURCE.read_bytes() + version.stdout + " ".join(FLAGS).encode()).hexdigest()[:16]
    path = cache_root / "asuncion" / f"native-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            run([compiler, *FLAGS, "-o", str(made), str(SOURCE)])
            made.replace(path)
    return path
