"""C++ beside a module: compiled at first use, or not with a reason. A CPU with AVX-512 BF16 is needed.

A library is kept in $XDG_CACHE_HOME/asuncion (~/.cache/asuncion) under a name that changes with source,
compiler and flags. ASUNCION_NATIVE=0 turns all of it off.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
)
COMPILE_SECONDS = 120  # after which a compiler has failed; 2 s is usual


@cache
def load(source: Path, *, flags: Sequence[str] = ()) -> tuple[Any, str | None]:
    """(the library of a .cpp file, None) or (None, why there is none, in one sentence)."""
    if os.environ.get("ASUNCION_NATIVE") == "0":
        return None, "ASUNCION_NATIVE=0 turned it off"
    import torch

    if not torch.cpu._is_avx512_bf16_supported():
        return None, "this CPU has no AVX-512 BF16"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None, f"no C++ compiler: {os.environ.get('CXX', 'g++')} is not on the path"
    try:
        return ctypes.CDLL(str(_compiled(source, compiler, (*FLAGS, *flags)))), None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        return None, f"{compiler} failed: {next((line for line in lines if 'error' in line), error)}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{source.name} cannot be compiled or loaded: {error}"


def _compiled(source: Path, compiler: str, flags: Sequence[str]) -> Path:
    """The shared library, made if it is not there. Processes that make it at once replace it by its like."""
    cache_root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    run: Any = partial(subprocess.run, capture_output=True, check=True, timeout=COMPILE_SECONDS)
    version = run([compiler, "--version"])
    key = hashlib.sha256(source.read_bytes() + version.stdout + " ".join(flags).encode()).hexdigest()[:16]
    path = cache_root / "asuncion" / f"{source.parent.name}-{source.stem}-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            run([compiler, *flags, "-o", str(made), str(source)])
            made.replace(path)
    return path
