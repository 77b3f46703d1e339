"""The adapter of a run in plain transformers and peft: no fedloom from here on.

python examples/plain_peft.py
"""

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import fedloom

result = fedloom.run(
    {
        "data": {"source": "builtin:instructions", "builtin_rows": 300},
        "objective": {"name": "sft"},
        "federation": {"clients": 3, "rounds": 2},
        "training": {"learning_rate": 3e-3},
    }
)

model = AutoPeftModelForCausalLM.from_pretrained(result.adapter_path, trust_remote_code=False)
base = model.peft_config["default"].base_model_name_or_path
tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
prompt = tokenizer("Ada asks in the garden: where is the rake?\n", return_tensors="pt")
with torch.no_grad():
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
