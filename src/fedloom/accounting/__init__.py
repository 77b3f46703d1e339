"""What a run costs: bytes, floating-point operations, seconds and memory."""
