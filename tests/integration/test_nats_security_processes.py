"""Processes that a NATS server does not admit, and what they show of their secrets."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eventstore.process_settings import ProcessSettings
from eventstore.settings import help_text, parse
from frontend.settings import FrontendSettings
from reckon.plan import environment
from tests.integration.nats_nodes import NatsNode
from tests.integration.secured import SECRET

ENV = {
    "NATS_AUTH_USERNAME": "u",
    "NATS_AUTH_PASSWORD": SECRET,
    "RECKON_NATS_WAIT_SECS": "0.5",
    "NATS_AUTH_TOKEN": "",
}


@pytest.mark.parametrize("module", [["frontend", "--http-port", "0"], ["workers", "mock"]])
async def test_a_process_that_is_not_admitted_ends_with_one_line(
    tmp_path: Path, module: list[str]
) -> None:
    options = {"authorization": {"users": [{"user": "u", "password": "other"}]}}
    async with NatsNode.configured(tmp_path, **options) as node:
        began_s = time.monotonic()
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-P", "-m", *module],
            env=os.environ | ENV | {"NATS_SERVER": node.url, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "Error: could not connect to NATS" in done.stderr
        assert "does not admit user u" in done.stderr
        assert "Try: NATS_AUTH_USERNAME" in done.stderr
        assert "Traceback" not in done.stderr
        assert SECRET not in done.stderr + done.stdout
        assert time.monotonic() - began_s < 30


def test_settings_show_no_secret() -> None:
    env = ENV | {"NATS_SERVER": f"nats://u:{SECRET}@h:1"}
    settings = parse(ProcessSettings, [], env)
    assert settings.access().password == SECRET
    assert SECRET not in repr(settings) + repr(settings.access()) + help_text(FrontendSettings)


def test_the_nats_of_up_is_told_nothing_that_is_for_another() -> None:
    assert environment({**ENV, "RECKON_NATS_TLS_CA": "/ca.pem", "DYN_X": "1"}).keys() == {
        "RECKON_NATS_WAIT_SECS",
        "DYN_X",
        "PYTHONPATH",
        "PYTHONUNBUFFERED",
    }
