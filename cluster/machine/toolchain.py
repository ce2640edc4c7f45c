"""What Triton needs of a node besides the GPU: a C compiler, and Python's headers.

At its first use on a GPU it compiles a small launcher in C for each kernel, on the node itself.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

HEADER_PATHS = ("CPATH", "C_INCLUDE_PATH")  # where a compiler looks beside the interpreter's own folder


def missing() -> str | None:
    """What of the two is not here, and the remedy, in one sentence; None if both are.

    As Triton looks for them (triton/runtime/build.py in 3.6 and 3.7): $CC, or gcc, or clang; and Python.h of
    this interpreter.
    """
    named = os.environ.get("CC")
    names = (named,) if named else ("gcc", "clang")
    if not any(map(shutil.which, names)):
        sought = f"CC={named} is not on the path" if named else "neither gcc nor clang is on the path"
        return f"Triton needs a C compiler, and {sought}: `apt install gcc`, or set CC to another"
    folders = [_include()]
    folders += [folder for name in HEADER_PATHS for folder in os.environ.get(name, "").split(":") if folder]
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return f"Triton needs Python.h, which is not in {folders[0]}: `apt install {package}`"
    return None


def _include() -> str:
    """The folder of the interpreter's headers."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme points to /usr/local, where its package does not put them.
    return sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
