"""SIGTERM is Ctrl-C: what is whole is saved, and the message says how to go on."""

import os
import signal

import pytest

import fedloom
from fedloom.errors import Interrupted
from fedloom.runs.observers import Silent
from fedloom.runs.stopping import Terminated, terminable


def test_sigterm_raises_once_and_is_what_it_was_afterwards():
    before = signal.getsignal(signal.SIGTERM)

    def ended():
        with terminable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # impatient: the saving goes on

    with pytest.raises(Terminated):
        ended()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_a_run_that_is_told_to_end_saves_its_rounds_and_says_how_to_go_on(experiment, tmp_path):
    class Ending(Silent):
        def round_done(self, record):
            if record.round == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with (
        pytest.raises(
            Interrupted, match=r"everything up to round 1 is saved. Go on with: fedloom run"
        ),
        terminable(),
    ):
        fedloom.run(experiment(output={"checkpoint_every": 50}), observer=Ending())
    resumed = fedloom.resume(tmp_path / "run")
    whole = fedloom.run(experiment(output={"folder": str(tmp_path / "whole")}))
    assert resumed.metrics == whole.metrics
