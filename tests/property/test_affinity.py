"""Session bindings against a plain dict."""

from hypothesis import given
from hypothesis import strategies as st

from indexer.radix import WorkerRank
from router.affinity import SessionEntry, Sessions

SESSIONS_MAX = 4
sessions_st = st.sampled_from(["a", "b", "c", "d", "e", "é", "\ud800"])
ranks_st = st.builds(WorkerRank, st.sampled_from([1, 2**64 - 1]), st.integers(0, 1))
steps_st = st.lists(
    st.tuples(
        st.sampled_from(["bind", "bind", "touch", "drop", "expire", "wait", "restore"]),
        sessions_st,
        ranks_st,
        st.integers(0, 5),
    ),
    max_size=30,
)
Steps = list[tuple[str, str, WorkerRank, int]]


def fold(steps: Steps) -> tuple[Sessions, dict[str, tuple[WorkerRank, int]], int]:
    """Take the steps on both; the model holds what is bound and not over. Returns the time too."""
    sessions, model, now = Sessions(SESSIONS_MAX), dict[str, tuple[WorkerRank, int]](), 0
    for what, name, rank, number in steps:
        if what == "bind":
            if name not in model and len(sessions) == SESSIONS_MAX:
                held = {entry.session_id: entry.expires_ns for entry in sessions.entries()}
                if name not in held:
                    model.pop(min(held, key=lambda key: (held[key], key)), None)
            sessions.bind(name, rank, now + number)
            model[name] = (rank, now + number)
        elif what == "touch":
            alive = name in model
            assert sessions.touch(name, now, now + number) == alive
            if alive:
                model[name] = (model[name][0], now + number)
        elif what == "drop":
            held_there = sum(entry[1:3] == rank for entry in sessions.entries())
            assert sessions.drop_rank(rank) == held_there
            model = {key: value for key, value in model.items() if value[0] != rank}
        elif what == "expire":
            over = sum(entry.expires_ns <= now for entry in sessions.entries())
            assert sessions.expire(now, 2) == min(over, 2)
        elif what == "wait":
            now += number
        else:
            entries = sessions.entries()
            sessions = Sessions(SESSIONS_MAX)
            sessions.restore(entries)
        model = {key: value for key, value in model.items() if value[1] > now}
        sessions.check()
    return sessions, model, now


@given(steps_st)
def test_a_session_has_the_rank_it_was_last_bound_to(steps: Steps) -> None:
    """Until it ends, its rank is dropped, or too many others came; whether or not anyone has
    called `expire`, and over any number of restarts."""
    sessions, model, now = fold(steps)
    for name in ("a", "b", "c", "d", "e", "é", "\ud800"):
        assert sessions.get(name, now) == (model[name][0] if name in model else None)
    while sessions.expire(now):
        pass
    assert len(sessions) == len(model)
    assert {(e.session_id, (WorkerRank(*e[1:3]), e.expires_ns)) for e in sessions.entries()} == set(
        model.items()
    )


@given(steps_st, steps_st)
def test_equal_digests_are_equal_entries(left: Steps, right: Steps) -> None:
    """And entries are in one order, whatever way they came."""
    one, other = fold(left)[0], fold(right)[0]
    assert (one.digest() == other.digest()) == (one.entries() == other.entries())
    assert one.entries() == sorted(one.entries(), key=lambda e: (e.expires_ns, e.session_id))


@given(steps_st, st.randoms())
def test_a_restored_copy_is_the_same(steps: Steps, rng: object) -> None:
    """restore(entries()) gives equal entries and digest, from any order of them."""
    sessions = fold(steps)[0]
    copy = Sessions(SESSIONS_MAX)
    copy.bind("other", WorkerRank(9, 9), 9)
    shuffled: list[SessionEntry] = sessions.entries()
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    copy.restore(shuffled)
    copy.check()
    assert (copy.entries(), copy.digest()) == (sessions.entries(), sessions.digest())
