# sh examples/merged_model.sh
#
# Merge the adapter into the model and write a folder that needs neither peft nor fedloom. Everything lands in the new
# folder merged_model.
set -e
mkdir merged_model
cd merged_model

fedloom init experiment.toml
fedloom run experiment.toml --set data.builtin_rows=200 --set federation.clients=3 --set federation.rounds=2 \
  --set output.folder=run --quiet
fedloom export run --to model

# Such a folder is what vLLM serves: `vllm serve merged_model/model`. Here it is transformers that loads it.
python - <<'END'
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=False)
tokenizer = AutoTokenizer.from_pretrained("model", trust_remote_code=False)
prompt = tokenizer("Ada asks in the kitchen: where is the cup?\n", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
print("merged:", tokenizer.decode(tokens[0], skip_special_tokens=True))
END
