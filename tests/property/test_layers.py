"""House rules that a reader relies on, held by the source: who imports whom, what is pure."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {
    "eventstore": set(),
    "indexer": {"eventstore"},
    "router": {"indexer", "eventstore"},
    "workers": {"eventstore", "indexer"},
    "frontend": {"router", "workers", "eventstore", "indexer"},
    "reckon": {"eventstore"},
}
"""Room → the rooms it may import. `simulations` may import all of them."""

PURE = [
    "eventstore/events.py",
    "eventstore/codec.py",
    "eventstore/subjects.py",
    "eventstore/log.py",
    "eventstore/errors.py",
    "eventstore/snapshots.py",
    "eventstore/claims.py",
    "eventstore/marks.py",
    "eventstore/archive.py",
    "indexer/blocks.py",
    "indexer/masks.py",
    "indexer/predicted.py",
    "indexer/radix.py",
    "indexer/rank_cache.py",
    "indexer/dump.py",
    "router/active.py",
    "router/admission.py",
    "router/affinity.py",
    "router/busy.py",
    "router/candidates.py",
    "router/circuit.py",
    "router/cost.py",
    "router/decision.py",
    "router/lifecycle.py",
    "router/local_load.py",
    "router/parking.py",
    "router/queue.py",
    "router/request_fold.py",
    "router/selection.py",
    "router/state.py",
    "router/fold.py",
    "router/snapshot.py",
    "router/progress.py",
    "router/errors.py",
    "workers/card.py",
    "workers/protocol.py",
    "workers/frames.py",
    "workers/engine.py",
    "workers/kv_cache.py",
    "workers/timing.py",
    "workers/sampling.py",
    "frontend/openai.py",
    "frontend/openai_types.py",
    "frontend/template.py",
    "frontend/detokenize.py",
    "frontend/chunks.py",
    "frontend/tool_use.py",
    "frontend/guided.py",
    "frontend/media.py",
    "frontend/message.py",
    "frontend/logprobs.py",
    "frontend/usage.py",
    "frontend/errors.py",
    "simulations/trace.py",
]
IMPURE_MODULES = {
    "aiohttp",
    "asyncio",
    "logging",
    "nats",
    "os",
    "prometheus_client",
    "random",
    "socket",
    "subprocess",
    "threading",
    "time",
}
PURE_USES = {("random", "Random")}
"""Types that a pure function may be given."""


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import; name is empty for a whole module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_nothing_points_back(room: str) -> None:
    """A room imports only rooms below it."""
    rooms = {*ROOMS, "simulations"}
    for path in (ROOT / room).rglob("*.py"):
        for module, _ in imports(path):
            other = module.partition(".")[0]
            if other in rooms and other != room:
                assert other in ROOMS[room], f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("file", PURE)
def test_the_core_does_no_io_and_reads_no_clock(file: str) -> None:
    for module, name in imports(ROOT / file):
        pure = module.partition(".")[0] not in IMPURE_MODULES or (module, name) in PURE_USES
        assert pure, f"{file} imports {module}"


def test_one_package_of_the_log_and_one_of_discovery_know_nats() -> None:
    knowing = {
        str(path.relative_to(ROOT))
        for room in [*ROOMS, "simulations"]
        for path in (ROOT / room).rglob("*.py")
        for module, _ in imports(path)
        if module.partition(".")[0] == "nats"
    }
    assert {name.partition("/")[0] for name in knowing} <= {"eventstore", "workers"}


def test_the_core_does_not_use_the_salted_hash() -> None:
    """`hash()` of a text differs between processes; a fold that used it would too."""
    for file in PURE:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "hash", f"{file}:{node.lineno}"
