"""A CSV file with column names of its own, and clients by one of its columns.

python examples/csv_columns.py
"""

import csv
from pathlib import Path

import fedloom

table = Path("tickets.csv")
with table.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["ticket", "customer_says", "team_replied", "branch"])
    for number in range(120):
        branch = ("Lyon", "Turin", "Graz")[number % 3]
        writer.writerow([number, f"Order {number} is late.", f" {branch} will call you.", branch])

result = fedloom.run(
    {
        "data": {
            "source": str(table),
            "kind": "instruction",
            # Our name on the left, that of the file on the right.
            "columns": {"prompt": "customer_says", "completion": "team_replied"},
        },
        "partition": {"kind": "column", "column": "branch"},  # all rows of a branch: one client
        "objective": {"name": "sft"},
        "federation": {"clients": 3, "rounds": 3},
        "training": {"learning_rate": 3e-3},
    }
)
print(f"loss on held-out rows: {result.metrics_before['loss']:.2f} -> {result.metrics['loss']:.2f}")
