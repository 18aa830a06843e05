"""When a child that died is started again, and when the deployment gives up on it. Pure.

A child that served for a while and died comes back almost at once. One that keeps dying at its
start waits longer each time, and after `failed_starts_max` such deaths in a row it is given up:
what it lacks, another start will not bring.
"""

import signal

from msgspec import Struct

MISUSE = 2
"""The exit status of a command line or setting that is wrong: no repetition can heal it."""


class Life(Struct, frozen=True):
    """One run of a child, now over.

    ready_s: how long it ran after it had become ready; None if it never did.
    returncode: the exit status; -N if signal N killed it.
    """

    ready_s: float | None
    returncode: int


class Verdict(Struct, frozen=True):
    """What follows a death. `delay_s` None: no further start.

    failed_starts: deaths at the start in a row up to now; the next verdict builds on it.
    """

    failed_starts: int
    delay_s: float | None


class RestartPolicy(Struct, frozen=True, kw_only=True):
    delay_first_s: float = 0.2
    delay_max_s: float = 5.0
    settled_s: float = 2.0
    """A child that dies sooner than this after it became ready died at its start."""
    failed_starts_max: int = 5

    def after(self, life: Life, failed_starts: int) -> Verdict:
        """Decide on a child that has just ended `life`, after `failed_starts` in a row before it.

        The delay doubles from `delay_first_s` with every failed start, up to `delay_max_s`.
        """
        if life.ready_s is not None and life.ready_s >= self.settled_s:
            return Verdict(0, self.delay_first_s)
        failed_starts += 1
        hopeless = life.ready_s is None and life.returncode == MISUSE
        if hopeless or failed_starts >= self.failed_starts_max:
            return Verdict(failed_starts, None)
        delay_s = self.delay_first_s * 2.0 ** (failed_starts - 1)
        return Verdict(failed_starts, min(delay_s, self.delay_max_s))


def how_it_ended(returncode: int) -> str:
    """`was killed by SIGKILL` or `exited with status 1`."""
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
