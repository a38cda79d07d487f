"""Sleep: before a window's cache is evicted, the model runs N passes over it and writes it into its fast weights.

This file is Algorithm 1 of arXiv:2605.26099. The comments `line k` are its line numbers. A long input is cut into
windows of at most L tokens. A window without a scored token is slept over: N passes through the blocks, each fed with
the features of the one before, each writing the delta layers' fast weights S. Then features and cache are thrown away.
A window with scored tokens is answered in ONE ordinary pass that knows the past through S alone. `Sleeper`, at the end,
does the same with a stream of tokens, outside of training.

Read next: eval.py
"""

import hashlib
import math
import os
import pickle
import zipfile
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
    """Training: one forward is lines 1 to 11 for a batch, so that line 14 is loss.backward().

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
def answer(model, state, x, max_new, keep=0):
    """Greedy decoding inside one window: x (B, T >= 1) ids on top of a state -> the next max_new ids, (B, max_new).

    One pass per new token; the window's own cache grows, the past is known through S and what `keep` left.
    """
    new, past = [], 0
    for _ in range(max_new):
        h, state = model.blocks(model.embed(x, past), state, window=window_of(keep))
        past += x.shape[1]
        x = model.head(h[:, -1:]).argmax(-1)  # (B, 1)
        new.append(x)
    return torch.cat(new, 1)


def generate(model, context, question, max_new, N, L, loop=None, keep=0):
    """Sleep over `context` in windows of at most L tokens, then answer `question` greedily, one pass per new token.

    context (B, T), question (B, T_q), ids; returns the max_new answer ids, (B, max_new). The question's window is an
    ordinary one: its own cache, the past through S and what `keep` left. Raises ValueError if question and answer
    exceed L tokens.
    """
    sleeper = Sleeper(model, N, L, loop, keep, batch=len(context))
    sleeper.feed(context)
    sleeper.sleep()
    return sleeper.ask(question, max_new)


class Sleeper:
    """A trained model that reads a stream: it sleeps whenever its window is full, and answers at any time.

    feed() stores ids and only a sleep changes S, always over the whole open window: so what is remembered does not
    depend on the pieces in which a stream arrives. N, L, loop, keep: as in sleep(); batch: rows that advance together.
    A call that raises ValueError changes nothing.
    """

    def __init__(self, model, N, L, loop=None, keep=0, batch=1):
        passes(model.config.pattern, N, loop)
        if batch < 1 or L < 1:
            raise ValueError(f"a batch of {batch} and a window of {L} tokens: use at least 1")
        if model.config.n_pos and L > model.config.n_pos:
            raise ValueError(f"a window of {L} tokens, but the model was trained for {model.config.n_pos}")
        self.model, self.N, self.L, self.loop, self.keep = model, N, L, loop, keep
        self.state = model.initial_state()
        self.window = torch.empty(batch, 0, dtype=torch.int64, device=model.embedding.weight.device)

    def _check(self, tokens):
        """ids (B, T) on the model's device. Raises ValueError for another batch size or ids outside the vocabulary."""
        try:
            tokens = torch.as_tensor(tokens).to(self.window.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"these are no token ids: {error}") from None
        if tokens.dim() != 2 or len(tokens) != len(self.window) or tokens.dtype != torch.int64:
            raise ValueError(
                f"give int64 ids of shape ({len(self.window)}, T), not {tokens.dtype} {tuple(tokens.shape)}"
            )
        vocab_size = self.model.config.vocab_size
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)].unique().tolist()
        if wrong:
            raise ValueError(f"tokens {wrong[:5]} are not in the vocabulary of {vocab_size}")
        return tokens

    def feed(self, tokens):
        """Read ids (B, T), any number of them; sleep every time there are L in the window."""
        tokens = self._check(tokens)
        while tokens.shape[1]:
            room = self.L - self.window.shape[1]
            self.window = torch.cat((self.window, tokens[:, :room]), 1)
            tokens = tokens[:, room:]
            if self.window.shape[1] == self.L:
                self.sleep()

    @torch.no_grad()
    def sleep(self):
        """N passes over the open window, however full it is, then evict it. An empty one is left alone."""
        if self.window.shape[1]:
            h = self.model.embed(self.window)
            self.state, _ = sleep(self.model, h, self.state, self.N, self.loop, keep=self.keep)
            self.window = self.window[:, :0]

    def ask(self, tokens, max_new, remember=False):
        """Greedy answer to a question (B, T >= 1): ids (B, max_new), read on top of the open window in one pass each.

        Nothing of it stays, unless `remember` feeds question and answer into the stream. Raises ValueError if open
        window, question and answer do not fit into L tokens: sleep() makes room.
        """
        tokens = self._check(tokens)
        x = torch.cat((self.window, tokens), 1)
        if not tokens.shape[1] or max_new < 1:
            raise ValueError("an empty question, or no token to answer it with")
        if x.shape[1] + max_new - 1 > self.L:
            parts = f"{self.window.shape[1]} tokens in the window, {tokens.shape[1]} of question, {max_new} of answer"
            raise ValueError(f"{parts} do not fit into L = {self.L}: call sleep() first, or ask less")
        found = answer(self.model, self.state, x, max_new, self.keep)
        if remember:
            self.feed(torch.cat((tokens, found), 1))
        return found

    def state_bytes(self):
        """What the memory takes: fast weights, kept cache and convolution inputs, and the ids of the open window."""
        return sum(a.numel() * a.element_size() for a in (*state_tensors(self.state), self.window))

    def save(self, path):
        """Write memory and settings as plain tensors and numbers, under a temporary name first."""
        settings = {"N": self.N, "L": self.L, "loop": self.loop, "keep": self.keep}
        memory = {"format": 1, "model": fingerprint(self.model), "settings": settings, "window": self.window}
        torch.save(memory | {"state": [tuple(layer) for layer in self.state]}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)

    @classmethod
    def load(cls, path, model):
        """The Sleeper that was saved there. Raises ValueError if the file is damaged or the model is another one."""
        saved = read_plain(path, model.embedding.weight.device)
        if not isinstance(saved, dict) or saved.get("format") != 1 or "window" not in saved:
            raise ValueError(f"{path} is no memory of a Sleeper: give a file that Sleeper.save wrote")
        if saved.get("model") != fingerprint(model):
            raise ValueError(f"{path} is the memory of a model with other weights: load it with the model that made it")
        try:
            sleeper = cls(model, **saved["settings"], batch=len(saved["window"]))
            sleeper.window, sleeper.state = saved["window"], [LayerState(*layer) for layer in saved["state"]]
            whole = len(sleeper.state) == len(model.layers) and sleeper.window.shape[1] < sleeper.L
        except (KeyError, TypeError, AttributeError, IndexError):
            whole = False
        if not whole:
            raise ValueError(f"{path} is incomplete or damaged: make the memory anew")
        return sleeper


def state_tensors(state):
    """All tensors of a state, in order."""
    for layer in state:
        yield from (a for a in (layer.S, *(layer.conv or ()), layer.k, layer.v) if a is not None)


def fingerprint(model):
    """A hash of all weights and their names: a memory means nothing to another model."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + str(tuple(weight.shape)).encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_plain(path, device):
    """What torch.save wrote at path, on the device; code in it is never run. Raises ValueError with one clear line."""
    if not os.path.isfile(path):
        raise ValueError(f"no file at {path}")
    damage = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError)
    try:
        if not zipfile.is_zipfile(path):  # torch.save writes zip files; anything else would be a bare pickle
            raise zipfile.BadZipFile
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it holds more than tensors and numbers, so it is not ours") from None
    except damage:
        raise ValueError(f"{path} cannot be read: it is truncated or damaged; copy it again or make it anew") from None
