"""A data source of one's own: rows from an SQLite database.

    python examples/own_source.py

A class with `load(rng)` is a source; it is made with the settings of [data], and sets the held-out rows
apart itself. An experiment file names it too: `source = "own_source:Tickets"`, with PYTHONPATH=examples.
"""

import hashlib
import sqlite3

import fedloom
from fedloom.data.examples import Instruction
from fedloom.data.loading import LoadedData

DATABASE = "tickets.db"


class Tickets:
    """Questions and answers from a table, each with its department."""

    def __init__(self, settings):
        """Take the settings of [data]; nothing of them is needed here."""

    def load(self, rng):
        """Return the rows in an order drawn from the seed, a fifth of them held out."""
        found = sqlite3.connect(DATABASE).execute("SELECT * FROM tickets ORDER BY id")
        rows = [
            Instruction(number, question, answer, {"department": department})
            for number, question, answer, department in found
        ]
        digest = hashlib.sha256(repr(rows).encode()).hexdigest()  # a resumed run needs the same
        order = [rows[place] for place in rng.permutation(len(rows))]
        held_out = len(rows) // 5
        return LoadedData(order[held_out:], order[:held_out], "instruction", digest)


if __name__ == "__main__":
    with sqlite3.connect(DATABASE) as database:
        database.execute("DROP TABLE IF EXISTS tickets")
        database.execute("CREATE TABLE tickets (id INTEGER, question, answer, department)")
        for number in range(120):
            department = ("ward", "laboratory")[number % 2]
            row = (number, f"Where is key {number}?", f" Key {number} is here.", department)
            database.execute("INSERT INTO tickets VALUES (?, ?, ?, ?)", row)

    result = fedloom.run(
        {
            "data": {
                "source": "own_source:Tickets",
                "kind": "instruction",
            },  # this file, as a module
            "objective": {"name": "sft"},
            "partition": {"kind": "column", "column": "department"},
            "federation": {"clients": 2, "rounds": 3},
            "training": {"learning_rate": 3e-3},
        }
    )
    before, after = result.metrics_before["loss"], result.metrics["loss"]
    print(f"loss on held-out rows: {before:.2f} -> {after:.2f}")
