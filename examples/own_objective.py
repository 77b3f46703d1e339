"""An objective of one's own: a hinge on the difference of log-probs (Zhao et al. 2023, SLiC-HF).

    python examples/own_objective.py

An experiment file can name the class too, with PYTHONPATH=examples: `name = "own_objective:Hinge"`;
docs/write_a_method.md says how it gets settings of its own then.
"""

import torch

import fedloom


class Hinge(fedloom.Objective):
    """max(0, margin - (log p(chosen) - log p(rejected))), https://arxiv.org/abs/2305.10425."""

    kind = "preference"
    accepts = ("preference",)
    margin = 1.0

    def loss(self, model, batch, statistics):
        """Return the mean over the pairs of a batch; of its sequences the first half is chosen."""
        own = batch.sequences
        logits = model(input_ids=own.input_ids, attention_mask=own.attention_mask).logits
        logps = torch.log_softmax(logits[:, :-1].float(), dim=-1)
        logps = logps.gather(-1, own.input_ids[:, 1:, None]).squeeze(-1)
        chosen, rejected = (logps * own.completion_mask[:, 1:]).sum(-1).chunk(2)
        return torch.relu(self.margin - (chosen - rejected)).mean(), {}


if __name__ == "__main__":
    result = fedloom.run(
        {
            "data": {"source": "builtin:preferences", "builtin_rows": 400},
            "federation": {"clients": 4, "rounds": 3},
            "training": {"learning_rate": 3e-3},
        },
        objective=Hinge(),
    )
    before, after = (m["likelihood_accuracy"] for m in (result.metrics_before, result.metrics))
    print(f"chosen answers that are the likelier ones: {before:.3f} -> {after:.3f}")
