"""``[training]``: how clients train, and how much a client does in a round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedloom.settings.schema import Of, Settings

BOUNDED = ("local_steps", "local_examples", "local_tokens")
"""Those that can be shared by several trainings of a round."""

AMOUNTS = ("local_epochs", "local_steps", "local_examples", "local_tokens", "total_epochs")
"""Settings that say how much a client does in a round; one of them at most is given."""


@dataclass(frozen=True)
class Part:
    """One of the trainings that a client makes in a round.

    Attributes:
        index: From 0.
        of: How many there are, in all of the round's requests.
    """

    index: int
    of: int


ALONE = Part(0, 1)


@dataclass(frozen=True)
class Work:
    """How much a training is: it stops at the first bound it reaches.

    Where a method makes several optimizer steps on each batch, a batch counts once.

    Attributes:
        epochs: Passes over its rows.
        steps: Batches.
        examples: Answers trained on; the last batch has no more rows than reach them.
        tokens: Tokens trained on; the last batch has no more rows than reach them.
    """

    epochs: int | None = None
    steps: int | None = None
    examples: int | None = None
    tokens: int | None = None

    def part(self, part: Part, begun: Part, spent: Work, repeats: int) -> Work:
        """Return what is left for one of the trainings that share this work in equal parts.

        Args:
            part: Which training.
            begun: The first training of the same request, which ``spent`` begins with.
            spent: Steps, answers and tokens of the request's trainings so far, repetitions counted.
            repeats: Optimizer steps on each batch. There is always a batch of a row at least.
        """

        def left(whole: int | None, used: int | None) -> int | None:
            if whole is None:
                return None
            before = whole * begun.index // begun.of + (used or 0)
            return max(1, (whole * (part.index + 1) // part.of - before) // repeats)

        return Work(
            steps=left(self.steps, spent.steps),
            examples=left(self.examples, spent.examples),
            tokens=left(self.tokens, spent.tokens),
        )

    def most_steps(self, rows: int, batch_size: int) -> int:
        """Return how many optimizer steps this can take at most on ``rows`` rows."""
        bounds = [bound for bound in (self.steps, self.examples, self.tokens) if bound is not None]
        if self.epochs is not None:
            bounds.append(self.epochs * -(-rows // batch_size))
        return min(bounds)

    def most_tokens(self, rows: int, tokens: float, batch_size: int) -> float:
        """Return how many tokens this can train on at most, of rows with so many together."""
        bounds = [math.inf if self.tokens is None else float(self.tokens)]
        a_row = tokens / max(1, rows)
        if self.epochs is not None:
            bounds.append(self.epochs * tokens)
        if self.steps is not None:
            bounds.append(self.steps * batch_size * a_row)
        if self.examples is not None:
            bounds.append(self.examples * a_row)
        return min(bounds)


BETAS = Of("training.optimizer", ("adam", "adamw", "adamw_8bit", "lion"))

ADAM = Of("training.optimizer", ("adam", "adamw", "adamw_8bit"))

Optimizer = Literal["adamw", "adam", "sgd", "adafactor", "muon", "adamw_8bit", "lion"]

BITSANDBYTES = ("adamw_8bit", "lion")
"""Optimizers of a package that is no dependency."""

HEADED = Of("heads", (True,), "no head is trained, by this objective and method")

SHARED = Of("trains again", (True,), "this method trains one model once in a round")


class TrainingSettings(Settings):
    """``[training]``: what a client does in a round."""

    optimizer: Optimizer = "adamw"
    """Made anew in every round, as in the papers, unless keep_optimizer_state is true. adafactor is that
    of transformers' Trainer, whose rate is not scaled by a tensor's size; muon (of matrices alone,
    momentum 0.95) is torch's; adamw_8bit and lion are of bitsandbytes, in fedloom[quantization]."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """In the first round, or the first after warmup_rounds; constant inside a round."""
    schedule: Literal["constant", "cosine", "linear", "exponential"] = "constant"
    """How it falls over the rounds, t of T being done: cosine and linear towards min_learning_rate, which
    they would reach in round T + 1 (2502.14187), exponential by the factor decay in each."""
    warmup_rounds: int = Field(default=0, ge=0)
    """First rounds W in which the rate rises: it is t / (W + 1) of the first in round t. The schedule
    begins after them, with the rounds that are left."""
    decay: float = Field(default=0.99, gt=0, le=1)
    """Of the exponential schedule (FedAMoLE: 0.99)."""
    head_learning_rate: Annotated[float | None, HEADED] = Field(default=None, gt=0)
    """Of heads and a client's other own parts, at the first round (default: learning_rate). They are
    as they were pretrained or small: a rate that suits LoRA's factors is often too high for them."""
    loraplus_lr_ratio: Annotated[float, Of("adapter.kind", ("lora",))] = Field(default=1.0, gt=0)
    """Learning rate of LoRA's factors B over that of A (LoRA+, 2402.12354, which uses 16). As in PEFT,
    one-dimensional tensors have that of B: DoRA's magnitudes, norms and biases."""
    neftune_noise_alpha: float = Field(default=0.0, ge=0)
    """Noise on the embeddings of tokens while training: uniform, alpha / sqrt(L d) at most in a row of L
    tokens (NEFTune, 2310.05914, which uses 5); 0 for none."""
    min_learning_rate: Annotated[float, Of("training.schedule", ("cosine", "linear"))] = Field(
        default=0.0, ge=0
    )
    """What cosine and linear fall towards (2502.14187 uses a tenth of the first); the last round's rate
    is above it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Added to the gradient with adam and sgd, decoupled from it with the others."""
    beta1: Annotated[float, BETAS] = Field(default=0.9, ge=0, lt=1)
    """First moment of adam and adamw, of lion the momentum's share; momentum of sgd is `momentum`."""
    beta2: Annotated[float, BETAS] = Field(default=0.999, ge=0, lt=1)
    """Second moment of adam and adamw, of lion the momentum (its paper: 0.99)."""
    epsilon: Annotated[float, ADAM] = Field(default=1e-8, gt=0)
    """Of adam and adamw, beside the root of the second moment (FedAMoLE: 1e-6)."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Of sgd."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    batch_size: int = Field(default=8, ge=1)
    """Examples in an optimizer step."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Examples in one forward pass (default: as many as tokens_per_pass holds). Changes memory and speed,
    and results by rounding alone."""
    accumulation: int | None = Field(default=None, ge=1)
    """Forward passes in an optimizer step: another way to say micro_batch_size."""
    tokens_per_pass: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Tokens in one forward pass, padding counted, where micro_batch_size and accumulation are not set:
    the rows of an optimizer step are sorted by length, and as many go together as fit. A longer row has a
    pass of its own. auto: by the model's width and the kind of device. Changes memory and speed, and
    results by rounding alone."""
    local_epochs: int | None = Field(default=None, ge=1)
    """Passes over a client's rows in a round (default 1)."""
    local_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps in a round, instead of local_epochs."""
    local_examples: int | None = Field(default=None, ge=1)
    """Examples in a round, instead of local_epochs; a pair counts as the two answers it holds. The last
    step has no more rows than are left."""
    local_tokens: int | None = Field(default=None, ge=1)
    """Tokens in a round, padding not counted, instead of local_epochs. The last step has no more rows
    than it takes to reach them."""
    amount_per: Annotated[Literal["model", "round"], SHARED] = "model"
    """Where a method trains several models in a round, or steps several times on a batch, what these
    amounts are of. model: of each model, a batch counted once. round: of all that a client computes in a
    round, in equal parts, every step counted (with local_steps, local_examples or local_tokens)."""
    total_epochs: float | None = Field(default=None, gt=0)
    """Passes over a client's rows in the whole run, instead of local_epochs: every round makes
    ceil(total_epochs n_k / (rounds x clients_per_round / clients) / batch_size) steps (the "dynamic
    local steps" of 2502.14187, which sets 3)."""
    keep_optimizer_state: bool = False
    """Whether a client's optimizer goes on where it stopped in its last round."""
    data_seed: int | None = Field(default=None, ge=0)
    """Of the order in which a client's rows are trained on (default: federation.seed)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: backbone in bfloat16 and mixed precision; the adapter stays in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, one more forward pass."""
    device: str = "auto"
    """"auto" (GPU where there is one), "cpu", "cuda", "cuda:1", "mps"."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads (default: 1 below 50 million parameters, where more cost time; else all)."""

    @property
    def counts_examples(self) -> bool:
        """Whether a forward pass is so many examples, and not so many tokens."""
        return self.micro_batch_size is not None or self.accumulation is not None

    @property
    def several_rates(self) -> list[str]:
        """Settings by which tensors have learning rates of their own."""
        head = ["training.head_learning_rate"] * (self.head_learning_rate is not None)
        return head + ["training.loraplus_lr_ratio"] * (self.loraplus_lr_ratio != 1)

    def order_seed(self, seed: int) -> int:
        """Return the seed of the order of rows: data_seed, or else the experiment's ``seed``."""
        return seed if self.data_seed is None else self.data_seed

    @property
    def micro_batch(self) -> int:
        """Examples in one forward pass at most."""
        if self.micro_batch_size is not None:
            return min(self.micro_batch_size, self.batch_size)
        return -(-self.batch_size // (self.accumulation or 1))

    def work(self, rows: int, participations: float) -> Work:
        """Return how much a client does in a round.

        Args:
            rows: Its training rows, n_k.
            participations: Rounds that a client takes part in on average, T |S| / N.
        """
        if self.total_epochs is not None:
            wanted = self.total_epochs * rows / participations
            return Work(steps=max(1, math.ceil(wanted / self.batch_size - 1e-9)))
        if (self.local_steps, self.local_examples, self.local_tokens) == (None, None, None):
            return Work(epochs=self.local_epochs or 1)
        return Work(steps=self.local_steps, examples=self.local_examples, tokens=self.local_tokens)

    def contradictions(self) -> list[str]:
        """Return what in these settings cannot both be meant."""
        found = []
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) > 1:
            found.append(f"training: give {' or '.join(given)}, not both")
        if self.amount_per == "round" and not set(given) & set(BOUNDED):
            found.append(
                f'training.amount_per = "round" shares {", ".join(BOUNDED[:2])} or {BOUNDED[2]}: give one'
            )
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            found.append(
                f"training.micro_batch_size = {self.micro_batch_size} is above "
                f"training.batch_size = {self.batch_size}"
            )
        elif (
            self.micro_batch_size is not None
            and self.accumulation is not None
            and self.micro_batch_size * self.accumulation != self.batch_size
        ):
            found.append(
                f"training: micro_batch_size {self.micro_batch_size} x accumulation "
                f"{self.accumulation} is not batch_size {self.batch_size}; leave one of them out"
            )
        if self.tokens_per_pass != "auto" and self.counts_examples:
            found.append(
                f"training.tokens_per_pass = {self.tokens_per_pass} and training.micro_batch_size or "
                "training.accumulation both say how much a forward pass holds; leave one of them out"
            )
        if self.min_learning_rate > self.learning_rate:
            found.append(
                f"training.min_learning_rate = {self.min_learning_rate} is above "
                f"training.learning_rate = {self.learning_rate}"
            )
        if self.momentum and self.optimizer != "sgd":
            own = "beta1" if self.optimizer in BETAS.values else "its own"
            found.append(f"training.momentum is of sgd; {self.optimizer} has {own}")
        if self.keep_optimizer_state and self.optimizer in BITSANDBYTES:
            found.append(
                f"training.keep_optimizer_state: {self.optimizer} keeps more than tensors; use another "
                "optimizer, or begin anew in every round"
            )
        if self.schedule != "exponential" and self.decay != 0.99:
            found.append(f"training.decay is of the exponential schedule, not {self.schedule}")
        return found
