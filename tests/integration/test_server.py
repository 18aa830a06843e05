"""The embedded nats-server: found, started, locked, and never left behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from eventstore import server as server_module
from eventstore.connect import Nats
from eventstore.errors import LogUnavailable
from eventstore.jetstream import JetStreamLog
from eventstore.server import EmbeddedServer, PortInUse, connect_or_embed, find_server
from eventstore.store_lock import StoreInUse
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
# Prints the server's pid and address, and stays until it is killed.
PARENT = """
import asyncio, sys
from pathlib import Path
from eventstore.server import EmbeddedServer

async def main():
    server = EmbeddedServer(Path(sys.argv[1]))
    await server.start()
    print(server.pid, server.url, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def fake_server(directory: Path, version: str) -> Path:
    directory.mkdir()
    path = directory / "nats-server"
    path.write_text(f"#!/bin/sh\necho 'nats-server: v{version}'\n")
    path.chmod(0o755)
    return path


def test_a_new_enough_server_on_the_path_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fake_server(tmp_path / "bin", "2.12.0")
    monkeypatch.setenv("PATH", str(path.parent))
    assert find_server() == path


@pytest.mark.parametrize("version", ["2.11.9", "1.14.0", "unknown"])
def test_otherwise_the_one_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Also where PATH does not lead to the environment that the wheel is installed in."""
    path = fake_server(tmp_path / "bin", version)
    monkeypatch.setenv("PATH", str(path.parent))
    found = find_server()
    assert found != path
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    assert told.startswith("nats-server: v2.")


def test_an_explicit_server_must_do(tmp_path: Path) -> None:
    path = fake_server(tmp_path / "new", "3.0.1")
    assert find_server(path) == path
    with pytest.raises(LogUnavailable, match=r"2\.9"):
        find_server(fake_server(tmp_path / "old", "2.9.1"))
    with pytest.raises(LogUnavailable, match="not a nats-server"):
        find_server(tmp_path / "missing")


async def test_the_log_outlives_the_server(tmp_path: Path) -> None:
    store = tmp_path / 'a "strange" näme'
    for expected in (1, 2):
        async with EmbeddedServer(store) as server:
            nats = await Nats.connect([server.url], name="test")
            log = await JetStreamLog.open(nats, "ns")
            appended = await log.append("reckon.ns.control", b"", msg_id=f"{expected}")
            assert appended.seq == expected
            await log.close()
            await nats.close()
        assert not server.running
    assert not list(store.glob("*.ports"))


async def test_two_servers_do_not_share_a_store(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path) as first:
        second = EmbeddedServer(tmp_path)
        with pytest.raises(StoreInUse) as caught:
            await second.start(lock_wait_s=0)
        assert str(tmp_path) in str(caught.value)
        assert first.url in caught.value.try_this
        await second.stop()
        assert first.running
    async with second:
        assert second.running


async def test_deployments_live_side_by_side(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "a") as a, EmbeddedServer(tmp_path / "b") as b:
        assert a.port != b.port


async def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = EmbeddedServer(tmp_path, port=taken.getsockname()[1])
        with pytest.raises(PortInUse, match="already in use") as caught:
            await server.start()
    assert "\n" not in str(caught.value)
    assert not server.running


async def test_an_unusable_directory_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogUnavailable, match="cannot be used") as caught:
        await EmbeddedServer(tmp_path / "file" / "store").start()
    assert caught.value.try_this


async def test_a_server_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "jetstream").write_text("a file where the server wants a directory")
    server = EmbeddedServer(tmp_path)
    with pytest.raises(LogUnavailable, match=r"did not start: .*JetStream") as caught:
        await server.start()
    assert "\n" not in str(caught.value)
    assert not server.running


async def test_it_dies_with_a_killed_parent_and_frees_its_store(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, str(tmp_path)), stdout=subprocess.PIPE, cwd=ROOT
    )
    assert parent.stdout is not None
    pid = int((await parent.stdout.readline()).split()[0])
    with pytest.raises(StoreInUse):
        await EmbeddedServer(tmp_path).start(lock_wait_s=0)
    parent.kill()
    await parent.wait()
    async with EmbeddedServer(tmp_path) as successor:
        assert not is_running(pid)
        assert successor.running


async def test_a_terminal_interrupt_does_not_reach_it(tmp_path: Path) -> None:
    """It has a session of its own, so Ctrl-C ends the writers first."""
    async with EmbeddedServer(tmp_path) as server:
        assert server.pid is not None
        assert os.getsid(server.pid) == server.pid


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_a_given_address_that_does_not_answer_is_an_error(
    tmp_path: Path, free_port: int
) -> None:
    with pytest.raises(LogUnavailable, match=str(free_port)):
        await connect_or_embed(f"127.0.0.1:{free_port}", tmp_path, name="test", wait_s=0.2)
    assert not (tmp_path / "nats").exists()


async def test_who_waits_for_a_server_says_so(
    tmp_path: Path,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without the password that the address may hold; the server may come in time."""
    monkeypatch.setattr(server_module, "WAIT_TOLD_AFTER_S", 0.05)
    url = f"nats://me:secret@127.0.0.1:{free_port}"
    connecting = asyncio.create_task(connect_or_embed(url, tmp_path, name="test", wait_s=30))
    await eventually(lambda: "waiting for NATS" in caplog.text)
    assert f"nats://127.0.0.1:{free_port}, up to 30 s" in caplog.text
    assert "secret" not in caplog.text
    async with EmbeddedServer(tmp_path / "late", port=free_port):
        nats, embedded = await connecting
        assert nats.connected and embedded is None
        await nats.close()


async def test_a_process_that_waits_for_a_server_ends_when_it_is_told_to(free_port: int) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "frontend", "--http-port", "0"),
        *("--nats-url", f"nats://127.0.0.1:{free_port}", "--nats-wait-secs", "60"),
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stderr is not None
    assert b"waiting for NATS" in await process.stderr.readline()
    process.terminate()
    async with asyncio.timeout(20):
        await process.communicate()


async def test_a_given_address_is_used(nats_url: str, tmp_path: Path) -> None:
    nats, server = await connect_or_embed(nats_url, tmp_path, name="test")
    assert nats.connected and server is None
    await nats.close()


async def test_without_an_address_a_listening_server_is_used(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "elsewhere") as other:
        nats, server = await connect_or_embed(None, tmp_path, name="test", port=other.port)
        assert server is None and nats.url == other.url
        await nats.close()


async def test_of_two_that_start_at_once_one_embeds(tmp_path: Path, free_port: int) -> None:
    results = await asyncio.gather(
        *(connect_or_embed(None, tmp_path, name=f"test {n}", port=free_port) for n in range(4))
    )
    servers = [server for _, server in results if server is not None]
    assert len(servers) == 1
    assert {nats.url for nats, _ in results} == {servers[0].url}
    for nats, _ in results:
        await nats.close()
    await servers[0].stop()


async def test_stores_in_different_directories_race_for_the_port(
    tmp_path: Path, free_port: int
) -> None:
    results = await asyncio.gather(
        *(connect_or_embed(None, tmp_path / str(n), name="test", port=free_port) for n in range(3))
    )
    servers = [server for _, server in results if server is not None]
    assert len(servers) == 1
    for nats, _ in results:
        await nats.close()
    await servers[0].stop()


async def test_a_busy_store_is_told_after_a_bounded_wait(tmp_path: Path, free_port: int) -> None:
    """Its server is somewhere else, so waiting for one on the port is in vain."""
    async with EmbeddedServer(tmp_path / "nats") as other:
        with pytest.raises(StoreInUse) as caught:
            await connect_or_embed(None, tmp_path, name="test", wait_s=0.2, port=free_port)
        assert other.url in caught.value.try_this


async def test_stopping_is_forced_on_a_server_that_hangs(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    await server.start()
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await server.stop(timeout_s=0.1)
    await eventually(lambda: not is_running(pid))
    await server.stop()
