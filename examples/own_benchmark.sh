# sh examples/own_benchmark.sh
#
# Questions of one's own with their right answers, and the judge that compares with them. Everything lands in the new
# folder own_benchmark.
set -e
mkdir own_benchmark
cd own_benchmark

cat > questions.jsonl <<'END'
{"question": "Which day follows Monday?", "reference": "Tuesday"}
{"question": "Which day follows Tuesday?", "reference": "Wednesday"}
{"question": "Which day follows Friday?", "reference": "Saturday"}
END

# Rows to train on: the tiny model knows no days, so here the same questions are asked in many ways.
for number in $(seq 40); do
  for pair in Monday:Tuesday Tuesday:Wednesday Friday:Saturday; do
    echo "{\"prompt\": \"($number) Which day follows ${pair%:*}?\", \"completion\": \" ${pair#*:}\"}"
  done
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
learning_rate = 1e-2

[evaluation]
every = 6
END

fedloom run experiment.toml --quiet
fedloom evaluate runs/experiment base --benchmark questions.jsonl --judge reference \
  --set generation.max_new_tokens=8 --to judged
