"""Sleep: before a window's cache is evicted, the model runs N passes over it and writes it into its fast weights.

This file is Algorithm 1 of arXiv:2605.26099. The comments `line k` are its line numbers. A long input is cut into
windows of at most L tokens. A window without a scored token is slept over: N passes through the blocks, each fed with
the features of the one before, each writing the delta layers' fast weights S. Then features and cache are thrown away.
A window with scored tokens is answered in ONE ordinary pass that knows the past through S alone.

Read next: eval.py
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import LayerState


class Chunk(NamedTuple):
    """Tokens start..stop-1 of the sequence; predicts: some of them are scored (else: sleep over them)."""

    start: int
    stop: int
    predicts: bool


def split_chunks(m, L):
    """Lines 2, 3 and 5: cut a loss mask m (B, T), bool, into chunks of at most L tokens.

    Returns a list of Chunk, up to the last that is scored: what follows nobody asks about. It depends on the mask
    alone, so it is made where m is, on the host. Raises ValueError if L < 1, if nothing is scored, or if the rows
    disagree on whether a chunk is scored: the whole batch sleeps or answers.
    """
    if L < 1:
        raise ValueError(f"the window L must be at least 1 token, got {L}")
    chunks = []
    for start in range(0, m.shape[1], L):
        stop = min(start + L, m.shape[1])
        scored = m[:, start:stop].any(1)  # (B,)
        if scored.any() != scored.all():
            raise ValueError(f"rows disagree on tokens {start}..{stop - 1}: some are scored there, some are not")
        chunks.append(Chunk(start, stop, bool(scored.any())))
    while chunks and not chunks[-1].predicts:
        chunks.pop()
    if not chunks:
        raise ValueError("the loss mask scores no token: there is nothing to learn or to answer")
    return chunks


EVICTIONS = ("hard", "sliding", "all")


def kept_tokens(eviction, L):
    """How many tokens of attention cache survive an eviction: none (the paper's main setting), L - 1, or all."""
    return {"hard": 0, "sliding": L - 1, "all": math.inf}[eviction]


def evict(state, keep=0):
    """The fast weights S stay, caches and convolution histories go, but for the last `keep` tokens of the cache.

    keep = 0 is hard eviction. With more, the convolution's history stays too: the sequence goes on. Gradients flow
    through all that stays.
    """
    if not keep:
        return [LayerState(S=layer.S) for layer in state]
    cut = slice(None if math.isinf(keep) else -keep, None)
    return [layer if layer.k is None else layer._replace(k=layer.k[:, cut], v=layer.v[:, cut]) for layer in state]


def window_of(keep):
    """The tokens attention sees, itself included, or None for all: a sliding window slides, a hard one just ends."""
    return keep + 1 if 0 < keep < math.inf else None


def passes(pattern, N, loop=None, keep=0):
    """The block indices of each of N passes over a sleeping chunk.

    loop: (first, last+1) of the looped blocks, all by default: the first pass enters through the blocks before them
    (prelude), the last one leaves through those behind (coda). keep: as in evict(). Raises ValueError if N < 1, if the
    range does not fit the pattern, or if N > 1 and no delta block is looped.
    """
    first, last = loop or (0, len(pattern))
    if N < 1:
        raise ValueError(f"N must be at least 1 pass, got {N}")
    if not 0 <= first < last <= len(pattern):
        raise ValueError(f"the looped blocks {first}:{last} are not a range of the {len(pattern)} blocks {pattern}")
    if "D" not in pattern or (N > 1 and "D" not in pattern[first:last]):
        raise ValueError(f"no delta block (D) to sleep with among the looped blocks {first}:{last} of {pattern}")
    order = [list(range(first, last)) for _ in range(N)]
    order[0] = list(range(first)) + order[0]
    order[-1] = order[-1] + list(range(last, len(pattern)))
    # not in the paper: what would come after the last write to a fast weight is dead, because nobody sees its features
    while not keep and pattern[order[-1][-1]] != "D":
        order[-1].pop()
    return order


def sleep(model, h, state, N, loop=None, use_checkpoint=False, keep=0):
    """Lines 6 and 7: N passes over one chunk; returns the state with S rewritten and the rest evicted as `keep` says.

    h (B, T, d_model): the embedded chunk; state: what the last eviction left. use_checkpoint: keep only h and S of each
    pass for the backward, recompute the rest; memory then grows with N by one h and one S per pass. Also returns the
    features that entered the last pass.
    """
    old, state = evict(state, keep), list(state)
    for n, layers in enumerate(passes(model.config.pattern, N, loop, keep), 1):
        fed_back = h
        # only h and S go from pass to pass: each starts from the cache and the convolution history of the chunk before,
        # which under hard eviction are empty
        # not in the paper: that the convolution's history is not kept between passes
        start = [layer._replace(S=latest.S) for layer, latest in zip(old, state)]
        # under hard eviction the last pass ends with its last write to S
        args = h, start, layers, n == N and not keep, window_of(keep)
        if use_checkpoint and torch.is_grad_enabled():
            # nothing here draws random numbers, and to keep their state would break the recording of a CUDA graph
            h, new = checkpoint(model.blocks, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            h, new = model.blocks(*args)
        for i in layers:
            state[i] = new[i]
    return evict(state, keep), fed_back


class Algorithm1(nn.Module):
    """Training with hard eviction: one forward is lines 1 to 11 for a batch, so that line 14 is loss.backward().

    N: sleep passes per chunk (1 is the ordinary hybrid); loop, use_checkpoint and keep as in sleep().
    """

    def __init__(self, model, N, loop=None, use_checkpoint=False, keep=0):
        super().__init__()
        passes(model.config.pattern, N, loop)  # refuse a bad N or loop now, not in the first step
        self.model, self.N, self.loop, self.use_checkpoint, self.keep = model, N, loop, use_checkpoint, keep

    def logits(self, x, chunks):
        """x (B, T) ids, chunks from split_chunks -> logits of the prediction chunks only, (B, T_pred, vocab_size).

        Also returns two detached scalars: the RMS of the last features fed into a sleeping pass, and of the final S.
        """
        state = self.model.initial_state()  # line 1
        h, logits = None, []
        for start, stop, predicts in chunks:  # line 3
            e = self.model.embed(x[:, start:stop])  # line 4
            if predicts:
                # line 10: one pass, still writing S; the cache is what the last eviction left
                y, state = self.model.blocks(e, evict(state, self.keep), window=window_of(self.keep))
                logits.append(self.model.head(y))
            else:
                args = self.N, self.loop, self.use_checkpoint, self.keep
                state, h = sleep(self.model, e, state, *args)  # lines 6, 7
        with torch.no_grad():
            S = torch.cat([layer.S.flatten() for layer in state if layer.S is not None])
            stats = {"h_rms": rms(e if h is None else h), "S_rms": rms(S)}
        return torch.cat(logits, 1), stats

    def forward(self, x, y, m, chunks):
        """x, y (B, T) ids and next ids, m (B, T) bool -> summed loss, predictions (B, T_pred), stats (see logits).

        The loss is the SUM of the cross-entropy over scored tokens (line 11): the caller divides by their global count,
        over micro-batches and ranks.
        """
        logits, stats = self.logits(x, chunks)
        target = scored_part(y.masked_fill(~m, -100), chunks)  # (B, T_pred)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
        return loss, logits.detach().argmax(-1), stats


def rms(x):
    """Root mean square of all elements, a float32 scalar."""
    return x.detach().float().square().mean().sqrt()


def scored_part(a, chunks):
    """The columns of a (B, T) that lie in prediction chunks, (B, T_pred)."""
    return torch.cat([a[:, c.start : c.stop] for c in chunks if c.predicts], 1)


@torch.no_grad()
def generate(model, context, question, max_new, N, L, loop=None, keep=0):
    """Sleep over `context` in windows of at most L tokens, then answer `question` greedily, one pass per new token.

    context (B, T), question (B, T_q), ids; returns the max_new answer ids, (B, max_new). The question's window is an
    ordinary one: its own cache, the past through S and what `keep` left. Raises ValueError if question and answer
    exceed L tokens.
    """
    if question.shape[1] < 1 or max_new < 1 or question.shape[1] + max_new - 1 > L:
        raise ValueError(f"a question of {question.shape[1]} and an answer of {max_new} tokens must fit in L = {L}")
    state = model.initial_state()
    for start in range(0, context.shape[1], L):
        state, _ = sleep(model, model.embed(context[:, start : start + L]), state, N, loop, keep=keep)
    answer, x, past = [], question, 0
    for _ in range(max_new):
        # the cache stays: this is inside one chunk
        h, state = model.blocks(model.embed(x, past), state, window=window_of(keep))
        past += x.shape[1]
        x = model.head(h[:, -1:]).argmax(-1)  # (B, 1)
        answer.append(x)
    return torch.cat(answer, 1)
