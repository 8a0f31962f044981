"""Between messages and tokens: machines over texts and token ids, without a network, a terminal or a model file.

    request --messages, template--> prompt --engine--> token ids --output, call_reader--> deltas

exchange.py        both ways for one request: what to submit, and what its events mean
renderer.py        the process that a template runs in
answer_grammar.py  what an answer must be: a format, or tool calls (call_grammar.py)
parameter_types.py what a function's schema says of its parameters
"""
