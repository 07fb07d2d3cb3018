"""Policy `auto` against fixed settings at the same arrivals: `loadtest.compare --auto`."""
