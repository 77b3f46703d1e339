"""What intercepted updates tell of tokens: a run with planted rows, and its updates view by view."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from fedloom.evaluation.privacy_audit.adam import first_gradient
from fedloom.evaluation.privacy_audit.span import (
    DRAWS,
    Candidates,
    TokenRecovery,
    recover_from_inputs,
    recover_tokens,
    rounding_of,
)
from fedloom.experiment.experiment import Experiment
from fedloom.federation.engine import Engine
from fedloom.models.adapters import AdapterModel
from fedloom.runs.assembly import RunComponents
from fedloom.runs.partitioning import PartitionedData
from fedloom.runs.privacy_audit.first_block import (
    FACTOR_A,
    FACTOR_B,
    ReadByToken,
    layer_of,
    next_block,
    read_by_token,
)
from fedloom.runs.privacy_audit.interception import InterceptingEngine, Update, frequencies
from fedloom.runs.privacy_audit.planting import AuditRows, plant
from fedloom.storage.run_folder import Record
from fedloom.training.optimizers import round_learning_rate
from fedloom.training.settings import TrainingSettings
from fedloom.training.synthetic_inputs import SYNTHETIC_INPUTS, embeddings_of

LEAK = 4.0
"""Standard deviations above noise from which on an AUC of tokens is a leak: many are looked at."""


@dataclass
class PlantedRun:
    """An audit of a run that is made for it; see :class:`fedloom.runs.auditor.Auditor`.

    Attributes:
        experiment: What is run.
        canaries: Of each kind.
        rows: What was planted, once the rows are partitioned.
        parts: Of the run, once it is assembled.
        engine: What was intercepted.
    """

    experiment: Experiment
    canaries: int
    rows: AuditRows | None = None
    parts: RunComponents | None = None
    engine: InterceptingEngine | None = None
    views: dict[int, list[ReadByToken]] = field(default_factory=dict)

    def planted(self, division: PartitionedData) -> PartitionedData:
        """Return the rows of the run, with canaries and without those that are withheld."""
        changed, self.rows = plant(self.experiment, division, self.canaries)
        return changed

    def intercepting(self, parts: RunComponents) -> Engine:
        """Return the run's engine, of which updates are kept."""
        self.parts = parts
        wanted = {SYNTHETIC_INPUTS}
        for own in parts.local.resources.values():
            for view in self.views_of(own.model):
                layers = {*view.layers, *map(next_block, view.layers)}
                wanted |= {n for n in own.model.parameters if layer_of(n) in layers}
        self.engine = InterceptingEngine(parts.engine, parts.local, wanted)
        return self.engine

    def views_of(self, model: AdapterModel) -> list[ReadByToken]:
        """Return what the first block reads for each token; worked out once for each model."""
        if id(model) not in self.views:
            embeddings = model.model.get_input_embeddings().weight
            self.views[id(model)] = read_by_token(model, len(embeddings))
        return self.views[id(model)]

    def tokens(self) -> list[Record]:
        """Return what each intercepted update tells of its client's tokens, by view."""
        assert self.parts is not None and self.engine is not None
        local, common = self.parts.local, frequencies(self.parts.local.shares)
        found: list[Record] = []
        for update in self.engine.updates:
            if not update.tokens:  # no row was drawn
                continue
            own = local.resources[update.client]
            found += self._of_inputs(update, own.model, common[update.client])
            for view in self.views_of(own.model):
                for title, change, candidates, rounding in self.changes(update, view):
                    recovered = recover_tokens(
                        change,
                        candidates,
                        sorted(update.tokens),
                        common[update.client],
                        rounding=rounding,
                    )
                    found.append(_token_record(update, title, recovered))
        return found

    def changes(self, update: Update, view: ReadByToken) -> Iterator[View]:
        """Yield what can be tested of an update, as the server knows how clients train."""
        assert self.parts is not None
        initial = self.parts.local.resources[update.client].initial
        training, federation = self.experiment.training, self.experiment.federation
        return changes(update, view, initial, training, federation.rounds)

    def _of_inputs(
        self, update: Update, model: AdapterModel, common: Mapping[int, float]
    ) -> list[Record]:
        """Return what synthetic inputs tell, where any were sent; those that are 0 stand for none."""
        sent = update.changes.get(SYNTHETIC_INPUTS)
        if sent is None:
            return []
        embeddings = embeddings_of(model).float().cpu()
        rows = sent.reshape(-1, sent.shape[-1])
        rows = rows[rows.any(1)]
        recovered = recover_from_inputs(rows, embeddings, sorted(update.tokens), common)
        return [_token_record(update, ("input embeddings", "nearest"), recovered)]


View = tuple[tuple[str, str], Tensor, Candidates, float]
"""Layer and tensor, its change, the candidates for it, and the rounding of its numbers."""

INVERTED = ", Adam's step inverted"
"""Beside the tensor of which the gradient was read back."""


def changes(
    update: Update,
    view: ReadByToken,
    initial: Mapping[str, Tensor],
    training: TrainingSettings | None = None,
    rounds: int = 1,
) -> Iterator[View]:
    """Yield what can be tested of an update.

    The rows of several layers that read the same are mixtures of the same inputs: together they span
    more. Of a single step of Adam the gradient is tested as well, where it can be read back.

    Args:
        update: What was sent.
        view: What layers read.
        initial: What clients begin a run with.
        training: How they train, which the server knows; ``None`` to leave Adam's step as it is.
        rounds: Of the run.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, change in update.changes.items():
        layer = layer_of(name.rpartition("/")[2])
        if layer not in view.layers or change.ndim != 2:
            continue
        shown, part = layer.removeprefix("base_model.model."), name.rpartition("/")[0]
        candidates, tensor = view.candidates, "dW"
        if name.endswith(FACTOR_B):
            known = factor_a(update, name, initial)
            if known is None:
                continue
            candidates, tensor = Candidates(view.candidates.inputs @ known.float().T), "dB"
        elif name.endswith(FACTOR_A):
            tensor = "dA"
        for mark, own, rounding in read_back(update, name, change, training, rounds):
            if own.shape[1] != candidates.inputs.shape[-1]:
                own = own.T  # weights that are stored (in, out)
            title = _titled(tensor + mark, part)
            yield (shown, title), own, candidates, rounding
            if tensor != "dB" and rounding:
                parts.setdefault(title, []).append(own.double() / rounding)
    for title, several in parts.items():
        if len(several) > 1:
            yield (f"all {len(several)}", title), torch.cat(several), view.candidates, 1.0


def factor_a(update: Update, name: str, initial: Mapping[str, Tensor]) -> Tensor | None:
    """Return the A beside a change of B, as the client was sent it or began with it."""
    factor = name.removesuffix(FACTOR_B) + FACTOR_A
    known = update.received.get(factor, initial.get(factor.rpartition("/")[2]))
    fits = known is not None and known.shape[0] == update.changes[name].shape[1]
    return known if fits else None


def read_back(
    update: Update, name: str, change: Tensor, training: TrainingSettings | None, rounds: int
) -> Iterator[tuple[str, Tensor, float]]:
    """Yield a change and, of one step of Adam, the gradient, each with the rounding of its numbers."""
    received = update.received.get(name)
    yield "", change, rounding_of(change if received is None else received)
    fresh = training is not None and not training.keep_optimizer_state and update.steps == 1
    if training is None or not fresh or training.optimizer not in ("adam", "adamw"):
        return
    if received is None or received.shape != change.shape:
        return
    rate = round_learning_rate(training, update.round, rounds)
    gradient = first_gradient(
        change,
        received,
        rate * (training.loraplus_lr_ratio if name.endswith(FACTOR_B) else 1.0),
        training.epsilon,
        decay=training.weight_decay,
        decoupled=training.optimizer == "adamw",
    )
    if gradient is not None:
        yield INVERTED, gradient, 1.0


def _titled(tensor: str, part: str) -> str:
    return f"{tensor} of {part}" if part else tensor


def _token_record(update: Update, title: tuple[str, str], own: TokenRecovery) -> Record:
    return {
        "round": update.round,
        "client": update.client,
        "action": update.action,
        "layer": title[0],
        "tensor": title[1],
        "steps": update.steps,
        **asdict(own),
        "share": own.share,
        "guessed_share": own.guessed_share,
    }


def tokens_record(planted: PlantedRun) -> Record:
    """Return what all updates tell of tokens, or why nothing could be looked at."""
    assert planted.parts is not None and planted.engine is not None
    if planted.engine.wanted <= {SYNTHETIC_INPUTS} and not planted.engine.updates:
        why = (
            "no trained layer reads something that depends on a token alone: nothing in the first "
            "block's attention is trained (adapter.kind, targets, layers)"
        )
        return {"made": False, "why": why}
    if planted.experiment.privacy.secure_aggregation:
        why = "with secure aggregation the server sees sums of updates, and none of a single client"
        return {"made": False, "why": why}
    if not planted.engine.updates:
        reasons = "; ".join(sorted(planted.engine.unreadable))
        why = f"no client sent a change of a trained layer{f': {reasons}' if reasons else ''}"
        return {"made": False, "why": why}
    found = planted.tokens()
    if not found:
        return {"made": False, "why": "no client whose update was kept trained on a row"}
    rounds = []
    for round in sorted({own["round"] for own in found}):
        own = [line for line in found if line["round"] == round]
        views = sorted({(line["layer"], line["tensor"]) for line in own})
        rounds += [
            _round_line(round, view, [o for o in own if (o["layer"], o["tensor"]) == view])
            for view in views
        ]
    read = [view for own in planted.views.values() for view in own]
    leaks = [own for own in rounds if own["share"] > own["guessed_share"] or own["excess"] >= LEAK]
    return {
        "made": True,
        "updates": found,
        "rounds": rounds,
        "places": max(
            (own.candidates.inputs.shape[1] for own in read if own.by_place), default=None
        ),
        "vocabulary": max((len(own.candidates.inputs) for own in read), default=None),
        "leak": bool(leaks),
        "worst": max(rounds, key=lambda own: own["share"]),
    }


def _round_line(round: int, view: tuple[str, str], own: Sequence[Record]) -> Record:
    """Return the means over the updates of a round that are seen in one way."""
    judged = [line for line in own if line["auc"] is not None]
    deviations = [line["deviation"] for line in judged]
    spread = sum(one**2 for one in deviations) + sum(deviations) ** 2 / DRAWS  # noise is drawn once
    above = sum(line["auc"] - line["noise_auc"] for line in judged)
    return {
        "round": round,
        "layer": view[0],
        "tensor": view[1],
        "updates": len(own),
        "auc": fmean(line["auc"] for line in judged) if judged else 0.5,
        "excess": above / max(spread, 1e-12) ** 0.5,
        "from_rank": all(line["from_rank"] for line in own),
        **{
            name: fmean(line[name] for line in own)
            for name in ("tokens", "rank", "limit", "steps", "share", "guessed_share")
        },
        "chance_share": fmean(line["chance"] / max(1, line["tokens"]) for line in own),
    }
