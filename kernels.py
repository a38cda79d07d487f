"""One write to fast memory: the gated delta rule, as a definition and as a fast path with the same signature.

A fast-weight layer remembers with one matrix S per head. Every token corrects what S predicts for its key:

    e_t = v_t - alpha_t S_{t-1}^T k_t          the prediction error (the delta), after the decay
    S_t = alpha_t S_{t-1} + k_t (beta_t e_t)^T
    o_t = S_t^T q_t                            the read sees the token's own write

alpha_t = exp(g_t) is the forget gate, beta_t the write gate. This is eq. 3 of arXiv:2605.26099 with the delta-rule
correction of Gated DeltaNet (arXiv:2412.06464); our S is the transpose of theirs, so that rows are keys.

    delta_rule(q, k, v, g, beta, S) -> o, S    what the model calls; on a GPU impl="triton", elsewhere impl="torch"
    impl="recurrent"                           the three lines above in a loop: the definition every test compares with
    impl="torch"                               the same thing a chunk of at most 64 tokens at a time: matrix products
    impl="triton"                              the same products in two kernels forward and two backward

How a chunk of C tokens becomes matrix products. Let gc = cumsum(g) inside the chunk and decay_ij = exp(gc_i - gc_j)
for i >= j, else 0. Unrolling the recurrence from the state S0 that enters the chunk,

    e_i + sum_{j<i} decay_ij (k_i . k_j) beta_j e_j = v_i - exp(gc_i) S0^T k_i

which is one unit lower triangular system for all errors at once, (I + G diag(beta)) E = R. Its inverse has entries
bounded by max(1, beta) as long as |k| <= 1 and beta is in [0, 2], so it is safe to form; L2-normalised keys are a
precondition. Keeping E (not the written values beta*E) as the unknown means that beta is never divided out.

Read next: model.py, and the rest of this file at the end
"""

import functools
import hashlib
import importlib.metadata
import itertools
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import time
from gc import collect  # gc is a cumulative sum here
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the kernels below are then never called
    triton, tl = None, SimpleNamespace(constexpr=None)
jit = triton.jit if triton else lambda function: function
# Triton launches its kernels from C that it compiles on first use, with Python's headers. It looks for them here, not
# in the folder for local packages that Debian's own Python names
HAS_C_COMPILER = bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
SCHEME = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
HAS_HEADERS = os.path.exists(os.path.join(sysconfig.get_paths(SCHEME)["include"], "Python.h"))

MAX_CHUNK = 64  # more tokens per chunk mean fewer sequential steps but C^2 work per token


def delta_rule(q, k, v, g, beta, S, impl="auto"):
    """Write T tokens into the fast weights S and read after every write.

    q, k:    (B, T, H, K), k (and usually q) L2-normalised by the caller; no scale is hidden here. q may be None when
             nothing will be read (the last write of a window that is slept over): then o is None.
    v:       (B, T, H, V)
    g, beta: (B, T, H) log forget gate (<= 0) and write gate, in promote_types(v.dtype, float32)
    S:       (B, H, K, V) fast weights, same dtype as g
    impl:    "recurrent" (the definition), "torch" (chunked), "triton" (a GPU's), or "auto": see pick_impl
    returns  o (B, T, H, V) in v's dtype, and the new S. Differentiable in every input, S included.
    raises   ValueError if T < 1, if shapes or dtypes do not belong together, for an unknown impl, or if Triton cannot
             run it.
    """
    B, T, H, K = k.shape
    if T < 1 or v.shape[:3] != (B, T, H) or g.shape != (B, T, H) or beta.shape != (B, T, H):
        raise ValueError(
            f"k {tuple(k.shape)}, v {tuple(v.shape)}, g {tuple(g.shape)}, beta {tuple(beta.shape)} disagree"
        )
    if S.shape != (B, H, K, v.shape[-1]) or (q is not None and q.shape != k.shape):
        raise ValueError(f"S {tuple(S.shape)} or q does not fit k {tuple(k.shape)} and v {tuple(v.shape)}")
    exact = torch.promote_types(v.dtype, torch.float32)
    if not g.dtype == beta.dtype == S.dtype == exact:
        raise ValueError(f"g {g.dtype}, beta {beta.dtype} and S {S.dtype} must be {exact} where v is {v.dtype}")
    if impl == "auto":
        impl = pick_impl(k, v)
    elif impl == "triton" and (reason := why_not_triton(k, v)):
        raise ValueError(f"impl='triton' is not possible here: {reason}")
    elif impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}: choose one of auto, {', '.join(IMPLEMENTATIONS)}")
    # plain PyTorch computes in float32; Triton rounds only the operands of its products to v's dtype
    dtype = v.dtype if impl == "triton" else exact
    q = None if q is None else q.to(dtype)
    with torch.autocast(v.device.type, enabled=False):  # autocast would turn these products back into bfloat16
        o, S = IMPLEMENTATIONS[impl](q, k.to(dtype), v.to(dtype), g, beta, S)
    return (None if o is None else o.to(v.dtype)), S


def why_not_triton(k, v):
    """What keeps the Triton kernels from these tensors, in words, or None."""
    K, V = k.shape[-1], v.shape[-1]
    if triton is None:
        return "the package triton is not installed"
    if not k.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {k.device.type}, not on a GPU"
    if k.is_cuda and not HAS_C_COMPILER:
        return "Triton needs a C compiler: install gcc or set CC"
    if k.is_cuda and not HAS_HEADERS:
        return "Triton needs Python.h: install Python's headers, such as the package python3-dev"
    if K % 16 or K > 128 or V > 256:
        return f"K = {K} must be a multiple of 16 up to 128, and V = {V} at most 256"
    if v.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{v.dtype} is not one of float32, bfloat16, float16"


def pick_impl(k, v):
    """The impl that "auto" stands for with these keys and values: "triton" on a GPU where it can, else "torch"."""
    return "triton" if k.is_cuda and not why_not_triton(k, v) else "torch"


def _recurrent(q, k, v, g, beta, S):
    """The definition: one token at a time, the three lines of the module docstring."""
    outputs = []
    for t in range(k.shape[1]):
        k_t = k[:, t, :, :, None]  # (B, H, K, 1)
        S = S * g[:, t, :, None, None].exp()  # (B, H, K, V)
        e_t = v[:, t] - (S * k_t).sum(-2)  # (B, H, V)
        S = S + k_t * (beta[:, t, :, None] * e_t)[:, :, None]
        if q is not None:
            outputs.append((S * q[:, t, :, :, None]).sum(-2))
    return (torch.stack(outputs, 1) if outputs else None), S  # (B, T, H, V)


def _chunked(q, k, v, g, beta, S):
    """The fast path in plain PyTorch: everything but the state update is parallel over chunks."""
    T = k.shape[1]
    n = -(-T // MAX_CHUNK)
    C = -(-T // n)  # equal chunks: T = 75 is 2 x 38, not 64 + 11
    k, v, g, beta = (_in_chunks(a, n, C) for a in (k, v, g, beta))  # (B, H, n, C, ...)
    gc = g.cumsum(-1)  # (B, H, n, C)
    causal = torch.ones(C, C, dtype=torch.bool, device=k.device).tril()
    # mask the exponent, never the result: exp(gc_i - gc_j) overflows above the diagonal when the decay is hard
    decay = (gc[..., :, None] - gc[..., None, :]).masked_fill(~causal, -torch.inf).exp()  # (B, H, n, C, C)
    gram = (k @ k.mT * decay).tril(-1)  # G
    inverse = _UnitLowerInverse.apply(gram * beta[..., None, :])  # (I + G diag(beta))^-1
    error = inverse @ v  # what E would be if S0 were 0
    read_key = inverse @ (k * gc.exp()[..., None])  # E = error - read_key @ S0
    write_key = k * (gc[..., -1:] - gc).exp()[..., None]  # k_i decayed to the end of the chunk
    total = gc[..., -1, None, None].exp()  # decay of S over the whole chunk
    if q is not None:
        q = _in_chunks(q, n, C)
        attention = q @ k.mT * decay  # (B, H, n, C, C)
        q = q * gc.exp()[..., None]
    outputs = []
    for i in range(n):  # the only sequential part
        u = beta[:, :, i, :, None] * (error[:, :, i] - read_key[:, :, i] @ S)  # (B, H, C, V)
        if q is not None:
            outputs.append(q[:, :, i] @ S + attention[:, :, i] @ u)
        S = total[:, :, i] * S + write_key[:, :, i].mT @ u
    return (torch.cat(outputs, 2)[:, :, :T].transpose(1, 2) if outputs else None), S


def _in_chunks(a, n, C):
    """(B, T, H, ...) -> (B, H, n, C, ...). Tokens past T are zeros: no key, no write, no decay, so exact no-ops."""
    a = F.pad(a, (0, 0) * (a.dim() - 2) + (0, n * C - a.shape[1]))
    return a.unflatten(1, (n, C)).movedim(3, 1)


class _UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 for strictly lower triangular A (..., C, C), by doubling the size of the solved diagonal blocks.

    With X the inverse of the diagonal blocks of size m, the blocks of size 2m follow from X - X A_m X, where A_m is A
    restricted to the lower left m x m corner of each 2m x 2m block. Every intermediate is an inverse of a part of the
    matrix, hence bounded; the shorter series (I - A)(I + A^2)(I + A^4)... is not, and fails for repeated keys.
    """

    @staticmethod
    def forward(ctx, a):
        C = a.shape[-1]
        i = torch.arange(C, device=a.device)
        x = torch.eye(C, dtype=a.dtype, device=a.device).expand_as(a)
        m = 1
        while m < C:
            corner = (i[:, None] // m == i // m + 1) & (i[:, None] // (2 * m) == i // (2 * m))
            block = a.masked_fill(~corner, 0)
            x = x - (block if m == 1 else x @ block @ x)
            m *= 2
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, dx):
        (x,) = ctx.saved_tensors
        return -(x.mT @ dx @ x.mT).tril(-1)


# -----------------------------------------------------------------------------
# the same mathematics in Triton: four kernels, two launches forward and two backward
#
# Chunks of C <= 32 tokens, value columns in blocks of BV <= 32: no product has more than 32 rows. Taller ones would use
# Hopper's asynchronous tensor cores, which several Triton releases miscompile, and a backward in one kernel would not
# fit into registers. S is held transposed, (V, K), so that its update has BV rows. Sums are in float32, operands of
# products in the inputs' dtype, but for the inverse. Tokens past T load as zeros: no key, no write, no decay, and so
# they change nothing.
#
# Backward, with dO and the gradient dS of the state that leaves the chunk; ' transposes, E = inverse R are the errors,
# U = diag(beta) E what is written; of W = dO E' and Z = dR E' only the lower triangles count, Z's without its diagonal:
#
#     dU = P' dO + exp(gc_C - gc) (K dS)         P = decay * Q K'
#     dR = inverse' (beta dU)                    and dV = dR
#     dS0 = exp(gc_C) dS + Q' (exp(gc) dO) - K' (exp(gc) dR)
#     dQ = A1 + dP K                             A1 = exp(gc) dO S0',  dP = decay W diag(beta)
#     dK = beta M - A2 + dP' Q + (dKK + dKK') K  A2 = exp(gc) dR S0',  dKK = -decay Z diag(beta),
#                                                M = exp(gc_C - gc) E dS'
#     dbeta_j = <K_j, M_j> + sum_i N_ij          N = decay (W * Q K' - Z * K K')
#     dg_i = sum_{j >= i} (<Q_j, A1_j> - <K_j, A2_j> + row j of N diag(beta) - column j of it)
#            + sum_{j < i} beta_j <K_j, M_j> + exp(gc_C) <S0, dS>
#
# dg could be had from <Q, dQ> - <K, dK> with fewer sums, but when the decay is hard their difference cancels.


@jit
def _gates(g, beta, b, h, t, T, H, PRECISION: tl.constexpr):
    """Of the tokens t of one chunk, each [C]: gc, exp(gc), exp(gc_C - gc), beta. Also the scalar exp(gc_C)."""
    row = (b * T + t) * H + h
    g_t = tl.load(g + row, mask=t < T, other=0.0)
    if PRECISION == "tf32x3":  # exact inputs deserve it: after hard decay gc is large, and its differences cancel
        g_t = g_t.to(tl.float64)
    gc = tl.cumsum(g_t, 0)
    # exactly the last entry: a sum of its own would round differently, and gc_C - gc would not end in 0
    total = tl.sum(tl.where(t == tl.max(t, 0), gc, 0.0), 0)
    to_end = tl.exp((total - gc).to(tl.float32))
    beta_t = tl.load(beta + row, mask=t < T, other=0.0)
    return gc, tl.exp(gc.to(tl.float32)), to_end, beta_t, tl.exp(total.to(tl.float32))


@jit
def _decay(gc, C: tl.constexpr):
    """exp(gc_i - gc_j) for i >= j, else 0. The exponent is masked, not the result: above the diagonal it overflows."""
    i = tl.arange(0, C)
    exponent = (gc[:, None] - gc[None, :]).to(tl.float32)
    return tl.exp(tl.where(i[:, None] >= i[None, :], exponent, float("-inf")))


@jit
def _load(x, rows, cols, rows_ok, n_cols):
    """x[rows + cols] as a tile, zeros where a row or a column does not exist."""
    return tl.load(x + rows[:, None] + cols[None, :], mask=rows_ok[:, None] & (cols < n_cols)[None, :], other=0.0)


@jit
def _store(x, rows, cols, rows_ok, n_cols, value):
    """x[rows + cols] = value, where both exist."""
    tl.store(x + rows[:, None] + cols[None, :], value, mask=rows_ok[:, None] & (cols < n_cols)[None, :])


@jit
def _inverse_kernel(
    k, g, beta, inverse, T, NT, H, K, stride_b, stride_t, stride_h,
    C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(I + G diag(beta))^-1 of one chunk, by the doubling of _UnitLowerInverse. Grid: chunks x B x H."""
    pid = tl.program_id(0).to(tl.int64)
    chunk, b, h = pid % NT, pid // NT // H, pid // NT % H
    t = chunk * C + tl.arange(0, C)
    gc, _, _, beta_t, _ = _gates(g, beta, b, h, t, T, H, PRECISION)
    k_t = _load(k, b * stride_b + t * stride_t + h * stride_h, tl.arange(0, BK), t < T, K)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    gram = tl.dot(k_t, tl.trans(k_t), input_precision=PRECISION) * _decay(gc, C)
    a = tl.where(i > j, gram * beta_t[None, :], 0.0)
    x = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, a, 0.0)
    for s in tl.static_range(1, LOG_C):
        corner = ((i >> s) == (j >> s) + 1) & ((i >> (s + 1)) == (j >> (s + 1)))
        xa = tl.dot(x, tl.where(corner, a, 0.0), input_precision=PRECISION)
        x -= tl.dot(xa, x, input_precision=PRECISION)
    tl.store(inverse + pid * C * C + i * C + j, x)


@jit
def _forward_kernel(
    q, k, v, g, beta, S, inverse, o, S_out, error, states, T, NT, H, K, V,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    READ: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of one head in order, for BV columns of S. Grid: value blocks x B x H.

    Writes o, the errors E and the S that enters each chunk, which are all that the backward needs.
    """
    n_blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0).to(tl.int64)
    bh, c, i = pid // n_blocks, tl.arange(0, BK), tl.arange(0, C)
    b, h = bh // H, bh % H
    cols = pid % n_blocks * BV + tl.arange(0, BV)
    dtype = k.dtype.element_ty
    S_at = bh * K * V + c[None, :] * V + cols[:, None]  # (V, K): the transpose of how S lies in memory
    S_ok = (c < K)[None, :] & (cols < V)[:, None]
    S_t = tl.load(S + S_at, mask=S_ok, other=0.0)
    for chunk in range(NT):
        t = (chunk * C + i).to(tl.int64)
        gc, from_start, to_end, beta_t, total = _gates(g, beta, b, h, t, T, H, PRECISION)
        k_at = b * k_stride_b + t * k_stride_t + h * k_stride_h
        o_at = ((b * T + t) * H + h) * V
        k_t = _load(k, k_at, c, t < T, K)
        v_t = _load(v, b * v_stride_b + t * v_stride_t + h * v_stride_h, cols, t < T, V)
        inv = tl.load(inverse + (bh * NT + chunk) * C * C + i[:, None] * C + i[None, :])
        S_low = S_t.to(dtype)
        _store(states, ((bh * NT + chunk) * V + cols) * K, c, cols < V, K, S_low)
        r = v_t - from_start[:, None] * tl.dot(k_t, tl.trans(S_low), input_precision=PRECISION)
        e = tl.dot(inv, r, input_precision=PRECISION)
        _store(error, o_at, cols, t < T, V, e.to(dtype))
        u = beta_t[:, None] * e
        if READ:
            q_t = _load(q, k_at, c, t < T, K)
            p = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION) * _decay(gc, C)
            out = from_start[:, None] * tl.dot(q_t, tl.trans(S_low), input_precision=PRECISION)
            out += tl.dot(p.to(dtype), u.to(dtype), input_precision=PRECISION)
            _store(o, o_at, cols, t < T, V, out.to(dtype))
        u = (to_end[:, None] * u).to(dtype)
        S_t = total * S_t + tl.dot(tl.trans(u), k_t, input_precision=PRECISION)
    tl.store(S_out + S_at, S_t, mask=S_ok)


@jit
def _backward_kernel(
    q, k, g, beta, inverse, do, dS_out, dv, dS, dstates, T, NT, H, K, V, k_stride_b, k_stride_t, k_stride_h,
    READ: tl.constexpr, LATER: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of one head in reverse, for BV columns of S: dV, dS0 and the dS that leaves each chunk.

    READ: o was computed and has a gradient. LATER: the final S has one. Grid: value blocks x B x H.
    """
    n_blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0).to(tl.int64)
    bh, c, i = pid // n_blocks, tl.arange(0, BK), tl.arange(0, C)
    b, h = bh // H, bh % H
    cols = pid % n_blocks * BV + tl.arange(0, BV)
    dtype = k.dtype.element_ty
    S_at = bh * K * V + c[None, :] * V + cols[:, None]
    S_ok = (c < K)[None, :] & (cols < V)[:, None]
    dS_t = tl.load(dS_out + S_at, mask=S_ok, other=0.0) if LATER else tl.zeros((BV, BK), tl.float32)
    for step in range(NT):
        chunk = NT - 1 - step
        t = (chunk * C + i).to(tl.int64)
        gc, from_start, to_end, beta_t, total = _gates(g, beta, b, h, t, T, H, PRECISION)
        k_at = b * k_stride_b + t * k_stride_t + h * k_stride_h
        o_at = ((b * T + t) * H + h) * V
        k_t = _load(k, k_at, c, t < T, K)
        dS_low = dS_t.to(dtype)
        _store(dstates, ((bh * NT + chunk) * V + cols) * K, c, cols < V, K, dS_low)
        du = to_end[:, None] * tl.dot(k_t, tl.trans(dS_low), input_precision=PRECISION)
        dS_t *= total
        if READ:
            q_t = _load(q, k_at, c, t < T, K)
            do_t = _load(do, o_at, cols, t < T, V)
            p_t = tl.dot(k_t, tl.trans(q_t), input_precision=PRECISION) * tl.trans(_decay(gc, C))
            du += tl.dot(p_t.to(dtype), do_t, input_precision=PRECISION)
            do_t = (from_start[:, None] * do_t).to(dtype)
            dS_t += tl.dot(tl.trans(do_t), q_t, input_precision=PRECISION)
        inv_t = tl.load(inverse + (bh * NT + chunk) * C * C + i[:, None] + i[None, :] * C)
        dr = tl.dot(inv_t, beta_t[:, None] * du, input_precision=PRECISION)
        _store(dv, o_at, cols, t < T, V, dr.to(dtype))
        dr = (from_start[:, None] * dr).to(dtype)
        dS_t -= tl.dot(tl.trans(dr), k_t, input_precision=PRECISION)
    tl.store(dS + S_at, dS_t, mask=S_ok)


@jit
def _gradient_kernel(
    q, k, g, beta, error, states, do, dv, dstates, dq, dk, dg, dbeta, T, NT, H, K, V,
    k_stride_b, k_stride_t, k_stride_h,
    READ: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dg and dbeta of one chunk, from what the two scans left. Grid: chunks x B x H."""
    pid = tl.program_id(0).to(tl.int64)
    chunk, b, h, c = pid % NT, pid // NT // H, pid // NT % H, tl.arange(0, BK)
    t = chunk * C + tl.arange(0, C)
    w, z = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    a1, a2, m = (tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32))
    forgotten = tl.zeros((BK,), tl.float32)  # <S0, dS> by column
    row = (b * T + t) * H + h
    for block in range(0, V, BV):
        cols = block + tl.arange(0, BV)
        e, dr = _load(error, row * V, cols, t < T, V), _load(dv, row * V, cols, t < T, V)
        S0 = _load(states, (pid * V + cols) * K, c, cols < V, K)
        dS = _load(dstates, (pid * V + cols) * K, c, cols < V, K)
        forgotten += tl.sum(S0.to(tl.float32) * dS.to(tl.float32), 0)
        z += tl.dot(dr, tl.trans(e), input_precision=PRECISION)
        a2 += tl.dot(dr, S0, input_precision=PRECISION)
        m += tl.dot(e, dS, input_precision=PRECISION)
        if READ:
            do_t = _load(do, row * V, cols, t < T, V)
            w += tl.dot(do_t, tl.trans(e), input_precision=PRECISION)
            a1 += tl.dot(do_t, S0, input_precision=PRECISION)
    gc, from_start, to_end, beta_t, total = _gates(g, beta, b, h, t, T, H, PRECISION)
    k_at = b * k_stride_b + t * k_stride_t + h * k_stride_h
    k_t = _load(k, k_at, c, t < T, K)
    decay = _decay(gc, C)
    strict = tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]
    a2 *= from_start[:, None]
    m *= to_end[:, None]
    km = tl.sum(k_t * m, 1)
    z = tl.where(strict, z * decay, 0.0)
    n = -z * tl.dot(k_t, tl.trans(k_t), input_precision=PRECISION)
    z = (-z * beta_t[None, :]).to(k_t.dtype)
    grad_k = beta_t[:, None] * m - a2 + tl.dot(z, k_t, input_precision=PRECISION)
    grad_k += tl.dot(tl.trans(z), k_t, input_precision=PRECISION)
    grad_g = -tl.sum(k_t * a2, 1)
    if READ:
        q_t = _load(q, k_at, c, t < T, K)
        a1 *= from_start[:, None]
        w *= decay
        n += w * tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION)
        w = (w * beta_t[None, :]).to(k_t.dtype)
        grad_k += tl.dot(tl.trans(w), q_t, input_precision=PRECISION)
        grad_g += tl.sum(q_t * a1, 1)
        a1 += tl.dot(w, k_t, input_precision=PRECISION)
        _store(dq, row * K, c, t < T, K, a1.to(k_t.dtype))
    _store(dk, row * K, c, t < T, K, grad_k.to(k_t.dtype))
    tl.store(dbeta + row, km + tl.sum(n, 0), mask=t < T)
    n = tl.where(strict, n * beta_t[None, :], 0.0)
    grad_g += tl.sum(n, 1) - tl.sum(n, 0)
    km *= beta_t
    grad_g = tl.cumsum(grad_g, 0, reverse=True) + (tl.cumsum(km, 0) - km) + total * tl.sum(forgotten, 0)
    tl.store(dg + row, grad_g, mask=t < T)


def _plan(k, v):
    """What the launches share: number of chunks, number of value blocks, compile-time options."""
    T, K, V = k.shape[1], k.shape[-1], v.shape[-1]
    exact = k.dtype == torch.float32
    BK = triton.next_power_of_2(K)
    C = 16 if T <= 16 or (exact and BK == 128) else 32  # larger tiles of float32 would not fit into registers
    BV = 16 if V <= 16 else 32
    options = dict(C=C, BK=BK, BV=BV, PRECISION="tf32x3" if exact else "tf32", num_warps=8 if BK == 128 or exact else 4)
    return triton.cdiv(T, C), triton.cdiv(V, BV), options


def _layout(q, k, v):
    """q and k with the same strides, every last dimension contiguous; copies only where that is not so."""
    k, v = (a if a.stride(-1) == 1 else a.contiguous() for a in (k, v))
    if q is not None and q.stride() != k.stride():
        q, k = q.contiguous(), k.contiguous()
    return q, k, v


def _forward_outputs(q, k, v, g, beta, S):
    """o (empty without q), the new S, and for the backward: errors, the S that enters each chunk, inverses.

    With the arguments of _forward, because this is also its fake, which tells torch.compile the shapes.
    """
    (B, T, H, K), V = k.shape, v.shape[-1]
    NT, _, options = _plan(k, v)
    C = options["C"]
    empty = functools.partial(torch.empty, device=k.device, dtype=v.dtype)
    o = empty(0 if q is None else (B, T, H, V))
    S = empty(B, H, K, V, dtype=torch.float32)
    # not even bfloat16 inputs allow a rounded inverse: with repeated keys its entries cancel
    return o, S, empty(B, T, H, V), empty(B, H, NT, V, K), empty(B, H, NT, C, C, dtype=torch.float32)


def _forward(
    q: Tensor | None, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two launches; returns what _forward_outputs allocates."""
    o, S_out, error, states, inverse = outputs = _forward_outputs(q, k, v, g, beta, S)
    q, k, v = _layout(q, k, v)
    g, beta, S = g.contiguous(), beta.contiguous(), S.contiguous()
    (B, T, H, K), V = k.shape, v.shape[-1]
    NT, blocks, options = _plan(k, v)
    C, BK, precision = (options[name] for name in ("C", "BK", "PRECISION"))
    _inverse_kernel[(NT * B * H,)](
        k, g, beta, inverse, T, NT, H, K, *k.stride()[:3],
        C=C, LOG_C=C.bit_length() - 1, BK=BK, PRECISION=precision, num_warps=2,
    )  # fmt: skip
    _forward_kernel[(blocks * B * H,)](
        q, k, v, g, beta, S, inverse, o, S_out, error, states, T, NT, H, K, V, *k.stride()[:3], *v.stride()[:3],
        READ=q is not None, num_stages=2, **options,
    )  # fmt: skip
    return outputs


def _backward_outputs(q, k, g, beta, error, states, inverse, do, dS_out):
    """Gradients of q (empty without q), k, v, g, beta and S; also the fake of _backward, hence the arguments."""
    (B, T, H, K), V = k.shape, error.shape[-1]
    empty = functools.partial(torch.empty, device=k.device)
    dq = empty(0 if q is None else (B, T, H, K), dtype=k.dtype)
    dk, dv = empty(B, T, H, K, dtype=k.dtype), empty(B, T, H, V, dtype=k.dtype)
    return dq, dk, dv, empty(B, T, H), empty(B, T, H), empty(B, H, K, V)


def _backward(
    q: Tensor | None, k: Tensor, g: Tensor, beta: Tensor, error: Tensor, states: Tensor, inverse: Tensor,
    do: Tensor | None, dS_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Two launches; returns what _backward_outputs allocates. do, dS_out: None if nothing depends on o, on S."""
    dq, dk, dv, dg, dbeta, dS = outputs = _backward_outputs(q, k, g, beta, error, states, inverse, do, dS_out)
    q, k, _ = _layout(q, k, error)
    g, beta = g.contiguous(), beta.contiguous()
    do, dS_out = (None if a is None else a.contiguous() for a in (do, dS_out))
    (B, T, H, K), V = k.shape, error.shape[-1]
    NT, blocks, options = _plan(k, error)
    dstates = torch.empty_like(states)
    _backward_kernel[(blocks * B * H,)](
        q, k, g, beta, inverse, do, dS_out, dv, dS, dstates, T, NT, H, K, V, *k.stride()[:3],
        READ=do is not None, LATER=dS_out is not None, num_stages=2, **options,
    )  # fmt: skip
    _gradient_kernel[(NT * B * H,)](
        q, k, g, beta, error, states, do, dv, dstates, dq, dk, dg, dbeta, T, NT, H, K, V, *k.stride()[:3],
        READ=do is not None, num_stages=1, **options,
    )  # fmt: skip
    return outputs


# opaque to torch.compile: one node in the graph, no break. The backward is an op of its own for the same reason. The
# names hold a hash of this file, because torch.compile's cache on disk knows an op by its name alone: after an edit it
# would go on with the old backward
with open(__file__, "rb") as source:
    VERSION = hashlib.sha256(source.read()).hexdigest()[:8]
forward_op = torch.library.custom_op(f"delta_rule::forward_{VERSION}", _forward, mutates_args=())
backward_op = torch.library.custom_op(f"delta_rule::backward_{VERSION}", _backward, mutates_args=())
forward_op.register_fake(_forward_outputs)
backward_op.register_fake(_backward_outputs)


def _save(ctx, inputs, output):
    q, k, _, g, beta, _ = inputs
    ctx.set_materialize_grads(False)  # an unused o or S costs nothing
    ctx.save_for_backward(q, k, g, beta, *output[2:])


def _gradients(ctx, do, dS, *_):
    q, *saved = ctx.saved_tensors
    read = q is not None and do is not None
    dq, *others = backward_op(q if read else None, *saved, do if read else None, dS)
    return dq if read else None, *others


forward_op.register_autograd(_gradients, setup_context=_save)


def _triton(q, k, v, g, beta, S):
    """The fast path on a GPU."""
    o, S, *_ = forward_op(q, k, v, g, beta, S)
    return (None if q is None else o), S


IMPLEMENTATIONS = {"recurrent": _recurrent, "torch": _chunked, "triton": _triton}


# -----------------------------------------------------------------------------
# the benchmark: python kernels.py [--json FILE]

SHAPES = {  # B, T, H, K, V
    "one token": (256, 1, 8, 64, 64),
    "Rule 110": (512, 24, 4, 64, 64),
    "Depo": (128, 75, 8, 64, 64),
    "GSM": (16, 2000, 12, 96, 256),
    "long": (8, 8192, 16, 128, 128),
}


def random_inputs(B, T, H, K, V, dtype, device):
    """Arguments of delta_rule of the sizes that a layer gives them: unit keys, decays exp(g) in (0.37, 1]."""
    normal = functools.partial(torch.randn, device=device)
    q, k = (F.normalize(normal(B, T, H, K), dim=-1).to(dtype) for _ in "qk")
    g, beta = -torch.rand(B, T, H, device=device).square(), torch.rand(B, T, H, device=device)
    return [a.requires_grad_() for a in (q, k, normal(B, T, H, V).to(dtype), g, beta, normal(B, H, K, V))]


def peer():
    """flash-linear-attention's kernel with our signature, or None if it is not installed."""
    os.environ.setdefault("FLA_TILELANG", "0")  # its Triton kernels, not those of another compiler
    try:
        import fla.ops.common.chunk_o
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except Exception as error:  # whatever an import that fails raises: without a peer the rest is still measured
        if not isinstance(error, ModuleNotFoundError):
            print(f"flash-linear-attention cannot be imported ({error!r}): measured without it", file=sys.stderr)
        return None
    # its backward refuses Hopper with Triton < 3.7.1, where its dk can be wrong; as a peer in time it still serves
    fla.ops.common.chunk_o.IS_NVIDIA_HOPPER = False
    return lambda q, k, v, g, beta, S: chunk_gated_delta_rule(
        q, k, v, g, beta, scale=1.0, initial_state=S, output_final_state=True
    )


def floor_seconds(shape, itemsize, backward, bandwidth, flops):
    """The least time for one call: to read every input and write every output once, or, if longer, for the products."""
    B, T, H, K, V = shape
    tokens, states = B * T * H, 4 * B * H * K * V
    moved = tokens * (itemsize * (2 * K + 2 * V) + 8) + 2 * states
    work = 6 * tokens * K * V
    if backward:  # reads q, k, v, do, g, beta, S, dS; writes six gradients
        moved += tokens * (itemsize * (4 * K + 3 * V) + 16) + 3 * states
        work *= 3
    return max(moved / bandwidth, work / flops)


def measure(call, device):
    """Seconds per call as (median, first quartile, third quartile): as many samples as fit a second, 3 to 30.

    On a GPU a sample is a batch of calls, so that it contains what the host needs to launch them and no idle time.
    """

    def sample(n):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / n

    sample(2)  # compiles, allocates
    once = sample(1)
    n = max(1, int(0.02 / once)) if device == "cuda" else 1
    samples = sorted(sample(n) for _ in range(max(3, min(30, int(1 / (once * n))))))
    return tuple(samples[round(f * (len(samples) - 1))] for f in (0.5, 0.25, 0.75))


def graphed(call):
    """The same call, replayed from a CUDA graph: what the GPU alone takes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    collect()  # what an old graph of autograd still holds from another stream would break the recording
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:  # what breaks a recording makes its end fail, too, which leaves its stream behind
        torch.cuda.set_stream(stream)
        raise error.__context__ or error
    return graph.replay


def machine_limits(device, dtype):
    """Measured here and now: bytes per second of a large copy, FLOPs per second of a large matrix product."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    big = torch.empty(2**28 if device == "cuda" else 2**26, device=device)
    out = torch.empty_like(big)
    copy = measure(lambda: out.copy_(big), device)[0]
    return 2 * 4 * big.numel() / copy, 2 * n**3 / measure(lambda: a @ a, device)[0]


def calls_of(rule, shape, dtype, device, backward):
    """Calls of a rule, each with inputs of its own: on a GPU as many as do not fit its cache together, else one.

    Made in turn they read from memory, as a layer's calls do, and as the floor supposes.
    """

    def call(inputs, weights):
        with torch.set_grad_enabled(backward):
            outputs = rule(*inputs)
            return torch.autograd.grad(outputs, inputs, weights) if backward else outputs

    every = [random_inputs(*shape, dtype, device)]
    if device == "cuda":
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        more = min(15, 2 * cache // sum(a.nbytes for a in every[0]))
        every += [random_inputs(*shape, dtype, device) for _ in range(more)]
    weights = [[torch.randn_like(a) for a in (inputs[2], inputs[5])] for inputs in every]  # like o, like S
    return [functools.partial(call, *each) for each in zip(every, weights)]


def benchmark(device, dtype, names, limits):
    """
    Measure every implementation, shape and direction, with and without CUDA graph: a generator of rows, dicts with
    times in seconds. flash-linear-attention comes last: it compiles for minutes. limits: of machine_limits.
    """
    rules = {impl: functools.partial(delta_rule, impl=impl) for impl in ("recurrent", "torch")}
    if device == "cuda":
        rules |= {"triton": functools.partial(delta_rule, impl="triton"), "fla": peer()}
    for impl, name, backward in itertools.product(rules, names, (False, True)):
        shape, rule = SHAPES[name], rules[impl]
        B, T, H, K, V = shape
        if rule is None or (impl == "recurrent" and 4 * B * T * H * K * V > 8e9):
            continue  # the definition keeps S at every token
        calls = calls_of(rule, shape, dtype, device, backward)
        least = floor_seconds(shape, dtype.itemsize, backward, *limits)
        for graph in (False, True) if device == "cuda" else (False,):
            try:
                turns = itertools.cycle([graphed(call) for call in calls] if graph else calls)
                median, low, high = measure(lambda: next(turns)(), device)
            except Exception as error:  # Triton and fla raise what they like; the other rows are wanted all the same
                print(f"{name}, {impl}: {(str(error).splitlines() or [repr(error)])[0]}", file=sys.stderr)
                continue
            print(f"{name}, {impl}, backward={backward}, graph={graph}: {1e6 * median:,.0f} us", file=sys.stderr)
            row = dict(shape=name, sizes=shape, impl=impl, backward=backward, graph=graph)
            yield row | dict(median=median, low=low, high=high, floor=least, ratio=median / least)


def benchmark_table(rows):
    """
    Markdown: a line per shape, direction and launch, a column per implementation: microseconds, half the distance
    between the quartiles, the multiple of the floor.
    """

    def cell(row):
        spread = (row["high"] - row["low"]) / 2 / row["median"]
        return f"{1e6 * row['median']:,.0f} ± {100 * spread:.0f} % ({row['ratio']:.1f})"

    impls, shapes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("impl", "shape"))
    lines = [f"| B, T, H, K, V | | floor | {' | '.join(impls)} |", "| --- | --- | --: |" + " --: |" * len(impls)]
    groups = {}
    for row in rows:
        groups.setdefault((row["shape"], row["backward"], row["graph"]), {})[row["impl"]] = row
    for shape, backward, graph in sorted(groups, key=lambda key: (shapes.index(key[0]), *key[1:])):
        found = groups[shape, backward, graph]
        what = ("forward + backward" if backward else "forward") + (", graph" if graph else "")
        cells = [cell(found[impl]) if impl in found else "" for impl in impls]
        first = next(iter(found.values()))
        sizes, floor = ", ".join(map(str, first["sizes"])), f"{1e6 * first['floor']:,.0f}"
        lines.append(f"| {shape}: {sizes} | {what} | {floor} | {' | '.join(cells)} |")
    return "\n".join(lines)


def version(package):
    """The version of an installed package, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parse_args(argv):
    """The flags of the benchmark; exits with one line where they are wrong."""
    from data import Parser, check_writable

    parser = Parser(description="Benchmark the delta rule: bfloat16 on a GPU, float32 on one thread of a CPU.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument("--json", help="write all numbers to this file")
    args = parser.parse_args(argv)
    if args.json:
        try:
            check_writable(args.json)
        except ValueError as error:
            parser.error(str(error))
    return args


def main():
    """Benchmark this machine: a Markdown table on stdout, everything in --json."""
    from data import git_commit, write_json

    args = parse_args(sys.argv[1:])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()}, 1 thread)",
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: version(name) for name in ("torch", "triton", "numpy", "fla-core")},
        "command": shlex.join(["python", "kernels.py", *sys.argv[1:]]),
        "commit": git_commit(),
    }
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows, status = [], 0
    try:
        bandwidth, flops = limits = machine_limits(device, dtype)
        print(f"{found['device']}: copies {bandwidth / 1e9:,.0f} GB/s, products {flops / 1e9:,.0f} GFLOP/s")
        found |= {"bandwidth": bandwidth, "flops": flops, "rows": rows}
        for row in benchmark(device, dtype, args.shapes, limits):
            rows.append(row)
            if args.json:  # after every row: what is measured is not lost
                write_json(args.json, found)
    except KeyboardInterrupt:
        status, why = 130, "interrupted"
    except OSError as error:
        status, why = 2, error
    print("Microseconds per call ± half the distance between the quartiles, in brackets the multiple of the floor.\n")
    print(benchmark_table(rows))
    if status:
        print(f"kernels.py: {why}; the table has what was measured", file=sys.stderr)
        sys.exit(status)


if __name__ == "__main__":
    main()
