"""Lines for people about a long reading of the log: how far it is, how fast, how long it takes."""

SAY_EVERY_S = 3.0


class Progress:
    """Says something once in SAY_EVERY_S. now_s: any clock that does not go back."""

    def __init__(self, now_s: float, cursor: int) -> None:
        self._said_s = now_s
        self._cursor = cursor

    def line(self, now_s: float, cursor: int, head: int) -> str | None:
        """What to say now that `cursor` of `head` is reached; None if it is not time yet."""
        passed_s = now_s - self._said_s
        if passed_s < SAY_EVERY_S or cursor >= head:
            return None
        rate = (cursor - self._cursor) / passed_s
        self._said_s, self._cursor = now_s, cursor
        left = f"about {(head - cursor) / rate:.0f} s left" if rate > 0 else "standing still"
        return f"at record {cursor} of {head}, {rate:.0f} records/s, {left}"
