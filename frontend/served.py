"""Which models this frontend can serve, and by which workers.

A worker counts once its model's files are loaded and its connection stands. All workers of a model
must agree on what a client can tell (block size, context, tokenizer): one that differs from those
already serving is refused, loudly, for as long as they serve.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from msgspec import Struct

from eventstore.errors import EventStoreError
from eventstore.subjects import hex_id
from frontend.errors import ModelNotFound, NotReady
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


class ServedModels:
    """`put` and `remove` follow discovery, `connected` and `disconnected` the request plane."""

    def __init__(
        self,
        download: Download,
        now_s: Callable[[], float],
        serve: Callable[[Instance], None],
        withdraw: Callable[[Instance], None],
    ) -> None:
        """download: file name → SHA-256 to file name → content. serve, withdraw: a worker may be
        chosen from now on, or no longer."""
        self._download = download
        self._now_s = now_s
        self._serve = serve
        self._withdraw = withdraw
        self._instances: dict[int, Instance] = {}
        self._connected: set[int] = set()
        self._serving: set[int] = set()
        self._models: dict[str, ServedModel] = {}
        self._refused: dict[int, str] = {}
        self._wake = asyncio.Event()

    # --- questions --------------------------------------------------------------------------------

    def get(self, name: str) -> ServedModel:
        """Raises ModelNotFound, which lists the models there are; NotReady for one that workers are
        listed for and whose files are not loaded yet."""
        model = self._models.get(name)
        if model is not None:
            return model
        if any(instance.card.name == name for instance in self._instances.values()):
            raise NotReady()
        raise ModelNotFound(name, sorted(self._models))

    def models(self) -> list[ServedModel]:
        return [self._models[name] for name in sorted(self._models)]

    def instances(self) -> list[Instance]:
        """The workers that can be chosen now."""
        return [self._instances[key] for key in sorted(self._serving)]

    def has_listed(self, name: str) -> bool:
        """Whether a worker of the model is listed, usable or not yet."""
        return any(
            instance.card.name == name and worker_id not in self._refused
            for worker_id, instance in self._instances.items()
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
        self._instances[instance.worker_id] = instance
        self._wake.set()

    def remove(self, worker_id: int) -> None:
        self._stop_serving(worker_id)
        self._refused.pop(worker_id, None)
        gone = self._instances.pop(worker_id, None)
        if gone is None:
            return
        name = gone.card.name
        if name in self._models and not self.has_listed(name):
            del self._models[name]
            _log.info("model left model=%s", name)
        self._wake.set()

    def connected(self, worker_id: int) -> None:
        self._connected.add(worker_id)
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
            if await self._admit_all():
                await self._wake.wait()
            else:
                await asyncio.sleep(LOAD_RETRY_S)

    async def _admit_all(self) -> bool:
        """Whether nothing is left that should be tried again soon."""
        settled = True
        for worker_id, instance in sorted(self._instances.items()):
            if worker_id in self._serving:
                continue
            try:
                await self._admit(instance)
            except (BadTokenizer, WorkerError, EventStoreError) as error:
                settled = False
                if self._refused.get(worker_id) != str(error):
                    _log.error("worker %s not usable yet: %s", hex_id(worker_id), error)
                self._refused[worker_id] = str(error)
        return settled

    async def _admit(self, instance: Instance) -> None:
        card = instance.card
        model = self._models.get(card.name)
        if model is None:
            model = await self._load(card)
            if instance.worker_id not in self._instances:
                return  # it left meanwhile
            self._models[card.name] = model
            _log.info("model added model=%s block_size=%d", card.name, card.block_size)
        difference = _difference(model.card, card)
        if difference is not None:
            if self._refused.get(instance.worker_id) != difference:
                _log.error("worker %s refused: %s", hex_id(instance.worker_id), difference)
            self._refused[instance.worker_id] = difference
            return
        self._refused.pop(instance.worker_id, None)
        if instance.worker_id in self._connected:
            self._serving.add(instance.worker_id)
            self._serve(instance)

    async def _load(self, card: ModelCard) -> ServedModel:
        files = await self._download(card.files)
        tokenizer = Tokenizer.from_files(files)
        template = ChatTemplate.from_files(files)
        return ServedModel(card, tokenizer, template, int(self._now_s()))


def _difference(serving: ModelCard, newcomer: ModelCard) -> str | None:
    """What keeps the newcomer from serving beside the others; None if nothing does."""
    if serving.checksum() == newcomer.checksum():
        return None
    for field in ("block_size", "context_length", "files", "eos_token_ids"):
        ours, theirs = getattr(serving, field), getattr(newcomer, field)
        if ours != theirs:
            if field == "files":
                return f"its model files differ from those {serving.name} is served with"
            return f"its {field} is {theirs}, {serving.name} is served with {ours}"
    return None
