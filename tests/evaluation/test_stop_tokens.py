"""A model that was trained on chats ends its answers by itself, at its template's own end of a turn."""

import json
from pathlib import Path

import numpy as np
import pytest

import fedloom
from fedloom.data.builtin import builtin_examples
from fedloom.evaluation.generate import Ask, generate_answers
from fedloom.experiment.experiment import Experiment
from fedloom.runs.saved_models import load_saved

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_chatml(folder):
    """Write the small pretrained model with two of its words as control tokens; </s> ends texts still."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    backend = json.loads(AutoTokenizer.from_pretrained(STORIES).backend_tokenizer.to_str())
    model, vocabulary = AutoModelForCausalLM.from_pretrained(STORIES), backend["model"]["vocab"]
    for word, control in (("▁Timmy", "<|im_start|>"), ("▁Lily", "<|im_end|>")):
        vocabulary[control] = vocabulary.pop(word)
        merges = backend["model"]["merges"]
        backend["model"]["merges"] = [m for m in merges if "".join(m) != word and word not in m]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = {"id": vocabulary[control], "content": control, "special": True, **flags}
        backend["added_tokens"].append(added)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    model.generation_config.eos_token_id = [2, vocabulary["<|im_end|>"]]
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.skipif(
    not STORIES.is_dir(), reason="the small pretrained model is not beside the project"
)
def test_answers_stop_by_themselves(tmp_path):
    with_chatml(tmp_path / "model")
    rows = [
        {
            "messages": [
                {"role": "user", "content": row.prompt},
                {"role": "assistant", "content": answer},
            ]
        }
        for row in builtin_examples("instructions", 800, np.random.default_rng(0))
        if (answer := str(row.completion).strip())
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    experiment = Experiment.from_table(
        {
            "data": {"source": str(tmp_path / "rows.jsonl"), "kind": "instruction"},
            "model": {"path": str(tmp_path / "model")},
            "adapter": {"kind": "full"},
            "objective": {"name": "sft"},
            "federation": {"clients": 2, "rounds": 2},
            "training": {"local_epochs": 2, "learning_rate": 2e-3, "batch_size": 8},
            "evaluation": {"samples": 0, "max_examples": 20, "per_client": False},
            "output": {"folder": str(tmp_path / "run")},
        }
    )
    fedloom.run(experiment)
    encoder, model = load_saved(experiment, (), tmp_path / "run" / "adapter")
    asks = [Ask(tuple(encoder.prompt(tuple(row["messages"][:1])))) for row in rows[:120]]
    answers = [row["messages"][1]["content"] for row in rows[:120]]
    lengths = [
        len(ids) + 1 for ids in encoder.tokenizer(answers, add_special_tokens=False)["input_ids"]
    ]
    bound = 2 * int(np.median(lengths))
    within, longer = (generate_answers(model, encoder, asks, n) for n in (bound, bound + 10))
    stopped = np.mean([a == b for a, b in zip(within, longer, strict=True)])
    print(f"{stopped:.1%} of answers end within {bound} tokens")
    assert stopped >= 0.9
