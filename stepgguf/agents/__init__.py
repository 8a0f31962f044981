"""Programs of others that work with a model on their own, and what each needs to use a server of ours.

    agent.py          what an agent is, and what makes it use a server
    claude.py ...     one file for each, data as far as it goes; catalogue.py lists them
    environment.py    the environment that an agent runs in: nothing of a cloud's is in it
    model_server.py   a server that runs: its model, its context, whether it wants a key

Nothing here starts anything: that is `stepgguf launch`.
"""
