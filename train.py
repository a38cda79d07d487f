"""Train a sleeping model on one of the tasks.

    python train.py --task depo --N 4                    a preset that fits the machine; results in out/depo-N4-s0
    python train.py --task depo --N 4 --resume           go on exactly where that run stopped
    python train.py --task rule110 --preset paper        the paper's sizes
    torchrun --standalone --nproc_per_node=2 train.py --task depo --N 4

The step is Algorithm 1 of arXiv:2605.26099 (sleep.py), summed over the batch and divided by the number of scored
tokens; Muon for the matrices of the blocks, AdamW for the rest. A run directory holds config.json (what ran, where,
which commit), log.jsonl (curves), ckpt.pt (to resume, and for eval.py) and result.json (the test scores).

Read next: test_all.py
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import itertools
import json
import math
import mmap
import multiprocessing
import os
import platform
import resource
import shlex
import shutil
import signal
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import EXAMPLE_SIZES, SPLITS, TASKS, Parser, flag_of, git_commit, read_json, whole_file, write_json
from eval import (
    FREE,
    LATER_FLAGS,
    algorithm_of,
    autocast,
    build_task,
    checkpoint_of,
    comparison_table,
    evaluate,
    load_weights,
    model_config,
    pick_device,
    read_checkpoint,
    read_log,
    sleep_config,
)
from kernels import pick_impl, version, why_not_triton
from model import FAST_MIXERS, PRETRAINED, Model, ModelConfig, init_weights, rope_table
from sleep import EVICTIONS, attention_span, blocks_of_passes, split_chunks

# -----------------------------------------------------------------------------
# what can be set


def flag(default, text):
    """A Config field with its --help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Everything that defines a run; every field is a flag, and a preset sets what the command line does not.

    None: left to the preset, not of this task, or not asked for.
    """

    task: str = flag("depo", "what is asked, see data.py")
    preset: str = flag(
        "auto", "paper, small (one GPU), tiny (laptop CPU, minutes); with --init-from paper, sliding, demo"
    )
    N: int = flag(4, "sleep passes over a window before it is evicted; 1 is the ordinary hybrid")
    seed: int = flag(0, "of weights and data; runs with different N and one seed see the same batches")
    L: int = flag(None, "window in tokens; must divide the task's context")
    # the task
    width: int = flag(None, "rule110: bits per string")
    t: int = flag(None, "rule110: steps of the automaton; depo, one-token names only: see --hops")
    strings: int = flag(None, "rule110: strings per problem")
    ask: str = flag("bit", "rule110: bit, each string's first bit, as in the paper, or row, all of its bits")
    nodes: int = flag(None, "depo: nodes on the longest cycle; the held-out cycles all have this length")
    hops: int = flag(None, "depo: asks for 1 to hops, and says which; with --t for 1 to t, or by default for t alone")
    queries: int = flag(None, "depo: questions per problem")
    name_tokens: int = flag(None, "depo: longest node name in tokens, 1 or 2")
    min_nodes: int = flag(None, "depo: shortest cycle in training")
    op: int = flag(None, "gsm: most parameters + operations that an answer needs, 1 to 10")
    min_op: int = flag(None, "gsm: fewest")
    min_length: int = flag(None, "gsm: shortest text in tokens")
    max_length: int = flag(None, "gsm: longest text in tokens")
    name_words: int = flag(None, "gsm: words in a name, 1 or 2")
    mode: str = flag("both", "gsm: ask for a result (forward), for a constant (reverse), or both")
    difficulty: str = flag("both", "gsm: totals of counts (medium), of counts x averages (hard), or both")
    question: str = flag("first", "gsm: where the question stands, first or last")
    worked: bool = flag(False, "gsm: learn to write the solution before the answer")
    # the model
    pattern: str = flag(None, "mixer per block: A attention, D delta; for example ADAD")
    d_model: int = flag(None, "width of the features")
    n_head: int = flag(None, "heads of both mixers")
    n_kv_head: int = flag(None, "key and value heads of attention (default n_head)")
    d_mlp: int = flag(0, "width of the MLP; 0: 8/3 d_model")
    conv: int = flag(4, "taps of the short convolution")
    rope_theta: float = flag(10000.0, "base of the rotary positions")
    positions: bool = flag(False, "learn positions inside a window, besides the rotary ones")
    loop: str = flag(None, "blocks that are looped while asleep, first:last+1 (default all)")
    evict: str = flag("hard", "hard: only S survives a window; sliding: and the cache of L-1 tokens; all: all of it")
    sleep_attention: str = flag("causal", "causal, or full: while asleep, see all of the window; answers stay causal")
    alternate: bool = flag(False, "every second pass over a window reads it backwards; needs --evict hard")
    pass_clip: float = flag(0.0, "no pass gets more than this many times the last one's gradient; 0: as much as it is")
    random_N: bool = flag(False, "draw each step's passes from 1..N, so that one model serves every N")
    grow: float = flag(
        0.0,
        "with --t: each step draws n passes, half of the time the most allowed, and asks for n/N of t (rounded down); "
        "what is allowed doubles from 1 (N / t, if that is more) to N over this share of the steps",
    )
    answer_passes: int = flag(1, "a baseline: loops over the windows that are answered")
    init_from: str = flag(None, f"begin with a public checkpoint: {', '.join(PRETRAINED)}")
    init_dir: str = flag(None, "its folder: config.json, *.safetensors and tokenizer.json")
    problems: int = flag(None, "with --init-from: training problems, made once before training (default steps x batch)")
    start_from: str = flag(None, "begin with the weights of this run (its directory or checkpoint)")
    learn: str = flag(
        "all", "delta: only the delta layers learn, as in the paper's warm-up before sliding windows; all"
    )
    # the optimisation
    batch: int = flag(None, "sequences per step, over all ranks and micro-batches")
    accumulate: int = flag(1, "micro-batches per step")
    steps: int = flag(None, "optimizer steps; the schedule is a function of step/steps")
    muon_lr: float = flag(None, "learning rate of the block matrices")
    adam_lr: float = flag(None, "learning rate of everything else")
    weight_decay: float = flag(1e-4, "decoupled, on the block matrices")
    clip: float = flag(1.0, "largest gradient norm")
    warmup: float = flag(0.02, "fraction of steps with rising learning rate")
    decay: float = flag(0.2, "fraction of steps with falling learning rate, at the end")
    checkpoint: bool = flag(False, "recompute activations of sleeping passes in the backward (less memory)")
    # the run
    minutes: float = flag(None, "stop early after this much training time; --resume goes on")
    eval_every: int = flag(None, "steps between evaluations on held-out validation problems")
    eval_n: int = flag(512, "problems per validation")
    test_n: int = flag(2048, "problems of the final test")
    log_every: int = flag(10, "steps between lines of log.jsonl")
    save_every: int = flag(500, "steps between checkpoints")
    device: str = flag("auto", "cpu, cuda, mps or auto")
    compile: bool = flag(True, "compile the blocks; --no-compile for eager")
    cuda_graph: bool = flag(True, "on one GPU: record forward and backward once and replay them")
    workers: int = flag(0, "processes that make batches; 0: a thread, enough for rule110 and depo")
    threads: int = flag(1, "CPU threads; more than one may stall models as small as tiny")
    out: str = flag(None, "run directory (default out/TASK-N<N>-s<SEED>)")
    resume: bool = flag(False, "go on from the checkpoint in the run directory")


CHOICES = {
    "task": TASKS,
    "init_from": tuple(PRETRAINED),
    "evict": EVICTIONS,
    "sleep_attention": ("causal", "full"),
    "learn": ("all", "delta"),
    "device": ("auto", "cpu", "cuda", "mps"),
}

PRESETS = {
    "rule110": {
        "paper": dict(width=24, t=32, strings=4, L=24, pattern="ADAD", d_model=256, n_head=4, batch=512, steps=98_600,
                      muon_lr=2e-3, adam_lr=5e-5, eval_every=1000),
        "small": dict(width=24, t=12, strings=4, L=24, pattern="ADAD", d_model=256, n_head=4, batch=512, steps=20_000,
                      muon_lr=2e-3, adam_lr=5e-5, eval_every=500),
        "tiny": dict(width=12, t=7, strings=2, L=12, pattern="AD", d_model=64, n_head=2, positions=True, batch=64,
                     steps=3000, decay=0.4, muon_lr=5e-3, adam_lr=2e-3, weight_decay=0.5, eval_every=200),
    },
    "depo": {
        # not in the paper: attention and plain delta layers in turn, where it has the architecture of Jet-Nemotron
        "paper": dict(nodes=75, hops=16, queries=10, name_tokens=2, min_nodes=3, L=75, pattern="ADADADADAD",
                      d_model=512, n_head=8, batch=128, steps=138_000, muon_lr=2e-3, adam_lr=5e-5, eval_every=1000),
        "small": dict(nodes=24, hops=8, queries=8, name_tokens=1, min_nodes=8, L=24, pattern="ADAD", d_model=256,
                      n_head=4, positions=True, batch=128, steps=20_000, decay=0.4, muon_lr=5e-3, adam_lr=1e-3,
                      weight_decay=0.5, eval_every=500),
        "tiny": dict(nodes=8, hops=4, queries=8, name_tokens=1, min_nodes=8, L=16, pattern="AD", d_model=64, n_head=2,
                     d_mlp=64, positions=True, batch=128, steps=3000, decay=0.4, muon_lr=0.015, adam_lr=2e-3,
                     weight_decay=0.5, eval_every=200),
    },
    "gsm": {  # not in the paper: a model from scratch, so its size and number of steps
        "paper": dict(op=8, min_op=1, min_length=2001, max_length=3300, name_words=2, L=2000, pattern="ADADADADAD",
                      d_model=512, n_head=8, batch=256, accumulate=8, steps=10_000, muon_lr=1e-3, adam_lr=5e-5,
                      eval_every=500, test_n=1600, workers=12),
        "small": dict(op=6, min_op=1, min_length=257, max_length=507, name_words=2, L=256, pattern="ADADAD",
                      d_model=384, n_head=6, batch=128, steps=20_000, decay=0.4, muon_lr=5e-3, adam_lr=1e-3,
                      eval_every=1000, workers=8),
        "tiny": dict(op=3, min_op=1, min_length=49, max_length=60, name_words=1, mode="forward", question="last", L=48,
                     pattern="AD", d_model=64, n_head=2, d_mlp=64, positions=True, batch=64, steps=2000, decay=0.4,
                     muon_lr=0.01, adam_lr=2e-3, weight_decay=0.5, eval_every=200, workers=1),
    },
}  # fmt: skip


# with --init-from; lengths are the tokenizer's tokens
# not in the paper: the number of steps (here about a GPU-day), lengths for L=512. Their kernels are too large to gain
# from a CUDA graph, and 256 micro-batches too many for one
PUBLIC_PAPER = dict(
    op=8, min_op=1, min_length=2001, max_length=3300, name_words=2, L=2000, batch=256, accumulate=256, steps=1000,
    muon_lr=1e-3, adam_lr=5e-5, eval_every=100, save_every=25, test_n=1600, workers=12, checkpoint=True,
    cuda_graph=False,
)  # fmt: skip
PRETRAINED_PRESETS = {
    "paper": PUBLIC_PAPER,
    "sliding": PUBLIC_PAPER | dict(L=512, evict="sliding"),
    "demo": PUBLIC_PAPER | dict(op=6, min_length=1025, max_length=1530, L=512, batch=64, accumulate=16, steps=500,
                                save_every=100, test_n=512, workers=8),
}  # fmt: skip


def check_public(config, given):
    """Refuse what --init-from does not go with, before anything is read. Raises ValueError with one clear line."""
    if not config.init_from:
        wrong = [flag_of(name) for name in ("init_dir", "problems") if name in given]
        wrong += [f"--preset {config.preset}"] if config.preset in ("sliding", "demo") else []
        if wrong:
            raise ValueError(f"{wrong[0]} needs --init-from: add it, or leave that out")
        return
    public = PRETRAINED[config.init_from]
    if config.task != "gsm":
        raise ValueError(f"--init-from reads text: use --task gsm, not {config.task}")
    if wrong := given & {f.name for f in dataclasses.fields(ModelConfig)} | given & {"positions"}:
        raise ValueError(f"{flag_of(min(wrong))} does not go with --init-from: leave one of them out")
    if not config.init_dir or not os.path.isdir(config.init_dir):
        download = f"hf download {public.repo} --local-dir FOLDER"
        raise ValueError(f"--init-dir {config.init_dir} is no folder. {download} makes it (licence: {public.licence})")


def parse_config(argv):
    """Command line -> Config with everything resolved. Raises ValueError for contradictions."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    families = (*PRESETS.values(), PRETRAINED_PRESETS)
    preset_fields = {name for presets in families for preset in presets.values() for name in preset}
    for f in dataclasses.fields(Config):
        name, text = flag_of(f.name), f.metadata["help"].replace("%", "%%")
        if f.default is not None and not isinstance(f.default, bool):
            beside = ", unless the preset sets it" if f.name in preset_fields else ""
            text += f" (default {f.default}{beside})"
        if f.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(name, type=f.type, choices=CHOICES.get(f.name), help=text)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    config = Config(**given)
    config.device = pick_device(config.device)
    config.task = "gsm" if config.init_from and "task" not in given else config.task
    check_public(config, given.keys())
    presets = PRETRAINED_PRESETS if config.init_from else PRESETS.get(config.task, {})
    if config.preset == "auto":
        config.preset = "demo" if config.init_from else "small" if config.device == "cuda" else "tiny"
    if config.preset not in presets:
        raise ValueError(f"--preset {config.preset} is none of those here: use {', '.join(presets) or 'another task'}")
    for name, value in presets[config.preset].items():
        if not hasattr(config, name):
            raise ValueError(f"the preset {config.preset} sets {name}, which is no flag: name it in Config")
        if name not in given:
            setattr(config, name, value)
    if config.task == "depo" and config.t is not None and "hops" not in given:
        config.hops = 0  # those of the preset are for depo without --t
    if config.init_from:
        public = PRETRAINED[config.init_from]
        for name in {f.name for f in dataclasses.fields(Config)} & {f.name for f in dataclasses.fields(ModelConfig)}:
            setattr(config, name, getattr(public.config, name))
        config.loop = config.loop or public.loop
        if config.problems is None:
            config.problems = config.steps * config.batch
    config.n_kv_head = config.n_kv_head or config.n_head
    config.out = config.out or f"out/{config.task}-N{config.N}-s{config.seed}"
    check(config, given)
    return config


def check(config, given):
    """Refuse what cannot work before anything is written. Raises ValueError with one clear line."""
    every = set().union(*EXAMPLE_SIZES.values()) - {"L"}  # every task has windows
    if wrong := every & set(given) - EXAMPLE_SIZES[config.task].keys():
        raise ValueError(f"{flag_of(min(wrong))} is not a size of the task {config.task}")
    counts = "L steps batch accumulate eval_every eval_n test_n log_every save_every threads n_head d_model"
    for name in counts.split():
        if not 1 <= getattr(config, name) < 2**31:
            raise ValueError(f"{flag_of(name)} must be 1 to 2^31 - 1, got {getattr(config, name)}")
    if config.problems is not None and (config.problems < 1 or config.problems % config.batch):
        raise ValueError(f"--problems {config.problems} must be a multiple of --batch {config.batch}")
    if not 1 <= config.answer_passes <= 1000:
        raise ValueError(f"--answer-passes must be 1 to 1000, got {config.answer_passes}")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"--seed must be 0 or more, got {config.seed}")
    for name in "muon_lr adam_lr clip minutes".split():
        value = getattr(config, name)
        if value is not None and not 0 < value < 1e6:
            raise ValueError(f"{flag_of(name)} must be above 0 and below a million, got {value}")
    if not 0 <= config.weight_decay <= 1 / config.muon_lr:
        raise ValueError(f"--weight-decay must be between 0 and 1 / muon_lr, got {config.weight_decay}")
    if not (config.warmup >= 0 and config.decay >= 0 and config.warmup + config.decay <= 1):
        raise ValueError(f"--warmup {config.warmup} and --decay {config.decay} are fractions of the steps: lower them")
    if not 0 <= config.workers <= 256:
        raise ValueError(f"--workers must be between 0 and 256, got {config.workers}")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if config.batch % (config.accumulate * ranks):
        raise ValueError(
            f"--batch {config.batch} must be a multiple of --accumulate x ranks, {config.accumulate} x {ranks}"
        )
    task = build_task(vars(config))
    if not 0 <= config.grow <= 1:
        raise ValueError(f"--grow {config.grow} is a fraction of the steps: use 0 to 1")
    if config.grow and config.random_N:
        raise ValueError("--grow draws the passes of each step, as does --random-N: leave one of them out")
    if config.grow and not config.t:
        raise ValueError("--grow is for rule110, and for depo with --t: leave it out or give --t, 1 or more")
    if task.context % config.L:
        raise ValueError(f"--L {config.L} must divide the context of {task.context} tokens: choose a divisor of it")
    for split in SPLITS:
        m = task.batch(config.seed, split, 0, config.batch)[2]
        try:
            split_chunks(m, config.L)
        except ValueError as error:
            raise ValueError(f"--L {config.L} does not fit the questions: {error}") from None
    algorithm_of(empty_model(config, task), vars(config))


# -----------------------------------------------------------------------------
# the parts of a step


def empty_model(config, task):
    """The model of a run, without its numbers."""
    with torch.device("meta"):
        return Model(model_config(vars(config), task))


def build_model(config, task):
    """The model of a run on its device, with random weights or those of --init-from, and a line about the latter."""
    if not config.init_from:
        return Model(model_config(vars(config), task)).to(config.device), ""
    model = empty_model(config, task).to_empty(device=config.device)
    model.tie()
    for block, kind in zip(model.layers, model.config.pattern):
        if kind == "d":
            block.apply(functools.partial(init_weights, n_layer=len(model.layers)))
    return model, "" if config.resume or config.start_from else load_public(model, config.init_from, config.init_dir)


def choose_parameters(model, config):
    """With --learn delta only the mixers of delta blocks learn, and all of the blocks that were inserted."""
    if config.learn == "delta":
        for name, p in model.named_parameters():
            kind = config.pattern[int(name.split(".")[1])] if name.startswith("layers.") else None
            p.requires_grad_(kind == "d" or (".mixer." in name and kind in FAST_MIXERS))


def make_optimizers(model, config):
    """Muon for the nn.Linear weights inside the blocks, AdamW for the rest, as in the paper: [muon, adamw].

    not in the paper: weight decay, betas, Muon's momentum and Newton-Schulz steps (torch's), how its learning rate
    depends on a matrix's shape, and which parameters count as matrices (the gates do, convolutions do not).
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        is_matrix = name.startswith("layers.") and name.endswith("_proj.weight")
        if p.requires_grad:
            (matrices if is_matrix else others).append(p)
    muon = torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="original")
    adamw = torch.optim.AdamW(others, lr=config.adam_lr, weight_decay=0.0, betas=(0.9, 0.95))
    return [muon, adamw]


def schedule(step, config):
    """Warm-up, stable, linear decay (not in the paper): the factor on both learning rates for step 0..steps-1."""
    rising = (step + 1) / max(1, config.warmup * config.steps)
    falling = (config.steps - step) / max(1, config.decay * config.steps)
    return min(1.0, rising, falling)


def passes_of(step, config):
    """N of a training step, a function of seed and step alone: with --random-N it is drawn from 1..N.

    With --grow the most that is drawn grows from the fewest passes that ask for a step at all, see task_of, to N. It
    doubles at equal intervals (the first level takes longest to learn), and half of the draws are just the most.
    """
    if not (config.random_N or config.grow):
        return config.N
    rng, least, most = np.random.default_rng([config.seed, step]), 1, config.N
    if config.grow:
        least, grown = math.ceil(config.N / config.t), min(1, step / (config.grow * config.steps))
        most = max(least, int(least ** (1 - grown) * config.N**grown))
        if rng.integers(2):
            return most
    return int(rng.integers(least, most + 1))


def task_of(step, config, task):
    """What a step asks: the task, or with --grow as many of its t steps or hops as that step has of the N passes.

    Rounded down, so that n passes of --N 17 --t 16 are asked for n - 1.
    """
    return task.at(task.t * passes_of(step, config) // config.N) if config.grow else task


WRITERS = ("mixer.k_proj", "mixer.v_proj", "mixer.a_proj", "mixer.b_proj", "mixer.conv_v.")  # what a write to S needs


def block_flops(block, T, past, span, write_only=False, causal=True):
    """Model FLOPs of one block over T tokens of one sequence: 2 per weight and token, plus what the mixer does.

    Attention: Q K' and P V over the tokens that are seen, of these and of `past` cached ones, at most `span`. Delta
    rule: 2 K V per token and head to predict, to write, to read.
    """
    matrices = [(name, p.numel()) for name, p in block.named_parameters() if name.endswith("_proj.weight")]
    weights = sum(n for name, n in matrices if not write_only or name.startswith(WRITERS))
    mixer = block.mixer
    if not block.attends:
        heads, key_dim, value_dim = mixer.S_shape
        return T * (2 * weights + (4 if write_only else 6) * heads * key_dim * value_dim)
    span = min(mixer.window, span)
    early = max(0, min(T, span - past))  # tokens whose span reaches back to the first key
    pairs = early * past + early**2 / 2  # the causal half of a square: its diagonal counts half
    if early < T:  # then the span is finite
        pairs += (T - early) * span
    if not causal:  # the later tokens, too; now the diagonal counts whole
        pairs += (T * (T - 1) + early) / 2
    return T * 2 * weights + pairs * 4 * mixer.q_proj.out_features


def flops_per_step(config, task, chunks):
    """
    Model FLOPs of one training step with N passes over these chunks (see split_chunks): forward, and twice that for the
    backward. Recomputation does not count.
    """
    rules, model = sleep_config(vars(config)), empty_model(config, task)
    pattern, layers = model.config.pattern, model.layers
    total = 0
    for start, stop, n_logits in chunks:
        seen = stop - start, min(start, rules.keep), attention_span(rules)
        if n_logits:
            total += config.answer_passes * sum(block_flops(block, *seen) for block in layers)
            total += 2 * n_logits * model.config.d_model * model.config.vocab_size
            continue
        *order, last = sum(blocks_of_passes(pattern, rules), [])
        total += sum(block_flops(layers[i], *seen, causal=rules.causal) for i in order)
        total += block_flops(layers[last], *seen, write_only=not rules.keep, causal=rules.causal)
    return 3 * round(total) * config.batch


STOPS = {signal.SIGINT, signal.SIGTERM}


def start_worker():
    """First act of a process that makes batches: no signal to the run's group stops it, but its parent's end does."""
    os.setsid()
    for s in STOPS:  # what came while it was starting was for the run: to ignore it once drops it
        signal.signal(s, signal.SIG_IGN)
        signal.signal(s, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def worker_pool(workers):
    """Processes that make batches. spawn: a forked child of a process that uses CUDA or threads may hang."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)


@contextlib.contextmanager
def starting_workers():
    """A process that is started in here does not see Ctrl-C or SIGTERM until start_worker lets it."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def arrays_of(batch, *args):
    """A task's batch() for another process: tensors would come back in shared memory, of which containers have little.

    Returns its x, y and m as NumPy arrays, which a pipe carries.
    """
    return [a.numpy() for a in batch(*args)]


class Batches:
    """The training batches from some step on, made ahead of time; with several ranks, this rank's rows.

    config.workers: processes that make them, one batch each at a time; 0 for a thread, enough for numpy-only tasks.
    """

    def __init__(self, task, config, rank=0, ranks=1):
        self.task, self.config, self.rank, self.ranks = task, config, rank, ranks
        self.pool = worker_pool(config.workers) if config.workers else ThreadPoolExecutor(1)
        self.ahead = {}

    def get(self, step):
        """The batch of one step; the next ones start being made.

        Returns its micro-batches, (x, y, m, chunks) each, on the device, and how many tokens of the global batch are
        scored. Raises ValueError if a worker died.
        """
        wanted = range(step, min(step + 2 + self.config.workers, self.config.steps))
        try:
            self.ahead = {s: self.ahead.get(s) or self._make(s) for s in wanted}
            tensors = [torch.from_numpy(a) for a in self.ahead[step].result()]
        except BrokenProcessPool:
            how = "--resume goes on, with fewer --workers"
            raise ValueError(f"a worker died at step {step} (memory?): {how}") from None
        count = int(tensors[2].sum())
        rows = self.config.batch // self.ranks
        mine = [a[self.rank * rows : (self.rank + 1) * rows].chunk(self.config.accumulate) for a in tensors]
        chunks = split_chunks(tensors[2], self.config.L)  # one for all micro-batches: the fewer, the fewer CUDA graphs
        if self.config.device == "cuda":  # pinned memory is copied while the GPU computes
            mine = [[a.pin_memory() for a in part] for part in mine]
        return [(*(a.to(self.config.device, non_blocking=True) for a in b), chunks) for b in zip(*mine)], count

    def _make(self, step):
        task = task_of(step, self.config, self.task)
        with starting_workers():
            return self.pool.submit(arrays_of, task.batch, self.config.seed, "train", step, self.config.batch)

    def close(self):
        """Stop making batches."""
        self.pool.shutdown(cancel_futures=True)


class CudaGraph:
    """Forward, backward and clipping recorded on the GPU: a replay costs one launch instead of thousands.

    The optimizers stay outside, because a graph would freeze their learning rates.
    """

    def __init__(self, trainer, micro, count):
        self.parameters = list(trainer.model.parameters())
        self.micro = [(*(a.clone() for a in b[:3]), b[3]) for b in micro]
        self.count = torch.tensor(count, dtype=torch.float32, device=trainer.config.device)
        side = trainer.graph_stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compilation and lazy initialisation are not for recording
                trainer.gradients(self.micro, self.count)
                trainer.model.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(side)
        gc.collect()  # what an old graph of autograd still holds from another stream would break the recording
        self.graph = torch.cuda.CUDAGraph()
        # one pool serves all graphs: they are replayed one after the other, and nothing of one is read after the next.
        # thread_local: another thread makes batches
        recording = torch.cuda.graph(self.graph, trainer.graph_pool, side, capture_error_mode="thread_local")
        try:
            with recording:
                self.out = trainer.gradients(self.micro, self.count)
        except RuntimeError as error:
            cause = error.__context__ or error  # what breaks a recording makes its end fail, too
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).strip().split("\n")[0][:160]
            raise ValueError(f"cannot record a CUDA graph here ({reason}): add --no-cuda-graph") from cause
        self.grads = [p.grad for p in self.parameters]  # the graph's own memory: a replay writes them there

    def replay(self, micro, count):
        """What gradients(micro, count) would return and leave in the parameters' grad."""
        for mine, new in zip(self.micro, micro):
            for a, b in zip(mine[:3], new[:3]):
                a.copy_(b, non_blocking=True)
        self.count.fill_(count)
        for p, grad in zip(self.parameters, self.grads):
            p.grad = grad
        self.graph.replay()
        return {name: a.clone() for name, a in self.out.items()}  # the next replay overwrites them


class NonFinite(Exception):
    """The loss, the gradient or a weight became NaN or infinite at a step."""

    def __init__(self, step, values):
        bad = ", ".join(f"{k} = {v}" for k, v in values.items() if not math.isfinite(v))
        super().__init__(f"training diverged at step {step} ({bad})")


class Trainer:
    """Model, optimizers and counters: everything a checkpoint holds, and the training step."""

    def __init__(self, config, rank=0, ranks=1):
        self.config, self.rank, self.ranks = config, rank, ranks
        self.task = build_task(vars(config))
        torch.manual_seed(config.seed)
        self.model, self.origin = build_model(config, self.task)
        if config.start_from and not config.resume:
            load_weights(self.model, read_checkpoint(checkpoint_of(config.start_from))["model"], config.start_from)
        choose_parameters(self.model, config)
        self.optimizers = make_optimizers(self.model, config)
        self.step, self.tokens, self.seconds, self.flops, self.costs = 0, 0, 0.0, 0, {}
        self.plain_algorithm = algorithm_of(self.model, vars(config), config.checkpoint)
        self.algorithm = DistributedDataParallel(self.plain_algorithm) if ranks > 1 else self.plain_algorithm
        if config.compile:
            self.model.compile_blocks()
        self.graphs = None
        if config.cuda_graph and config.device == "cuda" and ranks == 1:
            self.graphs, self.graph_pool, self.graph_stream = {}, torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def gradients(self, micro, count):
        """Clipped gradients of the mean loss per scored token. Returns device scalars: loss and accuracy of the whole
        batch, the stats of Algorithm1.forward, which are those of this rank's last micro-batch, and the gradient's norm
        before clipping.
        """
        total, stats = 0, {}
        for i, (x, y, m, chunks) in enumerate(micro):
            # the ranks exchange their gradients once, with those of the last micro-batch
            quiet = self.ranks > 1 and i < len(micro) - 1
            with self.algorithm.no_sync() if quiet else contextlib.nullcontext():
                with autocast(self.config.device):
                    loss, right, stats = self.algorithm(x, y, m, chunks)
                # every rank divides by the global count; DDP averages over ranks, so undo that
                (loss * (self.ranks / count)).backward()
            total = total + torch.stack((loss.detach(), right)) / count
        if self.ranks > 1:
            dist.all_reduce(total)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        return {"loss": total[0], "accuracy": total[1], **stats, "grad_norm": norm}

    def replayed_gradients(self, micro, count):
        """gradients(), captured as a CUDA graph once for each sequence of shapes and chunks, then replayed."""
        key = self.plain_algorithm.config.N, *((x.shape, tuple(chunks)) for x, _, _, chunks in micro)
        if key not in self.graphs:
            self.graphs[key] = CudaGraph(self, micro, count)
        return self.graphs[key].replay(micro, count)

    def train_step(self, micro, count):
        """One optimizer step. Returns device scalars (the host waits for none): loss, accuracy, norms, passes."""
        N = passes_of(self.step, self.config)
        self.plain_algorithm.config = dataclasses.replace(self.plain_algorithm.config, N=N)
        gradients = self.gradients if self.graphs is None else self.replayed_gradients
        out = gradients(micro, count)
        for optimizer, lr in zip(self.optimizers, (self.config.muon_lr, self.config.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(self.step, self.config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += self.config.batch * self.task.T
        key = N, *micro[0][3]
        if key not in self.costs:
            config = dataclasses.replace(self.config, N=N)
            self.costs[key] = flops_per_step(config, self.task, micro[0][3])
        self.flops += self.costs[key]
        return out

    def first_step(self, micro, count):
        """train_step, but if the machine cannot compile (no C++ compiler, no Python headers), go on eagerly."""
        try:
            return self.train_step(micro, count)
        except torch._dynamo.exc.ShortenTraceback as error:  # the base of all that a missing compiler raises
            reason = str(error).strip().splitlines()[0][:160]
            how = "interrupted, or no compiler here: this run goes on eagerly and slower"
            print(f"compiling failed ({how}): {reason}", file=sys.stderr)
            torch.compiler.set_stance("force_eager")
            self.config.compile = False  # so says result.json
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            return self.train_step(micro, count)

    def counters(self):
        """How far training is: for the log and for a checkpoint."""
        return {name: getattr(self, name) for name in ("step", "tokens", "seconds", "flops")}

    def save(self, path):
        """Write a checkpoint under a temporary name, then rename: a crash leaves the old one whole. Rank 0 only."""
        if self.rank:
            return
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise NonFinite(self.step, {"a weight": math.nan})
        tensors = {"model": self.model.state_dict(), "rng": torch.get_rng_state()}
        tensors |= {"muon": self.optimizers[0].state_dict(), "adamw": self.optimizers[1].state_dict()}
        try:
            with whole_file(path) as name:
                torch.save({"format": 1, "config": vars(self.config)} | self.counters() | tensors, name)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise ValueError(f"cannot write {path} ({error}): free some space or choose another --out") from None

    def load(self, path):
        """Continue from a checkpoint of the same run. Raises ValueError if it is missing, damaged or foreign."""
        saved = read_checkpoint(path)
        for name, value in (LATER_FLAGS | vars(self.config)).items():  # a flag that is gone was off
            if name not in FREE and saved["config"].get(name) != value:
                was = saved["config"].get(name)
                how = "the flags" if hasattr(self.config, name) and name in saved["config"] else "the commit"
                raise ValueError(f"{path} was trained with {name} = {was}, not {value}: use {how} of that run")
        try:
            load_weights(self.model, saved["model"], path)
            self.optimizers[0].load_state_dict(saved["muon"])
            self.optimizers[1].load_state_dict(saved["adamw"])
            torch.set_rng_state(saved["rng"])
            for name in self.counters():
                setattr(self, name, saved[name])
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path} lacks what a resume needs ({error}): start a new run") from None


# -----------------------------------------------------------------------------
# the run


class Log:
    """log.jsonl and the progress bar; only rank 0 has one that writes."""

    def __init__(self, trainer):
        self.active, self.trainer, self.pending = trainer.rank == 0, trainer, []
        config, quiet = trainer.config, None if self.active else True  # None: only on a terminal
        self.path = os.path.join(config.out, "log.jsonl")
        if self.active:  # a killed run may have logged past its last checkpoint: those steps are about to come again
            lines = [line for line in read_log(config.out) if line["step"] <= trainer.step]
            with whole_file(self.path) as name, open(name, "w") as f:
                f.writelines(json.dumps(line) + "\n" for line in lines)
        self.bar = tqdm(total=config.steps, initial=trainer.step, disable=quiet, dynamic_ncols=True, smoothing=0.1)

    def add(self, out):
        """Remember one step's device scalars; nothing is read from the device yet."""
        self.pending.append((self.trainer.step, out))
        self.bar.update()

    def flush(self):
        """Read the pending scalars from the device, stop on NaN, write a line for the last step."""
        names = list(self.pending[0][1])
        rows = torch.stack([torch.stack([out[name].float() for name in names]) for _, out in self.pending]).tolist()
        for (step, _), row in zip(self.pending, rows):
            values = dict(zip(names, row))
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise NonFinite(step, values)
        self.pending = []
        trainer = self.trainer
        speed = trainer.tokens / max(trainer.seconds, 1e-9)
        lr = schedule(trainer.step - 1, trainer.config) * trainer.config.muon_lr
        self.write({"kind": "train"} | trainer.counters() | values | {"lr": lr})
        self.bar.set_postfix_str(f"loss {values['loss']:.3f} acc {values['accuracy']:.3f} {speed:,.0f} tok/s")

    def write(self, line):
        """Append one JSON line."""
        if self.active:
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")


TIME_IS_UP = 1  # below the numbers of STOPS: among several ranks a signal wins


class Interrupts:
    """Ctrl-C and SIGTERM ask the loop to stop after the step it is in; a second one kills."""

    def __enter__(self):
        self.signum = 0
        self.old = {s: signal.signal(s, self._ask) for s in STOPS}
        return self

    def _ask(self, signum, frame):
        self.signum = signum
        self.__exit__()

    def __exit__(self, *exc):
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def reason_to_stop(self, time_is_up, device):
        """One of STOPS, TIME_IS_UP, or 0. With several ranks all of them must leave the loop at the same step."""
        code = self.signum or (TIME_IS_UP if time_is_up else 0)
        if dist.is_initialized():
            code = torch.tensor(code, device=device)
            dist.all_reduce(code, dist.ReduceOp.MAX)
        return int(code)


def make_batches(trainer):
    """The Batches of a run; with --init-from its problems are made first, or the run leaves nothing behind."""
    config = trainer.config
    if not config.init_from:
        return Batches(trainer.task, config, trainer.rank, trainer.ranks)
    try:
        prepared = PreparedProblems(trainer)
    except BaseException:
        if trainer.rank == 0 and not config.resume:
            shutil.rmtree(config.out, ignore_errors=True)
        raise
    # a thread reads them: processes would have to be sent what is on the disk
    return Batches(prepared, dataclasses.replace(config, workers=0), trainer.rank, trainer.ranks)


def train_loop(trainer, batches, log, interrupts):
    """Train to the last step. Returns what stopped it: one of STOPS, TIME_IS_UP, or 0 for the last step."""
    config, reason = trainer.config, 0
    step_fn = trainer.first_step
    validated = {line["step"] for line in read_log(config.out) if line["kind"] == "val"}
    if trainer.step and trainer.step % config.eval_every == 0 and trainer.step not in validated:
        validate(trainer, log)  # the run was killed between saving and this
    earlier, started = trainer.seconds, time.perf_counter()
    while trainer.step < config.steps and not reason:
        try:
            batch = batches.get(trainer.step)
        except ValueError:  # no batch, but what has been learned is whole
            trainer.seconds += time.perf_counter() - started
            if log.pending:
                log.flush()
            trainer.save(os.path.join(config.out, "ckpt.pt"))
            raise
        log.add(step_fn(*batch))
        step_fn = trainer.train_step
        minutes = (trainer.seconds - earlier + time.perf_counter() - started) / 60  # a resumed run has them anew
        # rank 0 decides: on the others the clock also runs while they wait for its validations and checkpoints
        time_is_up = trainer.rank == 0 and config.minutes and minutes > config.minutes
        reason = interrupts.reason_to_stop(time_is_up, config.device)
        last = reason or trainer.step == config.steps
        evaluating, saving = (trainer.step % n == 0 for n in (config.eval_every, config.save_every))
        if last or evaluating or saving or trainer.step % config.log_every == 0:
            if config.device == "cuda":
                torch.cuda.synchronize()
            trainer.seconds += time.perf_counter() - started  # evaluating and saving are not training time
            log.flush()
            if last or saving:
                trainer.save(os.path.join(config.out, "ckpt.pt"))
            if evaluating:
                validate(trainer, log)
            started = time.perf_counter()
    return reason


def scores(trainer, split, n):
    """eval.evaluate with this run's task, N and window. The problems do not depend on the run's seed or batch size."""
    config = trainer.config
    algorithm = algorithm_of(trainer.model, vars(config))
    return evaluate(algorithm, trainer.task, split, config.L, n, 0)


def validate(trainer, log):
    """Score held-out validation problems and log them; only rank 0 does."""
    if log.active:
        log.write({"kind": "val"} | trainer.counters() | {"scores": scores(trainer, "val", trainer.config.eval_n)})


def device_name(config):
    """What the run computes on, for people."""
    if config.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{config.device} ({platform.machine()}, {config.threads} of {os.cpu_count()} cores)"


def key_and_value(trainer):
    """One key and one value as the model's first delta block has them, for pick_impl."""
    S = next(block.mixer.S_shape for block in trainer.model.layers if not block.attends)
    return (torch.empty(1, 1, 1, dim, device=trainer.config.device) for dim in S[1:])


def provenance(trainer):
    """What ran where: for config.json and result.json. flops_per_step: of the first batch, with all N passes."""
    config = trainer.config
    chunks = split_chunks(trainer.task.batch(config.seed, "train", 0, config.batch)[2], config.L)
    return {
        "config": vars(config),
        "command": shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "commit": git_commit(),
        "device": device_name(config),
        "versions": {"python": platform.python_version()} | {k: version(k) for k in ("torch", "triton", "numpy")},
        "delta_rule": pick_impl(*key_and_value(trainer)),
        "ranks": trainer.ranks,
        "n_params": trainer.model.n_params(),
        "flops_per_step": flops_per_step(config, trainer.task, chunks),
    }


def peak_memory(device):
    """Peak memory of this process in MiB: all it took from the GPU if there is one, else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def open_run(config, trainer):
    """Make the run directory, or continue in it. Raises ValueError if it cannot be written or is not ours to write."""
    checkpoint = os.path.join(config.out, "ckpt.pt")
    try:
        if config.resume:
            trainer.load(checkpoint)
        elif trainer.rank == 0:
            os.makedirs(config.out)
            write_json(os.path.join(config.out, "config.json"), provenance(trainer))
    except FileExistsError:
        how = "add --resume to go on" if os.path.exists(checkpoint) else "it has no checkpoint to go on from, remove it"
        raise ValueError(f"{config.out} exists: {how}, or choose another --out") from None
    except OSError as error:
        raise ValueError(f"cannot write {config.out} ({error}): choose another --out") from None


def speed_of(run_dir):
    """Seconds per step and FLOPs per second of a run: medians over its log, which compiling does not move.

    None, None if the log has fewer than two lines.
    """
    lines = [line for line in read_log(run_dir) if line["kind"] == "train"]
    parts = [[b[key] - a[key] for key in ("step", "seconds", "flops")] for a, b in itertools.pairwise(lines)]
    if not parts:
        return None, None
    return statistics.median(s / n for n, s, _ in parts), statistics.median(f / s for _, s, f in parts)


def finish(trainer):
    """Score the test split once, print the table, write result.json."""
    config = trainer.config
    test = scores(trainer, "test", config.test_n)
    result = provenance(trainer) | trainer.counters()
    per_step, rate = speed_of(config.out)
    result |= {"seconds_per_step": per_step, "flops_per_second": rate}
    result |= {"peak_memory_mib": peak_memory(config.device), "test": test}
    write_json(os.path.join(config.out, "result.json"), result)
    print(f"\n{config.test_n} problems never seen in training:\n")
    print(comparison_table({"accuracy": [test["rows"]]}))
    speed = f" ({1000 * per_step:.0f} ms per step, {rate / 1e9:,.0f} GFLOP/s)" if per_step else ""
    print(f"\ntraining time: {trainer.seconds / 60:.1f} min{speed}")
    print(f"peak memory:   {result['peak_memory_mib']:.0f} MiB")
    print(f"next:          python eval.py {config.out}")


def longest_batch(config, task, rows):
    """Of the first 64 training batches of some rows the one with the most windows, and its chunks: texts differ."""
    batches = (task.batch(config.seed, "train", s, rows) for s in range(64))
    return max(((batch, split_chunks(batch[2], config.L)) for batch in batches), key=lambda pair: len(pair[1]))


def announce(trainer):
    """Say what is about to run."""
    config = trainer.config
    size = f"{trainer.model.n_params():,} parameters"
    print(f"device {device_name(config)}; preset {config.preset}; {size}; run directory {config.out}")
    reason = why_not_triton(*key_and_value(trainer))
    print(f"delta rule: {pick_impl(*key_and_value(trainer))}" + (f" (not triton: {reason})" if reason else ""))
    if config.init_from:
        sizes = predicted_memory(config, trainer.task)
        print(trainer.origin or f"{config.init_from}, going on from {config.start_from or config.out}")
        print("memory in GiB, predicted: " + ", ".join(f"{name} {size:.2f}" for name, size in sizes.items()))
    shown = {k: v for k, v in vars(config).items() if v is not None and k not in ("preset", "device", "out")}
    print(", ".join(f"{k}={v}" for k, v in shown.items()))
    task = trainer.task
    N = f"1 to {config.N}" if config.random_N or config.grow else config.N
    chunks = longest_batch(config, task, 8)[1]
    asleep = sum(not chunk.n_logits for chunk in chunks)
    print(f"{task.name}: up to {task.T} tokens in windows of {config.L}; {asleep} of them slept over {N} times each,")
    print(f"{len(chunks) - asleep} answered in {config.answer_passes} pass(es)", flush=True)


def run(config):
    """Train one configuration; returns the exit status. Raises ValueError for what the user can mend."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if config.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # the others wait while rank 0 makes problems
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
    torch.set_num_threads(config.threads)
    trainer = Trainer(config, rank, ranks)
    open_run(config, trainer)
    if rank == 0:
        announce(trainer)
    with contextlib.closing(make_batches(trainer)) as batches, Interrupts() as interrupts:
        log = Log(trainer)
        reason = train_loop(trainer, batches, log, interrupts)
    log.bar.close()
    if rank == 0 and reason in STOPS:
        print(f"stopped at step {trainer.step}, saved in {config.out}; the same command with --resume goes on")
    elif rank == 0:
        if reason == TIME_IS_UP:
            print(f"{config.minutes} minutes are over at step {trainer.step} of {config.steps}; --resume goes on")
        finish(trainer)
    if ranks > 1:
        trainer.algorithm = None  # free DDP's buckets before their process group, or a rank may hang at exit
        dist.destroy_process_group()
    return 128 + reason if reason in STOPS else 0


# -----------------------------------------------------------------------------
# starting from a public checkpoint: its weights, the memory it needs, its problems made ahead;
# no other run needs this section

SAFETENSORS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
HEADER_LIMIT = 100_000_000  # bytes


def read_safetensors(path):
    """The tensors of one *.safetensors file: name -> CPU tensor, a view of the file that is read when it is used.

    Header length (8 bytes), JSON of name -> dtype, shape, data_offsets, then the data without holes. Raises ValueError
    with one clear line if the file is anything else.
    """
    try:
        with open(path, "rb") as f:
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # mmap calls an empty file a ValueError
        raise ValueError(f"cannot read {path} ({error}): download it again") from None
    start = 8 + int.from_bytes(mapped[:8], "little")
    if len(mapped) < 8 or start > min(len(mapped), HEADER_LIMIT):
        raise ValueError(f"{path} is no safetensors file, or truncated: its header would be {start - 8:,} bytes")
    try:
        header = json.loads(mapped[8:start])
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda entry: (entry[1]["data_offsets"], entry[0]))
        return dict(read_entries(entries, mapped, start))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is damaged or lies about its tensors ({error}): download it again") from None


def read_entries(entries, mapped, start):
    """(name, tensor) of each header entry, in the order of their offsets; they must fill `mapped` from `start` on."""
    end = 0
    for name, entry in entries:
        dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in SAFETENSORS:
            raise ValueError(f"{name} is {dtype}, which is not one of {', '.join(SAFETENSORS)}")
        dtype = SAFETENSORS[dtype]
        if type(shape) is not list or not all(type(n) is int and n >= 0 for n in (*shape, begin, stop)):
            raise ValueError(f"{name} has a shape or an offset that is no count")
        count = math.prod(shape)
        if begin != end or stop - begin != count * dtype.itemsize or start + stop > len(mapped):
            raise ValueError(f"{name} with shape {shape} cannot be bytes {begin} to {stop}")
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin) if count else torch.empty(0)
        yield name, flat.to(dtype).view(shape)
        end = stop
    if start + end != len(mapped):
        raise ValueError(f"{len(mapped) - start - end} bytes belong to no tensor")


def read_folder(folder):
    """All tensors of a folder with one or more *.safetensors files: name -> tensor. Raises ValueError."""
    files, index = sorted(os.listdir(folder)), "model.safetensors.index.json"
    shards = [name for name in files if name.endswith(".safetensors")]
    where = read_json(os.path.join(folder, index), "download it again").get("weight_map") if index in files else None
    if where is not None:
        if not isinstance(where, dict) or any(os.path.basename(str(name)) != name for name in where.values()):
            raise ValueError(f"{folder}/{index} is damaged: download it again")
        shards = sorted(set(where.values()))
        if missing := [name for name in shards if name not in files]:
            raise ValueError(f"{folder} lacks {missing[0]}: download it again")
    if not shards:
        raise ValueError(f"{folder} holds no *.safetensors, and nothing else is read: pickled weights can run code")
    tensors = {}
    for shard in shards:
        new = read_safetensors(os.path.join(folder, shard))
        if twice := tensors.keys() & new.keys():
            raise ValueError(f"{folder} has {min(twice)} in two files: download it again")
        tensors |= new
    if where is not None and where.keys() != tensors.keys():
        odd = min(where.keys() ^ tensors.keys())
        raise ValueError(f"{folder}/{index} and its files disagree about {odd}: download them again")
    return tensors


def check_public_config(folder, public):
    """Refuse a folder whose config.json describes another model. Raises ValueError with what differs."""
    path, c = os.path.join(folder, "config.json"), public.config
    found = read_json(path, "download it again")

    def section(outer, name):
        inner = outer.get(name) or {}
        if not isinstance(inner, dict):
            raise ValueError(f"{path} is damaged ({name} is no object): download it again")
        return inner

    for name in ("text_config", "rope_parameters"):  # Qwen3.5's file is that of a multimodal model
        found |= section(found, name)
    for name in ("jet", "swa"):  # Jet-Nemotron's delta and sliding-window layers
        inner = section(section(found, "efficient_attention_config"), name)
        found |= {f"{name}.{key}": value for key, value in inner.items()}
    kinds = c.pattern.replace("d", "")
    qwen = public.model_type == "qwen3_5_text"
    types = {"D": "linear_attention", "A": "full_attention"} if qwen else {"D": "jet", "A": "attn", "W": "swa"}
    want = {"model_type": public.model_type, "hidden_size": c.d_model, "intermediate_size": c.d_mlp,
            "num_hidden_layers": len(kinds), "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
            "vocab_size": c.vocab_size, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
            "tie_word_embeddings": c.tied, "layer_types": [types[kind] for kind in kinds],
            "partial_rotary_factor": c.rope_dim / c.head_dim, "linear_num_key_heads": c.delta_heads,
            "linear_num_value_heads": c.delta_heads, "linear_key_head_dim": c.key_dim,
            "linear_value_head_dim": c.value_dim, "linear_conv_kernel_dim": c.conv, "head_dim": c.head_dim,
            "jet.head_dim": c.key_dim, "jet.num_heads": c.delta_heads, "jet.conv_size": c.conv,
            "swa.window_size": c.window}  # fmt: skip
    if public.model_type == "ouro":
        del want["layer_types"]  # its blocks are all full attention, and called so or not at all
    for name, value in want.items():
        if name in found and found[name] != value:
            raise ValueError(f"{path} is of another model: {name} is {found[name]!r}, not {value!r}")
    sizes = "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size rope_theta"
    if missing := [name for name in sizes.split() if name not in found]:
        raise ValueError(f"{path} does not say its {missing[0]}: download it again")


# own module -> theirs; a block's own parameters (A_log, dt_bias) belong to its mixer
OUTER = {"embedding": "embed_tokens", "norm": "norm", "head_proj": "lm_head"}
BLOCK = {"norm_mixer": "input_layernorm", "norm_mixer_out": "input_layernorm_2", "mlp.gate_proj": "mlp.gate_proj",
         "norm_mlp": "post_attention_layernorm", "norm_mlp_out": "post_attention_layernorm_2",
         "mlp.up_proj": "mlp.up_proj", "mlp.out_proj": "mlp.down_proj"}  # fmt: skip
ATTENTION = {"q_proj": "q_proj", "gate_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj",
             "q_norm": "q_norm", "k_norm": "k_norm"}  # fmt: skip
QWEN_DELTA = {"q_proj": "in_proj_qkv", "k_proj": "in_proj_qkv", "v_proj": "in_proj_qkv", "a_proj": "in_proj_a",
              "b_proj": "in_proj_b", "gate_proj": "in_proj_z", "conv_q": "conv1d", "conv_k": "conv1d",
              "conv_v": "conv1d", "norm": "norm", "out_proj": "out_proj"}  # fmt: skip
JET_DELTA = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "a_proj": "a_proj", "b_proj": "b_proj",
             "gate_proj": "g_proj", "norm": "o_norm", "out_proj": "o_proj",
             "conv_v.in_proj": "dynamic_conv1d.kernel_generator.w1",
             "conv_v.taps_proj": "dynamic_conv1d.kernel_generator.w2"}  # fmt: skip


def public_name(name, public):
    """The name in a public checkpoint of one of our parameters; None for those of blocks that are inserted."""
    *path, last = name.split(".")
    if path[0] != "layers":
        theirs = OUTER[path[0]]
        return f"{theirs}.{last}" if theirs == "lm_head" else f"model.{theirs}.{last}"
    i, inner, pattern = int(path[1]), ".".join(path[2:]), public.config.pattern
    if pattern[i] == "d":
        return None
    prefix = f"model.layers.{i - pattern[:i].count('d')}"
    if not inner.startswith("mixer"):
        return f"{prefix}.{BLOCK[inner]}.{last}"
    qwen, attends = public.model_type == "qwen3_5_text", pattern[i] not in FAST_MIXERS
    mixer = "linear_attn" if qwen and not attends else "self_attn"
    if inner == "mixer":  # A_log, dt_bias
        return f"{prefix}.{mixer}.{last}"
    table = ATTENTION if attends else QWEN_DELTA if qwen else JET_DELTA
    return f"{prefix}.{mixer}.{table[inner.removeprefix('mixer.')]}.{last}"


def own_part(name, theirs, tensor, config):
    """What of a public checkpoint's tensor is our parameter `name`: some hold several of ours."""
    module = name.split(".")[-2]
    if "in_proj_qkv" in theirs or "conv1d.weight" in theirs:  # q, k and v of a delta layer
        keys, values = config.delta_heads * config.key_dim, config.delta_heads * config.value_dim
        part = tensor.split((keys, keys, values))["qkv".index(module.replace("conv_", "")[0])]
        return part.squeeze(1) if part.dim() == 3 else part  # a convolution is (C, 1, taps) there
    if config.attention_gate and "self_attn.q_proj" in theirs:  # query and gate of a head side by side
        return tensor.unflatten(0, (config.n_head, 2, config.head_dim))[:, int(module == "gate_proj")].flatten(0, 1)
    return tensor


# of what a public checkpoint holds, this is not used: other modalities, multi-token prediction, Ouro's exit gate
LEFT_OUT = ("model.visual.", "mtp.", "model.early_exit_gate.")


@torch.no_grad()
def load_public(model, name, folder):
    """Fill a model of architecture PRETRAINED[name] from a folder with its config.json and *.safetensors, in place.

    Tensors are copied one by one. Inserted blocks keep their random weights, but for the output projection, which is
    zero: at first the model is the public one. Returns a line that says what was read, what was left out and what is
    new. Raises ValueError if the folder holds another model or a damaged one.
    """
    public = PRETRAINED[name]
    check_public_config(folder, public)
    tensors = read_folder(folder)
    wrapped = [key for key in tensors if key.startswith("model.language_model.")]  # Qwen3.5's multimodal file
    for key in wrapped:
        inner = "model." + key.removeprefix("model.language_model.")
        if inner in tensors:
            raise ValueError(f"{folder} has both {key} and {inner}: it is not the checkpoint of {name}")
        tensors[inner] = tensors.pop(key)
    used = {"lm_head.weight"} if public.config.tied else set()
    for own, parameter in model.named_parameters():
        key = public_name(own, public)
        if key is None:
            continue
        if key not in tensors:
            raise ValueError(f"{folder} has no {key}: it is not the checkpoint of {name}, download it again")
        try:
            part = own_part(own, key, tensors[key], public.config)
        except (RuntimeError, ValueError, IndexError):  # of another shape, it cannot be taken apart: refused below
            part = tensors[key]
        if part.shape != parameter.shape:
            shape = tuple(tensors[key].shape)
            raise ValueError(f"{folder}: {key} of shape {shape} does not fit {own} {tuple(parameter.shape)}")
        if not part.is_floating_point() or not part.isfinite().all():
            raise ValueError(f"{folder}: {key} holds integers, NaN or infinity, download it again")
        parameter.copy_(part)
        used.add(key)
    left_out = [key for key in tensors if key not in used]
    if odd := [key for key in left_out if not key.startswith(LEFT_OUT) and not key.endswith("rotary_emb.inv_freq")]:
        raise ValueError(f"{folder} has {len(odd)} tensors that {name} does not know, such as {odd[0]}")
    inserted = [i for i, kind in enumerate(public.config.pattern) if kind == "d"]
    for i in inserted:
        model.layers[i].mixer.out_proj.weight.zero_()
    kinds = sorted({part.strip(".") for part in LEFT_OUT for key in left_out if key.startswith(part)})
    kinds = ", ".join(kinds) or "nothing"
    new = f"; new blocks {inserted}, silent at first" if inserted else ""
    return f"{name} from {folder}: {len(tensors) - len(left_out)} tensors, left out {kinds}{new}"


def saved_bytes(run, held):
    """What autograd keeps for the backward of run(), in bytes, but for the tensors in `held`."""
    known = {t.untyped_storage()._cdata for t in held}
    new = {}

    def pack(t):
        if t.untyped_storage()._cdata not in known:
            new[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept_alive = run()  # noqa: F841  else its tensors' storages would be numbered anew
    return sum(t.untyped_storage().nbytes() for t in new.values())


def traced_bytes(config, task, rows, N):
    """What autograd keeps of one forward of some rows with N passes, in bytes, without computing anything."""
    flags = vars(config) | {"N": N}
    batch, chunks = longest_batch(config, task, rows)
    half = torch.autocast("cpu", torch.bfloat16, enabled=config.device == "cuda")
    rope_table.cache_clear()  # it must hold no real tensors now, and no fake ones afterwards
    with FakeTensorMode() as fake, half, contextlib.ExitStack() as stack:
        stack.callback(rope_table.cache_clear)
        algorithm = algorithm_of(Model(model_config(flags, task)), flags)
        batch = [fake.from_tensor(a) for a in batch]
        return saved_bytes(lambda: algorithm(*batch, chunks), [*algorithm.parameters(), *batch])


def activation_bytes(config, task):
    """What the backward needs, in bytes: once, for the weights in bfloat16, and for each sequence of a micro-batch.

    With --checkpoint a sequence needs S and what is fed into every pass, the caches that outlive its windows, and,
    while it is recomputed, one whole pass.
    """
    # a batch of one is laid out in another way, so two and three rows
    two, three, twice = (traced_bytes(config, task, *case) for case in ((2, 1), (3, 1), (2, 2)))
    one, a_pass = three - two, (twice - two) // 2  # of one sequence: with one pass, and a pass over every window more
    copies = max(0, two - 2 * one)
    if not config.checkpoint:
        return copies, one + (config.N - 1) * a_pass
    chunks = longest_batch(config, task, 2)[1]
    asleep, keep = sum(not chunk.n_logits for chunk in chunks), sleep_config(vars(config)).keep
    blocks = empty_model(config, task).layers
    S = sum(math.prod(block.mixer.S_shape) for block in blocks if not block.attends)
    keys = sum(block.mixer.k_proj.out_features for block in blocks if block.attends)
    cached = sum(min(chunk.start, keep) for chunk in chunks if not chunk.n_logits)  # tokens, when the sleeps begin
    fed = 4 * (S + config.L * config.d_model) * config.N * asleep
    fed += 2 * keys * cached * (2 if config.device == "cuda" else 4)
    return copies, max(0, one - a_pass) + fed + a_pass // asleep


def predicted_memory(config, task):
    """What training needs, in GiB: a dict of "weights", "gradients", "optimizers", "copies" (the weights' in bfloat16),
    "sequence" (activations of one) and "all". Temporary buffers and what the allocator wastes are not in it.
    """
    model = empty_model(config, task)
    choose_parameters(model, config)
    muon, adamw = make_optimizers(model, config)
    first, rest = (sum(p.numel() for group in o.param_groups for p in group["params"]) for o in (muon, adamw))
    sizes = {"weights": 4 * model.n_params(), "gradients": 4 * (first + rest), "optimizers": 4 * first + 8 * rest}
    sizes["copies"], sizes["sequence"] = activation_bytes(config, task)
    rows = config.batch // config.accumulate // int(os.environ.get("WORLD_SIZE", 1))
    sizes["all"] = sum(sizes.values()) + (rows - 1) * sizes["sequence"]
    return {name: size / 2**30 for name, size in sizes.items()}


class PreparedProblems:
    """The training problems of a run as ids in its directory: made once, by all workers, and read as they are needed.

    A row is the sequence, then where its scored positions begin and end. After the last problem the first comes again.
    """

    def __init__(self, trainer):
        self.task, self.config = trainer.task, trainer.config
        self.path = os.path.join(self.config.out, "problems.npy")
        self.batches = self.config.problems // self.config.batch
        self.shape = self.batches * self.config.batch, self.task.T + 3
        if trainer.rank == 0 and not os.path.exists(self.path):
            self._make()
        if trainer.ranks > 1:
            dist.barrier()
        self.ids = np.load(self.path, mmap_mode="r")
        if self.ids.shape != self.shape:
            raise ValueError(f"{self.path} holds other problems: remove it, it will be made again")

    def _make(self):
        size = np.dtype(np.uint16 if self.task.vocab_size <= 2**16 else np.uint32)
        pool = worker_pool(max(1, self.config.workers))
        batch = functools.partial(self.task.batch, self.config.seed, "train", B=self.config.batch)
        try:
            with starting_workers():
                made = pool.map(functools.partial(arrays_of, batch), range(self.batches))
            with whole_file(self.path) as name, open(name, "wb") as f:
                header = {"descr": size.str, "fortran_order": False, "shape": self.shape}
                np.lib.format.write_array_header_2_0(f, header)
                for x, y, m in tqdm(made, "problems", self.batches, disable=None):
                    start = m.argmax(1)
                    edges = np.stack((start, start + m.sum(1)), 1)
                    f.write(np.concatenate((x, y[:, -1:], edges), 1).astype(size).tobytes())
        except BrokenProcessPool:
            raise ValueError("a worker died while it made problems (memory?): use fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)

    def batch(self, seed, split, s, B):
        """Batch number s of training, as the task's own batch() with the run's seed and batch size."""
        rows = torch.from_numpy(self.ids[s % self.batches * B :][:B].astype(np.int64))
        seq, (start, stop) = rows[:, :-2], rows[:, -2:].T
        column = torch.arange(self.task.T)
        return seq[:, :-1], seq[:, 1:], (start[:, None] <= column) & (column < stop[:, None])


# -----------------------------------------------------------------------------
# the command line


def main():
    """Command line: exit status 0 when done, 128 + signal when stopped, else 2, and one line on stderr says why."""
    message, status = "", 2
    try:
        status = run(parse_config(sys.argv[1:]))
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:  # python -X dev: where it happened
            raise
        kept = isinstance(error, OSError)  # a full disk, a run directory that was removed
        # a text: the error itself would keep the progress bar alive, on whose line it would then stand
        message = f"{error}; a checkpoint, if there is one, is kept" if kept else str(error)
    except KeyboardInterrupt:
        message, status = "interrupted outside of training; --resume goes on if there is a checkpoint", 130
    except NonFinite as error:
        message = f"{error}; an earlier checkpoint, if any, is kept: lower --muon-lr, --adam-lr or --N"
    except torch.OutOfMemoryError:
        how = "add --checkpoint or --no-cuda-graph, raise --accumulate up to --batch, or lower --N or the text's length"
        message = f"out of GPU memory: {how}"
    if message:
        print(f"train.py: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
