"""What the options say of models, in place of what their workers say."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Self

from msgspec import Struct
from msgspec.structs import replace

from frontend.template import ChatTemplate
from frontend.tokenizer import BadTokenizer, Tokenizer, read_files
from workers.card import ModelCard


class BadModelPath(Exception):
    """The folder of --model-path has not what it takes to serve a model."""

    def __init__(self, path: Path, why: BadTokenizer) -> None:
        super().__init__(path, why)
        self.path = path
        self.why = why

    def __str__(self) -> str:
        return f"--model-path {self.path}: {self.why}"


class ModelOptions(Struct, frozen=True, kw_only=True):
    """None: as the workers say.

    name: what clients call the model. files: contents by name, in place of those that workers
    bring; eos_token_ids: what ends an answer, by those files. block_size: tokens in a KV block, of
    every model.
    """

    name: str | None = None
    files: Mapping[str, bytes] | None = None
    eos_token_ids: tuple[int, ...] = ()
    block_size: int | None = None

    @classmethod
    def read(cls, name: str | None, path: Path | None, block_size: int | None) -> Self:
        """path: folder with the model's files. Raises BadModelPath. Blocks, for as long as
        `Tokenizer.from_files` takes."""
        if path is None:
            return cls(name=name, block_size=block_size)
        try:
            files = read_files(path)
            tokenizer = Tokenizer.from_files(files)
            ChatTemplate.from_files(files)
        except BadTokenizer as error:
            raise BadModelPath(path, error) from error
        return cls(
            name=name,
            files=files,
            eos_token_ids=tokenizer.eos_token_ids,
            block_size=block_size,
        )

    @property
    def for_one_model(self) -> bool:
        """Whether they make sense for one model only: a name and files are of one."""
        return self.name is not None or self.files is not None

    def applied(self, card: ModelCard) -> ModelCard:
        """The card as clients and the router see it."""
        if self.name is not None:
            card = replace(card, name=self.name)
        if self.files is not None:
            hashed = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
            ids = list(self.eos_token_ids) or card.eos_token_ids
            card = replace(card, files=hashed, eos_token_ids=ids)
        return card

    def refusal(self, card: ModelCard, serving: Collection[str]) -> str | None:
        """What keeps a worker from serving under these options; None if nothing does.

        card: as the worker says it. serving: what workers that serve call their models.

        A block size is not put in place of another: a worker's blocks are hashed as long as they
        are, and none of them would ever match a prompt cut in another way.
        """
        if self.block_size is not None and card.block_size != self.block_size:
            return f"its block_size is {card.block_size}, --kv-cache-block-size {self.block_size}"
        if self.for_one_model and serving and card.name not in serving:
            option = "--model-path" if self.name is None else "--model-name"
            (other,) = sorted(serving)[:1]
            return f"it serves {card.name}, and {option} is for one model, which is {other}"
        return None


AS_WORKERS_SAY = ModelOptions()
