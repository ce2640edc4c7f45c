"""Requests that are not served, as OpenAI writes errors."""

from typing import Any


class Refusal(Exception):
    """A request that is not served, and the HTTP answer that says why.

    Args:
        param: the request's field that is at fault, if any.
        code: OpenAI's, such as "context_length_exceeded", or ours.
        retry_after_seconds: when to try again, if that can help.
        close: end the connection without reading the rest of the request.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after_seconds, self.close = retry_after_seconds, close

    def headers(self) -> dict[str, str]:
        """Of the answer."""
        retry = {} if self.retry_after_seconds is None else {"Retry-After": str(self.retry_after_seconds)}
        realm = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return retry | realm | ({"Connection": "close"} if self.close else {})

    def body(self) -> dict[str, Any]:
        """The error object that OpenAI's clients expect."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
