"""FedBis: one binary selector of preferences, federated; it labels pairs that DPO is then trained on.

Source: Wu et al. 2024, "Towards Federated RLHF with Aggregated Client Preference for LLMs",
https://arxiv.org/abs/2407.03038. Clients train a language model to say which of two answers is better
(``objective.name = "selector"``), the server averages; ``fedloom label`` has the result judge pairs.
With another objective, and ``step = "mean"``, it is FedAvg.

The published code moves by sum_k (w_k - w) / N over those that answered, which is the share of the mean's
step that they are of all N clients: ``step = "damped"``, with means by rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import train_and_upload, training_exchange
from fedloom.methods.bases.selectors import Step, stepped
from fedloom.methods.contract.client import Handler
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE, Method
from fedloom.methods.declaration import TOGETHER, averaging
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State


class FedBisSettings(NamedSettings):
    """``[method] name = "fedbis"``."""

    name: Literal["fedbis"] = "fedbis"
    step: Step = "mean"
    """mean: to the mean of answers; damped: of that way the share that those who answered are of all
    clients (published)."""


class FedBis(Method):
    """Federated averaging of a selector."""

    declares = averaging(
        "FedBis",
        "https://arxiv.org/abs/2407.03038",
        "adapted",
        "each pair is asked in both orders; the whole step to the mean, by rows, unless damped",
        asynchronous=TOGETHER,
        problem="preferences are private; a judge is wanted that labels pairs for DPO",
    )
    reveals = ADAPTERS_ALONE
    taken = ("step",)
    averages = True

    def __init__(self, settings: FedBisSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that how many answered is no secret of a damped step."""
        yield from super().check(view)
        hidden = view.privacy is not None and view.privacy.unit == "client"
        if hidden and view.method.step == "damped":
            yield (
                'privacy.unit = "client": method.step = "damped" goes a share of the way that tells '
                'exactly how many clients answered, without noise: use method.step = "mean"'
            )

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, go towards the mean of what comes back."""
        replies = yield training_exchange(cohort, state.tensors)
        answered, members = len(replies.answered), len(cohort.presence.members)
        mean = self.averaged(replies, cohort, state.tensors, noted=True)
        return State(stepped(state.tensors, mean, self.settings.step, answered, members))

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": train_and_upload}
