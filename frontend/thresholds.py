"""The busy thresholds of this deployment: read from the folded state, changed through the log.

The options of a frontend say what holds for a model that nobody has set thresholds for: they are
appended once the model is served. What options have set, other options set anew at a later start;
what a request to /busy_threshold has set, only another such request changes, or a reset of it all.
"""

import asyncio
import logging
from collections.abc import Callable

from eventstore.control import record_thresholds
from eventstore.errors import LogUnavailable
from eventstore.events import BusyThresholdChanged
from eventstore.log import EventLog
from frontend.busy_threshold import Setting
from router.busy import Thresholds
from router.replica import Replica

BY_OPTIONS = "options of frontend "
"""How the source of a change by a frontend's options begins."""
LOOK_S = 0.2
"""Between two looks for models whose thresholds are not set."""
APPLIED_S = 0.005
SET_MAX_S = 60.0
"""How long options may take to be in force before they are tried again. Longer than the log may
take for a record; a log that was lost meanwhile never comes to the record that is waited for."""

_log = logging.getLogger(__name__)


class LogThresholds:
    """A `ThresholdBoard` over the log.

    served: names of the models that can be served now. new_id: draws a u64 that nobody else draws.
    """

    def __init__(
        self,
        log: EventLog,
        namespace: str,
        replica: Replica,
        served: Callable[[], list[str]],
        new_id: Callable[[], int],
    ) -> None:
        self._log = log
        self._namespace = namespace
        self._replica = replica
        self._served = served
        self._new_id = new_id

    def models(self) -> list[str]:
        return sorted({*self._served(), *self._replica.state.thresholds})

    def get(self, model: str) -> Setting | None:
        known = self._replica.state.thresholds.get(model)
        if known is None:
            return None
        changed = known.changed
        return Setting(Thresholds.of(changed), known.seq, known.time_ns, changed.source)

    async def change(self, model: str, new: Thresholds, source: str) -> int:
        changed = BusyThresholdChanged(
            model,
            new.active_decode_blocks,
            new.active_prefill_tokens,
            new.active_prefill_tokens_frac,
            source,
        )
        seq = await record_thresholds(self._log, self._namespace, changed, self._new_id())
        while self._replica.state.cursor < seq:  # noqa: ASYNC110  the fold has no event for it
            await asyncio.sleep(APPLIED_S)
        return seq

    async def apply_options(self, options: Thresholds, frontend: str) -> None:
        """Set the options for every model that they apply to, until cancelled: once for each, and
        again where a reset or the loss of the log has taken its thresholds away."""
        if not options.are_set:
            return
        await self._replica.wait_ready()
        done: set[str] = set()
        while True:
            for model in self._served():
                if model in done and self.get(model) is not None:
                    continue
                try:
                    async with asyncio.timeout(SET_MAX_S):
                        await self._set_option(model, options, frontend)
                except (LogUnavailable, TimeoutError) as error:
                    _log.warning("thresholds of %s not in force yet: %s", model, error)
                else:
                    done.add(model)
            await asyncio.sleep(LOOK_S)

    async def _set_option(self, model: str, options: Thresholds, frontend: str) -> None:
        known = self.get(model)
        if known is not None and known.thresholds == options:
            return
        if known is not None and not known.source.startswith(BY_OPTIONS):
            _log.warning(
                "the busy thresholds of %s stay as %s set them at seq %d, whatever the options say",
                model,
                known.source,
                known.seq,
            )
            return
        await self.change(model, options, BY_OPTIONS + frontend)
