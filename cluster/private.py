"""Folders and Ray's token, kept from the other users of a machine, who are not trusted.

    python3 private.py folder PATH   make the folder, or require that it is ours; nobody else may enter it
    python3 private.py token [-]     make ~/.ray/auth_token, or require that it is ours; -: of standard input

Runs by itself on a node before there is an environment, on any Python 3.8 or later.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
import tempfile
from pathlib import Path


def make_folder(path: Path) -> None:
    """Make the folder `path` (0700), or require that it is safe (`require_safe`) and close it to others."""
    require_safe(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)  # whoever was faster is found out by the next line
    require_safe(path)
    path.chmod(0o700)


def require_safe(path: Path) -> None:
    """Require that no other user but root can write to the folder `path`, or put another in its place.

    What does not exist yet is safe if the folders above it are.

    Raises:
        PermissionError: `path` is another user's, a link, or writable by others; or a folder above it is.
    """
    require_safe_above(path)
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(found.st_mode):
        _refuse(path, f"is a symbolic link; name the folder itself, which may be {os.path.realpath(path)}")
    if not stat.S_ISDIR(found.st_mode):
        _refuse(path, "is not a folder")
    if found.st_uid != os.getuid():
        _refuse(path, f"belongs to user {found.st_uid}, not to you ({os.getuid()}); name another folder")
    if _is_open(found):
        _refuse(path, "others can write to it; look for files that are not yours, then `chmod go-w` it")


def require_safe_above(path: Path) -> None:
    """Require that no other user but root can put something else in `path`'s place. As `require_safe`."""
    for folder in reversed(path.parents):
        try:
            found = folder.lstat()
        except FileNotFoundError:
            return
        if found.st_uid not in _trusted():
            _refuse(folder, f"lies above {path} and belongs to user {found.st_uid}; name another folder")
        if stat.S_ISLNK(found.st_mode):
            require_safe_above(Path(os.path.realpath(folder)) / path.relative_to(folder))
            return
        if _is_open(found) and not found.st_mode & stat.S_ISVTX:  # as /tmp: only owners rename their entries
            _refuse(folder, f"lies above {path}, and others can write to it; `chmod go-w` or `chmod +t` it")


def _trusted() -> set[int]:
    """Root and this user. In a container without root's id, root's files show as those of 65534."""
    ids = Path("/proc/self/uid_map")
    ordinary = not ids.exists() or ids.read_text().split()[:2] == ["0", "0"]
    return {0, os.getuid()} | (set() if ordinary else {65534})


def _is_open(found: os.stat_result) -> bool:
    """Whether others can write. A group numbered like the user is the user's own (Debian, Red Hat)."""
    shared = found.st_gid not in (0, found.st_uid)
    return bool(found.st_mode & (stat.S_IWOTH | (stat.S_IWGRP if shared else 0)))


def is_ours(found: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user, and no other may write it."""
    return found.st_uid == os.getuid() and not _is_open(found)


def make_token(given: bytes = b"") -> None:
    """Make Ray's token, ~/.ray/auth_token, or require that it is ours. Ray itself would write it 0644.

    A token that others could read gets the mode 0600 and stays: a Ray that runs goes on using it.

    Args:
        given: what it must be; empty: what it is, or random.

    Raises:
        PermissionError: the file or its folder is a link, another user's, or was writable by others.
    """
    place = token_file()
    place.parent.mkdir(mode=0o700, exist_ok=True)
    content = read_token()
    if content and given in (b"", content):
        return
    descriptor, new = tempfile.mkstemp(dir=place.parent, prefix="auth_token.")  # 0600 from the start
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(given or secrets.token_hex(32).encode())
            file.flush()
            os.fsync(file.fileno())
        if place.exists():
            os.replace(new, place)
        else:
            os.link(new, place)  # unlike a rename, this fails if another command of ours was faster
    except FileExistsError:
        read_token()
    finally:
        Path(new).unlink(missing_ok=True)


def token_file() -> Path:
    """Where Ray looks for its token."""
    return Path("~/.ray/auth_token").expanduser()


def read_token() -> bytes:
    """Ray's token; empty if there is none. Mends its mode and its folder's. Raises as `make_token` does."""
    place = token_file()
    told = Path(f"{place} (Ray's)")  # "token: may" would be masked as a secret
    folder = place.parent
    if folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid():
        folder.chmod(0o700)
    require_safe(folder)
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return b""
    except OSError as error:
        if error.errno == errno.ELOOP:
            _refuse(told, "is a symbolic link; remove it, and a new token is made")
        raise
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not (is_ours(found) and stat.S_ISREG(found.st_mode)):
            _refuse(told, "may be the token of another user; remove it, and a new one is made")
        if stat.S_IMODE(found.st_mode) != 0o600:
            os.fchmod(file.fileno(), 0o600)
        return file.read().strip()


def _refuse(path: Path, why: str) -> None:
    raise PermissionError(errno.EPERM, why, str(path))


def main(verb: str, *arguments: str) -> int:
    """One of the commands above. Returns its exit code: 1 if something is refused."""
    try:
        if verb == "folder":
            make_folder(Path(arguments[0]))
        else:
            make_token(sys.stdin.buffer.read().strip() if arguments else b"")
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
