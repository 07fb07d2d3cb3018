"""Everything that the service keeps in Redis: its keys, its scripts, and what they do."""
