"""What a token and a request cost from the engine to the client, by process.

See `python -m loadtest.path`.
"""
