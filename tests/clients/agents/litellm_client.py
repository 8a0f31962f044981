"""Run by litellm.py with the Python that has litellm: one call too long for the context for each way to make it, and
the name of the exception that comes of it, as lines of JSON.

    python litellm_client.py URL KEY MODEL
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import litellm

url, key, model = sys.argv[1:]
text = "rain " * 5000
messages = [{"role": "user", "content": text}]
calls: Mapping[str, Callable[[], Any]] = {
    "openai": lambda: litellm.completion(f"openai/{model}", messages, api_base=f"{url}/v1", api_key=key),
    "openai, streamed": lambda: list(
        litellm.completion(f"openai/{model}", messages, api_base=f"{url}/v1", api_key=key, stream=True)
    ),
    "hosted_vllm": lambda: litellm.completion(f"hosted_vllm/{model}", messages, api_base=f"{url}/v1", api_key=key),
    "text-completion-openai": lambda: litellm.text_completion(
        text, f"text-completion-openai/{model}", api_base=f"{url}/v1", api_key=key
    ),
    "anthropic": lambda: litellm.completion(f"anthropic/{model}", messages, api_base=url, api_key=key),
    "anthropic, streamed": lambda: list(
        litellm.completion(f"anthropic/{model}", messages, api_base=url, api_key=key, stream=True)
    ),
    "responses": lambda: litellm.responses(text, f"openai/{model}", api_base=f"{url}/v1", api_key=key),
}

litellm.suppress_debug_info = True
for name, make in calls.items():
    try:
        make()
        raised, said = "nothing", ""
    except Exception as error:  # noqa: BLE001
        raised, said = type(error).__name__, str(error)
    print(json.dumps({"name": name, "raised": raised, "said": said}), flush=True)
