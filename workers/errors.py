"""What can go wrong between a frontend and its workers.

WorkerError
├── WorkerLost          a running stream's worker is gone, or its connection is
├── CannotConnect       there is no connection to the worker now
├── WorkerBacklogged    the worker does not read: too many bytes wait to be sent to it
├── FrameTooLarge       a message is over the request plane's frame limit
├── BrokenProtocol      the other side sent what the request plane does not know
├── PrefillFailed       a prefill worker did not hand over the prompt it should compute
├── DiscoveryError      the discovery store cannot be reached, or refused
└── BadModelFile        a model file is missing, too large, or not what its name says
"""


class WorkerError(Exception):
    """Base of all errors of the workers' side."""


class WorkerLost(WorkerError):
    def __init__(self, worker_id: int, cause: str) -> None:
        super().__init__(worker_id, cause)
        self.worker_id = worker_id
        self.cause = cause

    def __str__(self) -> str:
        return f"worker {self.worker_id:016x} was lost: {self.cause}"


class CannotConnect(WorkerError):
    def __init__(self, worker_id: int, address: str, cause: str) -> None:
        super().__init__(worker_id, address, cause)
        self.worker_id = worker_id
        self.address = address
        self.cause = cause

    def __str__(self) -> str:
        return f"worker {self.worker_id:016x} at {self.address} is not connected: {self.cause}"


class WorkerBacklogged(WorkerError):
    def __init__(self, worker_id: int, waiting_bytes: int) -> None:
        super().__init__(worker_id, waiting_bytes)
        self.worker_id = worker_id
        self.waiting_bytes = waiting_bytes

    def __str__(self) -> str:
        return f"worker {self.worker_id:016x} does not read: {self.waiting_bytes} bytes wait for it"


class FrameTooLarge(WorkerError):
    def __init__(self, size_bytes: int, max_bytes: int) -> None:
        super().__init__(size_bytes, max_bytes)
        self.size_bytes = size_bytes
        self.max_bytes = max_bytes

    def __str__(self) -> str:
        return f"a frame of {self.size_bytes} bytes; the request plane takes {self.max_bytes}"


class BrokenProtocol(WorkerError):
    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return self.why


class PrefillFailed(WorkerError):
    def __init__(self, room: int, why: str) -> None:
        super().__init__(room, why)
        self.room = room
        self.why = why

    def __str__(self) -> str:
        return f"the prompt of room {self.room} was not handed over: {self.why}"


class DiscoveryError(WorkerError):
    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return self.what


class BadModelFile(WorkerError):
    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.name = name
        self.why = why

    def __str__(self) -> str:
        return f"model file {self.name}: {self.why}"
