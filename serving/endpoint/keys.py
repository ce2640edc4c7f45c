"""The key that clients must send as `Authorization: Bearer KEY`. The server keeps its hash alone."""

import hashlib
import hmac
import os
from collections.abc import Mapping

from starlette.datastructures import Headers

from cluster.cli import UserError
from serving.endpoint.refusal import Refusal

OPEN = frozenset({"/health", "/version", "/metrics"})  # for probes and Prometheus


def digest_of(variable: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The SHA-256 of the key in an environment variable, in hex; None without a variable.

    Raises:
        UserError: the variable is not set.
    """
    if variable is None:
        return None
    if not (secret := environment.get(variable, "").strip()):
        raise UserError(f"deployment.api_key: the environment has no {variable}; set it to the key")
    return hashlib.sha256(secret.encode()).hexdigest()


def require_key(headers: Headers, digest: str, *, path: str) -> None:
    """Raise `Refusal` (401) unless the request has the key with this SHA-256."""
    kind, _, secret = headers.get("authorization", "").partition(" ")
    given = hashlib.sha256(secret.strip().encode()).hexdigest() if kind.lower() == "bearer" else ""
    if path not in OPEN and not hmac.compare_digest(given, digest):
        message = "this server needs its key: send the header `Authorization: Bearer KEY`"
        raise Refusal(401, message, code="invalid_api_key", close=True)
