"""Where the parts meet: an experiment's settings become clients with rows, a model and a method.

Two steps, so that the first can be shown before the second is paid for: ``division.py`` (who holds what)
needs no model; :func:`assemble` loads the backbone, tokenises and builds the server loop's parts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloom.accounting.ledger import Ledger
from fedloom.data.account import Accounts, Cut, cut_of, cut_warnings, escaped_warnings
from fedloom.data.batches import TokenShare, mismatch
from fedloom.data.builtin import pretraining_texts
from fedloom.data.encode import TextEncoder
from fedloom.data.examples import (
    Example,
    Instruction,
    first_answer,
    last_answer,
    plain_text,
)
from fedloom.data.public import PublicRows
from fedloom.data.reader import BadRow, check_bad
from fedloom.data.sources import LONGEST_SEQUENCE
from fedloom.data.tokenize import TokenSet, Untokenized, tokenize
from fedloom.division import Division, judged_kind
from fedloom.engines.simulation import Equipment, SimulationEngine
from fedloom.engines.store import ClientStore
from fedloom.errors import DataError, ModelError, OutputError, SettingsError, first_line
from fedloom.evaluation.clients import Evaluator
from fedloom.evaluation.generate import load_encoder
from fedloom.evaluation.held_out import Answering, HeldOut
from fedloom.evaluation.newcomers import ACTION as JOIN
from fedloom.evaluation.newcomers import Newcomers
from fedloom.experiment import ClientsSettings, Experiment
from fedloom.messages import Tensors
from fedloom.methods import METHODS, make_method
from fedloom.methods.base import EVALUATE, Method, ModelSpec, ServerSide
from fedloom.models.adapters import AdapterModel, attach_adapter, blocks_of, load_adapter
from fedloom.models.agreement import disagreements, embedded, length_warnings, require_tokens
from fedloom.models.architecture import switch_dropout_off
from fedloom.models.cut import FrontHalf, check_cut
from fedloom.models.experts import (
    ExpertModel,
    attach_experts,
    is_expert_folder,
    load_experts,
)
from fedloom.models.heads import PersonalParts, attach_personal, load_personal, saved_parts
from fedloom.models.load import (
    TINY,
    context_length,
    empty_backbone,
    fingerprint,
    load_backbone,
)
from fedloom.models.submixture import SubMixtureModel, attach_submixture
from fedloom.models.tiny import tiny_model
from fedloom.objectives import make_objective
from fedloom.objectives.base import Objective
from fedloom.randomness import generator
from fedloom.server import Engine, RemoteEngine
from fedloom.start import Start
from fedloom.training.layout import tokens_per_pass
from fedloom.training.local import add_reference_logps, row_tokens
from fedloom.training.memory import pass_warnings
from fedloom.training.optimizers import TrainingSettings
from fedloom.training.reference_cache import ReferenceCache, reference_cache
from fedloom.training.shared_prompts import shares_prompts

TINY_TEXTS = 4000
"""Generated texts that the tiny model is trained on."""

SMALL_MODEL = 50_000_000
"""Parameters below which one CPU thread is faster than several (measured on 2 cores)."""


@dataclass(frozen=True)
class Parts:
    """Everything a run needs, built.

    Attributes:
        model: The server's model.
        initial: Its adapter as it was initialised.
        engine: Where clients run.
        local: Those of them that run in this process.
        accounts: What became of every row, after tokenising.
        bad_rows: Malformed rows, those among them that no chat template takes.
        prompts: Held-out examples to answer before and after.
        model_path: Folder or Hub name that the backbone came from.
        model_digest: Its fingerprint.
        max_length: Tokens of a training sequence at most.
    """

    division: Division
    model: AdapterModel
    encoder: TextEncoder
    initial: Tensors
    method: Method
    objective: Objective
    engine: Engine
    local: SimulationEngine
    evaluator: Evaluator
    newcomers: Newcomers
    ledger: Ledger
    accounts: Accounts
    bad_rows: tuple[BadRow, ...]
    prompts: list[Example]
    model_path: str
    model_digest: str
    max_length: int


def cache_folder() -> Path:
    """Return where the tiny model and tokenised data are kept: FEDLOOM_CACHE or the user's cache."""
    chosen = os.environ.get("FEDLOOM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "fedloom"


def references_of(only: int | None) -> ReferenceCache | None:
    """Return where log-probs under reference models are kept.

    Not on a client's own machine: its policy does not speak of what would lie there.
    """
    return reference_cache(cache_folder() / "references") if only is None else None


def assemble(
    experiment: Experiment,
    division: Division,
    *,
    objective: Objective | None = None,
    store: ClientStore | None = None,
    stage: Callable[[str], None] = lambda text: None,
    empty: bool = False,
    remote: RemoteEngine | None = None,
    only: int | None = None,
    start: Start | None = None,
) -> Parts:
    """Load the model, tokenise every client's rows and build what the server loop needs.

    Args:
        experiment: The settings.
        division: Who holds what.
        objective: A user's own objective instead of the one in the settings.
        store: What clients kept in an earlier part of this run.
        stage: Told what is being done.
        empty: Build models without weights, to count by; nothing can be run then.
        remote: Where the clients are, if not in this process: their rows are not touched then.
        only: The one client that is in this process, on its own machine; there is no server here.
        start: The adapter that training goes on from; its settings are those of the experiment.

    Raises:
        ModelError: The model or its adapter cannot be built, or what it starts from is of another.
        DataError: A client has no row left after tokenising.
        SettingsError: A round's tokens are too few for its trainings.
    """
    objective = objective or make_objective(experiment.objective)
    method = make_method(experiment.method)
    kits = _Kits(
        experiment, division, method, objective, stage, empty=empty, only=only, start=start
    )
    own = kits.of_server
    reader = own.reader
    stage("tokenising")
    train = {} if remote else kits.training_shares(pooled=method.pools_data)
    _require_tokens(experiment, method, train)
    for text in kits.read_apart(train):
        stage(text)
    public = kits.public_rows()
    ledger = Ledger()
    federation = experiment.federation
    newcomers = frozenset(experiment.clients.newcomers)
    members = 1 if method.pools_data else federation.clients - len(newcomers)
    participations = federation.rounds * min(federation.cohort_size, members) / members
    equipment = {client: kits.equipment(client, public) for client in train}
    initial = own.initial
    method.equip(
        ServerSide(
            own.model,
            objective,
            experiment.training,
            federation.seed,
            participations,
            reader.max_length,
            own.width,
            public.get(own.key),
            ledger,
            min(federation.cohort_size, members),
            {client: key[1] for client, key in kits.clients.items()},
            experiment.aggregation,
        )
    )
    judged = experiment.judges_clients
    here = judged and (remote is None or method.pools_data)
    client_held_out = kits.client_held_out() if here else {}
    needing = train if method.personal and judged else {c: train[c] for c in newcomers}
    if remote is None:
        _require_held_out(needing, client_held_out)
    welcome = Newcomers(
        method,
        sorted(newcomers),
        {c: rows for c, rows in client_held_out.items() if c in newcomers},
        experiment.clients.newcomer_steps,
        experiment.training.learning_rate,
        judged_kind(experiment, division.loaded.kind),
    )
    held_out = own.held_out
    readable = held_out.share.tokens.index.tolist()
    evaluator = Evaluator(
        method,
        held_out,
        {c: kits.common_held_out(c) for c in train} if method.own_models else {},
        {c: rows for c, rows in client_held_out.items() if c not in newcomers},
        remote.judged if remote and judged else client_held_out.keys() - newcomers,
        experiment.evaluation.every,
        experiment.federation.rounds,
        judged_kind(experiment, division.loaded.kind),
    )
    accounts, bad_rows = _accounted(experiment, division, kits, public.get(own.key), held_out)
    told = pass_warnings(
        experiment.training,
        experiment.model.quantization,
        {client: (equipment[client].model, share) for client, share in train.items()},
    )
    accounts = replace(accounts, warnings=(*accounts.warnings, *told))
    if division.test and not readable:
        reasons = sorted({lost.reason for lost in held_out.share.tokens.dropped})
        raise DataError(
            f"no row of the global held-out set is left after tokenising ({'; '.join(reasons)}); give "
            "other rows as data.test_source, or raise evaluation.max_length"
        )
    engine = SimulationEngine(
        equipment,
        train,
        {**method.handlers(), EVALUATE: evaluator.handler(), JOIN: welcome.handler()},
        objective,
        experiment.training,
        federation.seed,
        participations,
        federation.rounds,
        store or ClientStore(),
        ledger,
        newcomers,
        references=references_of(only),
    )
    return Parts(
        division,
        own.model,
        own.reader.encoder,
        initial,
        method,
        objective,
        remote or engine,
        engine,
        evaluator,
        welcome,
        ledger,
        accounts,
        bad_rows,
        [division.test[i] for i in readable[: experiment.evaluation.samples]]
        if not division.classes
        else [],
        own.path,
        fingerprint(own.path),
        reader.max_length,
    )


@dataclass(frozen=True)
class _Kit:
    """A backbone with an adapter, and how it reads the data.

    Attributes:
        key: What tells it from others: model and rank.
        starts: Whether the reference model has the adapter as it is at first.
    """

    key: tuple[str, int]
    path: str
    model: AdapterModel
    reader: _Reader
    width: int
    starts: bool

    @cached_property
    def initial(self) -> Tensors:
        """The adapter as it is at first; first read before anything is trained."""
        return self.model.read()

    @property
    def reference(self) -> Tensors | None:
        """What the reference model has for an adapter, ``None`` for the base model."""
        return self.initial if self.starts else None

    @cached_property
    def held_out(self) -> HeldOut:
        """The global held-out set."""
        return replace(self.reader.held_out(self.reader.division.test), start=self.reference)


class _Kits:
    """Every kind of model in a federation, each loaded once."""

    def __init__(
        self,
        experiment: Experiment,
        division: Division,
        method: Method,
        objective: Objective,
        stage: Callable[[str], None],
        *,
        empty: bool = False,
        only: int | None = None,
        start: Start | None = None,
    ) -> None:
        self.experiment, self.division = experiment, division
        self.method, self.objective = method, objective
        self.empty, self.start = empty, None if empty else start
        self.partly = only is not None and not method.whole_at_clients
        base = (experiment.model.path, experiment.adapter.rank)
        self.clients = dict.fromkeys(range(experiment.federation.clients), base)
        for group in experiment.clients.groups.values():
            own = (group.model or base[0], group.rank or base[1])
            self.clients |= dict.fromkeys(group.clients, own)
        owned = of_server(experiment)
        server = (owned.model.path, owned.adapter.rank)
        keys = dict.fromkeys([server, *self.clients.values()])
        if only is not None:  # all kinds read the public rows; but for them it needs its own alone
            server = self.clients[only]
            keys = keys if division.public else {server: None}
        built = {key: self._built(key, stage) for key in keys}
        contexts = {key: context_length(model.model) for key, (_, _, model) in built.items()}
        if not division.classes:  # positions are tokens: all must cut their texts alike
            _require_same_vocabulary(
                {key[0]: encoder.tokenizer for key, (_, encoder, _) in built.items()}
            )
            contexts = dict.fromkeys(contexts, min(contexts.values()))
        references = references_of(only)
        self.kits = {
            key: _Kit(
                key,
                path,
                model,
                _Reader(experiment, division, objective, encoder, model, contexts[key], references),
                len(division.classes) or len(encoder.tokenizer),
                self.start is not None and experiment.reference == "start",
            )
            for key, (path, encoder, model) in built.items()
        }
        self._begin()
        self.of_server = self.kits[server]
        _require_linear(experiment, self.of_server.model)
        self.read: dict[int, tuple[Cut, list[Untokenized]]] = {}
        self.judged: dict[int, TokenSet] = {}
        self.own: dict[int, Tensors] = {}
        self._fronts: dict[tuple[tuple[str, int], int, bool], FrontHalf] = {}

    def warnings(self) -> list[str]:
        """Return where models, tokenizers, files and settings do not say the same; each once."""
        experiment, told = self.experiment, []
        lengths = {
            "data.max_length": experiment.data.max_length,
            "evaluation.max_length": experiment.evaluation.max_length,
            "public.max_length": experiment.public.max_length,
        }
        for kit in self.kits.values():
            tokenizer = kit.reader.encoder.tokenizer
            revision, classes = experiment.model.revision, self.division.classes
            told += disagreements(kit.model.model, tokenizer, kit.path, revision, classes)
            told += length_warnings(lengths, kit.reader.context, tokenizer, kit.path)
        return list(dict.fromkeys(told))

    def read_apart(self, shares: Mapping[int, TokenShare]) -> list[str]:
        """Return for each model that reads the prompts of its pairs twice that it does."""
        told = []
        for client, share in shares.items():
            path, model = self.of_client(client).path, self.of_client(client).model
            if share.tokens.width > 1 and not shares_prompts(model, 0):
                kind, adapter = type(model.model.config).__name__, self.experiment.adapter.kind
                told.append(
                    f"{path}: the prompt of a pair is read with each answer, which takes longer: with "
                    f"adapter.kind = {adapter!r} this model ({kind}) says something else where both "
                    "follow one reading"
                )
        return list(dict.fromkeys(told))

    def of_client(self, client: int) -> _Kit:
        return self.kits[self.clients[client]]

    def _begin(self) -> None:
        """Write what is started from into every model, and read it back as what is there at first.

        Raises:
            ModelError: It is of another model, or has other layers or classes.
        """
        if self.start is None:
            return
        classes = self.start.record.get("classes")
        if self.division.classes and classes not in (None, list(self.division.classes)):
            raise ModelError(
                f"adapter.start = {self.start.name!r} tells the classes {', '.join(map(str, classes))} "
                f"apart, and the data has {', '.join(self.division.classes)}: its output layer has them "
                "in that order"
            )
        any_rank = METHODS[self.experiment.method.name][1].mixed_ranks
        for kit in self.kits.values():
            if kit.model.device.type != "meta":
                tensors = self.start.tensors(kit.model, any_rank=any_rank)
                if tensors is not None:
                    kit.model.write(tensors)
            _ = kit.initial

    def _own_start(self, client: int) -> Tensors | None:
        """Return what of an earlier run is a client's own, ``None`` where it starts as all do."""
        model = self.of_client(client).model
        if self.start is None or model.device.type == "meta":
            return None
        model.write(self.of_client(client).initial)  # own parts that it lacks are those of all
        return self.start.own(client, model)

    def common_held_out(self, client: int) -> HeldOut:
        """Return the global held-out set for a client that is judged by its own model."""
        kit, own = self.of_client(client), self.own.get(client)
        return kit.held_out if own is None or not kit.starts else replace(kit.held_out, start=own)

    def training_shares(self, *, pooled: bool) -> dict[int, TokenShare]:
        """Return each client's training rows as its model reads them, or all rows as client 0's."""
        clients = [0] if pooled else list(self.division.train)
        if not self.division.train:
            return {}
        read = {
            key: self.kits[key].reader.training_shares(pooled=pooled)
            for key in dict.fromkeys(self.clients[client] for client in clients)
        }
        self.read = {
            client: self.kits[self.clients[0 if pooled else client]].reader.read[client]
            for client in self.division.train
        }
        return {client: read[self.clients[client]][client] for client in clients}

    def equipment(self, client: int, public: dict[tuple[str, int], PublicRows]) -> Equipment:
        kit = self.of_client(client)
        initial, own = kit.initial, self._own_start(client)
        if own is not None:
            self.own[client] = initial = own
        model = self.method.client_model(_ClientModels(self, kit))
        if model is not kit.model:
            initial = model.read()
        return Equipment(
            model,
            initial,
            kit.reader.max_length,
            kit.width,
            public.get(kit.key),
            initial if kit.starts else None,
            own is not None,
        )

    def front(self, kit: _Kit, blocks: int, *, tail: bool) -> FrontHalf:
        """Return the first blocks of a kit's model with what is started from, loaded once."""
        key = (kit.key, blocks, tail)
        if key not in self._fronts:
            own = _front_half(
                self.experiment, self.division, kit, blocks, tail=tail, empty=self.empty
            )
            if self.start is not None:
                own.write(self.start.part(own))
            self._fronts[key] = own
        return self._fronts[key]

    def client_held_out(self) -> dict[int, HeldOut]:
        """Return each client's own held-out set, where it has one, as its model reads it."""
        kind = judged_kind(self.experiment, self.division.loaded.kind)
        sets = {}
        for client, rows in self.division.held_out.items():
            if rows:
                kit = self.of_client(client)
                start = self.own.get(client, kit.reference) if kit.starts else None
                sets[client] = replace(kit.reader.held_out(rows, kind), start=start)
        self.judged = {client: held_out.share.tokens for client, held_out in sets.items()}
        return {client: held_out for client, held_out in sets.items() if len(held_out)}

    def public_rows(self) -> dict[tuple[str, int], PublicRows]:
        """Return the public rows under each kit's tokenizer; a row that one of them drops, all drop."""
        rows = self.division.public
        if not rows:
            return {}
        sets = {key: kit.reader.public(rows) for key, kit in self.kits.items()}
        common = reduce(np.intersect1d, [tokens.index for tokens in sets.values()])
        if not len(common):
            raise DataError("no public row is left after tokenising; the public set is empty")
        return {
            key: PublicRows(
                TokenShare(tokens.take(np.flatnonzero(np.isin(tokens.index, common)))),
                self.experiment.public.labelled,
                self.kits[key].width,
            )
            for key, tokens in sets.items()
        }

    def _built(
        self, key: tuple[str, int], stage: Callable[[str], None]
    ) -> tuple[str, TextEncoder, AdapterModel]:
        experiment = _with_model(self.experiment, *key)
        empty = self.empty or self.partly  # a client that has a part never loads the whole
        return _build_model(experiment, self.objective, self.division.classes, stage, empty=empty)


@dataclass(frozen=True)
class _ClientModels:
    """What a client's model can be made of; see :class:`fedloom.methods.base.Models`."""

    kits: _Kits
    kit: _Kit

    @property
    def whole(self) -> AdapterModel:
        return self.kit.model

    def front(self, blocks: int, *, tail: bool) -> FrontHalf:
        return self.kits.front(self.kit, blocks, tail=tail)


def _accounted(
    experiment: Experiment,
    division: Division,
    kits: _Kits,
    public: PublicRows | None,
    held_out: HeldOut,
) -> tuple[Accounts, tuple[BadRow, ...]]:
    """Return what became of every row, after tokenising, and all malformed rows.

    Raises:
        DataError: With those that cannot be tokenised, too many rows are malformed.
    """
    unread = len(division.public) - (len(public.share) if public is not None else 0)
    judged = held_out.share.tokens
    accounts = division.accounts.tokenised(kits.read, kits.judged, judged, unread)
    told = cut_warnings(accounts, division.loaded.kind, kits.of_server.reader.max_length)
    told += escaped_warnings(accounts) + kits.warnings()
    bad = _all_bad(experiment, division, kits.read, kits.judged, judged.dropped)
    return replace(accounts, warnings=(*accounts.warnings, *told)), tuple(bad)


def _all_bad(
    experiment: Experiment,
    division: Division,
    read: Mapping[int, tuple[Cut, Sequence[Untokenized]]],
    held_out: Mapping[int, TokenSet],
    judged: Sequence[Untokenized] = (),
) -> list[BadRow]:
    """Return the malformed rows, those among them that cannot be tokenised.

    Raises:
        DataError: There are too many.
    """
    own: list[BadRow] = []
    tests: list[BadRow] = []
    for client, (_, lost) in read.items():
        more = held_out[client].dropped if client in held_out else ()
        for one in (*lost, *more):
            if one.malformed:
                own.append(BadRow(*division.place(client, one.row), one.reason))
    accounts, most = division.accounts, experiment.data.max_bad_share
    for one in judged:
        if one.malformed and accounts.test:
            tests.append(BadRow("the test set", one.row, one.reason))
        elif one.malformed:
            own.append(BadRow(*division.place(-1, one.row), one.reason))
    own = list(dict.fromkeys(own))  # a pair whose answers are apart is one row
    check_bad("the data", own, accounts.source.rows, most)
    if accounts.test:
        check_bad("the test set", tests, accounts.test.rows, most)
    return [*division.loaded.bad_rows, *own, *tests]


def _require_linear(experiment: Experiment, model: AdapterModel) -> None:
    """Check that a method that multiplies LoRA's two factors may do so.

    Raises:
        ModelError: Some factors are of a stack of experts, whose change is not their product.
    """
    kind = METHODS[experiment.method.name][1]
    if model.stacked and (kind.moves_backbone or kind.mixed_ranks):
        raise ModelError(
            f"method.name = {experiment.method.name!r} multiplies the two factors of linear layers, and "
            f"{model.stacked} has factors for a stack of experts: name linear layers as "
            'adapter.targets, such as ["q_proj", "v_proj"]'
        )


def _require_held_out(train: Mapping[int, TokenShare], held_out: Mapping[int, HeldOut]) -> None:
    """Check that every client can be judged by rows of its own, which is what personal models are for.

    Raises:
        DataError: Some cannot; they are named with what they hold.
    """
    without = [client for client in train if client not in held_out]
    if without:
        few = ", ".join(f"client {client} ({len(train[client])} rows)" for client in without[:5])
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        raise DataError(
            f"{few}{more} would have no held-out row to be judged by: use fewer clients, a larger "
            "partition.minimum or partition.client_test_fraction, or evaluation.per_client = false"
        )


def _front_half(
    experiment: Experiment, division: Division, kit: _Kit, cut: int, *, tail: bool, empty: bool
) -> FrontHalf:
    """Load the first blocks of a model alone, which are all that a client holds.

    Raises:
        ModelError: The model cannot be cut there, or the adapter has nothing in the client's blocks.
    """
    config: Any = kit.model.model.config
    check_cut(config, cut)
    classification = bool(division.classes)
    backbone = _backbone(
        experiment,
        kit.path,
        division.classes,
        kit.model.pad,
        blocks=cut,
        empty=empty,
    )
    if experiment.model.dropout is False:
        switch_dropout_off(backbone)
    adapter = experiment.adapter
    blocks = blocks_of(kit.model.model.get_base_model(), adapter)
    front = [block for block in blocks if block < cut]
    if not front:
        raise ModelError(
            f"method.cut = {cut} leaves the client no block with an adapter: adapter.layers names "
            f"{blocks}"
        )
    layers = front if len(front) < cut else None
    adapter = adapter.model_copy(update={"layers": layers})
    model = attach_adapter(
        backbone, adapter, classification=classification, seed=experiment.federation.seed
    )
    return FrontHalf(model, kit.model.pad, tail=tail, autocast=kit.model.autocast)


def _require_tokens(
    experiment: Experiment, method: Method, shares: Mapping[int, TokenShare]
) -> None:
    """Check that each of the trainings that share a round's tokens has enough for any row.

    Raises:
        SettingsError: The tokens are too few; the least that works is named.
    """
    training, rounds = experiment.training, experiment.federation.rounds
    if training.local_tokens is None or training.amount_per == "model" or not shares:
        return
    most = max(method.trainings_of(round, rounds) for round in {1, rounds}) * method.repeats
    longest, client = max((int(row_tokens(share).max()), c) for c, share in shares.items())
    if training.local_tokens < most * longest:
        raise SettingsError(
            [
                f"tokens: {training.local_tokens} a client and round is too little for method.name = "
                f"{experiment.method.name!r}: it makes {most} optimizer steps on a row in a round, and "
                f"client {client} has one of {longest} tokens: give {most * longest} at least "
                "(training.local_tokens, or compare.amount)"
            ]
        )


def _require_same_vocabulary(tokenizers: dict[str, Any]) -> None:
    """Check that all models number the same tokens alike.

    Raises:
        ModelError: Two differ; both are named, with their sizes and a token they number differently.
    """
    (first, known), *others = ((path, t.get_vocab()) for path, t in tokenizers.items())
    for path, vocabulary in others:
        if vocabulary != known:
            odd = min(dict(known.items() ^ vocabulary.items()))
            raise ModelError(
                f"{first} and {path} have different vocabularies ({len(known)} and {len(vocabulary)} "
                f"tokens; {odd!r} is one they number differently): logits over tokens can be shared "
                "between models of one tokenizer only"
            )


def assemble_saved(
    experiment: Experiment, division: Division, adapter: Path | None, start: Path | None = None
) -> tuple[AdapterModel, HeldOut]:
    """Return the backbone with a saved adapter (or a fresh one, which is the base model), and the set.

    Args:
        experiment: The settings.
        division: Has the held-out rows.
        adapter: A PEFT folder.
        start: That of the reference model, where it is not the base model.

    Raises:
        ModelError: A folder is no PEFT folder, or one for another model.
    """
    experiment = of_server(experiment)
    objective = make_objective(experiment.objective)
    scored: TokenShare | None = None
    if start is not None and division.judged in ("preference", "feedback"):
        encoder, model = load_saved(experiment, division.classes, start)
        reader = _Reader(
            experiment, division, objective, encoder, model, context_length(model.model)
        )
        held_out = reader.held_out(division.test)
        own = model.read()
        scored = add_reference_logps(model, held_out.share, held_out.budget, own)
    encoder, model = load_saved(experiment, division.classes, adapter)
    reader = _Reader(experiment, division, objective, encoder, model, context_length(model.model))
    held_out = reader.held_out(division.test)
    return model, held_out if scored is None else replace(held_out, share=scored)


def load_saved(
    experiment: Experiment, classes: tuple[str, ...], adapter: Path | None
) -> tuple[TextEncoder, AdapterModel]:
    """Return how texts are read and the backbone with a saved adapter and own parts, or fresh ones.

    Raises:
        ModelError: ``adapter`` is no PEFT folder, or one for another model.
    """
    objective = make_objective(experiment.objective)
    built = _build_model(of_server(experiment), objective, classes, lambda text: None, adapter)
    return built[1], built[2]


def of_server(experiment: Experiment) -> Experiment:
    """Return the experiment with the model and rank of the server, where a method gives it its own."""
    spec = ModelSpec(experiment.model.path, experiment.adapter.rank)
    own = make_method(experiment.method).server_model(spec)
    return experiment if own == spec else _with_model(experiment, *own)


def client_base(experiment: Experiment, client: int) -> str:
    """Return the backbone of a client, as the experiment names it."""
    groups = experiment.clients.groups.values()
    own = (group.model for group in groups if client in group.clients)
    return next(own, None) or experiment.model.path


def _with_model(experiment: Experiment, path: str, rank: int) -> Experiment:
    """Return the experiment of a party that has this model and rank; it knows of no other groups."""
    adapter = experiment.adapter
    changed: dict[str, float] = {"rank": rank}
    if METHODS[experiment.method.name][1].mixed_ranks:  # who shares factors scales them alike
        changed["alpha"] = adapter.alpha / adapter.rank * rank
    return replace(
        experiment,
        model=experiment.model.model_copy(update={"path": path}),
        adapter=adapter.model_copy(update=changed),
        clients=ClientsSettings(),
    )


def model_folder(path: str, stage: Callable[[str], None] = lambda text: None) -> str:
    """Return where a model is: as it is named, or the folder of the tiny one, which is made first.

    Raises:
        OutputError: That folder cannot be written.
    """
    if path != TINY:
        return path
    texts = pretraining_texts(generator(0, "tiny"), TINY_TEXTS)
    stage("preparing the tiny model (made once, a few seconds)")
    try:
        return str(tiny_model(cache_folder(), texts))
    except OSError as error:
        raise OutputError(
            f"cannot keep the tiny model in {cache_folder()}: {error.strerror}; set the variable "
            "FEDLOOM_CACHE to a folder that can be written"
        ) from error


def prepare_model(
    experiment: Experiment,
    classes: tuple[str, ...],
    stage: Callable[[str], None],
    *,
    empty: bool = False,
) -> tuple[str, TextEncoder, torch.nn.Module]:
    """Return the backbone's path, how texts are read for it and the backbone itself, on its device."""
    path = model_folder(experiment.model.path, stage)
    stage(f"loading {experiment.model.path}")
    encoder = load_encoder(path, experiment.model.revision, experiment.data)
    pad = encoder.tokenizer.pad_token_id
    backbone = _backbone(experiment, path, classes, pad, empty=empty)
    require_tokens(backbone, encoder.tokenizer, path)
    _set_threads(experiment.training, sum(p.numel() for p in backbone.parameters()))
    return path, encoder, backbone


def _backbone(
    experiment: Experiment,
    path: str,
    classes: tuple[str, ...],
    pad: int,
    *,
    blocks: int | None = None,
    empty: bool = False,
) -> torch.nn.Module:
    """Load a backbone, or its first blocks, as the experiment says; or build it without weights."""
    dtype = torch.bfloat16 if experiment.training.precision == "bf16" else torch.float32
    revision = experiment.model.revision
    if empty:
        return empty_backbone(
            path, revision=revision, classes=classes, dtype=dtype, pad_token_id=pad, blocks=blocks
        )
    return load_backbone(
        path,
        revision=revision,
        classes=classes,
        dtype=dtype,
        pad_token_id=pad,
        seed=experiment.federation.seed,
        quantization=experiment.model.quantization,
        device=choose_device(experiment.training.device),
        blocks=blocks,
    )


def choose_device(name: str) -> torch.device:
    """Return the device a setting names; "auto" is a GPU where there is one.

    Raises:
        ModelError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise ModelError(
            f'training.device {name!r}: {reason}; "auto" takes what there is'
        ) from error
    if device.type == "cuda":  # the same bits need these two on a GPU
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


def _build_model(
    experiment: Experiment,
    objective: Objective,
    classes: tuple[str, ...],
    stage: Callable[[str], None],
    adapter: Path | None = None,
    *,
    empty: bool = False,
) -> tuple[str, TextEncoder, AdapterModel]:
    classification = objective.head == "classification"
    classes = classes if classification else ()
    path, encoder, backbone = prepare_model(experiment, classes, stage, empty=empty)
    dropout = experiment.model.dropout
    if dropout is None:
        dropout = not objective.needs_reference
    if not dropout:
        switch_dropout_off(backbone)
    if experiment.training.gradient_checkpointing:
        anyone: Any = backbone
        anyone.activation_checkpointing_enable()
    parts = make_method(experiment.method).parts
    parts = replace(parts, reward=objective.needs_reward) if not classification else PersonalParts()
    pad = encoder.tokenizer.pad_token_id
    autocast = torch.bfloat16 if experiment.training.precision == "bf16" else None
    checkpointed = experiment.training.gradient_checkpointing
    if experiment.adapter.kind == "submixture":
        if classification or parts or adapter is not None:
            raise ModelError(
                'adapter.kind = "submixture" goes with causal objectives, without own heads of '
                "clients; what it saves is a whole model: give that as model.path"
            )
        whole = attach_submixture(backbone)
        return path, encoder, SubMixtureModel(whole, pad, autocast, checkpointed)
    if experiment.adapter.kind == "experts" or (adapter and is_expert_folder(adapter)):
        settings = experiment.adapter
        if classification or parts:
            raise ModelError(
                'adapter.kind = "experts" goes with causal objectives, and without own heads of clients'
            )
        if adapter is not None:
            backbone, settings = load_experts(backbone, adapter)
        else:
            backbone = attach_experts(backbone, settings, seed=experiment.federation.seed)
        experts = ExpertModel(backbone, settings, pad, autocast, checkpointed)
        return path, encoder, experts
    if adapter is not None:
        model = load_adapter(backbone, adapter)
        parts = saved_parts(adapter)
    else:
        model = attach_adapter(
            backbone,
            experiment.adapter,
            classification=classification,
            seed=experiment.federation.seed,
        )
    if parts:
        head = attach_personal(model, parts, experiment.federation.seed)
        if adapter is not None:
            load_personal(head, adapter)
    return path, encoder, AdapterModel(model, pad, autocast, checkpointed)


def longest(max_length: int | None, context: int) -> int:
    """Return how many tokens a sequence has at most.

    Args:
        max_length: ``data.max_length``, or that of public rows.
        context: Tokens that the model reads.
    """
    return min(max_length or LONGEST_SEQUENCE, context)


class _Reader:
    """Turns each part of a division into token rows, counting what is dropped."""

    def __init__(
        self,
        experiment: Experiment,
        division: Division,
        objective: Objective,
        encoder: TextEncoder,
        model: AdapterModel,
        context: int,
        references: ReferenceCache | None = None,
    ) -> None:
        self.experiment, self.division, self.objective = experiment, division, objective
        self.encoder, self.context = encoder, context
        self.embedded = embedded(model.model)
        self.max_length = longest(experiment.data.max_length, context)
        self.references = references
        self.pass_tokens = tokens_per_pass(experiment.training, model)
        self.held_out_length = min(experiment.evaluation.max_length or self.max_length, context)
        self.read: dict[int, tuple[Cut, list[Untokenized]]] = {}

    def training_shares(self, *, pooled: bool) -> dict[int, TokenShare]:
        """Return each client's training rows, or all rows as client 0's.

        What was cut from each client's rows, and which are lost, is kept in ``read``.
        """
        clients = self.division.train
        whole = self.tokens([row for rows in clients.values() for row in rows], self.max_length)
        start = 0
        for client, rows in clients.items():
            end = start + len(rows)
            positions = np.flatnonzero((whole.index >= start) & (whole.index < end))
            lost = [one for one in whole.dropped if start <= one.position < end]
            self.read[client] = cut_of(whole, positions), lost
            start = end
        _all_bad(self.experiment, self.division, self.read, {})
        if pooled:
            clients = {0: [row for rows in clients.values() for row in rows]}
        result, start = {}, 0
        for client, rows in clients.items():
            end = start + len(rows)
            positions = np.flatnonzero((whole.index >= start) & (whole.index < end))
            lost = [one for one in whole.dropped if start <= one.position < end]
            start = end
            if not len(positions):
                reasons = dict(Counter(one.reason for one in lost))
                raise DataError(
                    f"client {client} has no row left after tokenising ({reasons}); raise "
                    "data.max_length or partition.minimum, or use fewer clients"
                )
            result[client] = self._share(client, whole.take(positions))
        return result

    def held_out(self, rows: Sequence[Example], kind: str | None = None) -> HeldOut:
        """Return a held-out set (the global one, or of ``kind``); pairs stay pairs."""
        size = self.experiment.evaluation.batch_size
        tokens = self.tokens(rows, self.held_out_length)
        kind = kind or self.division.judged
        return HeldOut(
            TokenShare(tokens),
            kind,
            self.objective.beta,
            self.objective.gamma,
            size,
            self._answering(rows) if kind == "answer" else None,
            tokens=self.pass_tokens,
            references=self.references,
        )

    def _answering(self, rows: Sequence[Example]) -> Answering:
        last = self.experiment.data.train_on == "last_answer"
        asked = last_answer if last else first_answer  # what the prompt's tokens ask for
        texts = [
            tuple(plain_text(own) for own in (asked(row.completion), *row.accepted))
            for row in rows
            if isinstance(row, Instruction)
        ]
        return Answering(self.encoder, self.experiment.evaluation.max_new_tokens, texts)

    def _share(self, client: int, tokens: TokenSet) -> TokenShare:
        if not self.objective.needs_mismatched:
            return TokenShare(tokens)
        rng = generator(self.experiment.federation.seed, "mismatched", client)
        bos = self.encoder.tokenizer.bos_token_id
        return TokenShare(tokens, mismatch(tokens, rng, self.max_length, bos))

    def public(self, rows: Sequence[Example]) -> TokenSet:
        """Tokenise public rows, as all parties do."""
        settings = self.experiment.public
        control = settings.control_tokens or self.experiment.data.control_tokens
        encoder = replace(self.encoder, control_tokens=control)
        max_length = longest(settings.max_length or self.experiment.data.max_length, self.context)
        return self.tokens(rows, max_length, encoder)

    def tokens(
        self, rows: Sequence[Example], max_length: int, encoder: TextEncoder | None = None
    ) -> TokenSet:
        """Tokenise rows, as training rows unless another ``encoder`` is given."""
        cache = cache_folder() / "tokens"
        alike = self.experiment.data.ambiguous == "keep"
        classes = self.division.classes
        encoder = encoder or self.encoder
        found = tokenize(rows, encoder, max_length, classes, cache, keep_alike=alike)
        most = int(found.tokens.max(initial=-1))
        if self.embedded is not None and most >= self.embedded:
            name = encoder.tokenizer.convert_ids_to_tokens(most)
            raise ModelError(
                f"a row has the token {name!r} ({most}), and the model embeds {self.embedded} tokens: "
                "take it out of the rows or of the chat template, or let it be text: "
                'data.control_tokens = "text"'
            )
        return found


def _set_threads(settings: TrainingSettings, parameters: int) -> None:
    default = 1 if parameters < SMALL_MODEL else os.cpu_count() or 1
    torch.set_num_threads(settings.threads or default)
