"""What travels: schemas, payloads, envelopes, framing."""
