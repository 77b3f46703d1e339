"""Where a model, its tokenizer and their files do not say the same: told before anything is trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedloom.errors import ModelError
from fedloom.models.configuration import text_part
from fedloom.models.flop_shape import uncounted
from fedloom.models.load import configuration_of, stop_tokens

ENDLESS = 1 << 24
"""A tokenizer's longest text from which on it means that it has none."""


def embedded(model: nn.Module) -> int | None:
    """Return how many tokens a model embeds, ``None`` where it does not say."""
    anyone: Any = model
    weight = getattr(anyone.get_input_embeddings(), "weight", None)
    return None if weight is None else len(weight)


def require_tokens(model: nn.Module, tokenizer: Any, path: str) -> None:
    """Check that a model embeds the tokens that its tokenizer makes of texts.

    Control tokens beyond the embeddings are let pass where texts do not have them (Gemma 3's tokenizer
    has one for pictures); a row with one is refused when it is tokenised.

    Args:
        model: The backbone.
        tokenizer: As loaded.
        path: Their name in the message.

    Raises:
        ModelError: It does not; a token and both sizes are named.
    """
    rows = embedded(model)
    beyond = {
        name: number
        for name, number in tokenizer.get_vocab().items()
        if number >= (rows or number + 1)
    }
    if not beyond:
        return
    control = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} - {
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.pad_token,
        tokenizer.unk_token,
    }
    wrong = sorted(beyond.keys() - control, key=lambda name: beyond[name])
    if wrong:
        most = max(beyond.values()) + 1
        raise ModelError(
            f"the tokenizer of {path} has tokens that the model does not embed: {wrong[0]!r} is number "
            f"{beyond[wrong[0]]}, the model embeds {rows} ({len(wrong)} such tokens); take the tokenizer "
            f"that the model was trained with, or resize_token_embeddings({most}) and save the model"
        )


def disagreements(
    model: nn.Module,
    tokenizer: Any,
    path: str,
    revision: str | None = None,
    classes: tuple[str, ...] = (),
) -> list[str]:
    """Return a warning for each thing that model, tokenizer and files do not say alike.

    Args:
        model: The backbone, with an adapter or without.
        tokenizer: As loaded.
        path: Folder or Hub name of both.
        revision: Branch, tag or commit on the Hub.
        classes: Those that are trained on; empty for a causal model.
    """
    config = configuration_of(path, revision)
    told = (
        _about_classes(config, classes, path)
        if classes
        else _about_ends(config, tokenizer, path, revision)
    )
    told += _about_padding(config, tokenizer, path) if classes else []
    if names := uncounted(model):
        told.append(
            f"FLOPs of {path} leave out what it computes beside matrix products with its weights and "
            f"attention: {', '.join(names)}"
        )
    return told


def length_warnings(
    lengths: dict[str, int | None], context: int, tokenizer: Any, path: str
) -> list[str]:
    """Return a warning for each length that is asked for and cannot be had.

    Args:
        lengths: Settings in tokens, by name; ``None`` where not given.
        context: Tokens that the model reads.
        tokenizer: Of the model.
        path: Its folder or Hub name.
    """
    given = {name: length for name, length in lengths.items() if length is not None}
    told = [
        f"{name} = {length}: {path} reads {context} tokens at most, so rows are cut to {context}; take a "
        "model with a longer context, or say so many"
        for name, length in given.items()
        if length > context
    ]
    limit = int(min(getattr(tokenizer, "model_max_length", ENDLESS), ENDLESS))
    longest = max((min(length, context) for length in given.values()), default=0)
    if limit < min(longest, ENDLESS):
        told.append(
            f"the tokenizer of {path} says that its model reads {limit} tokens (model_max_length), the "
            f"model's configuration {context}: rows have up to {longest}; if the tokenizer is right, say "
            f"data.max_length = {limit}"
        )
    return told


def _about_ends(config: Any, tokenizer: Any, path: str, revision: str | None) -> list[str]:
    told = []
    stops, end = stop_tokens(path, revision), tokenizer.eos_token_id
    if stops and end is not None and end not in stops:
        told.append(
            f"the tokenizer of {path} ends an answer with {_token(tokenizer, end)}, the model's files "
            f"stop at {' and '.join(_token(tokenizer, stop) for stop in stops)}: generation stops at "
            "each; if one is wrong, mend eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json"
        )
    begin = getattr(text_part(config), "bos_token_id", None)
    own = tokenizer.bos_token_id
    writes = own is not None and own in tokenizer("x")["input_ids"][:1]
    if writes and isinstance(begin, int) and begin != own:
        told.append(
            f"the tokenizer of {path} begins a text with {_token(tokenizer, own)}, its config.json says "
            f"{_token(tokenizer, begin)}: texts begin as the tokenizer has it; if that is wrong, mend "
            "bos_token in tokenizer_config.json"
        )
    return told


def _about_padding(config: Any, tokenizer: Any, path: str) -> list[str]:
    """A classifier reads the last token that is not padding, so whoever loads it has to pad alike."""
    named, own = getattr(text_part(config), "pad_token_id", None), tokenizer.pad_token_id
    if not isinstance(named, int) or named < 0 or named == own:
        return []
    return [
        f"the tokenizer of {path} pads with {_token(tokenizer, own)}, its config.json says "
        f"{_token(tokenizer, named)}: rows are padded with the first; where the classifier is loaded, "
        f"set model.config.pad_token_id = {own}"
    ]


def _about_classes(config: Any, classes: tuple[str, ...], path: str) -> list[str]:
    if not any("Classification" in name for name in config.architectures or ()):
        return []
    known = tuple(own for _, own in sorted((config.id2label or {}).items()))
    if known == classes:
        return []
    return [
        f"the classifier of {path} is for {len(known)} classes ({_shown(known)}), the rows have "
        f"{len(classes)} ({_shown(classes)}): its output layer starts again; it is kept where "
        "names and order are the same"
    ]


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _token(tokenizer: Any, number: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(number)!r} ({number})"


def require_same_vocabulary(tokenizers: dict[str, Any]) -> None:
    """Check that all models number the same tokens alike.

    Raises:
        ModelError: Two differ; both are named, with their sizes and a token they number differently.
    """
    (first, known), *others = ((path, t.get_vocab()) for path, t in tokenizers.items())
    for path, vocabulary in others:
        if vocabulary != known:
            odd = min(dict(known.items() ^ vocabulary.items()))
            raise ModelError(
                f"{first} and {path} have different vocabularies ({len(known)} and {len(vocabulary)} "
                f"tokens; {odd!r} is one they number differently): logits over tokens can be shared "
                "between models of one tokenizer only"
            )
