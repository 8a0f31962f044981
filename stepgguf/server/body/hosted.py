"""What clients of hosted services send, for which a model on one's own machine has no use."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from stepgguf.server.body.objects import CheckedObject, ignored

CONVERSATION = (
    "Tells conversations apart that begin alike, for limits of what a message may cost; prefixes are found without it."
)


class HostedServiceFields(CheckedObject):
    """They are accepted and have no effect; the description of each says why."""

    user: object = ignored("there is one user")
    metadata: object = ignored("nothing is stored")
    store: object = ignored("nothing is stored")
    service_tier: object = ignored("there is one tier")
    safety_identifier: object = ignored("nothing is reported to anyone")
    moderation: object = ignored("there is no moderation")
    prompt_cache_retention: object = ignored("the cache keeps what fits")
    prompt_cache_options: object = ignored("the cache keeps what fits")
    cache_prompt: object = ignored("prefixes are always reused")
    verbosity: object = ignored("the model has no such switch; ask for it in a message")
    prediction: object = ignored("it saves time, not more; drafts come from the MTP heads")
    transforms: object = ignored("a prompt that does not fit is refused, not cut")
    route: object = ignored("there is one model")
    models: object = ignored("there is one model to fall back to")
    provider: object = ignored("there is one provider")
    plugins: object = ignored("there are none")
    web_search_options: object = ignored("nothing is searched here; offer a tool")
    usage: object = ignored("usage is asked for by stream_options.include_usage")
    timings_per_token: object = ignored("usage is asked for by stream_options.include_usage; speeds are in /metrics")
    prompt_cache_key: object = Field(None, description=CONVERSATION)
    session_id: object = Field(None, description=CONVERSATION)

    @property
    def conversation_name(self) -> str:
        """What the client calls the conversation; empty if it does not name it."""
        names = (self.prompt_cache_key, self.session_id)
        return next((name for name in names if isinstance(name, str)), "")


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
