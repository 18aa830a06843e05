"""Every way that a NATS server may ask who we are, and what is said when it is not satisfied."""

import base64
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import nkeys
import pytest

from eventstore.access import Access
from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from tests.integration.nats_nodes import NatsNode
from tests.integration.secured import SECRET, USER, appends, connected, refusal, users
from tests.waiting import eventually


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
        await eventually(lambda: "not admit" in nats.last_error or nats.errors > 3)
        before, attempts = len(os.listdir("/proc/self/fd")), nats.errors
        await eventually(lambda: nats.errors > attempts + 8, 30)
        assert len(os.listdir("/proc/self/fd")) < before + 4


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
