"""Logits on public rows as they travel: what of them is sent, in which form, and what is checked."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedloom.aggregation.soft_labels import SoftLabels, joined, likeliest
from fedloom.data.client_rows import TokenShare
from fedloom.data.public import PublicRows
from fedloom.errors import MessageError
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.base import Head
from fedloom.objectives.distillation import logits_in_parts
from fedloom.settings.schema import NamedSettings, Of
from fedloom.tensors import Tensors
from fedloom.training.layout import scoring_budget
from fedloom.training.passes import Layout
from fedloom.training.settings import TrainingSettings
from fedloom.wire.row_codecs import Encoding, pack_rows, row_specs, unpack_rows
from fedloom.wire.schema import TensorSpec

VALUES, INDICES, COUNTS = "values", "indices", "counts"
"""Names in the payloads: log-probabilities, which entries they are of, and how many a position has."""

LEAST, LEAST_SURE = -1e4, 1e-3
"""Bounds of an honest log-probability, rounding included."""


class LogitSettings(NamedSettings):
    """What settings of methods that exchange logits on public rows have in common."""

    temperature: float = Field(default=2.0, gt=0)
    """T of the distillation loss."""
    teacher_share: Annotated[float, Of("public.labelled", (True,))] = Field(default=0.5, gt=0, le=1)
    """Share of the teacher in the loss on labelled public rows, the labels having the rest; on unlabelled
    ones the teacher is alone."""
    top_k: int | None = Field(default=None, ge=1)
    """Logits kept of each position (default: all)."""
    top_mass: float | None = Field(default=None, gt=0, lt=1)
    """Of each position only as many logits (top_k at most) as reach this probability."""
    encoding: Encoding = "fp16"
    """Of a logit on the wire: fp32, bf16, fp16, or int8 with a scale a position."""
    down: Literal["server", "consensus"] = "server"
    """What clients learn from: the server's model as it is then, or the clients' answers combined."""
    rows_per_round: int | None = Field(default=None, ge=1)
    """Public rows of a round, drawn anew (default: all of them)."""
    server_epochs: int = Field(default=5, ge=1)
    """Passes of the server over the round's public rows."""
    client_epochs: Annotated[int, Of("training.amount_per", ("model",))] = Field(default=5, ge=1)
    """Passes of a client over them."""
    server_model: str | None = None
    """Backbone of the server (default: model.path)."""
    server_rank: int | None = Field(default=None, ge=1)
    """LoRA rank of the server (default: adapter.rank)."""


class SoftLabelWire:
    """The form in which knowledge about N positions travels.

    Whole: N rows of values. The k likeliest: the same with their indices, in the smallest integers that
    hold the width. Different numbers of them: one list of values and indices, and a count a position.
    """

    def __init__(self, settings: LogitSettings, public: PublicRows) -> None:
        """Fix the schema for knowledge about these rows."""
        width = public.width
        self.encoding: Encoding = settings.encoding
        self.positions, self.width = int(public.share.positions[-1]), width
        self.k = min(settings.top_k or width, width)
        self.adaptive = settings.top_mass is not None
        self.sparse = self.adaptive or self.k < width
        self.index = index_dtype(width)
        self.specs = self._specs()

    def pack(self, soft_labels: SoftLabels) -> Tensors:
        """Return what travels."""
        if not self.sparse:
            return pack_rows(VALUES, soft_labels.values, self.encoding)
        assert soft_labels.indices is not None, "knowledge of a part has indices"
        if not self.adaptive:
            values = pack_rows(VALUES, soft_labels.values, self.encoding)
            return {**values, INDICES: soft_labels.indices.to(self.index)}
        assert soft_labels.present is not None, "rows of different lengths say which entries count"
        present = soft_labels.present
        packed = pack_rows(VALUES, soft_labels.values.masked_fill(~present, 0.0), self.encoding)
        counts = present.sum(-1).to(torch.int32)
        indices = soft_labels.indices[present].to(self.index)
        return {**packed, VALUES: packed[VALUES][present], INDICES: indices, COUNTS: counts}

    def unpack(self, tensors: Tensors) -> SoftLabels:
        """Return what :meth:`pack` packed; tensors that passed :meth:`check`."""
        if not self.sparse:
            values = unpack_rows(VALUES, tensors, self.encoding)
            return SoftLabels(self.width, values.log_softmax(-1))
        if not self.adaptive:
            values = unpack_rows(VALUES, tensors, self.encoding)
            return SoftLabels(self.width, values, tensors[INDICES].to(torch.int64))
        counts = tensors[COUNTS].long()
        present = torch.arange(self.k).unsqueeze(0) < counts.unsqueeze(1)
        values = torch.zeros(self.positions, self.k, dtype=tensors[VALUES].dtype)
        indices = torch.zeros(self.positions, self.k, dtype=torch.int64)
        values[present] = tensors[VALUES]
        indices[present] = tensors[INDICES].to(torch.int64)
        whole = unpack_rows(VALUES, {**tensors, VALUES: values}, self.encoding)
        return SoftLabels(self.width, whole, indices, present)

    def check(self, tensors: Tensors) -> None:
        """Check what a schema cannot say.

        Raises:
            MessageError: Values that are no log-probabilities, counts that do not add up, entries out of
                order, twice or beyond the width.
        """
        if self.adaptive:
            self._check_counts(tensors)
        known = self.unpack(tensors)
        if float(known.values.max()) > LEAST_SURE or float(known.values.min()) < LEAST:
            raise MessageError(
                f"logits: a log-probability is not between {LEAST:g} and 0", "out_of_range"
            )
        if known.indices is not None:
            self._check_indices(known.indices, known.present)

    def _check_counts(self, tensors: Tensors) -> None:
        counts, entries = tensors[COUNTS].long(), len(tensors[VALUES])
        if int(counts.min()) < 1 or int(counts.max()) > self.k or int(counts.sum()) != entries:
            raise MessageError(
                f"logits: the counts must be 1 to {self.k} and add up to the {entries} values sent"
            )
        if len(tensors[INDICES]) != entries:
            raise MessageError(f"logits: {len(tensors[INDICES])} indices for {entries} values")

    def _check_indices(self, indices: Tensor, present: Tensor | None) -> None:
        if int(indices.min()) < 0 or int(indices.max()) >= self.width:
            raise MessageError(
                f"logits: index {int(indices.max())} is not below the width of {self.width}",
                "out_of_range",
            )
        rising = indices[:, 1:] > indices[:, :-1]
        if present is not None:
            rising = rising | ~present[:, 1:]
        if not bool(rising.all()):
            raise MessageError("logits: the indices of a position must rise and occur once")

    def _specs(self) -> tuple[TensorSpec, ...]:
        n, k = self.positions, self.k
        if not self.adaptive:
            values = row_specs(VALUES, n, k, self.encoding)
            return (*values, TensorSpec(INDICES, (n, k), self.index)) if self.sparse else values
        flat = row_specs(VALUES, n, k, self.encoding)
        values = (TensorSpec(VALUES, (n * k,), flat[0].dtype, ragged=True), *flat[1:])
        return (
            *values,
            TensorSpec(INDICES, (n * k,), self.index, ragged=True),
            TensorSpec(COUNTS, (n,), torch.int32),
        )


def index_dtype(width: int) -> torch.dtype:
    """Return the smallest unsigned integers that number ``width`` entries (int32 above 65536)."""
    if width <= 1 << 8:
        return torch.uint8
    return torch.uint16 if width <= 1 << 16 else torch.int32


def answers(
    model: AdapterModel,
    public: PublicRows,
    head: Head,
    settings: LogitSettings,
    training: TrainingSettings,
) -> SoftLabels:
    """Return what the adapter that ``model`` holds says about public rows, no more than is kept.

    Args:
        model: Of a client or the server.
        public: The rows, as this model reads them.
        head: What of.
        settings: How many entries of a position are kept.
        training: What a pass holds.
    """
    starts = public.share.positions
    layout = Layout(model, public.share, scoring_budget(training, model))
    parts, places = [], []
    with model.evaluating():
        for indices, batch in layout.everything():
            places += [np.arange(starts[row], starts[row + 1]) for row in indices]
            for logits in logits_in_parts(model, batch, head):
                logps = logits[:, : public.width].float().log_softmax(-1).cpu()
                parts.append(likeliest(logps, settings.top_k, settings.top_mass))
    return joined(parts).take(torch.from_numpy(np.concatenate(places).argsort()))


def true_entries(public: PublicRows, head: Head) -> Tensor | None:
    """Return ``(positions,)``: the class or token that is true at each; ``None`` where nobody says."""
    tokens = public.share.tokens
    if not public.labelled:
        return None
    if head == "classification":
        return torch.from_numpy(tokens.labels)
    return torch.from_numpy(tokens.tokens[tokens.trained].astype(np.int64))


def texts_of(public: TokenShare) -> Tensor:
    """Return ``(positions,)``: which row each lies in."""
    lengths = np.diff(public.positions)
    return torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
