"""What a connection may do to the work behind it: leave, linger, end with the server."""
