"""The command `reckon`: `up` is its own, the other subcommands are those of the packages."""

import os
import runpy
import sys
from collections.abc import Mapping, Sequence

from eventstore.settings import VERSION

PASSED_ON: Mapping[str, str] = {
    "frontend": "frontend",
    "worker": "workers",
    "log": "eventstore",
    "sim": "simulations",
}
"""Subcommand → package whose `python -m` it is."""

HELP = """\
usage: reckon COMMAND [options]

An OpenAI-compatible LLM frontend with a KV-cache-aware router that lives from one JetStream log.

Commands
  up         a whole deployment on this machine: nats-server, frontend replicas, mock workers
  frontend   one frontend              (python -m frontend)
  worker     one worker                (python -m workers)
  log        what the log holds        (python -m eventstore)
  sim        simulations and replays   (python -m simulations)

`reckon COMMAND --help` shows the options of a command.

  -h, --help
  --version"""


def main() -> int:
    """Run the command line of this process; returns its exit status."""
    return run(sys.argv[1:], os.environ)


def run(argv: Sequence[str], env: Mapping[str, str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("", argv)
    if command == "up":
        from reckon import up  # here, because the other commands need nothing of it

        return up.main(rest, env)
    if command in PASSED_ON:
        sys.argv = [f"reckon {command}", *rest]
        runpy.run_module(PASSED_ON[command], run_name="__main__", alter_sys=True)
        return 0
    if command in ("-h", "--help"):
        print(HELP)
        return 0
    if command == "--version":
        print(f"reckon {VERSION}")
        return 0
    what = f"there is no command {command!r}" if command else "a command is needed"
    print(f"Error: {what}\nTry: reckon --help", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
