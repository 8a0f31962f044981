"""The engine that runs in another process: llama.cpp's llama-server, spoken to by token ids over HTTP.

It brings what llama-server has and we have not: a crash that takes nothing else along, its own fitting of the model
into memory, and weights spread over machines (--rpc). Template, reasoning, tools and wire formats stay ours.

    engine.py      LlamaServerEngine: the queue, and what the model is
    request.py     one request as one or more completions
    settings.py    sampling, as llama-server spells it
    gbnf.py        grammars that start with another rule
    vocabulary.py  text to token ids and back
    client.py      what it says over HTTP (runtime/http_events.py reads it)
    process.py     a llama-server of our own: started, watched, started again
    options.py     what it is started with
"""

from stepgguf.runtime.llamaserver.engine import LlamaServerEngine
from stepgguf.runtime.llamaserver.options import ServerOptions

__all__ = ["LlamaServerEngine", "ServerOptions"]
