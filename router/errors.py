"""Why a request could not be routed.

RouterError
├── NoWorkers         no live worker serves the model
├── UnknownWorker     the caller named a worker that does not serve the model
├── UnknownRank       the caller named a rank that the model's workers, or the one named, lack
├── WorkerRequired    direct mode, and the caller named none
├── AllWorkersBusy    every worker of the model is above a busy threshold
├── QueueFull         every worker is busy with prompts, and no more requests may wait for one
├── QueueTimeout      no worker had room for the prompt as long as a request may wait
├── SessionUnavailable  the rank that the session is bound to can take no request
├── ReplicaNotReady   the state is still being read from the log
└── LogBacklogFull    too many facts wait for the log; a new request could not be recorded
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.busy import Busy


class RouterError(Exception):
    """Base of all routing errors."""


class NoWorkers(RouterError):
    """role: of the workers that are missing."""

    def __init__(self, model: str, role: str = "aggregated") -> None:
        super().__init__(model, role)
        self.model = model
        self.role = role

    def __str__(self) -> str:
        who = "no worker" if self.role == "aggregated" else f"no {self.role} worker"
        return f"{who} serves {self.model} at the moment"


class UnknownWorker(RouterError):
    """role: that it was named for."""

    def __init__(self, worker_id: int, model: str, role: str = "aggregated") -> None:
        super().__init__(worker_id, model, role)
        self.worker_id = worker_id
        self.model = model
        self.role = role

    def __str__(self) -> str:
        how = "" if self.role == "aggregated" else f" as a {self.role} worker"
        return f"worker {self.worker_id} does not serve {self.model}{how}"


class UnknownRank(RouterError):
    """worker_id: the worker that was named beside the rank, if one was."""

    def __init__(self, dp_rank: int, model: str, worker_id: int | None = None) -> None:
        super().__init__(dp_rank, model, worker_id)
        self.dp_rank = dp_rank
        self.model = model
        self.worker_id = worker_id

    def __str__(self) -> str:
        if self.worker_id is not None:
            return f"worker {self.worker_id} of {self.model} has no rank {self.dp_rank}"
        return f"no worker of {self.model} has a rank {self.dp_rank}"


class WorkerRequired(RouterError):
    def __str__(self) -> str:
        return "direct mode routes to the worker that the request names, and this one names none"


class AllWorkersBusy(RouterError):
    """busy: of the rank that is least above its thresholds."""

    def __init__(self, model: str, workers: int, busy: "Busy") -> None:
        super().__init__(model, workers, busy)
        self.model = model
        self.workers = workers
        self.busy = busy

    def __str__(self) -> str:
        if self.workers == 1:
            return f"the worker of {self.model} is busy: it has {self.busy}"
        who = f"all {self.workers} workers of {self.model}"
        return f"{who} are busy: the one that is least so has {self.busy}"


class QueueFull(RouterError):
    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        who = "1 request waits" if self.limit == 1 else f"{self.limit} requests wait"
        return f"{who} for a worker already, and no more may"


class QueueTimeout(RouterError):
    def __init__(self, waited_s: float) -> None:
        super().__init__(waited_s)
        self.waited_s = waited_s

    def __str__(self) -> str:
        return f"no worker had room for the request in {self.waited_s:.1f} s"


class SessionUnavailable(RouterError):
    def __init__(self, session_id: str, worker_id: int) -> None:
        super().__init__(session_id, worker_id)
        self.session_id = session_id
        self.worker_id = worker_id

    def __str__(self) -> str:
        return (
            f"the session is bound to worker {self.worker_id}, which can take no request right now"
        )


class ReplicaNotReady(RouterError):
    def __init__(self, cursor: int, head: int) -> None:
        super().__init__(cursor, head)
        self.cursor = cursor
        self.head = head

    def __str__(self) -> str:
        return f"still reading the log: at record {self.cursor} of {self.head}"


class LogBacklogFull(RouterError):
    def __init__(self, buffered: int) -> None:
        super().__init__(buffered)
        self.buffered = buffered

    def __str__(self) -> str:
        return f"{self.buffered} facts wait for the log, and no more fit"
