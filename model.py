"""The hybrid: attention layers that see the window, Gated DeltaNet layers that remember past it.

Nothing here knows about sleep. The model is three functions, `embed`, `blocks` and `head`, and all its memory is
explicit: `blocks` takes a state and returns a new one, and the caller decides what of it survives (sleep.py).

    B, T    batch, tokens                      K, V    key and value dim of a head
    H       heads                              S       fast weights of a delta layer, (B, H, K, V), float32
    h       features, (B, T, d_model)          g, beta log forget gate and write gate, (B, T, H)

A layer pattern such as "ADAD" names the mixer of each block: A attention, D delta. Every block is
h += mixer(norm(h)); h += mlp(norm(h)). Based on arXiv:2605.26099 (the hybrid) and arXiv:2412.06464 (Gated
DeltaNet). The forms of public checkpoints that differ from that are options, set by the table at the end.
Read next: sleep.py
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import delta_rule

# on Hopper, cuDNN is the default of PyTorch 2.11 and later, but its backward can return NaN where there is a mask
# (pytorch issue 196678), differs from run to run, and plans anew for every length of a growing cache
torch.backends.cuda.enable_cudnn_sdp(False)

# not in the paper: everything below d_model (heads, widths, norms, positions, convolution) is our choice; the README
# lists them together


@dataclass
class ModelConfig:
    """The architecture. Up to rope_theta a flag of train.py each, but for vocab_size, which is the task's."""

    vocab_size: int
    pattern: str = "ADAD"  # per block: A attention, D delta; W attention within `window`, d delta without an MLP
    d_model: int = 256
    n_head: int = 4  # K = V = d_model / n_head
    n_kv_head: int = 0  # 0: n_head; else grouped attention heads: n_head / n_kv_head queries share one key and value
    d_mlp: int = 0  # 0: 8/3 d_model, rounded up to a multiple of 16
    conv: int = 4  # taps of the short convolution before q, k and v of a delta layer
    rope_theta: float = 10000.0
    n_pos: int = 0  # not in the paper: learned positions inside a window, added to the embedding; 0: rotary only
    # the forms of public checkpoints
    head_dim: int = 0  # of attention; 0: d_model / n_head
    rope_dim: int = 0  # leading dimensions of a head that are rotated; 0: all
    window: int = 0  # tokens that a W block's attention sees, itself included
    qkv_bias: bool = False
    qk_norm: bool = True
    attention_gate: bool = False  # what attention reads is multiplied by sigmoid(gate(x))
    delta_heads: int = 0  # H of a delta layer; 0: n_head
    key_dim: int = 0  # K of a delta layer; 0: d_model / n_head
    value_dim: int = 0  # V of a delta layer; 0: key_dim
    dynamic_conv: int = 0  # width of the net that makes v's filter for each token (q and k have none); 0: all static
    norm_eps: float = 1e-6
    delta_norm_eps: float = 1e-6
    zero_centred: bool = False  # norms multiply by 1 + weight
    sandwich: bool = False  # a norm on what mixer and MLP add, too
    norm_loop: bool = False  # the final norm is inside the loop: a pass starts from the normalised features of the last
    tied: bool = False  # the head is the embedding

    def __post_init__(self):
        if min(self.vocab_size, self.d_model, self.n_head) < 1:
            raise ValueError("vocab_size, d_model and n_head must be at least 1")
        self.d_mlp = self.d_mlp or 16 * math.ceil(self.d_model / 6)
        if not self.pattern or set(self.pattern) - {"A", "W", *FAST_MIXERS}:
            raise ValueError(
                f"pattern {self.pattern!r}: use one A (attention) or D (delta) per block, for example ADAD"
            )
        if "W" in self.pattern and not self.window:
            raise ValueError(f"pattern {self.pattern!r} has sliding-window attention (W), which --init-from alone sets")
        if not self.head_dim and self.d_model % (2 * self.n_head):
            raise ValueError(f"d_model {self.d_model} must be a multiple of 2 * n_head = {2 * self.n_head}")
        if self.conv < 1 or self.d_mlp < 0 or self.n_kv_head < 0 or not 1 < self.rope_theta < math.inf:
            raise ValueError("conv must be at least 1, n_kv_head and d_mlp at least 0 and rope_theta above 1")
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        self.head_dim = self.head_dim or self.d_model // self.n_head
        self.rope_dim = self.rope_dim or self.head_dim
        self.delta_heads = self.delta_heads or self.n_head
        self.key_dim = self.key_dim or self.d_model // self.n_head
        self.value_dim = self.value_dim or self.key_dim


class LayerState(NamedTuple):
    """What one layer carries from token to token. None is the start of a sequence: S = 0, empty cache, zero history."""

    S: torch.Tensor | None = None  # delta: fast weights (B, H, K, V)
    conv: tuple | None = None  # delta: the last inputs of q's, k's and v's convolution, (B, conv-1, H*K or H*V) or None
    k: torch.Tensor | None = None  # attention: keys before RoPE of P tokens, (B, P, n_kv_head, head_dim)
    v: torch.Tensor | None = None  # attention: values, same shape


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 whatever the autocast dtype.

    zero_centred: times 1 + weight instead.
    """

    def __init__(self, dim, eps, zero_centred=False):
        super().__init__()
        self.eps, self.zero_centred = eps, zero_centred
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x):
        x32 = x.to(self.weight.dtype)
        scale = 1 + self.weight if self.zero_centred else self.weight
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * scale).to(x.dtype)


def make_norm(config, dim):
    """The RMSNorm of this architecture for features of size dim."""
    return RMSNorm(dim, config.norm_eps, config.zero_centred)


def l2norm(x):
    """x / |x| over the last dimension; eps under the root, as in the Gated DeltaNet reference."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def project(x, *layers):
    """What several nn.Linear make of one x (..., d), small ones as one matrix product: a tuple, (..., out) each."""
    if x.shape[-1] >= 1024 or layers[0].bias is not None:
        # large products gain nothing from it, and autocast can keep its copy of a weight for all passes
        return tuple(layer(x) for layer in layers)
    y = F.linear(x, torch.cat([layer.weight for layer in layers]))
    return y.split([layer.out_features for layer in layers], -1)


@functools.lru_cache(maxsize=None)  # a CUDA graph reads them from where they are: none may be dropped
def rope_table(length, dim, theta, device, dtype):
    """cos and sin of position * theta^(-2i/dim), each (length, 1, dim/2), for positions 0..length-1."""
    freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # on the CPU: not every device has float64
    angle = torch.outer(torch.arange(length, dtype=torch.float64), freq)
    return angle.cos().to(device, dtype)[:, None], angle.sin().to(device, dtype)[:, None]


def rotate(x, cos, sin):
    """RoPE, half-split layout, of the first 2R dimensions. x (B, T, H, K); cos, sin (T, 1, R)."""
    dim = 2 * cos.shape[-1]
    a, b = x[..., :dim].chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., dim:]), -1).to(x.dtype)


def attention_mask(T, past, window, causal, device):
    """Which of `past` cached and T new tokens each new one sees, (T, past + T) bool, and False.

    None, True where that is plain causal, and None, False where it is all of them: that takes half the time of a mask.
    """
    causal = causal and T > 1  # one token sees all that came before
    if past + T <= window and not (past and causal):
        return None, causal
    mask = torch.ones(T, past + T, dtype=torch.bool, device=device)
    mask = mask.tril(past) if causal else mask
    return (mask if past + T <= window else mask.triu(past + 1 - window)), False


class Attention(nn.Module):
    """RoPE attention over the kept cache and the new tokens; grouped heads; norms on q and k.

    window: tokens that it sees, itself included; inf for all. Model makes the mask for it.
    """

    def __init__(self, config, window):
        super().__init__()
        self.head_dim, self.window, bias = config.head_dim, window, config.qkv_bias
        self.q_proj = nn.Linear(config.d_model, config.n_head * self.head_dim, bias)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_head * self.head_dim, bias)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_head * self.head_dim, bias)
        self.q_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        gated = config.attention_gate
        self.gate_proj = nn.Linear(config.d_model, config.n_head * self.head_dim, bias=False) if gated else None
        self.out_proj = nn.Linear(config.n_head * self.head_dim, config.d_model, bias=False)

    def forward(self, x, state, rope, mask, causal):
        """x (B, T, d_model) -> (B, T, d_model) and the state with x's keys and values appended to its cache.

        rope: cos and sin for the cache and x; mask, causal: who sees whom, as attention_mask says.
        """
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)  # (B, T, n_head, head_dim), (B, T, n_kv_head, head_dim)
        past = 0 if state.k is None else state.k.shape[1]
        if past:
            k, v = torch.cat((state.k, k), 1), torch.cat((state.v, v), 1)  # (B, P+T, n_kv_head, head_dim)
        cos, sin = rope  # (P+T, 1, rope_dim/2): positions count from the start of the kept cache
        query, key = rotate(q, cos[past:], sin[past:]), rotate(k, cos, sin)
        o = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=q.shape[2] != k.shape[2],
        )  # (B, n_head, T, head_dim)
        o = o.transpose(1, 2).flatten(2)  # (B, T, n_head * head_dim)
        if self.gate_proj is not None:
            o = o * torch.sigmoid(self.gate_proj(x))
        return self.out_proj(o), LayerState(k=k, v=v)


def short_conv(x, history, weight):
    """Depthwise causal convolution over the last few tokens, then SiLU.

    x (B, T, C); history (B, taps-1, C) or None for zeros; weight (C, taps), or a filter for each token (B, T, C, taps),
    of which tap -1 is the current token. Returns (B, T, C) and the new history.
    """
    T, taps = x.shape[1], weight.shape[-1]
    x = F.pad(x, (0, 0, taps - 1, 0)) if history is None else torch.cat((history, x), 1)
    y = sum(x[:, j : j + T] * weight[..., j] for j in range(taps))
    return F.silu(y).to(x.dtype), x[:, T:]  # the weights are float32, x may not be


class ShortConv(nn.Module):
    """short_conv with one filter for all tokens."""

    def __init__(self, dim, taps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, taps))

    def forward(self, x, history, source):
        """x (B, T, C) -> (B, T, C) and the new history, see short_conv; source is for the other one."""
        return short_conv(x, history, self.weight)


class DynamicConv(nn.Module):
    """short_conv with a filter that a small net makes for each token from what x was made from (Jet-Nemotron)."""

    def __init__(self, config, dim):
        super().__init__()
        self.taps = config.conv
        self.in_proj = nn.Linear(config.d_model, config.dynamic_conv, bias=False)
        self.taps_proj = nn.Linear(config.dynamic_conv, dim * self.taps)

    def forward(self, x, history, source):
        """x (B, T, C), source (B, T, d_model) -> (B, T, C) and the new history, see short_conv."""
        weight = self.taps_proj(F.silu(self.in_proj(source))).unflatten(-1, (-1, self.taps))  # (B, T, C, taps)
        return short_conv(x, history, weight)


class NoConv(nn.Module):
    """SiLU alone, where the others convolve."""

    def forward(self, x, history, source):
        """x (B, T, C) -> (B, T, C) and no history."""
        return F.silu(x), None


class GatedDeltaNet(nn.Module):
    """The fast-weight layer: every token corrects what S predicts for its key (kernels.py), then reads S.

    Another mixer needs the same forward, S_shape and zero_S, and a letter in FAST_MIXERS. What goes from pass to pass
    is S (B, H, K, V) alone. Its matrices are called *_proj (for Muon and FLOPs), the last one out_proj; those that a
    write needs stand in train.WRITERS, and train.block_flops counts a delta rule's 6 K V per token and head (4 where
    nothing is read). What is drawn in another way than matrices are is drawn in init_weights.
    """

    def __init__(self, config):
        super().__init__()
        d, self.heads = config.d_model, config.delta_heads
        self.key_dim, self.value_dim = config.key_dim, config.value_dim
        self.S_shape = self.heads, self.key_dim, self.value_dim  # of the fast weights of one row
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        self.q_proj = nn.Linear(d, keys, bias=False)
        self.k_proj = nn.Linear(d, keys, bias=False)
        self.v_proj = nn.Linear(d, values, bias=False)
        self.conv_q = NoConv() if config.dynamic_conv else ShortConv(keys, config.conv)
        self.conv_k = NoConv() if config.dynamic_conv else ShortConv(keys, config.conv)
        self.conv_v = DynamicConv(config, values) if config.dynamic_conv else ShortConv(values, config.conv)
        self.a_proj = nn.Linear(d, self.heads, bias=False)  # forget gate
        self.b_proj = nn.Linear(d, self.heads, bias=False)  # write gate
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.gate_proj = nn.Linear(d, values, bias=False)
        self.norm = RMSNorm(self.value_dim, config.delta_norm_eps)
        self.out_proj = nn.Linear(values, d, bias=False)

    def zero_S(self, x):
        """S at the start of a sequence, (B, H, K, V), for features x (B, T, d_model).

        Nobody asks for its gradient, but with one the first pass is a pass like any other: one compilation for both.
        """
        S = torch.zeros(len(x), *self.S_shape, dtype=self.A_log.dtype, device=x.device)
        return S.requires_grad_(torch.is_grad_enabled())

    def keys(self, x):
        """q or k before its norm (B, T, H*K) -> (B, T, H, K), L2-normalised."""
        return l2norm(x.unflatten(-1, (-1, self.key_dim)))

    def gates(self, a, b):
        """g = -exp(A_log) softplus(a + dt_bias) <= 0 and beta = sigmoid(b), each (B, T, H), in the weights' dtype."""
        a, b = a.to(self.A_log.dtype), b.to(self.A_log.dtype)
        return -self.A_log.exp() * F.softplus(a + self.dt_bias), torch.sigmoid(b)

    def forward(self, x, state, write_only=False):
        """x (B, T, d_model) -> (B, T, d_model) and the new state.

        With write_only nothing is read: the output is None and only S is in the new state. That is the last write of a
        sleeping chunk, whose features nobody will see.
        """
        shape = (*x.shape[:2], self.heads, self.value_dim)
        history = state.conv or (None, None, None)
        write = self.k_proj, self.v_proj, self.a_proj, self.b_proj
        k, v, a, b, *read = project(x, *write, *(() if write_only else (self.q_proj, self.gate_proj)))
        k, history_k = self.conv_k(k, history[1], x)
        v, history_v = self.conv_v(v, history[2], x)
        k, v = self.keys(k), v.view(shape)  # (B, T, H, K), (B, T, H, V)
        g, beta = self.gates(a, b)
        if write_only:
            return None, LayerState(S=delta_rule(None, k, v, g, beta, state.S)[1])
        q, gate = read
        q, history_q = self.conv_q(q, history[0], x)
        q = self.keys(q) * self.key_dim**-0.5
        o, S = delta_rule(q, k, v, g, beta, state.S)
        o = self.norm(o) * F.silu(gate).view(shape)
        return self.out_proj(o.flatten(2)), LayerState(S=S, conv=(history_q, history_k, history_v))


FAST_MIXERS = {"D": GatedDeltaNet, "d": GatedDeltaNet}  # those with an S to sleep with, by their letter in a pattern


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
    """h += mixer(norm(h)); h += mlp(norm(h)), with the mixer that `kind` names.

    Sandwiched, mixer and MLP each have a second norm on their output. A "d" block ends after the mixer, without one.
    """

    def __init__(self, config, kind):
        super().__init__()
        self.attends, has_mlp, d = kind not in FAST_MIXERS, kind != "d", config.d_model
        sandwich = config.sandwich and has_mlp
        self.norm_mixer = make_norm(config, d)
        window = config.window if kind == "W" else math.inf
        self.mixer = Attention(config, window) if self.attends else FAST_MIXERS[kind](config)
        self.norm_mixer_out = make_norm(config, d) if sandwich else nn.Identity()
        self.norm_mlp = make_norm(config, d) if has_mlp else None
        self.mlp = MLP(config) if has_mlp else None
        self.norm_mlp_out = make_norm(config, d) if sandwich else nn.Identity()

    def forward(self, h, state, rope=None, mask=None, causal=False, write_only=False):
        """h (B, T, d_model) -> h, new LayerState. rope, mask, causal: for attention; write_only: for a delta block.

        With write_only, only S is computed, and h comes back None.
        """
        x = self.norm_mixer(h)
        y, state = self.mixer(x, state, rope, mask, causal) if self.attends else self.mixer(x, state, write_only)
        if write_only:
            return None, state
        h = h + self.norm_mixer_out(y)
        return h if self.mlp is None else h + self.norm_mlp_out(self.mlp(self.norm_mlp(h))), state


class Model(nn.Module):
    """embed -> blocks -> head, with the state passed in and returned (eq. 6 without the loop)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.n_pos, config.d_model) if config.n_pos else None
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.pattern)
        self.norm = make_norm(config, config.d_model)
        self.head_proj = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tie()
        self.apply(functools.partial(init_weights, n_layer=len(config.pattern)))
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.25)  # below the embedding's: what a token is counts for more

    def tie(self):
        """Make the head the embedding, where the architecture says so."""
        if self.config.tied:
            self.head_proj.weight = self.embedding.weight

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

    def blocks(self, h, state, layers=None, write_only=False, span=math.inf, causal=True):
        """Run some of the blocks once, in order.

        h (B, T, d_model); state: a LayerState per block of the model; layers: the indices to run, all by default.
        write_only: the last of them is a delta block of which only the write to S is wanted; h comes back None.
        span: how many tokens attention sees at most, itself included. causal=False: it also sees the later tokens of h,
        all of them.
        Returns h and a new state in which the blocks that did not run keep theirs. `state` itself is not changed.
        """
        layers = range(len(self.layers)) if layers is None else layers
        state, T = list(state), h.shape[1]
        for i in layers:
            block = self.layers[i]
            if block.attends:
                past = 0 if state[i].k is None else state[i].k.shape[1]
                seen = attention_mask(T, past, min(block.mixer.window, span), causal, h.device)
                h, state[i] = block(h, state[i], self.rope(past + T, h), *seen)
            else:
                if state[i].S is None:
                    state[i] = state[i]._replace(S=block.mixer.zero_S(h))
                h, state[i] = block(h, state[i], write_only=write_only and i == layers[-1])
        return h, state

    def rope(self, length, h):
        """The rotations of `length` positions, on h's device; never below float32.

        Tables are kept for powers of two only: with no eviction every window has another length.
        """
        dtype, rows = torch.promote_types(h.dtype, torch.float32), 1 << (length - 1).bit_length()
        table = rope_table(rows, self.config.rope_dim, self.config.rope_theta, h.device, dtype)
        return tuple(a[:length] for a in table)

    def feed_back(self, h):
        """What a pass begins with, from the features the one before ended with: those, or normalised (norm_loop)."""
        return self.norm(h) if self.config.norm_loop else h

    def head(self, h):
        """Features (B, T, d_model) -> logits (B, T, vocab_size), never below float32: near chance, ties matter."""
        with torch.autocast(h.device.type, enabled=False):
            return self.head_proj(self.norm(h.to(self.norm.weight.dtype)))

    def n_params(self):
        """Number of parameters, embedding and head included."""
        return sum(p.numel() for p in self.parameters())

    def compile_blocks(self):
        """Compile each block, not the stack: equal blocks share one compilation, and passes and chunks reuse it."""
        torch._dynamo.config.recompile_limit = 32  # counted over all blocks, which share one forward: nine at most
        torch._functorch.config.backward_pass_autocast = "off"  # else the float32 parts' backward would be in bfloat16
        for block in self.layers:
            block.compile(dynamic=False)


def init_weights(module, n_layer):
    """Initialise one module; Model applies it to all of them."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, RMSNorm):
        nn.init.constant_(module.weight, 0.0 if module.zero_centred else 1.0)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
    elif isinstance(module, ShortConv):
        nn.init.uniform_(module.weight, -0.5, 0.5)
    elif isinstance(module, DynamicConv):
        nn.init.zeros_(module.taps_proj.weight)  # a static filter at first
        nn.init.uniform_(module.taps_proj.bias, -0.5, 0.5)
    elif isinstance(module, GatedDeltaNet):
        # not in the paper: Gated DeltaNet draws A from U(0, 16), and then many a head forgets within a few tokens. S
        # has to outlive N passes over a window, so we start slower; and not at 0, where a head could not learn to
        nn.init.uniform_(module.A_log.data, 0.01, 1.0).log_()
        dt = torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        module.dt_bias.data.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus^-1(dt)
    # apply() visits children first, so a block's small output projections overwrite what nn.Linear got above
    if hasattr(module, "out_proj"):
        nn.init.normal_(module.out_proj.weight, std=0.02 / math.sqrt(2 * n_layer))


# -----------------------------------------------------------------------------
# public checkpoints that training can start from (train.py --init-from)


class Pretrained(NamedTuple):
    """A public checkpoint: its architecture, `model_type` in its config.json, and the blocks that are looped."""

    config: ModelConfig
    model_type: str
    loop: str  # first:last+1
    repo: str  # on huggingface.co
    licence: str


QWEN = dict(n_head=8, n_kv_head=2, head_dim=256, rope_dim=64, rope_theta=1e7, attention_gate=True, delta_heads=16,
            key_dim=128, zero_centred=True, tied=True)  # fmt: skip
JET = dict(qk_norm=False, rope_theta=1e6, value_dim=256, delta_norm_eps=1e-5)
NVIDIA = "NVIDIA licence: research and evaluation only, also for what is trained from it"

PRETRAINED = {
    # not in the paper: of six groups of four blocks the middle four are looped
    "qwen3.5-0.8b": Pretrained(
        ModelConfig(248_320, 6 * "DDDA", d_model=1024, d_mlp=3584, **QWEN),
        "qwen3_5_text", "4:20", "Qwen/Qwen3.5-0.8B", "Apache-2.0"),
    "qwen3.5-2b": Pretrained(
        ModelConfig(248_320, 6 * "DDDA", d_model=2048, d_mlp=6144, **QWEN),
        "qwen3_5_text", "4:20", "Qwen/Qwen3.5-2B", "Apache-2.0"),
    # not in the paper: where its six delta blocks stand, and their size (8 % more parameters here)
    "ouro-1.4b": Pretrained(
        ModelConfig(49_152, 6 * "AAAAd", d_model=2048, n_head=16, d_mlp=5632, delta_heads=8, key_dim=128,
                    dynamic_conv=256, sandwich=True, norm_loop=True, **JET),
        "ouro", "0:30", "ByteDance/Ouro-1.4B", "Apache-2.0"),
    "jet-nemotron-2b": Pretrained(
        ModelConfig(151_936, 14 * "D" + "ADDDDAWW" + 6 * "D", d_model=1536, n_head=12, n_kv_head=2, d_mlp=8960,
                    delta_heads=12, key_dim=96, dynamic_conv=384, window=1152, qkv_bias=True, tied=True, **JET),
        "jet_nemotron", "7:21", "jet-ai/Jet-Nemotron-2B", NVIDIA),
}  # fmt: skip
