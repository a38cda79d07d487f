"""Sleep: before a window's cache is evicted, the model runs N passes over it and writes it into its fast weights.

This file is Algorithm 1 of arXiv:2605.26099. The comments `line k` are its line numbers. A long input is cut into
windows of at most L tokens. A window without a scored token is slept over: N passes through the blocks, each fed with
the features of the one before, each writing the delta layers' fast weights S. Then features and cache are thrown away.
A window with scored tokens is answered in ONE ordinary pass, which knows the past through S (and what of the cache was
not evicted) and writes S, too:

    1   S <- 0
    2   split tokens x and loss mask m into chunks of at most L
    3   for each chunk c with its mask m_c:
    4       h <- Embed(c)
    5       if m_c is all zero:                     asleep
    6           for n = 1..N:
    7               h, S <- Blocks(h, S)
    9       else:                                   awake
    10          h, S <- Blocks(h, S)
    11          loss <- MaskedCE(OutProj(h), c, m_c)
    14  backpropagate the loss through everything

`Sleeper`, at the end, sleeps in the same way over a stream of tokens, outside of training; there a question leaves no
trace in S, unlike line 10's (not in the paper).

Read next: eval.py
"""

import contextlib
import hashlib
import math
import os
import pickle
import zipfile
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model import FAST_MIXERS, LayerState


class Chunk(NamedTuple):
    """One window: tokens start..stop-1 of the sequence, L of them or, at the end, fewer.

    n_logits: on how many positions of each row the output head runs. 0: none is scored, the model sleeps over the
    chunk. Otherwise the scored ones of the row that has most, rounded up to a power of two, at least 8 (few shapes, so
    few compilations), if that is a quarter of the chunk or less; else all of it. With the vocabulary of a public
    checkpoint the head costs more than a block.
    """

    start: int
    stop: int
    n_logits: int


def split_chunks(m, L):
    """Lines 2, 3 and 5: cut a loss mask m (B, T), bool, into chunks of at most L tokens.

    Returns a list of Chunk, up to the last that is scored: what follows nobody asks about. It depends on the mask
    alone, so it is made where m is, on the host. Raises ValueError if L < 1, if nothing is scored, or if one row is
    scored in a chunk and another only later: the whole batch sleeps or answers.
    """
    if L < 1:
        raise ValueError(f"the window L must be at least 1 token, got {L}")
    chunks = []
    for start in range(0, m.shape[1], L):
        stop = min(start + L, m.shape[1])
        scored = m[:, start:stop].sum(1)  # (B,)
        if scored.any() and ((scored == 0) & m[:, stop:].any(1)).any():  # a row that is finished only holds padding
            raise ValueError(f"rows disagree on tokens {start}..{stop - 1}: some are scored there, others only later")
        few = max(8, 1 << (int(scored.max()) - 1).bit_length()) if scored.any() else 0
        chunks.append(Chunk(start, stop, few if 4 * few <= stop - start else stop - start))
    while chunks and not chunks[-1].n_logits:
        chunks.pop()
    if not chunks:
        raise ValueError("the loss mask scores no token: there is nothing to learn or to answer")
    return chunks


@dataclass(frozen=True)
class SleepConfig:
    """How a model sleeps: in training, in evaluation and on a stream. Raises ValueError for numbers without sense.

    In this file `config` is one of these; the model's own is `model.config`.
    """

    N: int = 1  # passes over a window; 1 is the ordinary hybrid
    loop: tuple | None = None  # (first, last+1) of the blocks that are looped, all by default
    keep: int | float = 0  # tokens of attention cache that survive an eviction, see kept_tokens
    causal: bool = True  # not in the paper: False lets attention see the whole window while asleep
    tol: float = 0.0  # not in the paper: wake after the first pass that changes S by at most this fraction; 0: never
    alternate: bool = False  # not in the paper: every second pass reads the window backwards
    pass_clip: float = 0.0  # not in the paper: no pass gets more than this many times the last one's gradient; 0: any

    def __post_init__(self):
        if not 1 <= self.N <= 1000:
            raise ValueError(f"N must be 1 to 1000 passes, got {self.N}")
        if self.keep != math.inf and not (isinstance(self.keep, int) and self.keep >= 0):
            raise ValueError(f"keep is a number of tokens, 0 or more, or infinity, got {self.keep}")
        if not 0 <= self.tol < math.inf:
            raise ValueError(f"tol is a fraction of the size of S, 0 or more, got {self.tol}")
        if self.pass_clip and not 1 <= self.pass_clip < math.inf:
            raise ValueError(f"pass_clip is a multiple of the last pass's gradient, 1 or more, got {self.pass_clip}")
        if self.alternate and self.keep:
            raise ValueError("a pass backwards leaves no cache to go on from: use hard eviction, or do not alternate")
        if self.tol and self.loop:
            raise ValueError("with tol any pass may be the last, so all blocks must be looped (no loop): leave tol out")


EVICTIONS = ("hard", "sliding", "all")


def kept_tokens(eviction, L):
    """How many tokens of attention cache survive an eviction: none (the paper's main setting), L - 1, or all."""
    return {"hard": 0, "sliding": L - 1, "all": math.inf}[eviction]


def evict(state, config):
    """S stays. With config.keep = 0 (hard eviction) nothing else does.

    Otherwise the last `keep` tokens of each cache stay (infinity: all), and the convolutions' histories, because the
    sequence goes on. Gradients flow through all that stays.
    """
    if not config.keep:
        return [LayerState(S=layer.S) for layer in state]
    if math.isinf(config.keep):
        return state

    def last(a, n=0):  # 0: all. A copy, because a view would hold all of it in memory, and Sleeper.save would write it
        return a if a is None else a[:, -n:].clone()

    n = config.keep
    return [LayerState(a.S, a.conv and tuple(map(last, a.conv)), last(a.k, n), last(a.v, n)) for a in state]


def attention_span(config):
    """How many tokens attention sees, itself included: keep + 1, or all of a window whose cache ends with it."""
    return config.keep + 1 if config.keep else math.inf


def blocks_of_passes(pattern, config):
    """The block indices of each of N passes over a sleeping chunk, a list of lists.

    The first pass enters through the blocks before the looped ones (prelude), the last one leaves through those behind
    (coda). Raises ValueError if the range does not fit the pattern, if there is no delta block, or if N > 1 and none
    is looped.
    """
    first, last = config.loop or (0, len(pattern))
    if not 0 <= first < last <= len(pattern):
        raise ValueError(f"the looped blocks {first}:{last} are not a range of the {len(pattern)} blocks {pattern}")
    writes = [kind in FAST_MIXERS for kind in pattern]
    if not any(writes) or (config.N > 1 and not any(writes[first:last])):
        raise ValueError(f"no delta block (D) to sleep with among the looped blocks {first}:{last} of {pattern}")
    order = [list(range(first, last)) for _ in range(config.N)]
    order[0] = list(range(first)) + order[0]
    order[-1] = order[-1] + list(range(last, len(pattern)))
    # not in the paper: what would come after the last write to a fast weight is dead, because nobody sees its features
    while not config.keep and not writes[order[-1][-1]]:
        order[-1].pop()
    return order


def sleep_passes(model, h, state, config, use_checkpoint=False):
    """Lines 6 and 7: the N passes over one chunk, one by one; yields (what is fed in, state after the pass).

    h (B, T, d_model): the embedded chunk, and like it what is fed in: in the order of the text, also where a pass reads
    it backwards. state: what the last eviction left. use_checkpoint: keep only h and S of each pass for the backward,
    recompute the rest; memory then grows with N by one h and one S per pass.
    """
    old = state
    limits = [[] for _ in range(len(state) + 1)]  # for each block's S, and for the features

    def one_pass(n, h, *args):  # checkpointed as a whole: h is kept, what feed_back makes of it is not
        fed_in = model.feed_back(h) if n > 1 else h
        backwards = config.alternate and n % 2 == 0  # not in the paper: then each token sees the later ones
        h, new = model.blocks(fed_in.flip(1) if backwards else fed_in, *args)
        return fed_in, h.flip(1) if backwards and h is not None else h, new

    for n, layers in enumerate(blocks_of_passes(model.config.pattern, config), 1):
        # only h and S go from pass to pass: each starts from the cache and the convolution history of the chunk before,
        # which under hard eviction are empty
        # not in the paper: that the convolution's history is not kept between passes
        start = [layer._replace(S=latest.S) for layer, latest in zip(old, state)]
        write_only = n == config.N and not config.keep  # under hard eviction the last pass ends with its last write
        args = n, h, start, layers, write_only, attention_span(config), config.causal
        if use_checkpoint and torch.is_grad_enabled():
            # nothing here draws random numbers, and to keep their state would break the recording of a CUDA graph
            fed_in, h, new = checkpoint(one_pass, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            fed_in, h, new = one_pass(*args)
        if config.pass_clip and torch.is_grad_enabled():
            for i, x in [*((i, new[i].S) for i in layers), (-1, h)]:
                if x is not None and x.requires_grad:
                    limit_gradient(x, limits[i], config.pass_clip)
        # a block that this pass left out keeps the cache of the pass that ran it
        state = [new[i] if i in layers else layer for i, layer in enumerate(state)]
        yield fed_in, state


def sleep(model, h, state, config, use_checkpoint=False, on_pass=None):
    """Lines 6 and 7, then the eviction, which the algorithm does not number. Arguments as in sleep_passes.

    on_pass: called after every pass with its number and relative_change, also of rows that have settled. Returns the
    new state, the features that entered the last pass, and how many passes each row slept, (B,) int64.
    """
    each_pass = sleep_passes(model, h, state, config, use_checkpoint)
    if on_pass:
        each_pass = watched(each_pass, state, on_pass)
    if config.tol:
        fed_in, state, slept = until_settled(each_pass, state, config.tol)
    else:
        for fed_in, state in each_pass:
            pass
        slept = torch.full((len(h),), config.N, device=h.device)
    return evict(state, config), fed_in, slept


class Algorithm1(nn.Module):
    """Training: one forward is lines 1 to 11 for a batch, so that line 14 is loss.backward().

    config: a SleepConfig; use_checkpoint as in sleep_passes. answer_passes: not in the paper, a baseline: loop over
    prediction windows too, feeding features back, each pass with the S that the window began with.
    """

    def __init__(self, model, config, use_checkpoint=False, answer_passes=1):
        super().__init__()
        blocks_of_passes(model.config.pattern, config)  # refuse a bad loop now, not in the first step
        self.model, self.config, self.use_checkpoint, self.answer_passes = model, config, use_checkpoint, answer_passes

    def logits(self, x, m, chunks):
        """x (B, T) ids, m (B, T) bool, chunks from split_chunks(m, L) -> logits and where they stand.

        logits (B, T_pred, vocab_size) of prediction chunks only, and their positions in the sequence, (B, T_pred):
        all that are scored are among them. Also, detached: the RMS of the last features fed into a sleeping pass (of
        those before the head where nothing slept), and of the final S, both scalars, and the mean number of passes of
        each row's sleeps, (B,).
        """
        state = self.model.initial_state()  # line 1
        fed_in, logits, positions, slept = None, [], [], []
        for start, stop, n_logits in chunks:  # line 3
            h = self.model.embed(x[:, start:stop])  # line 4
            if not n_logits:  # lines 6, 7
                state, fed_in, passes_taken = sleep(self.model, h, state, self.config, self.use_checkpoint)
                slept.append(passes_taken)
                continue
            # line 10: one pass, still writing S; the cache is what the last eviction left
            for n in range(self.answer_passes):
                h = self.model.feed_back(h) if n else h
                h, new = self.model.blocks(h, state, span=attention_span(self.config))
            state = evict(new, self.config)
            where = torch.arange(stop - start, device=x.device).expand(len(x), -1)
            if n_logits < stop - start:
                where = m[:, start:stop].int().topk(n_logits, 1).indices
                h = h.gather(1, where[..., None].expand(-1, -1, h.shape[-1]))
            logits.append(self.model.head(h))
            positions.append(start + where)
        with torch.no_grad():
            S = torch.cat([layer.S.flatten() for layer in state if layer.S is not None])
            stats = {"h_rms": rms(h if fed_in is None else fed_in), "S_rms": rms(S)}
            stats["passes"] = torch.stack(slept or [x.new_zeros(len(x))]).float().mean(0)
        return torch.cat(logits, 1), torch.cat(positions, 1), stats

    def forward(self, x, y, m, chunks):
        """x, y (B, T) ids and next ids, m (B, T) bool -> summed loss, right predictions, stats (scalars all).

        The loss is the SUM of the cross-entropy over scored tokens (line 11): the caller divides by their global count,
        over micro-batches and ranks.
        """
        logits, positions, stats = self.logits(x, m, chunks)
        target = y.masked_fill(~m, -100).gather(1, positions)  # (B, T_pred)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
        right = (logits.detach().argmax(-1) == target).sum()
        return loss, right, stats | {"passes": stats["passes"].mean()}


def rms(x):
    """Root mean square of all elements, a float32 scalar."""
    return x.float().square().mean().sqrt()


# -----------------------------------------------------------------------------
# not in the paper: limit the gradient of each pass, watch a sleep pass by pass, wake when S has settled


def limit_gradient(x, limit, times):
    """not in the paper: in the backward, scale each row's gradient of x (B, ...) down to `times` that of the last pass.

    limit: a list, empty at first, for the same tensor of all passes over a window. The backward meets the last pass
    with a gradient first (for the features under hard eviction the last but one: nothing reads the last one's), whose
    norm is the measure of all. Through many passes it can grow a thousandfold otherwise.
    """

    def scale(grad):
        if grad is None:  # a compiled block asks also for an output that nobody read
            return None
        norm = grad.flatten(1).norm(dim=1)  # (B,)
        # with tol, a row that settled early has no gradient from the passes after: its measure is the first that it has
        limit[:] = [torch.where(limit[0] > 0, limit[0], times * norm) if limit else times * norm]
        factor = (limit[0] / norm.clamp_min(1e-30)).clamp(max=1)
        return grad * factor.view(-1, *(1,) * (grad.dim() - 1))

    x.register_hook(scale)


def watched(each_pass, state, on_pass):
    """The same passes; after each, on_pass(its number, relative_change) is called. state: before the first."""
    for n, (fed_in, new) in enumerate(each_pass, 1):
        on_pass(n, relative_change(state, new))
        state = new
        yield fed_in, new


def until_settled(each_pass, state, tol):
    """not in the paper: each row keeps the state of its first pass that changes its S by no more than a fraction tol.

    each_pass: from sleep_passes, asked for no more once all rows have settled; state: before the first. Returns the
    features that entered the last pass, the state, nothing evicted, and how many passes each row slept, (B,) int64.
    """
    settled = None
    for fed_in, new in each_pass:
        change = relative_change(state, new)  # (B,)
        if settled is None:
            settled, slept = torch.zeros_like(change, dtype=torch.bool), torch.zeros_like(change, dtype=torch.int64)
        else:
            new = [merge_rows(settled, mine, theirs) for mine, theirs in zip(state, new)]
        slept, settled, state = slept + ~settled, settled | (change <= tol), new
        if settled.all():
            break
    return fed_in, state, slept


def relative_change(old, new):
    """How much a pass changed the fast weights: |S_new - S_old| / |S_new| over all delta layers, per row, (B,).

    It is relative to all that S holds, so the fuller a memory, the smaller the change that a window makes.
    """
    both = [(0 if a.S is None else a.S, b.S) for a, b in zip(old, new) if b.S is not None]
    moved = sum((b - a).square().sum((1, 2, 3)) for a, b in both)  # (B,)
    return (moved / sum(b.square().sum((1, 2, 3)) for _, b in both).clamp_min(1e-30)).sqrt()


def merge_rows(take, a, b):
    """A LayerState with the rows of a where take (B,) is true, and those of b elsewhere."""

    def pick(x, y):
        return y if x is None else torch.where(take.view(-1, *(1,) * (y.dim() - 1)), x, y)

    conv = b.conv and tuple(pick(x, y) for x, y in zip(a.conv, b.conv))
    return LayerState(S=pick(a.S, b.S), conv=conv, k=pick(a.k, b.k), v=pick(a.v, b.v))


# -----------------------------------------------------------------------------
# answering, and a stream


@torch.no_grad()
def answer(model, x, state, max_new, config):
    """Greedy decoding inside one window: x (B, T >= 1) ids on top of a state -> the next max_new ids, (B, max_new).

    One pass per new token; the window's own cache grows, the past is known through S and what the last eviction left.
    """
    new, past = [], 0
    for _ in range(max_new):
        h, state = model.blocks(model.embed(x, past), state, span=attention_span(config))
        past += x.shape[1]
        x = model.head(h[:, -1:]).argmax(-1)  # (B, 1)
        new.append(x)
    return torch.cat(new, 1)


class Sleeper:
    """A trained model that reads a stream: it sleeps whenever its window is full, and answers at any time.

    feed() stores ids and only a sleep changes S, always over the whole open window: so what is remembered does not
    depend on the pieces in which a stream arrives. config: a SleepConfig; L: the window in tokens; batch: rows that
    advance together; on_pass as in sleep(). A call that raises ValueError changes nothing. Answers take one pass, also
    of a model that was trained with more of them (Algorithm1's answer_passes).
    """

    def __init__(self, model, config, L, batch=1, on_pass=None):
        blocks_of_passes(model.config.pattern, config)
        if batch < 1 or L < 1:
            raise ValueError(f"a batch of {batch} and a window of {L} tokens: use at least 1")
        if model.config.n_pos and L > model.config.n_pos:
            raise ValueError(f"a window of {L} tokens, but the model was trained for {model.config.n_pos}")
        self.model, self.config, self.L, self.on_pass = model, config, L, on_pass
        self.state = model.initial_state()
        self.window = torch.empty(batch, 0, dtype=torch.int64, device=model.embedding.weight.device)

    def _check(self, tokens):
        """ids (B, T) on the model's device. Raises ValueError for another batch size or ids outside the vocabulary."""
        tokens = torch.as_tensor(tokens, device=self.window.device)
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
        """Read ids (B, T), any number of them; sleep every time there are L in the window.

        Returns for each of these sleeps the passes that each row took, a list of (B,) int64.
        """
        tokens, slept = self._check(tokens), []
        while tokens.shape[1]:
            room = self.L - self.window.shape[1]
            self.window = torch.cat((self.window, tokens[:, :room]), 1)
            tokens = tokens[:, room:]
            if self.window.shape[1] == self.L:
                slept.append(self.sleep())
        return slept

    @torch.no_grad()
    def sleep(self):
        """Sleep over the open window, however full it is, then evict it; an empty one is left alone.

        Returns how many passes each row took, (B,) int64.
        """
        if not self.window.shape[1]:
            return torch.zeros(len(self.window), dtype=torch.int64, device=self.window.device)
        h = self.model.embed(self.window)
        self.state, _, slept = sleep(self.model, h, self.state, self.config, on_pass=self.on_pass)
        self.window = self.window[:, :0].clone()  # a view would keep the ids
        return slept

    def ask(self, tokens, max_new):
        """Greedy answer to a question (B, T >= 1): ids (B, max_new), read on top of the open window in one pass each.

        Nothing of it stays: feed() question and answer to remember them. Raises ValueError if open window, question
        and answer do not fit into L tokens: sleep() makes room.
        """
        tokens = self._check(tokens)
        x = torch.cat((self.window, tokens), 1)
        if not tokens.shape[1] or max_new < 1:
            raise ValueError("an empty question, or no token to answer it with")
        if x.shape[1] + max_new - 1 > self.L:
            parts = f"{self.window.shape[1]} tokens in the window, {tokens.shape[1]} of question, {max_new} of answer"
            raise ValueError(f"{parts} do not fit into L = {self.L}: call sleep() first, or ask less")
        return answer(self.model, x, self.state, max_new, self.config)

    def save(self, path):
        """Write memory and settings as plain tensors and numbers, under a temporary name first.

        Raises OSError, or torch's RuntimeError, where that is not possible.
        """
        memory = {"format": 2, "model": fingerprint(self.model), "config": asdict(self.config), "L": self.L}
        memory |= {"window": self.window, "state": [tuple(layer) for layer in self.state]}
        try:
            torch.save(memory, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(f"{path}.tmp")

    @classmethod
    def load(cls, path, model):
        """The Sleeper that was saved there. Raises ValueError if the file is damaged or the model is another one."""
        saved = read_plain(path, model.embedding.weight.device)
        if not isinstance(saved, dict) or saved.get("format") != 2 or "window" not in saved:
            raise ValueError(f"{path} is no memory of a Sleeper: give a file that Sleeper.save wrote")
        if saved.get("model") != fingerprint(model):
            raise ValueError(f"{path} is the memory of a model with other weights: load it with the model that made it")
        try:
            sleeper = cls(model, SleepConfig(**saved["config"]), saved["L"], batch=len(saved["window"]))
            sleeper.window, sleeper.state = saved["window"], [LayerState(*layer) for layer in saved["state"]]
            sleeper._check(saved["window"])
            # a full window was saved when its sleep was interrupted
            if len(sleeper.state) != len(model.layers) or sleeper.window.shape[1] > sleeper.L:
                raise ValueError
        except (KeyError, TypeError, AttributeError, IndexError, ValueError):
            raise ValueError(f"{path} is incomplete or damaged: make the memory anew") from None
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
        with zipfile.ZipFile(path) as file:  # what torch.save writes; anything else would be a bare pickle
            if file.testzip():  # the checksums, which torch does not look at
                raise zipfile.BadZipFile
        return torch.load(path, map_location=device, weights_only=True)
    except torch.OutOfMemoryError:  # a RuntimeError, but no damage
        raise
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is refused: it holds more than tensors and numbers, so it is not ours") from None
    except damage:
        raise ValueError(f"{path} cannot be read: it is truncated or damaged; copy it again or make it anew") from None
