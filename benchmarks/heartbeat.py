"""Writes the time to a pipe every millisecond, for a loop whose stalls are to be measured.

    python -m benchmarks.heartbeat FD

A beat is `time.monotonic_ns`, which all processes of a machine share, as 8 bytes, little-endian. It
is written by another process, so that it is as late as a request from a client would be, and not
put off by the stall itself. Ends when nobody reads any more.
"""

import os
import sys
import time

EVERY_S = 0.001
BEAT_BYTES = 8


def main() -> None:
    fd = int(sys.argv[1])
    due_s = time.monotonic()
    while True:
        due_s = max(due_s + EVERY_S, time.monotonic() - 50 * EVERY_S)
        time.sleep(max(0.0, due_s - time.monotonic()))
        try:
            os.write(fd, time.monotonic_ns().to_bytes(BEAT_BYTES, "little"))
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
