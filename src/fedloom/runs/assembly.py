"""Assembly: the settings of an experiment become clients with rows, a model and a method.

Two steps, so that the first can be shown without the cost of the second: ``partitioning.py`` (rows of
each client) needs no model; :func:`assemble` loads the backbone, tokenises and builds the parts of the
server's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fedloom.accounting.costs import ROW_LOSSES
from fedloom.accounting.garbage import without_collection
from fedloom.accounting.ledger import Ledger
from fedloom.data.client_rows import TokenShare
from fedloom.data.encode import TextEncoder
from fedloom.data.examples import Example
from fedloom.data.public import PublicRows
from fedloom.data.reader import BadRow
from fedloom.data.row_accounting import Accounts, cut_warnings, escaped_warnings
from fedloom.engines.cohorts import answers_together
from fedloom.engines.in_process import ClientResources, SimulationEngine
from fedloom.errors import DataError, SettingsError
from fedloom.evaluation.held_out import HeldOut
from fedloom.experiment.experiment import Experiment
from fedloom.federation.engine import Engine, RemoteEngine
from fedloom.federation.protocol import EVALUATE
from fedloom.federation.secure_exchange import SecureClients
from fedloom.methods import make_method
from fedloom.methods.contract.client import Handler
from fedloom.methods.contract.federated_evaluation import Evaluator
from fedloom.methods.contract.method import Method, ServerSide
from fedloom.methods.contract.row_losses import RowLosses
from fedloom.methods.contract.soundness import sound_handlers
from fedloom.methods.contract.unseen_clients import ACTION as UNSEEN
from fedloom.methods.contract.unseen_clients import UnseenClients
from fedloom.models.adapters import AdapterModel
from fedloom.models.load import fingerprint
from fedloom.models.stacked_lora import reason_against
from fedloom.objectives import make_objective
from fedloom.objectives.base import Objective
from fedloom.privacy.noise import NoiseSource
from fedloom.runs.client_models import ModelBundles, references_of
from fedloom.runs.initial_adapter import Start
from fedloom.runs.partitioning import PartitionedData, judged_kind
from fedloom.runs.row_privacy import row_privacies, seeded_noise
from fedloom.runs.token_rows import bad_rows_in_all
from fedloom.storage.client_store import ClientStore
from fedloom.tensors import Tensors
from fedloom.training.memory import pass_warnings
from fedloom.training.results import OnStep
from fedloom.training.row_privacy import RowPrivacy, separated
from fedloom.training.steps import row_tokens


@dataclass(frozen=True)
class RunComponents:
    """Everything a run needs, built.

    Attributes:
        model: The server's model.
        initial: Its adapter as it was initialised.
        engine: Where clients run.
        local: The engine of clients in this process, if any.
        accounts: The account of every row, after tokenising.
        bad_rows: Malformed rows, including those that the chat template refuses.
        prompts: Held-out examples to answer before and after.
        model_path: Folder or Hub name that the backbone came from.
        model_digest: Its fingerprint.
        max_length: Tokens of a training sequence at most.
        row_privacies: How each client's steps hide its rows, with row-level privacy.
    """

    division: PartitionedData
    model: AdapterModel
    encoder: TextEncoder
    initial: Tensors
    method: Method
    objective: Objective
    engine: Engine
    local: SimulationEngine
    evaluator: Evaluator
    unseen: UnseenClients
    ledger: Ledger
    accounts: Accounts
    bad_rows: tuple[BadRow, ...]
    prompts: list[Example]
    model_path: str
    model_digest: str
    max_length: int
    row_privacies: Mapping[int, RowPrivacy] = field(default_factory=dict)


def assemble(
    experiment: Experiment,
    division: PartitionedData,
    *,
    objective: Objective | None = None,
    store: ClientStore | None = None,
    stage: Callable[[str], None] = lambda text: None,
    empty: bool = False,
    remote: RemoteEngine | None = None,
    only: int | None = None,
    start: Start | None = None,
    on_step: OnStep | None = None,
    probe: bool = True,
    noise: NoiseSource | None = None,
    hidden: Mapping[int, RowPrivacy] | None = None,
) -> RunComponents:
    """Load the model, tokenise every client's rows and build what the server loop needs.

    Args:
        experiment: The settings.
        division: Rows of each client.
        objective: A user's own objective instead of the one in the settings.
        store: The client store of an earlier part of this run.
        stage: Called with a text about the current work.
        empty: Build models without weights, for counting; nothing can be run then.
        remote: Engine of clients on other machines; their rows are then not read here.
        only: The one client that is in this process, on its own machine; there is no server here.
        start: The adapter that training starts from; its settings are those of the experiment.
        on_step: Called after each optimizer step of a client in this process.
        probe: Look whether prompts can be shared, to say so where not; that computes gradients, after
            which this process cannot be forked.
        noise: Where the clients' noise comes from, with row-level privacy; from the seed by default,
            where the experiment says so.
        hidden: How each client's steps hide its rows, where that was found before.

    Raises:
        ModelError: The model or its adapter cannot be built, or what it starts from is of another.
        DataError: A client has no row left after tokenising.
        SettingsError: A round's tokens are too few for its trainings, or row-level privacy cannot hide
            these rows.
    """
    method = make_method(experiment.method)
    objective = objective or make_objective(experiment.objective)
    if experiment.privacy.unit == "row":
        objective = separated(objective)
    bundles = ModelBundles(
        experiment, division, method, objective, stage, empty=empty, only=only, start=start
    )
    stage("tokenising")
    with without_collection():
        train = {} if remote else bundles.training_shares(pooled=method.pools_data)
    _require_tokens(experiment, method, train)
    for text in bundles.read_apart(train) if probe else ():
        stage(text)
    parts = _components(bundles, train, remote, store or ClientStore(), on_step)
    if experiment.privacy.unit == "row" and not empty and remote is None:
        found = hidden or _hiding(bundles, train, parts.local.participations, noise, stage)
        parts.local.drivers, parts = found, replace(parts, row_privacies=found)
    told = _cohort_warnings(experiment, parts.local.resources if probe else {}, remote)
    return replace(parts, accounts=replace(parts.accounts, warnings=parts.accounts.warnings + told))


def _hiding(
    bundles: ModelBundles,
    train: Mapping[int, TokenShare],
    participations: float,
    noise: NoiseSource | None,
    stage: Callable[[str], None],
) -> dict[int, RowPrivacy]:
    """Return how each client's steps hide its rows.

    Raises:
        SettingsError: They cannot.
    """
    experiment, division = bundles.experiment, bundles.division
    stage("accounting for row-level privacy")
    given = noise or seeded_noise(experiment)
    return row_privacies(experiment, division, bundles.method, train, participations, given)


def _components(
    bundles: ModelBundles,
    train: dict[int, TokenShare],
    remote: RemoteEngine | None,
    store: ClientStore,
    on_step: OnStep | None,
) -> RunComponents:
    """Return what the server's loop needs, built from loaded models and tokenised rows.

    Raises:
        DataError: A party that must be judged has no held-out row.
    """
    method, own = bundles.method, bundles.of_server
    public, ledger = bundles.public_rows(), Ledger()
    resources = {client: bundles.resources(client, public) for client in train}
    initial = own.initial
    server = _server_side(bundles, public.get(own.key), ledger)
    method.setup(server)
    evaluator, unseen_clients = _evaluation(bundles, train, remote)
    models = {client: (resources[client].model, share) for client, share in train.items()}
    accounts, bad_rows = _accounted(bundles, public.get(own.key), models)
    prompts = _prompts(bundles)
    handlers = {
        **sound_handlers(method, (EVALUATE, UNSEEN, ROW_LOSSES)),
        EVALUATE: evaluator.handler(),
        UNSEEN: unseen_clients.handler(),
    }
    privacy = bundles.experiment.privacy
    if privacy.unit is None and not privacy.secure_aggregation:  # whoever asks
        handlers[ROW_LOSSES] = RowLosses(method).handler()
    engine = _local_engine(
        bundles, resources, train, handlers, store, ledger, server.participations, on_step
    )
    return RunComponents(
        bundles.division,
        own.model,
        own.reader.encoder,
        initial,
        method,
        bundles.objective,
        remote or engine,
        engine,
        evaluator,
        unseen_clients,
        ledger,
        accounts,
        bad_rows,
        prompts,
        own.path,
        fingerprint(own.path),
        own.reader.max_length,
    )


def _local_engine(
    bundles: ModelBundles,
    resources: Mapping[int, ClientResources],
    train: dict[int, TokenShare],
    handlers: Mapping[str, Handler],
    store: ClientStore,
    ledger: Ledger,
    participations: float,
    on_step: OnStep | None,
) -> SimulationEngine:
    """Return the engine of the clients that are in this process."""
    experiment = bundles.experiment
    seed, privacy = experiment.federation.seed, experiment.privacy
    secure = None
    if privacy.secure_aggregation:
        secure = SecureClients.fresh(train, seed, seeded=privacy.seeded)
    return SimulationEngine(
        resources,
        train,
        handlers,
        bundles.objective,
        experiment.training,
        seed,
        participations,
        experiment.federation.rounds,
        store,
        ledger,
        frozenset(experiment.clients.newcomers),
        references=references_of(bundles.only),
        on_step=on_step,
        cohort=experiment.simulation.cohort,
        together=answers_together,
        secure=secure,
        wire=experiment.wire,
    )


def _cohort_warnings(
    experiment: Experiment,
    resources: Mapping[int, ClientResources],
    remote: RemoteEngine | None,
) -> tuple[str, ...]:
    """Return why clients are not trained together, where that was asked for."""
    asked = experiment.simulation.cohort
    if asked == 1:
        return ()
    if remote is not None:
        return (f"simulation.cohort = {asked!r} does nothing: clients are on other machines",)
    models = {id(own.model): own.model for own in resources.values()}
    reasons = sorted({reason_against(model) for model in models.values()} - {""})
    return tuple(f"simulation.cohort: clients are trained one by one: {own}" for own in reasons)


def _server_side(bundles: ModelBundles, public: PublicRows | None, ledger: Ledger) -> ServerSide:
    """Return what the method has on the server beside its state."""
    experiment, own = bundles.experiment, bundles.of_server
    federation, unseen = experiment.federation, set(experiment.clients.newcomers)
    members = 1 if bundles.method.pools_data else federation.clients - len(unseen)
    return ServerSide(
        own.model,
        bundles.objective,
        experiment.training,
        federation.seed,
        federation.participations(members),
        own.reader.max_length,
        own.width,
        public,
        ledger,
        min(federation.cohort_size, members),
        {client: key[1] for client, key in bundles.clients.items()},
        experiment.aggregation,
        federation.rounds,
        experiment.privacy.secure_aggregation,
        bundles.server_maker(),
    )


def _evaluation(
    bundles: ModelBundles, train: Mapping[int, TokenShare], remote: RemoteEngine | None
) -> tuple[Evaluator, UnseenClients]:
    """Return what judges the rounds, and what judges clients that join when training is over.

    Raises:
        DataError: A client that is in this process and must be judged has no held-out row.
    """
    experiment, division, method = bundles.experiment, bundles.division, bundles.method
    unseen, judged = frozenset(experiment.clients.newcomers), experiment.judges_clients
    here = judged and (remote is None or method.pools_data)
    held_out = bundles.client_held_out() if here else {}
    if remote is None:
        needing = train if method.personal and judged else {c: train[c] for c in unseen}
        _require_held_out(needing, held_out)
    kind = judged_kind(experiment, division.loaded.kind)
    evaluator = Evaluator(
        method,
        bundles.of_server.held_out,
        {c: bundles.common_held_out(c) for c in train} if method.own_models else {},
        {c: rows for c, rows in held_out.items() if c not in unseen},
        remote.judged if remote and judged else held_out.keys() - unseen,
        experiment.evaluation.every,
        experiment.federation.rounds,
        kind,
        experiment.evaluation.best_round_by is not None,
    )
    return evaluator, UnseenClients(
        method,
        sorted(unseen),
        {c: rows for c, rows in held_out.items() if c in unseen},
        experiment.clients.newcomer_steps,
        experiment.training.learning_rate,
        kind,
    )


def _prompts(bundles: ModelBundles) -> list[Example]:
    """Return the held-out examples to answer before and after; none of a classifier or a selector.

    Raises:
        DataError: There are held-out rows, and none is left after tokenising.
    """
    test, tokens = bundles.division.test, bundles.of_server.held_out.share.tokens
    readable = tokens.index.tolist()
    if test and not readable:
        reasons = sorted({lost.reason for lost in tokens.dropped})
        raise DataError(
            f"no row of the global held-out set is left after tokenising ({'; '.join(reasons)}); give "
            "other rows as data.test_source, or raise evaluation.max_length"
        )
    none = bool(bundles.division.classes) or bundles.objective.compares
    samples = 0 if none else bundles.experiment.evaluation.samples
    return [test[i] for i in readable[:samples]]


def _accounted(
    bundles: ModelBundles,
    public: PublicRows | None,
    models: Mapping[int, tuple[AdapterModel, TokenShare]],
) -> tuple[Accounts, tuple[BadRow, ...]]:
    """Return the accounts of rows after tokenising, and all malformed rows.

    Args:
        bundles: All models and the rows that they have read.
        public: Public rows as the server's model reads them.
        models: Model and training rows of each client, whose passes may need more memory than there is.

    Raises:
        DataError: With those that cannot be tokenised, too many rows are malformed.
    """
    experiment, division = bundles.experiment, bundles.division
    unread = len(division.public) - (len(public.share) if public is not None else 0)
    judged = bundles.of_server.held_out.share.tokens
    accounts = division.accounts.tokenised(bundles.read, bundles.judged, judged, unread)
    told = cut_warnings(accounts, division.loaded.kind, bundles.of_server.reader.max_length)
    told += escaped_warnings(accounts) + bundles.warnings()
    bad = bad_rows_in_all(experiment, division, bundles.read, bundles.judged, judged.dropped)
    told += pass_warnings(experiment.training, experiment.model.quantization, models)
    return replace(accounts, warnings=(*accounts.warnings, *told)), tuple(bad)


def _require_held_out(train: Mapping[int, TokenShare], held_out: Mapping[int, HeldOut]) -> None:
    """Check that every client has held-out rows of its own, as personal models need.

    Raises:
        DataError: Some have none; they are named with their number of rows.
    """
    without = [client for client in train if client not in held_out]
    if without:
        few = ", ".join(f"client {client} ({len(train[client])} rows)" for client in without[:5])
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        raise DataError(
            f"{few}{more} would have no held-out row to be judged by: use fewer clients, a larger "
            "partition.minimum or partition.client_test_fraction, or evaluation.per_client = false"
        )


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
