"""
What the model is asked: two synthetic memory tasks, generated on the fly with numpy.

Each task hides what matters in a long context that is evicted window by window, then asks about it. A task object has
a vocabulary size, a `context` length (what must be remembered), a sequence length `T`, and
    batch(seed, split, s, B) -> x, y, m     tokens, next tokens, and which positions are scored; with `level`, easier
    score(x, y, m, pred)                    what was answered right, one array per difficulty
    losses(x, y, m, ce)                     the mean cross-entropy of the answers to the same questions
    chance(x, y, m)                         what guessing scores on the same labels
    decode(ids), problem_hashes(x)          text for people, and proof that the splits share no problem
Batch s of a split is a pure function of (seed, split, s, B): nothing is stored, and resuming a run cannot drift.

To see three examples that can be checked by hand:
    $ python data.py --task rule110
    $ python data.py --task depo --nodes 8 --hops 4

Based on section 3 of "Do Language Models Need Sleep?" (arXiv:2605.26099). Depo follows the public layout Depo-1 of
"Physics of Language Models: Part 4.1". Where the paper is silent, a comment starts with "not in the paper".

Read next: kernels.py
"""

import argparse
import math
import os
import subprocess

import numpy as np
import torch

# -----------------------------------------------------------------------------
# three splits that share no problem

SPLITS = ("train", "val", "test")


def splitmix64(z):
    """The output function of the SplitMix64 generator, a fast hash. z: uint64 array of any shape -> the same shape."""
    z = z + np.uint64(0x9E3779B97F4A7C15)  # array arithmetic wraps modulo 2^64, which is what we want
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def in_split(hashes, split):
    """Which problems belong to a split. hashes: uint64 array -> bool array of the same shape."""
    # not in the paper: held-out problems are chosen by a hash of the problem, 1/16 for test and 1/16 for validation
    r = hashes % np.uint64(16)
    return {"train": r > 1, "val": r == 1, "test": r == 0}[split]


def batch_rng(seed, split, s):
    """The random generator of batch number s of a split, independent of every other batch's."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    return np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), s]))


def sample_problems(draw, split, need):
    """
    Draw problems in blocks and keep those of one split until there are `need` of them.
    draw(rows) -> (hashes, arrays): uint64 (rows,), and arrays with `rows` rows. Returns the arrays with `need` rows.
    """
    share = {"train": 14, "val": 1, "test": 1}[split] / 16
    rows = min(int(1.1 * need / share) + 64, 8192)  # mostly one block in training; the cap bounds memory
    blocks, got = [], 0
    while got < need:
        hashes, arrays = draw(rows)
        keep = in_split(hashes, split)
        blocks.append([a[keep] for a in arrays])
        got += int(keep.sum())
        if got == 0 and len(blocks) == 64:
            raise ValueError(f"the {split} split has no problem at this size: use longer strings or more nodes")
    return [np.concatenate(a)[:need] for a in zip(*blocks)]


def as_tensors(*arrays):
    """numpy arrays -> torch CPU tensors of the same shapes and dtypes."""
    return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)


def as_arrays(*tensors):
    """torch tensors -> numpy arrays of the same shapes and dtypes."""
    return tuple(t.cpu().numpy() for t in tensors)


def bracket(task, x, y, m):
    """The tokens after the context of one example, x, y, m (T,), as words; the scored ones stand in [brackets]."""
    words = [task.decode(x[task.context : task.context + 1])]  # never scored: it is given
    for token, scored in zip(y[task.context :], m[task.context :]):
        words.append(f"[{task.decode([token])}]" if scored else task.decode([token]))
    return words


# -----------------------------------------------------------------------------
# Rule 110: remember strings, then compute on them


def rule110_step(state, width):
    """One step of Rule 110 on a ring. state: uint64 array, cell i of a string is bit i -> the same shape."""
    # not in the paper: the ring is periodic; zeros beyond the ends drive the first bit to 1 and leave nothing to ask
    one, last = np.uint64(1), np.uint64(width - 1)
    left = ((state << one) | (state >> last)) & np.uint64(2**width - 1)  # bit i holds cell i-1
    right = (state >> one) | ((state & one) << last)  # bit i holds cell i+1
    return (state | right) & ~(left & state & right)


def unpack_bits(state, width):
    """uint64 (...) -> int64 (..., width), first cell first."""
    return ((state[..., None] >> np.arange(width, dtype=np.uint64)) & np.uint64(1)).astype(np.int64)


def pack_bits(bits):
    """Integers 0 or 1 (..., width), first cell first -> uint64 (...)."""
    return (bits.astype(np.uint64) << np.arange(bits.shape[-1], dtype=np.uint64)).sum(axis=-1, dtype=np.uint64)


class Rule110:
    """
    Several unrelated random bit strings, then the first bit of each after t steps of Rule 110 (paper section 3).
    t is fixed and never shown to the model; t=0 is recall. With width=4, t=1, strings=2:

        x    1 0 0 1   0 0 1 1   Q 1      the strings, then a query token and the earlier answers
        y    0 0 1 0   0 1 1 Q   1 0
        m    . . . .   . . . .   ^ ^      1001 -> 1011 and 0011 -> 0111, so the answers are 1 and 0
    """

    name = "rule110"

    def __init__(self, width=24, t=32, strings=4):
        if not 3 <= width <= 62:
            raise ValueError(f"--width is {width}: a string needs 3 to 62 bits")
        if t < 0:
            raise ValueError(f"--t is {t}: use 0 (recall) or more steps")
        if strings < 1:
            raise ValueError(f"--strings is {strings}: use 1 or more")
        self.width, self.t, self.strings = width, t, strings
        self.vocab_size = 3  # "0", "1", "Q"
        self.levels = max(1, t)  # a level is a number of steps
        self.context = strings * width
        self.T = self.context + strings

    def _hash(self, state):
        # the width goes in too: 011 and 0110 pack into the same integer
        return splitmix64(splitmix64(np.array([self.width], dtype=np.uint64)) + state)

    def batch(self, seed, split, s, B, level=None):
        """Batch number s: x, y int64 and m bool, torch CPU tensors (B, T). level: ask for that many steps instead."""
        rng = batch_rng(seed, split, s)

        def draw(rows):
            state = rng.integers(0, 2**self.width, rows, dtype=np.uint64)
            return self._hash(state), [state]

        (state,) = sample_problems(draw, split, B * self.strings)
        context = unpack_bits(state, self.width).reshape(B, self.context)
        for _ in range(self.t if level is None else min(level, self.t)):
            state = rule110_step(state, self.width)
        labels = (state & np.uint64(1)).astype(np.int64).reshape(B, self.strings)
        # not in the paper: one query token, so that the first answer is predicted after the last string is evicted
        seq = np.concatenate([context, np.full((B, 1), 2), labels], axis=1)  # (B, T+1)
        m = np.zeros((B, self.T), dtype=bool)
        m[:, self.context :] = True
        return as_tensors(seq[:, :-1], seq[:, 1:], m)

    def problem_hashes(self, x):
        """The hash of every string, recomputed from the tokens. x: (B, T) int64 -> uint64 (B, strings)."""
        return self._hash(pack_bits(x[:, : self.context].cpu().numpy().reshape(len(x), self.strings, self.width)))

    def decode(self, ids):
        """Token ids (any 1-d sequence) -> str, one character per token."""
        return "".join("01Q"[int(i)] for i in ids)

    def score(self, x, y, m, pred):
        """All four (B, T) -> dict of bool arrays: "exact" (B,), every string right; "bit" (B * strings,)."""
        y, m, pred = as_arrays(y, m, pred)
        right = (pred == y)[m].reshape(-1, self.strings)  # (B, strings)
        return {f"t={self.t} exact": right.all(axis=1), f"t={self.t} bit": right.reshape(-1)}

    def losses(self, x, y, m, ce):
        """The same keys as score -> {"loss": mean cross-entropy over the scored tokens}. ce: (B, T), in nats."""
        m, ce = as_arrays(m, ce)
        return {key: {"loss": float(ce[m].mean())} for key in (f"t={self.t} exact", f"t={self.t} bit")}

    def chance(self, x, y, m):
        """The same keys as score -> accuracy of guessing uniformly, and of always answering the commonest bit."""
        y, m = as_arrays(y, m)
        labels = y[m].reshape(-1, self.strings)  # (B, strings)
        hit = labels == int(labels.mean() >= 0.5)
        return {
            f"t={self.t} exact": {"uniform": 0.5**self.strings, "majority": float(hit.all(axis=1).mean())},
            f"t={self.t} bit": {"uniform": 0.5, "majority": float(hit.mean())},
        }

    def explain(self, x, y, m):
        """One example, x, y, m (T,), as lines for a person: the strings step by step, then the answers."""
        bits = x[: self.context].numpy().reshape(self.strings, self.width)
        history = [pack_bits(bits)]
        for _ in range(self.t):
            history.append(rule110_step(history[-1], self.width))
        lines = []
        side_by_side = max(1, 90 // (self.width + 2))
        for i in range(0, self.strings, side_by_side):
            for t, state in enumerate(history):
                strings = unpack_bits(state[i : i + side_by_side], self.width)
                lines.append(f"  step {t:2d}  " + "  ".join(self.decode(b) for b in strings))
            lines.append(("  asked    " + f"{'^':{self.width + 2}}" * len(strings)).rstrip())
        return lines + ["  then: " + " ".join(bracket(self, x, y, m))]


# -----------------------------------------------------------------------------
# Depo: remember a shuffled cycle, then walk it

# not in the paper: names, queries and scored tokens as in the public Depo-1, which fits the paper's lengths exactly
MINI_VOCAB = 50  # tokens 0..49 go on a name, 50..99 end one, so names need no separator
SYLLABLES = [c + v for c in "bdgklmnprt" for v in "aeiou"]  # how decode spells the mini-vocabulary


def shuffle(rng, n, width):
    """Random permutations of 0..width-1 in which row r has 0..n[r]-1 in front. n: (R,) -> int64 (R, width)."""
    behind = np.arange(width) >= n[:, None]
    return np.argsort(rng.random((len(n), width)) + behind, axis=1)


def take(a, index):
    """a (R, A), index (R, I) -> (R, I), row by row."""
    return np.take_along_axis(a, index, axis=1)


def draw_names(rng, rows, count, name_tokens):
    """
    Distinct names per row, as if drawn one by one with repeats rejected. Returns name ids, int64 (rows, count).
    One draw is a length, uniform in 1..name_tokens, and that many tokens, uniform in the mini-vocabulary.
    """
    ids = np.empty((rows, 0), dtype=np.int64)
    while True:
        # 2500 equally likely outcomes per length: 50 for each of the 50 short names, one for each of the 2500 long ones
        u = rng.integers(0, MINI_VOCAB**2 * name_tokens, (rows, 2 * count))
        long = u - MINI_VOCAB**2
        # draws that were too few are continued, not replaced: starting over would prefer rows with few repeats
        ids = np.concatenate([ids, np.where(long < 0, u // MINI_VOCAB, MINI_VOCAB + long)], axis=1)  # (rows, D)
        D = ids.shape[1]
        name, when = np.divmod(np.sort(ids * D + np.arange(D), axis=1), D)  # equal names side by side, oldest first
        oldest = np.ones(name.shape, dtype=bool)
        oldest[:, 1:] = name[:, 1:] != name[:, :-1]
        new = np.zeros(name.shape, dtype=bool)
        np.put_along_axis(new, when, oldest, axis=1)  # back to the order of the draws
        seen = new.cumsum(axis=1)
        if seen[:, -1].min() >= count:
            return ids[new & (seen <= count)].reshape(rows, count)


def read_names(tokens):
    """Every name in rows of tokens, in reading order. tokens: (R, W) -> its row, its id: int64 (names,), (names,)."""
    before = np.full_like(tokens, MINI_VOCAB)
    before[:, 1:] = tokens[:, :-1]
    row, col = np.nonzero((tokens >= MINI_VOCAB) & (tokens < 2 * MINI_VOCAB))
    first, last = before[row, col], tokens[row, col] - MINI_VOCAB
    return row, np.where(first < MINI_VOCAB, MINI_VOCAB + first * MINI_VOCAB + last, last)


def edge_hash(source, target):
    """Hashes of edges between name ids; their sum identifies a graph in whatever order its edges are listed."""
    return splitmix64((source.astype(np.uint64) << np.uint64(32)) + target.astype(np.uint64))


class Depo:
    """
    A directed cycle listed as shuffled edges, then: who is k steps after this node? (paper section 3)

    Layout: a name is 1 or 2 tokens, its last one shifted by 50; an edge is its two names. A query is
    <query_k> start <answer> name; earlier answers stand in the sequence. With nodes=3, hops=2, queries=1:

        x    <pad> <pad> po le-ru   le-ru ka-mi   ka-mi po     <query_2> ka-mi <answer> le-ru
        m                                                                   ^     ^     ^

    The scored tokens are <answer> and the answer's name, and m marks the positions that predict them, one earlier.
    """

    name = "depo"

    def __init__(self, nodes=75, hops=16, queries=10, name_tokens=2, min_nodes=3):
        if name_tokens not in (1, 2):
            raise ValueError(f"--name-tokens is {name_tokens}: a name has 1 or 2 tokens")
        names = MINI_VOCAB if name_tokens == 1 else MINI_VOCAB + MINI_VOCAB**2
        if not 3 <= nodes <= names:
            raise ValueError(f"--nodes is {nodes}: use 3 to {names} with --name-tokens {name_tokens}")
        if hops < 1:
            raise ValueError(f"--hops is {hops}: use 1 or more")
        if hops > nodes:
            raise ValueError(f"hops above --nodes: {hops} hops on {nodes} nodes, lower --hops or raise --nodes")
        if not 1 <= queries <= nodes:
            raise ValueError(f"--queries is {queries}: use 1 to {nodes}, each starts from another one of the nodes")
        if not 3 <= min_nodes <= nodes:
            raise ValueError(f"--min-nodes is {min_nodes}: use 3 to {nodes} (--nodes)")
        self.nodes, self.hops, self.queries = nodes, hops, queries
        self.name_tokens, self.min_nodes = name_tokens, min_nodes
        self.levels = hops  # a level is the longest walk asked for
        self.query = 2 * MINI_VOCAB - 1  # <query_k> is token query + k
        self.answer = self.query + hops + 1
        self.pad = self.answer + 1
        self.vocab_size = self.pad + 1
        self.context = 2 * name_tokens * nodes
        self.T = self.context + queries * (2 + 2 * name_tokens)
        # name id -> its tokens, -1 where there is none; the id after the last one is "no node here"
        self.none = names
        self.spelling = np.full((names + 1, name_tokens), -1)
        self.spelling[:MINI_VOCAB, 0] = MINI_VOCAB + np.arange(MINI_VOCAB)
        if name_tokens == 2:
            first, last = np.divmod(np.arange(MINI_VOCAB**2), MINI_VOCAB)
            self.spelling[MINI_VOCAB:-1] = np.stack([first, MINI_VOCAB + last], axis=1)

    def _draw(self, rng, split, rows):
        """Hashes (rows,) and cycles: n (rows,), each place's node and its successor, name ids (rows, nodes)."""
        # not in the paper: cycle sizes as in the public Depo, many short ones in training, only the longest held out
        n = np.full(rows, self.nodes)
        if split == "train":
            sizes = np.arange(self.min_nodes, self.nodes + 1)
            p = 1 / (sizes + math.sqrt(self.nodes))
            n = rng.choice(sizes, rows, p=p / p.sum())
        names = draw_names(rng, rows, self.nodes, self.name_tokens)
        place = np.arange(self.nodes)
        on = place < n[:, None]  # (rows, nodes)
        # short names tend to be drawn early, so the order around the cycle is shuffled
        node = np.where(on, take(names, shuffle(rng, n, self.nodes)), self.none)
        successor = np.where(on, take(node, (place + 1) % n[:, None]), self.none)
        hashes = np.where(on, edge_hash(node, successor), np.uint64(0)).sum(axis=1, dtype=np.uint64)
        return splitmix64(hashes), [n, node, successor]

    def _questions(self, rng, n, node, hops):
        """Queries of 1 to `hops` hops as tokens, -1 for none, int64 (B, queries, 2 + 2 * name_tokens)."""
        B = len(n)
        asked = np.arange(self.queries) < n[:, None]  # (B, queries)
        start = shuffle(rng, n, self.nodes)[:, : self.queries]  # places on the cycle, none twice
        k = rng.integers(1, hops + 1, (B, self.queries))
        # not in the paper: hops wrap around on cycles shorter than k, and a cycle of n < queries nodes gets n queries
        end = (start + k) % n[:, None]
        columns = [(self.query + k)[..., None], self.spelling[take(node, start)]]
        columns += [np.full((B, self.queries, 1), self.answer), self.spelling[take(node, end)]]
        return np.where(asked[..., None], np.concatenate(columns, axis=2), -1)

    def batch(self, seed, split, s, B, level=None):
        """Batch number s: x, y int64 and m bool, torch CPU tensors (B, T). Training cycles vary in size.

        level: the largest number of hops to ask for, all by default.
        """
        rng = batch_rng(seed, split, s)
        n, node, successor = sample_problems(lambda rows: self._draw(rng, split, rows), split, B)
        order = shuffle(rng, n, self.nodes)
        edges = np.stack([take(node, order), take(successor, order)], axis=2)  # (B, nodes, 2)
        facts = self.spelling[edges].reshape(B, -1)  # (B, context), -1 in the gaps
        asks = self._questions(rng, n, node, self.hops if level is None else min(level, self.hops))
        scored = np.zeros(asks.shape, dtype=bool)
        scored[:, :, 1 + self.name_tokens :] = True  # <answer> and the answer's name
        asks, scored = asks.reshape(B, -1), scored.reshape(B, -1)  # (B, T - context)

        # close the gaps: both sides of these assignments run through a row's tokens in reading order
        seq = np.full((B, self.T + 1), self.pad)
        m = np.zeros((B, self.T + 1), dtype=bool)
        column = np.arange(self.T + 1)
        some = facts >= 0
        start = self.context - some.sum(axis=1, keepdims=True)
        seq[(column >= start) & (column < self.context)] = facts[some]
        some = asks >= 0
        stop = self.context + some.sum(axis=1, keepdims=True)
        inside = (column >= self.context) & (column < stop)
        seq[inside] = asks[some]
        m[inside] = scored[some]
        return as_tensors(seq[:, :-1], seq[:, 1:], m[:, 1:])

    def problem_hashes(self, x):
        """The hash of every row's successor map, recomputed from the tokens. x: (B, T) int64 -> uint64 (B,)."""
        row, name = read_names(x[:, : self.context].cpu().numpy())
        total = np.zeros(len(x), dtype=np.uint64)
        np.add.at(total, row[::2], edge_hash(name[::2], name[1::2]))  # names alternate: source, destination
        return splitmix64(total)

    def decode(self, ids):
        """Token ids (any 1-d sequence) -> str; the name "ka-mi" is the tokens "ka-" (goes on) and "mi" (ends it)."""
        words = [s + "-" for s in SYLLABLES] + SYLLABLES
        words += [f"<query_{k}>" for k in range(1, self.hops + 1)] + ["<answer>", "<pad>"]
        return " ".join(words[int(i)] for i in ids).replace("- ", "-")

    def _by_hops(self, x, values):
        """Sort one value per query by its hop count. x: (B, T), values: (Q,) in reading order -> dict of arrays."""
        row, col = np.nonzero((x > self.query) & (x < self.answer))
        k = x[row, col] - self.query
        # a later query can find edges of the cycle in the answers before it; a row's first query cannot
        first = np.ones(len(row), dtype=bool)
        first[1:] = row[1:] != row[:-1]
        hops = range(1, self.hops + 1)
        return {f"hops {i}": values[k == i] for i in hops} | {f"first hops {i}": values[first & (k == i)] for i in hops}

    def _query_of(self, x):
        """The query each position belongs to, counted through the batch, and how many there are. x: (B, T) array."""
        asks = (x > self.query) & (x < self.answer)
        return asks.cumsum().reshape(x.shape) - 1, int(asks.sum())

    def score(self, x, y, m, pred):
        """
        All four (B, T) -> dict of bool arrays, one entry per query: "hops k" for k in 1..hops, and "first hops k" for
        each row's first query only. Right means every token of the answer's name; <answer> itself does not count.
        """
        x, y, m, pred = as_arrays(x, y, m, pred)
        query, Q = self._query_of(x)
        wrong = m & (y != self.answer) & (pred != y)
        return self._by_hops(x, np.bincount(query[wrong], minlength=Q) == 0)

    def losses(self, x, y, m, ce):
        """
        The same keys as score -> means of the cross-entropies ce (B, T), in nats; nan if empty. "loss" is per token of
        the answers' names; "scored_loss" is per scored token, so it counts the easy <answer> in and is the lower one.
        """
        x, y, m, ce = as_arrays(x, y, m, ce)
        query, Q = self._query_of(x)
        means = {}
        for kind, where in {"loss": m & (y != self.answer), "scored_loss": m}.items():
            total = self._by_hops(x, np.bincount(query[where], weights=ce[where], minlength=Q))
            count = self._by_hops(x, np.bincount(query[where], minlength=Q))
            for key, tokens in count.items():
                mean = float(total[key].sum() / tokens.sum()) if len(tokens) else math.nan
                means.setdefault(key, {})[kind] = mean
        return means

    def chance(self, x, y, m):
        """The same keys as score -> accuracy of guessing among the nodes that can be asked for, of the commonest
        answer; nan if empty.
        """
        x, y, m = as_arrays(x, y, m)
        row, answer = read_names(np.where(m, y, self.pad))  # (Q,)
        names = (x[:, : self.context] >= MINI_VOCAB) & (x[:, : self.context] < 2 * MINI_VOCAB)
        n = names.sum(axis=1) // 2  # (B,), a node is named twice
        levels = {}
        for key, q in self._by_hops(x, np.arange(len(row))).items():
            others = n[row[q]] - (int(key.split()[-1]) % n[row[q]] != 0)  # k steps on is the start itself, or never is
            uniform = float((1 / others).mean()) if len(q) else math.nan
            majority = float(np.bincount(answer[q]).max() / len(q)) if len(q) else math.nan
            levels[key] = {"uniform": uniform, "majority": majority}
        return levels

    def explain(self, x, y, m):
        """One example, x, y, m (T,), as lines for a person: the edges, then each query and the walk it asks for."""
        context = x[: self.context].numpy()
        name = read_names(context[None])[1]
        spell = {i: self.decode([j for j in self.spelling[i] if j >= 0]) for i in name}
        successor = dict(zip(name[::2], name[1::2]))  # source and destination alternate
        lines = [f"  edges, after {(context == self.pad).sum()} <pad>:"]
        lines += [f"    {spell[a]} {spell[b]}" for a, b in successor.items()]
        lines.append("  queries:")
        asks = np.flatnonzero((x > self.query) & (x < self.answer))
        words = bracket(self, x, y, m)
        for start, stop in zip(asks, [*asks[1:], self.T]):
            walk = [read_names(x[None, start:stop].numpy())[1][0]]
            for _ in range(int(x[start]) - self.query):
                walk.append(successor[walk[-1]])
            text = " ".join(w for w in words[start - self.context : stop - self.context] if w != "<pad>")
            lines += ["    " + text.replace("- ", "-"), "        because " + " > ".join(spell[i] for i in walk)]
        return lines


# -----------------------------------------------------------------------------
# look at the data

TASKS = {"rule110": Rule110, "depo": Depo}

# sizes a person can follow; the constructors' own defaults are the paper's
EXAMPLE_SIZES = {
    "rule110": {"width": 12, "t": 4, "strings": 4},
    "depo": {"nodes": 6, "hops": 3, "queries": 3, "name_tokens": 2, "min_nodes": 3},
}


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag costs one line instead of the whole usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def git_commit():
    """The commit of this code, "-dirty" if it was edited since; "unknown" outside a git checkout."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main():
    """Read the command line and print three examples."""
    parser = Parser(description="Print three examples of a task; scored tokens stand in [brackets].")
    parser.add_argument("--task", choices=TASKS, default="rule110")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    for task, sizes in EXAMPLE_SIZES.items():
        for size, default in sizes.items():
            flag = "--" + size.replace("_", "-")
            parser.add_argument(flag, type=int, metavar="INT", help=f"{task} only, here {default} unless given")
    args = parser.parse_args()
    given = {size: v for sizes in EXAMPLE_SIZES.values() for size in sizes if (v := getattr(args, size)) is not None}
    for size in given:
        if size not in EXAMPLE_SIZES[args.task]:
            parser.error(f"--{size.replace('_', '-')} is not a size of {args.task}")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}: use 0 or more")
    try:
        task = TASKS[args.task](**EXAMPLE_SIZES[args.task] | given)
        x, y, m = task.batch(args.seed, args.split, 0, 3)
    except ValueError as error:
        parser.error(str(error))
    print(f"{task.name}: {task.context} tokens of context, {task.T} in all, vocabulary {task.vocab_size}")
    for i in range(3):
        print(f"\n{args.split} example {i + 1}, scored tokens in [brackets]")
        print("\n".join(task.explain(x[i], y[i], m[i])))


if __name__ == "__main__":
    main()
