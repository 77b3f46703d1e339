"""LoRA's factors of several clients in one pass: rows of all of them, each row with its client's factors.

Everything frozen is computed for all rows at once; the two products with factors are batched over clients
(``torch.bmm``). Rows stay apart, so neither a NaN nor anything else of one client reaches another's.
Dropout of LoRA's inputs is drawn from each client's own generator, in the shape that its rows would have
by themselves: it is what it would be if the client were alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from fedloom.data.batch import Predicting, Reading
from fedloom.data.batching import beside
from fedloom.errors import first_line
from fedloom.models.adapters import AdapterModel
from fedloom.models.architecture import run_on_text
from fedloom.randomness import generator

TOLERANCE = 1e-4
"""Difference of hidden states at most between a pass over two clients' rows and a pass each, as a share
of the largest, in float32."""

IN_LOWER_PRECISION = 0.05
"""The same in bfloat16."""


@dataclass
class _Pass:
    """What the layers of one pass have to know.

    Attributes:
        factors: ``(clients, ...)`` by name.
        rows: Rows of each client, one client's below another's.
        lengths: Tokens of each one's rows, if they were read by themselves.
        generators: What each one's dropout is drawn from.
        places: Where each row lies where every client has as many as the one with most; ``None``: there.
    """

    factors: Mapping[str, Tensor]
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    generators: Sequence[torch.Generator]
    places: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        most, device = max(self.rows), next(iter(self.factors.values())).device
        self.places = None
        if any(own != most for own in self.rows):
            own = [torch.arange(n, device=device) + k * most for k, n in enumerate(self.rows)]
            self.places = torch.cat(own)

    def by_client(self, states: Tensor) -> Tensor:
        """Return ``(rows, tokens, width)`` as ``(clients, tokens of each, width)``, zeros added."""
        if self.places is not None:
            whole = states.new_zeros(len(self.rows) * max(self.rows), *states.shape[1:])
            states = whole.index_copy(0, self.places, states)
        return states.reshape(len(self.rows), -1, states.shape[-1])

    def by_row(self, states: Tensor, length: int) -> Tensor:
        """Undo :meth:`by_client`."""
        own = states.reshape(-1, length, states.shape[-1])
        return own if self.places is None else own[self.places]

    def dropped(self, states: Tensor, share: float) -> Tensor:
        """Apply dropout to ``(rows, tokens, width)``, as each client would to its own rows."""
        kept = torch.zeros_like(states)
        begin = 0
        for rows, length, draw in zip(self.rows, self.lengths, self.generators, strict=True):
            own = kept[begin : begin + rows]
            begin += rows
            if length == own.shape[1]:
                own.bernoulli_(1 - share, generator=draw)
            else:
                drawn = torch.empty_like(own[:, :length]).contiguous()
                own[:, :length] = drawn.bernoulli_(1 - share, generator=draw)
        return states * kept.div_(1 - share)


class StackedFactors:
    """The factors of several clients of one model, stacked, and passes with them.

    A client's own parameters become views of the stacks: what its optimizer does to them is done to
    these.
    """

    def __init__(
        self,
        model: AdapterModel,
        clients: Sequence[Mapping[str, nn.Parameter]],
        trained: Collection[str],
    ) -> None:
        """Stack the clients' parameters.

        Args:
            model: Their model, against which :func:`reason_against` has none.
            clients: Each one's parameters by name, all of the same shapes.
            trained: Names of those that passes leave gradients of.
        """
        assert model.head is not None, "asked before layers compute otherwise"
        self.model, self.clients = model, len(clients)
        self.stacks: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in clients[0]:
                stack = torch.stack([own[name].detach() for own in clients])
                for own, view in zip(clients, stack.unbind(), strict=True):
                    own[name].data = view
                self.stacks[name] = stack.requires_grad_(name in trained)
        self._layers = _layers(model)

    def read(
        self,
        clients: Sequence[int],
        readings: Sequence[Reading],
        generators: Sequence[torch.Generator],
    ) -> list[Predicting]:
        """Read what some clients have to read, in one pass; return what the output layer reads of each.

        Args:
            clients: Their places in the stacks, ascending.
            readings: What each reads, all with branches or all without.
            generators: What each one's dropout is drawn from.
        """
        stacks = self.stacks
        if len(clients) < self.clients:
            chosen = torch.tensor(clients, device=self.model.device)
            stacks = {name: stack[chosen] for name, stack in stacks.items()}
        rows = tuple(len(own.input_ids) for own in readings)
        lengths = tuple(own.input_ids.shape[1] for own in readings)
        own_pass = _Pass(stacks, rows, lengths, generators)
        for name, layer in self._layers.items():
            layer.forward = _forward(name, layer, own_pass)
        try:
            found = self.model.read_on(beside(readings, self.model.pad))
        finally:
            for layer in self._layers.values():
                del layer.forward
        states = torch.split(found.states, [len(own.sources) for own in readings])
        return [Predicting(own, found.logits, found.width, found.trained) for own in states]

    def take_gradients(self) -> list[dict[str, Tensor | None]]:
        """Return each client's gradients by name, and forget them."""
        found: list[dict[str, Tensor | None]] = [{} for _ in range(self.clients)]
        for name, stack in self.stacks.items():
            if stack.grad is not None:
                for own, gradient in zip(found, stack.grad.unbind(), strict=True):
                    own[name] = gradient
                stack.grad = None
        return found


def _forward(name: str, layer: Any, own_pass: _Pass) -> Callable[..., Tensor]:
    """Return what a layer computes in a pass over several clients' rows."""
    down = own_pass.factors[f"{name}.lora_A.weight"]
    up = own_pass.factors[f"{name}.lora_B.weight"]
    scaling, dropout = layer.scaling["default"], layer.lora_dropout["default"]
    share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def forward(states: Tensor, *args: Any, **options: Any) -> Tensor:
        result: Tensor = layer.base_layer(states, *args, **options)
        states = states.to(down.dtype)
        if share:
            states = own_pass.dropped(states, share)
        inner = torch.bmm(own_pass.by_client(states), down.transpose(1, 2))
        change = torch.bmm(inner, up.transpose(1, 2))
        summed: Tensor = result + own_pass.by_row(change, states.shape[1]) * scaling
        return summed.to(result.dtype)

    return forward


def _layers(model: AdapterModel) -> dict[str, Any]:
    """Return the layers with factors by the beginning of their factors' names."""
    return {n: m for n, m in model.model.named_modules() if hasattr(m, "lora_A")}


def reason_against(model: AdapterModel) -> str:
    """Return why factors of several clients cannot be stacked, empty where they can. Asks the model."""
    if model.stackable is None:
        model.stackable = _by_kind(model) or _tried(model)
    if not model.stackable and model.base.changes:
        return "the method changes the frozen weights of each client"
    return model.stackable


def _by_kind(model: AdapterModel) -> str:
    """Return what kind of model or adapter it is that cannot be stacked, empty for none."""
    layers = _layers(model)
    factors = {f"{name}.{own}.weight" for name in layers for own in ("lora_A", "lora_B")}
    if type(model) is not AdapterModel:
        return "the model is split, or has experts"
    if model.noise is not None:
        return "training.neftune_noise_alpha draws noise for one client at a time"
    if model.own is not None:
        return "clients have parts of the model of their own"
    if not layers or set(model.parameters) != factors:
        return "more is trained than LoRA's two factors of each layer, or something else"
    if any(type(own) is not LoraLinear or own.lora_variant for own in layers.values()):
        return "some layers have no plain LoRA: frozen weights are quantised, or it is a variant"
    if model.head is None or model.head.trained:
        return "the output layer is trained, or not known apart from the model"
    if model.checkpointed:
        return "training.gradient_checkpointing computes passes again"
    if model.device.type != "cpu" and any(_drops(own) for own in layers.values()):
        return "adapter.dropout is drawn otherwise on this device"
    return ""


def _drops(layer: Any) -> bool:
    dropout = layer.lora_dropout["default"]
    return isinstance(dropout, nn.Dropout) and dropout.p > 0


def _tried(model: AdapterModel) -> str:
    """Return what differs where two clients' rows are read in one pass; empty for nothing."""
    if model.device.type == "meta":
        return ""
    put_back, training, flops = model.as_it_is(), model.model.training, model.flops
    try:
        with torch.no_grad():
            if not _alike(model, training=False):
                return (
                    "a pass over rows of two clients computes something else than a pass over each"
                )
            if not _alike(model, training=True):
                return "the model draws dropout of its own; model.dropout = false switches it off"
            return ""
    except Exception as error:  # a model's code raises whatever it likes
        return f"it raises {type(error).__name__}: {first_line(error)}"
    finally:
        put_back()
        model.flops = flops
        model.model.train(training)


def _alike(model: AdapterModel, *, training: bool) -> bool:
    """Return whether a pass over two clients' rows reads what a pass over each reads."""
    model.model.train(training)
    row = run_on_text(model.model.get_base_model())[0]
    numbers = generator(0, "stacked factors", 0, 0)
    readings, alone, clients, draws = [], [], [], []
    for client, rows in enumerate((1, 2)):
        ids = row[: len(row) - client].repeat(rows, 1)
        mask = torch.ones_like(ids)
        places = torch.arange(ids.numel(), device=ids.device)
        readings.append(Reading(ids, mask, places, places[-1:]))
        own = {
            name: torch.from_numpy(numbers.normal(0, 0.05, tuple(p.shape))).to(p.dtype)
            for name, p in model.parameters.items()
        }
        clients.append(model.parameters_of(own))
        model.hold(clients[-1])
        draws.append(torch.Generator(model.device).manual_seed(client))
        with torch.random.fork_rng():
            torch.manual_seed(client)
            alone.append(model.read_on(readings[-1]).states)
    found = StackedFactors(model, clients, ()).read((0, 1), readings, draws)
    exact = alone[0].dtype == torch.float32 and model.autocast is None
    tolerance = TOLERANCE if exact else IN_LOWER_PRECISION
    return all(
        bool((own.states - other).abs().max() <= tolerance * other.abs().max())
        for own, other in zip(found, alone, strict=True)
    )
