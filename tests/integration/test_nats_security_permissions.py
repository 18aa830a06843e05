"""What a NATS server does not permit is named, where it matters and once."""

from pathlib import Path

import pytest

from eventstore import jetstream
from eventstore.access import Access
from eventstore.connect import NotPermitted
from eventstore.jetstream import JetStreamLog
from tests.integration.nats_nodes import NatsNode
from tests.integration.secured import SECRET, USER, appends, connected, users
from tests.waiting import eventually
from workers import discovery_nats
from workers.card import Instance, ModelCard
from workers.discovery_nats import NatsDiscovery
from workers.errors import DiscoveryError
from workers.models import ModelStore


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
