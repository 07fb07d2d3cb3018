"""DyCoke Serve: the HTTP API, the worker processes and what passes between them over Redis."""
