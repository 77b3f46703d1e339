"""What a method is, what a client is, and how both are asked and judged."""
