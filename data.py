"""
What the model is asked: three synthetic memory tasks, generated on the fly with numpy.

Each task hides what matters in a long context that is evicted window by window, then asks about it. A task object has
a `name` (its key in TASKS), its sizes as attributes, `t` (how many steps answers are away at most; None: no such
number), `vocab_size`, `context` (how many tokens must be remembered, a multiple of the window L), `T` (tokens in every
row), `answer_tokens` (in an answer, at most), and
    batch(seed, split, s, B)                x, y (int64) and m (bool), (B, T): tokens, what to predict, and which
                                            positions are scored; no row is scored in a window and another only later
                                            (sleep.split_chunks)
    score(x, y, m, pred)                    what was answered right, one array per difficulty, under a name whose first
                                            number a figure shows ("hops 3", "t=8 exact"); "first ...", "... bit" and
                                            "... rows" repeat questions that stand under other names
    losses(x, y, m, ce)                     under the same names {"loss": the mean cross-entropy of the answers}
    chance(x, y, m)                         under the same names what guessing scores, {"uniform": .., "majority": ..};
                                            gsm also "literal": a random number of the text
    decode(ids)                             text for people
    explain(x, y, m)                        one example, for people
and for some purposes
    encode(text), prompt                    for a chat: text to ids, and what follows the context to make the model
                                            answer ("": the user's question)
    at(t)                                   for --grow and eval.py --t: the same task and tokens, with another t
    hidden(x)                               what a memory of the context could hold, for a probe (not GSM-Infinite)
    problem_hashes(x)                       proof that the splits share no problem (not GSM-Infinite as text)
Batch s of a split is a pure function of (seed, split, s, B): nothing is stored, and resuming a run cannot drift.

To see three examples that can be checked by hand:
    $ python data.py --task rule110
    $ python data.py --task depo --nodes 8 --hops 4
    $ python data.py --task depo --name-tokens 1 --t 4              # with --hops 4: 1 to 4 hops, and which
    $ python data.py --task gsm --op 6

Based on the tasks of "Do Language Models Need Sleep?" (arXiv:2605.26099). Depo follows the public layout Depo-1 of
"Physics of Language Models: Part 4.1". GSMInfinite asks what GSM-Infinite (arXiv:2502.05252) asks, in names, grammar
and code of our own. Where the paper is silent, a comment starts with "not in the paper".

Read next: kernels.py
"""

import argparse
import collections
import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from string import ascii_uppercase

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
    return np.random.default_rng([seed, SPLITS.index(split), s])


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


def look_up(words, ids, task):
    """Words -> token ids, a list of int. ids: word -> id. Raises ValueError that names the words it has not."""
    unknown = list(dict.fromkeys(word for word in words if word not in ids))
    if unknown:
        raise ValueError(f"not in the vocabulary of the task {task}: {', '.join(unknown)}; use its own words")
    return [ids[word] for word in words]


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


def of_bits(name):
    """The row of single bits beside a row of whole answers: "t=4 exact" -> "t=4 bit", "t=4 rows" -> "t=4 rows bit"."""
    return name.removesuffix(" exact") + " bit"


class Rule110:
    """
    Several unrelated random bit strings, then the first bit of each after t steps of Rule 110 (arXiv:2605.26099).
    t is fixed and never shown to the model; t=0 is recall. With width=4, t=1, strings=2:

        x    1 0 0 1   0 0 1 1   Q 1      the strings, then a query token and the earlier answers
        y    0 0 1 0   0 1 1 Q   1 0
        m    . . . .   . . . .   ^ ^      1001 -> 1011 and 0011 -> 0111, so the answers are 1 and 0

    not in the paper: ask="row" asks for all bits, string by string, each behind a query token that names the string.
    The first bit of a string is asked before any other of it, so it is as hard as it was:

        x    1 0 0 1   0 0 1 1   A 1 0 1   B 0 1 1
        y    0 0 1 0   0 1 1 A   1 0 1 1   0 1 1 1      the rows alone: no query is predicted after the first
    """

    name = "rule110"

    def __init__(self, width=24, t=32, strings=4, ask="bit"):
        if not 3 <= width <= 62:
            raise ValueError(f"--width is {width}: a string needs 3 to 62 bits")
        if not 0 <= t <= 100_000:
            raise ValueError(f"--t is {t}: use 0 (recall) to 100,000 steps")
        if strings < 1:
            raise ValueError(f"--strings is {strings}: use 1 or more")
        if ask not in ("bit", "row"):
            raise ValueError(f"--ask is {ask}: use bit or row")
        if ask == "row" and strings > len(ascii_uppercase):
            raise ValueError(f"--strings is {strings}: with --ask row use at most {len(ascii_uppercase)}")
        self.width, self.t, self.strings, self.ask = width, t, strings, ask
        self.words = "01Q" if ask == "bit" else "01" + ascii_uppercase[:strings]
        self.vocab_size = len(self.words)
        self.asked = 1 if ask == "bit" else width  # bits of each string
        self.context = strings * width
        self.T = self.context + strings * self.asked
        self.prompt, self.answer_tokens = self.words[2], strings if ask == "bit" else width

    def at(self, t):
        """The same task with another number of steps."""
        return Rule110(self.width, t, self.strings, self.ask)

    def _hash(self, state):
        # the width goes in too: 011 and 0110 pack into the same integer
        return splitmix64(splitmix64(np.array([self.width], dtype=np.uint64)) + state)

    def batch(self, seed, split, s, B):
        """Batch number s: x, y int64 and m bool, torch CPU tensors (B, T)."""
        rng = batch_rng(seed, split, s)

        def draw(rows):
            state = rng.integers(0, 2**self.width, rows, dtype=np.uint64)
            return self._hash(state), [state]

        (state,) = sample_problems(draw, split, B * self.strings)
        context = unpack_bits(state, self.width).reshape(B, self.context)
        for _ in range(self.t):
            state = rule110_step(state, self.width)
        asked = unpack_bits(state, self.width)[:, : self.asked]
        labels = asked.reshape(B, -1, self.answer_tokens)  # (B, 1, strings), whole rows: (B, strings, width)
        # not in the paper: a query token, so that the first answer is predicted after the last string is evicted; the
        # earlier answers follow it
        query = np.broadcast_to(2 + np.arange(labels.shape[1])[:, None], (B, labels.shape[1], 1))
        shown = np.concatenate([query, labels[:, :, :-1]], axis=2).reshape(B, -1)
        x = np.concatenate([context, shown], axis=1)  # (B, T)
        y = np.concatenate([x[:, 1 : self.context + 1], labels.reshape(B, -1)], axis=1)
        m = np.zeros((B, self.T), dtype=bool)
        m[:, self.context :] = True
        return as_tensors(x, y, m)

    def problem_hashes(self, x):
        """The hash of every string, recomputed from the tokens. x: (B, T) int64 -> uint64 (B, strings)."""
        return self._hash(pack_bits(x[:, : self.context].cpu().numpy().reshape(len(x), self.strings, self.width)))

    def decode(self, ids):
        """Token ids (any 1-d sequence) -> str, one character per token."""
        return "".join(self.words[int(i)] for i in ids)

    def encode(self, text):
        """The inverse of decode, a list of int; spaces do not count. Raises ValueError that names what is no token."""
        return look_up("".join(text.upper().split()), {word: i for i, word in enumerate(self.words)}, self.name)

    def hidden(self, x):
        """The last string's bits after 0 to t steps: "step j" -> int64 (B, width). x: (B, T) int64."""
        state = pack_bits(x[:, self.context - self.width : self.context].cpu().numpy())
        bits = {}
        for step in range(self.t + 1):
            bits[f"step {step}"] = unpack_bits(state, self.width)
            state = rule110_step(state, self.width)
        return bits

    def _questions(self, values, m):
        """What stands at the scored positions, (B, T) each -> what is asked: name -> (B, bits)."""
        values = values[m].reshape(len(m), self.strings, self.asked)
        questions = {f"t={self.t} exact": values[:, :, 0]}
        return questions if self.ask == "bit" else questions | {f"t={self.t} rows": values.reshape(len(m), -1)}

    def score(self, x, y, m, pred):
        """All four (B, T) -> dict of bool arrays: "exact", the first bits all right, (B,); "bit", each, (B * strings,).

        With ask="row" also "rows", all bits of all rows right, (B,); "rows bit", each of them.
        """
        y, m, pred = as_arrays(y, m, pred)
        questions = self._questions(pred == y, m)
        right = {name: bits.all(axis=1) for name, bits in questions.items()}
        return right | {of_bits(name): bits.reshape(-1) for name, bits in questions.items()}

    def losses(self, x, y, m, ce):
        """The same keys as score -> {"loss": mean cross-entropy over the tokens asked for}. ce: (B, T), in nats."""
        m, ce = as_arrays(m, ce)
        means = {name: {"loss": float(bits.mean())} for name, bits in self._questions(ce, m).items()}
        return means | {of_bits(name): loss for name, loss in means.items()}

    def chance(self, x, y, m):
        """The same keys as score -> accuracy of guessing uniformly, and of always answering the commonest bit."""
        y, m = as_arrays(y, m)
        chance = {}
        for name, labels in self._questions(y, m).items():
            hit = labels == int(labels.mean() >= 0.5)  # (B, bits)
            chance[name] = {"uniform": 0.5 ** labels.shape[1], "majority": float(hit.all(axis=1).mean())}
            chance[of_bits(name)] = {"uniform": 0.5, "majority": float(hit.mean())}
        return chance

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
            lines.append(("  asked    " + f"{'^' * self.asked:{self.width + 2}}" * len(strings)).rstrip())
        if self.ask == "bit":
            return lines + ["  then: " + " ".join(bracket(self, x, y, m))]
        rows = zip(x[self.context :: self.width], y[self.context :].view(-1, self.width))
        return lines + ["  then: " + "  ".join(f"{self.decode([query])} [{self.decode(row)}]" for query, row in rows)]


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
    A directed cycle listed as shuffled edges, then: who is k steps after this node? (arXiv:2605.26099)

    Layout: a name is 1 or 2 tokens, its last one shifted by 50; an edge is its two names. A query is
    <query_k> start <answer> name; earlier answers stand in the sequence. With nodes=3, hops=2, queries=1:

        x    <pad> <pad> po le-ru   le-ru ka-mi   ka-mi po     <query_2> ka-mi <answer> le-ru
        m                                                                   ^     ^     ^

    The scored tokens are <answer> and the answer's name, and m marks the positions that predict them, one earlier.

    not in the paper: with t the answer is predicted at the last token of the question, its name, and later questions
    see earlier questions, never answers. With hops, questions ask for 1 to t hops, and there are tokens to say up to
    hops; with hops=0 all ask for t, and do not say so. With t=2, nodes=3, queries=2, name_tokens=1, and hops=2 (left)
    or hops=0 (right):

        x    ru ka   ka mi   mi ru   <query_2> ka <query_1> mi        ru ka   ka mi   mi ru   ka mi
        y                                      ru           ru                                ru ka
        m                                      ^            ^                                 ^  ^
    """

    name = "depo"

    def __init__(self, nodes=75, hops=16, queries=10, name_tokens=2, min_nodes=3, t=None):
        if name_tokens not in (1, 2):
            raise ValueError(f"--name-tokens is {name_tokens}: a name has 1 or 2 tokens")
        names = MINI_VOCAB if name_tokens == 1 else MINI_VOCAB + MINI_VOCAB**2
        if not 3 <= nodes <= names:
            raise ValueError(f"--nodes is {nodes}: use 3 to {names} with --name-tokens {name_tokens}")
        if t is not None and not 1 <= t < nodes:
            raise ValueError(f"--t is {t}: on cycles of {nodes} nodes use 1 to {nodes - 1} hops")
        if hops < 0 or (hops == 0 and t is None):
            raise ValueError(f"--hops is {hops}: use 1 or more, or leave it out with --t")
        if hops and t is not None and t > hops:
            raise ValueError(f"--t is {t}: the questions can say up to {hops} hops (--hops), use a smaller --t")
        if hops > nodes:
            raise ValueError(f"hops above --nodes: {hops} hops on {nodes} nodes, lower --hops or raise --nodes")
        if not 1 <= queries <= nodes:
            raise ValueError(f"--queries is {queries}: use 1 to {nodes}, each starts from another one of the nodes")
        if not 3 <= min_nodes <= nodes:
            raise ValueError(f"--min-nodes is {min_nodes}: use 3 to {nodes} (--nodes)")
        if t is not None and name_tokens > 1:
            raise ValueError("--name-tokens 2 does not go with --t: an answer is one token, use --name-tokens 1")
        self.nodes, self.hops, self.queries, self.t = nodes, hops, queries, t
        self.name_tokens, self.min_nodes = name_tokens, min_nodes
        self.farthest = hops if t is None else t  # most hops that are asked for
        self.query = 2 * MINI_VOCAB - 1  # <query_k> is token query + k
        self.answer = self.query + hops + 1 if t is None else -1  # with t there is no such token
        self.words = [s + "-" for s in SYLLABLES] + SYLLABLES + [f"<query_{k}>" for k in range(1, hops + 1)]
        self.words += ["<answer>"] * (t is None) + ["<pad>"]
        self.vocab_size, self.pad = len(self.words), len(self.words) - 1
        self.prompt, self.answer_tokens = "", 1 + name_tokens if t is None else 1
        self.context = 2 * name_tokens * nodes
        self.told = int(hops > 0)  # tokens of a question before the name: <query_k>, if it says how far
        self.T = self.context + queries * (2 + 2 * name_tokens if t is None else self.told + 1)
        # name id -> its tokens, -1 where there is none; the id after the last one is "no node here"
        self.none = names
        self.spelling = np.full((names + 1, name_tokens), -1)
        self.spelling[:MINI_VOCAB, 0] = MINI_VOCAB + np.arange(MINI_VOCAB)
        if name_tokens == 2:
            first, last = np.divmod(np.arange(MINI_VOCAB**2), MINI_VOCAB)
            self.spelling[MINI_VOCAB:-1] = np.stack([first, MINI_VOCAB + last], axis=1)

    def at(self, t):
        """The same task, in the same tokens, with another t."""
        return Depo(self.nodes, self.hops, self.queries, self.name_tokens, self.min_nodes, t)

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

    def _questions(self, rng, n, node):
        """
        Returns the queries, and the answers if they are no part of these. Without self.t: tokens, -1 for none, int64
        (B, queries, 2 + 2 * name_tokens), and None. With self.t: (B, queries, told + 1), and in reading order (Q, 1).
        """
        B = len(n)
        asked = np.arange(self.queries) < n[:, None]  # (B, queries)
        start = shuffle(rng, n, self.nodes)[:, : self.queries]  # places on the cycle, none twice
        k = np.full((B, self.queries), self.farthest)
        if self.told:
            k = rng.integers(1, self.farthest + 1, k.shape)
        # not in the paper: hops wrap around on cycles shorter than k, and a cycle of n < queries nodes gets n queries
        start, end = (self.spelling[take(node, place)] for place in (start, (start + k) % n[:, None]))
        columns = [(self.query + k)[..., None], start] if self.told else [start]
        if self.t is None:
            columns += [np.full((B, self.queries, 1), self.answer), end]
        asks = np.where(asked[..., None], np.concatenate(columns, axis=2), -1)
        return asks, None if self.t is None else end[asked]

    def batch(self, seed, split, s, B):
        """Batch number s: x, y int64 and m bool, torch CPU tensors (B, T). Training cycles vary in size."""
        rng = batch_rng(seed, split, s)
        n, node, successor = sample_problems(lambda rows: self._draw(rng, split, rows), split, B)
        order = shuffle(rng, n, self.nodes)
        edges = np.stack([take(node, order), take(successor, order)], axis=2)  # (B, nodes, 2)
        facts = self.spelling[edges].reshape(B, -1)  # (B, context), -1 in the gaps
        asks, answers = self._questions(rng, n, node)
        scored = np.zeros(asks.shape, dtype=bool)
        first = self.told if self.t else 1 + self.name_tokens  # the name that is asked about, or <answer>
        scored[:, :, first:] = True
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
        x, y = seq[:, :-1], seq[:, 1:]
        if self.t is None:
            return as_tensors(x, y, m[:, 1:])
        y, m = y.copy(), m[:, :-1]  # x and y share their memory
        y[m] = answers[:, 0]
        return as_tensors(x, y, m)

    def problem_hashes(self, x):
        """The hash of every row's successor map, recomputed from the tokens. x: (B, T) int64 -> uint64 (B,)."""
        row, name = read_names(x[:, : self.context].cpu().numpy())
        total = np.zeros(len(x), dtype=np.uint64)
        np.add.at(total, row[::2], edge_hash(name[::2], name[1::2]))  # names alternate: source, destination
        return splitmix64(total)

    def decode(self, ids):
        """Token ids (any 1-d sequence) -> str; the name "ka-mi" is the tokens "ka-" (goes on) and "mi" (ends it)."""
        return " ".join(self.words[int(i)] for i in ids).replace("- ", "-")

    def encode(self, text):
        """The inverse of decode, a list of int. Raises ValueError that names the words it has not."""
        ids = {word: i for i, word in enumerate(self.words)}
        return look_up(text.lower().replace("-", "- ").split(), ids, self.name)

    def hidden(self, x):
        """Each name's k-th successor: "hops k" -> name ids, int64 (B, names), -1 for names not on the cycle."""
        row, name = read_names(x[:, : self.context].cpu().numpy())
        after = np.full((len(x), self.none + 1), self.none)
        after[row[::2], name[::2]] = name[1::2]  # names alternate: source, destination
        reached, found = after, {}
        for k in range(1, self.farthest + 1):
            found[f"hops {k}"] = np.where(reached == self.none, -1, reached)[:, :-1]
            reached = take(after, reached)
        return found

    def _queries(self, x):
        """Where queries begin, bool (B, T): at <query_k>, or if there is none at the names that follow the context."""
        if self.told:
            return (x > self.query) & (x <= self.query + self.hops)
        return (np.arange(x.shape[1]) >= self.context) & (x != self.pad)

    def _by_hops(self, x, values):
        """Sort one value per query by its hop count. x: (B, T), values: (Q,) in reading order -> dict of arrays."""
        if not self.told:
            return {f"hops {self.t}": values}
        row, col = np.nonzero(self._queries(x))
        k = x[row, col] - self.query
        of_all = {f"hops {i}": values[k == i] for i in np.unique(k)}
        if self.t is not None:
            return of_all
        # a later query can find edges of the cycle in the answers before it; a row's first query cannot
        first = np.ones(len(row), dtype=bool)
        first[1:] = row[1:] != row[:-1]
        return of_all | {f"first hops {i}": values[first & (k == i)] for i in np.unique(k[first])}

    def _query_of(self, x):
        """The query each position belongs to, counted through the batch, and how many there are. x: (B, T) array."""
        asks = self._queries(x)
        return asks.cumsum().reshape(x.shape) - 1, int(asks.sum())

    def score(self, x, y, m, pred):
        """
        All four (B, T) -> dict of bool arrays, one entry per query: "hops k" for every k that is asked for, and without
        t "first hops k" for each row's first query only. Right means every token of the answer's name; <answer> itself
        does not count.
        """
        x, y, m, pred = as_arrays(x, y, m, pred)
        query, Q = self._query_of(x)
        wrong = m & (y != self.answer) & (pred != y)
        return self._by_hops(x, np.bincount(query[wrong], minlength=Q) == 0)

    def losses(self, x, y, m, ce):
        """
        The same keys as score -> means of the cross-entropies ce (B, T), in nats. "loss" is per token of
        the answers' names; "scored_loss" is per scored token, so it counts the easy <answer> in and is the lower one
        (with t, where there is no <answer>, they are the same).
        """
        x, y, m, ce = as_arrays(x, y, m, ce)
        query, Q = self._query_of(x)
        means = {}
        for kind, where in {"loss": m & (y != self.answer), "scored_loss": m}.items():
            total = self._by_hops(x, np.bincount(query[where], weights=ce[where], minlength=Q))
            count = self._by_hops(x, np.bincount(query[where], minlength=Q))
            for key, tokens in count.items():
                means.setdefault(key, {})[kind] = float(total[key].sum() / tokens.sum())
        return means

    def chance(self, x, y, m):
        """The same keys as score -> accuracy of guessing among the nodes that can be asked for, and of the commonest
        answer.
        """
        x, y, m = as_arrays(x, y, m)
        row, answer = read_names(np.where(m, y, self.pad))  # (Q,)
        names = (x[:, : self.context] >= MINI_VOCAB) & (x[:, : self.context] < 2 * MINI_VOCAB)
        n = names.sum(axis=1) // 2  # (B,), a node is named twice
        levels = {}
        for key, q in self._by_hops(x, np.arange(len(row))).items():
            others = n[row[q]] - (int(key.split()[-1]) % n[row[q]] != 0)  # k steps on is the start itself, or never is
            majority = np.bincount(answer[q]).max() / len(q)
            levels[key] = {"uniform": float((1 / others).mean()), "majority": float(majority)}
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
        asks = np.flatnonzero(self._queries(x.numpy()[None])[0])
        for start, stop in zip(asks, [*asks[1:], self.T]):
            walk = [read_names(x[None, start:stop].numpy())[1][0]]
            for _ in range(int(x[start]) - self.query if self.told else self.t):
                walk.append(successor[walk[-1]])
            if self.t is None:
                words = bracket(self, x, y, m)[start - self.context : stop - self.context]
                text = " ".join(word for word in words if word != "<pad>")
            else:
                name = start + self.told
                text = f"{self.decode(x[start : name + 1])} [{self.decode(y[name : name + 1])}]"
            lines += ["    " + text.replace("- ", "-"), "        because " + " > ".join(spell[i] for i in walk)]
        return lines


# -----------------------------------------------------------------------------
# GSM-Infinite: a word problem inside a long text of the same kind

# not in the paper: names, grammar and generator are ours; the public GSM-Infinite has shortcuts that a model learns
PLACE_ADJECTIVES = """bronze silver copper golden iron crystal marble velvet crimson scarlet amber violet indigo emerald
    azure ivory ebony pearl ruby jade misty windy sunny frosty stormy quiet hidden ancient distant lonely upper lower
    northern southern eastern western broken sunken narrow mighty sleepy merry gentle bitter barren lush rocky sandy
    snowy rainy cloudy shady bright dim eerie royal humble proud wild calm""".split()
KIND_ADJECTIVES = """striped spotted tiny giant new old heavy light round square plain painted dusty polished rusty
    smooth rough curved folded noisy rapid slow sturdy fragile""".split()
THEMES = (  # what the things are called together, what a single one is averaged over, places, kinds of things
    ("animals", "weight",
     """valley ridge meadow canyon forest marsh island cove plateau gorge glade prairie delta lagoon summit hollow heath
     basin cliff dune fjord grove knoll moor oasis quarry ravine steppe tundra woodland""".split(),
     "otters foxes owls badgers hares herons lynxes moles newts ravens stoats voles".split()),
    ("goods", "price",
     """harbor plaza arcade bazaar wharf depot alley terrace pier courtyard station tower bridge gallery fountain mill
     garden chapel theater foundry library tavern bakery brewery cellar workshop warehouse stable orchard
     lighthouse""".split(),
     "lanterns kettles baskets mirrors clocks carpets ladders barrels candles hammers ropes bells".split()),
    ("machines", "power",
     """moon crater dome outpost colony beacon platform hangar module capsule ring cluster nebula comet asteroid
     satellite probe gateway spire vault bunker silo relay array tether dock airlock galaxy pulsar quasar""".split(),
     "robots drones rovers sensors antennas engines lasers magnets batteries cables filters pumps".split()),
)  # fmt: skip
OPENERS = "now also here then".split()  # a sentence may start with some of them; they mean nothing
FUNCTION_WORDS = """the number total average of in equals is positive plus minus times sum difference and if what x
    . , ? ( )""".split()

WORDS = ["<pad>", "<end>", "answer:", "solution:", *"0123456789", *FUNCTION_WORDS, *OPENERS]
WORDS += PLACE_ADJECTIVES + KIND_ADJECTIVES
WORDS += [word for group, unit, places, kinds in THEMES for word in (group, unit, *places, *kinds)]
ID = {word: i for i, word in enumerate(WORDS)}
PAD, END, ANSWER, SOLUTION, ZERO = 0, 1, 2, 3, 4  # the digit d is token ZERO + d
DOT, ASKS, EQUALS, IS, IN, AND, X = (ID[word] for word in (". ? equals is in and x").split())
SKIPPED = {ID[word] for word in OPENERS}
PLACE_FIRST, KIND_FIRST = [[ID[word] for word in words] for words in (PLACE_ADJECTIVES, KIND_ADJECTIVES)]

# not in the paper: literals 1..99 and every value 1..9999; with the public 1..4, constant guesses score 30 % and more
LARGEST_LITERAL, LARGEST_VALUE = 99, 9999
ANSWER_TOKENS = 5  # four digits and <end>
COUNT, AVERAGE, TOTAL = range(3)  # the roles of a parameter
MAX_OP, REVERSE_FROM, AVERAGES_FROM = 10, 3, 4
OPEN_PLACES, KINDS = 4, 5  # of a world: places besides those of its totals, and kinds of things
WORLD_PAIRS = 12  # a world with as many (place, kind) pairs is complete

# what a parameter may depend on: operation, joined, and how many refs
# not in the paper: how often; they are drawn as often as they stand here
FORMS = [(o, "one", 1) for o in ("", "plus", "plus", "times") for _ in range(8)]
FORMS += [(o, "sum", n) for o in ("", "plus", "plus", "times") for n in (2, 3, 3, 4)]
FORMS += [(o, "difference", 2) for o in ("", "plus", "plus", "times") for _ in range(4)]


def ids_of(words):
    """Words of the vocabulary, separated by spaces -> their token ids, a list of int."""
    return [ID[word] for word in words.split()]


def digits(value):
    """An integer from 0 to 9999 -> its token ids, a list of int. Raises ValueError beyond that."""
    if not 0 <= value <= LARGEST_VALUE:
        raise ValueError(f"{value} is outside the vocabulary: numbers are 0 to {LARGEST_VALUE}, rescale the problem")
    return [ZERO + int(d) for d in str(value)]


LITERALS = [digits(k) for k in range(LARGEST_LITERAL + 1)]


class Dice:
    """Single random numbers from a numpy Generator, drawn in blocks because one at a time is slow."""

    def __init__(self, rng):
        self.rng, self.block = rng, []

    def _uniform(self):
        if not self.block:
            self.block = self.rng.random(2048).tolist()
        return self.block.pop()

    def below(self, n):
        """An integer from 0 to n-1."""
        return int(self._uniform() * n)

    def chance(self, p):
        """True with probability p."""
        return self._uniform() < p

    def pick(self, items):
        """One of the items of a sequence."""
        return items[self.below(len(items))]

    def some(self, items, count):
        """`count` different items of a sequence, in random order: a list."""
        items = list(items)
        for i in range(count):
            j = i + self.below(len(items) - i)
            items[i], items[j] = items[j], items[i]
        return items[:count]


class Node:
    """
    One parameter: "<name> equals [k plus | k times] [the sum of | the difference of] <refs>", or "<name> equals k".

    operation: "", "plus", "times", or "unknown" for what a reverse problem asks; joined: "one", "sum", "difference",
    or "products" for a total of counts x averages, whose refs are count, average, count, average, ...; role: COUNT,
    AVERAGE or TOTAL. A node of a total's own place knows that total (home) and which of its kinds it counts (slot).
    """

    operation, k, joined, refs = "", 0, "one", ()

    def __init__(self, role, home=None, slot=0):
        self.role, self.home, self.slot = role, home, slot


def operations_of(fact):
    """The binary operations in one definition (a Node or a Fact)."""
    return max(0, len(fact.refs) - 1) + (fact.operation in ("plus", "times"))


class Plan:
    """
    The dependency graph of one question, drawn backwards from it until parameters + binary operations is exactly op.

    nodes: the parameters, the asked one first; each refers only to later ones, and all but the first are referred to.
    """

    def __init__(self, dice, op, hard):
        self.dice, self.hard = dice, hard
        self.totals = 2  # a world has places for two totals of each of its plans
        self.nodes, self.open, self.rest = [], [], op
        root = self._new(op, 0.4)
        self.rest -= self._price(root)
        self.open.append(root)
        while self.open:
            node = self.open.pop(-1 if dice.chance(0.85) else dice.below(len(self.open)))
            self.nodes.append(node)
            if node.role == TOTAL:
                self._expand(node)
            elif self.rest and (not self.open or dice.chance(0.7)):
                self._define(node)

    def _price(self, node):
        # a total pays for its summands and their operations at once: n - 1 additions, with averages n products too
        return 1 if node.role != TOTAL else node.slot * (4 if self.hard else 2)

    def _new(self, spare, p_total):
        """A new parameter that costs at most `spare`; a total's slot holds its number of kinds."""
        price = 4 if self.hard else 2
        if self.totals and spare >= price and self.dice.chance(p_total):
            self.totals -= 1
            return Node(TOTAL, slot=1 + self.dice.below(min(3, spare // price)))
        return Node(AVERAGE if self.hard and self.dice.chance(0.3) else COUNT)

    def _expand(self, total):
        """Give a total its summands."""
        total.joined, roles = ("products", (COUNT, AVERAGE)) if self.hard else ("sum", (COUNT,))
        total.refs = [Node(role, total, slot) for slot in range(total.slot) for role in roles]
        self.open += total.refs

    def _define(self, node):
        """Draw what a parameter depends on, within the rest of op."""
        dice = self.dice
        while True:
            node.operation, node.joined, count = dice.pick(FORMS)
            spare, totals = self.rest - (node.operation != "") - (count - 1), self.totals
            if spare < 0 or spare < count - len(self.open):
                continue
            refs, new = [], []
            while len(refs) < count and spare >= 0:
                known = [n for n in self.open if n not in refs]
                if known and dice.chance(0.25 if spare else 1):
                    refs.append(dice.pick(known))  # still undefined, so it cannot depend on this node
                    continue
                new.append(self._new(spare, 0.2))
                refs.append(new[-1])
                spare -= self._price(new[-1])
            if spare >= 0:
                self.rest, node.refs = spare, refs
                self.open += new
                return
            self.totals = totals

    def draw_numbers(self):
        """Draw literals and compute every value; False if one is not in 1..9999."""
        for node in reversed(self.nodes):
            if not node.refs:
                node.k = node.value = 1 + self.dice.below(LARGEST_LITERAL)
                continue
            if node.joined == "difference":
                node.refs = sorted(node.refs, key=lambda ref: -ref.value)
            value = combine(node.joined, [ref.value for ref in node.refs])
            if node.operation == "plus":
                node.k = 1 + self.dice.below(LARGEST_LITERAL)
                value += node.k
            elif node.operation == "times":
                largest = min(LARGEST_LITERAL, LARGEST_VALUE // max(value, 1))
                node.k = 2 + self.dice.below(largest - 1) if largest >= 2 else 0
                value *= node.k
            if not 1 <= value <= LARGEST_VALUE:
                return False
            node.value = value
        return True

    def hang_on(self, others):
        """Put a parameter of another plan in the place of one of this plan's constants; its numbers must be redrawn."""
        leaves = [n for n in self.nodes[1:] if not n.refs and n.home is None]
        if leaves:
            leaf = self.dice.pick(leaves)
            outside = others[0] if self.dice.chance(0.5) else self.dice.pick(others)  # nothing refers to others[0] yet
            for node in self.nodes:
                node.refs = [outside if ref is leaf else ref for ref in node.refs]
            self.nodes.remove(leaf)


def combine(joined, values):
    """The sum, difference or sum of products of a list of numbers."""
    if joined == "difference":
        return values[0] - values[1]
    if joined == "products":
        return sum(count * average for count, average in zip(values[::2], values[1::2]))
    return sum(values)


def draw_plan(dice, op, hard, others=None):
    """A Plan with numbers; `others` are parameters of another plan on which it may hang."""
    while True:
        plan = Plan(dice, op, hard)
        if others:
            plan.hang_on(others)
        for _ in range(5):
            if plan.draw_numbers():
                return plan


class Names:
    """The names of one problem: a theme, its kinds of things, and as many places as a text of some length needs."""

    def __init__(self, dice, length, name_words):
        group, unit, places, kinds = dice.pick(THEMES)
        places, kinds = [[ID[word] for word in words] for words in (places, kinds)]
        if name_words == 2:
            # few adjectives, so that many other places share one with the place that is asked about
            count = 12 + length / 18
            first = dice.some(PLACE_FIRST, min(len(PLACE_FIRST), max(3, math.ceil(count / len(places)))))
            second = dice.some(places, min(len(places), math.ceil(count / len(first))))
            places = [(a, b) for a in first for b in second]
            kinds = [(a, b) for a in dice.some(KIND_FIRST, 3) for b in dice.some(kinds, 3)]
        else:
            places, kinds = [(b,) for b in places], [(b,) for b in kinds]
        self.places, self.taken = [places[i] for i in dice.rng.permutation(len(places)).tolist()], 0
        self.kinds = dice.some(kinds, KINDS)
        number, average, total = ids_of("the number of"), ids_of(f"the average {unit} of"), ids_of("the total")
        self.start = {COUNT: tuple(number), AVERAGE: tuple(average)}
        self.totals = tuple(total + [ID["number"], ID["of"], ID[group]]), tuple(total + ids_of(f"{unit} of {group}"))

    def take(self, count):
        """The next `count` places, a list of tuples of token ids."""
        self.taken += count
        return self.places[self.taken - count : self.taken]


class World:
    """Four places x five kinds, and a place of its own for every total: here plans get their names."""

    def __init__(self, dice, names):
        self.dice, self.names, self.pairs = dice, names, 0
        free = [(place, kind) for place in names.take(OPEN_PLACES) for kind in names.kinds]
        self.free = {COUNT: free, AVERAGE: free.copy()}

    def settle(self, plan):
        """Name every node of a plan. Returns False, with the plan unusable, if the world is too full for it."""
        names, kinds = self.names, {}
        for node in plan.nodes:
            if node.role == TOTAL:
                # closed world: a total's place is its own, so nothing can add to it later
                node.place, kinds[node] = names.take(1)[0], self.dice.some(names.kinds, node.slot)
                node.name = names.totals[node.joined == "products"] + (IN, *node.place)
                continue
            if node.home is not None:
                node.place, kind = node.home.place, kinds[node.home][node.slot]
            else:
                free = self.free[node.role]
                if not free:
                    return False
                i = self.dice.below(len(free))
                (node.place, kind), free[i] = free[i], free[-1]
                free.pop()
            self.pairs += 1
            node.name = names.start[node.role] + kind + (IN, *node.place)
        return True


UNKNOWN = ids_of("is positive .")
JOINED = {"one": [], "sum": ids_of("the sum of"), "difference": ids_of("the difference of")}


def sentence(node):
    """The tokens of a named node's definition, a list of int; a total has none and gives []."""
    if node.role == TOTAL:
        return []
    if node.operation == "unknown":
        return [*node.name, *UNKNOWN]
    tokens = [*node.name, EQUALS]
    if not node.refs:
        return tokens + LITERALS[node.k] + [DOT]
    if node.operation:
        tokens += LITERALS[node.k] + [ID[node.operation]]
    tokens += JOINED[node.joined]
    for ref in node.refs:
        tokens += ref.name
        tokens.append(AND)
    tokens[-1] = DOT
    return tokens


def hash_sentences(sentences):
    """One hash for a set of sentences (lists of token ids) in any order: uint64 ()."""
    h = 0
    for tokens in sorted(sentences):
        for token in tokens:
            h = (h * 0x100000001B3 + token) & 0xFFFFFFFFFFFFFFFF  # exact in Python, on every machine
    return splitmix64(np.array([h], dtype=np.uint64))[0]


# reading: everything below works on tokens alone


# what a sentence says of a parameter: as in Node, but refs are names (tuples)
Fact = collections.namedtuple("Fact", "operation k joined refs")


def number(tokens):
    """The tokens of digits -> int."""
    return int("".join(str(t - ZERO) for t in tokens))


def numbers_in(ids):
    """The numbers that stand in a text before its solution or answer, a list of int. ids: a list of int."""
    text = itertools.takewhile(lambda token: token not in (ANSWER, SOLUTION), ids)
    runs = itertools.groupby(text, lambda token: ZERO <= token < ZERO + 10)
    return [number(run) for is_digit, run in runs if is_digit]


def read_rhs(rhs):
    """The tokens of a sentence behind <name> equals, without the dot -> Fact."""
    if rhs == UNKNOWN[1:-1]:  # its "is" stands where the others have EQUALS
        return Fact("unknown", 0, "one", [])
    i = 0
    while i < len(rhs) and ZERO <= rhs[i] < ZERO + 10:
        i += 1
    k, operation, joined = number(rhs[:i]) if i else 0, "", "one"
    if i == len(rhs):
        return Fact("", k, "one", [])
    if i:
        operation, i = WORDS[rhs[i]], i + 1
    for kind in ("sum", "difference"):
        if rhs[i : i + 3] == JOINED[kind]:
            joined, i = kind, i + 3
    refs = [tuple(run) for is_and, run in itertools.groupby(rhs[i:], lambda token: token == AND) if not is_and]
    return Fact(operation, k, joined, refs)


class Reading:
    """
    A prompt as a person would read it. ids: its token ids, a list of int, up to the first "answer:" or "solution:".

    asked: the name in the question; given: None, or (name, value) in a reverse problem;
    lines: {name: the tokens behind it};
    needed: {name: Fact} of what the question depends on, what a fact refers to before it.
    """

    def __init__(self, ids):
        q = ids.index(ASKS)
        start = max((i + 1 for i in range(q) if ids[i] == DOT), default=0)
        question, text = ids[start:q], ids[:start] + ids[q + 1 :]
        self.lines, first = {}, 0
        for i, token in enumerate(text):
            if token == DOT:
                while text[first] in SKIPPED:
                    first += 1
                cut = first
                while text[cut] not in (EQUALS, IS):
                    cut += 1
                self.lines[tuple(text[first:cut])] = text[cut + 1 : i]
                first = i + 1
        what, self.given = question.index(ID["what"]), None
        self.asked = tuple(question[what + 2 :])
        if what:  # if <name> equals <value>, what is <name>
            cut = question.index(EQUALS)
            self.given = tuple(question[1:cut]), number(question[cut + 1 : what - 1])
        self.needed, self.depths = {}, {}
        self._visit(self.given[0] if what else self.asked)

    def _visit(self, name):
        """Add a parameter to `needed`, after all it refers to."""
        if name in self.needed:
            return
        if name[1] == ID["total"]:
            place, products = name[name.index(IN) :], name[2] != ID["number"]
            refs = [n for n in self.lines if n[-len(place) :] == place and n[1] == ID["number"]]
            if products:
                average = (ID["the"], ID["average"], *name[2:4])
                refs = [ref for n in refs for ref in (n, average + n[3:])]
            fact = Fact("", 0, "products" if products else "sum", refs)
        else:
            fact = read_rhs(self.lines[name])
        for ref in fact.refs:
            self._visit(ref)
        self.needed[name] = fact
        self.depths[name] = 1 + max((self.depths[ref] for ref in fact.refs), default=0)

    def sentences(self):
        """The sentences that the question depends on, without their openers: a list of lists of token ids."""
        words = {name: IS if fact.operation == "unknown" else EQUALS for name, fact in self.needed.items()}
        return [[*n, words[n], *self.lines[n], DOT] for n in self.needed if n in self.lines]

    def measures(self):
        """What the question depends on, counted: a dict of int, as in GSMInfinite.measures."""
        parameters, operations = len(self.needed), sum(map(operations_of, self.needed.values()))
        counts = {"op": parameters + operations, "parameters": parameters, "operations": operations}
        counts |= {"depth": max(self.depths.values()), "reverse": int(self.given is not None)}
        return counts | {"hard": int(any(name[1] == ID["average"] for name in self.needed))}

    def solve(self):
        """Returns (answer, lines of the worked solution, each a list of token ids)."""
        forms, lines = linear_forms(self.needed), []
        for name, fact in self.needed.items():
            a, b = forms[name]
            steps = [linear_tokens(a, b)]
            if fact.refs and not a and (working := show_working(fact, forms)) is not None:
                steps.insert(0, working)
            lines.append([*name, *(token for step in steps for token in (EQUALS, *step)), DOT])
        if self.given is None:
            return forms[self.asked][1], lines
        name, value = self.given
        a, b = forms[name]
        lines.append([*linear_tokens(a, b), EQUALS, *digits(value), DOT, X, EQUALS, *digits((value - b) // a), DOT])
        return (value - b) // a, lines


def linear_forms(facts):
    """
    Every parameter as a x + b, x being the one that is unknown. facts: {name: Fact or Node}, refs first.
    Returns {name: (a, b)}, or None where x would be multiplied by itself.
    """
    forms = {}
    for name, fact in facts.items():
        a, b = (1, 0) if fact.operation == "unknown" else (0, fact.k)
        if fact.refs:
            refs = [forms[ref] for ref in fact.refs]
            slopes, values = [r[0] for r in refs], [r[1] for r in refs]
            if fact.joined == "products":
                if any(p and q for p, q in zip(slopes[::2], slopes[1::2])):
                    return None
                crossed = zip(slopes[::2], slopes[1::2], values[::2], values[1::2])
                a = sum(p * w + q * v for p, q, v, w in crossed)
            else:
                a = combine(fact.joined, slopes)
            b = combine(fact.joined, values)
            a, b = (fact.k * a, fact.k * b) if fact.operation == "times" else (a, b + fact.k)
        forms[name] = a, b
    return forms


def linear_tokens(a, b):
    """a x + b as token ids, without a factor of one or a term of zero; never starts with a minus."""
    if not a:
        return digits(b)
    times_x = [*(digits(abs(a)) if abs(a) > 1 else []), X]
    if a < 0:
        return [*digits(b), ID["minus"], *times_x]
    return times_x + ([ID["plus" if b > 0 else "minus"], *digits(abs(b))] if b else [])


def show_working(fact, forms):
    """The right-hand side with numbers for names, as token ids; None if it is one number or depends on x."""
    if any(forms[ref][0] for ref in fact.refs) or not operations_of(fact):
        return None
    words = {"sum": "plus", "difference": "minus", "products": "plus", "one": "plus"}
    tokens = []
    for i, ref in enumerate(fact.refs):
        if i:
            tokens.append(ID["times" if fact.joined == "products" and i % 2 else words[fact.joined]])
        tokens += digits(forms[ref][1])
    if fact.operation and len(fact.refs) > 1:
        tokens = [ID["("], *tokens, ID[")"]]
    return [*digits(fact.k), ID[fact.operation], *tokens] if fact.operation else tokens


class Problem:
    """
    A question, its sentences and their origin: "needed", "distractor" (of the question's world) or "noise".

    sentences: list of lists of token ids, not shuffled yet; questioned: the question's tokens; answer: int.
    """

    def __init__(self, dice, op, hard, reverse):
        self.dice, self.op, self.hard = dice, op, hard
        self.plan = draw_plan(dice, op, hard)
        root = self.plan.nodes[0]
        self.leaf = self._hide() if reverse else None
        self.impossible = reverse and not self.leaf
        self.answer = self.leaf.value if self.leaf else root.value

    def _hide(self):
        """Make one constant the unknown of a reverse problem; returns it, or None where none will do."""
        root, leaf = self.plan.nodes[0], self.dice.pick([n for n in self.plan.nodes if not n.refs])
        leaf.operation = "unknown"
        forms = linear_forms({node: node for node in reversed(self.plan.nodes)})
        small = forms is not None and all(max(map(abs, form)) <= LARGEST_VALUE for form in forms.values())
        # the slope must not vanish, and the answer must not stand in the question
        return leaf if small and forms[root][0] and forms[root] != (1, 0) else None

    def name(self, names):
        """Give the question its words; returns the hash of its sentences, or None where that cannot be done."""
        if self.impossible:
            return None
        names.taken = 0  # by an earlier problem that was rejected
        self.names, self.world = names, World(self.dice, names)
        if not self.world.settle(self.plan):
            return None
        root = self.plan.nodes[0]
        self.sentences = [tokens for node in self.plan.nodes if (tokens := sentence(node))]
        self.origin = ["needed"] * len(self.sentences)
        self.questioned = ids_of("what is")
        if self.leaf:
            self.questioned = [ID["if"], *root.name, EQUALS, *digits(root.value), ID[","], *self.questioned]
        self.questioned += [*(self.leaf or root).name, ASKS]
        return hash_sentences(self.sentences)

    def fill(self, length):
        """
        Add what the question does not need until question and sentences have `length` tokens.

        not in the paper: the rest of the world and the noise are other questions' sentences, drawn exactly like the
        needed ones, so that nothing but the question tells them apart. Half of them hang on the plan before.
        """
        dice, origin, world, others = self.dice, "distractor", self.world, self.plan.nodes
        left = length - len(self.questioned) - sum(map(len, self.sentences))
        low, high = max(1, self.op - 1), min(MAX_OP, self.op + 1)
        tokens = []
        while len(tokens) <= left:
            plan = draw_plan(dice, low + dice.below(high - low + 1), self.hard, others if dice.chance(0.5) else None)
            if world.pairs >= WORLD_PAIRS or not world.settle(plan):
                origin, world = "noise", World(dice, self.names)
                world.settle(plan)
            loose = []  # what nothing refers to yet
            for node in reversed(plan.nodes):  # what is referred to comes first, so one can stop anywhere
                tokens = sentence(node)
                if len(tokens) > left:
                    break
                left -= self._add(tokens, origin)
                loose = [other for other in loose if other not in node.refs] + [node]
            others = plan.nodes
        self._fit(left, loose)

    def text(self, rng, question):
        """The token ids of the whole, its sentences shuffled, a list of int. question: "first" or "last"."""
        order = rng.permutation(len(self.sentences)).tolist()
        text = [token for i in order for token in self.sentences[i]]
        return self.questioned + text if question == "first" else text + self.questioned

    def _fit(self, left, loose):
        """Fill the last `left` tokens, too few for the next sentence of a plan, with sentences about what is loose."""
        world = World(self.dice, self.names)
        while True:
            plan = draw_plan(self.dice, 1, False)
            world.settle(plan)
            (node,) = plan.nodes
            for count in range(min(3, len(loose)), -1, -1):
                node.refs, node.joined = loose[len(loose) - count :], "sum" if count > 1 else "one"
                if len(sentence(node)) <= left:
                    break
            else:
                node.k %= 10  # one digit
                if not node.k or len(sentence(node)) > left:
                    return self._open(left)
            left -= self._add(sentence(node), "noise")
            loose = loose[: len(loose) - len(node.refs)] + [node]

    def _add(self, tokens, origin):
        if tokens:
            self.sentences.append(tokens)
            self.origin.append(origin)
        return len(tokens)

    def _open(self, count):
        """Start random sentences with `count` openers in all: the length is exact, and they tell nothing."""
        for _ in range(count):
            i = self.dice.below(len(self.sentences))
            self.sentences[i] = [ID[self.dice.pick(OPENERS)], *self.sentences[i]]


def lengths_by_chunk(min_length, max_length, L, tail):
    """The range of lengths whose `tail` scored tokens lie in one chunk of L, for each chunk: a list of (low, high).

    Raises ValueError if no length does.
    """
    ranges = []
    for chunk in range(1, max_length // L + 1):
        low, high = max(min_length, chunk * L + 1), min(max_length, (chunk + 1) * L - tail + 1)
        if low <= high:
            ranges.append((low, high))
    if not ranges:
        text = f"{tail} tokens from the end of the text on must lie in one window, and at no length they do"
        raise ValueError(f"--L is {L}: {text}; change it, --min-length or --max-length")
    return ranges


def one_of(rng, chunks):
    """One of the ranges (low, high), drawn by how many lengths it holds."""
    sizes = np.array([high - low + 1 for low, high in chunks])
    return chunks[rng.choice(len(sizes), p=sizes / sizes.sum())]


def lay_out(rows, T, fill):
    """(prompt, answer) pairs of token ids -> x, y, m (B, T): the answers are scored, `fill` follows them."""
    seq, m = np.full((len(rows), T + 1), fill), np.zeros((len(rows), T), dtype=bool)
    for row, (prompt, answer) in enumerate(rows):
        seq[row, : len(prompt) + len(answer)] = prompt + answer
        m[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = True
    return as_tensors(seq[:, :-1], seq[:, 1:], m)


class GSMInfinite:
    """
    A word problem whose few necessary sentences stand among many of the same kind (arXiv:2605.26099).

    A text defines parameters, "the number of K in P", in any order; "the total number of ..." in a place is never
    defined: it is the sum over the kinds that the text mentions there (`hard`: of counts x averages). op is exactly
    the number of necessary parameters + binary operations; op 1 is one constant that is asked for. A `reverse` problem
    gives the value of the last parameter and asks for a constant. With op=4, two-word names, forward:

        x   what is the number of old owls in iron grove ? ... the number of old owls in iron grove equals 1 2 plus
            the number of tiny hares in iron fjord . ... now the number of tiny hares in iron fjord equals the number
            of old moles in misty heath . ... answer: 4 5
        y   (scored)                                  4   5 <end>

    A row's length, drawn uniformly, counts its tokens up to and including "answer:" (or "solution:"), which lies
    behind the first window of L tokens and in the same window in all rows of a batch. At most 4 digits, <end> and as
    much <pad> as it takes follow.
    """

    name, t = "gsm", None

    def __init__(
        self, op=8, min_op=1, min_length=2001, max_length=3300, L=2000, name_words=2, mode="both", difficulty="both",
        question="first", worked=False,
    ):  # fmt: skip
        """
        op, min_op: largest and smallest op, uniform between them; min_op=0 is op itself. min_length, max_length: of a
        row, see above. L: window in tokens. name_words: 1 or 2. mode: forward, reverse or both; difficulty: medium,
        hard or both. question: first or last. worked: write the solution before the answer and score it too.
        Where op is too small for reverse (below 3) or hard (below 4), "both" means the other one. Raises ValueError.
        """
        self.op, self.min_op, self.min_length, self.max_length, self.L = op, min_op or op, min_length, max_length, L
        self.name_words, self.mode, self.difficulty = name_words, mode, difficulty
        self.question, self.worked = question, worked
        self._check()
        self.vocab_size = len(WORDS)
        self.tail = ANSWER_TOKENS + (self._longest_solution() if worked else 0)
        self.context = (min_length - 1) // L * L  # slept over in every row
        self.T = max_length + self.tail - 1
        self.prompt, self.answer_tokens = "solution:" if worked else "answer:", self.tail
        self.chunks = lengths_by_chunk(min_length, max_length, L, self.tail)

    def _check(self):
        """Refuse sizes that make no sense."""
        low = self.min_op
        choices = {"mode": ("forward", "reverse", "both"), "difficulty": ("medium", "hard", "both")}
        for flag, values in (choices | {"question": ("first", "last"), "name_words": (1, 2)}).items():
            if getattr(self, flag) not in values:
                allowed = " or ".join(map(str, values))
                raise ValueError(f"{flag_of(flag)} is {getattr(self, flag)!r}: use {allowed}")
        if not 1 <= self.op <= MAX_OP:
            raise ValueError(f"--op is {self.op}: use 1 to {MAX_OP}")
        if not 1 <= low <= self.op:
            raise ValueError(f"--min-op is {self.min_op}: use 1 to {self.op} (--op), or 0 for --op alone")
        if self.mode == "reverse" and low < REVERSE_FROM:
            raise ValueError(f"--mode reverse needs --min-op {REVERSE_FROM} or more, not {low}: raise it or use both")
        if self.difficulty == "hard" and low < AVERAGES_FROM:
            raise ValueError(f"--difficulty hard needs --min-op {AVERAGES_FROM} or more, not {low}: or use both")
        if self.min_length < (needs := self.shortest()):
            raise ValueError(f"--min-length is {self.min_length}: problems of op {self.op} can need {needs} tokens")
        if not self.min_length <= self.max_length <= self.longest():
            text = f"use {self.min_length} (--min-length) to {self.longest()}"
            raise ValueError(f"--max-length is {self.max_length}: {text}, the most that --name-words can fill")
        if not 1 <= self.L < self.min_length:
            raise ValueError(
                f"--L is {self.L}: use 1 to {self.min_length - 1}, the answer must lie behind the first window"
            )

    def shortest(self):
        """A length, int, into which every problem fits."""
        name = 4 + 2 * self.name_words + (self.difficulty != "medium" and self.op >= AVERAGES_FROM)
        # the longest are chains: every parameter is mentioned and defined once; last, a constant of two digits
        forward = self.op * (2 * name + 2) + 6
        return forward if self.mode == "forward" or self.op < REVERSE_FROM else forward + name + 6

    def longest(self):
        """The largest length, int, for which there are enough names."""
        return 32_768 if self.name_words == 2 else 192

    def _longest_solution(self):
        # a line is a name, "equals", a value of 4 tokens (with x: 10) and a dot; an operation adds at most 12 tokens
        line = 5 + 2 * self.name_words + (6 if self.mode == "forward" else 12)
        return 1 + self.op * line + (0 if self.mode == "forward" else 24)

    def draw(self, rng, split, B, chunks=None):
        """B different problems as (Problem, length); the texts are filled.

        Lengths lie in one of the chunks, a list of (low, high), self.chunks by default.
        """
        dice, problems, seen = Dice(rng), [], set()
        # not in the paper: a batch with several chunks to choose from takes one, by how many lengths it holds
        low, high = one_of(rng, chunks or self.chunks)
        for length in rng.integers(low, high + 1, B).tolist():
            op = self.min_op + dice.below(self.op - self.min_op + 1)
            reverse = op >= REVERSE_FROM and (self.mode == "reverse" or self.mode == "both" and dice.chance(0.5))
            hard = op >= AVERAGES_FROM and (self.difficulty == "hard" or self.difficulty == "both" and dice.chance(0.5))
            names = Names(dice, length, self.name_words)
            for _ in range(20_000):
                problem = Problem(dice, op, hard, reverse)
                h = problem.name(names)
                if h is not None and h not in seen and in_split(h, split):
                    break
            else:
                raise ValueError(f"--op {op} has too few problems for batches of {B} in the {split} split: raise it")
            seen.add(h)
            problem.fill(length - 1)
            problems.append((problem, length))
        return problems

    def batch(self, seed, split, s, B):
        """Batch number s: x, y int64 and m bool, torch CPU tensors (B, T)."""
        rng, rows = batch_rng(seed, split, s), []
        for problem, _ in self.draw(rng, split, B):
            text = problem.text(rng, self.question)
            after = [ANSWER, *digits(problem.answer), END]
            if self.worked:
                after = [SOLUTION, *(token for line in Reading(text).solve()[1] for token in line), *after]
            rows.append((text + after[:1], after[1:]))
        return lay_out(rows, self.T, PAD)

    def _read(self, ids):
        """A row of x, (T,) -> Reading of its prompt."""
        ids = ids.tolist()
        return Reading(ids[: ids.index(SOLUTION if SOLUTION in ids else ANSWER)])

    def problem_hashes(self, x):
        """The hash of every row's necessary sentences, recomputed from the tokens. x: (B, T) int64 -> uint64 (B,)."""
        return np.array([hash_sentences(self._read(row).sentences()) for row in x], dtype=np.uint64)

    def measures(self, x):
        """
        What the problems of x (B, T) ask for, read from the tokens: dict of int64 arrays (B,). "parameters" that the
        question depends on, binary "operations" in their definitions, "op", their sum, "depth" (parameters on the
        longest chain of references), "reverse" and "hard" (0 or 1).
        """
        rows = [self._read(row).measures() for row in x]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def decode(self, ids):
        """Token ids (any 1-d sequence) -> str: words with spaces between them, the digits of a number without."""
        words = [WORDS[int(i)] for i in ids]
        return re.sub(r"(?<=\d) (?=\d)| (?=[.,?)])|(?<=\() ", "", " ".join(words))

    def plain_text(self, ids):
        """Token ids -> str for another tokenizer: as decode, with capitals, without <pad> and <end>."""
        text = self.decode([i for i in ids if i not in (PAD, END)])
        return re.sub(r"(^|[.?] )([a-z])", lambda match: match[1] + match[2].upper(), text)

    def encode(self, text):
        """Text of this grammar -> its token ids, a list of int. Raises ValueError that names the words it has not."""
        return look_up(re.findall(r"<\w+>|[a-z]+:|[a-z]+|\d|\S", text.lower()), ID, self.name)

    def by_op(self, op, values):
        """Sort one value per row by op. op, values: (B,) arrays -> dict of arrays."""
        return {f"op {i}": values[op == i] for i in np.unique(op)}

    def _answers(self, x, y, m):
        """Where the answer's digits and <end> are predicted, bool (B, T), and the answers, int64 (B,)."""
        x, y, m = as_arrays(x, y, m)
        part = m & (np.cumsum(x == ANSWER, axis=1) > 0)
        labels = [number([t for t in row[where] if t != END]) for row, where in zip(y, part)]
        return part, np.array(labels, dtype=np.int64)

    def score(self, x, y, m, pred):
        """All four (B, T) -> {"op k": bool array}: is every scored token right, hence the answer exact?

        With a worked solution that is all of it too: behind the true solution the answer would only have to be copied.
        """
        return self.by_op(self.measures(x)["op"], ~(m & (pred != y)).any(1).cpu().numpy())

    def losses(self, x, y, m, ce):
        """The same keys as score -> {"loss": mean of ce (B, T) over the answer's tokens, in nats}."""
        return self.mean_losses(x, self._answers(x, y, m)[0], ce.cpu().numpy())

    def mean_losses(self, x, part, ce):
        """The mean of ce where `part`, arrays (B, T'), for each op of the problems x, as in losses."""
        op = self.measures(x)["op"]
        total, count = self.by_op(op, np.where(part, ce, 0).sum(axis=1)), self.by_op(op, part.sum(axis=1))
        return {key: {"loss": float(total[key].sum() / count[key].sum())} for key in total}

    def chance(self, x, y, m):
        """The same keys as score -> accuracy of guessing uniformly among the integers that an answer can be (1..99 or
        1..9999), of the commonest answer of that op, and of a number of the text at random.
        """
        labels = self._answers(x, y, m)[1]
        written = [numbers_in(row) for row in x.tolist()]
        copied = np.array([numbers.count(label) / len(numbers) for numbers, label in zip(written, labels)])
        facts = self.measures(x)
        op, literal = facts["op"], (facts["reverse"] == 1) | (facts["op"] <= 2)
        copied = self.by_op(op, copied)
        guess = self.by_op(op, np.where(literal, 1 / LARGEST_LITERAL, 1 / LARGEST_VALUE))
        levels = {}
        for key, answers in self.by_op(op, labels).items():
            levels[key] = {
                "uniform": float(guess[key].mean()),
                "majority": float(np.bincount(answers).max() / len(answers)),
                "literal": float(copied[key].mean()),
            }
        return levels

    def explain(self, x, y, m):
        """One example, x, y, m (T,), as lines for a person: the text, what matters in it, the way to the answer."""
        reading = self._read(x)
        answer, solution = reading.solve()
        n = reading.measures()
        counts = f"{n['parameters']} parameters + {n['operations']} operations"
        lines = [f"  op {n['op']} = {counts}, depth {n['depth']}"]
        end = int(m.nonzero()[0]) + 1
        lines += textwrap.wrap(self.plain_text(x[:end].tolist()), 110, initial_indent="  ", subsequent_indent="  ")
        lines += ["  needed:"] + ["    " + self.plain_text(tokens) for tokens in reading.sentences()]
        lines += ["  step by step:"] + ["    " + self.decode(tokens) for tokens in solution]
        return lines + [f"  then: {self.decode(x[end - 1 : end])} [{self.decode(y[m])}], which is {answer}"]


def read_tokenizer(folder):
    """The tokenizer of a public checkpoint, folder/tokenizer.json. Raises ValueError if it cannot be read."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("text for a public checkpoint needs one more package: pip install tokenizers") from None
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        raise ValueError(f"no {path}: download the checkpoint's folder with its tokenizer")
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{path} is no tokenizer ({error}): download it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


TEXT_END = "<|endoftext|>"


class GSMText:
    """
    GSM-Infinite as plain text, in the ids of a public checkpoint's tokenizer; answer only. Batches as GSMInfinite's.

        x   What is the number of old owls in iron grove? The number of ... hares in iron fjord. Answer: 4 5
        y   (scored)                                                                          4   5 <|endoftext|>

    Lengths and L count the tokenizer's tokens. folder: holds its tokenizer.json; vocab_size: the model's; sizes: the
    arguments of GSMInfinite, a dict. Raises ValueError as GSMInfinite does, and for a tokenizer that does not fit.
    """

    name, prompt, t = "gsm", " Answer:", None

    def __init__(self, folder, vocab_size, sizes):
        if sizes["worked"]:
            raise ValueError("--worked is not for public checkpoints: they learn the answer alone")
        self.tokenizer, self.vocab_size = read_tokenizer(folder), vocab_size
        self.min_length, self.max_length, self.L = sizes["min_length"], sizes["max_length"], sizes["L"]
        self.end = self.tokenizer.token_to_id(TEXT_END)
        if self.end is None or self.tokenizer.get_vocab_size() > vocab_size:
            raise ValueError(f"{folder}: its tokenizer has no {TEXT_END}, or more tokens than the model's {vocab_size}")
        self.tail = 1 + max(map(len, self._encode([f" {value}" for value in range(LARGEST_VALUE + 1)])))
        self.chunks = lengths_by_chunk(self.min_length, self.max_length, self.L, self.tail)
        self.answer_tokens, self.T = self.tail, self.max_length + self.tail - 1
        self.context = (self.min_length - 1) // self.L * self.L  # slept over in every row
        # how many of the tokenizer's tokens are one of ours, on problems of about this length
        length = 192 if sizes["name_words"] == 1 else self.min_length
        self.ours = GSMInfinite(**sizes | {"min_length": length, "max_length": length, "L": length - 1})
        rng = np.random.default_rng(0)
        texts = [p.text(rng, self.ours.question) for p, _ in self.ours.draw(rng, "val", 32)]
        self.rate = np.mean([len(self._text_ids(text)) / (len(text) + 1) for text in texts])
        low, high = self.min_length / self.rate, self.max_length / self.rate
        fitting = {"min_length": math.floor(low), "max_length": math.ceil(high), "L": math.floor(low) - 1}
        self.ours = GSMInfinite(**sizes | fitting)

    def _encode(self, texts):
        """Texts -> lists of the tokenizer's ids."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def _text_ids(self, text):
        """Our ids of a text -> the tokenizer's ids of it and the prompt."""
        return sum(self._encode([self.ours.plain_text(text), self.prompt]), [])

    def batch(self, seed, split, s, B):
        """Batch number s: x, y int64 and m bool, torch CPU tensors (B, T)."""
        rng = batch_rng(seed, split, s)
        chunk, rows, seen = one_of(rng, self.chunks), [], set()
        for _ in range(200):
            if len(rows) < B:
                rows += self._rows(rng, split, B - len(rows), chunk, seen)
        if len(rows) < B:
            raise ValueError(
                f"too few problems have {chunk[0]} to {chunk[1]} tokens: lower --min-length or raise --max-length"
            )
        return lay_out(rows, self.T, self.end)

    def _rows(self, rng, split, B, chunk, seen):
        """Up to B rows with a length in the chunk's range that were not seen before: lists of (ids, answer's ids)."""
        low, high = (min(max(round(n / self.rate), self.ours.min_length), self.ours.max_length) for n in chunk)
        problems = self.ours.draw(rng, split, B, [(low, high)])
        prompts = [self._text_ids(problem.text(rng, self.ours.question)) for problem, _ in problems]
        answers = self._encode([f" {problem.answer}" for problem, _ in problems])
        rows = []
        for ids, answer, (problem, _) in zip(prompts, answers, problems):
            key = hash_sentences(problem.sentences)
            if chunk[0] <= len(ids) <= chunk[1] and key not in seen:
                seen.add(key)
                rows.append((ids, [*answer, self.end]))
        return rows

    def decode(self, ids):
        """Token ids (any 1-d sequence) -> str."""
        return self.tokenizer.decode([int(i) for i in ids]).strip()

    def encode(self, text):
        """Any text -> its token ids, a list of int."""
        return self._encode([text])[0]

    def in_our_tokens(self, x, y, m):
        """The batch that GSMInfinite would have made of these problems: x, y, m, torch CPU tensors."""
        rows = []
        for ids, target, scored in zip(x, y, m):
            text = self.decode(ids[: int(scored.nonzero()[0]) + 1]).removesuffix(self.prompt)
            answer = self.decode(target[scored]).replace(TEXT_END, "")
            rows.append((self.ours.encode(text) + [ANSWER], [*digits(int(answer)), END]))
        return lay_out(rows, max(len(text) + len(answer) for text, answer in rows) - 1, PAD)

    def score(self, x, y, m, pred):
        """All four (B, T) -> {"op k": bool array}: is every scored token right, hence the answer exact?"""
        op = self.ours.measures(self.in_our_tokens(x, y, m)[0])["op"]
        return self.ours.by_op(op, ~(m & (pred != y)).any(1).cpu().numpy())

    def losses(self, x, y, m, ce):
        """The same keys as score -> {"loss": mean of ce (B, T) over the answer's tokens, in nats}."""
        return self.ours.mean_losses(self.in_our_tokens(x, y, m)[0], *as_arrays(m, ce))

    def chance(self, x, y, m):
        """The same keys as score -> the accuracies of guessing, see GSMInfinite.chance."""
        return self.ours.chance(*self.in_our_tokens(x, y, m))

    def explain(self, x, y, m):
        """One example, x, y, m (T,), as lines for a person, see GSMInfinite.explain."""
        return self.ours.explain(*(a[0] for a in self.in_our_tokens(x[None], y[None], m[None])))


# -----------------------------------------------------------------------------
# what every command line shares


def flag_of(name):
    """A field's name as it is typed: "min_op" -> "--min-op"."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag costs one line instead of the whole usage text."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def check_writable(path):
    """Raises ValueError if no file can be written there: found out before hours of work, not after."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder) or os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: give a file in a directory that exists and is yours")


def git_commit():
    """The commit of this code, "-dirty" if it was edited since; "unknown" outside a git checkout."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_json(path, how):
    """A JSON file that holds an object: a dict. Raises ValueError, which ends with `how` to mend it, if it does not."""
    try:
        with open(path) as f:
            found = json.load(f)
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path} ({error}): {how}") from None


@contextlib.contextmanager
def whole_file(path):
    """A temporary name to write under, renamed at the end: a crash or a full disk leaves the old file whole."""
    try:
        yield path + ".tmp"
        os.replace(path + ".tmp", path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise


def write_json(path, content):
    """Write JSON to a whole_file."""
    with whole_file(path) as name, open(name, "w") as f:
        json.dump(content, f, indent=1)
        f.write("\n")


# -----------------------------------------------------------------------------
# look at the data

TASKS = {"rule110": Rule110, "depo": Depo, "gsm": GSMInfinite}

# sizes a person can follow; the constructors' own defaults are the paper's. The keys are the constructors' arguments,
# and so the flags of a task; None: may be left out
EXAMPLE_SIZES = {
    "rule110": {"width": 12, "t": 4, "strings": 4, "ask": "bit"},
    "depo": {"nodes": 6, "hops": 3, "queries": 3, "name_tokens": 2, "min_nodes": 3, "t": None},
    "gsm": {
        "op": 6, "min_op": 0, "min_length": 260, "max_length": 300, "L": 256, "name_words": 2, "mode": "both",
        "difficulty": "both", "question": "first", "worked": False,
    },
}  # fmt: skip


def main():
    """Read the command line and print three examples."""
    text = "Print three examples of a task; scored tokens stand in [brackets]."
    parser = Parser(description=text)
    parser.add_argument("--task", choices=TASKS, default="rule110")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    defaults = {}  # tasks may share the name of a size
    for task, sizes in EXAMPLE_SIZES.items():
        for size, default in sizes.items():
            defaults.setdefault(size, {})[task] = default
    for size, of_task in defaults.items():
        flag, kind = flag_of(size), type(next(v for v in of_task.values() if v is not None))
        shown = {task: "left out" if default is None else default for task, default in of_task.items()}
        text = ", ".join(f"{task}: {default}" for task, default in shown.items()) + " unless given"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
    args = parser.parse_args()
    given = {size: v for size in defaults if (v := getattr(args, size)) is not None}
    for size in given:
        if size not in EXAMPLE_SIZES[args.task]:
            parser.error(f"{flag_of(size)} is not a size of {args.task}")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}: use 0 or more")
    try:
        if args.task == "depo" and "t" in given:
            given.setdefault("hops", 0)  # those of the examples are for depo without --t
        task = TASKS[args.task](**EXAMPLE_SIZES[args.task] | given)
        x, y, m = task.batch(args.seed, args.split, 0, 3)
    except ValueError as error:
        parser.error(str(error))
    lines = [f"{task.name}: {task.context} tokens of context, {task.T} in all, vocabulary {task.vocab_size}"]
    for i in range(3):
        lines += ["", f"{args.split} example {i + 1}, scored tokens in [brackets]", *task.explain(x[i], y[i], m[i])]
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough; Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
