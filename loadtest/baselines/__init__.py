"""Methods that a service cannot offer, for comparison: they see the question or need the tower's
attention, so that nothing of a video could be kept for its next question. One answer at a time."""
