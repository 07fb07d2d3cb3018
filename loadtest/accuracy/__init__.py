"""The laboratory: what compression costs in right answers on the synthetic test set."""
