"""Which rank a session's requests belong to: bindings that end when they are not used.

Part of the folded state, so it knows no clock but the log's: two replicas that read the same
records hold the same bindings, and one that starts again finds them in its snapshot. A binding is
over at `expires_ns`, whether or not `expire` has taken it out by then. Its rank may be full or
gone: what follows from that is the router's to say, and `drop_rank` makes it forget a rank.
"""

from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

from sortedcontainers import SortedList

from indexer.radix import WorkerRank

SESSIONS_MAX = 100_000
"""Bindings kept, about 50 MB. A further one takes the place of the one that would end next, which
under one TTL is the one that has been idle for longest."""
EXPIRED_PER_CALL = 64
"""Bindings that one call of `expire` takes out, half a millisecond: a day's worth may be over at
the first record after a quiet night."""

_U128_MASK = 2**128 - 1


class SessionEntry(NamedTuple):
    """One binding, as it stands in a snapshot."""

    session_id: str
    worker_id: int
    dp_rank: int
    expires_ns: int


class _Binding(NamedTuple):
    rank: WorkerRank
    expires_ns: int


class Sessions:
    """Bindings of session ids to ranks. Times are the log's, in nanoseconds.

    Everything follows from the entries: no method depends on the order in which they came.
    """

    def __init__(self, sessions_max: int = SESSIONS_MAX) -> None:
        if sessions_max < 1:
            raise ValueError(f"sessions_max must be at least 1, not {sessions_max}")
        self._sessions_max = sessions_max
        self._bindings: dict[str, _Binding] = {}
        self._by_expiry: SortedList[tuple[int, str]] = SortedList()
        self._of_rank: dict[WorkerRank, set[str]] = {}
        self._entry_sum = 0

    def __len__(self) -> int:
        """Bindings held, those included that are over and not taken out yet."""
        return len(self._bindings)

    def get(self, session_id: str, now_ns: int) -> WorkerRank | None:
        """The session's rank; None if it has none or its binding is over. Changes nothing."""
        binding = self._bindings.get(session_id)
        return binding.rank if binding is not None and now_ns < binding.expires_ns else None

    def bind(self, session_id: str, rank: WorkerRank, expires_ns: int) -> None:
        """The session belongs to `rank` until `expires_ns`, whatever was before. O(log n).

        Where there are `sessions_max` others, the one of them that would end next goes.
        """
        if session_id in self._bindings:
            self._remove(session_id)
        elif len(self._bindings) >= self._sessions_max:
            self._remove(self._by_expiry[0][1])
        self._add(session_id, _Binding(rank, expires_ns))

    def touch(self, session_id: str, now_ns: int, expires_ns: int) -> bool:
        """The session was used: it ends at `expires_ns` from now on. O(log n).

        False, and nothing is changed, if it has no binding or that is over.
        """
        rank = self.get(session_id, now_ns)
        if rank is None:
            return False
        self.bind(session_id, rank, expires_ns)
        return True

    def drop_rank(self, rank: WorkerRank) -> int:
        """Forget what is bound to `rank`; returns how many. O(n log n) in those."""
        gone = self._of_rank.get(rank, set()).copy()
        for session_id in gone:
            self._remove(session_id)
        return len(gone)

    def expire(self, now_ns: int, count_max: int = EXPIRED_PER_CALL) -> int:
        """Take out what is over at `now_ns`, at most `count_max`; returns how many.

        O(1) where nothing is. Called once for every `bind`, it keeps up with them.
        """
        count = 0
        while count < count_max and self._by_expiry and self._by_expiry[0][0] <= now_ns:
            self._remove(self._by_expiry[0][1])
            count += 1
        return count

    def clear(self) -> None:
        """Forget every binding."""
        self.restore(())

    def entries(self) -> list[SessionEntry]:
        """Every binding, the one that ends first first, then by session id. O(n)."""
        return [
            SessionEntry(session_id, *self._bindings[session_id].rank, expires_ns)
            for expires_ns, session_id in self._by_expiry
        ]

    def restore(self, entries: Iterable[SessionEntry]) -> None:
        """Hold what `entries()` gave, and nothing else. About 5 µs each.

        More than `sessions_max` of them: those that end last.
        """
        self._bindings.clear()
        self._by_expiry.clear()
        self._of_rank.clear()
        self._entry_sum = 0
        for session_id, worker_id, dp_rank, expires_ns in entries:
            self.bind(session_id, WorkerRank(worker_id, dp_rank), expires_ns)

    def digest(self) -> str:
        """16 bytes in hex over the entries: equal if and only if they are. O(1)."""
        return f"{self._entry_sum:032x}"

    def check(self) -> None:
        """Assert that the indices agree with the bindings. O(n log n)."""
        assert len(self._bindings) <= self._sessions_max
        assert list(self._by_expiry) == sorted(
            (binding.expires_ns, session_id) for session_id, binding in self._bindings.items()
        )
        assert all(self._of_rank.values()), "a rank without sessions"
        assert {
            session_id: rank for rank, here in self._of_rank.items() for session_id in here
        } == {session_id: binding.rank for session_id, binding in self._bindings.items()}
        assert sum(map(len, self._of_rank.values())) == len(self._bindings)
        total = sum(_entry_hash(key, binding) for key, binding in self._bindings.items())
        assert self._entry_sum == total & _U128_MASK

    def _add(self, session_id: str, binding: _Binding) -> None:
        self._bindings[session_id] = binding
        self._by_expiry.add((binding.expires_ns, session_id))
        self._of_rank.setdefault(binding.rank, set()).add(session_id)
        self._entry_sum = (self._entry_sum + _entry_hash(session_id, binding)) & _U128_MASK

    def _remove(self, session_id: str) -> None:
        binding = self._bindings.pop(session_id)
        self._by_expiry.remove((binding.expires_ns, session_id))
        here = self._of_rank[binding.rank]
        here.discard(session_id)
        if not here:
            del self._of_rank[binding.rank]
        self._entry_sum = (self._entry_sum - _entry_hash(session_id, binding)) & _U128_MASK


def _entry_hash(session_id: str, binding: _Binding) -> int:
    (worker_id, dp_rank), expires_ns = binding
    numbers = b"%d.%d:%d:" % (worker_id, dp_rank, expires_ns)
    # Ids come from outside, and may hold halves of surrogate pairs.
    name = session_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(numbers + name, digest_size=16).digest(), "little")
