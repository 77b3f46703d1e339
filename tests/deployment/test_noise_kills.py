"""A client that adds noise to sums is killed at random moments: its own ledger never counts too little.

Its worker is a process, which notes each noise that it draws in a file of the test's own before anything
is sent. What it has sent is what came out of it. The other clients live on.
"""

import multiprocessing
import threading

import pytest
from flwr.app import Error, Message

from deployment.test_distributed_noise import DEMANDED, SHARED
from deployment.test_secure_sums import Site
from fedloom.deployment.folders import ClientFolder
from fedloom.deployment.secure_sums import COUNTED
from fedloom.deployment.worker import Worker
from fedloom.wire.envelope import Envelope, ReplyHeader, RequestHeader
from loopback import of
from noted_noise import note_into, releases
from sampling import drawn, tries

VICTIM = 2


def work(home, noted, pipe):
    """Answer what comes over a pipe, until this process is killed."""
    note_into(noted)
    worker = Worker(ClientFolder(home))
    while True:
        pipe.send_bytes(worker.answer(pipe.recv_bytes(), streamed=False))


class Died(Exception):
    """The process ended over a message."""


class Victim:
    """Stands for a client's worker: a process that is killed at random moments, and started again."""

    def __init__(self, home, noted, rng, kills):
        self.home, self.noted, self.rng, self.left = home, noted, rng, kills
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["noted_noise", "fedloom.deployment.worker"])
        self.sent, self.counted, self.deaths, self.repeated = set(), 0, 0, 0
        self.start()

    def start(self):
        self.pipe, other = self.context.Pipe()
        self.process = self.context.Process(target=work, args=(self.home, self.noted, other))
        self.process.start()
        other.close()
        self.due = self.rng.randrange(1, 8)  # messages until the next kill: a sum takes five

    def ask(self, packed):
        try:
            self.pipe.send_bytes(packed)
            return self.pipe.recv_bytes()
        except (EOFError, OSError):
            raise Died from None

    def answer(self, packed, streamed):
        header = Envelope.unpack(packed).read(RequestHeader)
        self.due -= header.kind == "exchange"  # the run begins with all clients
        if self.left and self.due <= 0:
            after = 0.0 if self.rng.random() < 0.2 else self.rng.uniform(0, 0.3)
            threading.Timer(after, self.process.kill).start()
        try:
            reply = self.ask(packed)
            self.take(header, reply)
            if header.summed is not None and self.rng.random() < 0.3:
                self.again(packed, reply)
            return reply
        except Died:
            self.process.join()
            self.deaths, self.left = self.deaths + 1, self.left - 1
            self.pipe.close()
            self.start()
            self.count()
            before = self.noises()
            lost = Envelope.unpack(self.ask(packed)).read(ReplyHeader)
            assert header.kind == "join" or lost.error  # it has neither the run nor the sum's keys
            assert self.noises() == before
            raise

    def noises(self):
        """How often noise was drawn."""
        return len(self.noted.read_text().splitlines()) if self.noted.exists() else 0

    def again(self, packed, reply):
        """Ask the same once more: it is the same answer with the same noise."""
        before = self.noises(), self.count()
        assert self.ask(packed) == reply
        assert (self.noises(), self.count()) == before
        self.repeated += 1

    def take(self, header, packed):
        """Note a masked answer that has come out."""
        envelope = Envelope.unpack(packed)
        if header.action == "train" and envelope.read(ReplyHeader).error is None:
            self.sent.add(envelope.payload)
        self.count()

    def count(self):
        """Return the lines of its ledger: as many as noises, which are as many as answers, at least."""
        lines = [
            line for own in self.home.rglob(COUNTED) for line in own.read_text().splitlines(True)
        ]
        assert all(line.endswith("\n") for line in lines)
        drawn_ = len(releases(self.noted))
        assert len(lines) >= drawn_ >= len(self.sent), "counted too little"
        assert len(lines) <= drawn_ + self.deaths  # written down, not drawn yet
        assert len(lines) >= self.counted, "what was counted is forgotten"
        self.counted = len(lines)
        return self.counted


@pytest.mark.parametrize("kills", tries(2, 20))
def test_a_client_that_is_killed_at_random_moments_never_counts_too_little(
    table, loopback, tmp_path, kills
):
    rounds = 3 * kills
    site = Site(
        table, loopback, tmp_path, privacy=SHARED, policies=dict.fromkeys(range(4), DEMANDED),
        rounds=rounds,
    )  # fmt: skip
    home, noted = site.federation.home(VICTIM).path, tmp_path / "noted"
    victim = Victim(home, noted, drawn("noise of a client", kills), kills)
    site.mail.workers[100 + VICTIM] = victim
    plain = site.mail._reply

    def reply(node, message):
        try:
            return plain(node, message)
        except Died:
            return Message(Error(code=1, reason="its worker died"), reply_to=message)

    site.mail._reply = reply
    try:
        outcome = site.run()
    finally:
        victim.process.kill()
        victim.process.join()
    assert victim.deaths == kills and victim.repeated
    assert victim.count() >= len(victim.sent) >= rounds - kills
    assert len(outcome.rounds) == rounds
    present = sum(of(record, VICTIM) is None for record in outcome.rounds)
    assert 0 < present <= len(victim.sent)
    print(
        f"{victim.deaths} kills; {victim.counted} sums counted, {len(releases(noted))} noises drawn, "
        f"{len(victim.sent)} answers sent, {present} in sums; {victim.repeated} messages came twice"
    )
