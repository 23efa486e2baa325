"""Load on an OpenAI-compatible server as its clients see it.

Knows HTTP and a clock; nothing of the model or the engine.
"""
