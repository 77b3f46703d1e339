"""Every kind of model in a federation, loaded once, with the data as it reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch

from fedloom.data.client_rows import TokenShare
from fedloom.data.encode import TextEncoder
from fedloom.data.public import PublicRows
from fedloom.data.row_accounting import Cut
from fedloom.data.token_set import TokenSet, Untokenized
from fedloom.engines.in_process import ClientResources
from fedloom.errors import DataError, ModelError
from fedloom.evaluation.held_out import HeldOut
from fedloom.evaluation.rollouts import RolloutMaker
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.methods.contract.method import Method
from fedloom.models.adapters import AdapterModel, attach_adapter, blocks_of
from fedloom.models.architecture import switch_dropout_off
from fedloom.models.consistency import disagreements, length_warnings, require_same_vocabulary
from fedloom.models.embedding_noise import EmbeddingNoise
from fedloom.models.load import context_length
from fedloom.models.split_model import ClientPart, check_split_point
from fedloom.objectives.base import Objective
from fedloom.runs.initial_adapter import Start
from fedloom.runs.model_building import backbone_of, build_model, of_server, with_model
from fedloom.runs.partitioning import PartitionedData, judged_kind
from fedloom.runs.token_rows import TokenReader
from fedloom.storage.cache import cache_folder
from fedloom.tensors import Tensors
from fedloom.training.optimizers import require_optimizer
from fedloom.training.reference_cache import ReferenceCache, reference_cache
from fedloom.training.shared_prompts import shares_prompts


def references_of(only: int | None) -> ReferenceCache | None:
    """Return the cache of log-probs under reference models.

    Not on a client's own machine, as its policy does not cover such a cache.
    """
    return reference_cache(cache_folder() / "references") if only is None else None


@dataclass(frozen=True)
class ModelBundle:
    """A backbone with an adapter, and the data as it reads it.

    Attributes:
        key: Model and rank, which identify it.
        starts: Whether the reference model has the adapter as it is at first.
    """

    key: tuple[str, int]
    path: str
    model: AdapterModel
    reader: TokenReader
    width: int
    starts: bool

    @cached_property
    def initial(self) -> Tensors:
        """The adapter as it is at first; first read before anything is trained."""
        return self.model.read()

    @property
    def reference(self) -> Tensors | None:
        """Adapter of the reference model, ``None`` for the base model."""
        return self.initial if self.starts else None

    @cached_property
    def held_out(self) -> HeldOut:
        """The global held-out set."""
        return replace(self.reader.held_out(self.reader.division.test), start=self.reference)


class ModelBundles:
    """Every kind of model in a federation, each loaded once."""

    def __init__(
        self,
        experiment: Experiment,
        division: PartitionedData,
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
        self.empty, self.only, self.start = empty, only, None if empty else start
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
            require_same_vocabulary(
                {key[0]: encoder.tokenizer for key, (_, encoder, _) in built.items()}
            )
            contexts = dict.fromkeys(contexts, min(contexts.values()))
        references = references_of(only)
        self.bundles = {
            key: ModelBundle(
                key,
                path,
                model,
                TokenReader(
                    experiment, division, objective, encoder, model, contexts[key], references
                ),
                len(division.classes) or len(encoder.tokenizer),
                self.start is not None and experiment.reference == "start",
            )
            for key, (path, encoder, model) in built.items()
        }
        self._begin()
        self.of_server = self.bundles[server]
        _require_linear(experiment, self.of_server.model)
        self.read: dict[int, tuple[Cut, list[Untokenized]]] = {}
        self.judged: dict[int, TokenSet] = {}
        self.own: dict[int, Tensors] = {}
        self._client_parts: dict[tuple[tuple[str, int], int, bool], ClientPart] = {}

    def warnings(self) -> list[str]:
        """Return warnings where models, tokenizers, files and settings disagree; each once."""
        experiment, told = self.experiment, []
        lengths = {
            "data.max_length": experiment.data.max_length,
            "evaluation.max_length": experiment.evaluation.max_length,
            "public.max_length": experiment.public.max_length,
        }
        for bundle in self.bundles.values():
            tokenizer = bundle.reader.encoder.tokenizer
            revision, classes = experiment.model.revision, self.division.classes
            told += disagreements(bundle.model.model, tokenizer, bundle.path, revision, classes)
            told += length_warnings(lengths, bundle.reader.context, tokenizer, bundle.path)
        return list(dict.fromkeys(told))

    def read_apart(self, shares: Mapping[int, TokenShare]) -> list[str]:
        """Return for each model that reads the prompts of its pairs twice that it does."""
        told = []
        rows: dict[tuple[str, int], TokenShare] = {}  # of each model the first client's
        for client, share in shares.items():
            rows.setdefault(self.clients[client], share)
        for key, share in rows.items():
            path, model = self.bundles[key].path, self.bundles[key].model
            once = shares_prompts(model, 0)  # asked of all now, while they are as they begin
            classes = self.division.classes  # what such a model says follows from whole texts alone
            if model.noise is None and share.tokens.width > 1 and not once and not classes:
                kind, adapter = type(model.model.config).__name__, self.experiment.adapter.kind
                told.append(
                    f"{path}: the prompt of a pair is read with each answer, which takes longer: with "
                    f"adapter.kind = {adapter!r} this model ({kind}) says something else where both "
                    "follow one reading"
                )
        return list(dict.fromkeys(told))

    def of_client(self, client: int) -> ModelBundle:
        """Return the model of a client."""
        return self.bundles[self.clients[client]]

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
        for bundle in self.bundles.values():
            if bundle.model.device.type != "meta":
                tensors = self.start.tensors(bundle.model, any_rank=any_rank)
                if tensors is not None:
                    bundle.model.write(tensors)
            _ = bundle.initial

    def _own_start(self, client: int) -> Tensors | None:
        """Return what of an earlier run is a client's own, ``None`` where it starts as all do."""
        model = self.of_client(client).model
        if self.start is None or model.device.type == "meta" or client not in self.start.clients:
            return None
        model.write(self.of_client(client).initial)  # own parts that it lacks are those of all
        return self.start.own(client, model)

    def common_held_out(self, client: int) -> HeldOut:
        """Return the global held-out set for a client that is judged by its own model."""
        bundle, own = self.of_client(client), self.own.get(client)
        return (
            bundle.held_out
            if own is None or not bundle.starts
            else replace(bundle.held_out, start=own)
        )

    def training_shares(self, *, pooled: bool) -> dict[int, TokenShare]:
        """Return each client's training rows as its model reads them, or all rows as client 0's."""
        clients = [0] if pooled else list(self.division.train)
        if not self.division.train:
            return {}
        read = {
            key: self.bundles[key].reader.training_shares(pooled=pooled)
            for key in dict.fromkeys(self.clients[client] for client in clients)
        }
        self.read = {
            client: self.bundles[self.clients[0 if pooled else client]].reader.read[client]
            for client in self.division.train
        }
        return {client: read[self.clients[client]][client] for client in clients}

    def resources(self, client: int, public: dict[tuple[str, int], PublicRows]) -> ClientResources:
        """Return the model and data of a client."""
        bundle = self.of_client(client)
        initial, own = bundle.initial, self._own_start(client)
        if own is not None:
            self.own[client] = initial = own
        model = self.method.client_model(_ClientModels(self, bundle))
        if model is not bundle.model:
            initial = model.read()
        return ClientResources(
            model,
            initial,
            bundle.reader.max_length,
            bundle.width,
            public.get(bundle.key),
            initial if bundle.starts else None,
            own is not None,
            self._maker(client, bundle, initial if bundle.starts else None, model.device),
        )

    def _maker(
        self, client: int, bundle: ModelBundle, reference: Tensors | None, device: torch.device
    ) -> RolloutMaker | None:
        """Return what makes a client's batches, where the objective has answers generated."""
        generation, groups = self.objective.generation, self.experiment.clients.groups.values()
        if generation is None:
            return None
        own = next((group.rewards for group in groups if client in group.clients), None)
        return RolloutMaker.of(bundle.reader.encoder, generation, own, reference, device)

    def server_maker(self) -> RolloutMaker | None:
        """Return the same for the server, which has no reward."""
        generation, own = self.objective.generation, self.of_server
        if generation is None:
            return None
        reference = own.initial if own.starts else None
        return RolloutMaker.of(own.reader.encoder, generation, (), reference, own.model.device)

    def front(self, bundle: ModelBundle, blocks: int, *, tail: bool) -> ClientPart:
        """Return the first blocks of a bundle's model with the starting adapter, loaded once."""
        key = (bundle.key, blocks, tail)
        if key not in self._client_parts:
            own = _client_part(
                self.experiment, self.division, bundle, blocks, tail=tail, empty=self.empty
            )
            if self.start is not None:
                own.write(self.start.part(own))
            self._client_parts[key] = own
        return self._client_parts[key]

    def client_held_out(self) -> dict[int, HeldOut]:
        """Return each client's own held-out set, where it has one, as its model reads it."""
        kind = judged_kind(self.experiment, self.division.loaded.kind)
        sets = {}
        for client, rows in self.division.held_out.items():
            if rows:
                bundle = self.of_client(client)
                start = self.own.get(client, bundle.reference) if bundle.starts else None
                sets[client] = replace(bundle.reader.held_out(rows, kind), start=start)
        self.judged = {client: held_out.share.tokens for client, held_out in sets.items()}
        return {client: held_out for client, held_out in sets.items() if len(held_out)}

    def public_rows(self) -> dict[tuple[str, int], PublicRows]:
        """Return the public rows under each bundle's tokenizer, without rows that one drops."""
        rows = self.division.public
        if not rows:
            return {}
        sets = {key: bundle.reader.public(rows) for key, bundle in self.bundles.items()}
        common = reduce(np.intersect1d, [tokens.index for tokens in sets.values()])
        if not len(common):
            raise DataError("no public row is left after tokenising; the public set is empty")
        return {
            key: PublicRows(
                TokenShare(tokens.take(np.flatnonzero(np.isin(tokens.index, common)))),
                self.experiment.public.labelled,
                self.bundles[key].width,
            )
            for key, tokens in sets.items()
        }

    def _built(
        self, key: tuple[str, int], stage: Callable[[str], None]
    ) -> tuple[str, TextEncoder, AdapterModel]:
        experiment = with_model(self.experiment, *key)
        empty = self.empty or self.partly  # a client with a part of a model never loads the whole
        training, classes = experiment.training, self.division.classes
        path, encoder, model = build_model(experiment, self.objective, classes, stage, empty=empty)
        require_optimizer(model.parameters, training)
        if training.neftune_noise_alpha:
            model.noise = EmbeddingNoise(model.model, training.neftune_noise_alpha)
        return path, encoder, model


@dataclass(frozen=True)
class _ClientModels:
    """What a client's model can be made of; see :class:`fedloom.methods.contract.method.Models`."""

    bundles: ModelBundles
    bundle: ModelBundle

    @property
    def whole(self) -> AdapterModel:
        return self.bundle.model

    def front(self, blocks: int, *, tail: bool) -> ClientPart:
        return self.bundles.front(self.bundle, blocks, tail=tail)


def _require_linear(experiment: Experiment, model: AdapterModel) -> None:
    """Check that a method that multiplies LoRA's two factors may do so.

    Raises:
        ModelError: Some factors are of a stack of experts, whose change is not their product.
    """
    kind = METHODS[experiment.method.name][1]
    if model.stacked and (kind.changes_backbone or kind.mixed_ranks):
        raise ModelError(
            f"method.name = {experiment.method.name!r} multiplies the two factors of linear layers, and "
            f"{model.stacked} has factors for a stack of experts: name linear layers as "
            'adapter.targets, such as ["q_proj", "v_proj"]'
        )


def _client_part(
    experiment: Experiment,
    division: PartitionedData,
    bundle: ModelBundle,
    cut: int,
    *,
    tail: bool,
    empty: bool,
) -> ClientPart:
    """Load only the first blocks of a model, the client part of a split model.

    Raises:
        ModelError: The model cannot be split there, or the adapter has no layer in the client's blocks.
    """
    config: Any = bundle.model.model.config
    check_split_point(config, cut)
    classification = bool(division.classes)
    backbone = backbone_of(
        experiment,
        bundle.path,
        division.classes,
        bundle.model.pad,
        blocks=cut,
        empty=empty,
    )
    if experiment.model.dropout is False:
        switch_dropout_off(backbone)
    adapter = experiment.adapter
    blocks = blocks_of(bundle.model.model.get_base_model(), adapter)
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
    return ClientPart(model, bundle.model.pad, tail=tail, autocast=bundle.model.autocast)
