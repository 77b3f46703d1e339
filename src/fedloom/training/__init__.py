"""What happens on one client between receiving and sending."""
