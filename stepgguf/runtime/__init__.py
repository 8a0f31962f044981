"""Tokens in, tokens out: what runs a model. Nothing here knows a message, a template or HTTP requests of clients.

engine.py            the protocol that everything above uses
llama/               the engine in this process
llamaserver/         the engine in a llama-server, over http_events.py
reasoning_limit.py   when reasoning must be closed, for both; loops.py finds the one that repeats itself
passages.py          long texts, cut to be tokenized, for both
llama_build.py       what the installed llama-cpp-python can do on this machine
"""
