"""Draw the passwords of a deployment: one for each NATS user, and one that the nodes share.

    python deploy/make_secrets.py --out DIR --routes nats-1:6222,nats-2:6222,nats-3:6222

DIR/<user>/password is for the processes of that user, DIR/nats for the nodes: they include it from
nats.conf. What was drawn before stays, so this may run at every start.
"""

import argparse
import os
import secrets
from pathlib import Path

USERS = ("frontend", "worker", "recorder", "operator")
"""Those of deploy/nats/accounts.conf."""
_MODE = 0o400


def make_secrets(out: Path, routes: list[str]) -> None:
    """routes: host:port of every node, as the other nodes reach it. Raises OSError."""
    passwords = {user: _drawn(out / user / "password") for user in USERS}
    lines = [f'{user.upper()}_PASSWORD: "{password}"' for user, password in passwords.items()]
    _write(out / "nats" / "passwords.conf", "\n".join(lines) + "\n")
    shared = _drawn(out / "nats" / "cluster.password")
    urls = ", ".join(f'"nats://node:{shared}@{route}"' for route in routes)
    _write(
        out / "nats" / "cluster.conf",
        f'authorization {{ user: node, password: "{shared}" }}\nroutes: [{urls}]\n',
    )


def _drawn(path: Path) -> str:
    """The secret in `path`, which is drawn if there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        secret = secrets.token_hex(24)
        _write(path, secret)
        return secret


def _write(path: Path, text: str) -> None:
    """All of it or nothing, and never readable by others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE), "w") as file:
        file.write(text)
    new.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where to put them")
    parser.add_argument("--routes", required=True, help="host:port of every node, with commas")
    arguments = parser.parse_args()
    make_secrets(arguments.out, arguments.routes.split(","))


if __name__ == "__main__":
    main()
