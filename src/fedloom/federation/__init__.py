"""The loop of rounds: presence of clients, sampling, admission of answers."""
