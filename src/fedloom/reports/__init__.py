"""What a run leaves behind, and pages made from that alone."""
