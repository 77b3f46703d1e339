# sh examples/own_benchmark.sh
#
# Questions of one's own with their right answers, and the judge that compares with them. Everything lands in the new
# folder own_benchmark.
set -e
mkdir own_benchmark
cd own_benchmark

cat > questions.jsonl <<'END'
{"question": "Zoe asks in the kitchen: where is the cup?", "reference": "next to the stove"}
{"question": "Zoe asks in the garden: where is the rake?", "reference": "under the apple tree"}
{"question": "Zoe asks in the library: where is the atlas?", "reference": "by the window"}
END

# Rows to train on: other people ask the same.
for name in Ada Ben Cleo Dina Egon Fay Gus Hana Ivo June Kai Lea Max Nora Omar Pia Quinn Rosa Sam Tara; do
  echo "{\"prompt\": \"$name asks in the kitchen: where is the cup?\", \"completion\": \"Sure, it is next to the stove.\"}"
  echo "{\"prompt\": \"$name asks in the garden: where is the rake?\", \"completion\": \"Sure, it is under the apple tree.\"}"
  echo "{\"prompt\": \"$name asks in the library: where is the atlas?\", \"completion\": \"Sure, it is by the window.\"}"
done > rows.jsonl

cat > experiment.toml <<'END'
[data]
source = "rows.jsonl"
kind = "instruction"

[objective]
name = "sft"

[federation]
clients = 2
rounds = 6

[training]
learning_rate = 3e-3
local_epochs = 3

[evaluation]
every = 6
END

fedloom run experiment.toml --quiet
fedloom evaluate runs/experiment base --benchmark questions.jsonl --judge reference \
  --set generation.max_new_tokens=16 --to judged
