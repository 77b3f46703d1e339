"""A client's own model for ``transformers`` alone: copied, as it stands, beside the weights of an export.

Nothing in it needs fedloom. ``Backbone`` is the one line that an export changes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM as Backbone
from transformers.modeling_outputs import SequenceClassifierOutput


class Head(nn.Module):
    """The bottleneck adapter and the output layer behind it."""

    def __init__(self, hidden: int, outputs: int, bottleneck: int, bias: bool) -> None:
        """Make one; ``bottleneck`` is its width, 0 for none."""
        super().__init__()
        self.down = nn.Linear(hidden, bottleneck) if bottleneck else None
        self.up = nn.Linear(bottleneck, hidden) if bottleneck else None
        self.output = nn.Linear(hidden, outputs, bias=bias)

    @property
    def weight(self) -> torch.Tensor:
        """The output layer's weight."""
        return self.output.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return ``(..., outputs)`` for ``(..., hidden)``."""
        if self.down is not None and self.up is not None:
            states = states + self.up(F.gelu(self.down(states)))
        outputs: torch.Tensor = self.output(states)
        return outputs


class PersonalForCausalLM(Backbone):
    """The backbone with a client's own bottleneck and LM head."""

    def __init__(self, config: Any) -> None:
        """Put the client's head where the backbone's is."""
        super().__init__(config)
        own = config.personal
        self.set_output_embeddings(
            Head(own["hidden"], own["outputs"], own["bottleneck"], own["bias"])
        )
        self.post_init()


class PersonalForSequenceClassification(Backbone):
    """The backbone with a client's own bottleneck and reward head: one number a text."""

    def __init__(self, config: Any) -> None:
        """Put the reward head where the backbone's output layer is."""
        super().__init__(config)
        own = config.personal
        self.set_output_embeddings(Head(own["hidden"], 1, own["bottleneck"], False))
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Return ``logits`` ``(texts, 1)``: the reward of each text, read at its last token."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        output = self.base_model(input_ids=input_ids, attention_mask=attention_mask)
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask * columns).argmax(-1)
        states = output.last_hidden_state[torch.arange(len(last), device=last.device), last]
        return SequenceClassifierOutput(logits=self.get_output_embeddings()(states))
