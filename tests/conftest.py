"""Hypothesis profiles: `dev` while working, `ci` for the whole suite (HYPOTHESIS_PROFILE)."""

import os
import signal

from hypothesis import HealthCheck, settings

_SLOW_MACHINE = [HealthCheck.too_slow]

settings.register_profile(
    "dev", deadline=None, print_blob=True, max_examples=50, suppress_health_check=_SLOW_MACHINE
)
settings.register_profile(
    "ci",
    deadline=None,
    print_blob=True,
    max_examples=100,
    derandomize=True,
    suppress_health_check=_SLOW_MACHINE,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# Started in the background of a shell, or under nohup, this process ignores these, and so would the
# processes that tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
