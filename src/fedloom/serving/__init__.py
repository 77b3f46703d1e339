"""Trained models tried out: conversations, and a local server that speaks OpenAI's HTTP API."""
