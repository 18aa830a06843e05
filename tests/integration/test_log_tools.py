"""`python -m eventstore verify|snapshot|trim|reset|export|import|stat` against a real log."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from eventstore import codec, events
from eventstore.__main__ import main
from eventstore.connect import Nats
from eventstore.jetstream import JetStreamLog
from eventstore.log import Record
from eventstore.marks_nats import NatsMarks
from eventstore.snapshots import name_of
from eventstore.snapshots_nats import NatsSnapshots
from eventstore.subjects import subject
from router.refold import fold_to
from router.snapshot import snapshot_of
from router.state import RouterState
from router.tools import BEGINNING
from tests.property.test_fold import fold, history

Tool = Callable[..., tuple[int, Any, str]]
HISTORY = history(11, 120)
"""With unreadable records in it."""
CLEAN = [record for record in history(12, 300) if not codec.decode(record.data).unreadable][:100]


@pytest.fixture
def tool(nats_url: str, namespace: str, capsys: pytest.CaptureFixture[str]) -> Tool:
    """Run a command with --json; returns its exit code, what it told, and its errors."""

    def run(*argv: str, into: str = namespace) -> tuple[int, Any, str]:
        code = main([*argv, "--json"], {"NATS_SERVER": nats_url, "DYN_NAMESPACE": into})
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return run


@pytest.fixture
def filled(nats_url: str, namespace: str) -> Callable[[Sequence[Record]], None]:
    """Append records to the namespace's log."""

    def fill(records: Sequence[Record]) -> None:
        async def append(log: JetStreamLog) -> None:
            for record in records:
                producer = "control" if b"control" in record.data[:12] else "kv.any"
                name = subject(namespace, producer)
                await log.append(name, record.data, msg_id=f"fill.{record.seq}")

        with_log(nats_url, namespace, append)

    return fill


def connected(nats_url: str, work: Callable[[Nats], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        nats = await Nats.connect([nats_url], name="test")
        try:
            return await work(nats)
        finally:
            await nats.close()

    return asyncio.run(run())


def with_log(nats_url: str, namespace: str, work: Callable[[JetStreamLog], Awaitable[Any]]) -> Any:
    async def run(nats: Nats) -> Any:
        log = await JetStreamLog.open(nats, namespace)
        try:
            return await work(log)
        finally:
            await log.close()

    return connected(nats_url, run)


async def records_of(log: JetStreamLog) -> list[Record]:
    return [record async for record in log.read(1)]


def test_verify_says_that_all_is_well(
    tool: Tool, filled: Callable[[Sequence[Record]], None], nats_url: str, namespace: str
) -> None:
    filled(CLEAN)
    stored = with_log(nats_url, namespace, records_of)
    taken = []
    for _ in range(3):
        code, told, _ = tool("snapshot")
        assert code == 0 and told["taken"]
        taken.append(told)
    assert [told["seq"] for told in taken] == [100, 101, 102]
    code, told, _ = tool("verify")
    assert (code, told["problems"]) == (0, [])
    assert (told["first_seq"], told["last_seq"]) == (100, 103), "trimmed to the oldest kept"
    assert told["records"] == 3, "the record of the oldest snapshot is in it already"
    assert [stretch["until"] for stretch in told["stretches"]] == [
        *(each["name"] for each in taken[1:]),
        None,
    ]
    assert all(stretch["expected"] in (None, stretch["digest"]) for stretch in told["stretches"])
    assert taken[0]["digest"] == fold(stored).digest()
    code, told, _ = tool("stat")
    assert [each["digest"] for each in told["snapshots"]] == [each["digest"] for each in taken]
    assert {each["unusable"] for each in told["snapshots"]} == {None}


def test_verify_finds_what_is_wrong(
    tool: Tool, filled: Callable[[Sequence[Record]], None], nats_url: str, namespace: str
) -> None:
    """Records that cannot be read, a damaged snapshot, one that lies, and a record that is gone."""
    filled(HISTORY)
    _, good, _ = tool("snapshot")

    async def harm(nats: Nats) -> tuple[str, str]:
        log = await JetStreamLog.open(nats, namespace)
        store = NatsSnapshots(nats, namespace)
        identity = (await log.extent()).identity
        names = name_of(identity, 80), name_of(identity, 100)
        async for record in log.read(80, 80):
            state = fold(HISTORY[:70])
            state.cursor, state.time_ns = 80, record.time_ns
            await store.write(names[0], snapshot_of(state, identity=identity, version="v"))
        data = await store.read(good["name"])
        await store.write(names[1], data[:-1] + bytes([data[-1] ^ 1]))
        await log.close()
        return names

    lying, damaged = connected(nats_url, harm)
    code, told, _ = tool("verify")
    assert code == 1
    problems = "\n".join(told["problems"])
    assert told["unreadable"] == sum(len(codec.decode(r.data).unreadable) for r in HISTORY) > 0
    assert f"snapshot {damaged} is not of the log and the record that its name says" in problems
    assert f"{lying} says" in problems
    assert [stretch["begun_from"] for stretch in told["stretches"]] == [
        BEGINNING,
        lying,
        lying,
        good["name"],
    ]

    async def remove(nats: Nats) -> None:
        await nats.jetstream.delete_msg(f"RECKON_{namespace}", 110)

    connected(nats_url, remove)
    _, told, _ = tool("verify")
    assert any("expected record 110, the log went on with 111" in each for each in told["problems"])
    assert told["stretches"][-1]["begun_from"] == good["name"], "it goes on behind the gap"
    assert main(["verify"], {"NATS_SERVER": nats_url, "DYN_NAMESPACE": namespace}) == 1


def test_a_hole_is_told_and_passed_over_if_the_loss_is_accepted(
    tool: Tool,
    filled: Callable[[Sequence[Record]], None],
    nats_url: str,
    namespace: str,
    tmp_path: Path,
) -> None:
    """Also one at the end, where no further record shows it."""
    filled(CLEAN[:60])
    tool("snapshot")  # and record 61 announces it
    filled(CLEAN[60:80])

    async def remove(nats: Nats) -> None:
        for seq in (70, 75, 76, 81):
            await nats.jetstream.delete_msg(f"RECKON_{namespace}", seq)

    connected(nats_url, remove)
    code, told, _ = tool("verify")
    holes = [
        f"expected record {a}, the log went on with {b}" for a, b in ((70, 71), (75, 77), (81, 82))
    ]
    assert code == 1 and told["records"] == 81 - 4
    assert told["problems"] == [
        *(f"records are missing: {hole}" for hole in holes),
        "there is nothing to fold the end of the log from",
    ]
    for command in (["snapshot"], ["export", str(tmp_path / "never")]):
        code, _, err = tool(*command)
        assert code == 1 and holes[0] in err and "--accept-loss" in err
    _, told, _ = tool("stat")
    assert (told["messages"], told["missing"]) == (81 - 4, 3), "the last one could be still to come"
    code, taken, _ = tool("snapshot", "--accept-loss")
    assert code == 0 and taken["taken"] and taken["seq"] == 81
    filled(CLEAN[80:])
    code, told, _ = tool("verify")
    assert told["stretches"][-1]["begun_from"] == taken["name"] and told["digest"]
    code, _, _ = tool("snapshot")
    assert code == 0


def test_trim_goes_no_further_than_a_snapshot(
    tool: Tool, filled: Callable[[Sequence[Record]], None]
) -> None:
    filled(CLEAN[:50])
    code, _, err = tool("trim")
    assert code == 1 and "0 snapshots are usable" in err
    code, _, err = tool("trim", "--before", "10")
    assert code == 1 and "no snapshot that can be read" in err
    tool("snapshot")
    code, told, _ = tool("trim", "--before", "10")
    assert (code, told) == (0, {"removed": 9, "first_seq": 10})
    code, _, err = tool("trim", "--before", "52")
    assert code == 1
    code, told, _ = tool("trim", "--before", "51")
    assert (code, told["first_seq"]) == (0, 51)
    code, told, _ = tool("verify")
    assert (code, told["problems"]) == (0, [])


def test_trim_leaves_what_a_replica_still_reads(
    tool: Tool, filled: Callable[[Sequence[Record]], None], nats_url: str, namespace: str
) -> None:
    filled(CLEAN[:50])
    connected(nats_url, lambda nats: NatsMarks(nats, namespace).put("a", 20))
    code, told, _ = tool("snapshot")
    assert (code, told["held_back"]) == (0, ""), "one snapshot alone trims nothing"
    code, told, _ = tool("trim", "--before", "51")
    held_back = "a replica still reads at record 20"
    assert (code, told) == (0, {"removed": 19, "first_seq": 20, "held_back": held_back})
    code, told, _ = tool("snapshot")
    assert (code, told["first_seq"], told["held_back"]) == (0, 20, held_back)


def test_a_log_without_its_beginning_is_refused_unless_the_loss_is_accepted(
    tool: Tool, filled: Callable[[Sequence[Record]], None], nats_url: str, namespace: str
) -> None:
    filled(CLEAN[:50])
    with_log(nats_url, namespace, lambda log: log.trim(20))
    for command in (["snapshot"], ["export", "nowhere"]):
        code, _, err = tool(*command)
        assert code == 1 and "begins with record 20" in err and "--accept-loss" in err
    code, told, _ = tool("verify")
    assert code == 1 and "nothing to fold" in told["problems"][0]
    code, told, _ = tool("snapshot", "--accept-loss")
    assert code == 0 and told["taken"]
    code, told, _ = tool("verify")
    assert (code, told["problems"]) == (0, [])


def test_reset_asks_first(
    tool: Tool, filled: Callable[[Sequence[Record]], None], nats_url: str, namespace: str
) -> None:
    filled(CLEAN[:50])
    code, _, err = tool("reset")
    assert code == 1 and "--yes" in err
    code, told, _ = tool("reset", "--yes", "--reason", "a test")
    assert (code, told) == (0, {"seq": 51})
    records = with_log(nats_url, namespace, records_of)
    batch = codec.decode(records[-1].data).batch
    assert batch is not None and batch.events == [events.StateReset("a test")]

    async def folded(log: JetStreamLog) -> RouterState:
        state = RouterState()
        await fold_to(log, state, 51)
        return state

    state = with_log(nats_url, namespace, folded)
    assert state.tree.pair_count == 0 and not state.requests


def is_timeless(record: Record) -> bool:
    """Whether nothing that follows from it begins or ends by the log's clock."""
    batch = codec.decode(record.data).batch
    assert batch is not None
    return not any(
        isinstance(event, events.PrefixPinned | events.BusyThresholdChanged)
        or (isinstance(event, events.RequestRouted) and (event.prediction or event.session))
        for event in batch.events
    )


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("timeless", [False, True])
def test_what_is_exported_is_imported(
    tool: Tool,
    filled: Callable[[Sequence[Record]], None],
    nats_url: str,
    namespace: str,
    tmp_path: Path,
    whole: bool,
    timeless: bool,
) -> None:
    """Order and numbers are the same in the new namespace, and it can go on. The times are new, and
    so is what follows from them; all else is the same."""
    history = [record for record in CLEAN if not timeless or is_timeless(record)]
    filled(history[:40])
    for part in (history[40:50], history[50:60], history[60:]):
        tool("snapshot", "--kept", "2")
        filled(part)
    file, other = tmp_path / "log.reckon", f"{namespace}-other"
    code, exported, _ = tool("export", str(file), *(["--whole"] if whole else []))
    assert code == 0 and exported["bytes"] == file.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["log.reckon"]
    code, imported, _ = tool("import", str(file), into=other)
    assert code == 0
    assert (
        imported["records"]
        == exported["records"]
        == exported["last_seq"] - (exported["first_seq"] - 1)
    )
    before = with_log(nats_url, namespace, records_of)
    after = with_log(nats_url, other, records_of)
    told = {record.seq: record.data for record in before}
    assert {record.seq: record.data for record in after}.items() <= told.items()
    assert after[0].seq == exported["first_seq"] and after[-1].seq == before[-1].seq
    _, original, _ = tool("verify")
    _, of_file, _ = tool("verify", str(file))
    code, again, _ = tool("verify", into=other)
    assert code == 0
    assert original["digest"] == of_file["digest"] != ""
    assert not timeless or again["digest"] == original["digest"]
    if whole:
        assert any(stretch["until"] for stretch in of_file["stretches"])
    code, told_snapshot, _ = tool("snapshot", into=other)
    assert code == 0 and told_snapshot["seq"] == before[-1].seq
    code, _, err = tool("import", str(file), into=other)
    assert code == 1 and "has a log already" in err


def test_an_archive_that_is_not_whole_is_refused(
    tool: Tool, filled: Callable[[Sequence[Record]], None], namespace: str, tmp_path: Path
) -> None:
    filled(CLEAN[:20])
    file, bad = tmp_path / "log.reckon", tmp_path / "bad.reckon"
    tool("export", str(file))
    data = file.read_bytes()
    for harmed in (data[:-1], data[:-60], data[:100], data + b"x", b"", b"x" + data[1:]):
        bad.write_bytes(harmed)
        code, _, err = tool("verify", str(bad))
        assert code == 1 and err.startswith("Error: the archive ")
        code, _, err = tool("import", str(bad), into=f"{namespace}-other")
        assert code == 1 and err.startswith("Error: the archive ")
    code, _, _ = tool("import", str(file), into=f"{namespace}-other")
    assert code == 0, "the attempts have left nothing behind"
    code, _, err = tool("verify", str(tmp_path / "none"))
    assert code == 1 and "No such file" in err
