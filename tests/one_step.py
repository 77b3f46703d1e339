"""One optimizer step, for its gradients and what it reports."""

import torch

from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import train_locally


def gradients(objective, model, share, **settings):
    """Return the gradients of one optimizer batch of all rows, as one vector, and what was reported."""
    found = {}

    def note(parameters):
        found.update({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})

    start = model.read()
    result = train_locally(
        model,
        share,
        objective,
        TrainingSettings(batch_size=len(share), max_grad_norm=0, **settings),
        learning_rate=1e-3,
        seed=0,
        client=0,
        round=1,
        work=Work(steps=1),
        before_step=note,
    )
    model.write(start)
    return torch.cat([found[name].flatten() for name in sorted(found)]).double(), result
