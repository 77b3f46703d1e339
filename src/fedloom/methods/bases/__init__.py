"""What several methods share: one file for each way of keeping, adding to or sending parameters."""
