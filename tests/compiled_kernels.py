"""Triton kernels without a GPU: interpreted, or compiled for any; and what keeps those from running well."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget

from cluster.machine.triton_calls import Call
from cluster.session import ROOT

SHARED_BYTES = {(8, 6): 101_376, (9, 0): 232_448}  # most per block: CUDA C++ programming guide, appendix
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class AbsentDriver:
    """What Triton asks of a driver in order to compile; all launches are warm-ups."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], warp_size=32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def run_interpreted(*files: str, passes: int) -> None:
    """Run the functions named `interpreted_*` of these files by Triton's interpreter; so many must pass.

    Triton decides at its import whether kernels are interpreted, so this is a pytest of its own.
    """
    command = [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider"]
    command += ["-o", "python_functions=interpreted_*"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert re.search(rf"^{passes} passed", result.stdout, re.MULTILINE), result.stdout


def compiled(call: Call, capability: tuple[int, int]):
    """The kernel that Triton would launch for this call: specialised to its arguments, with its options."""
    with patch.object(triton.runtime.driver, "_active", AbsentDriver(capability)):
        return call.kernel.warmup(grid=call.grid, **call.arguments, **call.options)


def problems(kernel, capability: tuple[int, int], folder: Path) -> list[str]:
    """What keeps a compiled kernel from running well: too much shared memory, or spilled registers."""
    found = []
    if kernel.metadata.shared > SHARED_BYTES[capability]:
        found.append(f"{kernel.metadata.shared} bytes of shared memory")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    assert 0 < int(sizes["REG"]) < 256
    return found + [f"{sizes[kind]} bytes spilled" for kind in ("STACK", "LOCAL") if sizes[kind] != "0"]
