"""Methods for comparison that a service cannot offer: they look at the question or at the vision
tower's attention, so no prefix could be kept for a video's next question. One answer at a time."""
