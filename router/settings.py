"""The options about snapshots, and those of the process that takes them."""

from typing import Annotated, ClassVar

from eventstore.options import Option
from eventstore.process_settings import NAMESPACE_DEFAULT, ProcessSettings
from eventstore.snapshots import KEPT_DEFAULT, KEPT_MIN
from eventstore.subjects import check_namespace


class SnapshotSettings(ProcessSettings, frozen=True, kw_only=True):
    """Base of the tables of the processes that take snapshots or have them taken."""

    router_snapshots_kept: Annotated[
        int,
        Option(
            "RECKON_ROUTER_SNAPSHOTS_KEPT",
            "Snapshots that stay. The log is trimmed to the oldest of them.",
            group="Snapshots",
            unit="snapshots",
            ge=KEPT_MIN,
            le=1000,
        ),
    ] = KEPT_DEFAULT
    router_snapshot_bytes: Annotated[
        int | None,
        Option(
            "RECKON_ROUTER_SNAPSHOT_BYTES",
            "Bytes in the log after the last snapshot that make the next one due, as does "
            "--router-snapshot-threshold.",
            unit="bytes",
            unset="only the number of messages counts",
            ge=1,
        ),
    ] = 256 * 1024 * 1024


class SnapshotterSettings(SnapshotSettings, frozen=True, kw_only=True):
    """Take a snapshot of what the log folds to, if one is due, and trim the log. Frontends start
    this by themselves; `python -m eventstore snapshot` does it at once, due or not."""

    program: ClassVar[str] = "python -m router.snapshotter"

    namespace: Annotated[
        str,
        Option(
            "DYN_NAMESPACE",
            "The deployment whose log it is.",
            group="Snapshotter",
            check=check_namespace,
        ),
    ] = NAMESPACE_DEFAULT
    router_snapshot_threshold: Annotated[
        int | None,
        Option(
            "DYN_ROUTER_SNAPSHOT_THRESHOLD",
            "Messages in the log after the last snapshot that make the next one due.",
            unit="messages",
            unset="only the bytes count",
            ge=1,
        ),
    ] = 1_000_000
    parent_pid: Annotated[
        int | None,
        Option("", "End when this process, which is our parent, ends (Linux).", ge=1),
    ] = None
