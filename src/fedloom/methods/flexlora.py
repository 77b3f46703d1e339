"""FlexLoRA: the mean of the clients' products, of which each gets as much as its rank can hold.

Source: Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources", https://arxiv.org/abs/2402.11505. The mean is cut to each rank by its singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedloom.aggregation.lora import nearest, rank_of, stacked
from fedloom.methods.bases.rank_slices import SharesRanks, Slice, SlicesSettings, flat
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import (
    AVERAGED,
    CODED_CHANGES,
    EACH_ANSWER,
    OWN_STEPS,
    PRODUCT_BITS,
    PRODUCTS_UNBOUNDED,
    TOGETHER,
    Declaration,
)
from fedloom.tensors import Tensors


class FlexLoRASettings(SlicesSettings):
    """``[method] name = "flexlora"``."""

    name: Literal["flexlora"] = "flexlora"


class FlexLoRA(SharesRanks):
    """The nearest adapters of each client's rank to the mean of products."""

    declares = Declaration(
        "FlexLoRA",
        "https://arxiv.org/abs/2402.11505",
        "adapted",
        'each slice of ranks is averaged over its holders; slices = "padded" is the paper\'s',
        "FedLLM",
        "the adapter at the client's rank, down and up",
        "nothing",
        secure_aggregation=EACH_ANSWER,
        client_privacy=PRODUCTS_UNBOUNDED,
        row_privacy=OWN_STEPS,
        asynchronous=TOGETHER,
        compression=CODED_CHANGES,
        compression_bits=PRODUCT_BITS,
        absence=AVERAGED,
    )
    reveals = ADAPTERS_ALONE
    taken = ("slices",)

    def combined(self, held: Sequence[Slice], before: Tensors) -> Tensors:
        """Return the nearest factors to the mean of products."""
        return nearest(stacked(*flat(held)), rank_of(before), None if self.padded else before)
