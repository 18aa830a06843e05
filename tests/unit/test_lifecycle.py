"""The table of request phases says what it should, and covers every request event."""

from typing import get_args

from eventstore import codec, events
from router.fold import HANDLERS
from router.lifecycle import ENDINGS, LIFECYCLE, LIVE, Phase, next_phase


def test_every_event_has_exactly_one_handler() -> None:
    assert set(HANDLERS) == set(get_args(events.AnyEvent))


def test_every_request_event_has_a_row() -> None:
    tags = {event: str(event.__struct_config__.tag) for event in get_args(events.AnyEvent)}
    expected = {event for event, tag in tags.items() if tag.startswith("request.")}
    expected.discard(events.PrefillHopEnded)  # a hop is no phase
    assert {event for _, event in LIFECYCLE} == expected


def test_an_ended_request_never_moves_again() -> None:
    for event in get_args(events.AnyEvent):
        assert next_phase(Phase.ENDED, event) is None


def test_every_live_phase_can_end_in_every_way() -> None:
    for phase in LIVE:
        for ending in ENDINGS:
            assert next_phase(phase, ending) is Phase.ENDED


def test_tags_are_distinct_and_read_back() -> None:
    tags = [str(event.__struct_config__.tag) for event in get_args(events.AnyEvent)]
    assert len(set(tags)) == len(tags)
    assert codec.tag_of(events.StateReset("x")) == "state.reset"
