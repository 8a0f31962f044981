"""Step-3.5's forward pass in plain torch: the specification that everything else is checked against.

Module and parameter names are those of the published safetensors, so `load_state_dict` takes a checkpoint as it is
(dequantized) and `state_dict` is one. Shapes below: b batch, t tokens, d hidden_size, h heads, e head_dim.

    x = embed(tokens)
    for each trunk layer:   x += attention(norm(x));  x += ffn(norm(x))
    logits = lm_head(norm(x))

    MTP block k (chained):  h = eh_proj([enorm(embed(token t+1+k)), hnorm(h)]);  h = layer(h)
                            logits for token t+2+k = shared_head.output(shared_head.norm(h))
    where h starts as x *before* the final norm.

What is easy to get wrong, and what this file settles: every norm weight is stored minus one; q and k are normed per
head before RoPE; full-attention layers rotate only half of the head, and only they have llama3 scaling; the gate is
one sigmoid per head on the attention output before o_proj; the router's bias selects experts but does not weigh them;
SwiGLU clamps after silu, and clamps gate from above only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepgguf.model.hparams import HParams
from stepgguf.model.layers import Layer, RopeScaling

QUERY_BLOCK = 256  # queries that attention works on together


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


def rope_frequencies(layer: Layer, scaling: RopeScaling | None) -> Tensor:
    """The layer's n_rot / 2 angular frequencies (radians per position), llama3-scaled on full-attention layers."""
    freqs = 1.0 / layer.rope_theta ** (torch.arange(0, layer.n_rot, 2, dtype=torch.float32) / layer.n_rot)
    if scaling is None or layer.is_sliding:
        return freqs
    return freqs / rope_scaling_factors(freqs, scaling)


def rope_scaling_factors(freqs: Tensor, s: RopeScaling) -> Tensor:
    """What each frequency is divided by: 1 for short wavelengths, `factor` for long ones, a smooth step between."""
    turns = s.original_max_position * freqs / (2 * math.pi)
    smooth = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / s.factor + smooth)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """NeoX RoPE on the first 2 * angles.shape[-1] dimensions of x [b, t, h, e]; angles [t, n_rot / 2]."""
    half = angles.shape[-1]
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def causal_mask(
    t: int, sliding_window: int | None = None, document: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """True where a query (row) may see a key (column): [t, t], or [b, 1, t, t] with `document` ids [b, t].

    A sliding window of w lets a query see w keys, itself included.
    """
    position = torch.arange(t, device=device)
    distance = position[:, None] - position
    mask = (distance >= 0) if sliding_window is None else (distance >= 0) & (distance < sliding_window)
    if document is None:
        return mask
    return mask & (document[:, None, :, None] == document[:, None, None, :])


class Attention(nn.Module):
    """Grouped-query attention with normed q and k, and a gate for each head; x [b, t, d] -> [b, t, d]."""

    def __init__(self, hp: HParams, layer: Layer) -> None:
        super().__init__()
        d, q_size, kv_size = hp.hidden_size, layer.n_head * hp.head_dim, layer.n_head_kv * hp.head_dim
        self.head_dim = hp.head_dim
        self.q_proj = nn.Linear(d, q_size, bias=False)
        self.k_proj = nn.Linear(d, kv_size, bias=False)
        self.v_proj = nn.Linear(d, kv_size, bias=False)
        self.g_proj = nn.Linear(d, layer.n_head, bias=False)
        self.o_proj = nn.Linear(q_size, d, bias=False)
        self.q_norm = RMSNorm(hp.head_dim, hp.rms_norm_eps)
        self.k_norm = RMSNorm(hp.head_dim, hp.rms_norm_eps)
        self.register_buffer("frequencies", rope_frequencies(layer, hp.rope_scaling), persistent=False)

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        """What o_proj is given: the heads' gated outputs, [b, t, q_size]."""
        b, t, _ = x.shape
        # The norms are over each head's own channels, and come before the rotation.
        q = self.q_norm(self.q_proj(x).view(b, t, -1, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(b, t, -1, self.head_dim))
        v = self.v_proj(x).view(b, t, -1, self.head_dim)
        assert isinstance(self.frequencies, Tensor)
        angles = torch.arange(t, device=x.device)[:, None] * self.frequencies
        q, k = rotate(q, angles), rotate(k, angles)
        out = self.attend(q, k, v, mask)
        out = out * torch.sigmoid(self.g_proj(x))[..., None]  # one gate for each head
        return out.reshape(b, t, -1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = self.o_proj(self.mix(x, mask))
        return result

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """The values that each query finds by its keys, [b, t, h, e]; q [b, t, h, e], k and v [b, t, groups, e].

        Some queries at a time, with the keys that any of them may see: half of all, or a sliding window's. Of rows of
        2,048 tokens that takes 0.6 of the time, or 0.4.
        """
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        found = []
        for start in range(0, q.shape[2], QUERY_BLOCK):
            queries = slice(start, start + QUERY_BLOCK)
            seen = mask[..., queries, :].flatten(0, -2).any(0).nonzero()
            keys = slice(int(seen[0]), int(seen[-1]) + 1)
            found.append(
                F.scaled_dot_product_attention(
                    q[:, :, queries], k[:, :, keys], v[:, :, keys], attn_mask=mask[..., queries, keys], enable_gqa=True
                )
            )
        return torch.cat(found, 2).transpose(1, 2)


def swiglu(gate: Tensor, up: Tensor, clamp: float) -> Tensor:
    """silu(gate) * up; with clamp > 0 silu(gate) is bounded from above and up from both sides."""
    gate = F.silu(gate)
    if clamp > 0:
        gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
    return gate * up


class MLP(nn.Module):
    """The dense layers' FFN, and the shared expert of the others: down(swiglu(gate(x), up(x)))."""

    def __init__(self, d: int, size: int, clamp: float) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, size, bias=False)
        self.up_proj = nn.Linear(d, size, bias=False)
        self.down_proj = nn.Linear(size, d, bias=False)
        self.clamp = clamp

    def units(self, x: Tensor) -> Tensor:
        """What down_proj is given: the hidden units."""
        return swiglu(self.gate_proj(x), self.up_proj(x), self.clamp)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.units(x))
        return result


class Experts(nn.Module):
    """One projection of all routed experts, stacked: [n_expert, out, in]."""

    def __init__(self, n: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, d_out, d_in))
        nn.init.uniform_(self.weight, -(d_in**-0.5), d_in**-0.5)


class MoE(nn.Module):
    """The routed experts of a layer and their router; x [b, t, d] -> [b, t, d]."""

    def __init__(self, hp: HParams, clamp: float) -> None:
        super().__init__()
        d, n, size = hp.hidden_size, hp.n_expert, hp.expert_size
        self.gate = nn.Linear(d, n, bias=False)
        self.router_bias = nn.Parameter(torch.zeros(n), requires_grad=False)
        self.gate_proj = Experts(n, d, size)
        self.up_proj = Experts(n, d, size)
        self.down_proj = Experts(n, size, d)
        self.n_used, self.scale, self.norm, self.clamp = hp.n_expert_used, hp.router_scale, hp.router_norm, clamp
        self.load = torch.zeros(n)  # tokens per expert in the last forward pass

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, d] -> the chosen experts' ids and float32 weights, [n, n_used] each."""
        with torch.autocast("cpu", enabled=False):  # in training: the router stays in float32 (need_fp32_gate)
            p = torch.sigmoid(x.float() @ self.gate.weight.float().T)
        ids = (p + self.router_bias).topk(self.n_used, dim=-1).indices
        weights = p.gather(-1, ids)  # without the bias, which takes part in the choice only
        if self.norm:
            weights = weights / weights.sum(-1, keepdim=True)
        return ids, weights * self.scale

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ids, weights = self.route(flat)
        self.load = torch.bincount(ids.flatten(), minlength=len(self.router_bias)).float()
        order = ids.flatten().argsort(stable=True)  # of the n * n_used choices, by expert
        out = self.add_experts(flat, order // self.n_used, weights.flatten()[order], self.load.int().tolist())
        return out.view_as(x)

    def add_experts(self, x: Tensor, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        """The experts' weighted results, added up for each token; x [n, d] -> [n, d].

        counts[e] of the `rows` of x and of their `weights` are expert e's; they stand in the order of experts.
        """
        matrices = zip(self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight, strict=True)
        results = [
            F.linear(swiglu(F.linear(seen, gate), F.linear(seen, up), self.clamp), down)
            for seen, (gate, up, down) in zip(torch.split(x[rows], counts), matrices, strict=True)
        ]
        return torch.zeros_like(x).index_add(0, rows, (torch.cat(results) * weights[:, None]).to(x.dtype))


class SharedHead(nn.Module):
    """The norm and the output matrix that an MTP block brings of its own."""

    def __init__(self, hp: HParams) -> None:
        super().__init__()
        self.norm = RMSNorm(hp.hidden_size, hp.rms_norm_eps)
        self.output = nn.Linear(hp.hidden_size, hp.vocab_size, bias=False)


class DecoderLayer(nn.Module):
    """A layer of the trunk, or an MTP block, which is a layer with an input of its own (`combine`) and a head."""

    def __init__(self, hp: HParams, layer: Layer) -> None:
        super().__init__()
        d, eps = hp.hidden_size, hp.rms_norm_eps
        self.spec = layer
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(hp, layer)
        self.post_attention_layernorm = RMSNorm(d, eps)
        if layer.is_moe:
            self.moe = MoE(hp, layer.clamp)
            self.share_expert = MLP(d, hp.shared_expert_size, layer.clamp_shared)
        else:
            self.mlp = MLP(d, hp.intermediate_size, layer.clamp_shared)
        if layer.is_mtp:
            self.enorm = RMSNorm(d, eps)
            self.hnorm = RMSNorm(d, eps)
            self.eh_proj = nn.Linear(2 * d, d, bias=False)
            self.transformer = nn.ModuleDict({"shared_head": SharedHead(hp)})

    def combine(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """An MTP block's input [b, t, d] from a token's embedding and the hidden state before it, in this order."""
        result: Tensor = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        return result

    def draft(self, hidden: Tensor) -> Tensor:
        """An MTP block's own logits, [b, t, vocab]."""
        head = self.transformer["shared_head"]
        assert isinstance(head, SharedHead)
        result: Tensor = head.output(head.norm(hidden))
        return result

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [b, t, d] with what attention adds to it."""
        result: Tensor = x + self.self_attn(self.input_layernorm(x), mask)
        return result

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attend(x, mask)
        y = self.post_attention_layernorm(x)
        ffn: Tensor = self.moe(y) + self.share_expert(y) if self.spec.is_moe else self.mlp(y)
        return x + ffn


class TrunkAndMtp(nn.Module):
    """What lies under `model.` in the checkpoint: the embedding, the layers of trunk and MTP blocks, the final norm."""

    def __init__(self, hp: HParams) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(hp.vocab_size, hp.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(hp, layer) for layer in hp.layers)
        self.norm = RMSNorm(hp.hidden_size, hp.rms_norm_eps)


class Step35(nn.Module):
    """The whole model. `hidden` then `logits`, and `mtp` for the chain; `forward` is the first two."""

    def __init__(self, hp: HParams) -> None:
        super().__init__()
        self.hp = hp
        self.model = TrunkAndMtp(hp)
        self.lm_head = nn.Linear(hp.hidden_size, hp.vocab_size, bias=False)

    @classmethod
    def from_state(cls, hp: HParams, state: Mapping[str, Tensor]) -> Step35:
        """The model with tensors under their published names, widened to float32."""
        with torch.device("meta"):  # no memory is taken, nothing is initialized
            model = cls(hp)
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        for module in model.modules():  # buffers and counters were made on "meta" too
            if isinstance(module, DecoderLayer):
                module.self_attn.frequencies = rope_frequencies(module.spec, hp.rope_scaling)
                if module.spec.is_moe:
                    module.moe.load = torch.zeros(hp.n_expert)
        return model.eval()

    def masks(self, t: int, document: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The masks of full-attention layers and of those with a sliding window."""
        return causal_mask(t, None, document), causal_mask(t, self.hp.sliding_window, document)

    def hidden(self, tokens: Tensor, document: Tensor | None = None) -> Tensor:
        """tokens [b, t] -> the trunk's last hidden state [b, t, d], before the final norm."""
        masks = self.masks(tokens.shape[1], document)
        x: Tensor = self.model.embed_tokens(tokens)
        for layer in self.model.layers[: self.hp.n_layer]:
            assert isinstance(layer, DecoderLayer)
            x = layer(x, masks[layer.spec.is_sliding])
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [b, t, d] from `hidden` -> logits [b, t, vocab] of the next token."""
        result: Tensor = self.lm_head(self.model.norm(hidden))
        return result

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [b, t] -> logits [b, t, vocab]."""
        return self.logits(self.hidden(tokens))

    def mtp(self, tokens: Tensor, hidden: Tensor, document: Tensor | None = None) -> list[Tensor]:
        """Draft logits of each MTP block, [b, t, vocab]: entry k at position i is for token i + 2 + k.

        tokens [b, t]; hidden [b, t, d] from `hidden`. Block k reads the embedding of token i + 1 + k; where the
        sequence has ended the last token stands in, so the last k + 1 positions of entry k say nothing.
        """
        mask = self.masks(tokens.shape[1], document)[1]
        drafts = []
        for layer in self.model.layers[self.hp.n_layer :]:
            assert isinstance(layer, DecoderLayer)
            tokens = torch.cat([tokens[:, 1:], tokens[:, -1:]], dim=1)
            hidden = layer(layer.combine(self.model.embed_tokens(tokens), hidden), mask)
            drafts.append(layer.draft(hidden))
        return drafts
