"""One write to fast memory: the gated delta rule, as a definition and as a fast path with the same signature.

A fast-weight layer remembers with one matrix S per head. Every token corrects what S predicts for its key:

    e_t = v_t - alpha_t S_{t-1}^T k_t          the prediction error (the delta), after the decay
    S_t = alpha_t S_{t-1} + k_t (beta_t e_t)^T
    o_t = S_t^T q_t                            the read sees the token's own write

alpha_t = exp(g_t) is the forget gate, beta_t the write gate. This is eq. 3 of arXiv:2605.26099 with the delta-rule
correction of Gated DeltaNet (arXiv:2412.06464); our S is the transpose of theirs, so that rows are keys.

    delta_rule(q, k, v, g, beta, S) -> o, S    what the model calls
    impl="recurrent"                           the three lines above in a loop: the definition every test compares with
    impl="torch"                               the same thing a chunk of tokens at a time: matrix products only

How a chunk of C tokens becomes matrix products. Let gc = cumsum(g) inside the chunk and decay_ij = exp(gc_i - gc_j)
for i >= j, else 0. Unrolling the recurrence from the state S0 that enters the chunk,

    e_i + sum_{j<i} decay_ij (k_i . k_j) beta_j e_j = v_i - exp(gc_i) S0^T k_i

which is one unit lower triangular system for all errors at once, (I + G diag(beta)) E = R. Its inverse has entries
bounded by max(1, beta) as long as |k| <= 1 and beta is in [0, 2], so it is safe to form; L2-normalised keys are a
precondition. Keeping E (not the written values beta*E) as the unknown means that beta is never divided out.

Read next: model.py
"""

import torch
import torch.nn.functional as F

MAX_CHUNK = 64  # more tokens per chunk mean fewer sequential steps but C^2 work per token


def delta_rule(q, k, v, g, beta, S, impl="torch"):
    """Write T tokens into the fast weights S and read after every write.

    q, k:    (B, T, H, K), k (and usually q) L2-normalised by the caller; no scale is hidden here. q may be None when
             nothing will be read (a sleeping chunk's last write): then o is None.
    v:       (B, T, H, V)
    g, beta: (B, T, H) log forget gate (<= 0) and write gate, in promote_types(v.dtype, float32)
    S:       (B, H, K, V) fast weights, same dtype as g
    impl:    "torch" (chunked) or "recurrent" (the definition)
    returns  o (B, T, H, V) in v's dtype, and the new S. Differentiable in every input, S included.
    raises   ValueError if T < 1, if the shapes do not belong together, or for an unknown impl.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    B, T, H, K = k.shape
    if T < 1 or v.shape[:3] != (B, T, H) or g.shape != (B, T, H) or beta.shape != (B, T, H):
        raise ValueError(
            f"k {tuple(k.shape)}, v {tuple(v.shape)}, g {tuple(g.shape)}, beta {tuple(beta.shape)} disagree"
        )
    if S.shape != (B, H, K, v.shape[-1]) or (q is not None and q.shape != k.shape):
        raise ValueError(f"S {tuple(S.shape)} or q does not fit k {tuple(k.shape)} and v {tuple(v.shape)}")
    dtype = torch.promote_types(v.dtype, torch.float32)
    q = None if q is None else q.to(dtype)
    with torch.autocast(v.device.type, enabled=False):  # autocast would turn these products back into bfloat16
        o, S = IMPLEMENTATIONS[impl](q, k.to(dtype), v.to(dtype), g, beta, S)
    return (None if o is None else o.to(v.dtype)), S


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
    k, v, g, beta = (_split_chunks(a, n, C) for a in (k, v, g, beta))  # (B, H, n, C, ...)
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
        q = _split_chunks(q, n, C)
        attention = q @ k.mT * decay  # (B, H, n, C, C)
        q = q * gc.exp()[..., None]
    outputs = []
    for i in range(n):  # the only sequential part
        u = beta[:, :, i, :, None] * (error[:, :, i] - read_key[:, :, i] @ S)  # (B, H, C, V)
        if q is not None:
            outputs.append(q[:, :, i] @ S + attention[:, :, i] @ u)
        S = total[:, :, i] * S + write_key[:, :, i].mT @ u
    return (torch.cat(outputs, 2)[:, :, :T].transpose(1, 2) if outputs else None), S


def _split_chunks(a, n, C):
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


IMPLEMENTATIONS = {"torch": _chunked, "recurrent": _recurrent}
