"""Floating-point operations of a forward and a backward pass, from shapes and tokens alone.

A multiply-add counts two. Only matrix products are counted, as ``torch.utils.flop_counter`` does
(and a test compares the two); norms, activations and softmax are below 1 % at real sizes.

For one token of a sequence of S (padded) tokens, with a linear layer of ``in x out``:

====================  ==============================  ====================================
part                  forward                         backward
====================  ==============================  ====================================
frozen linear         2 in out                        2 in out (gradient of its input only)
trained linear        2 in out                        4 in out
LoRA of rank r        2 r (in + out)                  4 r (in + out)
attention of width w  4 S w (scores and values)       8 S w
====================  ==============================  ====================================

Nothing is computed below the lowest adapter, and nothing flows into the input of the layers that
read what has no trainable part below it. Kernels that skip the masked half of causal attention
do half of the attention's part. Source: ``specs/performance.md`` section 1e, with
4 N_m + 6 S d L + 6 P per token for LoRA on a frozen base, made exact for the lowest block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LinearShape:
    """One linear layer inside the blocks.

    Attributes:
        inputs: Width of its input.
        outputs: Width of its output.
        rank: Rank of the LoRA on it, 0 for none.
        reached: Whether the backward pass reaches its output.
        input_gradient: Whether a gradient flows on into its input.
        trained: Whether its own weight is trained.
        down_trained: Whether the LoRA's factor A is trained.
        up_trained: Whether its factor B is.
        router: Rows of a down-projection that no up-projection reads (a mixture of experts).
    """

    inputs: int
    outputs: int
    rank: int = 0
    reached: bool = True
    input_gradient: bool = True
    trained: bool = False
    down_trained: bool = True
    up_trained: bool = True
    router: int = 0


@dataclass(frozen=True)
class ModelShape:
    """The matrix products of a transformer.

    Attributes:
        linears: Every linear layer in the blocks.
        head: The output layer (LM head or classification head), applied to some positions only.
        before_head: Linear layers that those positions pass first (a bottleneck adapter, a pooler).
        reward: The explicit reward head, applied to one position of a sequence; ``None`` without one.
        encoder: Linear layers that virtual tokens pass before the blocks, once for all sequences.
        encoded: Number of these tokens.
        attention_width: Query heads times head size, added up over attention layers.
        attention_width_reached: The same of those that the backward pass runs through.
        pooled: Whether the output layer is applied to one position of a sequence, whatever is kept.
        once: Products that are made once a pass, as linear layers that one token passes.
        again: Layers that are applied once more in training (DoRA's, to inputs with dropout).
    """

    linears: tuple[LinearShape, ...]
    head: LinearShape
    attention_width: int
    attention_width_reached: int
    before_head: tuple[LinearShape, ...] = ()
    reward: LinearShape | None = None
    encoder: tuple[LinearShape, ...] = ()
    encoded: int = 0
    pooled: bool = False
    once: tuple[LinearShape, ...] = ()
    again: tuple[LinearShape, ...] = ()

    @cached_property
    def forward_per_token(self) -> float:
        """FLOPs of a forward pass for each token in the blocks, without attention."""
        return sum(_forward_per_token(x) for x in self.linears)

    @cached_property
    def backward_per_token(self) -> float:
        """FLOPs of a backward pass for each token in the blocks, and of what is in training alone."""
        reached = sum(_backward_per_token(x) for x in (*self.linears, *self.again) if x.reached)
        return reached + sum(_forward_per_token(x) for x in self.again)


def forward_flops(shape: ModelShape, rows: int, length: int, head_positions: float) -> float:
    """FLOPs of one forward pass over ``(rows, length)`` tokens, padding included.

    Args:
        shape: The model.
        rows: Sequences in the batch.
        length: Padded length of the sequences.
        head_positions: Positions in each sequence to which the output layer is applied, on average.
    """
    tokens = rows * length
    per_token = shape.forward_per_token
    attention = 4.0 * length * shape.attention_width
    positions = 1 if shape.pooled else head_positions
    heads = sum(_forward_per_token(x) for x in (*shape.before_head, shape.head))
    reward = _forward_per_token(shape.reward) if shape.reward else 0.0
    before = shape.encoded * sum(_forward_per_token(x) for x in shape.encoder)
    before += sum(_forward_per_token(x) for x in shape.once)
    return tokens * (per_token + attention) + rows * (positions * heads + reward) + before


def backward_flops(shape: ModelShape, rows: int, length: int, head_positions: float) -> float:
    """FLOPs of the backward pass that belongs to :func:`forward_flops` of the same arguments.

    With it are those of the forward pass that there are in training alone.
    """
    tokens = rows * length
    per_token = shape.backward_per_token
    attention = 8.0 * length * shape.attention_width_reached
    positions = 1 if shape.pooled else head_positions
    heads = sum(_backward_per_token(x) for x in (*shape.before_head, shape.head) if x.reached)
    reward = _backward_per_token(shape.reward) if shape.reward else 0.0
    before = shape.encoded * sum(_backward_per_token(x) for x in shape.encoder)
    before += sum(_backward_per_token(x) for x in shape.once if x.reached)
    return tokens * (per_token + attention) + rows * (positions * heads + reward) + before


def _forward_per_token(linear: LinearShape) -> float:
    product = 2.0 * linear.inputs * linear.outputs
    beside = 2.0 * linear.rank * (linear.inputs + linear.outputs)
    return product + beside + 2.0 * linear.router * linear.inputs


def _backward_per_token(linear: LinearShape) -> float:
    weight = 2.0 * linear.inputs * linear.outputs
    frozen = weight * (int(linear.input_gradient) + int(linear.trained))
    # B: gradients of its weight and of its input; A: of its weight, and of its input if it flows on.
    up = int(linear.up_trained) + int(linear.down_trained or linear.input_gradient)
    down = int(linear.down_trained) + int(linear.input_gradient)
    beside = 2.0 * linear.rank * (up * linear.outputs + down * linear.inputs)
    return frozen + beside + 2.0 * linear.router * linear.inputs * (1 + linear.input_gradient)
