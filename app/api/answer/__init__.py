"""A job's events on their way to a client."""
