"""A server that asks a client's worker whatever it likes, one message at a time."""

import itertools

from fedloom.experiment.experiment import Experiment
from fedloom.methods.bases.parameter_averaging import TRAIN_REPLY_NUMBERS
from fedloom.settings.toml import write_toml
from fedloom.training.results import reported
from fedloom.wire.envelope import Envelope, ReplyHeader, RequestHeader, seal
from fedloom.wire.messages import Payload, encode
from fedloom.wire.schema import NumberSpec, Schema


class HostileServer:
    """Stands for a server whose messages are let in: it was honest when the client joined."""

    def __init__(self, worker):
        self.worker = worker
        self.runs, self.numbers = itertools.count(1), itertools.count(1)

    def send(self, payload=b"", **header):
        """Send a message; return the reply whole and its header."""
        asked = RequestHeader(
            **{"began": [-1], "client": 0, "number": next(self.numbers), **header}
        )
        packed = self.worker.answer(seal(asked, payload).pack(), streamed=True)
        envelope = Envelope.unpack(packed)
        return envelope, envelope.read(ReplyHeader)

    def join(self, table, classes=(), run=None):
        """Ask to get ready for an experiment, given as a table or as its text; return run and reply."""
        run = run or f"{next(self.runs):032x}"
        text = table if isinstance(table, str) else write_toml(table)
        envelope, reply = self.send(kind="join", run=run, experiment=text, classes=list(classes))
        return run, envelope, reply

    def exchange(self, run, action="train", round=1, numbers=None, request=None, reply=None):
        """Ask for an action with the adapter that the client has; return the reply's header."""
        parts = self.worker.run.parts
        (equipment,) = parts.local.resources.values()
        adapter = equipment.initial
        numbers = {"learning_rate": 1e-3} if numbers is None else numbers
        schema = Schema.of(adapter, tuple(map(NumberSpec, numbers)))
        answer = Schema.of(adapter, TRAIN_REPLY_NUMBERS, reported(parts.objective))
        _, header = self.send(
            encode(Payload(adapter, numbers), schema),
            kind="exchange", run=run, action=action, round=round, client=self.worker.registration.number,
            request=request or schema.to_table(), reply=reply or answer.to_table(),
        )  # fmt: skip
        return header


def whole(table):
    """Return a table's experiment as the runner would send it."""
    return Experiment.from_table(table).to_toml()
