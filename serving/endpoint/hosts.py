"""Which Host and Origin a request may carry.

A web page can make a browser send requests to this machine: from another origin, or under a name of its own
that resolves to this address (DNS rebinding). Both show in these headers.
"""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from serving.endpoint.refusal import Refusal

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def allowed_hosts(host: str, more: Collection[str]) -> frozenset[str] | None:
    """The names that requests may carry, in lower case, or None: any.

    Args:
        host: what the endpoint listens on.
        more: names that are allowed besides the loopback's.
    """
    if not more and not _is_loopback(host):
        return None
    return frozenset(name.lower().strip("[]") for name in (*LOOPBACK, host, *more))


def require_allowed(headers: Headers, allowed: frozenset[str], *, origins: Collection[str] = ()) -> None:
    """Raises `Refusal` (403) at a Host or an Origin that is not `allowed`. Either may be missing.

    Args:
        origins: whose pages may read answers (CORS), such as https://example.org; "*": any.
    """
    for header in ("host", "origin"):
        for value in headers.getlist(header):
            if header == "origin" and (value in origins or "*" in origins):
                continue
            if _name(value) not in allowed:
                raise Refusal(
                    403,
                    f"{header}: {value[:100]!r} is not served here; if it should be, add its name to "
                    "deployment.allowed_hosts on the server",
                    code="host_not_allowed",
                    close=True,
                )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _name(value: str) -> str | None:
    """The name in a Host or an Origin, without scheme and port; None: there is none."""
    try:
        return urlsplit(value if "//" in value else f"//{value}").hostname
    except ValueError:
        return None
