"""Everything that is written to disk: atomic files, checkpoints, run folders, client stores."""
