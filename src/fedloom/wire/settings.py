"""``[wire]``: how tensors are compressed on their way between server and clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator

from fedloom.accounting.quantities import parse_quantity
from fedloom.settings.schema import Of, Settings
from fedloom.wire.bit_allocation import ladder
from fedloom.wire.codecs import PRESETS, Pipeline, pipeline
from fedloom.wire.codecs.nothing import Nothing

Stages = str | list[str]
"""The name of a preset, or stages in their order; an empty list sends tensors as they are."""

AUTO = "auto"
"""In place of a codec: a preset that is chosen on what clients sent in the first rounds."""

UNCODED = "[wire] gives neither up, down, budget nor parts, so that tensors are sent as they are"

COMPRESSED = Of("compresses", (True,), UNCODED)
WITH_RESIDUALS = Of("wire.error_feedback", ("classic",))
CHOOSING = Of("chooses a codec", (True,), 'neither wire.up nor wire.down is "auto"')


def bits_of(codec: Pipeline) -> float:
    """Return the bits that a number of a large tensor has before the entropy stage."""
    return 8 * codec.raw_bytes([(256, 256)], torch.float32) / 256**2


class WireSettings(Settings):
    """``[wire]``: codecs of the tensors that clients and server send each other."""

    up: Stages = []
    """Codec of what clients send: a preset ("int8", "int4", "small", "smallest"), or a list of stages
    such as ["top_k:0.1", "int4", "zstd"]. What travels is the change of each tensor that was received.
    "auto": the strongest unbiased preset that keeps the held-out loss (auto_loss; without held-out rows,
    auto_error), measured in the first auto_rounds rounds and kept from then on (default: tensors as they
    are)."""
    down: Stages = []
    """Codec of what all clients are sent alike: the change since the model that they have; "auto" as of
    wire.up (default: tensors as they are)."""
    budget: str | None = None
    """In place of wire.up: the most that a client sends in an answer to a request for training, such as
    "2MB". Each tensor gets a codec by how much it changes (default: no bound)."""
    parts: dict[str, Stages] = {}
    """Codecs of parts of what clients send that have one of their own, such as {control = "int8"} of
    SCAFFOLD's control variates; [] sends a part as it is (default: none)."""
    auto_rounds: Annotated[int, CHOOSING] = Field(default=2, ge=1, le=1000)
    """Rounds in which tensors are sent as they are, and what presets would lose of them is measured."""
    auto_loss: Annotated[float, CHOOSING] = Field(default=0.1, gt=0, lt=1)
    """Most that a chosen preset costs of what those rounds take off the loss of the global held-out
    rows."""
    auto_error: Annotated[float, CHOOSING] = Field(default=0.2, gt=0, lt=1)
    """Most that a chosen preset loses of the mean of clients' changes, squared and relative: where there
    are no global held-out rows, or their loss did not fall."""
    error_feedback: Literal["none", "classic", "ef21"] = "none"
    """What a client does about what a biased codec of wire.up loses: "classic" adds it to its next
    change; "ef21" has server and client keep an estimate of the change and sends what it lacks."""
    absence_decay: Annotated[float, WITH_RESIDUALS] = Field(default=0.9, ge=0, le=1)
    """For error_feedback = "classic": factor on what was lost, for each round without the client."""
    absence_limit: Annotated[int, WITH_RESIDUALS] = Field(default=10, ge=0)
    """For error_feedback = "classic": rounds without the client after which what was lost is dropped."""
    keep_plain_below: Annotated[int, COMPRESSED] = Field(default=1024, ge=0)
    """Tensors of fewer bytes are sent as they are, and so are vectors, such as norms and biases."""

    @field_validator("up", "down")
    @classmethod
    def _known(cls, value: Stages) -> Stages:
        if value and value != AUTO:
            _codec(value)
        return value

    @field_validator("parts")
    @classmethod
    def _known_parts(cls, value: dict[str, Stages]) -> dict[str, Stages]:
        for own in value.values():
            if own:
                _codec(own)
        return value

    @field_validator("budget")
    @classmethod
    def _quantity(cls, value: str | None) -> str | None:
        if value is not None:
            parse_quantity(value, "B")
        return value

    @property
    def compresses(self) -> bool:
        """Whether anything is compressed."""
        return bool(self.up or self.down or self.budget or self.parts)

    @property
    def chooses(self) -> bool:
        """Whether a preset is chosen on what clients send."""
        return AUTO in (self.up, self.down)

    @property
    def up_codec(self) -> Pipeline | None:
        """The codec of what clients send; ``None`` where it is sent as it is, chosen, or has a budget."""
        return pipeline(self.up) if self.up and self.up != AUTO else None

    @property
    def down_codec(self) -> Pipeline | None:
        """The codec of what clients are sent; ``None`` where it is sent as it is, or chosen."""
        return pipeline(self.down) if self.down and self.down != AUTO else None

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes."""
        return int(parse_quantity(self.budget, "B")) if self.budget is not None else None

    @property
    def dealt(self) -> tuple[tuple[str, float], ...]:
        """The codecs that a budget deals out, from strong to mild, and their errors."""
        return ladder(returned=self.error_feedback != "none")

    def part_of(self, name: str) -> str | None:
        """Return the part with a codec of its own that a tensor of an answer is of."""
        part = name.partition("/")[0]
        return part if part in self.parts else None

    @property
    def allowed_up(self) -> set[str]:
        """The codecs that a server may ask for, as texts."""
        found = {"", *(str(_codec(own)) for own in self.parts.values() if own)}
        if self.up == AUTO:
            found |= {str(pipeline(name)) for name in PRESETS}
        elif self.up_codec is not None:
            found.add(str(self.up_codec))
        if self.budget is not None:
            found |= {codec for codec, _ in self.dealt}
        return found

    @property
    def allowed_down(self) -> set[str]:
        """The codecs that a server may send in, as texts."""
        if self.down == AUTO:
            return {str(pipeline(name)) for name in PRESETS}
        return {str(self.down_codec)} if self.down_codec is not None else set()

    @property
    def loses(self) -> bool:
        """Whether what clients send is coded with a loss."""
        codecs = [self.up_codec, *(_codec(own) for own in self.parts.values() if own)]
        coarse = any(codec is not None and not codec.lossless for codec in codecs)
        return coarse or self.budget is not None or self.up == AUTO

    def contradictions(self) -> Iterator[str]:
        """Yield what in this section contradicts itself."""
        if self.budget is not None and self.up:
            yield (
                f"wire.budget = {self.budget!r} gives each tensor a codec, and wire.up = {self.up!r} "
                "gives all one: leave one of them out"
            )
        if self.error_feedback == "none":
            return
        what = f"wire.error_feedback = {self.error_feedback!r}"
        if not self.loses:
            yield f"{what} returns what wire.up loses, which loses nothing: leave it out"
        elif self.up == AUTO:
            yield (
                f'{what}: wire.up = "auto" chooses among presets of which most round at random, and '
                "returning their errors can make them grow: leave error_feedback out, or name a codec "
                "that rounds to the nearest"
            )
        for key, own in {
            "wire.up": self.up,
            "wire.parts.adapter": self.parts.get("adapter"),
        }.items():
            codec = _codec(own) if own and own != AUTO else None
            if codec is not None and not codec.lossless and codec.unbiased:
                yield (
                    f"{what}: {key} = {own!r} rounds at random, so that its errors average out over "
                    "clients, and returning them can make them grow: leave error_feedback out, or round "
                    "to the nearest"
                )

    def warnings(self) -> Iterator[str]:
        """Yield what can be done and is likely to cost quality."""
        up, down = self.up_codec, self.down_codec
        if up is not None and not up.lossless and not up.unbiased and self.error_feedback == "none":
            yield (
                f"wire.up = {self.up!r} is biased: what it loses of each client's change is lost for "
                'good; wire.error_feedback = "classic" returns it'
            )
        if down is not None and any(own in str(down) for own in ("top_k", "low_rank")):
            yield (
                f"wire.down = {self.down!r} leaves most of each change out until later rounds: clients "
                "train on a model that lags behind"
            )


def _codec(stages: Stages) -> Pipeline:
    """Return the codec of a setting.

    Raises:
        ValueError: There is none, or it sends nothing.
    """
    own = pipeline(stages)
    if isinstance(own.values, Nothing):
        raise ValueError(
            "'nothing' is what wire.budget leaves for tensors that hardly change: [] sends tensors as "
            "they are"
        )
    return own
