"""When the log and a frontend disagree about the frontend's requests: what puts it right.

They disagree after a reset, after the log lost its tail, or when the frontend was taken for dead
and was not.
"""

from collections import Counter
from typing import TYPE_CHECKING

from eventstore.events import RequestFailed
from eventstore.publisher import Publisher
from router.replica import Replica
from router.state import hop_id
from router.ticket import Ticket

if TYPE_CHECKING:
    from router.router import Router


class Reconciler:
    """Compares the fold's picture of a router's requests with the requests themselves."""

    def __init__(
        self, router: "Router", replica: Replica, publisher: Publisher, frontend_id: int
    ) -> None:
        self.corrections = Counter[str]()
        """What has been written: `announced`, `released`."""
        self._router = router
        self._replica = replica
        self._publisher = publisher
        self._frontend_id = frontend_id
        self._missing: set[str] = set()
        self._ghosts: set[str] = set()
        self._published_then = 0

    def reconcile(self) -> None:
        """What an earlier call found and this one still finds, though all that had been published
        then has come back since, is corrected: a live request that the fold does not know is
        announced again, and one that the fold believes in and that has ended here is released.
        """
        if not self._replica.is_ready:
            return
        folded, tickets = self._replica.state.requests, self._router.tickets
        own = {key for key, live in folded.items() if live.frontend_id == self._frontend_id}
        missing, ghosts = tickets.keys() - own, own - tickets.keys()
        publisher = self._publisher
        if publisher.published - publisher.buffered < self._published_then:
            return  # not all of it is written yet
        if self._replica.state.cursor < publisher.last_seq:
            return  # nor read
        for request_id in sorted(missing & self._missing):
            self._announce(tickets[request_id])
        for request_id in sorted(ghosts & self._ghosts):
            publisher.publish(RequestFailed(request_id, 0, "lost"))
            self.corrections["released"] += 1
        self._missing, self._ghosts = missing, ghosts
        self._published_then = publisher.published

    def rebook(self) -> None:
        """The state has forgotten, or is another one: count the live requests that it does not know
        until it does, so that busy ranks do not look idle meanwhile."""
        for ticket in self._router.tickets.values():
            self._book(ticket)

    def _announce(self, ticket: Ticket) -> None:
        """Write again what has been written of a live request, and book it until it is read."""
        self._publisher.publish(self._router.accepted(ticket.request))
        for fact in ticket.facts():
            self._publisher.publish(fact)
        self._book(ticket)
        self.corrections["announced"] += 1

    def _book(self, ticket: Ticket) -> None:
        local, folded = self._router.local, self._replica.state.active
        for booking_id, routed in (
            (ticket.request_id, ticket.routed),
            (hop_id(ticket.request_id), ticket.hop),
        ):
            if routed is not None and booking_id not in local and booking_id not in folded:
                local.book(booking_id, routed)
        if ticket.routed is not None and not ticket.is_prefilling:
            local.prefill_completed(ticket.request_id)
