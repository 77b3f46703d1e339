"""What touches the disk: whole files, checkpoints, run folders, clients' state."""
