"""What can go wrong with the log.

EventStoreError
├── LogUnavailable     the server cannot be reached, or did not answer in time
├── SeqConflict        an expected-sequence append lost a race
├── LogGap             records are missing between what was read and what came next
├── BadSubject         an id that cannot be part of a subject
├── MessageTooLarge    one event alone is over the server's max_payload
└── BufferFull         a publisher's bounded buffer is full
"""


class EventStoreError(Exception):
    """Base of all errors of the log."""


class LogUnavailable(EventStoreError):
    def __init__(self, what: str, try_this: str = "") -> None:
        super().__init__(what, try_this)
        self.what = what
        self.try_this = try_this

    def __str__(self) -> str:
        return self.what


class SeqConflict(EventStoreError):
    def __init__(self, subject: str, expected: int) -> None:
        super().__init__(subject, expected)
        self.subject = subject
        self.expected = expected

    def __str__(self) -> str:
        return f"the last record on {self.subject} is not {self.expected} any more"


class LogGap(EventStoreError):
    def __init__(self, expected: int, got: int) -> None:
        super().__init__(expected, got)
        self.expected = expected
        self.got = got

    def __str__(self) -> str:
        return f"expected record {self.expected}, the log went on with {self.got}"


class BadSubject(EventStoreError):
    def __init__(self, text: str, why: str) -> None:
        super().__init__(text, why)
        self.text = text
        self.why = why

    def __str__(self) -> str:
        return f"{self.text!r} {self.why}"


class MessageTooLarge(EventStoreError):
    def __init__(self, size_bytes: int, max_bytes: int) -> None:
        super().__init__(size_bytes, max_bytes)
        self.size_bytes = size_bytes
        self.max_bytes = max_bytes

    def __str__(self) -> str:
        return f"a message of {self.size_bytes} bytes; the log takes at most {self.max_bytes}"


class BufferFull(EventStoreError):
    def __init__(self, producer: str, events_max: int) -> None:
        super().__init__(producer, events_max)
        self.producer = producer
        self.events_max = events_max

    def __str__(self) -> str:
        return f"{self.producer} already holds {self.events_max} unwritten events"
