"""What a token and a request cost on their way from the engine to the client, by process.

See `python -m loadtest.path`.
"""
