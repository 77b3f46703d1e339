"""What is trained on a frozen backbone, through PEFT, and its tensors by name.

====================  ==================================================================================
``lora``              two factors of rank r beside linear layers (Hu et al. 2021,
                      https://arxiv.org/abs/2106.09685), and its variants: DoRA, rsLoRA, PiSSA, OLoRA
``full``              the linear layers themselves, in the blocks that ``layers`` names; saved by PEFT in
                      its format for layers that are trained whole ("LN_TUNING", which takes any layer)
``ia3``               one factor a channel of keys, values and the MLP's input (Liu et al. 2022,
                      https://arxiv.org/abs/2205.05638)
``experts``           mixtures of LoRA experts, ``experts.py``
``submixture``        the backbone's own experts, all or some, trained whole, ``submixture.py``
``prompt``            embeddings of virtual tokens before the text (Lester et al. 2021,
                      https://arxiv.org/abs/2104.08691); causal models only
``ptuning``           the same through a small MLP (Liu et al. 2021, https://arxiv.org/abs/2103.10385),
                      which travels too; a saved folder has the embeddings that it makes
====================  ==================================================================================

The tensors are read and written in place: PEFT's own state-dict functions take milliseconds each
time, a copy into the parameter microseconds.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from fedloom.accounting.flops import ModelShape, backward_flops, forward_flops
from fedloom.data.batch import Predicting, Reading, Sequences
from fedloom.errors import ModelError, first_line
from fedloom.models.architecture import (
    adaptable_layers,
    has_long_head,
    head_parts,
    is_linear,
    is_tied,
    text_layers,
    untie,
)
from fedloom.models.backbone_delta import MOVED, FrozenWeights
from fedloom.models.configuration import BLOCKS, number, text_part
from fedloom.models.cut_factors import CUT, require_own_weights, save_beside_whole
from fedloom.models.embedding_noise import EmbeddingNoise
from fedloom.models.flop_shape import block_of, model_shape, without_adapter
from fedloom.models.heads import OWN, PersonalHead, save_personal
from fedloom.models.output_head import OutputHead, output_head
from fedloom.models.peft_backends import BITSANDBYTES, TORCHAO, without
from fedloom.models.request_limits import Allowance
from fedloom.models.tree_attention import NEVER, applies, tree_attention
from fedloom.randomness import derive_seed
from fedloom.settings.schema import Settings
from fedloom.settings.suggestions import did_you_mean
from fedloom.tensors import Tensors

PROMPTS = ("prompt", "ptuning")
"""Kinds that put virtual tokens before the text."""


VARIANTS = ("use_dora", "use_rslora", "init_lora_weights", "modules_to_save")
"""Settings of LoRA that have PEFT's names and meaning."""

PLAIN_NAME = re.compile(r"[\w.-]+")
"""A layer's name; any other text is a regular expression."""

LONGEST_PATTERN = 1000
"""Characters of a regular expression."""


class AdapterSettings(Settings):
    """``[adapter]``: what is trained on the frozen backbone."""

    start: str | None = None
    """Adapter that the run starts from: a run folder (its global adapter, and each client's own model
    where it has one), a PEFT folder, or a Hub name as NAME or NAME@REVISION. Kind, rank, alpha and
    targets are the adapter's, and need not be set."""
    kind: Literal["lora", "full", "ia3", "prompt", "ptuning", "experts", "submixture"] = "lora"
    """LoRA, the chosen layers themselves, (IA)3, prompt or p-tuning, mixtures of LoRA experts, or the
    experts that a backbone has itself."""
    rank: int = Field(default=8, ge=1)
    """Of lora and experts: rank r of the two factors."""
    alpha: float = Field(default=16.0, gt=0)
    """Of lora and experts: the update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of lora and experts: share of the adapter's inputs set to zero while training."""
    targets: str | list[str] = "all-linear"
    """Layers that get an adapter: "all-linear", names such as ["q_proj", "v_proj"], or, of lora and full,
    a regular expression that a layer's whole name matches, such as '.*\\.[01]\\..*_proj'. (IA)3 chooses
    its own by default, prompt and p-tuning have none."""
    layers: int | list[int] | None = None
    """Blocks that get an adapter: so many last ones, or a list of indices from 0 (default: all)."""
    use_dora: bool = False
    """Of lora: whether each output's weights are a trained magnitude times a direction, which the factors
    change (DoRA, 2402.09353). Magnitudes are averaged as all else that is trained."""
    use_rslora: bool = False
    """Of lora: whether the update is scaled by alpha / sqrt(rank) (rsLoRA, 2312.03732)."""
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """Of lora: the first factors. default: A random, B zero. gaussian, orthogonal: others that change
    nothing at first. pissa, olora: the largest singular directions (2404.02948), or the first
    columns of a QR decomposition (2406.01775), of each frozen weight, which keeps the rest; what is saved
    is a plain LoRA of twice the rank on the model as it was."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Of lora: modules that are trained whole beside it, such as ["lm_head"]; they travel and are
    averaged as all else that is trained."""
    virtual_tokens: int = Field(default=8, ge=1)
    """Of prompt and ptuning: length of the learnt prompt in tokens."""
    initial_text: str | None = Field(default=None, min_length=1)
    """Of prompt: text whose tokens, repeated as needed, it begins with (default: random words)."""
    encoder_width: int = Field(default=1024, ge=1)
    """Of ptuning: hidden width of the MLP."""
    experts: int = Field(default=8, ge=1)
    """Of experts: domain experts of each layer, over the whole federation."""
    top_k: int = Field(default=2, ge=1)
    """Of experts: domain experts that a token passes, beside the shared one."""
    balance: float = Field(default=0.001, ge=0)
    """Of experts: weight of the term that asks for an even use of experts."""
    router: Literal["relevance", "linear"] = "relevance"
    """Of experts: by the likeness of projected tokens to what experts project on, with a shared expert
    (FedAMoLE), or by a matrix of logits, in which a client's own expert has several places (FedLEASE;
    without a shared expert, ``top_k`` and ``balance``)."""

    def contradictions(self) -> list[str]:
        """Return what in these settings cannot both be meant."""
        found = []
        both, experts = ("lora", "experts"), ("experts",)
        owners: dict[str, tuple[str, ...]] = {
            "rank": both,
            "alpha": both,
            "dropout": both,
            "virtual_tokens": PROMPTS,
        }
        owners |= {"initial_text": ("prompt",), "encoder_width": ("ptuning",)}
        owners |= dict.fromkeys(("experts", "top_k", "balance", "router"), experts)
        owners |= dict.fromkeys(VARIANTS, ("lora",))
        defaults = type(self)()
        for name, kinds in owners.items():
            given = getattr(self, name) != getattr(defaults, name)
            if self.kind not in kinds and given:
                found.append(
                    f"adapter.{name} is a setting of {' and '.join(kinds)}; adapter.kind is {self.kind!r}"
                )
        for name in ("top_k", "balance") if self.router == "linear" else ():
            if getattr(self, name) != getattr(defaults, name):
                found.append(
                    f'adapter.{name} is a setting of router = "relevance"; adapter.router is "linear"'
                )
        if self.kind in (*PROMPTS, "submixture"):
            for name in ("targets", "layers"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    found.append(f"adapter.{name}: {self.kind} chooses no layers")
        if isinstance(self.layers, int) and self.layers < 1:
            found.append(f"adapter.layers = {self.layers}: give the number of last blocks, from 1")
        if isinstance(self.layers, list) and (not self.layers or min(self.layers) < 0):
            found.append(f"adapter.layers = {self.layers}: give indices of blocks, from 0")
        if self.pattern is not None:
            found += self._of_pattern(self.pattern)
        if self.cuts and self.start is not None:
            found.append(
                f"adapter.init_lora_weights = {self.init_lora_weights!r} is of new factors, and "
                "adapter.start gives trained ones: leave one of them out"
            )
        return found

    def _of_pattern(self, pattern: str) -> Iterator[str]:
        if self.kind not in ("lora", "full"):
            yield f"adapter.targets = {pattern!r}: adapter.kind = {self.kind!r} takes names of layers"
        if len(pattern) > LONGEST_PATTERN:
            yield f"adapter.targets has {len(pattern)} characters; at most {LONGEST_PATTERN} are read"
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of what reads otherwise in a later version
                re.compile(pattern)
        except (re.error, OverflowError, RecursionError, Warning) as error:
            yield f"adapter.targets = {pattern!r} is not a regular expression: {error}"

    @property
    def pattern(self) -> str | None:
        """The regular expression that names the layers, if it is one."""
        own = self.targets
        return own if isinstance(own, str) and not PLAIN_NAME.fullmatch(own) else None

    @property
    def cuts(self) -> bool:
        """Whether the first factors are cut out of the frozen weights."""
        return self.init_lora_weights in CUT

    @property
    def beyond_products(self) -> list[str]:
        """Settings by which a layer's change is not the product of its factors alone."""
        found = ["adapter.use_dora"] if self.use_dora else []
        return found + [f'adapter.init_lora_weights = "{self.init_lora_weights}"'] * self.cuts

    def alpha_at(self, rank: int) -> float:
        """Return alpha with which factors of another rank are scaled as those of this one."""
        share = rank / self.rank
        return self.alpha * (math.sqrt(share) if self.use_rslora else share)


IA3_TARGETS = {
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "mistral": (["k_proj", "v_proj"], ["down_proj"]),
    "qwen2": (["k_proj", "v_proj"], ["down_proj"]),
    "qwen3": (["k_proj", "v_proj"], ["down_proj"]),
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
}
"""Layers whose output, and whose input, (IA)3 scales: keys, values and the MLP's inside."""


class AdapterModel:
    """One frozen backbone with one adapter whose tensors are written in and read out.

    Several parties may train in turns on one backbone without copying tensors: each makes parameters of
    its own (:meth:`parameters_of`) and has them held (:meth:`hold`) while it computes.

    Calling it is the backbone's forward pass under the chosen precision. Every pass adds its
    derived FLOPs to :attr:`flops`, so nobody has to count who calls it.

    Attributes:
        model: The PEFT model.
        parameters: The trained tensors by their name in a PEFT folder, sorted by name.
        device: Where the model is.
        pad: Token id for padding.
        shape: Its matrix products.
        flops: FLOPs of all passes so far, derived from shapes.
        allowance: What may be computed with it; asked before every pass.
        own: A client's own parts at the output, where the model has any.
        base: The frozen weights under LoRA's factors.
        first: Where the first factors were cut out of the frozen weights, all that was trained then.
        noise: Noise on the embeddings while training, where there is any.
        shared_prompts: Whether what sequences begin with may be read once; ``None`` until it is asked
            (``training/shared_prompts.py``).
        stackable: Why factors of several clients cannot be stacked, empty where they can; ``None`` until
            it is asked (``stacked_lora.py``).
        row_gradients: Why gradients of each row cannot come from one pass over several, empty where they
            can; ``None`` until it is asked (``training/row_gradients.py``).
        tree_from: Places of such a row from which on attention is worked out sequence by sequence; asked
            with it.
    """

    unmergeable = ""
    """Why the adapter cannot be merged into its backbone, if it cannot."""

    whole_batches = False
    """Whether it reads an optimizer batch at a time, since another party works on the same batch."""

    alone = False
    """Whether each sequence is read by itself, since what is added to the loss is a mean over these."""

    def __init__(
        self,
        model: peft.PeftModel,
        pad: int,
        autocast: torch.dtype | None = None,
        checkpointed: bool = False,
    ) -> None:
        """Wrap a PEFT model.

        Args:
            model: With one adapter.
            pad: Token id for padding.
            autocast: Dtype of mixed precision, ``None`` for none.
            checkpointed: Whether gradient checkpointing repeats the forward pass.
        """
        self.model = model.train(
            model.training
        )  # a new one says so of itself and not of its layers
        self.pad = pad
        self.autocast = autocast
        self.checkpointed = checkpointed
        self.device = next(model.parameters()).device
        heads = [(n, m) for n, m in model.named_modules() if isinstance(m, PersonalHead)]
        place = heads[0][0] if heads else ""
        self.own = heads[0][1] if heads else None
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        names = {n: _short_name(n, place) for n in trained}
        self.parameters = dict(sorted((names[n], p) for n, p in trained.items()))
        self._factor_rows = {n: len(p) for n, p in self.parameters.items() if ".lora_A." in n}
        owners = {names[n]: _owner(model, n) for n in trained}
        self._owners = {name: owners[name] for name in self.parameters}
        config = getattr(model, "peft_config", {}).get("default")
        prompt = getattr(config, "num_virtual_tokens", 0)
        self.virtual_tokens = int(prompt or 0)
        self.shape = model_shape(model, gradient_enters=self.virtual_tokens > 0)
        self._partly_trained: tuple[ModelShape, dict[frozenset[str], ModelShape]] = self.shape, {}
        self.first: Tensors = {}
        if getattr(config, "init_lora_weights", True) in CUT:
            self.first = self.read()
        self.flops = 0.0
        self.allowance = Allowance()
        self.base = FrozenWeights(model)
        self.noise: EmbeddingNoise | None = None
        self.shared_prompts: bool | None = None
        self.stackable: str | None = None
        self.row_gradients: str | None = None
        self.tree_from = NEVER

    @property
    def scaling(self) -> float:
        """Of LoRA: the factor of B A, alpha / rank or, of rsLoRA, alpha / sqrt(rank)."""
        config: Any = self.model.peft_config["default"]
        rank = float(config.r)
        return float(config.lora_alpha) / (math.sqrt(rank) if config.use_rslora else rank)

    @property
    def adapted_layers(self) -> list[str]:
        """Full names of the layers with factors, or that are trained whole as ``full`` does."""
        own = (
            re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|ln_tuning_layers)\.weight", name)
            for name in self.parameters
        )
        return sorted(match[1] for match in own if match)

    @property
    def stacked(self) -> str | None:
        """Name of a layer with factors for a stack of experts at once, ``None`` where there is none.

        The product of such factors is not the layer's change.
        """
        found = (name for name, own in self.model.named_modules() if isinstance(own, ParamWrapper))
        return next(found, None)

    @property
    def has_reward(self) -> bool:
        """Whether the model has an explicit reward head."""
        return self.own is not None and self.own.reward is not None

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Run the model; ``logits_to_keep`` limits the LM head to the last columns.

        With a reward head the output has ``rewards`` too, ``(rows,)`` at each row's last token.
        """
        rows, length = input_ids.shape
        positions = int(options.get("logits_to_keep", 0)) or length
        self.count(rows, length + self.virtual_tokens, positions)
        self._expect(attention_mask)
        with self._precision():
            output = self._run(input_ids, attention_mask, **options)
            logits = getattr(output, "logits", None)
            if logits is not None and "logits_to_keep" in options and logits.ndim == 3:
                output.logits = logits[:, -positions:]  # some models do not know the option
            if self.own is not None and self.own.states is not None:
                output.rewards = self.own.rewards(attention_mask)
        return output

    def predicting(self, sequences: Sequences) -> Predicting | None:
        """Read sequences as far as the output layer, which is not applied yet.

        Returns:
            What it reads where it predicts completion tokens; ``None`` where it is not known how this
            model's logits follow from that: call it then.
        """
        if self.head is None:
            return None
        self.count_reading(sequences)
        return self.read_on(sequences.reading)

    def read_on(self, reading: Reading) -> Predicting:
        """Read sequences as far as the output layer; see :meth:`predicting`. Counts no FLOPs."""
        head = self.head
        assert head is not None, "who asks has looked"
        options = {} if reading.position_ids is None else {"position_ids": reading.position_ids}
        mask = reading.attention_mask
        self._expect(mask)
        by_sequence: AbstractContextManager[None] = nullcontext()
        if reading.branches is not None:
            seen = options["attention_mask"] = self._attended(reading)
            config: Any = self.model.config
            kind = config._attn_implementation
            if not self.checkpointed and applies(reading, kind, self.tree_from):
                by_sequence = tree_attention(reading, seen)
        with self._precision(), head.aside() as read, by_sequence:
            self._run(reading.input_ids, mask, **options)
        states = read[0][:, -mask.shape[1] :].flatten(0, 1)  # virtual tokens come before
        rewards = None
        if self.own is not None and self.own.reward is not None and not self.own.off:
            with self._precision():
                rewards = self.own.rewards_of(states[reading.ends])
        return Predicting(states[reading.sources], self._logits, head.width, head.trained, rewards)

    def count_reading(self, sequences: Sequences) -> None:
        """Add the FLOPs of :meth:`predicting`, and of the output layer where tokens are predicted."""
        reading, graded = sequences.reading, sequences.graded
        rows, length = reading.input_ids.shape
        positions = len(reading.sources)
        back = positions if graded is None else graded
        self.count(rows, length + self.virtual_tokens, positions / rows, back / rows)

    @cached_property
    def head(self) -> OutputHead | None:
        """How logits follow from what the output layer reads, where that is known."""
        return output_head(self.model)

    def _logits(self, states: Tensor) -> Tensor:
        assert self.head is not None, "who asks has its states"
        with self._precision():
            return self.head.logits(states)

    def _expect(self, real: Tensor) -> None:
        """Tell the noise of the tokens of the next pass, ``(rows, length)``, 0 on padding."""
        if self.noise is not None:
            self.noise.lengths = real.sum(1)

    def _attended(self, reading: Reading) -> Tensor:
        """Return what tokens attend to, in the form that the attention of this model takes."""
        seen = reading.seen()
        config: Any = self.model.config
        if config._attn_implementation == "sdpa":
            return seen
        kind = next(self.model.parameters()).dtype
        hidden = torch.zeros(seen.shape, dtype=kind, device=seen.device)
        return hidden.masked_fill(~seen, torch.finfo(kind).min)

    def _run(self, input_ids: Tensor, real: Tensor, **options: Any) -> Any:
        """Run the model itself.

        Args:
            input_ids: ``(rows, length)``.
            real: ``(rows, length)``, 1 on tokens and 0 on padding.
            options: Of the model; an ``attention_mask`` among them takes the place of ``real``.
        """
        return self.model(**{"input_ids": input_ids, "attention_mask": real, **options})

    def penalty(self) -> Tensor | None:
        """Return what the adapter adds to the loss of the passes since the last time; here nothing."""
        return None

    def count(self, rows: int, length: int, positions: float, graded: float | None = None) -> None:
        """Add the FLOPs of a pass over ``(rows, length)`` tokens, and of its backward pass if any.

        Args:
            rows: Rows of the pass.
            length: Padded tokens of each.
            positions: Of each, to which the output layer is applied, on average.
            graded: Those of them that the backward pass begins at (default: all).

        Raises:
            PolicyError: There is no time left for it.
        """
        self.allowance.check()
        forward = forward_flops(self.shape, rows, length, positions)
        self.flops += forward
        if torch.is_grad_enabled():
            back = positions if graded is None else graded
            self.flops += backward_flops(self.shape, rows, length, back)
            self.flops += forward if self.checkpointed else 0.0

    def parameters_of(self, tensors: Tensors) -> dict[str, nn.Parameter]:
        """Return new parameters with the values of ``tensors``, for :meth:`hold`."""
        return {
            name: nn.Parameter(tensors[name].detach().to(self.device, copy=True))
            for name in self.parameters
        }

    def hold(self, parameters: dict[str, nn.Parameter]) -> None:
        """Compute with these parameter objects from now on; graphs made with others stay valid.

        Raises:
            PolicyError: They are more than may be held.
        """
        self.allowance.hold(sum(parameter.numel() for parameter in parameters.values()))
        for name, parameter in parameters.items():
            module, leaf = self._owners[name]
            module._parameters[leaf] = parameter
        self.parameters = dict(parameters)

    def as_it_is(self) -> Callable[[], None]:
        """Return a function that has the model compute with what it holds now, the objects themselves."""
        parameters, shape, changes = self.parameters, self.shape, self.base.changes

        def put_back() -> None:
            self.hold(parameters)
            self.shape = shape
            if self.base.changes is not changes:
                self.base.move(changes)

        return put_back

    def read(self) -> Tensors:
        """Return copies of the trained tensors on the CPU; of an empty model, what stands for them."""
        if self.device.type == "meta":
            return {n: p.detach() for n, p in self.parameters.items()}
        return {n: p.detach().to("cpu", copy=True) for n, p in self.parameters.items()}

    def digest(self) -> str:
        """Return a SHA-256 over the trained tensors and what the others are moved by."""
        whole = hashlib.sha256()
        for tensor in (*self.read().values(), *self.base.changes.values()):
            whole.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()

    def write(self, tensors: Tensors) -> None:
        """Copy ``tensors`` (all of them, by name) into the trained parameters.

        LoRA factors may be of another rank than those before; their product counts as before. Beside
        them there may be changes of the frozen weights; where there are none, these are as loaded.
        """
        self.base.move({name: t for name, t in tensors.items() if name.startswith(MOVED)})
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        if any(tensors[name].shape != shape for name, shape in shapes.items()):
            self.hold(self.parameters_of(tensors))
            self.shape = model_shape(self.model, gradient_enters=self.virtual_tokens > 0)
            return
        with torch.no_grad():
            torch._foreach_copy_(
                list(self.parameters.values()), [tensors[name] for name in self.parameters]
            )

    @contextmanager
    def reference(self, start: Tensors | None = None) -> Iterator[None]:
        """Compute as the reference model does, without dropout and gradients.

        Args:
            start: What the model has inside, adapter and own parts alike; by default neither: the
                base model as it was loaded.
        """
        was_training = self.model.training
        if was_training:  # each change visits every module: as long as a step of a small model
            self.model.eval()
        instead = self._as_loaded() if start is None else self.holding(start)
        try:
            with torch.no_grad(), self.base.as_loaded(), instead:
                yield
        finally:
            if was_training:
                self.model.train()

    @contextmanager
    def frozen(self, names: Collection[str]) -> Iterator[None]:
        """Inside, the parameters of these names stay as they are and cost no gradient."""
        if not names:
            yield
            return
        everything, shape = self.parameters, self.shape
        for name in names:
            everything[name].requires_grad_(False)
        self.parameters = {n: p for n, p in everything.items() if n not in names}
        self.shape = self._shape_of(shape, frozenset(self.parameters))
        try:
            yield
        finally:
            for name in names:
                everything[name].requires_grad_(True)
            self.parameters, self.shape = everything, shape

    def _shape_of(self, whole: ModelShape, trained: frozenset[str]) -> ModelShape:
        """Return the shape with these parameters trained, once for as long as the model has this shape.

        Reading it off the modules takes as long as half an optimizer step of a small model.
        """
        if self._partly_trained[0] is not whole:
            self._partly_trained = whole, {}
        known = self._partly_trained[1]
        if trained not in known:
            known[trained] = model_shape(self.model, gradient_enters=self.virtual_tokens > 0)
        return known[trained]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch dropout and gradients off."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def save(self, folder: Path) -> None:
        """Write a folder that ``PeftModel.from_pretrained`` loads, and a client's own parts beside."""
        if self.base.changes:
            self.base.save(self.model, folder)
        else:
            self._save_adapter(folder)
        if self.own is not None:
            save_personal(self.own, folder)

    def _save_adapter(self, folder: Path) -> None:
        anyone: Any = self.model
        anyone.create_or_update_model_card = (
            _no_card  # PEFT's is empty; card.py writes one that is not
        )
        try:
            with self._true_rank():
                self.model.save_pretrained(str(folder), save_embedding_layers=False)
            if self.first:
                save_beside_whole(folder, self.first)
        finally:
            del anyone.create_or_update_model_card

    @contextmanager
    def _true_rank(self) -> Iterator[None]:
        """Have the PEFT configuration say the rank the factors have now, with the same scaling."""
        config: Any = self.model.peft_config["default"]
        ranks = {
            config.r * len(self.parameters[name]) // rows
            for name, rows in self._factor_rows.items()
            if name in self.parameters
        }
        if ranks <= {getattr(config, "r", None)}:
            yield
            return
        (rank,) = ranks  # factors of a stack of experts have rows for each of these
        before = config.r, config.lora_alpha
        share = rank / config.r
        share = math.sqrt(share) if config.use_rslora else share
        config.r, config.lora_alpha = rank, config.lora_alpha * share
        try:
            yield
        finally:
            config.r, config.lora_alpha = before

    @contextmanager
    def _as_loaded(self) -> Iterator[None]:
        self._stand_aside(True)
        try:
            with self._without_adapter():
                yield
        finally:  # smaller passes are tried where memory did not suffice
            self._stand_aside(False)

    @contextmanager
    def holding(self, tensors: Tensors) -> Iterator[None]:
        """Inside, the trained tensors are these; afterwards the same parameter objects as before."""
        own, shape, changes = self.parameters, self.shape, self.base.changes
        self.base.changes = {}  # they stand as loaded, and are put back by who moved them
        self.hold({name: nn.Parameter(p.detach().clone()) for name, p in own.items()})
        try:
            self.write(tensors)
            yield
        finally:
            self.hold(own)
            self.shape, self.base.changes = shape, changes

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """Inside, the adapter does nothing and costs nothing, whatever rank was held last."""
        if self.first:  # what they were cut out of is whole with them alone
            with self.holding(self.first):
                yield
            return
        shape, virtual_tokens = self.shape, self.virtual_tokens
        self.shape, self.virtual_tokens = without_adapter(shape, parts=self.own is not None), 0
        try:
            with self.model.disable_adapter():
                yield
        finally:
            self.shape, self.virtual_tokens = shape, virtual_tokens

    def _stand_aside(self, off: bool) -> None:
        if self.own is not None:
            self.own.off = off

    def _precision(self) -> Any:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)


def attach_adapter(
    backbone: nn.Module, settings: AdapterSettings, *, classification: bool = False, seed: int = 0
) -> peft.PeftModel:
    """Put an adapter on the backbone that changes nothing yet, from ``seed``; the backbone is frozen.

    Prompt and p-tuning alone change the model at once: virtual tokens are there from the start.

    Args:
        backbone: A Hugging Face model with frozen weights.
        settings: Kind, size and targets.
        classification: Whether the output layer is a classification head, which is then trained too.
        seed: The experiment's seed.

    Raises:
        ModelError: No layer matches the targets (those that could are listed), there is no such block,
            or the kind cannot be used with this model.
    """
    config = _peft_config(backbone, settings, "SEQ_CLS" if classification else "CAUSAL_LM")
    if settings.cuts:
        layers = target_layers(backbone, settings)
        require_own_weights(backbone, layers, settings.init_lora_weights, settings.rank)
    with torch.random.fork_rng(devices=[]), _quiet_peft():
        torch.manual_seed(derive_seed(seed, "adapter"))
        try:
            model = peft.get_peft_model(backbone, config)
        except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
            raise ModelError(
                f"PEFT puts no adapter of this kind on this model: {first_line(error)}; name other "
                "layers as adapter.targets, or take another adapter.kind"
            ) from error
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()  # whatever the backbone's precision
    return model


def _peft_config(backbone: nn.Module, settings: AdapterSettings, task: str) -> peft.PeftConfig:
    if settings.kind in PROMPTS:
        return _prompt_config(backbone, settings, task)
    if settings.kind == "ia3":
        return _ia3_config(backbone, settings, task)
    head = _head_of(backbone, task)
    learning = _learning(backbone, settings)
    targets = _targets(backbone, settings, learning, named=head is not None)
    saved = _saved_whole(backbone, settings)
    if is_tied(backbone) and any(_reaches_output(backbone, own) for own in (targets, saved)):
        untie(backbone)  # what is added to the one is not added to the other
    if settings.kind == "full":
        names = _in_blocks(learning) if targets == "all-linear" else targets
        return peft.LNTuningConfig(task_type=task, target_modules=names, modules_to_save=head)
    return peft.LoraConfig(
        task_type=task,
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides by it, any number will do
        lora_dropout=settings.dropout,
        target_modules=targets,
        modules_to_save=[*(head or []), *saved] or None,
        exclude_modules=_left_out(backbone, learning) if targets == "all-linear" else None,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        init_lora_weights=_first_factors(backbone, settings),
    )


def _first_factors(backbone: nn.Module, settings: AdapterSettings) -> Any:
    """Return what PEFT calls the first factors; of a model without weights, what has their shapes."""
    if settings.init_lora_weights == "default":
        return True
    empty = next(backbone.parameters()).device.type == "meta"
    return True if empty and settings.cuts else settings.init_lora_weights


def _saved_whole(backbone: nn.Module, settings: AdapterSettings) -> list[str]:
    """Return the modules that are trained whole beside LoRA.

    Raises:
        ModelError: One of them is not there, or has LoRA itself, or has no weights.
    """
    if not settings.modules_to_save:
        return []
    modules, targets = dict(backbone.named_modules()), target_layers(backbone, settings)
    for own in settings.modules_to_save:
        meant = [name for name in modules if name and _is_named(name, [own])]
        if not any(any(True for _ in modules[name].parameters()) for name in meant):
            leaves = sorted({name.rpartition(".")[2] for name in modules if name})
            there = ", ".join(leaf for leaf in leaves if not leaf.isdecimal())
            raise ModelError(
                f"adapter.modules_to_save {own!r} matches no module of this model that has weights; "
                f"{did_you_mean(own, leaves)}it has: {there}"
            )
        for name in meant:
            within = [target for target in targets if f"{target}.".startswith(f"{name}.")]
            if within:
                raise ModelError(
                    f"adapter.modules_to_save {own!r} is trained whole, and {within[0]} in it would get "
                    "LoRA too: leave it out, or name other layers as adapter.targets"
                )
    return settings.modules_to_save


def _head_of(backbone: nn.Module, task: str) -> list[str] | None:
    """Return what is trained and saved whole beside the adapter, beyond what PEFT takes for the head."""
    return head_parts(backbone) if task == "SEQ_CLS" and has_long_head(backbone) else None


def _prompt_config(backbone: nn.Module, settings: AdapterSettings, task: str) -> peft.PeftConfig:
    if task == "SEQ_CLS":
        raise ModelError(
            f'adapter.kind = "{settings.kind}" needs a causal objective: with a classification head, '
            'transformers takes the last column of a batch, padding or not; use "lora" or "ia3"'
        )
    count = settings.virtual_tokens
    if settings.kind == "ptuning":
        return peft.PromptEncoderConfig(
            task_type=task, num_virtual_tokens=count, encoder_hidden_size=settings.encoder_width
        )
    if settings.initial_text is None:
        return peft.PromptTuningConfig(
            task_type=task, num_virtual_tokens=count, prompt_tuning_init="SAMPLE_VOCAB"
        )
    config: Any = backbone.config
    return peft.PromptTuningConfig(
        task_type=task,
        num_virtual_tokens=count,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=settings.initial_text,
        tokenizer_name_or_path=config.name_or_path,
    )


def _ia3_config(backbone: nn.Module, settings: AdapterSettings, task: str) -> peft.PeftConfig:
    config: Any = backbone.config
    if config.model_type not in IA3_TARGETS:
        raise ModelError(
            f'adapter.kind = "ia3" knows the layers of {", ".join(IA3_TARGETS)}; this model is '
            f"{config.model_type!r}"
        )
    if settings.targets != "all-linear":
        raise ModelError('adapter.kind = "ia3" chooses its own layers: leave adapter.targets out')
    outputs, inputs = IA3_TARGETS[config.model_type]
    targets = [*outputs, *inputs]
    if settings.layers is not None:
        blocks, learning = blocks_of(backbone, settings), _learning(backbone, settings)
        targets = _named(learning, targets, blocks)
        inputs = _named(learning, inputs, blocks)
    return peft.IA3Config(
        task_type=task,
        target_modules=targets,
        feedforward_modules=inputs,
        modules_to_save=_head_of(backbone, task),
    )


def _learning(backbone: nn.Module, settings: AdapterSettings) -> list[str]:
    """Return the full names of the linear layers that may get an adapter, in order."""
    found = adaptable_layers(backbone)
    names = [name for name, _ in backbone.named_modules() if name in found]
    if settings.kind != "lora":
        return names
    lost = _lost_by_peft(backbone, names)
    return [name for name in names if name not in lost and not _peft_refuses(backbone, name)]


def _lost_by_peft(backbone: nn.Module, names: list[str]) -> set[str]:
    """Return the layers whose factors PEFT would look for under other names than it saved them under.

    Loading them, it renames tensors as transformers does those of old checkpoints of an architecture, and
    leaves the layers without a factor at their first values.
    """
    saved = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    tensors = {name: torch.zeros(1, 1) for name in saved}
    found = convert_peft_adapter_state_dict_for_transformers(
        backbone, peft.LoraConfig(), dict(tensors), "default"
    )
    return {layer for tensor, layer in saved.items() if tensor not in found}


def _peft_refuses(backbone: nn.Module, name: str) -> bool:
    """Return whether PEFT puts no LoRA on a layer: fused kernels would go past it."""
    try:
        leaf = name.rpartition(".")[2]
        _check_lora_target_modules_mamba(peft.LoraConfig(), backbone, leaf)
    except ValueError:
        return True
    return False


def _left_out(backbone: Any, learning: list[str]) -> list[str] | None:
    """Return the linear layers that "all-linear" would take and that get no adapter, if any."""
    output, kept = backbone.get_output_embeddings(), set(learning)
    return [
        name
        for name, module in backbone.named_modules()
        if is_linear(module) and module is not output and name not in kept
    ] or None


def _targets(
    backbone: nn.Module, settings: AdapterSettings, learning: list[str], *, named: bool
) -> str | list[str]:
    """Return what PEFT is told: "all-linear", names, or the full names of layers in chosen blocks.

    Args:
        backbone: A Hugging Face model.
        settings: What was asked for.
        learning: The layers that may get an adapter.
        named: Whether "all-linear" will not do, since it would reach into a classifier's head.
    """
    if settings.layers is not None or named:
        return _chosen(backbone, settings, learning)
    if settings.targets == "all-linear":
        return settings.targets
    targets = _names(backbone, settings, learning)
    meant = [n for n, m in backbone.named_modules() if is_linear(m) and _is_named(n, targets)]
    there = set(learning)
    return targets if there.issuperset(meant) else [name for name in meant if name in there]


def target_layers(backbone: nn.Module, settings: AdapterSettings) -> list[str]:
    """Return the full names of the layers that get an adapter.

    Raises:
        ModelError: No layer matches the targets.
    """
    return _chosen(backbone, settings, _learning(backbone, settings))


def _chosen(backbone: nn.Module, settings: AdapterSettings, learning: list[str]) -> list[str]:
    names = _names(backbone, settings, learning)
    return _named(learning, names, blocks_of(backbone, settings))


def _names(backbone: nn.Module, settings: AdapterSettings, learning: list[str]) -> list[str]:
    """Return the targets as names, which some layers have."""
    targets = settings.targets
    if targets == "all-linear":
        return _in_blocks(learning)
    if settings.pattern is not None:
        return _matching(settings.pattern, learning)
    targets = [targets] if isinstance(targets, str) else targets
    _check_targets(backbone, targets, learning)
    return targets


def _matching(pattern: str, learning: list[str]) -> list[str]:
    """Return the layers whose whole name a regular expression matches, as PEFT would take it."""
    found = [name for name in learning if re.fullmatch(pattern, name)]
    if not found:
        example = learning[0] if learning else "none"
        raise ModelError(
            f"adapter.targets = {pattern!r} matches no linear layer of this model that can have an "
            f"adapter: a regular expression has to match a layer's whole name, such as {example}"
        )
    return found


def blocks_of(model: Any, settings: AdapterSettings) -> list[int]:
    """Return the blocks of a model that get an adapter.

    Raises:
        ModelError: It has no such block, or not as many blocks as its configuration says.
    """
    read = text_layers(model)
    linear = (name for name, module in model.named_modules() if is_linear(module))
    own = (block_of(name) for name in linear if read is None or name in read)
    count, layers = (
        max((block for block in own if block is not None), default=-1) + 1,
        settings.layers,
    )
    if layers is None:
        return list(range(count))
    told = number(text_part(model.config), BLOCKS, count)
    if told != count:
        raise ModelError(
            f"adapter.layers = {layers}: this model has {told} blocks by its configuration and {count} "
            "with layers of their own; leave adapter.layers out and name layers as adapter.targets"
        )
    blocks = list(range(max(0, count - layers), count)) if isinstance(layers, int) else layers
    beyond = [block for block in blocks if block >= count]
    if beyond or (isinstance(layers, int) and layers > count):
        raise ModelError(
            f"adapter.layers = {layers}: this model has {count} blocks, 0 to {count - 1}"
        )
    return blocks


def _in_blocks(names: list[str]) -> list[str]:
    return [name for name in names if block_of(name) is not None]


def _reaches_output(backbone: Any, targets: str | list[str]) -> bool:
    """Return whether what is trained would be on the output layer, or on the embeddings."""
    ends = [backbone.get_output_embeddings(), backbone.get_input_embeddings()]
    own = [name for name, module in backbone.named_modules() if any(module is end for end in ends)]
    return not isinstance(targets, str) and any(_is_named(name, targets) for name in own)


def _named(learning: list[str], targets: list[str], blocks: list[int]) -> list[str]:
    return [
        name
        for name in _in_blocks(learning)
        if block_of(name) in blocks and _is_named(name, targets)
    ]


def _is_named(name: str, targets: list[str]) -> bool:
    """Return whether targets mean a layer: by its full name, or the end of it."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def load_adapter(backbone: nn.Module, folder: Path) -> peft.PeftModel:
    """Put a saved adapter of any kind on a backbone.

    Raises:
        ModelError: ``folder`` is not a PEFT folder, or one for another model.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} is not an adapter: it has no adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder} has no adapter_model.safetensors; pickled weights are not read")
    try:
        with _quiet_peft():
            warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
            kind = peft.PeftConfig.from_pretrained(str(folder)).peft_type
            prompts = (peft.PeftType.PROMPT_TUNING, peft.PeftType.P_TUNING)
            trainable = kind not in prompts  # which PEFT loads for inference alone
            model = peft.PeftModel.from_pretrained(backbone, str(folder), is_trainable=trainable)
    except UserWarning as error:
        missing = re.findall(r"'([^']*)'", str(error))
        raise ModelError(
            f"the adapter {folder} lacks {len(missing)} tensors of the layers that its configuration "
            f"names, such as {missing[0]}, which would be as new. Save it again"
        ) from error
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        reason = first_line(error)
        raise ModelError(f"the adapter {folder} does not fit this model: {reason}") from error
    anyone: Any = backbone
    ends = (anyone.get_output_embeddings(), anyone.get_input_embeddings())
    if any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends):
        untie(backbone)  # what is merged into the one is not merged into the other
    return model


@contextmanager
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings(), without(BITSANDBYTES, TORCHAO):
        # PEFT 0.21 reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # Of a quantised backbone: PEFT could not merge the adapter into it, which nobody asks for.
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated", UserWarning)
        # Of fused experts, whose layers PEFT adapts under other names than it then looks for.
        warnings.filterwarnings(
            "ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning
        )
        # Of an adapter on an output layer that is tied: it is untied before anything is merged.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        # Of GPT-2's Conv1D, whose weights lie the other way round: PEFT sets it right by itself.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        yield


def _no_card(folder: str) -> None:
    """Stand for what PEFT writes beside an adapter."""


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def _short_name(name: str, place: str) -> str:
    """Return a parameter's name in ``adapter_model.safetensors``, or that of a client's own part."""
    if place and name.startswith(f"{place}."):
        return OWN + name.removeprefix(f"{place}.")
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def _check_targets(backbone: nn.Module, targets: list[str], learning: list[str]) -> None:
    linears = [name for name, module in backbone.named_modules() if is_linear(module)]
    leaves = sorted({name.rpartition(".")[2] for name in learning})
    there = ", ".join(leaves)
    for target in targets:
        if not any(_is_named(name, [target]) for name in linears):
            raise ModelError(
                f"adapter.targets {target!r} matches no linear layer of this model; "
                f"{did_you_mean(target, [*leaves, 'all-linear'])}"
                f'it has: {there} (or write "all-linear")'
            )
        if not any(_is_named(name, [target]) for name in learning):
            raise ModelError(
                f"adapter.targets {target!r}: an adapter there would not learn from text, or PEFT would "
                "not find it again: the layer does not run on text, is used in another way than as a "
                "product, no gradient reaches it, or PEFT refuses it or saves it under another name; "
                f'others are: {there} (or write "all-linear")'
            )
