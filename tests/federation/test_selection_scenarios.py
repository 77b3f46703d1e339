"""Where selections that go by losses pay and where they harm: linear clients with noisy labels, or slow ones."""

import numpy as np
import pytest

from fedloom.federation.presence import Presence
from fedloom.federation.selection import SELECTIONS, draw, make_selection
from fedloom.federation.selection_contract import Observation, Told
from fedloom.randomness import generator

ROWS, FEATURES, CLIENTS, DRAWN = 30, 6, 12, 3


def clients(seed, noisy):
    """Four that are fast and clean, four that are fast (their labels noise, if noisy), four that are slow."""
    rng = np.random.default_rng(seed)
    truth, found = rng.normal(size=FEATURES), []
    for client in range(CLIENTS):
        x = rng.normal(size=(ROWS, FEATURES))
        noise = 3.0 if noisy and 4 <= client < 8 else 0.05
        found.append((x, x @ truth + noise * rng.normal(size=ROWS), 4.0 if client >= 8 else 1.0))
    return truth, found


def trained(w, x, y, rate):
    """Return what five steps of gradient descent make of ``w``, and their mean loss."""
    losses = []
    for _ in range(5):
        error = x @ w - y
        losses.append(float((error**2).mean() / 2))
        w = w - rate * x.T @ error / len(y)
    return w, float(np.mean(losses))


def told(w, x, y):
    losses = (x @ w - y) ** 2 / 2
    return Told(float(losses.mean()), float(np.sqrt((losses**2).mean())))


def distance(name, seed, *, noisy, seconds, rate):
    """Return the mean squared distance to the truth after so many simulated seconds of rounds."""
    truth, federation = clients(seed, noisy)
    selection = make_selection(SELECTIONS[name][0]())
    presence = Presence.of(dict.fromkeys(range(CLIENTS), ROWS))
    w, now, round, last = np.zeros(FEATURES), 0.0, 0, []
    while now < seconds:
        round, before = round + 1, {}
        if selection.asks == "candidates":
            asked = selection.candidates(
                presence, DRAWN, generator(seed, "candidates", round=round)
            )
            before = {client: told(w, *federation[client][:2]) for client in asked}
        selection.begin(round, before)
        drawn = draw(selection, presence, DRAWN, seed, round)
        if selection.asks == "drawn":
            before = {client: told(w, *federation[client][:2]) for client in drawn}
        answers = {client: trained(w, *federation[client][:2], rate) for client in drawn}
        w = np.mean([own for own, _ in answers.values()], 0)
        now += max(federation[client][2] for client in drawn)
        observed = {
            client: Observation(True, ROWS, before.get(client), loss, federation[client][2])
            for client, (_, loss) in answers.items()
        }
        selection.observe(round, observed)
        last = [*last[-2:], float(((w - truth) ** 2).mean())]
    return float(np.mean(last))


def median(name, **own):
    return float(np.median([distance(name, seed, **own) for seed in range(10)]))


@pytest.mark.slow
def test_with_noisy_labels_large_losses_lead_astray_and_relative_drops_do_not():
    """Power-of-choice and Oort look for the clients of which nothing can be learnt."""
    found = {
        name: median(name, noisy=True, seconds=120, rate=0.1)
        for name in ("uniform", "power_of_choice", "oort", "flash")
    }
    assert found["flash"] < found["uniform"] < found["power_of_choice"] < found["oort"]


@pytest.mark.slow
def test_with_clean_labels_oort_is_nearer_at_equal_seconds():
    uniform, oort = (
        median(name, noisy=False, seconds=200, rate=0.005) for name in ("uniform", "oort")
    )
    assert oort < 0.8 * uniform
