"""Words of others, made safe to show."""
