"""Which models this frontend can serve, and by which workers.

A worker counts once its model's files are loaded and its connection stands. All workers of a model
must agree on what a client can tell (block size, context, tokenizer): one that differs from those
already serving is refused, loudly, for as long as they serve. So is one that the options speak
against. It is told why, so that its own log has it too.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from eventstore.errors import EventStoreError
from eventstore.subjects import hex_id
from frontend.errors import ModelNotFound, NotReady
from frontend.model_options import AS_WORKERS_SAY, ModelOptions
from frontend.parsers import UnknownFormat, output_parser
from frontend.template import ChatTemplate
from frontend.tokenizer import BadTokenizer, Tokenizer
from workers.card import Instance, ModelCard
from workers.errors import WorkerError

LOAD_RETRY_S = 2.0

Download = Callable[[Mapping[str, str]], Awaitable[Mapping[str, bytes]]]

_log = logging.getLogger(__name__)


class ServedModel(Struct, frozen=True):
    """A model with all that is needed to talk to it."""

    card: ModelCard
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None: the model has no chat template and takes completions only."""
    created_s: int
    """Unix time at which this frontend first served it."""
    own_name: str = ""
    """What its workers call it; empty: as it is called here."""

    @property
    def name_at_workers(self) -> str:
        return self.own_name or self.card.name


class ServedModels:
    """`put` and `remove` follow discovery, `connected` and `disconnected` the request plane."""

    def __init__(
        self,
        download: Download,
        now_s: Callable[[], float],
        serve: Callable[[Instance], None],
        withdraw: Callable[[Instance], None],
        *,
        tell: Callable[[int, str], None] = lambda worker_id, why: None,
        options: ModelOptions = AS_WORKERS_SAY,
        elsewhere: Callable[[], Iterable[ServedModel]] = lambda: (),
    ) -> None:
        """download: file name → SHA-256 to file name → content. serve, withdraw: a worker may be
        chosen from now on, or no longer. tell: say to a connected worker why it is not used.
        elsewhere: what the frontend serves in its other namespaces."""
        self._options = options
        self._tell = tell
        self._elsewhere = elsewhere
        self._download = download
        self._now_s = now_s
        self._serve = serve
        self._withdraw = withdraw
        self._instances: dict[int, Instance] = {}
        """Their cards as the options make them."""
        self._own: dict[int, ModelCard] = {}
        """The cards as the workers wrote them."""
        self._connected: set[int] = set()
        self._serving: set[int] = set()
        self._models: dict[str, ServedModel] = {}
        self._refused: dict[int, str] = {}
        self._wake = asyncio.Event()

    # --- questions --------------------------------------------------------------------------------

    def get(self, name: str) -> ServedModel:
        """Raises ModelNotFound, which lists the models there are; NotReady for one that workers are
        listed for and whose files are not loaded yet."""
        model = self.find(name)
        if model is not None:
            return model
        if self.is_awaited(name):
            raise NotReady()
        raise ModelNotFound(name, sorted(self._models))

    def find(self, name: str) -> ServedModel | None:
        return self._models.get(name)

    def is_awaited(self, name: str) -> bool:
        """Whether workers are listed for the model that may come to serve it."""
        return any(
            instance.card.name == name and self._objection(instance) is None
            for instance in self._instances.values()
        )

    def lists(self, worker_id: int) -> bool:
        return worker_id in self._instances

    def models(self) -> list[ServedModel]:
        return [self._models[name] for name in sorted(self._models)]

    def instances(self) -> list[Instance]:
        """The workers that can be chosen now."""
        return [self._instances[key] for key in sorted(self._serving)]

    def listed_roles(self, name: str) -> frozenset[str]:
        """The roles of the model's workers that are listed, usable or not yet. O(workers)."""
        return frozenset(
            instance.card.worker_type
            for worker_id, instance in self._instances.items()
            if instance.card.name == name and worker_id not in self._refused
        )

    def bootstrap_address(self, worker_id: int) -> str | None:
        """Where decode workers meet this prefill worker; None if they don't."""
        instance = self._instances.get(worker_id)
        return None if instance is None else instance.bootstrap_address

    def refused(self) -> dict[int, str]:
        """Workers that were turned away, and why."""
        return dict(self._refused)

    # --- what happens -----------------------------------------------------------------------------

    def put(self, instance: Instance) -> None:
        self._own[instance.worker_id] = instance.card
        card = self._options.applied(instance.card)
        self._instances[instance.worker_id] = replace(instance, card=card)
        self._wake.set()

    def remove(self, worker_id: int) -> None:
        self._stop_serving(worker_id)
        self._refused.pop(worker_id, None)
        self._own.pop(worker_id, None)
        if self._instances.pop(worker_id, None) is not None:
            self._drop_models()
            self._wake.set()

    def connected(self, worker_id: int) -> None:
        self._connected.add(worker_id)
        if worker_id in self._refused:
            self._tell(worker_id, self._refused[worker_id])
        self._wake.set()

    def disconnected(self, worker_id: int) -> None:
        self._connected.discard(worker_id)
        self._stop_serving(worker_id)

    def _stop_serving(self, worker_id: int) -> None:
        if worker_id in self._serving:
            self._serving.discard(worker_id)
            self._withdraw(self._instances[worker_id])

    # --- loading ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Load models as they appear and bring their workers into service, until cancelled."""
        while True:
            self._wake.clear()
            settled = await self._admit_all()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if settled else LOAD_RETRY_S):
                    await self._wake.wait()

    async def _admit_all(self) -> bool:
        """Whether nothing is left that should be tried again soon."""
        settled = True
        for worker_id, instance in sorted(self._instances.items()):
            if worker_id in self._serving:
                continue
            try:
                settled &= await self._admit(instance)
            except (BadTokenizer, WorkerError, EventStoreError) as error:
                settled = False
                self._refuse(worker_id, f"not usable yet: {error}")
        self._drop_models()
        return settled

    async def _admit(self, instance: Instance) -> bool:
        """Bring a worker into service, or refuse it. False: look again soon, for what speaks
        against it may end without a word."""
        worker_id, card = instance.worker_id, instance.card
        if card.name not in self._models and self._objection(instance) is None:
            model = await self._load(card, self._own[worker_id].name)
            if self._instances.get(worker_id) is not instance:
                return False  # it left meanwhile, or is another one
            if self._objection(instance) is None:
                self._models[card.name] = model
                _log.info("model added model=%s block_size=%d", card.name, card.block_size)
        objection = self._objection(instance)
        if objection is not None:
            self._refuse(worker_id, objection)
            return not self._options.for_one_model
        self._refused.pop(worker_id, None)
        if worker_id in self._connected:
            self._serving.add(worker_id)
            self._serve(instance)
        return True

    def _objection(self, instance: Instance) -> str | None:
        """What keeps the worker from serving now; None if nothing does."""
        models = (*self._models.values(), *self._elsewhere())
        names = {model.name_at_workers for model in models}
        why = self._options.refusal(self._own[instance.worker_id], names)
        model = self._models.get(instance.card.name)
        if why is None and model is not None:
            why = _difference(model.card, instance.card)
        return why or _unreadable(instance.card)

    def _refuse(self, worker_id: int, why: str) -> None:
        if self._refused.get(worker_id) == why:
            return
        self._refused[worker_id] = why
        _log.error("worker %s is not used: %s", hex_id(worker_id), why)
        if worker_id in self._connected:
            self._tell(worker_id, why)

    def _drop_models(self) -> None:
        """Forget models that no listed worker is left of; those that were refused for them may
        come now."""
        for name, model in list(self._models.items()):
            if not any(
                instance.card.name == name
                and worker_id not in self._refused
                and self._own[worker_id].name == model.name_at_workers
                for worker_id, instance in self._instances.items()
            ):
                del self._models[name]
                _log.info("model left model=%s", name)
                self._wake.set()

    async def _load(self, card: ModelCard, own_name: str) -> ServedModel:
        files = self._options.files or await self._download(card.files)
        tokenizer = Tokenizer.from_files(files)
        template = ChatTemplate.from_files(files)
        return ServedModel(card, tokenizer, template, int(self._now_s()), own_name)


def _unreadable(card: ModelCard) -> str | None:
    """What keeps the model's output from being read; None if nothing does."""
    try:
        output_parser(tools_as=card.tool_call_parser, reasoning_as=card.reasoning_parser)
    except UnknownFormat as error:
        return str(error)
    return None


def _difference(serving: ModelCard, newcomer: ModelCard) -> str | None:
    """What keeps the newcomer from serving beside the others; None if nothing does."""
    if serving.checksum() == newcomer.checksum():
        return None
    for field in (
        "block_size",
        "context_length",
        "files",
        "eos_token_ids",
        "tool_call_parser",
        "reasoning_parser",
        "modalities",
    ):
        ours, theirs = getattr(serving, field), getattr(newcomer, field)
        if ours != theirs:
            if field == "files":
                return f"its model files differ from those {serving.name} is served with"
            return f"its {field} is {theirs}, {serving.name} is served with {ours}"
    return None
