"""The model behind HTTP, in the dialects of OpenAI and Anthropic.

    bytes --http/, middleware/--> route --body/, dialects/NAME/request--> ChatRequest --service--> Generation
    bytes <--http/sse.py--------- records <------dialects/NAME/writer---- deltas <-----------------------

app.py puts it together. body/ has the fields that dialects share, routes/ what is of no dialect. What goes wrong is an
exception until middleware/errors.py; problem.py says what is said of it, the dialect's ErrorForm how.
"""
