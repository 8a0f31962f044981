"""What clients of hosted services send, for which a model on one's own machine has no use."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from stepgguf.server.body.objects import CheckedObject, ignored


class HostedServiceFields(CheckedObject):
    """They are accepted and have no effect; the description of each says why."""

    user: Any = ignored("there is one user")
    metadata: Any = ignored("nothing is stored")
    store: Any = ignored("nothing is stored")
    service_tier: Any = ignored("there is one tier")
    safety_identifier: Any = ignored("nothing is reported to anyone")
    moderation: Any = ignored("there is no moderation")
    prompt_cache_key: Any = ignored("every prefix is found without a key")
    prompt_cache_retention: Any = ignored("the cache keeps what fits")
    prompt_cache_options: Any = ignored("the cache keeps what fits")
    cache_prompt: Any = ignored("prefixes are always reused")
    verbosity: Any = ignored("the model has no such switch; ask for it in a message")
    prediction: Any = ignored("it saves time, not more; drafts come from the MTP heads")
    transforms: Any = ignored("a prompt that does not fit is refused, not cut")
    route: Any = ignored("there is one model")
    models: Any = ignored("there is one model to fall back to")
    provider: Any = ignored("there is one provider")
    plugins: Any = ignored("there are none")
    web_search_options: Any = ignored("nothing is searched here; offer a tool")
    usage: Any = ignored("usage is asked for by stream_options.include_usage")
    timings_per_token: Any = ignored("usage is asked for by stream_options.include_usage; speeds are in /metrics")
    session_id: Any = ignored("prefixes are found by their tokens")


class ExtraBody(CheckedObject):
    extra_body: dict[str, Any] | None = Field(
        None, description="As openai's library does with its argument of this name: fields for the body itself."
    )

    @model_validator(mode="before")
    @classmethod
    def _unpacked(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(extra := data.get("extra_body"), dict):
            return data
        return {**extra, **{name: value for name, value in data.items() if name != "extra_body"}}
