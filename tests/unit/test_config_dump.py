"""What --dump-config-to writes: every option, where it is from, and nothing that is secret."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from eventstore.options import declarations
from eventstore.settings import parse
from frontend.config_dump import REDACTED, configuration, dump_config
from frontend.settings import FrontendSettings

SECRET = "hunter2"


def dumped(*argv: str, **env: str) -> dict[str, Any]:
    settings = parse(FrontendSettings, argv, env)
    text = configuration(settings, argv, env)
    content: dict[str, Any] = json.loads(text)
    assert (
        text
        == json.dumps(content, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()
    )
    return content


def test_every_option_and_where_it_is_from() -> None:
    content = dumped(
        *("--http-port", "1", "--no-router-kv-events", "--tls-cert-path", "/c.pem"),
        *("--tls-key-path", "/k.pem"),
        DYN_HTTP_PORT="2",
        DYN_ROUTER_MODE="kv",
        DYN_HTTP_SVC_LIVE_PATH="/l",
        OTHER="x",
    )
    names = {each.name for each in declarations(FrontendSettings)}
    assert set(content["config"]) == set(content["sources"]) == names
    assert content["config"]["http_port"] == 1
    assert content["config"]["tls_key_path"] == "/k.pem"
    assert content["config"]["namespace"] is None
    given = {name: source for name, source in content["sources"].items() if source != "default"}
    assert given == {
        "http_port": "--http-port",
        "router_kv_events": "--no-router-kv-events",
        "tls_cert_path": "--tls-cert-path",
        "tls_key_path": "--tls-key-path",
        "router_mode": "DYN_ROUTER_MODE",
        "live_path": "DYN_HTTP_SVC_LIVE_PATH",
    }
    assert content["environment"] == {
        "DYN_HTTP_PORT": "2",
        "DYN_ROUTER_MODE": "kv",
        "DYN_HTTP_SVC_LIVE_PATH": "/l",
    }
    assert "msgspec" in content["installed_packages"]
    assert content["runtime_info"]["command_line_args"][:2] == ["--http-port", "1"]


@pytest.mark.parametrize(
    ("argv", "env"),
    [
        ([], {"NATS_AUTH_PASSWORD": SECRET}),
        ([], {"NATS_AUTH_TOKEN": SECRET}),
        ([], {"NATS_AUTH_NKEY": SECRET}),
        ([], {"RECKON_NATS_KEY_SECRET": SECRET}),
        ([], {"NATS_SERVER": f"nats://me:{SECRET}@host:4222,nats://{SECRET}@other"}),
        (["--nats-url", f"me:{SECRET}@host"], {}),
        (["--nats-url", f"nats://me:{SECRET}==@host"], {}),
        ([f"--nats-url=nats://me:{SECRET}@host:4222"], {}),
    ],
)
def test_nothing_secret_is_in_it(argv: list[str], env: dict[str, str]) -> None:
    text = json.dumps(dumped(*argv, **env))
    assert SECRET not in text and REDACTED in text


def test_the_address_is_shown_without_the_user() -> None:
    content = dumped("--nats-url", "nats://me:x@one:4222,nats://two")
    assert content["config"]["nats_url"] == f"nats://{REDACTED}@one:4222,nats://two"


def test_it_is_written_into_folders_that_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    dump_config(path, FrontendSettings(), [], {})
    assert json.loads(path.read_text())["sources"]["http_port"] == "default"


def test_that_it_cannot_be_written_is_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    dump_config(tmp_path / "file" / "b.json", FrontendSettings(), [], {})
    assert "can't write the configuration" in caplog.text


def test_without_a_path_it_is_logged_at_debug_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "frontend.config_dump"):
        dump_config(None, FrontendSettings(), [], {})
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, "frontend.config_dump"):
        dump_config(None, FrontendSettings(), [], {})
    assert '"config":{' in caplog.text
