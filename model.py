"""The hybrid: attention layers that see the window, Gated DeltaNet layers that remember past it.

Nothing here knows about sleep. The model is three functions, `embed`, `blocks` and `head`, and all its memory is
explicit: `blocks` takes a state and returns a new one, and the caller decides what of it survives (sleep.py).

    B, T    batch, tokens                      K, V    key and value dim of a head
    H       heads                              S       fast weights of a delta layer, (B, H, K, V), float32
    h       features, (B, T, d_model)          g, beta log forget gate and write gate, (B, T, H)

A layer pattern such as "ADAD" names the mixer of each block: A attention, D delta. Every block is
h += mixer(norm(h)); h += mlp(norm(h)). Based on arXiv:2605.26099 section 2 (the hybrid) and arXiv:2412.06464 (Gated
DeltaNet). Read next: sleep.py
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import delta_rule

# not in the paper: everything below d_model (heads, widths, norms, positions, convolution) is our choice; the README
# lists them together


@dataclass
class ModelConfig:
    """The architecture; a flag of train.py each, but for vocab_size (the task's) and n_pos (--positions)."""

    vocab_size: int
    pattern: str = "ADAD"  # mixer per block: A attention, D delta
    d_model: int = 256
    n_head: int = 4  # K = V = d_model / n_head
    n_kv_head: int = 4  # grouped attention heads: n_head / n_kv_head queries share one key and value
    d_mlp: int = 0  # 0: 8/3 d_model, rounded up to a multiple of 16
    conv: int = 4  # taps of the short convolution before q, k and v of a delta layer
    rope_theta: float = 10000.0
    n_pos: int = 0  # not in the paper: learned positions inside a window, added to the embedding; 0: rotary only

    def __post_init__(self):
        self.d_mlp = self.d_mlp or 16 * math.ceil(self.d_model / 6)
        if not self.pattern or set(self.pattern) - set("AD"):
            raise ValueError(
                f"pattern {self.pattern!r}: use one A (attention) or D (delta) per block, for example ADAD"
            )
        if self.d_model % (2 * self.n_head):
            raise ValueError(f"d_model {self.d_model} must be a multiple of 2 * n_head = {2 * self.n_head}")
        if self.conv < 1 or self.d_mlp < 0 or self.n_kv_head < 1 or not 1 < self.rope_theta < math.inf:
            raise ValueError("conv and n_kv_head must be at least 1, d_mlp at least 0 and rope_theta above 1")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")


class LayerState(NamedTuple):
    """What one layer carries from token to token. None is the start of a sequence: S = 0, empty cache, zero history."""

    S: torch.Tensor | None = None  # delta: fast weights (B, H, K, V)
    conv: tuple | None = None  # delta: the last conv-1 inputs of the q, k and v convolutions, each (B, conv-1, H*K)
    k: torch.Tensor | None = None  # attention: keys before RoPE, (B, P, n_kv_head, K)
    v: torch.Tensor | None = None  # attention: values, same shape


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 whatever the autocast dtype."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x32 = x.to(self.weight.dtype)
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6) * self.weight).to(x.dtype)


def l2norm(x):
    """x / |x| over the last dimension; eps under the root, as in the Gated DeltaNet reference."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def project(x, *layers):
    """What several nn.Linear without bias make of one x (..., d), as one matrix product: a tuple, (..., out) each."""
    y = F.linear(x, torch.cat([layer.weight for layer in layers]))
    return y.split([layer.out_features for layer in layers], -1)


@functools.lru_cache(maxsize=None)  # a CUDA graph reads them from where they are: none may be dropped
def rope_table(length, dim, theta, device, dtype):
    """cos and sin of position * theta^(-2i/dim), each (length, 1, dim/2), for positions 0..length-1."""
    freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # on the CPU: not every device has float64
    angle = torch.outer(torch.arange(length, dtype=torch.float64), freq)
    return angle.cos().to(device, dtype)[:, None], angle.sin().to(device, dtype)[:, None]


def rotate(x, cos, sin):
    """RoPE, half-split layout. x (B, T, H, K); cos, sin (T, 1, K/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def attention_mask(T, past, window, causal, device):
    """Which of `past` cached and T new tokens each new one sees, (T, past + T) bool; None if plain causal will do."""
    if causal and not past and (window is None or T <= window):
        return None
    mask = torch.ones(T, past + T, dtype=torch.bool, device=device)
    mask = mask.tril(past) if causal else mask
    return mask if window is None else mask.triu(past + 1 - window)


class Attention(nn.Module):
    """Causal RoPE attention over the kept cache and the new tokens; grouped heads; q and k RMS-normalised per head."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.d_model // config.n_head
        self.q_proj = nn.Linear(config.d_model, config.n_head * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_head * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_head * self.head_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)
        self.out_proj = nn.Linear(config.n_head * self.head_dim, config.d_model, bias=False)

    def forward(self, x, state, rope, mask):
        """x (B, T, d_model) -> (B, T, d_model) and the state with x's keys and values appended to its cache.

        rope: cos and sin for the cache and x; mask: (T, P+T) bool of who sees whom, None for causal without a cache.
        """
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)  # (B, T, n_head, K), (B, T, n_kv_head, K)
        past = 0 if state.k is None else state.k.shape[1]
        if past:
            k, v = torch.cat((state.k, k), 1), torch.cat((state.v, v), 1)  # (B, P+T, n_kv_head, K)
        cos, sin = rope  # (P+T, 1, K/2): positions count from the start of the kept cache
        query, key = rotate(q, cos[past:], sin[past:]), rotate(k, cos, sin)
        o = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q.shape[2] != k.shape[2],
        )  # (B, n_head, T, K)
        return self.out_proj(o.transpose(1, 2).flatten(2)), LayerState(k=k, v=v)


class ShortConv(nn.Module):
    """Depthwise causal convolution over the last few tokens, then SiLU."""

    def __init__(self, dim, taps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, taps))  # tap -1 is the current token

    def forward(self, x, history):
        """x (B, T, C), history (B, taps-1, C) or None for zeros -> (B, T, C) and the new history."""
        T, taps = x.shape[1], self.weight.shape[1]
        x = F.pad(x, (0, 0, taps - 1, 0)) if history is None else torch.cat((history, x), 1)
        y = sum(x[:, j : j + T] * self.weight[:, j] for j in range(taps))
        return F.silu(y).to(x.dtype), x[:, T:]  # the weights are float32, x may not be


class GatedDeltaNet(nn.Module):
    """The fast-weight layer: every token corrects what S predicts for its key (kernels.py), then reads S."""

    def __init__(self, config):
        super().__init__()
        d, self.n_head = config.d_model, config.n_head
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.conv_q = ShortConv(d, config.conv)
        self.conv_k = ShortConv(d, config.conv)
        self.conv_v = ShortConv(d, config.conv)
        self.a_proj = nn.Linear(d, config.n_head, bias=False)  # forget gate
        self.b_proj = nn.Linear(d, config.n_head, bias=False)  # write gate
        self.A_log = nn.Parameter(torch.empty(config.n_head))
        self.dt_bias = nn.Parameter(torch.empty(config.n_head))
        self.gate_proj = nn.Linear(d, d, bias=False)
        self.norm = RMSNorm(d // config.n_head)
        self.out_proj = nn.Linear(d, d, bias=False)

    def zero_S(self, x):
        """S at the start of a sequence, (B, H, K, V), for features x (B, T, d_model).

        Nobody asks for its gradient, but with one the first pass is a pass like any other: one compilation for both.
        """
        dim = x.shape[-1] // self.n_head
        S = torch.zeros(x.shape[0], self.n_head, dim, dim, dtype=self.A_log.dtype, device=x.device)
        return S.requires_grad_(torch.is_grad_enabled())

    def gates(self, a, b):
        """g = -exp(A_log) softplus(a + dt_bias) <= 0 and beta = sigmoid(b), each (B, T, H) and at least float32."""
        a, b = a.to(self.A_log.dtype), b.to(self.A_log.dtype)
        return -self.A_log.exp() * F.softplus(a + self.dt_bias), torch.sigmoid(b)

    def forward(self, x, state, write_only=False):
        """x (B, T, d_model) -> (B, T, d_model) and the new state.

        With write_only nothing is read: the output is None and only S is in the new state. That is the last write of a
        sleeping chunk, whose features nobody will see.
        """
        heads = (*x.shape[:2], self.n_head, -1)
        history = state.conv or (None, None, None)
        write = self.k_proj, self.v_proj, self.a_proj, self.b_proj
        k, v, a, b, *read = project(x, *write, *(() if write_only else (self.q_proj, self.gate_proj)))
        k, history_k = self.conv_k(k, history[1])
        v, history_v = self.conv_v(v, history[2])
        k, v = l2norm(k.view(heads)), v.view(heads)  # (B, T, H, K), (B, T, H, V)
        g, beta = self.gates(a, b)
        if write_only:
            return None, LayerState(S=delta_rule(None, k, v, g, beta, state.S)[1])
        q, gate = read
        q, history_q = self.conv_q(q, history[0])
        q = l2norm(q.view(heads)) * k.shape[-1] ** -0.5
        o, S = delta_rule(q, k, v, g, beta, state.S)
        o = self.norm(o) * F.silu(gate).view(heads)
        return self.out_proj(o.flatten(2)), LayerState(S=S, conv=(history_q, history_k, history_v))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.out_proj = nn.Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, x):
        """(B, T, d_model) -> (B, T, d_model)."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.out_proj(F.silu(gate) * up)


class Block(nn.Module):
    """h += mixer(norm(h)); h += mlp(norm(h)), with the mixer that `kind` names."""

    def __init__(self, config, kind):
        super().__init__()
        self.kind = kind
        self.norm_mixer = RMSNorm(config.d_model)
        self.mixer = Attention(config) if kind == "A" else GatedDeltaNet(config)
        self.norm_mlp = RMSNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, h, state, rope=None, mask=None, write_only=False):
        """h (B, T, d_model) -> h, new LayerState. rope, mask: an attention block's; write_only: a delta block's.

        With write_only, only S is computed, and h comes back None.
        """
        x = self.norm_mixer(h)
        y, state = self.mixer(x, state, rope, mask) if self.kind == "A" else self.mixer(x, state, write_only)
        if write_only:
            return None, state
        h = h + y
        return h + self.mlp(self.norm_mlp(h)), state


class Model(nn.Module):
    """embed -> blocks -> head, with the state passed in and returned (eq. 6 without the loop)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.n_pos, config.d_model) if config.n_pos else None
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.pattern)
        self.norm = RMSNorm(config.d_model)
        self.head_proj = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.apply(functools.partial(init_weights, n_layer=len(config.pattern)))
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.25)  # below the embedding's: what a token is counts for more

    def embed(self, x, start=0):
        """Token ids (B, T), the first of them token number `start` of its window -> features (B, T, d_model).

        Raises ValueError if the window is longer than the learned positions.
        """
        h = self.embedding(x)
        if self.positions is None:
            return h
        if start + x.shape[1] > self.config.n_pos:
            raise ValueError(
                f"a window of {start + x.shape[1]} tokens, but the model knows positions 0..{self.config.n_pos - 1}"
            )
        return h + self.positions.weight[start : start + x.shape[1]]

    def initial_state(self):
        """The state at the start of a sequence: one empty LayerState per block."""
        return [LayerState() for _ in self.layers]

    def blocks(self, h, state, layers=None, write_only=False, window=None, causal=True):
        """Run some of the blocks once, in order.

        h (B, T, d_model); state: a LayerState per block of the model; layers: the indices to run, all by default.
        write_only: the last of them is a delta block of which only the write to S is wanted; h comes back None.
        window: tokens that attention sees, itself included; None for all that are in the cache. causal=False: attention
        also sees the later tokens of h, all of them.
        Returns h and a new state in which the blocks that did not run keep theirs. `state` itself is not changed.
        """
        layers = range(len(self.layers)) if layers is None else layers
        state, T = list(state), h.shape[1]
        for i in layers:
            if self.layers[i].kind == "A":
                past = 0 if state[i].k is None else state[i].k.shape[1]
                mask = attention_mask(T, past, window, causal, h.device)
                h, state[i] = self.layers[i](h, state[i], self.rope(past + T, h), mask)
                continue
            if state[i].S is None:
                state[i] = state[i]._replace(S=self.layers[i].mixer.zero_S(h))
            h, state[i] = self.layers[i](h, state[i], write_only=write_only and i == layers[-1])
        return h, state

    def rope(self, length, h):
        """The cached rotation table for `length` positions, on h's device; never below float32."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        return rope_table(length, self.config.d_model // self.config.n_head, self.config.rope_theta, h.device, dtype)

    def head(self, h):
        """Features (B, T, d_model) -> logits (B, T, vocab_size), never below float32: near chance, ties matter."""
        with torch.autocast(h.device.type, enabled=False):
            return self.head_proj(self.norm(h.to(self.norm.weight.dtype)))

    def n_params(self):
        """Number of parameters, embedding and head included."""
        return sum(p.numel() for p in self.parameters())

    def compile_blocks(self):
        """Compile each block, not the stack: equal blocks share one compilation, and passes and chunks reuse it."""
        for block in self.layers:
            block.compile(dynamic=False)


def init_weights(module, n_layer):
    """Initialise one module; Model applies it to all of them."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
    elif isinstance(module, ShortConv):
        nn.init.uniform_(module.weight, -0.5, 0.5)
    elif isinstance(module, GatedDeltaNet):
        # not in the paper: Gated DeltaNet draws A from U(0, 16), and then many a head forgets within a few tokens. S
        # has to outlive N passes over a window, so we start slower; and not at 0, where a head could not learn to
        nn.init.uniform_(module.A_log.data, 0.01, 1.0).log_()
        dt = torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        module.dt_bias.data.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)
    # apply() visits children first, so a block's small output projections overwrite what nn.Linear got above
    if isinstance(module, Attention | GatedDeltaNet | MLP):
        nn.init.normal_(module.out_proj.weight, std=0.02 / math.sqrt(2 * n_layer))
