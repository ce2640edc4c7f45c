"""The code that travels to a cluster: the files of our rooms that git tracks, in one zip. Never secrets.

A copy without git, such as an unpacked archive, sends the files whose suffix is in SUFFIXES. In both cases a
file whose name says that it holds a key is refused, and so is a link to anything that does not travel itself.
"""

import hashlib
import io
import re
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cluster.cli import UserError
from cluster.laptop.inventory import CODE
from cluster.session import ROOT

MAX_BYTES = 10_000_000
SUFFIXES = (".py", ".cpp", ".h", ".sh", ".yaml", ".html")  # of files in our rooms, where no git lists them
KEY_NAMES = re.compile(
    r"\.env.*|[._]?netrc|\.git-credentials|\.pypirc|\.npmrc|kubeconfig|.*\.(pem|key|p12|pfx|jks|kdbx|env)"
    r"|(.*[_.-])?(id_(rsa|dsa|ecdsa|ed25519).*|(rsa|dsa|ecdsa|ed25519)_key(\.pub)?)"
    r"|(.*[_.-])?(api[_-]?keys?|token|secrets?|passwords?|passwd|credentials?)"
    r"(\.(txt|ya?ml|json|toml|ini|cfg|conf|sh))?",
    re.IGNORECASE,
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files give the same bytes


@dataclass(frozen=True)
class Package:
    """A zip of the code, its SHA-256 in hexadecimal digits, and the files of our rooms that are not in it."""

    data: bytes
    digest: str
    untracked: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"code {self.digest[:16]}, {len(self.data) / 1e3:.0f} kB"
        if not self.untracked:
            return text
        more = f" and {len(self.untracked) - 5} more" if len(self.untracked) > 5 else ""
        names = f"{', '.join(self.untracked[:5])}{more}"
        return f"{text}; not in git, so not sent: {names} (`git add` what the run needs)"


def pack(*, more: dict[str, str] | None = None, root: Path = ROOT) -> Package:
    """The code under `root` (working tree, committed or not), and the texts of `more` by path.

    Raises:
        UserError: git cannot list the files, there are none, one of them may hold a key or leads elsewhere,
            or they are larger than MAX_BYTES. The message names the files.
    """
    if (root / ".git").exists():
        paths, untracked = _ls_files(root, "--cached"), _ls_files(root, "--others", "--exclude-standard")
    else:
        paths, untracked = _with_suffix(root), []
    content = _read(root, paths)
    if not content:
        raise UserError(
            f"{root}: no code to send: {', '.join(CODE)} are not there, or git does not track them"
        )
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
            f"files: {sizes}. Data belongs on the cluster's storage: `git rm --cached` such files, and list "
            "them in .gitignore"
        )
    return Package(packed, hashlib.sha256(packed).hexdigest(), tuple(untracked))


def _ls_files(root: Path, *which: str) -> list[str]:
    """Paths of files in our rooms, by `git ls-files`. Raises `UserError` if git fails."""
    # The checkout may be another user's: its code runs here already, and these settings run no more of it.
    settings = ("-c", "safe.directory=*", "-c", "core.fsmonitor=false")
    command = ["git", *settings, "ls-files", "-z", *which, "--", *CODE]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{root}: git, which says what may travel, cannot run ({error})") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise UserError(f"{root}: git cannot say which files may travel ({said}); mend that first")
    return [path for path in done.stdout.decode().split("\0") if path]


def _with_suffix(root: Path) -> list[str]:
    """Paths of the files that CODE names, and of those in its folders with the suffix of code."""
    inside = [file for name in CODE for file in (root / name).rglob("*") if file.suffix in SUFFIXES]
    paths = [file.relative_to(root) for file in [*map(root.joinpath, CODE), *inside]]
    return [str(path) for path in paths if not any(part.startswith(".") for part in path.parts)]


def _read(root: Path, paths: list[str]) -> dict[str, bytes]:
    """Path -> content of those that exist. Raises `UserError` if one of them must not travel."""
    content: dict[str, bytes] = {}
    travel = {root.resolve() / path for path in paths}
    for path in paths:
        file = root / path
        if KEY_NAMES.fullmatch(file.name):
            raise UserError(
                f"{path}: by its name this file holds a key or a password, and the code is sent to the "
                "cluster; move it out of the checkout (`git rm --cached` it first if git tracks it)"
            )
        if file.exists() and file.resolve() not in travel:  # it, or a folder above it, is a link
            raise UserError(
                f"{path}: leads to {file.resolve()}, which is not a file of the code; put a copy in place of "
                "the link"
            )
        if file.is_file():
            content[path] = file.read_bytes()
    return content
