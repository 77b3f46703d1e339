"""Settings of objectives that train on answers which the policy generates and which are rewarded."""

from __future__ import annotations

from pydantic import Field

from fedloom.rewards.functions import fault_of
from fedloom.settings.schema import NamedSettings


class RewardedSettings(NamedSettings):
    """What settings of objectives with rewards have in common."""

    rewards: list[str] = Field(default=["exact_match"], min_length=1, max_length=16)
    """What answers are rewarded for, added up: exact_match, number (the last number is the reference's),
    regex:PATTERN, unit_tests (the answer is Python that passes the reference, run in a process with
    limits that are no security boundary: docs/grpo.md), reward_model:FOLDER (of a run of a reward model),
    or a function of yours, package.module:function(prompt, answer, reference). Groups of clients have
    their own as clients.groups.NAME.rewards."""
    reward_weights: list[float] | None = None
    """A factor for each of them (default: 1)."""
    group: int = Field(default=8, ge=2)
    """G, answers drawn for each prompt; training.batch_size counts prompts."""
    max_new_tokens: int = Field(default=48, ge=1)
    """Tokens of an answer at most, and never more than half the model's context."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the draws. As in TRL GRPO's log-probabilities in the loss are of the same temperature."""

    @property
    def weights(self) -> tuple[float, ...]:
        """The factor of each reward."""
        return tuple(self.reward_weights or [1.0] * len(self.rewards))

    def faults(self) -> list[str]:
        """Return what cannot be, one line each."""
        found = [f"objective.rewards: {fault}" for fault in map(fault_of, self.rewards) if fault]
        weights = self.reward_weights
        if weights is not None and len(weights) != len(self.rewards):
            found.append(
                f"objective.reward_weights has {len(weights)} numbers for {len(self.rewards)} rewards: "
                "give one for each"
            )
        return found
