"""The decisions and the texts of `reckon up`, without a process."""

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventstore.settings import SettingsError, parse
from reckon.__main__ import PASSED_ON, run
from reckon.childlog import LAST_LINES, ChildLog
from reckon.plan import SHUTDOWN_TIMEOUT, Plan, reachable
from reckon.preflight import CannotStart, check_ports, claim, free_port
from reckon.restart import Life, RestartPolicy, Verdict, how_it_ended
from reckon.settings import UpSettings

POLICY = RestartPolicy(delay_first_s=0.2, delay_max_s=1.0, settled_s=2.0, failed_starts_max=5)
CRASHED = Life(None, 1)


# --- restarts -------------------------------------------------------------------------------------


def test_a_child_that_served_comes_back_soon_whatever_came_before() -> None:
    assert POLICY.after(Life(2.0, -9), 4) == Verdict(0, 0.2)


def test_failed_starts_wait_longer_each_time_and_end() -> None:
    """Every failed start doubles the delay up to its bound; the fifth in a row is the last."""
    delays, failed_starts = [], 0
    for _ in range(5):
        verdict = POLICY.after(CRASHED, failed_starts)
        failed_starts = verdict.failed_starts
        delays.append(verdict.delay_s)
    assert delays == [0.2, 0.4, 0.8, 1.0, None]


def test_a_death_right_after_readiness_is_a_failed_start() -> None:
    assert POLICY.after(Life(1.9, 1), 1) == Verdict(2, 0.4)


def test_misuse_is_not_repeated_but_for_a_child_that_has_served() -> None:
    assert POLICY.after(Life(None, 2), 0).delay_s is None
    assert POLICY.after(Life(60.0, 2), 0).delay_s == 0.2


@given(
    st.lists(
        st.builds(
            Life,
            st.none() | st.floats(0, 100),
            st.integers(-64, 255).filter(lambda code: code != 2),
        ),
        max_size=40,
    )
)
def test_giving_up_takes_five_failed_starts_in_a_row(lives: list[Life]) -> None:
    """And every delay is within its bounds."""
    failed_starts = in_a_row = 0
    for life in lives:
        in_a_row = 0 if life.ready_s is not None and life.ready_s >= 2.0 else in_a_row + 1
        verdict = POLICY.after(life, failed_starts)
        assert (verdict.delay_s is None) == (in_a_row >= 5)
        assert verdict.delay_s is None or 0.2 <= verdict.delay_s <= 1.0
        if verdict.delay_s is None:
            return
        failed_starts = verdict.failed_starts


@pytest.mark.parametrize(
    ("returncode", "text"),
    [
        (0, "exited with status 0"),
        (1, "exited with status 1"),
        (-9, "was killed by SIGKILL"),
        (-15, "was killed by SIGTERM"),
        (-60, "was killed by signal 60"),
    ],
)
def test_how_it_ended(returncode: int, text: str) -> None:
    assert how_it_ended(returncode) == text


# --- children's logs ------------------------------------------------------------------------------


def test_a_childs_log_keeps_all_in_the_file_and_the_last_lines_in_memory(tmp_path: Path) -> None:
    log = ChildLog(tmp_path / "a.log")
    assert log.write(b"one\r\n\ntw") == ["one", ""]
    assert log.write(b"o\nthree") == ["two"]
    assert log.last_lines() == ["one", "two", "three"]
    log.note("was killed")
    for number in range(LAST_LINES):
        log.write(b"line %d\n" % number)
    assert len(log.last_lines()) == LAST_LINES
    log.close()
    written = (tmp_path / "a.log").read_bytes()
    assert written.startswith(b"one\r\n\ntwo\nthree\n--- was killed\nline 0\n")


def test_a_childs_log_is_bounded_and_keeps_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "a.log"
    first = ChildLog(path, bytes_max=100)
    first.write(b"of the first deployment\n")
    first.close()
    second = ChildLog(path, bytes_max=100)
    assert (tmp_path / "logs" / "a.log.1").read_text() == "of the first deployment\n"
    for _ in range(50):
        second.write(b"x" * 29 + b"\n")
    second.close()
    assert sorted(each.stat().st_size for each in path.parent.iterdir()) == [60, 90]


def test_lines_that_are_no_text_or_have_no_end_do_no_harm(tmp_path: Path) -> None:
    log = ChildLog(tmp_path / "a.log")
    for _ in range(100):
        log.write(b"\xff" * 4096)
    log.write(b"\nnext\n")
    log.close()
    first, second = log.last_lines()
    assert len(first) == 4096 and second == "next"


# --- what is started ------------------------------------------------------------------------------


def plan(*argv: str, **env: str) -> Plan:
    return Plan(
        settings=parse(UpSettings, argv, env),
        env=env,
        data_dir=Path("/data"),
        nats_binary=Path("/bin/nats-server"),
        nats_port=4567,
    )


async def _yes() -> bool:
    return True


def frontend_commands(planned: Plan) -> list[str]:
    specs = planned.frontends({name: _yes for name in planned.frontend_urls})
    return [" ".join(spec.argv[2:]) for spec in specs]


def test_two_frontends_in_kv_mode_by_default() -> None:
    assert frontend_commands(plan()) == [
        f"-m frontend --http-host 127.0.0.1 --http-port {port} --router-mode kv "
        "--router-replica-sync --namespace dynamo --nats-url nats://127.0.0.1:4567"
        for port in (8000, 8001)
    ]


def test_the_environment_beats_the_defaults_and_the_command_line_beats_both() -> None:
    env = {
        "DYN_ROUTER_MODE": "random",
        "DYN_ROUTER_REPLICA_SYNC": "false",
        "DYN_HTTP_PORT": "9000",
        "DYN_NAMESPACE": "blue",
    }
    (command,) = frontend_commands(plan("--frontends", "1", **env))
    assert "--router-mode random --no-router-replica-sync --namespace blue" in command
    assert "--http-port 9000" in command
    (command,) = frontend_commands(plan("--frontends=1", "--router-mode=round-robin", **env))
    assert "--router-mode round-robin" in command


def test_frontends_get_the_callers_environment() -> None:
    """But for what up has read; and a shutdown timeout that fits into what Ctrl-C may take."""
    env = {"DYN_ROUTER_TEMPERATURE": "0.5", "RECKON_FRONTENDS": "1", "DYN_HTTP_PORT": "9000"}
    (spec,) = plan(**env).frontends({"frontend-1": _yes})
    assert spec.env["DYN_ROUTER_TEMPERATURE"] == "0.5"
    assert not {"RECKON_FRONTENDS", "DYN_HTTP_PORT"} & spec.env.keys()
    assert spec.env[SHUTDOWN_TIMEOUT] == "1"
    (spec,) = plan("--frontends", "1", **{SHUTDOWN_TIMEOUT: "0"}).frontends({"frontend-1": _yes})
    assert spec.env[SHUTDOWN_TIMEOUT] == "0"


def test_workers_get_the_options_that_were_given() -> None:
    names = [spec.name for spec in plan("--workers", "3").workers()]
    assert names == ["worker-1", "worker-2", "worker-3"]
    argv = plan("--model-name", "m", "--speedup-ratio", "2.5").workers()[0].argv
    assert " ".join(argv[2:]) == (
        "-m workers mock --namespace dynamo --nats-url nats://127.0.0.1:4567 "
        "--model-name m --speedup-ratio 2.5"
    )
    argv = plan("--model-path", "tests", "--block-size=32", "--num-gpu-blocks=9").workers()[0].argv
    assert argv[-6:] == (
        *("--model-path", str(Path.cwd() / "tests"), "--block-size", "32", "--num-gpu-blocks", "9"),
    )


def test_the_tools_need_the_namespace_only_where_it_is_not_their_default() -> None:
    assert plan().log_options == ("--nats-url", "nats://127.0.0.1:4567")
    assert plan("--namespace", "mine").log_options[2:] == ("--namespace", "mine")


def test_the_order_of_the_end() -> None:
    """Frontends first, then workers, the log last; all together within 5 s."""
    planned = plan("--frontends", "1", "--workers", "1")
    frontend, worker = *planned.frontends({"frontend-1": _yes}), *planned.workers()
    nats = planned.nats(_yes, lock_fd=7)
    assert frontend.stop_turn < worker.stop_turn < nats.stop_turn
    assert frontend.stop_grace_s + worker.stop_grace_s + nats.stop_grace_s < 5
    assert nats.argv[1:] == (
        *("--addr", "127.0.0.1", "--port", "4567"),
        *("--jetstream", "--store_dir", "/data/nats"),
    )


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
        ("localhost", "localhost"),
    ],
)
def test_urls_can_be_opened_on_this_machine(host: str, shown: str) -> None:
    assert reachable(host) == shown


@pytest.mark.parametrize(
    "argv",
    [
        ["--workers", "0"],
        ["--frontends", "x"],
        ["--router-mode", "best"],
        ["--namespace", "a.b"],
        ["--speedup-ratio", "-1"],
        ["--model-path", "/nowhere"],
        ["--worker-count", "2"],
        ["surprise"],
    ],
)
def test_misuse_is_named(argv: list[str]) -> None:
    with pytest.raises(SettingsError, match=argv[0].removeprefix("--")):
        parse(UpSettings, argv, {})


# --- before the start -----------------------------------------------------------------------------


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotStart, match=f"^port {port} of 127.0.0.1 is in use$"):
            check_ports("127.0.0.1", [port])
        with pytest.raises(CannotStart, match="is in use"):
            check_ports("0.0.0.0", [port])


def test_a_free_port_is_none_of_those_problems() -> None:
    check_ports("127.0.0.1", [free_port()])


@pytest.mark.parametrize(
    ("host", "port", "why"),
    [
        ("127.0.0.1", 65_536, "there is no port 65536"),
        ("203.0.113.1", 8000, "cannot be listened on"),
        ("no such host", 8000, "cannot be listened on"),
    ],
)
def test_other_problems_with_a_port(host: str, port: int, why: str) -> None:
    with pytest.raises(CannotStart, match=why):
        check_ports(host, [port])


async def test_a_data_directory_is_of_one_deployment_at_a_time(tmp_path: Path) -> None:
    store = tmp_path / "data" / "nats"
    lock = await claim(store)
    with pytest.raises(CannotStart, match=f"^the data directory {store.parent} is in use"):
        await claim(store, wait_s=0)
    lock.release()
    (await claim(store, wait_s=0)).release()


async def test_a_data_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotStart, match="cannot be used: Not a directory"):
        await claim(tmp_path / "file" / "data" / "nats")


# --- the command ----------------------------------------------------------------------------------


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"], {}) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in ("up", *PASSED_ON))


@pytest.mark.parametrize("argv", [[], ["upp"], ["--verbose"]])
def test_a_command_that_is_none_is_misuse(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv, {}) == 2
    assert capsys.readouterr().err.startswith("Error: ")
