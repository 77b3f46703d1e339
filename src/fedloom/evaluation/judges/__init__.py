"""Who scores answers: rules, a local model, an HTTP endpoint."""
