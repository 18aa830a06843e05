"""The memory log is an `EventLog`, and agrees with a list of what was appended."""

import asyncio
import itertools
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventstore.errors import SeqConflict
from eventstore.log import EventLog, Record
from eventstore.memory import DUPLICATE_WINDOW_NS, MemoryLog
from tests.log_contract import LogContract, listed


class TestMemoryLog(LogContract):
    @pytest.fixture
    def namespace(self) -> str:
        return "memory"

    @pytest.fixture
    def log(self) -> EventLog:
        ticks = itertools.count(1_000)
        return MemoryLog(lambda: next(ticks))


async def test_a_msg_id_is_forgotten_after_the_window() -> None:
    clock = [1_000]
    log = MemoryLog(lambda: clock[0])
    await log.append("s", b"1", msg_id="a")
    clock[0] += DUPLICATE_WINDOW_NS - 1
    assert (await log.append("s", b"1", msg_id="a")).duplicate
    clock[0] += 1
    assert await log.append("s", b"1", msg_id="a") == (2, False)


class Append(NamedTuple):
    subject: str
    msg_id: str
    expected: int | None


class Trim(NamedTuple):
    before_seq: int


_appends = st.builds(
    Append,
    st.sampled_from("ab"),
    st.integers(0, 9).map(str),
    st.none() | st.integers(0, 5),
)
_trims = st.builds(Trim, st.integers(0, 12))


@given(st.lists(_appends | _trims, max_size=30))
def test_the_log_is_a_list(steps: list[Append | Trim]) -> None:
    """After any appends and trims, reading gives the appended records that were not trimmed."""

    async def run() -> None:
        log = MemoryLog(lambda: 7)
        records: list[Record] = []
        seqs_by_id: dict[str, int] = {}
        first = 1
        for step in steps:
            if isinstance(step, Trim):
                first = max(first, min(step.before_seq, len(records) + 1))
                await log.trim(step.before_seq)
                continue
            subject, msg_id, expected = step
            on_subject = [r for r in records[first - 1 :] if r.subject == subject]
            last = on_subject[-1].seq if on_subject else 0
            try:
                appended = await log.append(
                    subject, msg_id.encode(), msg_id=msg_id, expected_subject_seq=expected
                )
            except SeqConflict:
                assert expected is not None and expected != last
                assert not on_subject or on_subject[-1].data != msg_id.encode()
                continue
            assert expected in (None, last) or seqs_by_id[msg_id] == last
            assert appended.duplicate == (msg_id in seqs_by_id)
            assert appended.seq == seqs_by_id.setdefault(msg_id, len(records) + 1)
            if not appended.duplicate:
                records.append(Record(appended.seq, 7, subject, msg_id.encode()))
        assert await listed(log.read(0)) == records[first - 1 :]
        extent = await log.extent()
        assert (extent.first_seq, extent.last_seq) == (first, len(records))
        assert extent.bytes == sum(len(r.subject) + len(r.data) for r in records[first - 1 :])

    asyncio.run(run())
