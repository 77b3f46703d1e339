"""Secure aggregation: sums are exact whoever drops out, and what would give a client away is refused."""

import hashlib
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy.stats import chisquare

from fedloom.errors import MessageError, RoundFailed
from fedloom.privacy.secure_aggregation import graph, primitives
from fedloom.privacy.secure_aggregation import protocol_messages as messages
from fedloom.privacy.secure_aggregation.client import ClientSession
from fedloom.privacy.secure_aggregation.primitives import Context, identity_of
from fedloom.privacy.secure_aggregation.server import ServerSession
from sampling import sampled

CONTEXT = Context("a run", 4, 0)
MODEL = hashlib.sha256(b"a model").digest()
ELEMENTS = 500


def secret(text):
    return hashlib.sha256(f"a secret of the test: {text}".encode()).digest()


@dataclass
class Players:
    """Clients and a server, played stage by stage."""

    number: int
    context: Context = CONTEXT
    salt: str = ""
    clients: dict = field(default_factory=dict)

    def __post_init__(self):
        identities = {c: secret(f"identity {c}") for c in range(self.number)}
        registry = {client: identity_of(key) for client, key in identities.items()}
        rng = np.random.default_rng(self.number)
        self.vectors = rng.integers(0, 2**20, (self.number, ELEMENTS), dtype=np.uint32)
        self.clients = {
            c: ClientSession(self.context, c, key, registry, secret(f"{self.salt} sum {c}"))
            for c, key in identities.items()
        }
        self.server = ServerSession(self.context, ELEMENTS, registry)

    def keys(self, away=()):
        for client in self.there(away):
            self.server.take_keys(client, self.clients[client].advertise())
        return self.server.keys()

    def shares(self, keys, away=()):
        for client in self.there(away):
            self.server.take_shares(client, self.clients[client].share(keys))
        return self.server.shares()

    def masked(self, shares, away=(), digests=None):
        found = {}
        for client in self.there(away):
            words = found[client] = self.vectors[client].copy()
            self.clients[client].mask(shares[client], (digests or {}).get(client, MODEL), words)
            self.server.take_masked(client, words)
        return found

    def signatures(self, away=()):
        listed = self.server.survivors_list()
        for client in self.there(away):
            self.server.take_signature(client, self.clients[client].confirm(listed))
        return self.server.signatures()

    def revealed(self, signatures, away=()):
        for client in self.there(away):
            self.server.take_revealed(client, self.clients[client].reveal(signatures))

    def there(self, away):
        self.clients = {c: own for c, own in self.clients.items() if c not in away}
        return list(self.clients)

    def play(self, away=((), (), (), (), ()), digests=None):
        """Play a sum in which clients drop out before each stage; return it and the right one."""
        shares = self.shares(self.keys(away[0]), away[1])
        self.masked(shares, away[2], digests)
        right = self.vectors[list(self.clients)].sum(0, dtype=np.uint32)
        self.revealed(self.signatures(away[3]), away[4])
        return self.server.unmasked(MODEL), right


def dropping(number, share, stage, seed=0):
    """Clients that drop out before one stage, or some before each."""
    order = random.Random(seed).sample(range(number), number)
    lost = int(share * number)
    if stage != "each":
        return tuple(order[:lost] if own == stage else () for own in range(5))
    return tuple(order[own:lost:5] for own in range(5))


@pytest.mark.parametrize("stage", [0, 1, 2, 3, 4, "each"])
@pytest.mark.parametrize("number", [3, 4, 10])
def test_the_sum_is_that_of_who_answered_whoever_drops_out(number, stage):
    found, right = Players(number).play(dropping(number, 0.3, stage))
    assert np.array_equal(found, right)


MANY = [
    (number, share, stage)
    for number in (20, 50, 51, 100, 200)
    for share in (0.1, 0.3)
    for stage in (0, 1, 2, 3, 4, "each")
]


@pytest.mark.parametrize("case", [(12, 0.3, 2), *sampled(MANY, 2)])
def test_sums_of_many_clients_are_exact(case):
    number, share, stage = case
    found, right = Players(number).play(dropping(number, share, stage, seed=number))
    assert np.array_equal(found, right)


def test_every_set_of_drop_outs_that_leaves_enough_gives_the_sum_and_no_other_does():
    for chosen in range(2**5):
        away = tuple(c for c in range(5) if chosen >> c & 1)
        players = Players(5)
        if len(away) <= 2:
            found, right = players.play(((), (), away, (), ()))
            assert np.array_equal(found, right)
        else:
            with pytest.raises(RoundFailed, match="masked answers, 3 must"):
                players.play(((), (), away, (), ()))


@pytest.mark.parametrize(
    ("stage", "what"),
    [
        (0, "2 clients sent their keys, 3 must"),
        (1, "2 clients sent their shares, 4 must"),
        (2, "2 clients sent their masked answers, 4 must"),
        (3, "2 clients signed the list of survivors, 4 must"),
        (4, "2 of 6 shares of client 0's self mask were revealed, 4 are needed"),
    ],
)
def test_below_the_threshold_the_sum_is_given_up_at_every_stage(stage, what):
    away = tuple((2, 3, 4, 5) if own == stage else () for own in range(5))
    with pytest.raises(RoundFailed, match=f"round 4: .*{what}"):
        Players(6).play(away)


def test_a_sum_of_two_is_refused_by_server_and_client():
    players = Players(3)
    with pytest.raises(RoundFailed, match="2 clients sent their keys, 3 must"):
        players.keys(away=(2,))
    players = Players(3)
    two = messages.listed({c: players.clients[c].advertise() for c in (0, 1)})
    with pytest.raises(MessageError, match="a sum of 2 clients is refused: 3 are the fewest"):
        players.clients[0].share(two)
    assert graph.LEAST == 3


def test_a_masked_vector_is_uniform_and_no_two_are_alike():
    def vectors(salt):
        players = Players(3, salt=salt)
        for row in players.vectors:
            row[:] = 7
        return players.masked(players.shares(players.keys()))

    first, second = vectors("one"), vectors("another")
    words = np.concatenate([*first.values(), *second.values()])
    for shift in (0, 8, 16, 24):
        counts = np.bincount((words >> np.uint32(shift)) & 0xFF, minlength=256)
        assert chisquare(counts).pvalue > 1e-4
    assert all(not np.array_equal(first[c], second[c]) for c in first)
    assert len({words.tobytes() for words in [*first.values(), *second.values()]}) == 6


def test_a_client_that_was_sent_another_model_makes_the_sum_noise():
    found, right = Players(4).play(digests={2: hashlib.sha256(b"another").digest()})
    assert np.count_nonzero(found == right) < 3


def test_keys_that_a_server_puts_in_place_of_a_clients_are_refused():
    players = Players(4)
    own = {c: client.advertise() for c, client in players.clients.items()}
    swapped = messages.Keys.read(own[1])
    middle = primitives.public_key(secret("of the server"))
    forged = messages.Keys(middle, middle, swapped.commitment, swapped.signature)
    with pytest.raises(MessageError, match="keys of client 1 are not signed by it"):
        players.clients[0].share(messages.listed({**own, 1: bytes(forged)}))
    with pytest.raises(MessageError, match="does not have this client's own"):
        players.clients[2].share(messages.listed({**own, 2: bytes(forged)}))


def test_keys_of_another_round_or_of_a_stranger_are_refused():
    players, earlier = Players(4), Players(4, Context("a run", 3, 0))
    own = {c: client.advertise() for c, client in players.clients.items()}
    replayed = messages.listed({**own, 1: earlier.clients[1].advertise()})
    with pytest.raises(MessageError, match="client 1 are not signed"):
        players.clients[0].share(replayed)
    with pytest.raises(MessageError, match="client 9 is not in the registry"):
        players.clients[2].share(messages.listed({**own, 9: own[1]}))


def test_a_key_that_would_make_the_shared_one_known_is_refused():
    with pytest.raises(MessageError, match="a public key for secure aggregation is none"):
        primitives.agreed(secret("x"), bytes(32), b"info")


def test_a_client_answers_each_stage_once():
    """So it never reveals both secrets of another: which one follows from the list that it has signed."""
    players = Players(4)
    shares = players.shares(players.keys())
    players.masked(shares)
    client = players.clients[0]
    with pytest.raises(MessageError, match="asks to share where confirm is due"):
        client.share(b"")
    players = Players(4)
    players.masked(players.shares(players.keys()))
    signatures = players.signatures()
    client = players.clients[0]
    client.reveal(signatures)
    with pytest.raises(MessageError, match="asks to reveal where nothing is due"):
        client.reveal(signatures)


def test_a_second_list_of_survivors_is_not_signed():
    players = Players(5)
    players.masked(players.shares(players.keys()))
    client = players.clients[0]
    client.confirm(messages.ids(range(5)))
    with pytest.raises(MessageError, match="asks to confirm where reveal is due"):
        client.confirm(messages.ids((0, 1, 2)))


def test_two_lists_of_survivors_reveal_nothing():
    """Half is told that client 4 answered, half that it dropped out: for both of its secrets."""
    players = Players(6)
    players.masked(players.shares(players.keys()))
    lists = {
        c: messages.ids(range(6)) if c < 3 else messages.ids((0, 1, 2, 3, 5)) for c in range(6)
    }
    signed = {c: players.clients[c].confirm(lists[c]) for c in (0, 1, 2, 3, 5)}
    for client in (0, 3):
        with pytest.raises(MessageError, match=r"[23] clients have signed"):
            players.clients[client].reveal(messages.listed(signed))


def test_a_share_of_a_survivors_key_is_never_revealed():
    players = Players(5)
    players.masked(players.shares(players.keys()), away=(4,))
    signatures = players.signatures()
    for client in players.clients.values():
        found = messages.entries_of(client.reveal(signatures), messages.REVEALED_BYTES)
        kinds = {other: messages.SECRETS[entry[0]] for other, entry in found.items()}
        assert kinds == {**dict.fromkeys(range(4), "self mask"), 4: "key"}


def test_a_list_without_the_client_or_with_others_is_not_signed():
    for listed in ((1, 2, 3, 4), (0, 1, 2, 3, 9)):
        players = Players(5)
        players.masked(players.shares(players.keys()))
        with pytest.raises(MessageError, match="list of survivors lacks this client"):
            players.clients[0].confirm(messages.ids(listed))


def test_a_survivor_whose_shares_never_came_is_refused():
    """Else a server could hide a client's shares and have its key revealed as a dropped one's."""
    players = Players(5)
    shares = players.shares(players.keys())
    held_back = {
        other: own
        for other, own in messages.entries_of(shares[0], messages.SEALED_BYTES).items()
        if other != 3
    }
    players.clients[0].mask(messages.listed(held_back), MODEL, players.vectors[0].copy())
    with pytest.raises(MessageError, match="a neighbour is listed whose shares never came"):
        players.clients[0].confirm(messages.ids(range(5)))


def test_shares_of_another_run_or_sent_twice_are_refused():
    players, other = Players(4), Players(4, Context("another run", 4, 0))
    shares, foreign = (own.shares(own.keys()) for own in (players, other))
    players.masked({**shares, 0: foreign[0]})
    signatures = players.signatures()
    with pytest.raises(MessageError, match="not of this client, run and round"):
        players.clients[0].reveal(signatures)
    twice = shares[1] + shares[1]
    with pytest.raises(MessageError, match="occurs twice"):
        messages.entries_of(twice, messages.SEALED_BYTES)


def test_a_masked_vector_that_comes_twice_is_refused():
    players = Players(3)
    found = players.masked(players.shares(players.keys()))
    with pytest.raises(MessageError, match="twice"):
        players.server.take_masked(0, found[0])


def test_a_wrong_share_is_found_before_the_sum_is_used():
    players = Players(3)
    players.masked(players.shares(players.keys()))
    signatures = players.signatures()
    for client, own in players.clients.items():
        revealed = messages.entries_of(own.reveal(signatures), messages.REVEALED_BYTES)
        if client == 1:
            revealed[0] = revealed[0][:1] + bytes(33)
        players.server.take_revealed(client, messages.listed(revealed))
    with pytest.raises(RoundFailed, match="shares of client 0's secrets do not fit its keys"):
        players.server.unmasked(MODEL)


def test_a_client_cannot_reveal_what_was_not_asked_for():
    players = Players(3)
    players.masked(players.shares(players.keys()))
    players.signatures()
    key = bytes([messages.SECRETS.index("key")]) + bytes(33)
    with pytest.raises(MessageError, match="was not asked for"):
        players.server.take_revealed(1, messages.listed({0: key}))
    with pytest.raises(MessageError, match="others than its neighbours"):
        players.server.take_revealed(1, messages.listed({8: key}))


@pytest.mark.parametrize("size", [1, 159, 161])
def test_messages_that_are_cut_short_are_refused(size):
    with pytest.raises(MessageError, match="keys have"):
        Players(3).server.take_keys(0, bytes(size))
    with pytest.raises(MessageError, match="no multiple"):
        messages.entries_of(bytes(size), messages.SEALED_BYTES)


def test_a_client_sends_little_beside_its_vector():
    """Keys, shares, signature and revealed shares of a sum of 50: below 8 kB."""
    players = Players(50)
    keys = players.keys()
    sent = len(players.clients[0].share(keys)) + messages.KEYS_BYTES + primitives.SIGNATURE_BYTES
    sent += 50 * (messages.ID_BYTES + messages.REVEALED_BYTES)
    assert sent < 8000


def test_the_keystream_is_that_of_the_standard():
    """RFC 8439, appendix A.1, test vector 1."""
    expected = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    assert primitives.expanded(bytes(32), 32).hex() == expected


def test_the_server_leaves_out_who_forges_its_keys_or_its_signature():
    """Passed on, forged keys would make every other client refuse, and the round would be lost."""
    players, others = Players(4), Players(4, Context("a run", 3, 0))
    for client, own in players.clients.items():
        if client == 1:
            with pytest.raises(MessageError, match="client 1 are not signed by it") as told:
                players.server.take_keys(1, others.clients[1].advertise())
            assert told.value.kind == "forged"
        else:
            players.server.take_keys(client, own.advertise())
    del players.clients[1]
    players.masked(players.shares(players.server.keys()))
    other = players.clients[0].confirm(players.server.survivors_list())
    with pytest.raises(MessageError, match="its signature is not of the list of survivors"):
        players.server.take_signature(2, other)
    with pytest.raises(MessageError, match="its signature is not of the list"):
        players.server.take_signature(2, b"short")
