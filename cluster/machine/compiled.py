"""C++ beside a module: compiled at first use, or not with a reason. An x86-64 CPU with AVX2 is needed.

One source serves two tiers of vectors (simd.h), and a third in which it may multiply by tiles. The best that
the CPU has is chosen, unless torch itself is held to less: ATEN_CPU_CAPABILITY=avx2 gives the lowest
tier, =default none. A library is kept in $XDG_CACHE_HOME/asuncion (~/.cache/asuncion) under a name that
changes with source, header, compiler and flags. ASUNCION_NATIVE=0 turns all of it off.

Loading a library runs it. So the folder must belong to this user and is closed to all others; a library in
it that another user owns or may write is compiled again.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from cluster import private

HEADER = Path(__file__).with_name("simd.h")  # a source may include it, and headers that lie beside either
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16")
TILES = "AMX BF16"  # the tier that multiplies by tiles; the others have vectors alone
TIERS = {  # best first: name -> the compiler's flags
    TILES: (*AVX512, "-mamx-tile", "-mamx-bf16"),
    "AVX-512 BF16": AVX512,
    "AVX2": ("-mavx2", "-mfma"),
}
ALLOWED = {"DEFAULT": (), "AVX2": ("AVX2",)}  # torch's CPU capability -> tiers; every other one allows all
COMPILE_SECONDS = 120  # after which a compiler has failed; 2 s is usual


def load(source: Path, *, flags: Sequence[str] = (), tier: str | None = None) -> tuple[Any, str | None]:
    """(the library of a .cpp file, None) or (None, why there is none, in one sentence).

    Args:
        tier: a name in `TIERS`; None takes `choose_tier`'s.
    """
    if os.environ.get("ASUNCION_NATIVE") == "0":
        return None, "ASUNCION_NATIVE=0 turned it off"
    tier, reason = choose_tier() if tier is None else (tier, lacks(tier))
    if tier is None or reason is not None:
        return None, reason
    return _load(source, (*FLAGS, *TIERS[tier], *flags))


@cache
def choose_tier() -> tuple[str | None, str | None]:
    """(the best tier that this CPU has and torch may use, None) or (None, why there is none)."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    reasons = {tier: lacks(tier) for tier in TIERS}
    for tier in ALLOWED.get(capability, TIERS):
        if reasons[tier] is None:
            return tier, None
    lowest = list(TIERS)[-1]
    return None, reasons[lowest] or f"torch's CPU capability is {capability}, below {lowest}"


def lacks(tier: str) -> str | None:
    """Why code of this tier cannot run on this CPU, in one sentence; None if it can."""
    import torch

    if (machine := platform.machine()) not in ("x86_64", "AMD64"):
        return f"this CPU is {machine}, and the compiled code is for x86-64 with AVX2"
    has = {
        TILES: lambda: cpu_has_amx() and torch.cpu._init_amx(),  # Linux wants to be asked for tiles
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported,
        # FMA is in every CPU in which torch uses AVX2: its own code for that needs both.
        "AVX2": torch.cpu._is_avx2_supported,
    }
    return None if has[tier]() else f"this CPU has no {tier}"


def cpu_has_amx() -> bool:
    """Whether oneDNN multiplies bf16 matrices by AMX tiles here, several times faster than by vectors."""
    import torch

    held_to = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    free = held_to in ("ALL", "DEFAULT") or "AMX" in held_to
    return free and bool(torch.cpu.get_capabilities().get("amx_bf16"))


@cache
def _load(source: Path, flags: Sequence[str]) -> tuple[Any, str | None]:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None, f"no C++ compiler: {os.environ.get('CXX', 'g++')} is not on the path"
    try:
        return ctypes.CDLL(str(_compiled(source, compiler, flags))), None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        return None, f"{compiler} failed: {next((line for line in lines if 'error' in line), error)}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{source.name} cannot be compiled or loaded: {error}"


def _compiled(source: Path, compiler: str, flags: Sequence[str]) -> Path:
    """The shared library, made if it is not there. Processes that make it at once replace it by its like.

    Raises:
        OSError: the folder cannot be made or written, or belongs to another user.
    """
    cache_root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    run: Any = partial(subprocess.run, capture_output=True, check=True, timeout=COMPILE_SECONDS)
    version = run([compiler, "--version"])
    read = [file.read_bytes() for file in (source, *_headers(HEADER), *_headers(source))]
    parts = (*read, version.stdout, " ".join(flags).encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = cache_root / "asuncion" / f"{source.parent.name}-{source.stem}-{key}.so"
    _close_to_others(path.parent)
    if not (path.exists() and private.is_ours(path.stat())):
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            run([compiler, *flags, f"-I{HEADER.parent}", "-o", str(made), str(source)])
            made.chmod(0o700)
            made.replace(path)
    return path


def _headers(beside: Path) -> list[Path]:
    return sorted(beside.parent.glob("*.h"))


def _close_to_others(folder: Path) -> None:
    """Make the folder if it is missing, and let nobody else write it. Raises `OSError`: it is not ours.

    Unlike `private.make_folder` it mends a folder that others can write to, and takes any folder above it:
    each library is checked before it is loaded.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (owner := folder.stat().st_uid) != os.geteuid():
        raise PermissionError(f"{folder} belongs to uid {owner}; set XDG_CACHE_HOME to a folder of your own")
    folder.chmod(0o700)
