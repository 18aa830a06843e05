"""HTTPS over real sockets: a whole stream, a renewed certificate, files that are no good."""

import asyncio
import json
import logging
import ssl
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from frontend.process import FrontendProcess
from frontend.settings import FrontendSettings
from frontend.tls import BadCertificate, Certificate
from tests.integration.harness import MODEL, Harness, download, frontend
from tests.integration.mem_backings import MemBackings
from tests.integration.processes import START_S, child
from tests.waiting import eventually

HOST = "127.0.0.1"


class Issuer:
    """A CA of the test's own, and the pair of files that it renews."""

    def __init__(self, directory: Path) -> None:
        self._ca = trustme.CA()
        self.cert, self.key = directory / "cert.pem", directory / "key.pem"
        self.renew()

    def renew(self) -> None:
        issued = self._ca.issue_cert(HOST)
        issued.private_key_pem.write_to_path(self.key)
        self.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))

    def client(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self._ca.configure_trust(context)
        return context

    def settings(self) -> dict[str, Any]:
        return {"tls_cert_path": self.cert, "tls_key_path": self.key}


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path)


async def served_certificate(here: Harness, issuer: Issuer) -> bytes:
    """What a new connection is shown."""
    _, writer = await asyncio.open_connection(
        HOST, int(here.url.rpartition(":")[2]), ssl=issuer.client()
    )
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    assert isinstance(shown, bytes)
    return shown


async def test_an_answer_and_a_stream_over_https(issuer: Issuer) -> None:
    async with frontend(**issuer.settings()) as here:
        assert here.url.startswith("https://")
        worker = await here.add_worker(1, echo="some words")
        await here.until_served()
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=issuer.client())
        ) as session:
            url = here.url + "/v1/chat/completions"
            async with session.post(url, json=body) as response:
                whole = await response.json()
            async with session.post(url, json={**body, "stream": True}) as response:
                lines = [line async for line in response.content if line.startswith(b"data: {")]
        assert whole["choices"][0]["message"]["content"] == "some words"
        chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines]
        deltas = (chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert "".join(deltas) == "some words"
        assert len(worker.streams) == 2
        await here.assert_nothing_left()


async def test_who_speaks_plain_http_is_closed_and_others_are_served(issuer: Issuer) -> None:
    async with frontend(**issuer.settings()) as here:
        reader, writer = await asyncio.open_connection(HOST, int(here.url.rpartition(":")[2]))
        writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            assert b"HTTP/1.1" not in await reader.read()
        except ConnectionResetError:
            pass
        writer.close()
        assert await served_certificate(here, issuer)


async def test_a_renewed_certificate_is_shown_to_new_connections(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Certificate.follow, "__defaults__", (0.02,))
    async with frontend(**issuer.settings()) as here:
        first = await served_certificate(here, issuer)
        issuer.renew()

        async def is_renewed() -> bool:
            return await served_certificate(here, issuer) != first

        await eventually(is_renewed)


def shown_name(certificate: Certificate, issuer: Issuer) -> bytes:
    """A handshake in memory: the certificate that a client is shown."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = certificate.context.wrap_bio(to_server, to_client, server_side=True)
    client = issuer.client().wrap_bio(to_client, to_server, server_hostname=HOST)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
    shown = client.getpeercert(binary_form=True)
    assert shown is not None
    return shown


def test_a_pair_is_taken_up_whole_and_a_bad_one_never(
    issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    certificate = Certificate(issuer.cert, issuer.key)
    first = shown_name(certificate, issuer)
    old_key = issuer.key.read_bytes()

    issuer.renew()
    new_key = issuer.key.read_bytes()
    issuer.key.write_bytes(old_key)  # the certificate is new, its key has yet to come
    with caplog.at_level(logging.INFO, "frontend.tls"):
        for _ in range(5):
            certificate.refresh()
    assert shown_name(certificate, issuer) == first
    assert [record.levelname for record in caplog.records] == ["ERROR"], "said once"
    assert "is not the key of" in caplog.text

    issuer.key.write_bytes(new_key)
    with caplog.at_level(logging.INFO, "frontend.tls"):
        for _ in range(5):
            certificate.refresh()
    second = shown_name(certificate, issuer)
    assert second != first
    assert "certificate renewed sha256=" in caplog.text

    issuer.cert.unlink()
    for _ in range(5):
        certificate.refresh()
    assert shown_name(certificate, issuer) == second


def test_a_change_is_taken_up_only_once_it_is_still(issuer: Issuer) -> None:
    certificate = Certificate(issuer.cert, issuer.key)
    first = shown_name(certificate, issuer)
    issuer.renew()
    certificate.refresh()
    assert shown_name(certificate, issuer) == first
    certificate.refresh()
    assert shown_name(certificate, issuer) != first


def encrypted_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )


@pytest.mark.parametrize(
    ("cert", "key", "said"),
    [
        ("missing.pem", "key.pem", "can't read .*missing.pem: No such file"),
        ("cert.pem", ".", "can't read .*: Is a directory"),
        ("cert.pem", "other.pem", "other.pem is not the key of .*cert.pem"),
        ("garbage.pem", "key.pem", "are not a certificate and its key"),
        ("cert.pem", "encrypted.pem", "are not a certificate and its key, unencrypted"),
    ],
)
def test_files_that_are_no_good_end_the_start(
    issuer: Issuer, tmp_path: Path, cert: str, key: str, said: str
) -> None:
    (tmp_path / "garbage.pem").write_text("nothing of the kind")
    trustme.CA().issue_cert(HOST).private_key_pem.write_to_path(tmp_path / "other.pem")
    (tmp_path / "encrypted.pem").write_bytes(encrypted_key())
    settings = FrontendSettings(tls_cert_path=tmp_path / cert, tls_key_path=tmp_path / key)
    with pytest.raises(BadCertificate, match=said):
        FrontendProcess(settings, MemBackings(download), asyncio.Event())


async def test_a_process_serves_https_or_says_why_it_can_not(
    issuer: Issuer, nats_url: str, namespace: str, tmp_path: Path
) -> None:
    fixed = ("--nats-url", nats_url, "--namespace", namespace, "--http-host", HOST)
    pair = ("--tls-cert-path", str(issuer.cert), "--tls-key-path")
    dump = tmp_path / "new" / "config.json"
    options = (*fixed, "--http-port", "0", "--dump-config-to", str(dump), *pair, str(issuer.key))
    async with (
        child("frontend", *options) as process,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=issuer.client())) as session,
        session.get(process.url + "/live") as response,
    ):
        assert (process.url.partition(":")[0], response.status) == ("https", 200)
    assert json.loads(dump.read_text())["sources"]["tls_key_path"] == "--tls-key-path"

    refused = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "frontend", *fixed, *pair, str(tmp_path / "no.pem")),
        stdout=PIPE,
        stderr=PIPE,
    )
    async with asyncio.timeout(START_S):
        out, err = (each.decode() for each in await refused.communicate())
    assert (refused.returncode, out) == (1, "")
    assert "no.pem: No such file" in err.splitlines()[-1] and "Traceback" not in err
