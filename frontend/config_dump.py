"""--dump-config-to: what this process runs with, and where each value is from, as JSON.

The shape is the peer's (`config`, `environment`, `installed_packages`, `runtime_info`,
`system_info`), and `sources` beside it. What is secret reads `<REDACTED>`.
"""

import importlib.metadata
import logging
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from eventstore.options import Settings, declarations
from eventstore.process_settings import SECRETS
from eventstore.settings import VERSION, sources

REDACTED = "<REDACTED>"
DEFAULT = "default"
_KEPT = ("DYN_", "RECKON_", "NATS_", "OTEL_")
_SECRET_NAME = re.compile("TOKEN|API_KEY|SECRET|PASSWORD|CREDENTIAL|AUTH|NKEY")
_USER_INFO = re.compile(r"[^/\s]+@")
"""What is before the host in an address, and rather too much than too little of it."""

_log = logging.getLogger(__name__)


def dump_config(
    path: Path | None, settings: Settings, argv: Sequence[str], env: Mapping[str, str]
) -> None:
    """Write the configuration to `path`, in folders that are made if need be; with no path, to the
    log at DEBUG. That it can't be written is logged, and no reason not to run.

    settings: what `eventstore.settings.parse` made of argv and env.
    """
    if path is None:
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("configuration: %s", configuration(settings, argv, env).decode())
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(configuration(settings, argv, env) + b"\n")
    except OSError as error:
        _log.error("can't write the configuration to %s: %s", path, error.strerror or error)


def configuration(settings: Settings, argv: Sequence[str], env: Mapping[str, str]) -> bytes:
    """One line of JSON with sorted keys. Cost: some 0.1 s, for the list of installed packages."""
    given = sources(type(settings), argv, env)
    options = [each.name for each in declarations(type(settings))]
    content = {
        "config": {name: _shown(name, getattr(settings, name)) for name in options},
        "sources": {name: given.get(name, DEFAULT) for name in options},
        "environment": {
            name: REDACTED if _SECRET_NAME.search(name) else _without_user(value)
            for name, value in env.items()
            if name.startswith(_KEPT)
        },
        "installed_packages": {
            each.name: each.version for each in importlib.metadata.distributions()
        },
        "reckon_version": VERSION,
        "runtime_info": {
            # Passwords and the like have no flags: on a command line everyone could read them.
            "command_line_args": [_without_user(argument) for argument in argv],
            "python_executable": sys.executable,
            "python_version": platform.python_version(),
        },
        "system_info": {
            "architecture": platform.machine(),
            "hostname": platform.node(),
            "os_name": platform.system(),
            "os_release": platform.release(),
            "os_version": platform.version(),
            "platform": platform.platform(),
            "processor": platform.processor(),
        },
    }
    return msgspec.json.encode(content, enc_hook=str, order="sorted")


def _shown(name: str, value: object) -> object:
    if name in SECRETS and value is not None:
        return _without_user(value) if name == "nats_url" and isinstance(value, str) else REDACTED
    return value


def _without_user(text: str) -> str:
    return _USER_INFO.sub(f"{REDACTED}@", text)
