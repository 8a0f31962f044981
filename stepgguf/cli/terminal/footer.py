"""The counts of an answer in words: what stands below it, and what a user should know about its end."""

from __future__ import annotations

from stepgguf.conversation.records import AnswerUsage

CROWDED = 0.8  # share of the context from which on a warning is due


def usage_parts(usage: AnswerUsage) -> list[str]:
    """Return what the footer is made of, most wanted first."""
    parts = [f"{usage.n_reasoning:,} think + {usage.n_text:,} answer", f"{usage.tokens_per_second:.1f} t/s"]
    fresh = usage.n_prompt - usage.n_cached
    if usage.prompt_seconds:
        cached = f" ({usage.n_cached:,} cached)" if usage.n_cached else ""
        parts.append(f"prefill {fresh:,} @ {fresh / usage.prompt_seconds:,.0f} t/s{cached}")
    parts.append(context_part(usage))
    if usage.n_drafted and usage.n_steps:
        accepted = usage.n_accepted / usage.n_drafted
        parts.append(f"MTP {usage.n_generated / usage.n_steps:.1f} tok/step ({accepted:.0%})")
    return parts


def context_part(usage: AnswerUsage) -> str:
    """Return how full the context is."""
    if usage.n_ctx is None:
        return f"ctx {usage.n_context:,}"
    return f"ctx {usage.n_context:,}/{usage.n_ctx:,} ({usage.n_context / usage.n_ctx:.0%})"


def ending_remarks(usage: AnswerUsage, max_tokens: int | None) -> list[str]:
    """Return what the user should know about how the answer ended."""
    notes = []
    if usage.finish_reason == "length":
        limit = f"max_tokens ({max_tokens:,})" if max_tokens is not None else "the server's limit"
        limit = f"the context ({usage.n_ctx:,})" if usage.context_is_full else limit
        notes.append(f"cut off by {limit}" + ("; it had not stopped thinking" if not usage.n_text else ""))
    if usage.budget_reached:
        notes.append("the budget for thinking was used up")
    if usage.loop_broken:
        notes.append("the thinking repeated itself and was ended")
    used = usage.n_context / usage.n_ctx if usage.n_ctx else 0.0
    if used >= CROWDED and not usage.context_is_full:
        notes.append(f"{used:.0%} of the context is used; /new starts over, /undo takes back")
    return notes
