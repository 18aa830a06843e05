"""What the page has and is always so here is taken, and said to be of no use."""

import subprocess
import sys


def test_durable_kv_events_are_no_news() -> None:
    nowhere = ("--nats-url", "nats://127.0.0.1:1", "--nats-wait-secs", "0")
    command = [sys.executable, "-m", "frontend", "--router-durable-kv-events", *nowhere]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "could not connect to NATS" in ended.stderr
    assert "--router-durable-kv-events can be left out" in ended.stdout + ended.stderr
