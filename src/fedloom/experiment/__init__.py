"""What an experiment's file says, and what in it cannot both be meant."""
