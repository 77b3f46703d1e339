"""Fed-ET: an ensemble of clients' small models teaches a larger one on the server.

Source: Cho et al. 2022, "Heterogeneous Ensemble Knowledge Transfer for Training Large Models in Federated
Learning", https://arxiv.org/abs/2204.12703, with the rule of a public re-implementation: with z_k what
client k says of a public position, and Var the variance over its classes or tokens,

    alpha_k = Var z_k / sum_j Var z_j,   y = argmax sum_k alpha_k z_k,

and z_div the same mean over those clients alone whose likeliest entry is not y, the server's model
minimises CE(z_S, y) + diversity KL(softmax z_div || softmax z_S), the divergence where somebody
disagrees.

A reconstruction: the full text was not available. Logits travel in place of the small models, whose
owners keep them, so no client's model is averaged with another's; the paper's shared representation
layer, by which clients learn from the server, is replaced by distillation of what the server's model says
(``down``), as widths of unlike models do not match. Optimizer and passes are those of ``[training]``.
Of a few likeliest entries the variance is that after the rest is filled evenly.

A client that is sure of what it does not know gets more weight, not less: the rule is made for clients
that are unreliable and therefore unsure, and does not help where each knows its own classes alone. What
a client can claim is bounded by what the others say (``aggregation/ensemble.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from fedloom.aggregation.ensemble import ensemble_labels
from fedloom.aggregation.soft_labels import SoftLabels
from fedloom.data.public import PublicRows
from fedloom.federation.protocol import Cohort
from fedloom.methods.bases.logit_exchange import (
    TAKEN,
    Lesson,
    LogitExchange,
    exchanging_logits,
)
from fedloom.methods.bases.logit_wire import LogitSettings
from fedloom.methods.contract.method import Reveal
from fedloom.objectives.distillation import EnsembleDistillation
from fedloom.reports.sections.spec import SectionSpec
from fedloom.wire.messages import Reply

DISAGREEMENT, SHARE = "disagreement", "ensemble_share"
"""In the rounds' details: the share of positions at which some client disagrees, and each client's mean
alpha by id."""


class FedETSettings(LogitSettings):
    """``[method] name = "fed_et"``."""

    name: Literal["fed_et"] = "fed_et"
    diversity: float = Field(default=0.05, ge=0)
    """Weight of what those clients say who disagree (a re-implementation: 0.05); 0 is learning the
    consensus alone."""


class FedET(LogitExchange):
    """The server's model learns what sure clients say, and something of what the others do."""

    declares = exchanging_logits(
        "Fed-ET",
        "https://arxiv.org/abs/2204.12703",
        "reconstructed",
        "logits in place of small models; clients learn from the server's logits, no layer is shared; a "
        "client's variance counts up to 4 times the median",
    )
    reveals: frozenset[Reveal] = frozenset({"logits"})
    taken = ("diversity", *TAKEN)
    sections = (
        SectionSpec(
            "line_chart",
            "Fed-ET's clients disagree",
            "Share of the round's public positions at which some client's likeliest entry is not the "
            "ensemble's.",
            DISAGREEMENT,
        ),
        SectionSpec(
            "client_table",
            "Fed-ET's weights",
            "Mean weight of each client in the ensemble: it follows how sure a client is, whether it is "
            "right or not.",
            SHARE,
        ),
    )

    def __init__(self, settings: FedETSettings) -> None:
        """Keep the settings."""
        self.settings, self.diversity = settings, settings.diversity

    def lesson(
        self,
        answers: Sequence[SoftLabels],
        replies: Sequence[Reply],
        public: PublicRows,
        cohort: Cohort,
    ) -> Lesson:
        """Return the consensus by confidence, and what those say who disagree."""
        consensus, taught, shares = ensemble_labels(answers)
        cohort.details[DISAGREEMENT] = float(taught.disagreed.double().mean())
        known = zip(replies, shares, strict=True)
        cohort.details[SHARE] = {str(reply.client): share for reply, share in known}
        head = self.server.objective.head
        return Lesson(taught, EnsembleDistillation(head, self.diversity), consensus)
