"""Each rule of the log's audit catches what is planted for it, and a clean log has no findings."""

from collections.abc import Callable

import pytest

from eventstore import codec
from eventstore.events import (
    AnyEvent,
    FrontendRemoved,
    RequestAccepted,
    RequestCancelled,
    RequestCompleted,
    RequestFailed,
    RequestMigrated,
    RequestRouted,
    StateReset,
    WorkerRegistered,
    WorkerRemoved,
)
from eventstore.log import Record
from eventstore.subjects import frontend_producer, request_producer, subject, worker_producer
from router.fold import apply
from router.state import RouterState
from tests.integration.log_audit import (
    Answer,
    Ended,
    View,
    audit,
    leftover,
    misnumbered,
    parted,
    read,
    unaccounted,
)

FRONTEND, OTHER, WORKER = 1, 2, 7
REQUESTS = request_producer(FRONTEND)


class Writer:
    """A log in the making. Producers number their facts as they should unless told otherwise."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._next: dict[tuple[str, int], int] = {}
        self.add(worker_producer(WORKER), WorkerRegistered(WORKER, "m", "aggregated", 16))

    def add(
        self, producer: str, *events: AnyEvent, epoch: int = 1, first: int | None = None
    ) -> None:
        if first is None:
            first = self._next.get((producer, epoch), 0)
        self._next[producer, epoch] = first + len(events)
        data = codec.encode(producer, epoch, first, list(events))
        seq = len(self.records) + 1
        self.records.append(Record(seq, seq * 1000, subject("ns", producer), data))

    def request(self, name: str, mark: int, *events: AnyEvent, frontend: int = FRONTEND) -> None:
        self.add(request_producer(frontend), accepted(name, mark, frontend), routed(name), *events)

    def view(self) -> View:
        state = RouterState()
        for record in self.records:
            apply(state, record)
        return View("observer", state.cursor, state.digest())


def accepted(name: str, mark: int, frontend: int = FRONTEND) -> RequestAccepted:
    return RequestAccepted(name, frontend, "m", "completions", 20, mark, True)


def routed(name: str) -> RequestRouted:
    return RequestRouted(name, 0, WORKER, 0, "kv", 20, 0, [5], 1, 1.0, 0.0, 1, [], "m")


def completed(name: str) -> RequestCompleted:
    return RequestCompleted(name, 3, "stop", None)


def whole(mark: int, frontend: str = "one") -> Answer:
    return Answer(frontend, mark, 200, Ended.WHOLE)


@pytest.fixture
def log() -> Writer:
    """One request, well ended."""
    made = Writer()
    made.request("a", 100, completed("a"))
    return made


def test_a_clean_log_has_no_findings(log: Writer) -> None:
    """Every ending, every excuse, and a batch that came again."""
    log.request("b", 101, RequestFailed("b", 1, "worker_lost"))
    log.request("c", 102, RequestCancelled("c", 1, "gone"))
    log.records.append(log.records[-1]._replace(seq=len(log.records) + 1))
    log.request("d", 103, frontend=OTHER)
    log.add(frontend_producer(OTHER), FrontendRemoved(OTHER, "lease_expired"), epoch=0)
    log.request("e", 104, RequestMigrated("e", 1, "lost"), routed("e"), completed("e"))
    answers = [
        Answer("one", 100, 200, Ended.WHOLE, request_id="a"),
        Answer("one", 101, 502, Ended.ERROR, "worker_lost"),
        Answer("one", 102, 200, Ended.ABORTED),
        Answer("one", 900, 0, Ended.ABORTED),
        Answer("one", 901, 503, Ended.ERROR, "not_ready"),
        whole(103, "two"),
        Answer("two", 902, 0, Ended.BROKEN),
        whole(104),
    ]
    assert audit(log.records, answers, [log.view()]) == []


NUMBERS: dict[str, tuple[Callable[[Writer], None], str]] = {
    "a fact is missing": (
        lambda log: log.add(REQUESTS, accepted("b", 1), first=4),
        "numbers 3 to 3 of request.0000000000000001 epoch 1",
    ),
    "an epoch does not begin at 0": (
        lambda log: log.add(REQUESTS, accepted("b", 1), epoch=2, first=1),
        "numbers 0 to 0 of request.0000000000000001 epoch 2",
    ),
    "a number is used twice": (
        lambda log: log.add(REQUESTS, accepted("b", 1), first=2),
        "fact 2 of request.0000000000000001 epoch 1 is another one",
    ),
    "a record is missing": (
        lambda log: log.records.append(log.records[-1]._replace(seq=4)),
        "record 4 follows record 2",
    ),
    "a record can't be read": (
        lambda log: log.records.append(Record(3, 3000, subject("ns", REQUESTS), b"no")),
        "record 3 can't be read",
    ),
    "a stranger writes to a subject": (
        lambda log: log.records.append(
            Record(3, 3000, subject("ns", REQUESTS), codec.encode("control.x", 1, 0, []))
        ),
        "was written by control.x",
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(log: Writer, name: str) -> None:
    plant, finding = NUMBERS[name]
    assert misnumbered(log.records) == []
    plant(log)
    (found,) = misnumbered(log.records)
    assert finding in found


def test_a_fact_that_comes_behind_a_later_epoch_does_not_count(log: Writer) -> None:
    log.add(REQUESTS, accepted("b", 1), epoch=2)
    log.add(REQUESTS, completed("b"), epoch=1)
    facts, (found,) = read(log.records)
    assert "fact 3 of" in found and "is behind a later epoch" in found
    assert facts[-1].event == accepted("b", 1)


def test_a_batch_that_overlaps_what_is_known_counts_from_there_on(log: Writer) -> None:
    log.add(REQUESTS, completed("a"), accepted("b", 1), first=2)
    facts, findings = read(log.records)
    assert findings == []
    assert [fact.event for fact in facts][-2:] == [completed("a"), accepted("b", 1)]


ENDINGS: dict[str, tuple[tuple[AnyEvent, ...], str]] = {
    "two endings": (
        (accepted("b", 1), completed("b"), RequestCancelled("b", 3, "gone")),
        "request b ends with request.completed and request.cancelled",
    ),
    "no acceptance": ((completed("b"),), "request b ends and was never accepted"),
    "no ending": ((accepted("b", 1),), "request b has no ending"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_endings(log: Writer, name: str) -> None:
    planted, finding = ENDINGS[name]
    log.add(REQUESTS, *planted)
    (found,) = unaccounted(read(log.records)[0])
    assert finding in found


def test_a_frontend_that_came_back_owes_its_endings(log: Writer) -> None:
    log.request("b", 101)
    log.add(frontend_producer(FRONTEND), FrontendRemoved(FRONTEND, "lease_expired"), epoch=0)
    assert unaccounted(read(log.records)[0]) == []
    log.request("c", 102, completed("c"))
    (found,) = unaccounted(read(log.records)[0])
    assert "request b has no ending" in found


def test_a_process_that_runs_owes_its_endings_whatever_the_log_says_of_it(log: Writer) -> None:
    log.request("b", 101)
    log.add(frontend_producer(FRONTEND), FrontendRemoved(FRONTEND, "lease_expired"), epoch=0)
    facts, answers = read(log.records)[0], [whole(100), whole(102)]
    assert unaccounted(facts, answers, {"two"}) == []
    no_ending, no_request = unaccounted(facts, answers, {"one"})
    assert "request b has no ending" in no_ending
    assert "to request 102 is of no accepted request" in no_request


ANSWERS: dict[str, tuple[Answer, str]] = {
    "an answer without a request": (whole(999), "is of no accepted request"),
    "an error that nobody recorded": (
        Answer("one", 999, 502, Ended.ERROR, "worker_lost"),
        "is of no accepted request",
    ),
    "a stream that began and that nobody recorded": (
        Answer("one", 999, 200, Ended.ABORTED),
        "is of no accepted request",
    ),
    "an error that was recorded as a success": (
        Answer("one", 100, 502, Ended.ERROR, "worker_lost"),
        "is recorded as RequestCompleted",
    ),
    "a success that was recorded as a failure": (whole(101), "is recorded as RequestFailed"),
    "another error than was recorded": (
        Answer("one", 101, 500, Ended.ERROR, "engine_error"),
        "is recorded as RequestFailed",
    ),
    "another id than was accepted": (
        Answer("one", 100, 200, Ended.WHOLE, request_id="b"),
        "names b; accepted was a",
    ),
    "a connection that broke though the frontend lives": (
        Answer("one", 100, 200, Ended.BROKEN),
        "came from one, which lives",
    ),
    "two requests for one answer": (whole(102), "2 requests were accepted"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(log: Writer, name: str) -> None:
    answer, finding = ANSWERS[name]
    log.request("f", 101, RequestFailed("f", 0, "worker_lost"))
    log.request("g", 102, completed("g"))
    log.request("h", 102, completed("h"))
    (found,) = unaccounted(read(log.records)[0], [answer])
    assert finding in found


def test_bookings(log: Writer) -> None:
    log.request("b", 101)
    (found,) = leftover(read(log.records)[0])
    assert found.endswith("is booked on 0000000000000007")
    log.add(worker_producer(WORKER), WorkerRemoved(WORKER, "lease_expired"))
    (found,) = leftover(read(log.records)[0])
    assert found.endswith("is live")
    log.add(REQUESTS, routed("b"))
    (found,) = leftover(read(log.records)[0])
    assert found.endswith("is live"), "nothing is booked on a removed worker"
    log.add("control", StateReset("test"))
    assert leftover(read(log.records)[0]) == []


def test_digests(log: Writer) -> None:
    facts, view = read(log.records)[0], log.view()
    assert parted(log.records, facts, [view]) == []
    (found,) = parted(log.records, facts, [view._replace(digest="another")])
    assert "has digest another" in found
    (found,) = parted(log.records, facts, [view._replace(cursor=1)])
    assert found == "observer is at record 1 of 2"
    (found,) = parted(log.records[1:], facts, [view])
    assert "can't be folded" in found


def test_books_that_differ_from_the_fold(log: Writer) -> None:
    facts = read(log.records)[0]
    log.request("b", 101)
    (found,) = parted(log.records, facts, [])
    assert found == "a fold has 1 live requests and 1 bookings, the log 0 and 0"
