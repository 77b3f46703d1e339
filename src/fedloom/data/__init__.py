"""What a client holds: examples, where they come from, who gets which, and as which tokens."""
