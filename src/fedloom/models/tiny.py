"""The tiny language model that the package makes itself, within a minute, from text it generates.

It is an ordinary folder in Hugging Face layout, kept in the cache under a name that depends on the
recipe, the texts and the version of torch, so it is made once on a machine.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.models.load import PLAIN_CHAT, silence_transformers

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")


@dataclass(frozen=True)
class TinyRecipe:
    """Shape and training of the tiny model: 0.55 TFLOP, 10 to 40 seconds of one core."""

    vocabulary: int = 1024
    hidden: int = 64
    intermediate: int = 176
    layers: int = 3
    heads: int = 4
    context: int = 256
    steps: int = 400
    batch: int = 32
    learning_rate: float = 4e-3
    seed: int = 0
    after: str = field(default="", repr=False)  # folders keep their names
    """Token behind which alone tokens are trained on; all are where it is empty."""


def tiny_model(cache: Path, texts: Sequence[str], recipe: TinyRecipe | None = None) -> Path:
    """Return the folder of the tiny model, made first if it is not in ``cache``.

    Args:
        cache: Folder to keep it in.
        texts: What it is trained on.
        recipe: Shape and training.
    """
    recipe = recipe or TinyRecipe()
    key = hashlib.sha256(repr((recipe, torch.__version__, PLAIN_CHAT, list(texts))).encode())
    folder = cache / f"tiny-{key.hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tiny-", dir=cache))
        try:
            make_tiny_model(temporary, texts, recipe)
            temporary.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def make_tiny_model(folder: Path, texts: Sequence[str], recipe: TinyRecipe) -> None:
    """Train a tokenizer and a Llama-shaped model on ``texts`` and write both into ``folder``.

    One thread and one seed: the same texts give the same bytes on one machine.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    silence_transformers()
    tokenizer = _train_tokenizer(texts, recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=recipe.hidden,
                    intermediate_size=recipe.intermediate,
                    num_hidden_layers=recipe.layers,
                    num_attention_heads=recipe.heads,
                    num_key_value_heads=recipe.heads,
                    max_position_embeddings=recipe.context,
                    tie_word_embeddings=True,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
            _train(model, [tokenizer(text)["input_ids"] for text in texts], tokenizer, recipe)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_tokenizer(texts: Sequence[str], recipe: TinyRecipe) -> Any:
    """Return a byte-level BPE tokenizer: any text can be written with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=recipe.vocabulary,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = fast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=recipe.context,
        padding_side="right",
    )
    tokenizer.chat_template = PLAIN_CHAT
    return tokenizer


def _train(model: Any, rows: list[list[int]], tokenizer: Any, recipe: TinyRecipe) -> None:
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=0.01)
    model.train()
    for step in range(recipe.steps):
        # Up for a tenth of the steps, then down to zero: the usual shape for a short training.
        share = step / recipe.steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(10 * share + 0.02, (1 - share) / 0.9)
        drawn = torch.randint(len(rows), (recipe.batch,), generator=generator).tolist()
        ids, mask = _padded([[*rows[i], tokenizer.eos_token_id] for i in drawn], tokenizer)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        kept = mask[:, 1:].bool()
        if recipe.after:
            kept &= (ids[:, :-1] == tokenizer.convert_tokens_to_ids(recipe.after)).cumsum(1) > 0
        loss: Any = F.cross_entropy(logits[kept], ids[:, 1:][kept])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _padded(rows: list[list[int]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask
