"""The supervisor over real processes: small programs that stand in for the deployment's own."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from reckon.child import ChildSpec, ChildState
from reckon.restart import RestartPolicy
from reckon.supervisor import BecameReady, Died, GivenUp, Supervisor
from tests.waiting import eventually

DEADLINE_S = 20.0
QUICK = RestartPolicy(delay_first_s=0.01, delay_max_s=0.05, settled_s=0.0)

SERVES = "print('ready at 127.0.0.1:1', flush=True); time.sleep(600)"
IGNORES_SIGTERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SERVES
FAILS = "print('no such model', flush=True); sys.exit(1)"


def spec(tmp_path: Path, name: str, program: str, **options: object) -> ChildSpec:
    argv = (sys.executable, "-c", "import os, signal, subprocess, sys, time; " + program)
    fields = {
        "name": name,
        "argv": argv,
        "env": dict(os.environ),
        "log_path": tmp_path / f"{name}.log",
        "ready": re.compile("^ready "),
    }
    return ChildSpec(**(fields | options))  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    """Whether the process runs: one that only waits to be reaped by its parent does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class Notices(list[BecameReady | Died]):
    def of(self, kind: type) -> list[str]:
        return [event.name for event in self if isinstance(event, kind)]


async def test_a_killed_child_comes_back(tmp_path: Path) -> None:
    """A death is noticed with its cause, and followed by a readiness with another pid."""
    notices = Notices()
    async with Supervisor([spec(tmp_path, "a", SERVES)], notice=notices.append) as supervisor:
        await supervisor.until_ready()
        child = supervisor.children["a"]
        first_pid = child.pid
        os.kill(first_pid, signal.SIGKILL)
        await eventually(lambda: child.starts == 2 and child.state is ChildState.READY)
        assert child.pid != first_pid and alive(child.pid)
        assert child.ready_line == "ready at 127.0.0.1:1"
    assert not alive(child.pid)
    assert notices[0] == BecameReady("a", first_pid, 1)
    assert notices[1] == Died("a", first_pid, "was killed by SIGKILL", 0.2)
    assert notices[2] == BecameReady("a", child.pid, 2)
    assert "--- was killed by SIGKILL" in child.spec.log_path.read_text()


async def test_a_child_that_keeps_dying_at_its_start_is_given_up(tmp_path: Path) -> None:
    specs = [spec(tmp_path, "good", SERVES), spec(tmp_path, "bad", FAILS)]
    with pytest.raises(GivenUp) as caught:
        async with Supervisor(specs, notice=lambda _: None, policy=QUICK) as supervisor:
            await asyncio.wait_for(supervisor.until_given_up(), DEADLINE_S)
    assert str(caught.value) == "bad exited with status 1, 5 times in a row"
    assert caught.value.child.log.last_lines() == ["no such model"] * 5
    assert not alive(supervisor.children["good"].pid)


async def test_misuse_is_given_up_at_once(tmp_path: Path) -> None:
    specs = [spec(tmp_path, "bad", "sys.exit(2)")]
    with pytest.raises(GivenUp, match=r"^bad exited with status 2$"):
        async with Supervisor(specs, notice=lambda _: None) as supervisor:
            await asyncio.wait_for(supervisor.until_given_up(), DEADLINE_S)


async def test_a_program_that_is_not_there_is_given_up_with_its_name(tmp_path: Path) -> None:
    specs = [spec(tmp_path, "bad", "", argv=("/nowhere/program",))]
    with pytest.raises(GivenUp) as caught:
        async with Supervisor(specs, notice=lambda _: None, policy=QUICK) as supervisor:
            await asyncio.wait_for(supervisor.until_given_up(), DEADLINE_S)
    assert caught.value.child.log.last_lines()[-1] == "/nowhere/program: No such file or directory"


async def test_children_end_turn_by_turn(tmp_path: Path) -> None:
    """A child of a later turn is not told to end before those of the turn before have ended."""

    def program(delay_s: float) -> str:
        steps = f"(time.sleep({delay_s}), print(time.monotonic()), sys.exit())"
        return f"signal.signal(signal.SIGTERM, lambda *_: {steps}); {SERVES}"

    specs = [
        spec(tmp_path, "last", program(0.0), stop_turn=1),
        spec(tmp_path, "first", program(0.2), stop_turn=0),
    ]
    async with Supervisor(specs, notice=lambda _: None) as supervisor:
        await supervisor.until_ready()
    ended = {name: float(child.log.last_lines()[-1]) for name, child in supervisor.children.items()}
    assert ended["first"] < ended["last"]


async def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    specs = [spec(tmp_path, "deaf", IGNORES_SIGTERM, stop_grace_s=0.2)]
    async with Supervisor(specs, notice=lambda _: None) as supervisor:
        await supervisor.until_ready()
        pid = supervisor.children["deaf"].pid
    assert not alive(pid)


async def test_hurry_leaves_no_grace(tmp_path: Path) -> None:
    """With a grace far beyond the deadline, only `hurry` can end this in time."""
    specs = [spec(tmp_path, "deaf", IGNORES_SIGTERM, stop_grace_s=3600)]
    async with asyncio.timeout(DEADLINE_S):
        async with Supervisor(specs, notice=lambda _: None) as supervisor:
            await supervisor.until_ready()
            supervisor.hurry()


async def test_a_stopped_child_ends_too(tmp_path: Path) -> None:
    specs = [spec(tmp_path, "paused", SERVES, stop_grace_s=0.2)]
    async with Supervisor(specs, notice=lambda _: None) as supervisor:
        await supervisor.until_ready()
        pid = supervisor.children["paused"].pid
        os.kill(pid, signal.SIGSTOP)
    assert not alive(pid)


async def test_what_a_child_started_ends_with_it(tmp_path: Path) -> None:
    """Also where it holds the child's output open, and the child is killed by hand."""
    program = "p = subprocess.Popen(['sleep', '600']); print('child', p.pid, flush=True); "
    notices = Notices()
    async with Supervisor(
        [spec(tmp_path, "a", program + SERVES)], notice=notices.append
    ) as supervisor:
        await supervisor.until_ready()
        child = supervisor.children["a"]
        (first,) = (int(line.split()[1]) for line in child.log.last_lines() if "child" in line)
        os.kill(child.pid, signal.SIGKILL)
        await eventually(lambda: not alive(first))
        await eventually(lambda: child.starts == 2 and child.state is ChildState.READY)
        second = int(child.log.last_lines()[-2].split()[1])
    assert first != second
    await eventually(lambda: not alive(second))


async def test_a_child_waits_for_what_it_needs(tmp_path: Path) -> None:
    """It is not started before, and not restarted while that is away."""
    gate = tmp_path / "gate"

    async def open_gate() -> bool:
        return gate.exists()

    specs = [
        spec(tmp_path, "base", SERVES, ready=open_gate),
        spec(tmp_path, "above", SERVES, needs="base"),
    ]
    async with Supervisor(specs, notice=lambda _: None, policy=QUICK) as supervisor:
        base, above = supervisor.children["base"], supervisor.children["above"]
        await eventually(lambda: base.state is ChildState.STARTING)
        assert above.starts == 0
        gate.touch()
        await supervisor.until_ready()
        gate.unlink()
        os.kill(base.pid, signal.SIGKILL)
        await eventually(lambda: base.starts == 2)
        os.kill(above.pid, signal.SIGKILL)
        await eventually(lambda: above.state is ChildState.WAITING)
        assert (base.state, above.starts) == (ChildState.STARTING, 1)
        gate.touch()
        await eventually(lambda: above.state is ChildState.READY)


async def test_the_end_reaches_children_between_two_starts(tmp_path: Path) -> None:
    """One waits for its next start, one for another child: neither has a process to end."""
    patient = RestartPolicy(delay_first_s=3600, delay_max_s=3600)
    specs = [
        spec(tmp_path, "dead", FAILS),
        spec(tmp_path, "needy", SERVES, needs="dead"),
    ]
    notices = Notices()
    async with asyncio.timeout(DEADLINE_S):
        async with Supervisor(specs, notice=notices.append, policy=patient):
            await eventually(lambda: notices.of(Died) == ["dead"])
    assert notices.of(BecameReady) == []


async def test_the_end_may_come_at_once(tmp_path: Path) -> None:
    """No process is left when the end overtakes the start."""
    for steps in range(6):
        async with Supervisor([spec(tmp_path, "a", SERVES)], notice=lambda _: None) as supervisor:
            for _ in range(steps):
                await asyncio.sleep(0)
        child = supervisor.children["a"]
        assert child.pid == 0 or not alive(child.pid)


async def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from reckon.supervisor import Supervisor
        from tests.integration.test_supervisor import IGNORES_SIGTERM, spec

        async def main():
            specs = [spec(Path(sys.argv[1]), "deaf", IGNORES_SIGTERM)]
            async with Supervisor(specs, notice=lambda _: None) as supervisor:
                await supervisor.until_ready()
                print(supervisor.children["deaf"].pid, flush=True)
                await asyncio.sleep(600)

        asyncio.run(main())
        """
    )
    supervisor = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), stdout=subprocess.PIPE
    )
    assert supervisor.stdout is not None
    pid = int(await supervisor.stdout.readline())
    assert alive(pid)
    supervisor.kill()
    await supervisor.wait()
    await eventually(lambda: not alive(pid))
