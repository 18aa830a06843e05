"""Session bindings by example."""

import pytest

from indexer.radix import WorkerRank
from router.affinity import EXPIRED_PER_CALL, SessionEntry, Sessions

LEFT, RIGHT = WorkerRank(2**64 - 1, 0), WorkerRank(7, 3)


def test_a_binding_ends_unless_it_is_used() -> None:
    sessions = Sessions()
    sessions.bind("a", LEFT, 100)
    assert sessions.get("a", 99) == LEFT
    assert sessions.get("a", 100) is None
    assert sessions.touch("a", 99, 200)
    assert sessions.get("a", 199) == LEFT
    assert not sessions.touch("a", 200, 300), "over, and does not come back"
    assert not sessions.touch("b", 0, 300)


def test_the_last_binding_counts() -> None:
    sessions = Sessions()
    sessions.bind("a", LEFT, 100)
    sessions.bind("a", RIGHT, 50)
    assert (sessions.get("a", 49), len(sessions)) == (RIGHT, 1)
    assert sessions.drop_rank(LEFT) == 0
    assert sessions.drop_rank(RIGHT) == 1
    assert sessions.get("a", 0) is None


def test_the_one_that_ends_next_makes_room() -> None:
    """Also where the new one would end before all others: it has just been used."""
    sessions = Sessions(sessions_max=2)
    sessions.bind("a", LEFT, 100)
    sessions.bind("b", LEFT, 90)
    sessions.bind("c", LEFT, 80)
    assert [entry.session_id for entry in sessions.entries()] == ["c", "a"]
    with pytest.raises(ValueError):
        Sessions(sessions_max=0)


def test_a_night_is_cleared_away_in_parts() -> None:
    sessions = Sessions()
    for number in range(EXPIRED_PER_CALL + 1):
        sessions.bind(f"s{number}", LEFT, number)
    assert sessions.expire(10**9) == EXPIRED_PER_CALL
    assert sessions.get(f"s{EXPIRED_PER_CALL}", 10**9) is None, "over, though still held"
    assert sessions.expire(10**9) == 1
    assert sessions.expire(10**9) == 0


def test_entries_and_digest() -> None:
    sessions = Sessions()
    empty = sessions.digest()
    sessions.bind("a", LEFT, 100)
    sessions.bind("b", RIGHT, 90)
    entries = [SessionEntry("b", 7, 3, 90), SessionEntry("a", 2**64 - 1, 0, 100)]
    assert sessions.entries() == entries
    copy = Sessions()
    copy.restore(entries)
    assert copy.digest() == sessions.digest() != empty
    copy.clear()
    assert (copy.digest(), len(copy), copy.entries()) == (empty, 0, [])
