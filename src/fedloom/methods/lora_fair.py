"""LoRA-FAIR: the server corrects the mean of B, so that its product with the mean A is nearer mean B A.

    A = sum_k p_k A_k,   B = sum_k p_k B_k + dB,   dB = argmin ||W - B A||_F^2 + strength ||dB||_F^2

with W = sum_k p_k B_k A_k. Source: Bian et al. 2024, "LoRA-FAIR: Federated LoRA Fine-Tuning with
Aggregation and Initialization Refinement", https://arxiv.org/abs/2411.14961. The paper maximises the
cosine of W and B A by many steps of SGD, whose result depends on where they begin, as a cosine knows no
size; the squared distance has a closed form in r x r matrices. That is a reconstruction. What lies
outside the rows of the mean A stays lost: it is not exact as FedEx-LoRA is.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedloom.aggregation.lora import corrected_mean, error_flops, product_error
from fedloom.federation.protocol import Cohort, Round
from fedloom.methods.bases.parameter_averaging import train_and_upload, training_exchange
from fedloom.methods.contract.averaging import AFFORDABLE, weights_of
from fedloom.methods.contract.checks import require_linear_layers
from fedloom.methods.contract.client import Handler
from fedloom.methods.contract.method import (
    ADAPTERS_ALONE,
    Method,
    ServerSide,
)
from fedloom.methods.declaration import (
    AVERAGED,
    CODED_PRODUCTS,
    EACH_ANSWER,
    OWN_STEPS,
    PRODUCT_BITS,
    PRODUCTS_UNBOUNDED,
    TOGETHER,
    Declaration,
)
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import State


class LoRAFAIRSettings(NamedSettings):
    """``[method] name = "lora_fair"``."""

    name: Literal["lora_fair"] = "lora_fair"
    strength: float = Field(default=0.01, ge=0)
    """lambda, of the term that keeps the correction of B small; 0: the best B for the mean A."""


class LoRAFAIR(Method):
    """FedAvg of LoRA's factors with a correction of B."""

    declares = Declaration(
        "LoRA-FAIR",
        "https://arxiv.org/abs/2411.14961",
        "reconstructed",
        "squared distance with a closed form in place of a cosine and SGD",
        "FedLLM",
        "the adapter, down and up",
        "nothing",
        secure_aggregation=EACH_ANSWER,
        client_privacy=PRODUCTS_UNBOUNDED,
        row_privacy=OWN_STEPS,
        asynchronous=TOGETHER,
        compression=CODED_PRODUCTS,
        compression_bits=PRODUCT_BITS,
        absence=AVERAGED,
        problem="the product of mean factors is not the mean of products",
    )
    reveals = ADAPTERS_ALONE
    taken = ("strength",)
    two_factors = True

    def __init__(self, settings: LoRAFAIRSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    def setup(self, server: ServerSide) -> None:
        """Check that the factors are of linear layers.

        Raises:
            ModelError: Some are of a stack of experts.
        """
        super().setup(server)
        require_linear_layers(server.model.stacked, 'method.name = "lora_fair"')

    def round(self, state: State, cohort: Cohort) -> Round:
        """Send the adapter, average what comes back and correct B."""
        replies = yield training_exchange(cohort, state.tensors)
        weights = weights_of(replies, by_rows=True)
        adapters = [reply.payload.tensors for reply in replies]
        found = corrected_mean(adapters, weights, self.settings.strength)
        if error_flops(adapters) <= AFFORDABLE:
            error = product_error(found, adapters, [own / sum(weights) for own in weights])
            cohort.notes.update({} if error is None else {"aggregation_error": error})
        return State(found)

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"train": train_and_upload}
