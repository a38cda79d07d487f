"""
How it is judged: accuracy per difficulty on problems that training never saw, beside what guessing would score.

    $ python eval.py out/depo-N4-s0                       one run: a table, and some mistakes to read
    $ python eval.py out/depo-N*-s* --plot depo.png       several runs side by side, mean and spread over seeds
    $ python eval.py out/depo-N2-s0 --N 4                 other sleep passes than it was trained with
    $ python eval.py out/depo-N4-s0 --json depo.json      the numbers, with the command, commit and machine behind them
    $ python eval.py out/depo-N4-s0 --N 1 2 4 --tol 0.1   adaptive: sleep until the fast weights have settled
    $ python eval.py out/depo-N4-s0 --cost                what sleeping and answering cost, up to a million tokens
    $ python eval.py out/depo-N4-s0 --probe               what the memory holds after every pass
    $ python eval.py out/depo-N4-s0 --chat                tell it something, ask it something
    $ python eval.py --table README.md                    renew the tables in a text from their results files

A run is a directory written by train.py (config.json, ckpt.pt, log.jsonl) or a checkpoint file. All runs of one call
answer the same problems. The digitised numbers of the paper are drawn where the setting is the paper's.

Based on the results of "Do Language Models Need Sleep?" (arXiv:2605.26099).

Read next: train.py
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import textwrap
import time
from dataclasses import fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    EXAMPLE_SIZES,
    SPLITS,
    TASKS,
    GSMText,
    Parser,
    check_writable,
    git_commit,
    read_json,
    whole_file,
    write_json,
)
from kernels import benchmark_table
from model import FAST_MIXERS, PRETRAINED, Model, ModelConfig
from sleep import (
    Algorithm1,
    SleepConfig,
    Sleeper,
    answer,
    attention_span,
    kept_tokens,
    read_plain,
    relative_change,
    sleep,
    sleep_passes,
    split_chunks,
    state_tensors,
)

# -----------------------------------------------------------------------------
# from a run directory to a model


def pick_device(name):
    """auto -> cuda if there is one, else cpu. Raises ValueError if the device asked for is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if there["cuda"] else "cpu"  # mps only on request: small kernels are no faster there
    if not there[name]:
        raise ValueError(f"--device {name}: this machine has none that torch can use; try --device auto")
    return name


def autocast(device):
    """The precision that training uses: bfloat16 where it pays on a GPU, float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda")


def parse_loop(text):
    """ "2:6" -> (2, 6), None -> None. Raises ValueError otherwise."""
    if text is None:
        return None
    try:
        first, last = text.split(":")
        return int(first), int(last)
    except ValueError:
        raise ValueError(f"--loop {text}: write first:last+1, for example 1:3") from None


def build_task(config):
    """The task object that a run's flags (a dict) describe. Raises ValueError for sizes that make no sense."""
    if config["task"] not in TASKS:
        raise ValueError(f"unknown task {config['task']!r}: use one of {', '.join(TASKS)}")
    sizes = {size: config[size] for size in EXAMPLE_SIZES[config["task"]]}
    if config["init_from"]:
        return GSMText(config["init_dir"], PRETRAINED[config["init_from"]].config.vocab_size, sizes)
    return TASKS[config["task"]](**sizes)


def model_config(config, task):
    """The architecture that a run's flags (a dict) describe. Raises ValueError where ModelConfig does."""
    if config["init_from"]:
        return PRETRAINED[config["init_from"]].config
    names = [f.name for f in fields(ModelConfig) if f.name in config]
    n_pos = config["L"] if config["positions"] else 0
    return ModelConfig(task.vocab_size, n_pos=n_pos, **{name: config[name] for name in names})


# flags that do not define what is learnt: a resumed run may change them (some of them round differently)
FREE = {"minutes", "device", "init_dir", "threads", "resume", "compile", "cuda_graph", "checkpoint", "workers", "out"}
FREE |= {"save_every", "log_every", "eval_every", "eval_n", "test_n", "accumulate"}

# flags that older checkpoints do not know, with the values that describe what those runs did; so far that is also what
# the paper does, and paper_points takes it for that
LATER_FLAGS = dict(
    evict="hard", sleep_attention="causal", answer_passes=1, random_N=False, learn="all",
    init_from=None, init_dir=None, problems=None, start_from=None, mode="both", difficulty="both", question="first",
    worked=False, ask="bit", grow=0.0, pass_clip=0.0, alternate=False,
    pace=False, reinject=False,  # gone: named, so that runs from before and after are alike (grow had another meaning)
)  # fmt: skip


def read_checkpoint(path):
    """
    A checkpoint of train.py: the plain dict that was saved, its tensors on the CPU. Code in it is never run.
    Raises ValueError if the file is missing, damaged or not one of ours.
    """
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path}: give a run directory of train.py, such as out/depo-N4-s0")
    saved = read_plain(path, "cpu")  # a GPU need not hold what is read, AdamW's step counters must not go there
    ours = isinstance(saved, dict) and {"format", "config", "model", "step"} <= saved.keys()
    if not ours or saved["format"] != 1 or not isinstance(saved["config"], dict):
        raise ValueError(f"{path} is no checkpoint of this train.py (format 1): give one that is")
    saved["config"] = LATER_FLAGS | saved["config"]
    if saved["config"]["reinject"]:
        raise ValueError(f"{path} was trained with reinject = True, which is gone: use the commit of that run")
    return saved


def load_weights(model, weights, path):
    """Copy a state dict into the model. Raises ValueError if names or shapes do not fit, or a weight is not finite."""
    own = model.state_dict()
    for name in [*own, *weights]:
        want, got = (tuple(w[name].shape) if name in w else "nothing" for w in (own, weights))
        if want != got:
            raise ValueError(f"{path} does not fit the model: {name} is {got} there, {want} in the model")
        if not weights[name].isfinite().all():
            raise ValueError(f"{path} holds NaN or infinity in {name}: that run diverged, train it again")
    model.load_state_dict(weights)


def checkpoint_of(path):
    """The checkpoint file of a run directory, or the path itself."""
    return os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path


def load_run(path, device):
    """
    A trained model. path: a run directory or a checkpoint file -> model, task, config (the run's flags, a dict), and a
    dict of how far training came: step, tokens, seconds, flops.
    Raises ValueError as read_checkpoint, build_task and load_weights do.
    """
    file = checkpoint_of(path)
    saved = read_checkpoint(file)
    config = saved["config"]
    try:
        task = build_task(config)
        model = Model(model_config(config, task)).to(device)
        algorithm_of(model, config)
        load_weights(model, saved["model"], file)
    except KeyError as error:
        raise ValueError(f"{file} has no {error} in its config: it is from another version of train.py") from None
    return model, task, config, {key: saved.get(key) for key in ("step", "tokens", "seconds", "flops")}


def beside(path, name):
    """The path of a file in a run directory, or in the one that a checkpoint lies in."""
    return os.path.join(path if os.path.isdir(path) else os.path.dirname(path), name)


def read_provenance(path, name="config.json"):
    """config.json or result.json of a run: a dict, empty if there is none. path: see beside."""
    file = beside(path, name)
    if not os.path.exists(file):
        return {}
    return read_json(file, "remove it, the table does not need it")


def read_log(path):
    """log.jsonl of a run: a list of dicts, each with a kind and a step, empty if there is none. path: see beside."""
    file = beside(path, "log.jsonl")
    if not os.path.exists(file):
        return []
    with open(file) as f:
        lines = f.read().split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]  # a line without its line break was cut off by a crash
    except ValueError:
        raise ValueError(f"{file} is damaged: remove it, only the learning curves need it") from None


# -----------------------------------------------------------------------------
# evaluation

BATCH = 256  # problems at a time, here and in training's scores
TOKENS_AT_ONCE = 2**16  # of long texts fewer: they would not fit into a GPU's memory


def batch_size(task):
    """Problems that are drawn and answered at a time: a function of the task, as its problems depend on it.

    With many small batches of long texts all lengths occur.
    """
    return max(1, min(BATCH, TOKENS_AT_ONCE // task.T))


def sleep_config(config):
    """How a run's flags (a dict) say to sleep. Raises ValueError where SleepConfig does."""
    return SleepConfig(
        N=config["N"],
        loop=parse_loop(config["loop"]),
        keep=kept_tokens(config["evict"], config["L"]),
        causal=config["sleep_attention"] == "causal",
        tol=config.get("tol", 0.0),
        alternate=config["alternate"],
        pass_clip=config["pass_clip"],
    )


def algorithm_of(model, config, use_checkpoint=False):
    """Algorithm 1 as a run's flags (a dict) describe it. Raises ValueError where it does."""
    return Algorithm1(model, sleep_config(config), use_checkpoint, config["answer_passes"])


def predict(algorithm, task, split, L, n, seed):
    """
    Put n problems of a split to a model, on the device it is on, as an Algorithm1 with windows of L tokens.

    Returns CPU tensors x, y, m, pred, ce, each (n, T): inputs, targets, which are scored, the likeliest next token
    (-1 where the head did not run) and the cross-entropy in nats, float32 (0 where it is not scored); and the mean
    passes of a problem's sleeps (n,). The model is run eagerly and left in the mode it was in; no random number of
    torch is drawn. Raises ValueError as split_chunks does.
    """
    model = algorithm.model
    device, training = next(model.parameters()).device, model.training
    batch, batches = batch_size(task), []
    model.eval()
    try:
        # not inference_mode: the rotation tables that the model caches here must still be usable in training
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast(device):
            for s in tqdm(range(-(-n // batch)), f"N={algorithm.config.N}", leave=False, disable=None):
                x, y, m = (a[: n - s * batch] for a in task.batch(seed, split, s, batch))
                batches.append((x, y, m, *predict_batch(algorithm, x, y, m, split_chunks(m, L), device)))
    finally:
        model.train(training)
    return tuple(torch.cat(a) for a in zip(*batches))


def predict_batch(algorithm, x, y, m, chunks, device):
    """One batch of `predict`: x, y, m (B, T) on the CPU -> pred, ce (B, T) and passes (B,) on the CPU."""
    logits, positions, stats = algorithm.logits(x.to(device), m.to(device), chunks)
    logits, positions = logits.float(), positions.cpu()  # (B, T_pred, vocab_size), (B, T_pred)
    target = y.masked_fill(~m, -100).gather(1, positions).to(device)
    ce = F.cross_entropy(logits.mT, target, ignore_index=-100, reduction="none").cpu()
    pred = torch.full_like(x, -1).scatter(1, positions, logits.argmax(-1).cpu())
    return pred, torch.zeros(x.shape).scatter(1, positions, ce), stats["passes"].cpu()


def summarise(task, x, y, m, pred, ce, passes):
    """
    What `predict` returned -> {"rows", "loss", "examples", "passes"}, ready for JSON.

    rows: per difficulty (a key of task.score) accuracy, n (questions), stderr = sqrt(p(1-p)/n), and what task.chance
    and task.losses say of it.
    loss: mean cross-entropy per scored token, in nats. passes: per sleep, mean.
    """
    chance, losses, rows = task.chance(x, y, m), task.losses(x, y, m, ce), {}
    for key, right in task.score(x, y, m, pred).items():
        p, n = float(right.mean()), len(right)
        rows[key] = {"accuracy": p, "n": n, "stderr": math.sqrt(p * (1 - p) / n)} | chance[key] | losses[key]
    return {"rows": rows, "loss": float(ce[m].mean()), "examples": len(x), "passes": float(passes.mean())}


def evaluate(algorithm, task, split, L, n, seed):
    """`summarise` what `predict` returns; for the arguments see there."""
    return summarise(task, *predict(algorithm, task, split, L, n, seed))


def headline_keys(rows):
    """The rows that hold all questions of a task, each once: the others say "first ...", "... bit" or "... rows"."""
    return [key for key in rows if not key.endswith((" bit", " rows")) and not key.startswith("first ")]


def headline(rows, field="accuracy"):
    """One number for a run: a field of its rows, averaged over all questions."""
    keys = headline_keys(rows)
    return sum(rows[k][field] * rows[k]["n"] for k in keys) / sum(rows[k]["n"] for k in keys)


# -----------------------------------------------------------------------------
# mistakes and tables, for people


def shorten(lines):
    """Keep the ends of long runs of lines that look alike, such as the steps of Rule 110 or the edges of Depo."""
    shapes = [(len(line) - len(line.lstrip()), len(line.split())) for line in lines]
    kept = []
    for i, line in enumerate(lines):
        if len(set(shapes[max(0, i - 1) : i + 2])) > 1 or i in (0, len(lines) - 1):
            kept.append(line)
        elif kept[-1].strip() != "...":
            kept.append(" " * shapes[i][0] + "...")
    return kept


def mistakes(task, x, y, m, pred, count):
    """The first `count` examples with a wrong answer, as text: the example, and each wrong answer beside the right."""
    wrong = ((pred != y) & m).any(1).nonzero().flatten().tolist()
    lines = [f"{len(wrong)} of {len(x)} examples hold a mistake" + (", for example:" if wrong and count else "")]
    for i in wrong[:count]:
        example = task.explain(x[i], y[i], m[i])
        lines += [f"\nexample {i + 1}", *(example if task.name == "gsm" else shorten(example))]
        scored = m[i].nonzero().flatten()
        # scored tokens side by side are one answer, or several of full length
        runs = scored.tensor_split((np.flatnonzero(np.diff(scored) > 1) + 1).tolist())
        parts = [part for run in runs for part in run.split(task.answer_tokens)]
        for j, part in enumerate(parts):
            if (pred[i, part] != y[i, part]).any():
                right, said = task.decode(y[i, part]), task.decode(pred[i, part])
                lines.append(f"  answer {j + 1} is {right}, the model says {said}")
    return "\n".join(lines)


def ordered_keys(columns):
    """Every key of some runs' rows; those that differ only in a number are side by side, by that number."""
    keys = list(dict.fromkeys(key for runs in columns.values() for rows in runs for key in rows))
    kinds = [re.sub(r"\d+", "", key) for key in keys]
    return sorted(keys, key=lambda key: (kinds.index(re.sub(r"\d+", "", key)), int((re.search(r"\d+", key) or "0")[0])))


def cell(rows, field="accuracy"):
    """One number of a table from the rows of one difficulty, a list over seeds; empty if there are none.

    field: "accuracy", in percent, or one of the losses, in nats.
    """
    scale, digits = (100, 1) if field == "accuracy" else (1, 3)
    values = [scale * row[field] for row in rows]
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        return f"{text} ± {statistics.stdev(values):.{digits}f} ({len(values)})"
    return f"{text} (se {scale * rows[0]['stderr']:.{digits}f})" if field == "accuracy" else text


def as_markdown(table):
    """Lists of cells, the header and the line of dashes first, as the text of a Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in table)


FLOORS = {"uniform": "#9ca3af", "majority": "#111827", "literal": "#a16207"}  # ways to guess, and their colours


def comparison_table(columns, field="accuracy"):
    """
    Markdown, one line per difficulty. columns: header -> list over seeds of rows as in `evaluate`.
    field "accuracy", in percent and beside the chance levels, or one of the losses, in nats.
    """
    every = [row for runs in columns.values() for rows in runs for row in rows.values()]
    levels = tuple(FLOORS) if field == "accuracy" else ()
    floors = [floor for floor in levels if every and floor in every[0]]
    table = [["", "n", *floors, *columns], ["---", *["--:"] * (1 + len(floors) + len(columns))]]
    for key in ordered_keys(columns):
        found = {header: [rows[key] for rows in runs if key in rows] for header, runs in columns.items()}
        # where columns ask Depo for other distances (--hops, several t) the questions differ: then no number is right
        each = {(row["n"], *(f"{100 * row[floor]:.1f}" for floor in floors)) for rows in found.values() for row in rows}
        line = [key, *(values[0] if len(set(values)) == 1 else "" for values in zip(*each))]
        table.append(line + [cell(rows, field) for rows in found.values()])
    return as_markdown(table)


# -----------------------------------------------------------------------------
# several runs side by side

NOT_SETTING = FREE | {"task", "preset", "seed", "t"}  # t is a difficulty: a line of the table, but see setting_of
OF_LATER_PASSES = ("reinject", "pass_clip", "alternate")  # flags that mean nothing with one pass


def describe(config):
    """A task and its sizes for a heading, without the number t: "depo, nodes 75, hops 16, ..."."""
    sizes = {size: config[size] for size in EXAMPLE_SIZES[config["task"]] if size != "t"}
    if config["task"] == "depo" and config["t"] is not None:
        sizes["hops"] = f"1 to t of {config['hops']}" if config["hops"] else "t"
    return ", ".join([config["task"], *(f"{size.replace('_', ' ')} {value}" for size, value in sizes.items())])


def check_same_task(paths, configs):
    """Raises ValueError unless all runs have one task and one size."""
    for path, config in zip(paths, configs):
        if describe(config) != describe(configs[0]):
            raise ValueError(
                f"{paths[0]} is {describe(configs[0])} but {path} is {describe(config)}: "
                "compare runs of one task and size"
            )


def flags_of(config):
    """The flags that define what was learnt, but for seed and t, a dict; those that are None are left out."""
    flags = {k: v for k, v in config.items() if k not in NOT_SETTING and v is not None}
    if "start_from" in flags:  # the first stage's seed does not count either
        flags["start_from"] = re.sub(r"-s\d+(?=/|$)", "", flags["start_from"])
    return flags


def setting_of(run, elsewhere, shared):
    """What tells a run's column from others, a dict: its flags but for the seed, and how it was evaluated.

    elsewhere: some run is evaluated at another t than it was trained with. shared: runs of several t have a line in
    common, as Depo's "hops 1" of 1 to t.
    """
    setting = flags_of(run["config"])
    if setting["N"] == run["evaluated_N"] == setting["answer_passes"] == 1:
        setting = {k: v for k, v in setting.items() if k not in OF_LATER_PASSES}  # there is none: any value will do
    whole = run["step"] == setting["steps"]
    setting |= {"steps": setting["steps"] if whole else f"{run['step']} of {setting['steps']}"}
    setting |= {"evaluated N": run["evaluated_N"], "tol": run["tol"]}
    if elsewhere:
        setting["trained t"] = run["config"]["t"]
    if shared:
        setting["evaluated t"] = run["evaluated_t"]
    return setting


def groups_of(runs):
    """
    Group runs that differ only in seed, or in t where each t has lines of its own. Returns (setting, list of runs)
    pairs, by N; a setting holds N, "evaluated N", tol, and whatever else differs between the groups. Raises ValueError
    if a run is there twice.
    """
    settings, groups = {}, {}
    elsewhere = any(run["evaluated_t"] != run["config"]["t"] for run in runs)
    lines = {(line, run["evaluated_t"]) for run in runs for line in run.get("rows", ())}
    shared = len(lines) > len({line for line, _ in lines})
    for run in runs:
        setting = setting_of(run, elsewhere, shared)
        name = json.dumps(setting, sort_keys=True)
        settings[name] = setting
        for other in groups.setdefault(name, []):
            if (other["config"]["seed"], other["evaluated_t"]) == (run["config"]["seed"], run["evaluated_t"]):
                raise ValueError(f"{other['path']} and {run['path']} are the same run: give one of them")
        groups[name].append(run)
    order = ("N", "evaluated N", "tol")
    flags = dict.fromkeys(k for setting in settings.values() for k in setting)
    values = {k: {str(s.get(k)) for s in settings.values() if k in s or k not in OF_LATER_PASSES} for k in flags}
    differ = [k for k in flags if len(values[k]) > 1]
    shown = [*order, *(k for k in differ if k not in order)]
    for name, (run, *others) in groups.items():
        if not others and "start_from" in settings[name]:
            settings[name]["start_from"] = run["config"]["start_from"]  # of a single run the directory itself
    names = sorted(groups, key=lambda name: [settings[name][k] for k in order[:2]] + [-settings[name]["tol"]])
    return [({k: settings[name].get(k) for k in shown}, groups[name]) for name in names]


def columns_of(runs):
    """`groups_of` with a header for each: "N=4", "N=4, evaluated at N=2", "N=1, steps 4200". A dict."""
    columns = {}
    for setting, group in groups_of(runs):
        N, asked, tol = (setting.pop(key) for key in ("N", "evaluated N", "tol"))
        how = f", at most {asked}, tol {tol}" if tol else f", evaluated at N={asked}" if asked != N else ""
        header = f"N={N}{how}" + "".join(f", {k.replace('_', ' ')} {v}" for k, v in setting.items() if v is not None)
        columns[header] = group
    return columns


def budget_table(runs):
    """Markdown, one line per group of runs: its setting, what training cost, accuracies in percent; below, chance."""
    groups = groups_of(runs)
    settings = [setting for setting, _ in groups]
    columns = {str(i): [run["rows"] for run in group] for i, (_, group) in enumerate(groups)}
    keys = ordered_keys(columns)
    plain = [{"evaluated N": setting["N"], "tol": 0.0} for setting in settings]  # which needs no column
    shown = [k for k in settings[0] if any(s[k] != p.get(k, "") for s, p in zip(settings, plain))]
    costs = ["parameters", "tokens, M", "TFLOP"]
    table = [[*(k.replace("_", " ") for k in shown), *costs, *keys]]
    table.append(["--:" if k in ("N", *costs, *keys) else "---" for k in (*shown, *costs, *keys)])
    for (setting, group), found in zip(groups, columns.values()):
        line = [*("" if setting[k] is None else str(setting[k]) for k in shown), f"{group[0]['n_params']:,}"]
        for cost, unit in (("tokens", 1e6), ("flops", 1e12)):
            line.append(f"{statistics.mean(run[cost] for run in group) / unit:,.1f}")
        table.append(line + [cell([rows[k] for rows in found if k in rows]) for k in keys])
    rows = {key: row for found in columns.values() for some in found for key, row in some.items()}
    for floor in FLOORS:
        if all(floor in row for row in rows.values()):
            empty = [""] * (len(shown) + len(costs) - 1)
            table.append([f"*{floor}*", *empty, *(f"{100 * rows[key][floor]:.1f}" for key in keys)])
    return as_markdown(table)


def seeds_of(columns):
    """How many seeds, for headings: "1 seed", "3 seeds", or "1 to 3 seeds"."""
    seeds = {len({run["config"]["seed"] for run in runs}) for runs in columns.values()}
    text = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds)}"
    return text + (" seed" if text == "1" else " seeds")


def report(columns, args):
    """The text that ends on the screen: heading, runs, accuracy, and the losses for Depo."""
    config = next(iter(columns.values()))[0]["config"]
    lines = [f"{describe(config)}: {args.n} {args.split} problems, seed {args.seed}\n"]
    header = ["run", "trained N", "evaluated N", "tol", "passes", "steps", "seed", "loss"]
    table = [header, ["---", *["--:"] * 7]]
    for run in (run for runs in columns.values() for run in runs):
        at_t = "" if run["evaluated_t"] == run["config"]["t"] else f", t={run['evaluated_t']}"
        numbers = [run["config"]["N"], run["evaluated_N"], str(run["tol"]), f"{run['passes']:.2f}", run["step"]]
        table.append([run["path"] + at_t, *numbers, run["config"]["seed"], f"{run['loss']:.3f}"])
    lines.append(as_markdown(table))
    rows = {header: [run["rows"] for run in runs] for header, runs in columns.items()}
    lines += ["\nAccuracy in percent; ± and (seeds): mean and standard deviation over seeds; se: standard error.\n"]
    lines.append(comparison_table(rows))
    if config["task"] == "depo":
        rows = {
            header: [{key: r[key] for key in headline_keys(r)} for r in several] for header, several in rows.items()
        }
        lines += [
            "\nCross-entropy in nats per scored token (<answer> and name; with --t the name).\n",
            comparison_table(rows, "scored_loss"),
        ]
    return "\n".join(lines)


def machine_of(args):
    """What a results file says about the machine and the code that evaluated."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    command = shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])
    evaluated = {"evaluated_on": f"{platform.machine()} {device}", "torch": torch.__version__}
    return evaluated | {"commit": git_commit(), "command": command}


def problems_of(args):
    """What a results file says about the problems."""
    return {"split": args.split, "n": args.n, "seed": args.seed}


def tasks_of(path, task, args):
    """A run's task as it was trained, or with each t that is asked for: a list. Raises ValueError if it has no t."""
    if args.t and task.t is None:
        raise ValueError(f"--t is for runs that were trained with --t, {path} was not: leave it out")
    return [task.at(t) for t in dict.fromkeys(args.t)] if args.t else [task]


# -----------------------------------------------------------------------------
# figures

# Read off the figures of arXiv:2605.26099v3 (CC BY 4.0), to +-0.5 % (t=32), +-1.5 % (other t) and +-0.03 nats (Depo).
PAPER = {
    # (t, N): training tokens in billions, exact accuracy in percent. The axis of the figure with t < 32 is most
    # plausibly label tokens, 4 in 100, and is converted here
    "rule110": {
        (4, 1): ((0.05, 0.1), (99.6, 100)),
        (8, 1): ((0.05, 0.1, 0.15, 0.25), (29, 92, 98.5, 99.6)),
        (10, 1): ((0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1), (9.5, 27, 58, 90, 97, 99, 99)),
        (12, 1): ((0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1), (7.5, 9.5, 11.5, 18, 53, 78, 90)),
        (14, 1): ((0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1), (7, 8, 9, 11.5, 20.5, 34.5, 50.5)),
        (16, 1): ((0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1), (7, 7.3, 7.8, 8.5, 12, 17, 21.5)),
        (32, 1): ((1, 2, 3, 4, 5.05), (6.8, 7.3, 8.3, 9.4, 10.5)),
        (32, 2): ((1, 2, 3, 4, 5.05), (7, 8.4, 11.5, 15, 19.5)),
        (32, 3): ((1, 2, 3, 4, 5.05), (7, 10.5, 17.5, 25.5, 34)),
        (32, 4): ((1, 2, 3, 4, 5.05), (7.6, 12.5, 19.8, 28.3, 36.3)),
    },
    # N: hops, test loss per scored token after 138 k steps. That <answer> counts is our reading: without it, not
    # knowing the node would cost ln(75) / 1.6 = 2.7 nats per token, with it 1.66, and the figure ends at 1.70
    "depo": {
        1: ((1, 2, 4, 8, 16), (0.17, 0.48, 1.7, 1.7, 1.7)),
        2: ((1, 2, 4, 8, 16), (0.28, 0.52, 1.37, 1.7, 1.7)),
        4: ((1, 2, 4, 8, 16), (0.22, 0.43, 0.79, 1.16, 1.46)),
    },
}
# none of GSM-Infinite: there the paper starts from pretrained models
PAPER_SIZES = {
    "rule110": {"width": 24, "strings": 4, "L": 24},
    "depo": {"nodes": 75, "min_nodes": 3, "hops": 16, "queries": 10, "name_tokens": 2, "L": 75},
}

COLOURS = {1: "#6b7280", 2: "#0072b2", 3: "#009e73", 4: "#d55e00", 6: "#cc79a7", 8: "#e69f00"}
OTHER_COLOURS = ("#111827", "#56b4e9", "#7c2d12", "#65a30d", "#7c3aed")  # of other N, in their order
PAPER_STYLE = {"linestyle": "none", "marker": "D", "markersize": 6, "markerfacecolor": "white", "zorder": 4}


def import_pyplot():
    """matplotlib.pyplot, drawing to files only. Raises ValueError with a hint if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib, or leave --plot out") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def figure_stamp(runs):
    """A hash of what a figure shows of some runs, which its PNG carries: so a test knows if they changed since."""
    shown = [run if "held" in run else [run["curve"], run["rows"]] for run in runs]  # a probe, or scores
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def save_figure(figure, path, runs):
    """Write a figure of some runs as PNG, whole or not at all, and forget it."""
    with whole_file(path) as name:
        figure.savefig(name, dpi=150, format="png", metadata={"Description": figure_stamp(runs)})
    import_pyplot().close(figure)


def as_trained(run):
    """Is a run scored with the N and t that it was trained with, and not adaptively?"""
    config = run["config"]
    return (run["evaluated_N"], run["evaluated_t"], run["tol"]) == (config["N"], config["t"], 0)


def paper_points(run):
    """The paper's numbers for a run's setting: two sequences (see PAPER), or None if it has no such setting.

    That has the paper's sizes of the task (the model may be of any size), no flag that is not in the paper, and the
    passes of training.
    """
    config = run["config"]
    setting = PAPER_SIZES.get(config["task"], {}) | LATER_FLAGS | {"loop": None, "positions": False}
    if config["task"] not in PAPER_SIZES or not as_trained(run) or not setting.items() <= config.items():
        return None
    return PAPER[config["task"]].get((config["t"], config["N"]) if config["task"] == "rule110" else config["N"])


def by_t(runs):
    """Runs of one column, split by t: t (None without one) -> list over seeds."""
    values = sorted({run["config"]["t"] for run in runs})
    return {t: [run for run in runs if run["config"]["t"] == t] for t in values}


def draw_line(ax, x, series, colour, dashes):
    """Mean and min-max band over seeds. series: list over seeds of lists as long as x."""
    low, mean, high = np.min(series, 0), np.mean(series, 0), np.max(series, 0)
    ax.plot(x, mean, color=colour, linestyle=dashes, linewidth=1.8, marker="o", markersize=3.5)
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def looks(columns):
    """header -> (colour, dashes): a colour per evaluated N; columns of equal N differ in their dashes."""
    others = sorted({runs[0]["evaluated_N"] for runs in columns.values()} - set(COLOURS))
    colours = COLOURS | dict(zip(others, itertools.cycle(OTHER_COLOURS)))
    seen, result = {}, {}
    for header, runs in columns.items():
        N = runs[0]["evaluated_N"]
        seen[N] = seen.get(N, -1) + 1
        result[header] = colours[N], ["-", "--", ":", "-."][seen[N] % 4]
    return result


def draw_floors(ax, rows, place=None):
    """Dotted chance levels: a short line for each key of `place` (key -> x), or one across without it."""
    for floor, colour in FLOORS.items():
        if floor not in next(iter(rows.values())):
            continue
        label = f"{floor} guess"
        if place is None:
            ax.axhline(100 * headline(rows, floor), color=colour, linestyle=":", linewidth=1.3, label=label)
            continue
        x, levels = np.array(list(place.values())), [100 * rows[key][floor] for key in place]
        ax.hlines(levels, x - 0.45, x + 0.45, color=colour, linestyle=":", lw=1.3, label=label)


def label_ends(ax, ends):
    """Write each curve's t at its end. ends: (x, y, t, colour) each; labels that would overlap become one."""
    while ends:
        x, y, _, colour = min(ends)
        close = [end for end in ends if end[0] == x and end[1] < y + 5]
        ax.annotate(f" t={', '.join(map(str, sorted({t for _, _, t, _ in close})))}", (x, y), color=colour, fontsize=8)
        ends = [end for end in ends if end not in close]


def draw_curves(ax, columns):
    """Left panel: validation accuracy against training tokens."""
    every_t = sorted({run["config"]["t"] for runs in columns.values() for run in runs})
    one_column = len(columns) == 1 and len(every_t) > 1
    shades = dict(zip(every_t, itertools.cycle(list(COLOURS.values())[1:]))) if one_column else {}
    ends = []
    end = max((max(run["curve"]["tokens"], default=0) for runs in columns.values() for run in runs), default=0)
    unit, word = (1e9, "billions") if end >= 1e9 else (1e6, "millions") if end >= 1e6 else (1e3, "thousands")
    for header, runs in columns.items():
        colour, dashes = looks(columns)[header]
        for t, seeds in by_t(runs).items():
            colour = shades.get(t, colour)
            curves = [dict(zip(run["curve"]["tokens"], run["curve"]["accuracy"])) for run in seeds]
            x = sorted(set.intersection(*(set(curve) for curve in curves)))
            if not x:
                continue
            draw_line(ax, np.divide(x, unit), [[100 * c[i] for i in x] for c in curves], colour, dashes)
            ends.append((x[-1] / unit, float(np.mean([100 * c[x[-1]] for c in curves])), t, colour))
            if seeds[0]["config"]["task"] == "rule110" and (points := paper_points(seeds[0])):
                tokens = np.multiply(points[0], 1e9 / unit)
                ax.plot(tokens, points[1], color=colour, lw=0.8, alpha=0.6, ls=(0, (1, 1)))
                ax.plot(tokens, points[1], color=colour, **PAPER_STYLE)
    if len(every_t) > 1:
        label_ends(ax, ends)
    first = next(iter(columns.values()))[0]
    if len(every_t) == 1:
        draw_floors(ax, first["rows"])
    what = {"rule110": "all answers exact", "gsm": "all op"}.get(first["config"]["task"], "all questions")
    ax.set(xlabel=f"training tokens ({word})", ylabel=f"validation accuracy, {what} (%)")
    ax.set_xlim(0, 1.06 * end / unit or 1)


def draw_difficulty(ax, columns, field):
    """Right panels: a field of the final rows against difficulty; dots are means, bars span the seeds."""
    merged = {key: row for runs in columns.values() for run in runs for key, row in run["rows"].items()}
    keys = [key for key in ordered_keys({"": [merged]}) if key in headline_keys(merged)]
    place, scale = {key: i for i, key in enumerate(keys)}, 100 if field == "accuracy" else 1
    for j, (header, runs) in enumerate(columns.items()):
        colour, dashes = looks(columns)[header]
        shift = 0.12 * (j - (len(columns) - 1) / 2)  # side by side, so that no dot hides another
        found = {key: [scale * r["rows"][key][field] for r in runs if key in r["rows"]] for key in keys}
        found = {key: values for key, values in found.items() if values}
        x = np.array([place[key] + shift for key in found])
        mean = np.array([np.mean(values) for values in found.values()])
        bars = [mean - [min(v) for v in found.values()], [max(v) for v in found.values()] - mean]
        ax.errorbar(x, mean, bars, color=colour, linestyle=dashes, lw=1.2, marker="o", markersize=5, label=header)
        draw_paper(ax, runs, place, shift, field, colour)
    if field == "accuracy":
        draw_floors(ax, merged, place)
    numbers = [(re.search(r"\d+", key) or [key])[0] for key in keys]
    ax.set_xticks(list(place.values()), numbers)
    ax.set_xlim(-0.6, len(keys) - 0.4)
    rule110 = next(iter(columns.values()))[0]["config"]["task"] == "rule110"
    ax.set_xlabel("t, steps of Rule 110" if rule110 else re.split("[ =]", keys[0])[0])
    ax.set_ylabel("final accuracy (%)" if field == "accuracy" else "final loss per scored token (nats)")


def draw_paper(ax, runs, place, shift, field, colour):
    """The paper's final numbers for one column, as open diamonds: accuracy for Rule 110, loss for Depo."""
    for run in {run["evaluated_t"]: run for run in runs}.values():
        points = paper_points(run)
        if points and run["config"]["task"] == "rule110":
            ax.plot(place[f"t={run['config']['t']} exact"] + shift, points[1][-1], color=colour, **PAPER_STYLE)
        elif points and field != "accuracy":
            x = [place[f"hops {k}"] + shift for k in points[0] if f"hops {k}" in place]
            y = [loss for k, loss in zip(*points) if f"hops {k}" in place]
            ax.plot(x, y, color=colour, **PAPER_STYLE)


def scored_again(runs):
    """Is some model scored in more than one way, or in another one than its learning curve? Then none are drawn."""
    again = len({run["path"] for run in runs}) < len(runs)
    return again or any(not as_trained(run) for run in runs)


def figure_title(configs, t):
    """What was trained on, at which size, for a figure. configs: the runs' flags; t: the steps or hops they answer."""
    config, asleep = configs[0], sorted({config["sleep_attention"] for config in configs})
    same_task = PAPER_SIZES.get(config["task"], {"preset": "paper"}).items() <= config.items()
    reduced = config["preset"] == "tiny" or config["preset"] != "paper" and not same_task
    sizes = describe(config) + (f", t {', '.join(map(str, sorted(t)))}" if t else "")
    return "reduced size: " * reduced + sizes + f"; asleep attention is {' or '.join(asleep)}"


def plot(columns, path, problems):
    """
    Draw learning curves and final scores to a PNG; for Depo also the loss, which the paper plots.
    problems: what the final scores are over, for the title, such as "2048 test problems".
    """
    plt = import_pyplot()
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.color": "#e5e7eb", "grid.linewidth": 0.6, "axes.axisbelow": True})
    runs = [run for group in columns.values() for run in group]
    config = runs[0]["config"]
    with_curves, with_loss = not scored_again(runs), config["task"] == "depo"
    panels = 1 + with_curves + with_loss
    figure, axes = plt.subplots(1, panels, figsize=(1 + 4 * panels, 4.4), layout="constrained", squeeze=False)
    final, *others = axes[0, with_curves:]
    draw_difficulty(final, columns, "accuracy")
    if with_curves:
        draw_curves(axes[0, 0], columns)
    for ax in {axes[0, 0], final}:
        ax.set_ylim(-3, 103)
    for ax in others:
        draw_difficulty(ax, columns, "scored_loss")
        ax.set_ylim(bottom=0)
    handles, labels = final.get_legend_handles_labels()
    legend = sorted(zip(labels, handles), key=lambda pair: pair[0].endswith("guess"))  # runs first
    if any(paper_points(run) for run in runs):
        legend.append(("paper (digitised; right: final)", plt.Line2D([], [], color="#374151", **PAPER_STYLE)))
    labels, handles = zip(*legend)
    ncols = len(labels) if sum(map(len, labels)) < 74 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
    spread = "; bands and bars: min to max" if len({run["config"]["seed"] for run in runs}) > 1 else ""
    sizes = figure_title([run["config"] for run in runs], {run["evaluated_t"] for run in runs} - {None})
    lines = textwrap.wrap(sizes, 110) + [f"{seeds_of(columns)}, {problems}{spread}"]
    figure.suptitle("\n".join(lines), fontsize=10)
    save_figure(figure, path, runs)


# -----------------------------------------------------------------------------
# what sleeping and answering cost


def milliseconds(call, device):
    """Times of twenty calls in ms, a list; one call before them does not count."""
    times = []
    for _ in range(21):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return times[1:]


def time_sleeper(sleeper, device):
    """One row of `measure_cost`: times in ms (lists) of sleeping and of answering, now; nothing of it stays.

    sleep: over a full window, and over one token. first: the first token of an answer to a question of one token, with
    an empty window and with a full one; next: the next one, which has the window in its cache.
    """
    model, config, L = sleeper.model, sleeper.config, sleeper.L
    ids = torch.randint(model.config.vocab_size, (1, L), device=sleeper.window.device)
    state, times = sleeper.state, {}
    with torch.no_grad():
        for name, x in {"sleep full": ids, "sleep one token": ids[:, :1]}.items():
            h = model.embed(x)
            times[name] = milliseconds(lambda h=h: sleep(model, h, state, config), device)
        for name, x in {"empty": ids[:, :1], "full": ids}.items():
            times[f"first, {name}"] = milliseconds(lambda x=x: answer(model, x, state, 1, config), device)
        for name, past in {"empty": 1, "full": L - 1}.items():
            _, read = model.blocks(model.embed(ids[:, :past]), state, span=attention_span(config))
            times[f"next, {name}"] = milliseconds(lambda s=read: answer(model, ids[:, :1], s, 1, config), device)
    return times


def cache_bytes(model, tokens):
    """What the attention layers' keys and values of a text would take if none were evicted."""
    attention = [block.mixer for block in model.layers if block.attends]
    numbers = sum(2 * min(tokens, mixer.window) * mixer.k_proj.out_features for mixer in attention)
    kind = model.embedding.weight.device.type
    autocasting = torch.is_autocast_enabled(kind)
    return numbers * (torch.get_autocast_dtype(kind) if autocasting else model.embedding.weight.dtype).itemsize


def measure_cost(model, config, Ns, tokens, device):
    """Stream random ids, B=1, and time sleeping and answering on the way: a list of rows.

    Every N reads the same stream, up to `tokens` tokens; measured at 1,000, 10,000, ... of them and at the end. config:
    the run's flags, a dict.
    """
    rows, L = [], config["L"]
    ends = [10**k for k in range(3, 12) if 10**k < tokens] + [tokens]
    sleepers = [Sleeper(model, sleep_config(config | {"N": N}), L) for N in Ns]
    rng, seen = torch.Generator().manual_seed(0), 0
    with tqdm(total=tokens, unit="token", disable=None) as bar, autocast(device):
        for end in ends:
            while seen < end:
                ids = torch.randint(model.config.vocab_size, (1, min(end - seen, 64 * L)), generator=rng)
                for sleeper in sleepers:
                    sleeper.feed(ids)
                seen += ids.shape[1]
                bar.update(ids.shape[1])
            for N, sleeper in zip(Ns, sleepers):
                times = time_sleeper(sleeper, device)
                times = {name: list(np.percentile(ms, (25, 50, 75))) for name, ms in times.items()}
                size = {"state_bytes": sum(a.nbytes for a in state_tensors(sleeper.state))}
                rows.append({"N": N, "tokens": end, "ms": times, "cache_bytes": cache_bytes(model, end)} | size)
    return sorted(rows, key=lambda row: (row["N"], row["tokens"]))


def slopes(rows, name):
    """How a time depends on N and on the length of the past: name -> (ms, standard error), by least squares.

    "per pass": for one more pass; "per tenfold past": for a stream ten times as long. rows: from measure_cost.
    """
    y = np.array([row["ms"][name][1] for row in rows])
    X = np.array([[1.0, row["N"], math.log10(row["tokens"])] for row in rows])
    if len(y) < 4 or min(np.ptp(X[:, 1:], 0)) < 1:  # at least another N and a past ten times as long
        return {}
    fit, *_ = np.linalg.lstsq(X, y, rcond=None)
    variance = ((y - X @ fit) ** 2).sum() / (len(y) - 3) * np.diag(np.linalg.inv(X.T @ X))
    places = {"per pass": 1, "per tenfold past": 2}
    return {key: (float(fit[i]), float(variance[i] ** 0.5)) for key, i in places.items()}


def cost_table(rows):
    """The rows of measure_cost and their slopes, as Markdown."""
    names = list(rows[0]["ms"])
    header = ["N", "tokens seen", *names, "memory", "cache if kept"]
    table = [header, ["--:"] * len(header)]
    for row in rows:
        times = (f"{mid:.2f} ({low:.2f}-{high:.2f})" for low, mid, high in (row["ms"][name] for name in names))
        sizes = (f"{row[key] / 1024:,.0f} KiB" for key in ("state_bytes", "cache_bytes"))
        table.append([row["N"], f"{row['tokens']:,}", *times, *sizes])
    found = [slopes(rows, name) for name in names]
    for what in found[0]:
        table.append([what, "", *("{:+.3f} ± {:.3f}".format(*each[what]) for each in found), "", ""])
    return as_markdown(table)


def report_cost(args, loaded):
    """`--cost`: print and write what one run costs. Raises ValueError for several runs."""
    if len(args.runs) > 1:
        raise ValueError("--cost times one run: give one")
    model, _, config, _ = loaded[0]
    if config["L"] < 2 or config["answer_passes"] > 1:
        raise ValueError("--cost times windows of 2 tokens or more that are answered in one pass: this run has others")
    Ns = list(dict.fromkeys(args.N or sorted({1, 2, 4, config["N"]})))
    rows = measure_cost(model, config, Ns, args.tokens, args.device)
    if args.json:
        found = {name: slopes(rows, name) for name in rows[0]["ms"]}
        about = {"run": args.runs[0], "config": config} | machine_of(args)
        write_json(args.json, about | {"rows": rows, "slopes": found})
    print(f"{args.runs[0]}: milliseconds for a batch of one, median (quartiles); a window is {config['L']} tokens\n")
    print(cost_table(rows))


# -----------------------------------------------------------------------------
# a look into the memory


PROBE_FIT = 16_384  # problems of the training split that a probe is fitted to
CELLS_FIT = 4096  # the same for find_cells, whose features are fewer numbers than a memory
PROBE_LIMIT = 8192  # numbers in a memory: the normal equations of one probe are a matrix of that size


def at_last_window(model, x, L, rules):
    """Sleep over all windows of x (n, T) but the last: that one, embedded, and the state before it."""
    *windows, last = x.split(L, 1)
    state = model.initial_state()
    for window in windows:
        state = sleep(model, model.embed(window), state, rules)[0]
    return model.embed(last), state


@torch.no_grad()
def memories(model, task, config, split, n, seed):
    """What the memory of n problems holds if each window of their context is slept over 0..N times.

    config: the run's flags, a dict. Returns x (n, T); the fast weights after 0..N passes, a list of (n, numbers), on
    the CPU; and how much each of N passes over the last window changed each delta layer's, relative, (N, delta
    layers), averaged over problems.
    """
    rules, L, device = sleep_config(config), config["L"], model.embedding.weight.device
    deltas = [i for i, block in enumerate(model.layers) if not block.attends]
    xs, memory, changes = [], [[] for _ in range(rules.N + 1)], torch.zeros(rules.N, len(deltas), device=device)
    B = batch_size(task)
    for s in tqdm(range(math.ceil(n / B)), "memories", leave=False, disable=None):
        x = task.batch(seed, split, s, B)[0][: n - s * B]
        context = x[:, : task.context].to(device)
        for N in range(1, rules.N + 1):
            fewer = replace(rules, N=N)
            with autocast(device):
                h, state = at_last_window(model, context, L, fewer)
                for i, (_, new) in enumerate(sleep_passes(model, h, state, fewer)):
                    if N == rules.N:
                        changes[i] += torch.stack([relative_change([state[j]], [new[j]]).sum() / n for j in deltas])
                    state = new
            memory[N].append(torch.cat([state[j].S.flatten(1) for j in deltas], 1).cpu())
        memory[0].append(torch.zeros_like(memory[1][-1]))
        xs.append(x)
    return torch.cat(xs), [torch.cat(part) for part in memory], changes.tolist()


def ridge(X, Y):
    """Least squares with a small penalty: X (n, D), Y (n, C) -> weights (D, C), float32."""
    penalty = 1e-3 * X.square().sum() / min(X.shape)
    if len(X) < X.shape[1]:
        return X.T @ torch.linalg.solve(X @ X.T + penalty * torch.eye(len(X)), Y)
    return torch.linalg.solve(X.T @ X + penalty * torch.eye(X.shape[1]), X.T @ Y)


def linear_probe(X, targets, X_test, targets_test):
    """Predict what a memory holds by a linear map of its numbers: name -> (accuracy on X_test, of the commonest class).

    X (n, D), targets: name -> (n, items) classes, -1 where a problem does not have the item: each item has a map of its
    own, fitted to the problems that have it. The test problems are others.
    """
    first = next(iter(targets))
    has, has_test = torch.from_numpy(targets[first] >= 0), torch.from_numpy(targets_test[first] >= 0)
    classes = 1 + max(int(a.max()) for a in targets.values())
    shift, scale = X.mean(0), X.std() + 1e-30
    X, X_test = ((torch.cat(((a - shift) / scale, torch.ones(len(a), 1)), 1)) for a in (X, X_test))
    items = torch.arange(has.shape[1])
    right, common = {name: [] for name in targets}, {name: [] for name in targets}
    for group in [items] if has.all() and has_test.all() else items[:, None]:
        rows, rows_test = has[:, group[0]], has_test[:, group[0]]
        Y = torch.cat([torch.from_numpy(targets[name])[rows][:, group] for name in targets], 1)  # (n', names * items')
        W = ridge(X[rows], F.one_hot(Y, classes).flatten(1).float())
        said = (X_test[rows_test] @ W).unflatten(1, (-1, classes)).argmax(-1).split(len(group), 1)
        for name, guess, seen in zip(targets, said, Y.split(len(group), 1)):
            truth = torch.from_numpy(targets_test[name])[rows_test][:, group]
            right[name].append((guess == truth).flatten())
            common[name].append((seen.mode(0).values == truth).flatten())
    return {name: tuple(float(torch.cat(a[name]).float().mean()) for a in (right, common)) for name in targets}


def features_asleep(model, config, x, context):
    """The features that enter each pass over the last window of x[:, :context], a list of N tensors (n, L, d_model)."""
    rules, device = sleep_config(config), model.embedding.weight.device
    with autocast(device):
        h, state = at_last_window(model, x[:, :context].to(device), config["L"], rules)
        return [fed_in.float().cpu() for fed_in, _ in sleep_passes(model, h, state, rules)]


@torch.no_grad()
def find_cells(model, task, config, split, n, seed):
    """Rule 110, a window per string: after j passes, which cells of step j do the features at each position tell?

    Returns how often a linear map of the features there, fitted to CELLS_FIT other problems, says a cell's bit after j
    steps, in the last string: nested lists by j = 0..N-1, position and cell. Chance is the commonest bit, 50 to 63 %.
    """
    x, x_test = (task.batch(seed, *which)[0] for which in (("train", 0, CELLS_FIT), (split, 0, n)))
    steps, steps_test = task.hidden(x), task.hidden(x_test)
    found = []
    each_pass = zip(*(features_asleep(model, config, a, task.context) for a in (x, x_test)))
    for j, (h, h_test) in enumerate(tqdm(each_pass, "cells", config["N"], leave=False, disable=None)):
        bits, bits_test = (a[f"step {j}"] for a in (steps, steps_test))
        cells, cells_test = (dict(enumerate(np.split(a, task.width, 1))) for a in (bits, bits_test))
        told = [linear_probe(h[:, i], cells, h_test[:, i], cells_test) for i in range(task.width)]
        found.append([[round(told[i][cell][0], 4) for cell in cells] for i in range(task.width)])
    return found


def probe(path, loaded, args):
    """One run, looked into: a dict for JSON.

    "held": what a linear probe finds in the memory after passes 0..N, "floor": what the commonest class would score,
    "woken": the accuracy of the answers if the model is woken after pass 1..N, "change": of S by each pass and layer.
    "cells": what find_cells finds, where whole rows of Rule 110 are asked for, a window is a string and N <= t + 1.
    """
    model, task, trained, _ = loaded
    config = trained | {"N": (args.N or [trained["N"]])[0]}
    (task,) = tasks_of(path, task, args)
    x, memory, _ = memories(model, task, config, "train", PROBE_FIT, args.seed)
    x_test, memory_test, change = memories(model, task, config, args.split, args.n, args.seed)
    targets, targets_test = task.hidden(x), task.hidden(x_test)
    pairs = zip(tqdm(memory, "probes", disable=None), memory_test)
    each = [linear_probe(a, targets, b, targets_test) for a, b in pairs]
    woken = []
    for n in range(1, config["N"] + 1):
        algorithm = algorithm_of(model, config | {"N": n})
        woken.append(evaluate(algorithm, task, args.split, config["L"], args.n, args.seed)["rows"])
    result = {"path": path, "config": trained, "evaluated_N": config["N"], "evaluated_t": task.t, "change": change}
    result["held"] = {name: [found[name][0] for found in each] for name in targets}
    result["floor"] = {name: each[0][name][1] for name in targets}
    result["woken"] = {key: [rows[key]["accuracy"] for rows in woken] for key in headline_keys(woken[0])}
    if config["ask"] == "row" and config["L"] == task.width and config["N"] <= task.t + 1:
        result["cells"] = find_cells(model, task, config, args.split, args.n, args.seed)
    return result


def probe_panels(results):
    """Means over runs as (title, row labels, column labels, rows, all 0 to 100): held, woken, change of S, cells."""
    N, one = results[0]["evaluated_N"], results[0]

    def mean(part, key):
        return list(100 * np.mean([run[part][key] for run in results], 0))

    layers = [f"layer {i}" for i, kind in enumerate(one["config"]["pattern"]) if kind in FAST_MIXERS]
    change = 100 * np.mean([run["change"] for run in results], 0).T  # (delta layers, N)
    passes = [str(n) for n in range(N + 1)]
    panels = [
        ("a linear probe of S finds (%)", list(one["held"]), passes, [mean("held", key) for key in one["held"]]),
        ("answers right if woken (%)", list(one["woken"]), passes[1:], [mean("woken", key) for key in one["woken"]]),
        ("change of S by this pass (%)", layers, passes[1:], [list(row) for row in change]),
    ]
    if "cells" in one:
        cells = 100 * np.mean([run["cells"] for run in results], 0)  # (N, positions, cells)
        near = range(-min(N, len(cells[0]) - 1), 3)
        told = [list(np.diagonal(cells, d, 1, 2).mean(1)) for d in near]  # averaged over the positions that have both
        rows = [f"cell i{d:+d}" for d in near]
        panels.append(("features at i tell step j after j passes (%)", rows, passes[:-1], told))
    return panels


def probe_table(results):
    """The panels as Markdown; beside what the probe finds, what the commonest class would score."""
    tables = []
    for title, rows, columns, values in probe_panels(results):
        floors = results[0]["floor"] if "probe" in title else {}
        header = [f"{title}, after pass", *columns, *(["commonest"] if floors else [])]
        table = [header, ["---", *["--:"] * (len(header) - 1)]]
        for row, line in zip(rows, values):
            floor = [f"{100 * floors[row]:.1f}"] if floors else []
            table.append([row, *(f"{value:.1f}" for value in line), *floor])
        tables.append(as_markdown(table))
    return "\n\n".join(tables)


def plot_probe(results, path):
    """The panels as heat maps, a PNG."""
    plt = import_pyplot()
    panels = probe_panels(results)
    widths = [len(columns) for _, _, columns, _ in panels]
    size = (12, 3.6) if len(panels) == 3 else (18, 4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", width_ratios=widths)
    for ax, (title, rows, columns, values) in zip(axes, panels):
        ax.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=100)
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else "black")
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
        ax.set(title=title, xlabel="after pass")
        ax.title.set_fontsize(10)
    configs = [run["config"] for run in results]
    Ns = f"trained with N={configs[0]['N']}, probed with N={results[0]['evaluated_N']}"
    seeds = "seed" + "s" * (len(configs) > 1) + " " + ", ".join(str(config["seed"]) for config in configs)
    title = figure_title(configs, {results[0]["evaluated_t"]} - {None})
    figure.suptitle("\n".join(textwrap.wrap(f"{title}; {Ns}; {seeds}", 55 * len(panels))), fontsize=10)
    save_figure(figure, path, results)


def report_probe(args, loaded):
    """`--probe`: print, write and draw what the runs' memories hold. Raises ValueError for runs it cannot probe."""
    model, task, config, _ = loaded[0]
    if not hasattr(task, "hidden") or (task.name == "depo" and task.name_tokens > 1):
        raise ValueError("--probe knows the bits of rule110 and the one-token names of depo: give such runs")
    settings = [flags_of(c) | {"t": c["t"]} for _, _, c, _ in loaded]
    seeds = {c["seed"] for _, _, c, _ in loaded}
    if any(setting != settings[0] for setting in settings) or len(seeds) < len(loaded):
        raise ValueError("--probe averages over seeds: give runs that differ in nothing else")
    if config["loop"] or args.split == "train":
        raise ValueError("--probe needs a run without --loop, and --split val or test: its probe is fitted to train")
    numbers = sum(math.prod(block.mixer.S_shape) for block in model.layers if not block.attends)
    if numbers > PROBE_LIMIT:
        raise ValueError(f"--probe takes {PROBE_LIMIT} numbers of memory at most, not {numbers}: use --preset tiny")
    results = [probe(*each, args) for each in zip(args.runs, loaded)]
    if args.json:
        about = {"fitted_on": PROBE_FIT} | ({"cells_fitted_on": CELLS_FIT} if "cells" in results[0] else {})
        about |= problems_of(args) | machine_of(args)
        write_json(args.json, about | {"runs": results})
    print(probe_table(results))
    if args.plot:
        plot_probe(results, args.plot)


# -----------------------------------------------------------------------------
# a conversation

CHAT_HELP = """What you type is read; when {L} tokens are in the window the model sleeps over them.
  ? TEXT      ask; the answer stays out of the memory
  /sleep      sleep now, over what is in the window
  /example    print a problem nobody has seen, to type or paste
  /save FILE  write the memory      /load FILE  go on from one      /new  forget everything
  /quit"""


def until_end(text):
    """What stands before <end>."""
    return text.split("<end>")[0].strip()


class Chat:
    """A Sleeper in the terminal: every line of text is a command, a question or something to remember."""

    def __init__(self, model, task, config):
        self.model, self.task, self.config, self.examples = model, task, config, 0
        self.renew()

    def renew(self):
        """An empty memory."""
        self.sleeper = Sleeper(self.model, sleep_config(self.config), self.config["L"], on_pass=self.show)

    def show(self, n, change):
        """Called after every pass of a sleep."""
        print(f"  sleeping, pass {n}/{self.sleeper.config.N}: S changed by {100 * change.item():.0f} %")

    def ids(self, text):
        """Text -> (1, T) ids."""
        return torch.tensor([self.task.encode(text)], dtype=torch.int64)

    def example(self):
        """Print a test problem as it would be typed, and its first answer."""
        x, y, m = (a[0] for a in self.task.batch(0, "test", self.examples, 1))
        self.examples += 1
        start = int(m.nonzero()[0])
        prompt = len(self.task.encode(self.task.prompt))
        question = start + 1 - prompt if prompt else self.task.context
        print(f"  {self.task.decode(x[:question])}\n  ? {self.task.decode(x[question : start + 1])}")
        first = m[start : start + self.task.answer_tokens].int().cumprod(0).bool()  # up to the first gap
        print(f"  the right answer: {until_end(self.task.decode(y[start : start + len(first)][first]))}")

    def ask(self, text):
        """Print the answer to a question; an empty one is the task's own prompt."""
        said = self.sleeper.ask(self.ids(text or self.task.prompt), self.task.answer_tokens)[0]
        print(f"  {until_end(self.task.decode(said))}")

    def line(self, text):
        """Do what one line says. Raises ValueError for what a user can mend; the memory is then as before."""
        command, _, rest = text.partition(" ")
        if command.startswith("?"):
            self.ask(text[1:].strip())
        elif command == "/sleep":
            self.sleeper.sleep()
        elif command == "/example":
            self.example()
        elif command == "/save" and rest:
            self.sleeper.save(rest)
        elif command == "/load" and rest:
            sleeper = Sleeper.load(rest, self.model)
            if len(sleeper.window) > 1:
                raise ValueError(f"{rest} is the memory of {len(sleeper.window)} streams: a chat has one")
            self.sleeper, sleeper.on_pass = sleeper, self.show
        elif command == "/new":
            self.renew()
        elif command.startswith("/"):
            print(CHAT_HELP.format(L=self.sleeper.L))
        elif text:
            self.sleeper.feed(self.ids(text))
        print(f"  [{self.sleeper.window.shape[1]} of {self.sleeper.L} tokens in the window]")


def chat(args, loaded):
    """`--chat`: talk to one run until the input ends or says /quit. Raises ValueError for several runs."""
    if len(args.runs) > 1:
        raise ValueError("--chat talks to one run: give one")
    model, task, config, _ = loaded[0]
    if config["answer_passes"] > 1:
        raise ValueError("--chat answers in one pass, but this run was trained to loop over its answers")
    if max(len(args.N or []), len(args.tol)) > 1:
        raise ValueError("--chat sleeps in one way: give one --N and one --tol")
    talk = Chat(model, task, config | {"N": (args.N or [config["N"]])[0], "tol": (args.tol or [0.0])[0]})
    with contextlib.suppress(AttributeError, ImportError):
        sys.stdin.reconfigure(errors="replace")
        import readline  # noqa: F401  without it a terminal cuts a line after 4,095 characters
    print(CHAT_HELP.format(L=config["L"]))
    while True:
        try:
            text = input("> ").strip()
            if text == "/quit":
                return
            with autocast(args.device):
                talk.line(text)
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n  interrupted; /quit ends")
        except (ValueError, OSError, RuntimeError) as error:  # torch reports an unwritable file as RuntimeError
            print(f"  {error}")


# -----------------------------------------------------------------------------
# tables from results files


def as_text(value):
    """A measured value as a table shows it: a text as it is, an integer in full, else three digits; None is empty."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 99.95 else f"{value:#.3g}"


def measured_table(saved):
    """Markdown of a file of measurements: a line per row, and the columns that the file names, {heading: key}."""
    rows = [[row[key] for key in saved["columns"].values()] for row in saved["rows"]]
    table = [[*saved["columns"]], ["---" if isinstance(value, str) else "--:" for value in rows[0]]]
    table += [[as_text(value) for value in row] for row in rows]
    return as_markdown(table)


def other_table(saved):
    """The Markdown of a results file without scored runs: of --cost, --probe, kernels.py, or other measurements."""
    if "slopes" in saved:
        return cost_table(saved["rows"])
    if "runs" in saved:
        return probe_table(saved["runs"])
    return benchmark_table(saved["rows"]) if "bandwidth" in saved else measured_table(saved)


def with_defaults(run, rows):
    """A run of a results file, also of an older one, with only the difficulties that start with one of `rows`."""
    run = {"curve": {"tokens": [], "accuracy": []}} | run
    kept = {key: row for key, row in run["rows"].items() if not rows or key.startswith(tuple(rows))}
    return {"evaluated_t": run["config"]["t"]} | run | {"config": LATER_FLAGS | run["config"], "rows": kept}


def results_table(path, rows, budget, figure=None):
    """
    The Markdown table of a results file, of all its difficulties or of those that start with one of `rows`; with
    `budget` that of budget_table. figure: a PNG to draw it to. Raises ValueError if the file holds no such results.
    """
    saved = read_json(path, "give a results file that eval.py --json wrote")
    try:
        if "runs" not in saved or "held" in saved["runs"][0]:
            unfit = {"rows": rows, "budget": budget, "plot": figure and "runs" not in saved}
            if wrong := [name for name, given in unfit.items() if given]:
                raise ValueError(f"{path} has no scored runs: leave --{wrong[0]} out")
            if figure:
                plot_probe(saved["runs"], figure)
            return other_table(saved)
        runs = [with_defaults(run, rows) for run in saved["runs"]]
        columns = columns_of(runs)
        scores = {header: [run["rows"] for run in group] for header, group in columns.items()}
        if not ordered_keys(scores):
            raise ValueError(f"{path} has no difficulty that starts with {' or '.join(rows)}: give another --rows")
        table = budget_table(runs) if budget else comparison_table(scores)
        problems = f"{saved.get('n')} {saved.get('split')} problems"
        to_draw = scored_again(runs) or any(run["curve"]["tokens"] for run in runs)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{path} is no results file: give one that eval.py --json wrote") from None
    if figure and not to_draw:
        raise ValueError(f"{path} holds no learning curves: score its runs again, with --json and --plot")
    if figure:
        plot(columns, figure, problems)
    return table


MARKER = re.compile(r"^<!-- python eval\.py (--table .+) -->$")
END_MARKER = "<!-- end of table -->"


def renewed_tables(path):
    """The text of a Markdown file with its generated tables made anew.

    They stand between `<!-- python eval.py --table FILE.json -->`, FILE.json relative to the Markdown file, with or
    without --rows and --budget, and `<!-- end of table -->`. Raises ValueError or OSError where a results file cannot
    be read or the end is missing.
    """
    with open(path) as f:
        lines, new = iter(f.read().split("\n")), []
    for line in lines:
        new.append(line)
        if found := MARKER.match(line):
            asked = parse_args(shlex.split(found[1]))
            for file in asked.runs:
                table = results_table(os.path.join(os.path.dirname(path), file), asked.rows, asked.budget)
                new += table.split("\n")
            new.append(END_MARKER)
            # this also skips what stood there
            if next((old for old in lines if old == END_MARKER or MARKER.match(old)), None) != END_MARKER:
                raise ValueError(f"{path}: no line {END_MARKER} after {line}")
    return "\n".join(new)


def report_tables(args):
    """`--table`: print the tables of results files; in a Markdown file, put them where it asks for them."""
    if args.plot and (len(args.runs) > 1 or args.rows or args.runs[0].endswith(".md")):
        raise ValueError("--table --plot draws all of one results file: give one, and leave --rows out")
    if (args.rows or args.budget) and any(path.endswith(".md") for path in args.runs):
        raise ValueError(
            "what the tables of a Markdown file show stands above each of them: leave --rows, --budget out"
        )
    for path in args.runs:
        if not path.endswith(".md"):
            print(results_table(path, args.rows, args.budget, args.plot))
            continue
        text = renewed_tables(path)
        with whole_file(path) as name, open(name, "w") as f:
            f.write(text)


# -----------------------------------------------------------------------------
# the command line


def parse_args(argv):
    """The words of a command line -> what they ask for.

    Raises ValueError for numbers that make no sense and for files that cannot be written.
    """
    parser = Parser(description="Score trained runs on problems that training never saw.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory of train.py, or a checkpoint file")
    parser.add_argument("--rows", nargs="+", default=[], help="--table: only difficulties that start so, such as hops")
    text = "--table: a line per setting, with parameters, training tokens and model FLOPs"
    parser.add_argument("--budget", action="store_true", help=text)
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--cost", action="store_true", help="time sleeping and answering on a stream instead")
    doing.add_argument("--probe", action="store_true", help="look into the memory after every pass instead")
    text = "print the tables of results files (RUN is one) instead, or renew those in a Markdown file"
    doing.add_argument("--table", action="store_true", help=text)
    doing.add_argument("--chat", action="store_true", help="read from the terminal, sleep and answer instead")
    parser.add_argument("--N", type=int, nargs="+", help="sleep passes (default: as each run was trained)")
    text = "adaptive N: at most the largest N passes, until one changes the fast weights by no more than this fraction"
    parser.add_argument("--tol", type=float, nargs="+", default=[], help=text)
    text = "Rule 110: score with so many steps of the automaton; Depo with --t: hops (default: as each run was trained)"
    parser.add_argument("--t", type=int, nargs="+", help=text)
    text = "--cost: length of the stream (default 1000000)"
    parser.add_argument("--tokens", type=int, default=1_000_000, help=text)
    parser.add_argument("--n", type=int, default=2048, help="problems (default 2048)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(default test)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default auto)")
    text = "wrong examples to print per run (default 3)"
    parser.add_argument("--mistakes", type=int, default=3, help=text)
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the results here (needs matplotlib)")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    for name, least in {"n": 1, "seed": 0, "mistakes": 0, "tokens": 1}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    for path in filter(None, (args.json, args.plot)):
        check_writable(path)
    unused = {
        "cost": ("tol", "t", "plot", "n", "split", "seed", "mistakes"),
        "table": ("N", "tol", "t", "json", "tokens", "n", "split", "seed", "mistakes"),
        "chat": ("t", "json", "plot", "tokens", "n", "split", "seed", "mistakes"),
        "probe": ("tol", "tokens", "mistakes"),
    }
    doing = next((name for name in unused if getattr(args, name)), None)
    wrong = [name for name in unused.get(doing, ("tokens",)) if getattr(args, name) != parser.get_default(name)]
    wrong += [name for name in ("rows", "budget") if getattr(args, name) and not args.table]
    wrong += [f"{name} of several numbers" for name in ("N", "t") if args.probe and len(getattr(args, name) or []) > 1]
    if wrong:
        with_what = f"--{doing}" if doing else "scoring runs"
        raise ValueError(f"--{wrong[0]} does not go with {with_what}: leave it out")
    if args.plot:
        import_pyplot()  # refuse now, not after the evaluation
    return args


def learning_curve(path, step):
    """The validations of a run up to a step: {"tokens": [...], "accuracy": [...]}, both empty without a log."""
    val = [line for line in read_log(path) if line["kind"] == "val" and line["step"] <= step]
    accuracy = [headline(line["scores"]["rows"]) for line in val]
    return {"tokens": [line["tokens"] for line in val], "accuracy": accuracy}


def describe_run(path, loaded, N, tol):
    """What is known of a run before it is scored, as in the JSON file. loaded: from load_run."""
    model, task, config, progress = loaded
    run = {"path": path, "config": config, "n_params": model.n_params(), "evaluated_N": N, "tol": tol}
    run |= {"evaluated_t": task.t} | progress
    saved, result = read_provenance(path), read_provenance(path, "result.json")
    run |= {key: saved.get(key) for key in ("command", "commit", "device", "versions", "delta_rule", "flops_per_step")}
    run["peak_memory_mib"] = result.get("peak_memory_mib") if result.get("step") == run["step"] else None
    return run | {"curve": learning_curve(path, run["step"])}


def settings_of(config, args):
    """The (N, tol) that a run (its flags, a dict) is asked to be scored with, a list."""
    Ns = args.N or [config["N"]]
    fixed = [(N, 0.0) for N in Ns] if args.N or not args.tol else []
    return list(dict.fromkeys(fixed + [(max(Ns), tol) for tol in args.tol]))


def score_run(run, loaded, args):
    """Evaluate a run, print its mistakes, and add its scores to its description."""
    model, task, config, _ = loaded
    algorithm = algorithm_of(model, config | {"N": run["evaluated_N"], "tol": run["tol"]})
    asked = predict(algorithm, task, args.split, config["L"], args.n, args.seed)
    if args.mistakes:
        adaptive = f", tol {run['tol']}" if run["tol"] else ""
        print(f"{run['path']}, N={run['evaluated_N']}{adaptive}: {mistakes(task, *asked[:4], args.mistakes)}\n")
    run.update(summarise(task, *asked))


def compare(args, loaded):
    """Score every run, print the tables, write the files. Raises ValueError or OSError for what a user can mend."""
    jobs = []
    for path, (model, task, config, progress) in zip(args.runs, loaded):
        for asked, (N, tol) in itertools.product(tasks_of(path, task, args), settings_of(config, args)):
            algorithm_of(model, config | {"N": N, "tol": tol})  # refuse now, not when the others have been scored
            jobs.append((path, (model, asked, config, progress), N, tol))
    runs = [describe_run(*job) for job in jobs]
    columns_of(runs)  # refuse now that a run is given twice
    about = problems_of(args) | machine_of(args)
    for i, (run, (_, one, _, _)) in enumerate(zip(runs, jobs), 1):
        score_run(run, one, args)
        if args.json:  # after every run: what is scored is not lost, whatever becomes of the rest or of the screen
            write_json(args.json, about | {"runs": runs[:i]})
    columns = columns_of(runs)
    print(report(columns, args))
    if args.plot:
        plot(columns, args.plot, f"{args.n} {args.split} problems")


def main():
    """The command line: exit status 0 when done, 130 when interrupted, 2 with one line for what can be mended."""
    try:
        args = parse_args(sys.argv[1:])
        if args.table:
            report_tables(args)
            return
        loaded = [load_run(path, args.device) for path in args.runs]
        check_same_task(args.runs, [config for _, _, config, _ in loaded])
        torch.set_num_threads(loaded[0][2]["threads"])
        do = report_cost if args.cost else report_probe if args.probe else chat if args.chat else compare
        do(args, loaded)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:  # python -X dev: where it happened
            raise
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("eval.py: out of GPU memory: use --device cpu", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("eval.py: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
