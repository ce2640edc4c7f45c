"""The code that travels to a cluster: our rooms as git has them, in one zip. Never data, runs or secrets."""

import hashlib
import io
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cluster.cli import UserError
from cluster.inventory import CODE
from cluster.session import ROOT

MAX_BYTES = 10_000_000
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files give the same bytes


@dataclass(frozen=True)
class Package:
    """A zip of the code, and its SHA-256 in hexadecimal digits."""

    data: bytes
    digest: str

    def __str__(self) -> str:
        return f"code {self.digest[:16]}, {len(self.data) / 1e3:.0f} kB"


def pack(*, more: dict[str, str] | None = None, root: Path = ROOT) -> Package:
    """The code under `root` (working tree, committed or not), and the texts of `more` by path.

    Raises:
        UserError: it is larger than MAX_BYTES; the message names the largest files.
    """
    content = {path: (root / path).read_bytes() for path in _files(root)}
    content |= {path: text.encode() for path, text in (more or {}).items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in sorted(content.items()):
            entry = zipfile.ZipInfo(path, _EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    packed = buffer.getvalue()
    if len(packed) > MAX_BYTES:
        largest = sorted(content, key=lambda path: -len(content[path]))[:3]
        sizes = ", ".join(f"{path} ({len(content[path]) / 1e6:.1f} MB)" for path in largest)
        raise UserError(
            f"the code is {len(packed) / 1e6:.1f} MB as a zip, above {MAX_BYTES / 1e6:.0f} MB; the largest "
            f"files: {sizes}. Data belongs on the cluster's storage; list such files in .gitignore"
        )
    return Package(packed, hashlib.sha256(packed).hexdigest())


def _files(root: Path) -> list[str]:
    """Paths of our files: as git has them, or all of our rooms where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *CODE]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, timeout=30, check=True)
        listed = [path for path in done.stdout.decode().split("\0") if path]
    except (FileNotFoundError, subprocess.SubprocessError):
        every = [file for name in CODE for file in [root / name, *(root / name).rglob("*")]]
        listed = [str(file.relative_to(root)) for file in every if "__pycache__" not in file.parts]
    return sorted(path for path in listed if (root / path).is_file())
