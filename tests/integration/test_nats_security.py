"""Every way that a NATS server may ask who we are, and what is said when it is not satisfied."""

import asyncio
import base64
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nkeys
import pytest
import trustme

from eventstore import jetstream
from eventstore.access import Access
from eventstore.connect import Nats, NotPermitted
from eventstore.errors import LogUnavailable
from eventstore.jetstream import JetStreamLog
from eventstore.process_settings import ProcessSettings
from eventstore.settings import help_text, parse
from frontend.settings import FrontendSettings
from reckon.plan import environment
from tests.integration.nats_nodes import NatsNode
from tests.waiting import eventually
from workers import discovery_nats
from workers.card import Instance, ModelCard
from workers.discovery_nats import NatsDiscovery
from workers.errors import DiscoveryError
from workers.models import ModelStore

SECRET = "hunter2-and-more"
WAIT_S = 0.5


@asynccontextmanager
async def connected(node: NatsNode, access: Access | None = None) -> AsyncIterator[Nats]:
    nats = await Nats.connect([node.url], name="test", access=access)
    try:
        yield nats
    finally:
        await nats.close()


async def appends(node: NatsNode, access: Access | None = None) -> bool:
    """Whether this access is enough for the log."""
    async with connected(node, access) as nats:
        log = await JetStreamLog.open(nats, "ns")
        appended = await log.append("reckon.ns.control", b"", msg_id="1")
        await log.close()
        return appended.seq == 1


async def refusal(node: NatsNode, access: Access | None = None) -> LogUnavailable:
    with pytest.raises(LogUnavailable) as caught:
        await Nats.connect([node.url], name="test", access=access, wait_s=WAIT_S)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.try_this
    return caught.value


def users(**permissions: object) -> dict[str, object]:
    """A server's configuration with one user, `u`."""
    return {"authorization": {"users": [{"user": "u", "password": SECRET, **permissions}]}}


USER = Access(user="u", password=SECRET)


async def test_a_user_and_a_password(tmp_path: Path) -> None:
    async with NatsNode.configured(tmp_path, **users()) as node:
        assert await appends(node, USER)
        assert "does not admit user u" in str(await refusal(node, Access(user="u", password="no")))
        assert "names no user" in str(await refusal(node))


async def test_a_user_in_the_address_is_known_to_the_whole_cluster(tmp_path: Path) -> None:
    """The library would know it for that address only."""
    async with NatsNode.configured(tmp_path, **users()) as node:
        url = f"nats://u:{SECRET}@127.0.0.1:{node.port}"
        nats = await Nats.connect([f"nats://127.0.0.1:{node.port}", url], name="test")
        assert nats.connected
        assert SECRET not in nats.url
        await nats.close()


async def test_a_password_file_is_read_again_at_every_connect(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(SECRET + "\n")
    access = Access(user="u", password_file=file)
    node = NatsNode.configured(tmp_path / "node", **users())
    async with node, connected(node, access) as nats:
        node.stop()
        config = tmp_path / "node" / "nats.conf"
        config.write_text(config.read_text().replace(SECRET, "changed"))
        file.write_text("changed")
        await node.start()
        await eventually(lambda: nats.reconnects == 1)


async def test_attempts_that_are_refused_leave_no_socket_behind(tmp_path: Path) -> None:
    """They go on for ever: the password may be put right."""
    node = NatsNode.configured(tmp_path, **users())
    async with node, connected(node, USER) as nats:
        node.stop()
        config = tmp_path / "nats.conf"
        config.write_text(config.read_text().replace(SECRET, "changed"))
        await node.start()
        await eventually(lambda: "not admit" in nats.last_error or nats.errors > 20)
        before, attempts = len(os.listdir("/proc/self/fd")), nats.errors
        await eventually(lambda: nats.errors > attempts + 20)
        assert len(os.listdir("/proc/self/fd")) < before + 5


async def test_a_token(tmp_path: Path) -> None:
    async with NatsNode.configured(tmp_path, authorization={"token": SECRET}) as node:
        assert await appends(node, Access(token=SECRET))
        assert "bearer of this token" in str(await refusal(node, Access(token="no")))


async def test_an_nkey(tmp_path: Path) -> None:
    seed, public = new_key(nkeys.PREFIX_BYTE_USER)
    async with NatsNode.configured(tmp_path, authorization={"users": [{"nkey": public}]}) as node:
        assert await appends(node, Access(nkey=seed))
        other, _ = new_key(nkeys.PREFIX_BYTE_USER)
        assert "bearer of this nkey" in str(await refusal(node, Access(nkey=other)))
        assert "holds no key" in str(await refusal(node, Access(nkey=SECRET)))


async def test_a_credentials_file(tmp_path: Path) -> None:
    operator = Operator()
    credentials = tmp_path / "u.creds"
    credentials.write_text(operator.credentials())
    async with NatsNode.configured(tmp_path / "node", **operator.server_options()) as node:
        assert await appends(node, Access(credentials_file=credentials))
        assert "names no user" in str(await refusal(node))
        credentials.write_text(Operator().credentials())
        assert "u.creds" in str(await refusal(node, Access(credentials_file=credentials)))
        credentials.write_text("empty")
        bad = str(await refusal(node, Access(credentials_file=credentials)))
        assert "is no credentials file" in bad


@pytest.mark.parametrize(
    "options",
    [
        {"user": "u"},
        {"password": SECRET},
        {"user": "u", "password": SECRET, "password_file": Path("x")},
        {"user": "u", "password": SECRET, "token": SECRET},
        {"token": SECRET, "nkey": SECRET},
        {"tls_cert": Path("x")},
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LogUnavailable) as caught:
        Access(**options)
    assert SECRET not in str(caught.value)
    assert caught.value.try_this


@pytest.mark.parametrize(
    "access",
    [
        Access(user="u", password_file=Path("missing")),
        Access(credentials_file=Path("missing")),
        Access(tls_ca=Path("missing")),
        Access(tls_cert=Path("missing"), tls_key=Path("missing")),
    ],
)
async def test_a_missing_file_is_named_at_once(access: Access) -> None:
    with pytest.raises(LogUnavailable, match=r"missing.*cannot be used: No such file"):
        await Nats.connect(["nats://127.0.0.1:1"], name="test", access=access, wait_s=60)


# --- TLS ------------------------------------------------------------------------------------------


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


# --- permissions ----------------------------------------------------------------------------------


async def test_a_missing_permission_is_named_when_the_log_is_opened(tmp_path: Path) -> None:
    denied = {"publish": {"deny": "$JS.API.STREAM.CREATE.>"}}
    async with (
        NatsNode.configured(tmp_path, **users(permissions=denied)) as node,
        connected(node, USER) as nats,
    ):
        with pytest.raises(NotPermitted, match=r"js\.api\.stream\.create") as caught:
            await JetStreamLog.open(nats, "ns")
        assert "permission" in caught.value.try_this


async def test_a_missing_permission_is_named_when_a_fact_is_appended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jetstream, "APPEND_TIMEOUT_S", 0.5)
    denied = {"publish": {"deny": "reckon.*.request.>"}}
    async with (
        NatsNode.configured(tmp_path, **users(permissions=denied)) as node,
        connected(node, USER) as nats,
    ):
        log = await JetStreamLog.open(nats, "ns")
        assert (await log.append("reckon.ns.kv.1.0", b"", msg_id="1")).seq == 1
        with pytest.raises(NotPermitted, match=r"reckon\.ns\.request\.1"):
            await log.append("reckon.ns.request.1", b"", msg_id="2")
        assert nats.denials == 1
        assert "NATS denies user u: permissions violation for publish" in caplog.text
        assert (await log.append("reckon.ns.kv.1.0", b"", msg_id="3")).seq == 2
        await log.close()


async def test_answers_come_under_the_prefix_that_the_user_has(tmp_path: Path) -> None:
    """Nobody else can read them then."""
    allowed = {"publish": ">", "subscribe": "_INBOX_u.>"}
    async with NatsNode.configured(tmp_path, **users(permissions=allowed)) as node:
        access = Access(user="u", password=SECRET, inbox_prefix="_INBOX_u")
        assert await appends(node, access)
        async with connected(node, USER) as nats:
            with pytest.raises(NotPermitted, match="violation for subscription"):
                await JetStreamLog.open(nats, "ns")


async def test_a_missing_permission_is_named_when_a_worker_registers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery_nats, "ANSWER_S", 0.5)
    denied = {"publish": {"deny": ["$KV.>", "$O.>"]}}
    async with (
        NatsNode.configured(tmp_path, **users(permissions=denied)) as node,
        connected(node, USER) as nats,
    ):
        card = ModelCard(name="m", block_size=16, context_length=64, files={})
        instance = Instance(
            worker_id=1, namespace="ns", component="c", endpoint="e", address="h:1", card=card
        )
        with pytest.raises(DiscoveryError, match=r"cannot register.*violation.*\$kv\."):
            await NatsDiscovery(nats, "ns").register(instance, lambda why: None)
        with pytest.raises(NotPermitted, match=r"cannot store model files.*violation.*\$o\."):
            await ModelStore(nats, "ns").upload({"config.json": b"{}"})


async def test_what_is_denied_later_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    denied = {"publish": {"deny": "secret.>"}}
    async with (
        NatsNode.configured(tmp_path, **users(permissions=denied)) as node,
        connected(node, USER) as nats,
    ):
        for _ in range(3):
            await nats.publish("secret.a", b"")
        await eventually(lambda: nats.denials == 3)
        assert caplog.text.count("secret.a") == 1
        assert nats.connected


# --- the processes --------------------------------------------------------------------------------

ENV = {
    "NATS_AUTH_USERNAME": "u",
    "NATS_AUTH_PASSWORD": SECRET,
    "RECKON_NATS_WAIT_SECS": "0.5",
    "NATS_AUTH_TOKEN": "",
}


@pytest.mark.parametrize("module", [["frontend", "--http-port", "0"], ["workers", "mock"]])
async def test_a_process_that_is_not_admitted_ends_with_one_line(
    tmp_path: Path, module: list[str]
) -> None:
    options = {"authorization": {"users": [{"user": "u", "password": "other"}]}}
    async with NatsNode.configured(tmp_path, **options) as node:
        began_s = time.monotonic()
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-P", "-m", *module],
            env=os.environ | ENV | {"NATS_SERVER": node.url, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "Error: could not connect to NATS" in done.stderr
        assert "does not admit user u" in done.stderr
        assert "Try: NATS_AUTH_USERNAME" in done.stderr
        assert "Traceback" not in done.stderr
        assert SECRET not in done.stderr + done.stdout
        assert time.monotonic() - began_s < 30


def test_settings_show_no_secret() -> None:
    env = ENV | {"NATS_SERVER": f"nats://u:{SECRET}@h:1"}
    settings = parse(ProcessSettings, [], env)
    assert settings.access().password == SECRET
    assert SECRET not in repr(settings) + repr(settings.access()) + help_text(FrontendSettings)


def test_the_nats_of_up_is_told_nothing_that_is_for_another() -> None:
    assert environment({**ENV, "RECKON_NATS_TLS_CA": "/ca.pem", "DYN_X": "1"}).keys() == {
        "RECKON_NATS_WAIT_SECS",
        "DYN_X",
        "PYTHONPATH",
        "PYTHONUNBUFFERED",
    }


# --- helpers --------------------------------------------------------------------------------------


def new_key(kind: int) -> tuple[str, str]:
    """Seed and public key."""
    seed = nkeys.encode_seed(os.urandom(32), kind)
    return seed.decode(), nkeys.from_seed(bytearray(seed)).public_key.decode()


UNLIMITED = """
subs conn data payload imports exports mem_storage disk_storage streams consumer leaf
""".split()


class Operator:
    """A NATS operator with one account and one user, as signed JWTs."""

    def __init__(self) -> None:
        self._seed, self._public = new_key(nkeys.PREFIX_BYTE_OPERATOR)
        self._account_seed, self._account = new_key(nkeys.PREFIX_BYTE_ACCOUNT)
        _, self._system = new_key(nkeys.PREFIX_BYTE_ACCOUNT)
        self._user_seed, self._user = new_key(nkeys.PREFIX_BYTE_USER)

    def server_options(self) -> dict[str, object]:
        limits = dict.fromkeys(UNLIMITED, -1)
        account = self._jwt(self._account, self._seed, "account", {"limits": limits})
        system = self._jwt(self._system, self._seed, "account", {"limits": {}})
        return {
            "operator": self._jwt(self._public, self._seed, "operator", {}),
            "resolver": "MEMORY",
            "resolver_preload": {self._account: account, self._system: system},
            "system_account": self._system,
        }

    def credentials(self) -> str:
        unlimited: dict[str, object] = dict.fromkeys(("subs", "data", "payload"), -1)
        user = self._jwt(self._user, self._account_seed, "user", unlimited)
        return (
            f"-----BEGIN NATS USER JWT-----\n{user}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{self._user_seed}\n------END USER NKEY SEED------\n"
        )

    def _jwt(self, subject: str, seed: str, kind: str, claims: dict[str, object]) -> str:
        signer = nkeys.from_seed(bytearray(seed.encode()))
        body = {
            "iss": signer.public_key.decode(),
            "sub": subject,
            "name": kind,
            "iat": int(time.time()),
            "nats": {"type": kind, "version": 2, **claims},
        }
        digest = hashlib.sha256(json.dumps(body).encode()).digest()
        body["jti"] = base64.b32encode(digest).decode().rstrip("=")
        head = {"typ": "JWT", "alg": "ed25519-nkey"}
        signed = ".".join(_base64(json.dumps(part).encode()) for part in (head, body))
        return f"{signed}.{_base64(signer.sign(signed.encode()))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
