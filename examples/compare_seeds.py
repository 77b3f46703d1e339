"""Two objectives at the same budget under three seeds, and the figures read from `results`.

python examples/compare_seeds.py
"""

import fedloom

comparison = {
    "compare": {
        "objectives": ["dpo", "ipo"],
        "methods": ["fedavg"],
        "seeds": [0, 1, 2],
        "budget": "examples",  # each client computes equally much in each round, in every configuration
        "amount": 32,
    },
    "data": {"source": "builtin:preferences", "builtin_rows": 200},
    "federation": {"clients": 3, "rounds": 2},
    "training": {"learning_rate": 3e-3},
    "evaluation": {"per_client": False, "samples": 0},
}

if __name__ == "__main__":  # needed with several workers, which import this file again
    done = fedloom.compare(comparison, "comparisons/two_objectives", workers=1)
    for arm in done.results["arms"]:
        print(
            f"{arm['objective']}: preference accuracy {arm['mean']:.3f} "
            f"({arm['lowest']:.3f} to {arm['highest']:.3f}), {arm['sent'] / 1e6:.2f} MB"
        )
    # The difference is taken within a seed, where both had the same rows and clients.
    pair = done.results["paired"][0]
    print(f"{pair['right']} - {pair['left']}: {pair['difference']:+.3f} over {pair['units']} seeds")
    print(f"page: {done.page}")
