"""`reckon up`: a whole deployment on one machine, from the first process to the last one's end."""

import asyncio
import contextlib
import re
import shlex
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path

import aiohttp

from eventstore.connect import JetStreamRefused, Nats
from eventstore.errors import LogUnavailable
from eventstore.process_settings import default_data_dir
from eventstore.server import find_server
from eventstore.settings import from_command_line
from eventstore.stream import STREAM_NOT_FOUND, Stream
from reckon.child import Child, ChildState
from reckon.monitor import Monitor
from reckon.plan import Plan
from reckon.preflight import CannotStart, check_ports, claim, free_port
from reckon.probe import Frontend
from reckon.screen import Overview, Place, first_screen, happened, status_line
from reckon.settings import UpSettings
from reckon.supervisor import BecameReady, Died, GivenUp, Supervisor
from reckon.terminal import Terminal

STATUS_EVERY_S = 1.0
LISTED_EVERY_S = 0.1
NATS_ANSWER_S = 1.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run `reckon up` with these arguments until it is told to end; returns the exit status."""
    settings = from_command_line(UpSettings, argv, env)
    try:
        asyncio.run(up(settings, env, Terminal.on_stdout(env)))
    except CannotStart as problem:
        for line in (f"Error: {problem}", *problem.details, f"Try: {problem.try_this}"):
            print(line, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # before anything was started
    return 0


async def up(settings: UpSettings, env: Mapping[str, str], terminal: Terminal) -> None:
    """Start everything, keep it running, and end it all at SIGINT, SIGTERM or SIGHUP.

    Raises CannotStart, also when a child cannot be kept running; then, too, all has ended.
    """
    check_ports(settings.http_host, settings.ports())
    try:
        binary = find_server(settings.nats_server_binary)
    except LogUnavailable as error:
        raise CannotStart(str(error), error.try_this) from error
    plan = Plan(
        settings=settings,
        env=env,
        data_dir=(settings.data_dir or default_data_dir(env)).absolute(),
        nats_binary=binary,
        nats_port=free_port(),
    )
    lock = await claim(plan.nats_store)
    try:
        lock.tell(plan.nats_url)
        async with aiohttp.ClientSession() as session:
            await Deployment(plan, session, terminal, lock.fd).run()
    finally:
        lock.release()


class Deployment:
    """The running whole: the supervisor of its processes, and what is shown of it."""

    def __init__(
        self, plan: Plan, session: aiohttp.ClientSession, terminal: Terminal, lock_fd: int
    ) -> None:
        """Raises CannotStart if the children's logs cannot be written."""
        self._plan = plan
        self._terminal = terminal
        self._messages_before: int | None = None
        self._frontends = {
            name: Frontend(session, url, metrics_prefix=plan.metrics_prefix)
            for name, url in plan.frontend_urls.items()
        }
        healthy = {name: each.is_healthy for name, each in self._frontends.items()}
        specs = [plan.nats(self._nats_is_ready, lock_fd), *plan.workers(), *plan.frontends(healthy)]
        try:
            self._supervisor = Supervisor(specs, notice=self._tell)
        except OSError as error:
            raise CannotStart(
                f"{error.filename} cannot be written: {error.strerror}", "another --data-dir"
            ) from error
        self._children = self._supervisor.children
        self._workers = [self._children[name] for name in plan.worker_names]
        self._monitor = Monitor(self._workers, self._frontends)

    async def run(self) -> None:
        """Return after a signal, when all has ended. Raises CannotStart."""
        told_to_end = asyncio.Event()

        def on_signal() -> None:
            if told_to_end.is_set():
                self._supervisor.hurry()
            told_to_end.set()

        with handling_signals(on_signal):
            try:
                async with self._supervisor:
                    try:
                        await first_of(
                            told_to_end.wait(), self._supervisor.until_given_up(), self._serve()
                        )
                    finally:
                        self._terminal.end_status()
                        self._terminal.say("Ending …")
            except GivenUp as problem:
                raise failed(str(problem), problem.child) from problem
        self._terminal.say("All has ended. The log stays.")

    async def _serve(self) -> None:
        """Wait until all is ready, show what runs where, then how it goes. Never returns."""
        began_at = asyncio.get_running_loop().time()
        await self._until_ready()
        self._terminal.say(first_screen(await self._overview()))
        shown: tuple[object, ...] = ()
        while True:
            status = await self._monitor.status(asyncio.get_running_loop().time() - began_at)
            if self._terminal.redraws:
                self._terminal.show_status(status_line(status))
            elif status.milestones() != shown:
                shown = status.milestones()
                self._terminal.say(status_line(status))
            await asyncio.sleep(STATUS_EVERY_S)

    async def _until_ready(self) -> None:
        seconds = self._plan.settings.start_timeout
        try:
            async with asyncio.timeout(seconds):
                await self._supervisor.until_ready()
                await self._until_workers_are_listed()
        except TimeoutError as error:
            waiting = [c for c in self._children.values() if c.state is not ChildState.READY]
            if waiting:
                why = f"{waiting[0].name} was not ready within {seconds:g} s"
                raise failed(why, waiting[0]) from error
            raise CannotStart(
                f"the frontends did not find all workers within {seconds:g} s",
                f"look into {self._plan.log_path('frontend-1')}",
            ) from error

    async def _until_workers_are_listed(self) -> None:
        while True:
            if len(await self._monitor.listed_by_all()) >= len(self._workers):
                return
            await asyncio.sleep(LISTED_EVERY_S)

    async def _nats_is_ready(self) -> bool:
        """Whether JetStream answers. The first time, it is asked how much the log holds already."""
        try:
            messages = await messages_in_log(self._plan.nats_url, self._plan.settings.namespace)
        except LogUnavailable:
            return False
        if self._messages_before is None:
            self._messages_before = messages
        return True

    async def _overview(self) -> Overview:
        frontend = next(iter(self._frontends.values()))
        places = [place_of(child) for child in self._children.values()]
        return Overview(
            places=places,
            data_dir=str(self._plan.data_dir),
            messages_before=self._messages_before or 0,
            frontend_url=frontend.url,
            model=await frontend.model() or "MODEL",
            log_options=self._plan.log_options,
            command=command(),
            victim=places[-1],
        )

    def _tell(self, event: BecameReady | Died) -> None:
        self._terminal.say(happened(event))


def place_of(child: Child) -> Place:
    """A child as the first screen shows it. A worker told its address when it was ready."""
    told = re.search(r"\baddress=(\S+)", child.ready_line)
    address = child.spec.address or (told[1] if told else "")
    log_path = child.spec.log_path
    return Place(child.name, child.pid, address, f"{log_path.parent.name}/{log_path.name}")


def command() -> str:
    """How to call `reckon` the way that it was called."""
    called = Path(sys.argv[0])
    return shlex.quote(str(called)) if called.name == "reckon" else "python -m reckon"


def failed(why: str, child: Child) -> CannotStart:
    """What to say of a child that does not come to life: its own last words tell most."""
    said = [f"  {line}" for line in child.log.last_lines()] or ["  (it printed nothing)"]
    return CannotStart(why, f"mend what it says; all of it is in {child.spec.log_path}", said)


async def messages_in_log(nats_url: str, namespace: str) -> int:
    """How many messages the namespace's log holds; 0 if there is none. Raises LogUnavailable."""
    nats = await Nats.connect((nats_url,), name="reckon up", wait_s=NATS_ANSWER_S)
    try:
        return (await Stream(nats, namespace).info()).state.messages
    except JetStreamRefused as refused:
        if refused.error.err_code == STREAM_NOT_FOUND:
            return 0
        raise
    finally:
        await nats.close()


async def first_of(*parts: Coroutine[object, object, object]) -> None:
    """Run `parts` until the first of them ends, cancel the others, and raise what it raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


@contextlib.contextmanager
def handling_signals(handle: Callable[[], None]) -> Iterator[None]:
    """Call `handle` at every SIGINT, SIGTERM and SIGHUP.

    A SIGHUP that is ignored stays ignored: that is what `nohup` asks for.
    """
    loop = asyncio.get_running_loop()
    handled = [
        each
        for each in SIGNALS
        if each is not signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN
    ]
    for each in handled:
        loop.add_signal_handler(each, handle)
    try:
        yield
    finally:
        for each in handled:
            loop.remove_signal_handler(each)
