"""The NATS client library's client, mended where a long-lived process would suffer from it."""

import asyncio
import contextlib
import time
from typing import Any

import nats.errors
from nats.aio.client import Client

SLICE_S = 0.001
"""How long the client may parse what came in before others get their turn."""


class MendedClient(Client):
    """nats-py's client without some of its habits. Each method says which."""

    insists_on_tls = False
    _slice_end = 0.0

    @property
    def clustered(self) -> bool:
        """Whether the server is one of a cluster, by its own word."""
        return bool(self._server_info.get("cluster"))

    @property
    def server_id(self) -> str:
        """Names one run of the server: another start of it has another id."""
        return str(self._server_info.get("server_id", ""))

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # The library encrypts where the server requires it, and sends a password in clear text
        # where it does not, whatever TLS files it was given. This is called before it does either.
        if initial_connection and self.insists_on_tls:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise nats.errors.Error("nats: the server does not offer TLS")
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    async def _connect_to_server(self, s: Any) -> None:
        # The library forgets the socket of an attempt that was refused, as a wrong password is.
        self._close_socket()
        await super()._connect_to_server(s)

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        # The library parses all that the socket gave it, up to 256 KiB, without a pause: 10 ms and
        # more of small messages, in which no HTTP request would be served.
        await super()._process_msg(sid, subject, reply, data, headers)
        if time.monotonic() >= self._slice_end:
            await asyncio.sleep(0)
            self._slice_end = time.monotonic() + SLICE_S

    async def _process_err(self, err_msg: str) -> None:
        # The library closes for good on most errors that a server sends, "slow consumer" among
        # them. All but denied permissions end with the server closing the connection: reconnect.
        if "permissions violation" in err_msg:
            await super()._process_err(err_msg)
        else:
            await self._process_op_err(nats.errors.Error(f"nats: {err_msg}"))

    async def end(self) -> None:
        """Close, also where the library's own `close` would trip."""
        if self._flush_queue is None:
            return  # `connect` refused its arguments: nothing was opened
        if not self.is_connected:
            # It would be written to a socket that is gone.
            self._pending.clear()
            self._pending_data_size = 0
        with contextlib.suppress(OSError, nats.errors.Error):
            await self.close()
        self._close_socket()

    def _close_socket(self) -> None:
        if self._transport is not None:
            self._transport.close()  # type: ignore[no-untyped-call]
            self._transport = None
