"""Ten styles of chat template, rebuilt from their public descriptions, each with a small tokenizer.

``{G}`` and ``{/G}`` stand around what the assistant generates: nothing, or the tags by which templates say
so themselves (``{% generation %}``).
"""

import json
from dataclasses import dataclass, field

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Hello there, how are you today?", "The answer is four, of course.", "What is two and two?",
    "Tell me more about the weather in Paris", "system user assistant tool model function",
    "You are a helpful assistant.", "Sure! Here is what I found:", "<think>\nLet me think.\n</think>\n\n",
]  # fmt: skip


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen cut a text: line ends stay together, whatever follows."""


@dataclass(frozen=True)
class Style:
    """A template, its control tokens and which of them end a turn."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    stops: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    metaspace: bool = False
    writes_bos: bool = True
    system: bool = True
    reasons: bool = False
    calls: bool = False
    right_strip: tuple[str, ...] = field(default=())

    def source(self, *, tagged):
        """Return the template with or without tags around what is generated."""
        tags = ("{% generation %}", "{% endgeneration %}") if tagged else ("", "")
        return self.template.replace("{G}", tags[0]).replace("{/G}", tags[1])


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{G}{{ m['content'] + '<|im_end|>\n' }}{/G}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = "
    "messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + "
    "'\n<</SYS>>\n\n' + m['content'] %}{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{G}{{ ' ' + content.strip() + ' ' + eos_token }}{/G}{% endif %}{% endfor %}"
)

LLAMA3 = (
    "{% for m in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{% if m['role'] == 'assistant' %}"
    "{G}{{ m['content'] | trim + '<|eot_id|>' }}{/G}{% else %}{{ m['content'] | trim + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{G}{{ m['content'] + eos_token }}{/G}{% endif %}{% endfor %}"
)

MISTRAL_SYSTEM = (  # the system's text goes before the last user's, and nowhere once that is answered
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = "
    "messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if m['role'] == 'user' %}{% if loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}{% else %}{G}"
    "{{ ' ' + m['content'] | trim + eos_token }}{/G}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0)"
    " %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if m['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}{G}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{/G}{% else %}"
    "{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

QWEN3 = (  # reasoning is dropped from all answers before the last question
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% set content = "
    "m['content'] %}{% set reasoning = '' %}{% if '</think>' in content %}{% set reasoning = "
    "content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{% set content = "
    "content.split('</think>')[-1].lstrip('\n') %}{% endif %}{G}{% if loop.index0 > ns.last and "
    "(loop.last or reasoning) %}{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + "
    "content.lstrip('\n') }}{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}{/G}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}{G}"
    "{{ m['content'] + '<|end|>\n' }}{/G}{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% elif messages[-1]['role'] == 'assistant' %}"
    "{G}{{ eos_token }}{/G}{% else %}{{ eos_token }}{% endif %}"
)

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}{G}"
    "{{ m['content'] + eos_token + '\n' }}{/G}{% else %}{{ m['content'] + eos_token + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)

TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools:\n' }}{% for t in tools %}{{ t | tojson + '\n' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m['content'] + '\n</tool_response><|im_end|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{G}{% if m['content'] %}"
    "{{ m['content'] }}{% endif %}{% for c in m['tool_calls'] or [] %}{{ '<tool_call>\n' + "
    "{'name': c['function']['name'], 'arguments': c['function']['arguments']} | tojson + "
    "'\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{/G}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

STYLES = {
    "llama-2": Style(LLAMA2, ("<s>", "</s>"), "<s>", "</s>", metaspace=True),
    "llama-3": Style(
        LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|end_of_text|>", "<|eot_id|>"),
    ),
    "mistral": Style(MISTRAL, ("<s>", "</s>"), "<s>", "</s>", metaspace=True, system=False),
    "mistral with system": Style(
        MISTRAL_SYSTEM, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", metaspace=True
    ),
    "gemma": Style(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        ("<eos>", "<end_of_turn>"),
        system=False,
    ),
    "chatml": Style(CHATML, IM, None, "<|im_end|>", writes_bos=False),
    "qwen3": Style(
        QWEN3, IM, None, "<|im_end|>", added=("<think>", "</think>"), writes_bos=False, reasons=True
    ),
    "phi-3": Style(
        PHI3,
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<s>",
        "<|endoftext|>",
        ("<|endoftext|>", "<|end|>"),
        writes_bos=False,
        right_strip=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        metaspace=True,
    ),
    "zephyr": Style(ZEPHYR, ("<s>", "</s>"), "<s>", "</s>", metaspace=True, writes_bos=False),
    "tools": Style(
        TOOLS, IM, None, "<|im_end|>", added=("<tool_call>", "</tool_call>"), writes_bos=False, calls=True
    ),
}  # fmt: skip


def build(style, *, tagged=False):
    """Return a style's tokenizer, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=style.metaspace))
    if style.metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=620, special_tokens=[*style.special, *alphabet])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(style.special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    whole = json.loads(tokenizer.to_str())  # bytes are words of the vocabulary, not added tokens
    whole["added_tokens"] = [t for t in whole["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    if style.bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{style.bos} $A", special_tokens=[(style.bos, tokenizer.token_to_id(style.bos))]
        )
    return _dressed(tokenizer, style, tagged)


def _dressed(tokenizer, style, tagged):
    from tokenizers import AddedToken

    special = [AddedToken(t, special=True, rstrip=t in style.right_strip) for t in style.special]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in style.added]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=style.bos,
        eos_token=style.eos,
        pad_token=style.special[0],
    )
    fast.chat_template = style.source(tagged=tagged)
    return fast


def stops(style, tokenizer):
    """Return the ids at which generation stops, as a generation configuration lists them."""
    return tuple(tokenizer.convert_tokens_to_ids(list(style.stops or (style.eos,))))
