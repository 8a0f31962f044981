"""The in-process engine: llama.cpp through llama-cpp-python's low-level API. The only place that imports llama_cpp.

llama_cpp.Llama is not used: it runs one sequence, and it reuses a common prefix of the last prompt without asking
whether the sliding-window cache still holds it, which with this model silently corrupts every second turn.

    engine.py     LlamaEngine: the thread that owns the context, commands, recovery
    scheduler.py  which tokens of which requests go into the next decode, and what comes out of it
    run.py        one request on its way: its tokens, its thinking, its sampler
    prefix.py     what the sequences hold, checkpoints, and where a new prompt can go on from
    store.py      idle sequences in RAM and on disk
    mtp.py        drafting with the MTP heads, and how deep
    sampler.py    logits to a token
    context.py    llama_context: batches, logits, states
    model.py      llama_model: loading, vocabulary, metadata, the log
"""

from stepgguf.runtime.llama.engine import LlamaEngine

__all__ = ["LlamaEngine"]
