"""The surface that OpenAI's clients, and those made for vLLM, already speak.

The same jobs, queue, receipts and cancellation as `/v1/video/chat`; another form of bodies, streams
and errors. What clients send is read here and becomes what `app.api.post` takes.
"""
