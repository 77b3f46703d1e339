"""The federation between machines: its server, its clients, and what runs there."""
