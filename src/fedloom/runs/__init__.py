"""A run from experiment to run folder, comparisons, evaluations, exports."""
