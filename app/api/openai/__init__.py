"""The HTTP surface that OpenAI's clients, and those made for vLLM, already use.

It has the same jobs, queue, receipts and cancellation as `/v1/video/chat`, but other bodies,
streams and errors. This package parses what clients send into what `app.api.post` takes.
"""
