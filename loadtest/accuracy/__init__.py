"""The laboratory: what compression costs in right answers, over the synthetic test set."""
