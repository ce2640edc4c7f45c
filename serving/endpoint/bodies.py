"""Request bodies, limited in size, in time and in total memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from serving.endpoint.refusal import Refusal

MOST_BODY_BYTES = 8 << 20  # whatever the model
MOST_HELD_BYTES = 32 << 20


class Bodies:
    """The bodies that are being received or parsed.

    If a body brings the total above `MOST_HELD_BYTES`, the oldest unfinished one is refused. An honest body
    arrives in milliseconds, so the oldest is a stalled client's.

    Args:
        most_bytes: of one body.
        seconds: from its head's arrival to its end.
    """

    def __init__(self, *, most_bytes: int, seconds: float) -> None:
        self._most_bytes, self._seconds = most_bytes, seconds
        self._held = 0
        self._unfinished: dict[asyncio.Future[None], None] = {}  # oldest first

    @asynccontextmanager
    async def receive(self, http: Request) -> AsyncIterator[bytes]:
        """The body, which counts as held inside the block. Raises `Refusal` (408, 413, 415, 429)."""
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"content-type: must be application/json, not {kind[:100]!r}", close=True)
        length = http.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._most_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            await self._fill(body, http)
            yield bytes(body)
        finally:
            self._held -= len(body)

    async def _fill(self, body: bytearray, http: Request) -> None:
        pushed_out = asyncio.get_running_loop().create_future()
        self._unfinished[pushed_out] = None
        reading = asyncio.ensure_future(self._read(body, http))
        try:
            await asyncio.wait(
                {reading, pushed_out}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if reading.done():
                return reading.result()
        finally:
            del self._unfinished[pushed_out]
            reading.cancel()
        if pushed_out.done():
            raise Refusal(
                429, "too many unfinished bodies; send each at once", retry_after_seconds=1, close=True
            )
        raise Refusal(408, f"the body did not arrive within {self._seconds:g} s", close=True)

    async def _read(self, body: bytearray, http: Request) -> None:
        try:
            async for part in http.stream():
                if len(body) + len(part) > self._most_bytes:
                    raise self._too_large()
                body += part
                self._held += len(part)
                if self._held > MOST_HELD_BYTES:
                    oldest = next((one for one in self._unfinished if not one.done()), None)
                    if oldest is not None:
                        oldest.set_result(None)
        except ClientDisconnect as error:
            raise Refusal(400, "the client left before its request was complete", close=True) from error

    def _too_large(self) -> Refusal:
        message = f"the body exceeds {self._most_bytes} bytes, more than this model's context can need"
        return Refusal(413, f"{message}; shorten the prompt", close=True)
