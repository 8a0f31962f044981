"""Fields that the server does not know: misspelt, a vendor's extra, or another dialect's name."""

from __future__ import annotations

import logging
import typing
from typing import Any

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from stepgguf.server.body.unknown_fields import MOST_NAMES, UnknownFields, near_miss
from stepgguf.server.dialects.chat_completions.request import ChatBody, StreamOptions
from stepgguf.server.dialects.completions.route import CompletionBody
from tests.server.conftest import Serve, Server

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
# Extras of vLLM, SGLang, llama-server, Ollama, LM Studio, text-generation-webui, OpenRouter, DashScope, Mistral, Groq,
# xAI, Perplexity, MiniMax, Dify, LiteLLM: none is a misspelling, however much it looks like one.
EXTRAS = """
add_generation_prompt allowed_token_ids auto_max_new_tokens bad_words ban_eos_token cache_salt
continue_final_message custom_logit_processor documents dry_base dry_multiplier dry_penalty_last_n
dynamic_temperature early_stopping echo_prompt enable_search fallbacks guided_decoding_backend
guided_whitespace_pattern id_slot ignore_eos include_stop_str_in_output incremental_output keep_alive
kv_transfer_params length_penalty logits_processors lora_path max_input_tokens mask_sensitive_info min_keep
min_tokens mirostat mirostat_eta mirostat_tau mm_processor_kwargs mode n_ctx n_discard n_keep no_stop_trim num_ctx
options parallel_tool_call_limit parse_tool_calls post_sampling_probs preset priority prompt_logprobs prompt_mode
random_seed raw reasoning_in_content reasoning_split repeat_last_n request_id response_fields result_format
return_progress return_token_ids return_tokens return_tokens_as_token_ids router safe_prompt samplers
search_parameters separate_reasoning skip_special_tokens spaces_between_special_tokens stop_token_ids
stream_reasoning t_max_predict_ms template_vars tfs tool_call_parser top_a top_n_sigma truncate_prompt_tokens
typical_p use_beam_search user_id vllm_xargs xtc_probability xtc_threshold
""".split()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("temprature", "temperature"),
        ("tempereture", "temperature"),
        ("Temperature", "temperature"),
        ("topP", "top_p"),
        ("top-p", "top_p"),
        ("maxTokens", "max_tokens"),
        ("maxtokens", "max_tokens"),
        ("max_token", "max_tokens"),
        ("max_completion_token", "max_completion_tokens"),
        ("tool", "tools"),
        ("stops", "stop"),
        ("stpo", "stop"),
        ("strem", "stream"),
        ("tools_choice", "tool_choice"),
        ("tool_choise", "tool_choice"),
        ("response_formt", "response_format"),
        ("reasoning_efort", "reasoning_effort"),
        ("enable_thinkng", "enable_thinking"),
        ("presense_penalty", "presence_penalty"),
        ("frequancy_penalty", "frequency_penalty"),
        ("logit_bais", "logit_bias"),
        ("chat_template_kwarg", "chat_template_kwargs"),
    ],
)
def test_a_misspelt_field_is_recognised(written: str, meant: str) -> None:
    assert near_miss(written, ChatBody.model_fields) == meant
    with pytest.raises(ValidationError, match=f"did you mean {meant}"):
        ChatBody.model_validate({**HELLO, written: 1})


@pytest.mark.parametrize("name", EXTRAS)
def test_a_vendors_extra_is_not_taken_for_a_misspelling(name: str) -> None:
    ChatBody.model_validate({**HELLO, name: 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "name", "meant"),
    [
        ("/v1/chat/completions", "n_predict", "max_completion_tokens"),
        ("/v1/chat/completions", "max_output_tokens", "max_completion_tokens"),
        ("/v1/chat/completions", "stop_sequences", "stop"),
        ("/v1/chat/completions", "input", "messages"),
        ("/v1/completions", "max_completion_tokens", "max_tokens"),
        ("/v1/completions", "n_probs", "logprobs"),
        ("/v1/responses", "max_tokens", "max_output_tokens"),
        ("/v1/responses", "messages", "input"),
        ("/v1/messages", "max_output_tokens", "max_tokens"),
        ("/v1/messages", "instructions", "system"),
    ],
)
def test_another_dialects_name_is_answered_with_ours(server: Server, path: str, name: str, meant: str) -> None:
    """Whatever else the body lacks: names come first."""
    response = server.client.post(path, json={name: 5})
    assert response.status_code == 400
    assert f"{name}: unknown field; here it is {meant}" in response.json()["error"]["message"]


@pytest.mark.slow
def test_an_extra_is_logged_once_and_never_its_value(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    extras = {"top_a": "s3cret", "enable_search": True, "reasoning": {"effort": "high", "budget_ratio": "s3cret"}}
    with serve() as server, caplog.at_level(logging.INFO, "stepgguf.server"):
        for _ in range(3):
            assert server.client.post("/v1/chat/completions", json={**HELLO, **extras}).status_code == 200
    for name in ("top_a", "enable_search", "budget_ratio"):
        assert sum(repr(name) in message for message in caplog.messages) == 1
    assert "s3cret" not in caplog.text


@pytest.mark.slow
def test_a_strict_server_refuses_extras_but_not_what_it_knows(serve: Serve) -> None:
    with serve(strict=True) as server:
        for extra, param in (({"top_a": 1}, "top_a"), ({"reasoning": {"ratio": 1}}, "reasoning.ratio")):
            error = server.client.post("/v1/chat/completions", json={**HELLO, **extra}).json()["error"]
            assert error["param"] == param
            assert "strict" in error["message"]
        known = {"user": "u", "metadata": {"top_a": "1"}, "thinking": {"type": "enabled", "clear_thinking": False}}
        assert server.client.post("/v1/chat/completions", json={**HELLO, **known, "top_a": None}).status_code == 200


def test_clients_cannot_fill_the_log_with_names(caplog: pytest.LogCaptureFixture) -> None:
    fields = UnknownFields()
    fields.ignore("field", (f"name{i}\n" * 100 for i in range(2 * MOST_NAMES)))
    assert len(caplog.messages) == MOST_NAMES
    assert all(len(message) < 200 and "\n" not in message for message in caplog.messages)


def test_a_long_list_of_alike_tools_is_looked_at_once_and_of_unlike_ones_refused(server: Server) -> None:
    """Each name is compared with all that are known, which takes its time."""

    def send(name: str) -> int:
        tools = [{"function": {"name": f"t{i}", name.format(i=i): 1}} for i in range(1000)]
        return server.client.post("/tokenize", json={**HELLO, "tools": tools}).status_code

    assert send("annotations") == 200
    assert send("x{i}") == 400


@pytest.mark.parametrize(
    ("body", "documented", "refused"),
    [
        (ChatBody, chat_params.CompletionCreateParamsBase, {"audio", "functions", "function_call"}),
        (CompletionBody, completion_params.CompletionCreateParamsBase, set()),
        (StreamOptions, ChatCompletionStreamOptionsParam, set()),
    ],
)
def test_every_field_that_openai_documents_is_known(body: Any, documented: Any, refused: set[str]) -> None:
    names = set(typing.get_type_hints(documented))
    assert names - set(body.model_fields) == refused
    assert refused <= set(body.elsewhere)
