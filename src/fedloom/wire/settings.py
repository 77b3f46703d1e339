"""``[wire]``: how tensors are compressed on their way between server and clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator

from fedloom.settings.schema import Of, Settings
from fedloom.wire.codecs import Pipeline, pipeline

Stages = str | list[str]
"""The name of a preset, or stages in their order; an empty list sends tensors as they are."""

NOTHING = "[wire] gives neither up nor down, so that tensors are sent as they are"

COMPRESSED = Of("compresses", (True,), NOTHING)
WITH_RESIDUALS = Of("wire.error_feedback", ("classic",))


def bits_of(codec: Pipeline) -> float:
    """Return the bits that a number of a large tensor has before the entropy stage."""
    return 8 * codec.raw_bytes([(256, 256)], torch.float32) / 256**2


class WireSettings(Settings):
    """``[wire]``: codecs of the tensors that clients and server send each other."""

    up: Stages = []
    """Codec of what clients send: a preset ("int8", "int4", "small", "smallest"), or a list of stages
    such as ["top_k:0.1", "int4", "zstd"]. What travels is the change of each tensor that was received
    (default: tensors as they are)."""
    down: Stages = []
    """Codec of what all clients are sent alike: the change since the model that they have (default:
    tensors as they are)."""
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
        if value:
            pipeline(value)
        return value

    @property
    def compresses(self) -> bool:
        """Whether anything is compressed."""
        return bool(self.up or self.down)

    @property
    def up_codec(self) -> Pipeline | None:
        """The codec of what clients send, ``None`` where tensors are sent as they are."""
        return pipeline(self.up) if self.up else None

    @property
    def down_codec(self) -> Pipeline | None:
        """The codec of what clients are sent, ``None`` where tensors are sent as they are."""
        return pipeline(self.down) if self.down else None

    def contradictions(self) -> Iterator[str]:
        """Yield what in this section contradicts itself."""
        codec = self.up_codec
        if self.error_feedback == "none":
            return
        what = f"wire.error_feedback = {self.error_feedback!r}"
        if codec is None or codec.lossless:
            yield f"{what} returns what wire.up loses, which loses nothing: leave it out"
        elif codec.unbiased:
            yield (
                f"{what}: wire.up = {self.up!r} rounds at random, so that its errors average out over "
                "clients, and returning them can make them grow: leave error_feedback out, or round to "
                "the nearest"
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
