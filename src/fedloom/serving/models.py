"""Models in memory, ready to answer, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedloom.data.encode import TextEncoder
from fedloom.evaluation.generate import Ask, load_encoder
from fedloom.evaluation.streaming import Answer, Tell, stream
from fedloom.models.architecture import uses_cache
from fedloom.models.consistency import require_tokens
from fedloom.models.device import choose_device
from fedloom.models.load import TINY, context_length
from fedloom.models.saved_together import OnBase, SavedTogether
from fedloom.runs.model_building import model_folder
from fedloom.serving.locate import Located
from fedloom.serving.prompts import PromptFormat, format_of


@dataclass(frozen=True)
class ReadyModel:
    """What is known of a model that answers.

    Attributes:
        name: What it is asked for by; no two have the same.
        encoder: How it reads texts.
        format: How conversations are written for it.
        context: Tokens of prompt and answer together at most.
        vocabulary: Token ids are below it.
        cached: Whether it goes on alike with a cache of what it has read.
        created: When it was saved, in seconds since 1970.
    """

    name: str
    encoder: TextEncoder
    format: PromptFormat
    context: int
    vocabulary: int
    cached: bool
    created: int


class ReadyModels:
    """Several models, of which one answers at a time.

    Attributes:
        all: In the order in which they were named.
        backbones: Copies of base models in memory.
    """

    def __init__(
        self, found: Sequence[Located], stage: Callable[[str], None] = lambda text: None
    ) -> None:
        """Load them.

        Args:
            found: See :func:`~fedloom.serving.locate.locate`.
            stage: Is told what is being done.

        Raises:
            ModelError: One cannot be loaded, or does not fit its tokenizer.
        """
        device = choose_device("auto")
        folders = [model_folder(one.base, stage) if one.base == TINY else one.base for one in found]
        saved = [
            OnBase(
                one.folder, one.kind, base, one.revision,
                torch.float32 if one.precise else torch.bfloat16,
            )
            for one, base in zip(found, folders, strict=True)
        ]  # fmt: skip
        stage(f"loading {', '.join(dict.fromkeys(folders))}")
        self._together = SavedTogether(saved, device)
        self.backbones = self._together.backbones
        self.all: list[ReadyModel] = []
        for number, (one, base) in enumerate(zip(found, folders, strict=True)):
            self.all.append(self._ready(number, one, base))

    def _ready(self, number: int, one: Located, base: str) -> ReadyModel:
        words, revision = one.tokenizer
        encoder = load_encoder(base if words == one.base else words, revision)
        pad = int(encoder.tokenizer.pad_token_id)
        with self._together.active(number) as model:
            require_tokens(model, encoder.tokenizer, base)
            return ReadyModel(
                _free_name(one.name, [own.name for own in self.all]),
                encoder,
                format_of(one.prompt),
                context_length(model),
                len(encoder.tokenizer),
                uses_cache(model, pad, batched=False),
                int(one.folder.stat().st_mtime) if one.folder is not None else 0,
            )

    def answer(
        self,
        number: int,
        ask: Ask,
        max_new_tokens: int,
        tell: Tell,
        *,
        stop: Sequence[str] = (),
        trim: bool = True,
    ) -> Answer:
        """Have model ``number`` answer; see :func:`~fedloom.evaluation.streaming.stream`."""
        ready = self.all[number]
        with self._together.active(number) as model:
            return stream(
                model, ready.encoder, ask, max_new_tokens, tell,
                cached=ready.cached, stop=stop, trim=trim,
            )  # fmt: skip


def _free_name(name: str, taken: Sequence[str]) -> str:
    """Return a name, with a number where others have it already."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free
