"""Train the embedded model: `python -m stepgguf.demo.train OUT_DIR`. CPU, seeded, about ninety minutes on two cores.

    1. tokenizer from the tasks' own text
    2. trunk, loss on the assistant's tokens, learning rate constant, then linearly down to zero
    3. the three MTP heads, trunk frozen
    4. written as a published checkpoint: block-FP8 experts, BF16 rest, F32 router bias, norms minus one

The checkpoint that ships here was made in several runs, each from the one before (`--start`), and the tasks grew on the
way. Held-out letter counts, exact to the last token: 9,000 steps of trunk, 91.5 %; it failed on words that begin like a
word of the prompts, whose first letters are one token (tasks.OPENINGS). 1,800 more at 6e-4 with such words, 92.5 %;
1,000 more at 6e-4 with those words more often and three questions in four about letters, 98 %. Sums were at 100 % from
the 8,000th step on. Then 1,500 steps of MTP. At last 900 steps of trunk at 5e-4 in which a third of the reasoning is
cut (`Encoder.cut_reasoning`), after which it answers whenever it is stopped, and 250 of MTP.

The reference model is trained as it is; nothing here knows the architecture except `model_config`. Router load is
balanced without an auxiliary loss, by nudging the selection bias (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from stepgguf.chat.template import CLOSING_WORDS, ChatTemplate, closing_text
from stepgguf.convert.sources.checkpoint import Checkpoint
from stepgguf.demo import CHECKPOINT, tasks, tokenizer
from stepgguf.model.hparams import HParams
from stepgguf.model.names import TensorName
from stepgguf.reference.load import load_reference
from stepgguf.reference.model import DecoderLayer, MoE, Step35

ROW_TOKENS, N_ROWS = 512, 4  # tokens in a packed row, rows in a step
IGNORE = -100
BIAS_STEP = 1e-3  # router bias nudge per step
CUT_SHARE = 0.35  # share of reasoning that training cuts off
CUT_BEFORE = 0.4  # share of the cuts before the first token, as with effort none
CUT_SILENTLY = 0.3  # share of the cuts without the closing words


def model_config(vocab_size: int, eos: list[int]) -> dict[str, Any]:
    """The real architecture in small: every mechanism of Step-3.5-Flash is there, widths are multiples of 256."""
    n_layer, n_mtp = 5, 3
    types = ["sliding_attention" if i % 4 else "full_attention" for i in range(n_layer + n_mtp)]
    types[n_layer:] = ["sliding_attention"] * n_mtp
    sliding = [kind == "sliding_attention" for kind in types]
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 2048,
                         "low_freq_factor": 1.0, "high_freq_factor": 32.0},
        "yarn_only_types": ["full_attention"],
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": n_layer,
        "max_seq_len": 4096,
        "vocab_size": vocab_size,
        "torch_dtype": "bfloat16",
        "use_qk_norm": True,
        "moe_layers_enum": "2,3,4",
        "num_attention_heads": 4,
        "num_attention_groups": 2,
        "head_dim": 64,
        "use_moe": True,
        "moe_num_experts": 6,
        "moe_top_k": 2,
        "moe_intermediate_size": 256,
        "share_expert_dim": 256,
        "moe_layer_offset": 0,
        "moe_every_n_layer": 1,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "att_impl_type": "GQA",
        "tie_word_embeddings": False,
        "rope_theta": [10000.0 if s else 5000000.0 for s in sliding],
        "use_head_wise_attn_gate": True,
        "sliding_window": 64,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "sink": False,
        "layer_types": types,
        "use_rope_layers": [],
        "num_nextn_predict_layers": n_mtp,
        "partial_rotary_factors": [1.0 if s else 0.5 for s in sliding],
        "eos_token_id": eos,
        "bos_token_id": 0,
        "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 6,
                                    "num_attention_groups": 2, "head_dim": 64, "true_head_dim": 64},
        "swiglu_limits": [0.0, 0.0, 0.0, 7, 7, 0.0, 0.0, 0.0],
        "swiglu_limits_shared": [0.0, 0.0, 0.0, 0.0, 16, 0.0, 0.0, 0.0],
        "zero_centered": True,
        "max_position_embeddings": 4096,
    }  # fmt: skip


class Encoder:
    """Encodes conversations as ids and labels. Only what an assistant writes after the last question is learnt."""

    def __init__(self, tokenizer_json: str) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.template = ChatTemplate((CHECKPOINT / "chat_template.jinja").read_text(), bos_token=tokenizer.BOS)
        self.think, self.end, self.start = (self.token_id(t) for t in ("<think>", "<|im_end|>", "<|im_start|>"))
        self.close = self.token_id("</think>")

    def token_id(self, token: str) -> int:
        """The id of a token that the vocabulary has."""
        found = self.tokenizer.token_to_id(token)
        assert found is not None
        return int(found)

    def encode(self, text: str) -> list[int]:
        """The text's token ids, special tokens in it included and none added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_example(
        self, messages: list[tasks.Message], tools: list[dict[str, Any]] | None
    ) -> tuple[list[int], list[int]]:
        """Token ids and, at the same positions, the labels (the token itself, or IGNORE)."""
        ids = self.encode(self.template.render(messages, tools=tools, add_generation_prompt=False))
        labels, learn = [], False
        for i, token in enumerate(ids):
            labels.append(token if learn else IGNORE)
            if token == self.end:
                learn = False
            elif i and ids[i - 1] == self.think:  # the prompt ends with "<think>\n"
                learn = True
        return ids, labels

    def cut_reasoning(self, ids: list[int], labels: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
        """An example in which some reasoning is cut, as engines do it: at any token, with words that it did not choose.

        It learns to answer then, as well as it can, instead of reasoning on.
        """
        ids, labels = ids.copy(), labels.copy()
        for think in reversed([i for i, token in enumerate(ids) if token == self.think]):
            if rng.random() >= CUT_SHARE:
                continue
            first, end = think + 2, ids.index(self.close, think)  # "<think>\n" is the prompt's
            n = 0 if rng.random() < CUT_BEFORE else rng.randint(1, rng.choice([min(24, end - first), end - first]))
            words = "" if rng.random() < CUT_SILENTLY else CLOSING_WORDS
            close = self.encode(closing_text(words, after=n > 0))
            ids[first + n : end + 2] = close
            labels[first + n : end + 2] = [IGNORE] * len(close)
        return ids, labels


def packed_batches(encoder: Encoder, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An endless stream of packed batches: tokens, labels and document ids, each [N_ROWS, ROW_TOKENS]."""
    rng = random.Random(seed)
    waiting: list[tuple[list[int], list[int]]] = []
    while True:
        batch = []
        for _ in range(N_ROWS):
            tokens: list[int] = []
            labels: list[int] = []
            document: list[int] = []
            n = 0
            while len(waiting) < 32:  # enough to choose from that rows are nearly full
                example = encoder.cut_reasoning(*encoder.encode_example(*tasks.random_conversation(rng)), rng)
                if len(example[0]) <= ROW_TOKENS:
                    waiting.append(example)
            while (
                fit := next((i for i, e in enumerate(waiting) if len(tokens) + len(e[0]) <= ROW_TOKENS), None)
            ) is not None:
                example = waiting.pop(fit)
                tokens += example[0]
                labels += example[1]
                document += [n] * len(example[0])
                n += 1
            fill = ROW_TOKENS - len(tokens)
            batch.append((tokens + [2] * fill, labels + [IGNORE] * fill, document + [n] * fill))
        yield tuple(torch.tensor(part) for part in zip(*batch, strict=True))  # type: ignore[misc]


def train_tokenizer(vocab_size: int) -> str:
    """The text of tokenizer.json, from what the tasks say."""
    rng = random.Random(0)
    template = ChatTemplate((CHECKPOINT / "chat_template.jinja").read_text(), bos_token=tokenizer.BOS)
    conversations = (tasks.random_conversation(rng) for _ in range(4000))
    texts = [template.render(m, tools=t, add_generation_prompt=False) for m, t in conversations]
    return tokenizer.build_tokenizer(texts, vocab_size)


def initialize_weights(model: Step35) -> None:
    """Small embeddings, and zero in what writes to the residual stream, so that each layer starts as the identity."""
    nn.init.normal_(model.model.embed_tokens.weight, std=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)


def rate_at(step: int, steps: int, warmup: int = 100, decay: float = 0.4) -> float:
    """The learning rate's share of its peak: up over `warmup` steps, down to zero over the last `decay` of all."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (steps * decay))


def shifted_cross_entropy(logits: Tensor, labels: Tensor, shift: int) -> Tensor:
    """Mean loss of logits at i against the token at i + shift."""
    return F.cross_entropy(logits[:, :-shift].flatten(0, 1).float(), labels[:, shift:].flatten(), ignore_index=IGNORE)


def make_optimizer(parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-10, fused=True)


def descend(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], loss: Tensor, lr: float) -> None:
    """One step down the loss's gradient, whose norm is bounded by 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def balance_routers(routers: list[MoE]) -> None:
    """Make experts that had too few tokens in the last forward pass likelier, and those that had too many less so."""
    for router in routers:
        router.router_bias.add_(BIAS_STEP * torch.sign(router.load.mean() - router.load))


def train_model(model: Step35, encoder: Encoder, steps: int, lr: float, seed: int, mtp: bool) -> None:
    """Train the trunk, or with `mtp` the MTP blocks over a frozen trunk."""
    routers = [module for module in model.modules() if isinstance(module, MoE)]
    parameters = freeze_all_but(model, routers, mtp)
    optimizer = make_optimizer(parameters, lr)
    started, seen = time.time(), 0
    for step, (tokens, labels, document) in zip(range(steps), packed_batches(encoder, seed), strict=False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = mtp_loss(model, tokens, labels, document) if mtp else trunk_loss(model, tokens, labels, document)
        descend(optimizer, parameters, loss, lr * rate_at(step, steps))
        if not mtp:
            balance_routers(routers)
        seen += tokens.numel()
        if step % 100 == 99:
            speed = seen / (time.time() - started)
            part = "mtp" if mtp else "trunk"
            print(f"{part} {step + 1}/{steps} loss {loss.item():.4f} {speed:.0f} tok/s", flush=True)
        if step % 1000 == 999:
            print(json.dumps(evaluate(model, encoder, 100)), flush=True)


def freeze_all_but(model: Step35, routers: list[MoE], mtp: bool) -> list[nn.Parameter]:
    """Have gradients for the trunk's parameters only, or with `mtp` for those of the MTP blocks; gives these.

    The routers' biases have none: training moves them by hand.
    """
    trunk = {id(p) for name, p in model.named_parameters() if not TensorName(name).is_mtp(model.hp.n_layer)}
    biases = {id(router.router_bias) for router in routers}
    for p in model.parameters():
        p.requires_grad_((id(p) not in trunk) == mtp and p.dtype.is_floating_point and id(p) not in biases)
    return [p for p in model.parameters() if p.requires_grad]


def trunk_loss(model: Step35, tokens: Tensor, labels: Tensor, document: Tensor | None = None) -> Tensor:
    """The trunk's mean loss on the next token."""
    return shifted_cross_entropy(model.logits(model.hidden(tokens, document)), labels, 1)


def mtp_loss(model: Step35, tokens: Tensor, labels: Tensor, document: Tensor) -> Tensor:
    """The mean of the MTP blocks' losses: block k is to name the token at i + 2 + k."""
    with torch.no_grad():
        hidden = model.hidden(tokens, document)
    drafts = mtp_logits(model, tokens, hidden, document)
    return torch.stack([shifted_cross_entropy(draft, labels, k + 2) for k, draft in enumerate(drafts)]).mean()


def mtp_logits(model: Step35, tokens: Tensor, hidden: Tensor, document: Tensor) -> list[Tensor]:
    """Step35.mtp, but each position of a later head sees, by a coin, the head before it or the trunk one token on.

    Both stand for the same prefix. Engines feed the trunk's state wherever they have it (llama.cpp fills each head's
    cache for the prompt with it) and the chain's only for what they draft, so a head must understand either.
    """
    mask = model.masks(tokens.shape[1], document)[1]
    trunk, drafts = hidden, []
    for layer in model.model.layers[model.hp.n_layer :]:
        assert isinstance(layer, DecoderLayer)
        tokens = torch.cat([tokens[:, 1:], tokens[:, -1:]], dim=1)
        hidden = layer(layer.combine(model.model.embed_tokens(tokens), hidden), mask)
        drafts.append(layer.draft(hidden))
        trunk = torch.cat([trunk[:, 1:], trunk[:, -1:]], dim=1)
        hidden = torch.where(torch.rand(*tokens.shape, 1) < 0.5, hidden, trunk.to(hidden.dtype))
    return drafts


@torch.no_grad()
def evaluate(model: Step35, encoder: Encoder, n: int) -> dict[str, float]:
    """Share of held-out questions whose whole turn is the argmax at every token, and how often MTP heads agree.

    An MTP head is right where it names the token that the trunk itself would have chosen.
    """
    result: dict[str, float] = {}
    agree, total = torch.zeros(model.hp.n_mtp), torch.zeros(model.hp.n_mtp)
    for name, cases in (("letters", tasks.held_out_letters(n)), ("sums", tasks.held_out_sums(n))):
        right = 0
        for messages in cases:
            ids, labels = encoder.encode_example(messages, None)
            tokens, wanted = torch.tensor([ids]), torch.tensor([labels])
            hidden = model.hidden(tokens)
            best = model.logits(hidden).argmax(-1)
            right += bool(((best[:, :-1] == wanted[:, 1:]) | (wanted[:, 1:] == IGNORE)).all())
            for k, draft in enumerate(model.mtp(tokens, hidden)):
                asked = wanted[:, 2 + k :] != IGNORE
                same = draft.argmax(-1)[:, : -2 - k] == best[:, 1 + k : -1]
                agree[k] += (same & asked).sum()
                total[k] += asked.sum()
        result[name] = right / n
    return result | {f"mtp{k + 1}": round(float(a / t), 4) for k, (a, t) in enumerate(zip(agree, total, strict=True))}


def quantize_fp8(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """[n, rows, cols] -> float8_e4m3fn of the same shape and the float32 scale of each block x block tile."""
    n, height, width = weight.shape
    tiles = weight.view(n, height // block, block, width // block, block)
    scale = (tiles.abs().amax(dim=(2, 4), keepdim=True) / 448.0).clamp(min=1e-12)
    return (tiles / scale).to(torch.float8_e4m3fn).view_as(weight), scale[:, :, 0, :, 0].contiguous()


def save_checkpoint(
    model: Step35, settings: dict[str, Any], tokenizer_json: str, out: Path, *, fp8: bool = True
) -> None:
    """Write the checkpoint as the published block-FP8 repositories are: three shards, no index. Or in BF16."""
    shards: list[dict[str, Tensor]] = [{}, {}, {}]
    for name, tensor in model.state_dict().items():
        mtp, experts = TensorName(name).is_mtp(model.hp.n_layer), ".moe." in name and name.endswith("_proj.weight")
        shard = shards[2 if mtp or "layers" not in name else 1 if experts else 0]
        if experts and fp8:
            shard[name], shard[f"{name}_scale_inv"] = quantize_fp8(tensor)
        else:
            shard[name] = tensor if name.endswith("router_bias") else tensor.bfloat16()
    out.mkdir(parents=True, exist_ok=True)
    for i, shard in enumerate(shards):
        save_file(shard, out / f"model-{i + 1:05d}.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = {**settings, "quantization_config": quantization} if fp8 else settings
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "tokenizer.json").write_text(tokenizer_json + "\n")
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": tokenizer.BOS,
        "eos_token": "<|im_end|>",
        "pad_token": tokenizer.END_OF_SENTENCE,
        "unk_token": None,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, ensure_ascii=False, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="directory of the checkpoint")
    parser.add_argument("--start", type=Path, help="go on from this checkpoint, with its tokenizer, and not from noise")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--mtp-steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--vocab", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    tokenizer_json = (args.start / "tokenizer.json").read_text().strip() if args.start else train_tokenizer(args.vocab)
    encoder = Encoder(tokenizer_json)
    settings = model_config(args.vocab, [1, 2, encoder.end])
    if args.start:
        with Checkpoint(args.start) as checkpoint:
            model = load_reference(checkpoint).train()
    else:
        model = Step35(HParams.from_config(settings))
        initialize_weights(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    train_model(model, encoder, args.steps, args.lr, args.seed, mtp=False)
    save_checkpoint(model, settings, tokenizer_json, args.out)
    train_model(model, encoder, args.mtp_steps, args.lr, args.seed + 1, mtp=True)
    save_checkpoint(model, settings, tokenizer_json, args.out)
    print(json.dumps(evaluate(model, encoder, 200)), flush=True)


if __name__ == "__main__":
    main()
