"""Remove what lets a cluster in on this node. Runs alone, on any Python 3.8 or later.

    python3 forget.py NAME SCRATCH [KEY]      one JSON object: {"removed": [...]}

That is the head's key, its line KEY among the keys that may log in, the line in ~/.bashrc, and Ray's token
unless another cluster of this user uses it. The environment in SCRATCH stays for the next `make up`; so do
data and runs.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Callable, List  # noqa: UP035 (nodes may have an old Python)

MARK = "# asuncion"  # ends the line in ~/.bashrc (setup.sh)


def forget(name: str, scratch: str, key: str) -> List[str]:  # noqa: UP006
    """Remove it all. Returns what was there, in words."""
    home = Path.home()
    removed = []
    if key and without(home / ".ssh/authorized_keys", lambda line: line == key):
        removed.append("the head's key, from authorized_keys")
    mine = f"[ -O {scratch} "
    bashrc = home / ".bashrc"
    if without(bashrc, lambda line: line.startswith(mine) and line.endswith(MARK)):
        removed.append("a line of ~/.bashrc")
    lines = bashrc.read_text(errors="replace").splitlines() if bashrc.exists() else []
    others = any(line.endswith(MARK) for line in lines)
    files = [home / ".ssh" / f"asuncion_{name}", home / ".ssh" / f"asuncion_{name}.pub"]
    if os.path.isdir(scratch) and os.stat(scratch).st_uid == os.getuid():
        files += [Path(scratch, each) for each in ("activate", "started", "known_hosts")]
    for file in [*files, *([] if others else [home / ".ray/auth_token"])]:
        if file.exists() and file.lstat().st_uid == os.getuid():
            file.unlink()
            removed.append(str(file))
    return removed


def without(file: Path, is_ours: Callable[[str], bool]) -> bool:
    """Write the file again without some lines, at once and with its mode. Returns whether there were any."""
    place = Path(os.path.realpath(file))  # a link stays one
    if not place.exists():
        return False
    lines = place.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if not is_ours(line.decode(errors="replace").rstrip("\r\n"))]
    if len(kept) == len(lines):
        return False
    descriptor, new = tempfile.mkstemp(dir=place.parent)
    with os.fdopen(descriptor, "wb") as stream:
        stream.writelines(kept)
        os.fchmod(descriptor, place.stat().st_mode & 0o7777)
    os.replace(new, place)
    return True


if __name__ == "__main__":
    print(json.dumps({"removed": forget(sys.argv[1], sys.argv[2], " ".join(sys.argv[3:]))}))
