"""A stand-in for the builds of CPython that uv downloads, for tests without a network."""

import hashlib
import json
import sys
import tarfile
from pathlib import Path


def downloads(folder: Path, *, seen_as: Path | None = None) -> Path:
    """A list of downloads for uv in the folder: this machine's own Python, packed as a standalone one.

    Args:
        seen_as: the folder's path for the uv that reads it.
    """
    base, version = Path(sys.base_prefix), ".".join(map(str, sys.version_info[:3]))
    archive = folder / "python.tar.gz"
    skipped = {"test", "idlelib", "__pycache__", "site-packages", "libpython3.11.a"}

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = set(Path(entry.name).parts)
        return None if parts & skipped or any(part.startswith("config-") for part in parts) else entry

    with tarfile.open(archive, "w:gz", compresslevel=1) as packed:
        for name in ("bin/python3.11", "bin/python3", "lib/python3.11"):
            packed.add(base / name, f"python/{name}", filter=kept)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    major, minor, patch = sys.version_info[:3]
    listed = {
        f"cpython-{version}-linux-x86_64-gnu": {
            "name": "cpython", "arch": {"family": "x86_64", "variant": None}, "os": "linux", "libc": "gnu",
            "major": major, "minor": minor, "patch": patch, "prerelease": "", "sha256": digest,
            "url": f"file://{seen_as or folder}/{archive.name}", "variant": None, "build": "20261101",
        }
    }  # fmt: skip
    file = folder / "downloads.json"
    file.write_text(json.dumps(listed))
    return file
