# sh examples/own_judge.sh
#
# A judge of one's own, here one that wants a courteous word. Everything lands in the new folder own_judge.
set -e
mkdir own_judge
cd own_judge

cat > courtesy.py <<'END'
from fedloom.evaluation.judges.base import Verdict


class Courteous:
    """1 where an answer has a courteous word, else 0."""

    name = "courteous"
    compares = False  # it sees one answer at a time, so that no order matters
    scale = (0.0, 1.0)

    def __init__(self, settings):
        self.openings = ("gladly", "certainly", "sure")

    def check(self):
        """Called before anything is answered: nothing is needed."""

    def costs(self):
        return {}  # what it has used: requests, tokens, money

    def rate(self, cases):
        return [
            Verdict(tuple(float(any(o in a.lower() for o in self.openings)) for a in case.answers))
            for case in cases
        ]
END

cat > questions.jsonl <<'END'
{"question": "Ada asks in the kitchen: where is the cup?"}
{"question": "Ben asks in the garden: can you find the rake?"}
{"question": "Cleo asks in the library: where is the atlas?"}
{"question": "Dina asks in the clinic: I need the chart."}
END

cat > experiment.toml <<'END'
[data]
source = "builtin:instructions"
builtin_rows = 200

[objective]
name = "sft"

[federation]
clients = 3
rounds = 2

[training]
learning_rate = 3e-3
END

fedloom run experiment.toml --quiet
fedloom evaluate runs/experiment base --benchmark questions.jsonl --judge courtesy:Courteous \
  --set generation.max_new_tokens=24 --to judged
