#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes rope.txt, attention.txt and module.txt: expected results computed by PyTorch and transformers.

Usage: make_golden.py [directory]        (default: the directory of this file)

All arithmetic runs in float64. transformers asks for float32 in several places, by `Tensor.float()` and by
name; here both mean float64, so its own functions produce double-precision answers. Inputs are multiples of
1/16 below 4 in magnitude, hence exact in float32, float16 and bfloat16: one file serves every codec.

Format, whitespace separated; `#` starts a comment line:
    case NAME
    tensor NAME RANK DIM... VALUE...
    word NAME WORD
    end
"""
import math
import pathlib
import sys

import torch

torch.set_default_dtype(torch.float64)

import transformers
from transformers import Gemma2Config, LlamaConfig, MistralConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import (LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding,
                                                      apply_rotary_pos_emb, repeat_kv)
from transformers.models.mistral.modeling_mistral import MistralModel

torch.Tensor.float = torch.Tensor.double  # float64 throughout, see above
torch.float32 = torch.float64

VERSIONS = f"torch {torch.__version__}, transformers {transformers.__version__}, float64"


class Writer:
    def __init__(self, path):
        self.file = open(path, "w", encoding="ascii", newline="\n")
        self.file.write("# SPDX-License-Identifier: MIT\n")
        self.file.write(f"# Written by make_golden.py with {VERSIONS}. Do not edit.\n")

    def case(self, name, **fields):
        self.file.write(f"case {name}\n")
        for key, value in fields.items():
            if isinstance(value, str):
                self.file.write(f"word {key} {value}\n")
                continue
            value = torch.as_tensor(value, dtype=torch.float64).detach()
            dims = " ".join(str(n) for n in value.shape)
            self.file.write(f"tensor {key} {value.dim()} {dims}".rstrip() + "\n")
            numbers = ["%.9g" % x for x in value.flatten().tolist()]
            for i in range(0, len(numbers), 12):
                self.file.write(" ".join(numbers[i:i + 12]) + "\n")
        self.file.write("end\n")


def sixteenths(generator, *shape):
    """Normal numbers rounded to multiples of 1/16 and clamped to +-63/16."""
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (x * 16).round().clamp(-63, 63) / 16


# ---- RoPE

POSITIONS = [0, 1, 17, 4095, 100000, 131071]


def rope_cases(writer):
    generator = torch.Generator().manual_seed(20240)
    #        name            head_dim rotary theta     scaling (words of transformers), original context
    def llama3(factor, low, high, context):
        return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": context}

    table = [("none",             32, 32, 10000.0, None, 4096),
             ("none_wide",       128, 128, 500000.0, None, 8192),
             ("none_two",          2, 2, 10000.0, None, 4096),
             ("partial",          40, 10, 10000.0, None, 4096),
             ("partial_quarter",  64, 16, 25000.0, None, 4096),
             ("linear",           32, 32, 10000.0, {"rope_type": "linear", "factor": 4.0}, 4096),
             ("linear_partial",   32, 8, 10000.0, {"rope_type": "linear", "factor": 2.5}, 4096),
             ("ntk",              32, 32, 10000.0, {"rope_type": "dynamic", "factor": 2.0}, 4096),
             ("ntk_partial",      32, 16, 10000.0, {"rope_type": "dynamic", "factor": 2.0}, 4096),
             ("yarn",             64, 64, 10000.0, {"rope_type": "yarn", "factor": 8.0}, 4096),
             ("yarn_partial",     64, 32, 10000.0, {"rope_type": "yarn", "factor": 4.0}, 2048),
             ("yarn_betas",       32, 32, 1000000.0, {"rope_type": "yarn", "factor": 16.0, "beta_fast": 24.0,
                                                      "beta_slow": 2.0, "attention_factor": 1.25}, 4096),
             ("yarn_short",       32, 32, 10000.0, {"rope_type": "yarn", "factor": 2.0}, 64),
             ("llama3",           64, 64, 500000.0, llama3(8.0, 1.0, 4.0, 8192), 8192),
             ("llama3_factor32",  32, 32, 500000.0, llama3(32.0, 1.0, 4.0, 8192), 8192),
             ("llama3_partial",   32, 24, 10000.0, llama3(4.0, 2.0, 8.0, 1024), 1024)]
    for name, head_dim, rotary, theta, scaling, context in table:
        config = PretrainedConfig(rope_theta=theta, head_dim=head_dim, hidden_size=head_dim,
                                  num_attention_heads=1, partial_rotary_factor=rotary / head_dim,
                                  max_position_embeddings=context, rope_scaling=scaling)
        kind = scaling["rope_type"] if scaling else "default"
        # transformers' dynamic NTK with factor 2, at 2.5 contexts, is the static formula with factor 4.
        extra = {"seq_len": int(2.5 * context)} if kind == "dynamic" else {}
        inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, None, **extra)
        assert inv_freq.dtype == torch.float64 and len(inv_freq) == rotary // 2

        fields = {"scaling": {"default": "none", "dynamic": "ntk"}.get(kind, kind), "head_dim": head_dim,
                  "rotary_dim": rotary, "theta": theta}
        if kind == "dynamic":
            fields["factor"] = 4.0
        elif scaling:
            fields["factor"] = scaling["factor"]
        if kind == "yarn":
            fields |= {"original_context": context, "beta_fast": scaling.get("beta_fast", 32.0),
                       "beta_slow": scaling.get("beta_slow", 1.0),
                       "attention_factor": scaling.get("attention_factor", 0.0)}
        if kind == "llama3":
            fields |= {"original_context": context, "low_freq_factor": scaling["low_freq_factor"],
                       "high_freq_factor": scaling["high_freq_factor"]}

        positions = torch.tensor(POSITIONS)
        q = sixteenths(generator, len(POSITIONS), 2, head_dim)
        k = sixteenths(generator, len(POSITIONS), 1, head_dim)
        fields |= {"positions": positions, "inv_freq": inv_freq, "attention_scaling": attention_scaling,
                   "q": q, "k": k}

        # The tables as LlamaRotaryEmbedding.forward makes them, which must agree where it knows the rule.
        angles = positions[:, None].double() * inv_freq[None, :]
        cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
        if kind != "dynamic":
            module_cos, module_sin = LlamaRotaryEmbedding(config=config)(q, positions[None])
            assert torch.equal(module_cos[0], torch.cat((cos, cos), -1))
            assert torch.equal(module_sin[0], torch.cat((sin, sin), -1))

        def rotated(x, pairing):
            turn, rest = x[..., :rotary], x[..., rotary:]
            if pairing == "half":
                twice = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
                turn, _ = apply_rotary_pos_emb(turn, turn, *twice)
            else:
                turn = rotate_interleaved(turn[None], sin[None], cos[None])[0]
            return torch.cat((turn, rest), -1)

        for pairing in ("half", "interleaved"):
            fields |= {f"q_{pairing}": rotated(q, pairing), f"k_{pairing}": rotated(k, pairing)}
        writer.case(name, **fields)


# ---- attention


def attention(q, k, v, visible, scale, soft_cap=0.0, bias=None):
    """q [q_len, q_heads, dim], k, v [kv_len, kv_heads, dim], visible [q_len, kv_len] -> out, natural lse."""
    group = q.shape[1] // k.shape[1]
    q = q.transpose(0, 1)
    k = repeat_kv(k.transpose(0, 1)[None], group)[0]
    v = repeat_kv(v.transpose(0, 1)[None], group)[0]
    logits = torch.matmul(q, k.transpose(1, 2)) * scale  # [q_heads, q_len, kv_len]
    if soft_cap:
        logits = torch.tanh(logits / soft_cap) * soft_cap
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~visible[None], -math.inf)
    lse = torch.logsumexp(logits, -1)
    weights = torch.nan_to_num(torch.softmax(logits, -1), nan=0.0)  # no visible key: attends to nothing
    out = torch.matmul(weights, v)

    plain = not soft_cap and bias is None and abs(scale * math.sqrt(q.shape[-1]) - 1) < 1e-12
    if plain and bool(visible.any(-1).all()):  # PyTorch's own function where it applies
        ours, _ = torch.nn.functional._scaled_dot_product_attention(q, k, v, attn_mask=visible)
        assert torch.allclose(ours, out, rtol=1e-12, atol=1e-13)
    return out.transpose(0, 1), lse.transpose(0, 1)


def causal_mask(q_len, kv_len, window=0, sinks=0):
    if q_len == kv_len and not sinks:  # as a sliding-window model of transformers builds it for a prompt
        config = MistralConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                               num_attention_heads=1, num_key_value_heads=1, sliding_window=window or None)
        config._attn_implementation = "eager"
        model = MistralModel(config)
        added = model._update_causal_mask(torch.ones(1, kv_len), torch.zeros(1, q_len, 8),
                                          torch.arange(q_len), None, False, False)
        return added[0, 0] == 0
    p = torch.arange(kv_len - q_len, kv_len)[:, None]
    c = torch.arange(kv_len)[None, :]
    visible = c <= p
    if window:
        visible &= (c > p - window) | (c < sinks)
    return visible


def attention_cases(writer):
    generator = torch.Generator().manual_seed(777)

    def make(name, q_len, kv_len, q_heads, kv_heads, dim, *, scale=None, window=0, sinks=0, soft_cap=0.0,
             alibi=False, mask=None, mask_name=None, causal=True, k_positions=None):
        q = sixteenths(generator, q_len, q_heads, dim)
        k = sixteenths(generator, kv_len, kv_heads, dim)
        v = sixteenths(generator, kv_len, kv_heads, dim)
        fields = {"q": q, "k": k, "v": v, "causal": causal, "window": window, "sinks": sinks,
                  "soft_cap": soft_cap, "scale": scale if scale is not None else dim ** -0.5}
        bias = None
        if k_positions is not None:
            c = torch.tensor(k_positions)
            p = c[kv_len - q_len:]
            visible = c[None, :] <= p[:, None]
            if window:
                visible &= (c[None, :] > p[:, None] - window) | (torch.arange(kv_len)[None, :] < sinks)
            fields |= {"q_positions": p, "k_positions": c}
        else:
            c = torch.arange(kv_len)
            p = torch.arange(kv_len - q_len, kv_len)
            if mask is not None:
                visible = torch.ones(q_len, kv_len, dtype=torch.bool)
                visible[:, kv_len - mask.shape[1]:] = mask.bool()
                fields["mask"] = mask
            elif causal:
                visible = causal_mask(q_len, kv_len, window, sinks)
            else:
                visible = torch.ones(q_len, kv_len, dtype=torch.bool)
        if alibi:
            # Bloom adds slope * c. Ours, slope * (c - p), differs by a constant per row: the softmax ignores
            # it, lse does not.
            bloom = build_alibi_tensor(torch.ones(1, kv_len, dtype=torch.int64), q_heads, torch.float64)
            slopes = bloom[:, 0, 1]
            bias = slopes[:, None, None] * (c[None, None, :] - p[None, :, None]).double()
            ours, _ = attention(q, k, v, visible, fields["scale"], soft_cap, bloom)
            fields["alibi_slopes"] = slopes
        out, lse = attention(q, k, v, visible, fields["scale"], soft_cap, bias)
        if alibi:
            assert torch.allclose(ours, out, rtol=1e-10, atol=1e-12)
        writer.case(name, **fields, out=out, lse=lse)

    make("decode_mha", 1, 37, 2, 2, 16)
    make("decode_gqa", 1, 65, 6, 2, 8)
    make("decode_mqa", 1, 33, 5, 1, 16)
    make("decode_one_key", 1, 1, 2, 1, 16)
    make("prefill_mha", 19, 19, 2, 2, 8)
    make("prefill_gqa", 17, 17, 4, 2, 8)
    make("prefill_after_prefix", 7, 40, 4, 2, 8)
    make("prefill_not_causal", 5, 23, 2, 1, 8, causal=False)
    make("scale", 3, 20, 2, 2, 8, scale=0.25)
    make("window_prefill", 24, 24, 2, 1, 8, window=5)
    make("window_decode", 1, 50, 2, 1, 8, window=16)
    make("window_sinks", 6, 48, 2, 1, 8, window=9, sinks=4)
    make("window_one", 4, 20, 2, 1, 8, window=1)
    make("soft_cap", 4, 30, 4, 2, 8, soft_cap=2.5, scale=0.75)
    make("soft_cap_large", 2, 30, 2, 1, 16, soft_cap=50.0)
    make("alibi", 5, 29, 8, 2, 8, alibi=True)
    make("alibi_six_heads", 1, 40, 6, 6, 4, alibi=True)
    make("alibi_soft_cap", 3, 21, 4, 2, 8, alibi=True, soft_cap=3.0)
    # A tree of drafted tokens over a prefix: token i follows parent[i]; it sees its ancestors and itself.
    parent = [-1, 0, 0, 1, 1, 2, 4]
    tree = torch.eye(len(parent), dtype=torch.int64)
    for i, above in enumerate(parent):
        while above >= 0:
            tree[i, above] = 1
            above = parent[above]
    make("mask_tree", len(parent), 26, 4, 2, 8, mask=tree)
    full = (torch.rand(5, 22, generator=generator) < 0.4).long()
    full[:, 0] = 1
    make("mask_full", 5, 22, 2, 1, 8, mask=full)
    full = (torch.rand(5, 22, generator=generator) < 0.4).long()
    full[2] = 0  # a row that sees nothing
    make("mask_empty_row", 5, 22, 2, 1, 8, mask=full)
    gap = list(range(10)) + list(range(30, 44))
    make("positions_gap", 4, 24, 2, 1, 8, k_positions=gap)
    make("positions_gap_window", 4, 24, 2, 1, 8, k_positions=gap, window=15, sinks=2)


# ---- attention with its projections


def rms_norm(x, weight, eps):
    norm = LlamaRMSNorm(len(weight), eps)
    norm.weight.data = weight
    return norm(x)


def module_cases(writer):
    generator = torch.Generator().manual_seed(4242)

    def weights(module):
        for parameter in module.parameters():
            parameter.data = sixteenths(generator, *parameter.shape) / 4
        fields = {}
        for ours in "qkvo":
            theirs = getattr(module, f"{ours}_proj")
            fields[f"w{ours}"] = theirs.weight
            if theirs.bias is not None:
                fields[f"b{ours}"] = theirs.bias
        return fields

    def added_mask(visible):
        return torch.where(visible, 0.0, torch.finfo(torch.float64).min)[None, None]

    tokens, hidden, q_heads, kv_heads, dim = 11, 24, 4, 2, 8
    sizes = {"hidden_size": hidden, "num_attention_heads": q_heads, "num_key_value_heads": kv_heads,
             "head_dim": dim, "rope_theta": 10000.0, "max_position_embeddings": 64}
    for name, bias in (("llama", False), ("llama_bias", True)):
        config = LlamaConfig(**sizes, attention_bias=bias)
        module = LlamaAttention(config, layer_idx=0).double()
        fields = weights(module)
        x = sixteenths(generator, 1, tokens, hidden)
        out, _, _ = module(x, added_mask(causal_mask(tokens, tokens)), torch.arange(tokens)[None])
        writer.case(name, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=dim, theta=10000.0, window=0,
                    soft_cap=0.0, scale=dim ** -0.5, **fields, x=x[0], y=out[0])

    # Gemma 2: soft cap, a scale of its own, a sliding window in layer 0.
    config = Gemma2Config(**sizes, attention_bias=False, attn_logit_softcapping=1.5, query_pre_attn_scalar=4,
                          sliding_window=4)
    module = Gemma2Attention(config, layer_idx=0).double()
    module.rotary_emb.inv_freq = module.rotary_emb.inv_freq.double()
    fields = weights(module)
    x = sixteenths(generator, 1, tokens, hidden)
    out, _, _ = module(x, added_mask(causal_mask(tokens, tokens, window=4)), torch.arange(tokens)[None])
    writer.case("gemma2", num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=dim, theta=10000.0, window=4,
                soft_cap=1.5, scale=0.5, **fields, x=x[0], y=out[0])

    # Per-head RMS norm of q and k before RoPE (as in Qwen 3): no module of this transformers has it, so it is
    # put together from transformers' norm and rotation and the attention above.
    module = LlamaAttention(LlamaConfig(**sizes), layer_idx=0).double()
    fields = weights(module)
    q_norm = 1 + sixteenths(generator, dim) / 8
    k_norm = 1 + sixteenths(generator, dim) / 8
    eps = 1e-5
    x = sixteenths(generator, tokens, hidden)
    q = rms_norm((x @ module.q_proj.weight.T).view(tokens, q_heads, dim), q_norm, eps)
    k = rms_norm((x @ module.k_proj.weight.T).view(tokens, kv_heads, dim), k_norm, eps)
    v = (x @ module.v_proj.weight.T).view(tokens, kv_heads, dim)
    cos, sin = module.rotary_emb(x, torch.arange(tokens)[None])
    q, k = apply_rotary_pos_emb(q, k, cos[0], sin[0])
    out, _ = attention(q, k, v, causal_mask(tokens, tokens), dim ** -0.5)
    y = out.reshape(tokens, q_heads * dim) @ module.o_proj.weight.T
    writer.case("qk_norm", num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=dim, theta=10000.0, window=0,
                soft_cap=0.0, scale=dim ** -0.5, norm_eps=eps, q_norm=q_norm, k_norm=k_norm, **fields, x=x,
                y=y)


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parent
    with torch.no_grad():
        rope_cases(Writer(folder / "rope.txt"))
        attention_cases(Writer(folder / "attention.txt"))
        module_cases(Writer(folder / "module.txt"))


if __name__ == "__main__":
    main()
