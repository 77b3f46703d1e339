"""Schedules by which clients are absent, played in one process and between machines."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedloom.federation.admission import Admission
from fedloom.federation.compressed_exchange import Compression
from fedloom.federation.presence import Membership
from fedloom.federation.rounds import Server
from fedloom.federation.secure_exchange import SecureAggregation
from fedloom.runs.answer_order import order_of_answers
from fedloom.runs.assembly import assemble
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.training.optimizers import round_learning_rate
from fedloom.training.results import reported
from fedloom.wire.envelope import ReplyHeader, RequestHeader
from fedloom.wire.messages import Answer, decode

CLIENTS, ROUNDS = 4, 4


@dataclass(frozen=True)
class Schedule:
    """Who is absent when.

    Attributes:
        away: Clients that are not there, by round.
        late: Clients whose answers come after the deadline, by round.
        left: Clients that leave for good, with the first round without them.
        backwards: Whether answers arrive in the order opposite to the clients'.
    """

    away: Mapping = field(default_factory=dict)
    late: Mapping = field(default_factory=dict)
    left: Mapping = field(default_factory=dict)
    backwards: bool = False

    def gone(self, round):
        """Clients that have left by a round."""
        return {client for client, first in self.left.items() if first <= round}

    def missing(self, round):
        """Clients that cannot be asked in a round."""
        return self.away.get(round, set()) | self.gone(round)

    def answering(self, round):
        """Clients whose answers count in a round."""
        return set(range(CLIENTS)) - self.missing(round) - self.late.get(round, set())


SCHEDULES = {
    "comes late": Schedule(away={1: {3}, 2: {3}}),
    "answers late": Schedule(late={1: {2}, 3: {0}}),
    "away once": Schedule(away={2: {1}}),
    "left": Schedule(left={1: 3}),
    "back with old state": Schedule(away={2: {1}, 3: {1}}),
    "one only": Schedule(away={3: {0, 1, 3}}),
    "backwards": Schedule(away={2: {0}}, backwards=True),
}

ALL_OF_IT = Schedule(
    away={1: {3}, 2: {1}, 3: {1}}, late={2: {2}, 3: {0}}, left={2: 4}, backwards=True
)
"""Client 3 comes late; 1 is away twice and back with old state; 2 and then 0 answer late; 2 leaves. So in
round 3 the answer of client 3 alone counts, after 2 has come back from its late one with an older state."""


class AbsentEngine:
    """An engine whose clients are absent as a schedule says.

    Attributes:
        done: The last round that is over.
        seen: Action, round, client, request and reply of each answer that counts and is not compressed.
    """

    def __init__(self, engine, schedule, done=0):
        self.engine, self.schedule, self.done = engine, schedule, done
        self.met, self.seen = {}, []

    def sizes(self):
        missing = self.schedule.missing(self.done + 1)
        there = {c: n for c, n in self.engine.sizes().items() if c not in missing}
        self.met |= there
        return there

    def membership(self):
        whole = self.engine.membership()
        left = frozenset(self.schedule.gone(self.done + 1))
        return Membership(whole.enrolled, left, dict(self.met))

    def absent(self):
        return {}

    def title(self, client):
        return f"client {client}"

    def exchange(self, exchange):
        self.done = exchange.round
        answers = list(self.engine.exchange(exchange))
        for answer in reversed(answers) if self.schedule.backwards else answers:
            if answer.client in self.schedule.late.get(exchange.round, set()):
                yield Answer(answer.client, error="too late")
                continue
            if answer.error is not None or exchange.plain is not None:  # the latter is compressed
                yield answer
                continue
            request = decode(exchange.requests[answer.client], exchange.request_schema)
            reply = decode(answer.data, exchange.reply_schema)
            self.seen.append((exchange.action, exchange.round, answer.client, request, reply))
            yield answer

    def discard(self, clients):
        self.engine.discard(clients)

    def signing_keys(self):
        return self.engine.signing_keys()


@dataclass
class Played:
    """What came of rounds in one process: the parts, the state after each, what was said, the records."""

    parts: object
    states: list
    seen: list
    records: list

    def of(self, action, round):
        """Requests and replies of an action in a round that counted, by client."""
        return {c: (q, r) for a, n, c, q, r in sorted(self.seen, key=lambda own: own[:3])
                if (a, n) == (action, round)}  # fmt: skip

    def kept(self, client, slot):
        return self.parts.engine.store.slots(client).get(slot, {})


def played(experiment, schedule, parts=None):
    """Play an experiment in one process, or with the parts that are given."""
    parts = parts or assemble(experiment, partition_data(experiment))
    states, records, seed = [], [], experiment.federation.seed
    engine = AbsentEngine(parts.engine, schedule)

    def finish(record, state):
        parts.engine.finish_round()
        states.append(state)
        records.append(record)

    server = Server(
        parts.method, engine, experiment.federation,
        lambda round: round_learning_rate(experiment.training, round, experiment.federation.rounds),
        lambda state, round: None, finish, parts.ledger, Silent(), Admission(experiment.admission),
        reported=reported(parts.objective), clock=order_of_answers(experiment),
        means_alone=parts.method.means_alone,
        secure=SecureAggregation.of(experiment.privacy, "run"),
        compression=Compression.of(experiment.wire, seed, parts.initial),
    )  # fmt: skip
    server.run(parts.method.initial_state(parts.initial), 0)
    return Played(parts, states, engine.seen, records)


def absent_on_machines(mail, federation, schedule):
    """Have the clients of a federation on machines be absent as a schedule says.

    The mail's ``done`` is the last round that was over before all that it has pushed.
    """
    nodes, revoked, mail.done = mail.get_nodes, set(), 0

    def get_nodes():
        headers = [envelope.read(RequestHeader) for _, envelope in mail.pushed]
        round = 1 + max((h.round for h in headers if h.kind == "exchange"), default=mail.done)
        mail.offline = {100 + client for client in schedule.away.get(round, set())}
        for client in schedule.gone(round) - revoked:
            federation.members().revoke(f"client-{client}")
            revoked.add(client)
        return nodes()

    def tamper(node, envelope):
        header = envelope.read(ReplyHeader)
        late = not header.joined and node - 100 in schedule.late.get(header.round, set())
        return None if late else envelope

    mail.get_nodes, mail.tamper = get_nodes, tamper
    if schedule.backwards:
        mail.order = lambda messages: list(reversed(messages))
