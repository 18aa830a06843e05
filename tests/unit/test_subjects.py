"""The subject grammar: what is built is parsed back, and nothing else gets in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventstore import subjects
from eventstore.errors import BadSubject

namespaces = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
ids = st.integers(0, 2**64 - 1)
producers = st.one_of(
    st.builds(subjects.kv_producer, ids, st.integers(0, 255)),
    st.builds(subjects.worker_producer, ids),
    st.builds(subjects.request_producer, ids),
    st.builds(subjects.frontend_producer, ids),
    st.builds(subjects.threshold_producer, st.text(min_size=1)),
    st.just(subjects.CONTROL_PRODUCER),
)


@given(namespaces, producers)
def test_a_subject_gives_its_producer_back(namespace: str, producer: str) -> None:
    """producer_of(subject(n, p)) == p, and the stream's wildcard covers the subject."""
    subject = subjects.subject(namespace, producer)
    assert subjects.producer_of(subject) == producer
    assert subject.startswith(subjects.stream_subjects(namespace).removesuffix(">"))


@given(producers)
def test_a_subject_is_tokens_that_nats_takes(producer: str) -> None:
    tokens = subjects.subject("ns", producer).split(".")
    assert all(tokens)
    assert not any(set(token) & set("*> \t\r\n") for token in tokens)


@given(ids, st.integers(0, 2**32 - 1), producers)
def test_a_kv_producer_tells_its_rank_and_no_other_does(
    worker_id: int, dp_rank: int, other: str
) -> None:
    told = subjects.rank_of_kv_producer(subjects.kv_producer(worker_id, dp_rank))
    assert told == (worker_id, dp_rank)
    assert (subjects.rank_of_kv_producer(other) is None) == (not other.startswith("kv."))


@given(st.text(min_size=1), st.text(min_size=1))
def test_models_have_subjects_of_their_own(one: str, other: str) -> None:
    same = subjects.threshold_producer(one) == subjects.threshold_producer(other)
    assert same == (one == other)


@given(ids)
def test_an_id_is_16_hex_digits(number: int) -> None:
    text = subjects.hex_id(number)
    assert len(text) == 16 and int(text, 16) == number


@pytest.mark.parametrize("bad", ["", "a.b", "a b", "*", ">", "a\n", "x" * 65, "ä", "a/b"])
def test_what_cannot_name_a_stream_is_refused(bad: str) -> None:
    for build in (subjects.check_namespace, subjects.stream_name, subjects.stream_subjects):
        with pytest.raises(BadSubject, match="is not a namespace"):
            build(bad)


@pytest.mark.parametrize("bad", ["", "reckon", "reckon.ns", "reckon.ns.", "other.ns.control"])
def test_other_subjects_have_no_producer(bad: str) -> None:
    with pytest.raises(BadSubject):
        subjects.producer_of(bad)


def test_the_names_on_the_server() -> None:
    """These are permanent: a deployment finds its log by them."""
    assert subjects.stream_name("prod-1") == "RECKON_prod-1"
    assert subjects.stream_subjects("prod-1") == "reckon.prod-1.>"
    assert subjects.kv_producer(0xAB, 2) == "kv.00000000000000ab.2"
    assert subjects.worker_producer(0xAB) == "worker.00000000000000ab"
    assert subjects.request_producer(0xAB) == "request.00000000000000ab"
    assert subjects.threshold_producer("org/model:v1.2") == "threshold.b3JnL21vZGVsOnYxLjI"
    assert subjects.subject("prod-1", "control") == "reckon.prod-1.control"
