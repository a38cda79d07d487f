"""
How it is judged: accuracy per difficulty on problems that training never saw, beside what guessing would score.

    $ python eval.py out/depo-N4-s0                       one run: a table, and some mistakes to read
    $ python eval.py out/depo-N*-s* --plot depo.png       several runs side by side, mean and spread over seeds
    $ python eval.py out/depo-N2-s0 --N 4                 other sleep passes than it was trained with
    $ python eval.py out/depo-N4-s0 --json depo.json      the numbers, with the command, commit and machine behind them

A run is a directory written by train.py (config.json, ckpt.pt, log.jsonl) or a checkpoint file. All runs of one call
answer the same problems. The digitised numbers of the paper are drawn where the setting is the paper's.

Based on section 4 of "Do Language Models Need Sleep?" (arXiv:2605.26099).

Read next: train.py
"""

import json
import math
import os
import platform
import re
import statistics
import sys
from dataclasses import fields

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import EXAMPLE_SIZES, SPLITS, TASKS, Parser
from model import Model, ModelConfig
from sleep import Algorithm1, SleepConfig, kept_tokens, read_plain, scored_part, split_chunks

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
    return TASKS[config["task"]](**{size: config[size] for size in EXAMPLE_SIZES[config["task"]]})


def model_config(config, task):
    """The architecture that a run's flags (a dict) describe. Raises ValueError where ModelConfig does."""
    names = [f.name for f in fields(ModelConfig) if f.name in config]
    n_pos = config["L"] if config["positions"] else 0
    return ModelConfig(task.vocab_size, n_pos=n_pos, **{name: config[name] for name in names})


# flags that older checkpoints do not know, with the values that describe what those runs did
LATER_FLAGS = dict(evict="hard", sleep_attention="causal", answer_passes=1, random_N=False, learn="all", grow=0.0)
LATER_FLAGS |= dict(start_from=None, mode="both", difficulty="both", question="first", worked=False)


def read_checkpoint(path, device):
    """
    A checkpoint of train.py: the plain dict that was saved, its tensors on the device. Code in it is never run.
    Raises ValueError if the file is missing, damaged or not one of ours.
    """
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint at {path}: give a run directory of train.py, such as out/depo-N4-s0")
    saved = read_plain(path, device)
    ours = isinstance(saved, dict) and {"format", "config", "model", "step"} <= saved.keys()
    if not ours or saved["format"] != 1 or not isinstance(saved["config"], dict):
        raise ValueError(f"{path} is no checkpoint of this train.py (format 1): give one that is")
    saved["config"] = LATER_FLAGS | saved["config"]
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


def load_run(path, device):
    """
    A trained model. path: a run directory or a checkpoint file -> model, task, config (the run's flags, a dict), step.
    Raises ValueError as read_checkpoint, build_task and load_weights do.
    """
    file = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    saved = read_checkpoint(file, device)
    config = saved["config"]
    try:
        config["seed"]
        task = build_task(config)
        model = Model(model_config(config, task)).to(device)
        algorithm_of(model, config)
        load_weights(model, saved["model"], file)
    except KeyError as error:
        raise ValueError(f"{file} has no {error} in its config: it is from another version of train.py") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no checkpoint of this train.py ({error}): give one that is") from None
    return model, task, config, saved["step"]


def read_provenance(path):
    """config.json of a run directory, or of the one a checkpoint file lies in: a dict, empty if there is none."""
    file = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    if not os.path.exists(file):
        return {}
    try:
        with open(file) as f:
            return dict(json.load(f))
    except (ValueError, TypeError):
        raise ValueError(f"{file} is damaged: remove it, the table does not need it") from None


def read_log(path):
    """log.jsonl of a run directory, or of the one a checkpoint file lies in: a list of dicts, empty if none."""
    file = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "log.jsonl")
    if not os.path.exists(file):
        return []
    with open(file) as f:
        lines = f.read().split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]  # a line without its line break was cut off by a crash
    except ValueError:
        raise ValueError(f"{file} is damaged: remove it, only the learning curves and token counts need it") from None


# -----------------------------------------------------------------------------
# evaluation

BATCH = 256  # problems at a time on the command line; fixed, because a task's problems depend on the batch size


def sleep_config(config):
    """How a run's flags (a dict) say to sleep. Raises ValueError where SleepConfig does."""
    keep, causal = kept_tokens(config["evict"], config["L"]), config["sleep_attention"] == "causal"
    return SleepConfig(config["N"], parse_loop(config["loop"]), keep, causal, config.get("tol", 0.0))


def algorithm_of(model, config):
    """Algorithm 1 as a run's flags (a dict) describe it. Raises ValueError where it does."""
    return Algorithm1(model, sleep_config(config), answer_passes=config["answer_passes"])


def predict(algorithm, task, split, L, n, seed, batch):
    """
    Put n problems of a split to a model, on the device it is on, as an Algorithm1 with windows of L tokens.

    Returns CPU tensors x, y, m, pred, ce, each (n, T): inputs, targets, which are scored, the likeliest next token
    (-1 where the model slept) and the cross-entropy in nats, float32 (0 where it is not scored). The model is run
    eagerly and left in the mode it was in; no random number of torch is drawn. Raises ValueError as split_chunks does.
    """
    model = algorithm.model
    device, training = next(model.parameters()).device, model.training
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
    batches = []
    model.eval()
    try:
        # not inference_mode: the rotation tables that the model caches here must still be usable in training
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast:
            for s in tqdm(
                range(-(-n // batch)), f"N={algorithm.config.N}", leave=False, disable=None
            ):  # None: only on a terminal
                x, y, m = (a[: n - s * batch] for a in task.batch(seed, split, s, batch))
                batches.append((x, y, m, *answers(algorithm, x, y, m, split_chunks(m, L), device)))
    finally:
        model.train(training)
    return tuple(torch.cat(a) for a in zip(*batches))


def answers(algorithm, x, y, m, chunks, device):
    """One batch of `predict`: x, y, m (B, T) on the CPU -> pred, ce (B, T) on the CPU."""
    logits = algorithm.logits(x.to(device), chunks)[0].float()  # (B, T_pred, vocab_size)
    target = scored_part(y.masked_fill(~m, -100), chunks).to(device)  # (B, T_pred)
    column = scored_part(torch.arange(x.shape[1])[None], chunks)[0]  # (T_pred,), where the prediction chunks lie
    pred, ce = torch.full_like(x, -1), torch.zeros(x.shape)
    pred[:, column] = logits.argmax(-1).cpu()
    ce[:, column] = F.cross_entropy(logits.mT, target, ignore_index=-100, reduction="none").cpu()
    return pred, ce


def summarise(task, x, y, m, pred, ce):
    """
    What `predict` returned -> {"rows", "loss", "examples"}, ready for JSON.

    rows: per difficulty (a key of task.score) accuracy, n (questions), stderr = sqrt(p(1-p)/n), the accuracy of
    guessing uniformly and of the majority answer, and the losses of task.losses. A difficulty nobody asked for has no
    row.
    loss: mean cross-entropy per scored token, in nats.
    """
    chance, losses, rows = task.chance(x, y, m), task.losses(x, y, m, ce), {}
    for key, right in task.score(x, y, m, pred).items():
        if n := len(right):
            p = float(right.mean())
            rows[key] = {"accuracy": p, "n": n, "stderr": math.sqrt(p * (1 - p) / n)} | chance[key] | losses[key]
    return {"rows": rows, "loss": float(ce[m].mean()), "examples": len(x)}


def evaluate(algorithm, task, split, L, n, seed, batch):
    """`summarise` what `predict` returns; for the arguments see there."""
    return summarise(task, *predict(algorithm, task, split, L, n, seed, batch))


def headline_keys(rows):
    """The rows that are all questions of a task, each once: exact answers (Rule 110), every hop count (Depo), op."""
    return [key for key in rows if key.endswith("exact") or key.startswith(("hops", "op "))]


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
        parts = np.split(scored, np.flatnonzero(np.diff(scored) > 1) + 1)  # scored tokens side by side: one answer
        for j, part in enumerate(parts):
            if (pred[i, part] != y[i, part]).any():
                right, said = task.decode(y[i, part]), task.decode(pred[i, part])
                lines.append(f"  answer {j + 1} is {right}, the model says {said}")
    return "\n".join(lines)


def ordered_keys(columns):
    """Every key of some runs' rows; those that differ only in a number are side by side, by that number."""
    keys = list(dict.fromkeys(key for runs in columns.values() for rows in runs for key in rows))
    kinds = [re.sub(r"\d+", "", key) for key in keys]
    return sorted(keys, key=lambda key: (kinds.index(re.sub(r"\d+", "", key)), int(re.search(r"\d+", key)[0])))


def cell(rows, field, scale, digits):
    """One number of a table from the rows of one difficulty, a list over seeds; empty if there are none."""
    values = [scale * row[field] for row in rows]
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        return f"{text} ± {statistics.stdev(values):.{digits}f} ({len(values)})"
    return f"{text} (se {scale * rows[0]['stderr']:.{digits}f})" if field == "accuracy" else text


def comparison_table(columns, field="accuracy"):
    """
    Markdown, one line per difficulty. columns: header -> list over seeds of rows as in `evaluate`.
    field "accuracy", in percent and beside the chance levels, or one of the losses, in nats.
    """
    percent = field == "accuracy"
    scale, digits = (100, 1) if percent else (1, 3)
    floors = ["uniform", "majority"] if percent else []
    table = [["", "n", *floors, *columns], ["---", *["--:"] * (1 + len(floors) + len(columns))]]
    for key in ordered_keys(columns):
        found = {header: [rows[key] for rows in runs if key in rows] for header, runs in columns.items()}
        one = next(rows[0] for rows in found.values() if rows)  # the labels, hence the floors, are the same for all
        line = [key, str(one["n"]), *(f"{100 * one[floor]:.1f}" for floor in floors)]
        table.append(line + [cell(rows, field, scale, digits) for rows in found.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def markdown_table(rows):
    """The rows of one run, as from `evaluate`, as a Markdown table: accuracy in percent, standard error, floors."""
    return comparison_table({"accuracy": [rows]})


# -----------------------------------------------------------------------------
# several runs side by side

# flags that do not define what is learnt; t is the difficulty of Rule 110, which is a line of the table
NOT_SETTING = {"task", "preset", "seed", "t", "accumulate", "checkpoint", "minutes", "eval_every", "eval_n", "test_n"}
NOT_SETTING |= {"log_every", "save_every", "device", "compile", "cuda_graph", "workers", "threads", "out", "resume"}


def describe(config):
    """A task and its sizes for a heading, without Rule 110's t: "depo, nodes 75, hops 16, ..."."""
    sizes = (size for size in EXAMPLE_SIZES[config["task"]] if size != "t")
    return ", ".join([config["task"], *(f"{size.replace('_', ' ')} {config[size]}" for size in sizes)])


def check_same_task(paths, configs):
    """Raises ValueError unless all runs have one task and one size."""
    for path, config in zip(paths, configs):
        if describe(config) != describe(configs[0]):
            raise ValueError(
                f"{paths[0]} is {describe(configs[0])} but {path} is {describe(config)}: "
                "compare runs of one task and size"
            )


def columns_of(runs):
    """
    Group runs that differ only in seed (or in t). Returns header -> list of runs; the header names N, and whatever
    else differs between the groups. Raises ValueError if a run is there twice.
    """
    settings, groups = {}, {}
    for run in runs:
        setting = {k: v for k, v in run["config"].items() if k not in NOT_SETTING}
        setting |= {"step": run["step"], "evaluated N": run["evaluated_N"]}
        name = json.dumps(setting, sort_keys=True)
        settings[name] = setting
        for other in groups.setdefault(name, []):
            if all(other["config"].get(k) == run["config"].get(k) for k in ("seed", "t")):
                raise ValueError(f"{other['path']} and {run['path']} are the same run: give one of them")
        groups[name].append(run)
    flags = dict.fromkeys(k for setting in settings.values() for k in setting)
    differ = [k for k in flags if len({str(setting.get(k)) for setting in settings.values()}) > 1]
    columns = {}
    for name in sorted(groups, key=lambda name: settings[name]["N"]):
        setting = settings[name]
        header = f"N={setting['N']}"
        if setting["evaluated N"] != setting["N"]:
            header += f", evaluated at N={setting['evaluated N']}"
        header += "".join(f", {k} {setting.get(k)}" for k in differ if k not in ("N", "evaluated N"))
        columns[header] = groups[name]
    return columns


def counts(columns):
    """How many seeds, for headings: "1 seed", "3 seeds", or "1 to 3 seeds"."""
    seeds = {len({run["config"]["seed"] for run in runs}) for runs in columns.values()}
    text = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds)}"
    return text + (" seed" if text == "1" else " seeds")


def report(columns, args):
    """The text that ends on the screen: heading, runs, accuracy, and the losses for Depo."""
    config = next(iter(columns.values()))[0]["config"]
    lines = [f"{describe(config)}: {args.n} {args.split} problems, seed {args.seed}\n"]
    lines += ["| run | trained N | evaluated N | steps | seed | loss |", "|---|--:|--:|--:|--:|--:|"]
    for run in (run for runs in columns.values() for run in runs):
        numbers = [run["config"]["N"], run["evaluated_N"], run["step"], run["config"]["seed"], f"{run['loss']:.3f}"]
        lines.append(f"| {run['path']} | " + " | ".join(str(number) for number in numbers) + " |")
    rows = {header: [run["rows"] for run in runs] for header, runs in columns.items()}
    lines += ["\nAccuracy in percent; ± and (seeds): mean and standard deviation over seeds; se: standard error.\n"]
    lines.append(comparison_table(rows))
    if config["task"] == "depo":
        rows = {
            header: [{key: r[key] for key in headline_keys(r)} for r in several] for header, several in rows.items()
        }
        lines += [
            "\nCross-entropy in nats per scored token, <answer> and name.\n",
            comparison_table(rows, "scored_loss"),
        ]
    return "\n".join(lines)


def write_json(path, content):
    """Write JSON under a temporary name, then rename: a crash leaves the old file whole."""
    with open(path + ".tmp", "w") as f:
        json.dump(content, f, indent=1)
        f.write("\n")
    os.replace(path + ".tmp", path)


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
PAPER_SIZES = {
    "rule110": {"width": 24, "strings": 4, "L": 24},
    "depo": {"nodes": 75, "hops": 16, "queries": 10, "name_tokens": 2, "L": 75},
}

COLOURS = {1: "#6b7280", 2: "#0072b2", 3: "#009e73", 4: "#d55e00", 6: "#cc79a7", 8: "#e69f00"}
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


def is_paper_size(config):
    """Whether a run's task has the sizes of the paper."""
    sizes = PAPER_SIZES.get(config["task"])  # none of GSM-Infinite: the paper starts from pretrained models there
    return sizes is not None and all(config[size] == value for size, value in sizes.items())


def paper_points(run):
    """The paper's numbers for a run's setting: two sequences (see PAPER), or None if it has no such setting."""
    config = run["config"]
    if not is_paper_size(config) or run["evaluated_N"] != config["N"]:
        return None
    return PAPER[config["task"]].get((config["t"], config["N"]) if config["task"] == "rule110" else config["N"])


def learning_curve(run):
    """The validations of a run up to its checkpoint: training tokens -> accuracy in percent."""
    lines = [line for line in run["log"] if line["kind"] == "val" and line["step"] <= run["step"]]
    return {line["tokens"]: 100 * headline(line["scores"]["rows"]) for line in lines}


def by_t(runs):
    """Runs of one column, split by Rule 110's t: t (None for Depo) -> list over seeds."""
    values = sorted({run["config"].get("t") for run in runs})
    return {t: [run for run in runs if run["config"].get("t") == t] for t in values}


def draw_line(ax, x, series, colour, dashes):
    """Mean and min-max band over seeds. series: list over seeds of lists as long as x."""
    low, mean, high = np.min(series, 0), np.mean(series, 0), np.max(series, 0)
    ax.plot(x, mean, color=colour, linestyle=dashes, linewidth=1.8, marker="o", markersize=3.5)
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def looks(columns):
    """header -> (colour, dashes): a colour per N; columns of equal N differ in their dashes."""
    seen, result = {}, {}
    for header, runs in columns.items():
        N = runs[0]["config"]["N"]
        seen[N] = seen.get(N, -1) + 1
        result[header] = COLOURS.get(N, "black"), ["-", "--", ":", "-."][seen[N] % 4]
    return result


def draw_floors(ax, x, rows, keys, width):
    """Dotted chance levels: one short line per key of rows around x, or one across where x is None."""
    for floor, colour in (("uniform", "#9ca3af"), ("majority", "#111827")):
        label = f"{floor} guess"
        if x is None:
            ax.axhline(100 * headline(rows, floor), color=colour, linestyle=":", linewidth=1.3, label=label)
            continue
        levels = [100 * rows[key][floor] for key in keys]
        ax.hlines(levels, np.subtract(x, width), np.add(x, width), color=colour, linestyle=":", lw=1.3, label=label)


def draw_curves(ax, columns):
    """Left panel: validation accuracy against training tokens."""
    several_t = len({run["config"].get("t") for runs in columns.values() for run in runs}) > 1
    end = max((max(learning_curve(run), default=0) for runs in columns.values() for run in runs), default=0)
    unit, word = (1e9, "billions") if end >= 1e9 else (1e6, "millions") if end >= 1e6 else (1e3, "thousands")
    for header, runs in columns.items():
        colour, dashes = looks(columns)[header]
        for t, seeds in by_t(runs).items():
            curves = [learning_curve(run) for run in seeds]
            x = sorted(set.intersection(*(set(curve) for curve in curves)))
            if not x:
                continue
            draw_line(ax, np.divide(x, unit), [[c[i] for i in x] for c in curves], colour, dashes)
            if several_t:
                ax.annotate(f" t={t}", (x[-1] / unit, np.mean([c[x[-1]] for c in curves])), color=colour, fontsize=8)
            if seeds[0]["config"]["task"] == "rule110" and (points := paper_points(seeds[0])):
                tokens = np.multiply(points[0], 1e9 / unit)
                ax.plot(tokens, points[1], color=colour, lw=0.8, alpha=0.6, ls=(0, (1, 1)))
                ax.plot(tokens, points[1], color=colour, **PAPER_STYLE)
    first = next(iter(columns.values()))[0]
    if not several_t:
        draw_floors(ax, None, first["rows"], None, None)
    what = {"rule110": "all answers exact", "depo": "all hops", "gsm": "all op"}[first["config"]["task"]]
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
        draw_floors(ax, list(place.values()), merged, keys, 0.45)
    numbers = [re.search(r"\d+", key)[0] for key in keys]
    ax.set_xticks(list(place.values()), numbers)
    ax.set_xlim(-0.6, len(keys) - 0.4)
    ax.set_xlabel("t, steps of Rule 110" if "t=" in keys[0] else keys[0].split()[0])
    ax.set_ylabel("final accuracy (%)" if field == "accuracy" else "final loss per scored token (nats)")


def draw_paper(ax, runs, place, shift, field, colour):
    """The paper's final numbers for one column, as open diamonds: accuracy for Rule 110, loss for Depo."""
    for run in {run["config"].get("t"): run for run in runs}.values():
        points = paper_points(run)
        if points and run["config"]["task"] == "rule110":
            ax.plot(place[f"t={run['config']['t']} exact"] + shift, points[1][-1], color=colour, **PAPER_STYLE)
        elif points and field != "accuracy":
            x = [place[f"hops {k}"] + shift for k in points[0] if f"hops {k}" in place]
            y = [loss for k, loss in zip(*points) if f"hops {k}" in place]
            ax.plot(x, y, color=colour, **PAPER_STYLE)


def plot(columns, path, problems):
    """
    Draw learning curves and final scores to a PNG; for Depo at the paper's size also the loss, which the paper plots.
    problems: what the final scores are over, for the title, such as "2048 test problems".
    """
    plt = import_pyplot()
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.color": "#e5e7eb", "grid.linewidth": 0.6, "axes.axisbelow": True})
    runs = [run for group in columns.values() for run in group]
    config = runs[0]["config"]
    with_loss = config["task"] == "depo" and is_paper_size(config)
    figure, axes = plt.subplots(1, 2 + with_loss, figsize=(9 + 4 * with_loss, 4.4), layout="constrained")
    draw_curves(axes[0], columns)
    draw_difficulty(axes[1], columns, "accuracy")
    for ax in axes[:2]:
        ax.set_ylim(-3, 103)
    if with_loss:
        draw_difficulty(axes[2], columns, "scored_loss")
        axes[2].set_ylim(bottom=0)
    handles, labels = axes[1].get_legend_handles_labels()
    legend = sorted(zip(labels, handles), key=lambda pair: pair[0].endswith("guess"))  # runs first
    if any(paper_points(run) for run in runs):
        legend.append(("paper (digitised; right: final)", plt.Line2D([], [], color="#374151", **PAPER_STYLE)))
    labels, handles = zip(*legend)
    ncols = len(labels) if sum(map(len, labels)) < 74 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
    t = sorted({run["config"]["t"] for run in runs}) if config["task"] == "rule110" else []
    sizes = describe(config) + (f", t {', '.join(map(str, t))}" if t else "")
    spread = "; bands and bars: min to max" if len({run["config"]["seed"] for run in runs}) > 1 else ""
    figure.suptitle(f"{sizes}\n{counts(columns)}, {problems}{spread}", fontsize=10)
    figure.savefig(path + ".tmp", dpi=150, format="png")
    plt.close(figure)
    os.replace(path + ".tmp", path)


# -----------------------------------------------------------------------------
# the command line


def parse_args():
    """The command line. Raises ValueError for numbers that make no sense and for files that cannot be written."""
    parser = Parser(description="Score trained runs on problems that training never saw.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory of train.py, or a checkpoint file")
    parser.add_argument("--N", type=int, help="sleep passes (default: as each run was trained)")
    parser.add_argument("--n", type=int, default=2048, help="problems (default 2048)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(default test)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default auto)")
    parser.add_argument("--mistakes", type=int, default=3, help="wrong examples to print per run (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the results here (needs matplotlib)")
    args = parser.parse_args()
    for name, least in {"N": 1, "n": 1, "seed": 0, "mistakes": 0}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    for path in filter(None, (args.json, args.plot)):
        if not os.path.isdir(os.path.dirname(path) or ".") or os.path.isdir(path):
            raise ValueError(f"cannot write {path}: give a file in a directory that exists")
    if args.plot:
        import_pyplot()  # refuse now, not after the evaluation
    return args


def describe_run(path, loaded, N):
    """What is known of a run before it is scored, as in the JSON file, plus its "log". loaded: from load_run."""
    model, _, config, step = loaded
    saved, log = read_provenance(path), read_log(path)
    reached = [line for line in log if line["step"] <= step][-1:] or [{}]
    run = {"path": path, "config": config, "step": step, "evaluated_N": N or config["N"], "n_params": model.n_params()}
    run |= {key: saved.get(key) for key in ("command", "commit", "device", "versions")}
    return run | {key: reached[0].get(key) for key in ("tokens", "seconds")} | {"log": log}


def score_run(run, loaded, args):
    """Evaluate a run, print its mistakes, and add its scores to its description."""
    model, task, config, _ = loaded
    N = run["evaluated_N"]
    asked = predict(algorithm_of(model, config | {"N": N}), task, args.split, config["L"], args.n, args.seed, BATCH)
    if args.mistakes:
        print(f"{run['path']}, N={N}: {mistakes(task, *asked[:4], args.mistakes)}\n")
    run.update(summarise(task, *asked))


def compare(args):
    """Score every run, print the tables, write the files. Raises ValueError or OSError for what a user can mend."""
    device = pick_device(args.device)
    loaded = [load_run(path, device) for path in args.runs]
    check_same_task(args.runs, [config for _, _, config, _ in loaded])
    runs = [describe_run(path, one, args.N) for path, one in zip(args.runs, loaded)]
    columns = columns_of(runs)
    for entry, one in zip(runs, loaded):
        score_run(entry, one, args)
    print(report(columns, args))
    if args.json:
        here = {"split": args.split, "n": args.n, "seed": args.seed, "evaluated_on": f"{platform.machine()} {device}"}
        entries = [{key: value for key, value in entry.items() if key != "log"} for entry in runs]
        write_json(args.json, here | {"torch": torch.__version__, "runs": entries})
    if args.plot:
        plot(columns, args.plot, f"{args.n} {args.split} problems")


def main():
    """The command line: exit status 0 when done, 2 with one line on stderr for what the user can mend."""
    try:
        compare(parse_args())
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
