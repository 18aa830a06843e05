"""Why a request could not be routed.

RouterError
├── NoWorkers         no live worker serves the model
├── UnknownWorker     the caller named a worker or rank that does not serve the model
├── WorkerRequired    direct mode, and the caller named none
├── ReplicaNotReady   the state is still being read from the log
└── LogBacklogFull    too many facts wait for the log; a new request could not be recorded
"""


class RouterError(Exception):
    """Base of all routing errors."""


class NoWorkers(RouterError):
    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model

    def __str__(self) -> str:
        return f"no worker serves {self.model} at the moment"


class UnknownWorker(RouterError):
    def __init__(self, worker_id: int, model: str) -> None:
        super().__init__(worker_id, model)
        self.worker_id = worker_id
        self.model = model

    def __str__(self) -> str:
        return f"worker {self.worker_id} does not serve {self.model}"


class WorkerRequired(RouterError):
    def __str__(self) -> str:
        return "direct mode routes to the worker that the request names, and this one names none"


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
