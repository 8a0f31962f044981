"""The in-process engine: llama.cpp through llama-cpp-python's low-level API. The only place that imports llama_cpp.

llama_cpp.Llama is not used: it runs one sequence, and it reuses a common prefix of the last prompt without asking
whether the sliding window's cells still reach back so far, which with this model silently corrupts every second turn.

    engine.py         LlamaEngine: the thread that owns the context, commands, recovery
    options.py        what it is started with
    scheduler.py      which requests run, step by step
    batch.py          what goes into a decode, and which tokens come out of it
    request.py        ActiveRequest: its tokens, its reasoning, its sampler
    cache.py          which tokens stay in the context or are put away, and where a new prompt starts
    sequences.py      what the context's sequences hold, saved states, and where one can go on from
    store.py          sequences that were put away, in RAM and on disk
    sequence_file.py  one of them, and its file
    mtp.py, depth.py  drafting with the MTP blocks, and how deep
    sampler.py        logits to a token
    context.py        llama_context: batches, logits, states
    model.py          llama_model: loading, vocabulary, metadata, the log
    mtp_api.py        its functions for MTP blocks, which llama-cpp-python may lack
"""

from stepgguf.runtime.llama.engine import LlamaEngine
from stepgguf.runtime.llama.options import LlamaOptions

__all__ = ["LlamaEngine", "LlamaOptions"]
