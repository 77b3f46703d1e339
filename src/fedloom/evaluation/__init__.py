"""How good a state is: on the global held-out set, on each client's own, and in its own words."""
