"""TLS to a NATS server: whom we trust, who trusts us, and what is never said in the clear."""

import asyncio
from pathlib import Path

import pytest
import trustme

from eventstore.access import Access
from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from tests.integration.nats_nodes import NatsNode
from tests.integration.secured import SECRET, WAIT_S, appends, refusal


class Authority:
    """A CA of the test's own, with files for a server and a client."""

    def __init__(self, directory: Path, host: str = "127.0.0.1") -> None:
        directory.mkdir()
        ca = trustme.CA()
        self.ca = directory / "ca.pem"
        self.cert, self.key = directory / "cert.pem", directory / "key.pem"
        ca.cert_pem.write_to_path(self.ca)
        issued = ca.issue_cert(host)
        issued.private_key_pem.write_to_path(self.key)
        issued.cert_chain_pems[0].write_to_path(self.cert)

    def server_options(self, *, verify: bool = False) -> dict[str, object]:
        files = {"cert_file": self.cert, "key_file": self.key, "ca_file": self.ca}
        return {"tls": {name: str(path) for name, path in files.items()} | {"verify": verify}}


async def test_tls_with_an_own_ca(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    async with NatsNode.configured(tmp_path / "node", **ours.server_options()) as node:
        assert await appends(node, Access(tls_ca=ours.ca))
        told = await refusal(node, Access(tls_ca=theirs.ca))
        assert "certificate is not trusted" in str(told)
        assert "--nats-tls-ca" in told.try_this
        assert "certificate is not trusted" in str(await refusal(node))


async def test_a_certificate_for_another_host_is_not_accepted(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca", "nats.example")
    async with NatsNode.configured(tmp_path / "node", **authority.server_options()) as node:
        assert "not trusted" in str(await refusal(node, Access(tls_ca=authority.ca)))


async def test_a_client_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    options = authority.server_options(verify=True)
    async with NatsNode.configured(tmp_path / "node", **options) as node:
        access = Access(tls_ca=authority.ca, tls_cert=authority.cert, tls_key=authority.key)
        assert await appends(node, access)
        told = await refusal(node, Access(tls_ca=authority.ca))
        assert "client certificate" in str(told)


async def test_a_server_without_tls_gets_no_password(tmp_path: Path) -> None:
    """Somebody in the way could say that there is no TLS."""
    authority = Authority(tmp_path / "ca")
    heard = bytearray()

    async def pose(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","auth_required":true,"max_payload":1024}\r\n')
        heard.extend(await reader.read())
        writer.close()

    async with await asyncio.start_server(pose, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        access = Access(user="u", password=SECRET, tls_ca=authority.ca)
        with pytest.raises(LogUnavailable, match="offers no TLS"):
            await Nats.connect([f"nats://127.0.0.1:{port}"], name="t", access=access, wait_s=WAIT_S)
    assert not heard
