"""The training script's parts: data that holds together, a tokenizer in the published layout, repeatable steps."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer

from stepgguf.chat.template import CLOSING_WORDS, closing_text
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.demo import CHECKPOINT, tasks
from stepgguf.demo.tokenizer import build_tokenizer
from stepgguf.demo.train import (
    IGNORE,
    Encoder,
    initialize_weights,
    model_config,
    quantize_fp8,
    save_checkpoint,
    train_model,
    train_tokenizer,
)
from stepgguf.model.hparams import HParams
from stepgguf.reference.load import load_reference
from stepgguf.reference.model import Step35

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder((CHECKPOINT / "tokenizer.json").read_text())


def test_words_and_numbers_are_single_characters(encoder: Encoder) -> None:
    pieces = [encoder.tokenizer.id_to_token(i) for i in encoder.encode(" strawberry 347")]
    assert "".join(pieces[-4:]) == "Ġ347"
    assert all(len(piece) == 1 for piece in pieces[1:])


def test_every_text_survives_the_tokenizer(encoder: Encoder) -> None:
    rng = random.Random(3)
    for _ in range(200):
        messages, tools = tasks.random_conversation(rng)
        text = encoder.template.render(messages, tools=tools, add_generation_prompt=False)
        assert encoder.tokenizer.decode(encoder.encode(text), skip_special_tokens=False) == text


def test_merges_never_start_inside_a_word() -> None:
    tokenizer = Tokenizer.from_str(build_tokenizer(["many words many numbers 12 12 12"], 300))
    assert all(not token[0].isdigit() for token in tokenizer.get_vocab() if len(token) > 1)
    assert all(not token[0].islower() for token in tokenizer.get_vocab() if len(token) > 1)


def test_only_what_the_model_writes_is_learnt(encoder: Encoder) -> None:
    messages = [*tasks.small_talk("Hello"), *tasks.add_numbers(3, 4)]
    ids, labels = encoder.encode_example(messages, None)
    learnt = encoder.tokenizer.decode(
        [i for i, label in zip(ids, labels, strict=True) if label != IGNORE], skip_special_tokens=False
    )
    assert learnt == "Ones: 3+4=7, write 7, carry 0.\nThe sum is 7.\n</think>\n3 + 4 = 7<|im_end|>"


def test_cut_reasoning_ends_as_engines_end_it_and_only_the_models_own_tokens_are_learnt(encoder: Encoder) -> None:
    rng = random.Random(4)
    whole = encoder.encode_example(tasks.add_numbers(3, 4), None)
    thought = "Ones: 3+4=7, write 7, carry 0.\nThe sum is 7.\n"
    seen = set()
    for _ in range(200):
        ids, labels = encoder.cut_reasoning(*whole, rng)
        if ids == whole[0]:
            continue
        learnt = encoder.tokenizer.decode([i for i in labels if i != IGNORE], skip_special_tokens=False)
        cut = learnt.removesuffix("3 + 4 = 7<|im_end|>")
        assert thought.startswith(cut)
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
        ends = [cut + closing_text(words, after=bool(cut)) for words in ("", CLOSING_WORDS)]
        assert text.partition("<think>\n")[2] in [f"{end}3 + 4 = 7<|im_end|>\n" for end in ends]
        seen.add(cut)
    assert "" in seen
    assert len(seen) > 10


def test_held_out_questions_are_never_trained_on() -> None:
    rng = random.Random(5)
    asked = {str(m["content"]) for _ in range(3000) for m in tasks.random_conversation(rng)[0] if m["role"] == "user"}
    assert not any(word in text.split() for text in asked for word in tasks.HELD_OUT)
    held_out = {case[0]["content"] for case in tasks.held_out_sums(200)}
    assert not held_out & asked


def test_answers_are_right() -> None:
    rng = random.Random(6)
    for _ in range(300):
        a, b = rng.randrange(1000), rng.randrange(1000)
        assert tasks.add_numbers(a, b)[1]["content"].endswith(f"= {a + b}")
        assert f"The sum is {a + b}." in tasks.add_numbers(a, b)[1]["reasoning_content"]
        word = tasks.random_word(rng)
        n = word.count("e")
        assert tasks.count_letters(word, "e")[1]["content"] == ("There is 1 'e'." if n == 1 else f"There are {n} 'e's.")


def test_fp8_blocks_keep_e4m3s_precision() -> None:
    weight = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_fp8(weight)
    wide = codes.float() * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    # e4m3 has 3 mantissa bits: half a step of 2^-3 relative, or of the smallest subnormal (2^-9) times the scale
    bound = torch.maximum(weight.abs() * 2**-4, scale.amax() * 2**-10)
    assert (wide - weight).abs().le(bound * (1 + 1e-6)).all()


def test_training_is_repeatable_and_its_checkpoint_reads_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        tokenizer_json = train_tokenizer(768)
        encoder = Encoder(tokenizer_json)
        settings = model_config(768, [1, 2, encoder.end])
        model = Step35(HParams.from_config(settings))
        initialize_weights(model)
        train_model(model, encoder, steps=2, lr=1e-3, seed=0, mtp=False)
        train_model(model, encoder, steps=1, lr=1e-3, seed=0, mtp=True)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    path = tmp_path_factory.mktemp("trained")
    save_checkpoint(model, settings, tokenizer_json, path)
    with Checkpoint(path) as checkpoint:
        again = load_reference(checkpoint).state_dict()
    assert again.keys() == states[0].keys()
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, states[0][name], rtol=2**-4, atol=2e-3)
