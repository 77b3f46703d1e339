"""Messages: schemas, payloads, envelopes, framing."""
