"""figures.py - pictures of a run, and a page of its transcripts.

    python figures.py RUN                       # every figure the data allows -> RUN/figures/NAME.png, NAME.svg
    python figures.py RUN --window 20           # shorter moving average (100 is what was published)
    python figures.py RUN --transcripts         # also RUN/transcripts.html: filter, search, read, offline
    python figures.py RUN --results runs/other/eval/*.json --sizes table.csv --reference "some model=37.5"

RUN is one run of grpo.py, a run of schedule.py (plan.json, stage folders, eval/), or a folder of evaluate.py results.
What cannot be drawn is named with its reason. Stages of a schedule are laid end to end: a stage begins where the
checkpoint picked from the one before left off; steps a stage ran on past that checkpoint are drawn faded.

Reads files only. The page is assets/transcripts/page.{html,css,js}. Model text is hostile: it is data in a JSON
block, shown by textContent alone, under a policy that runs one script, known by its hash, and loads nothing.
Left out on purpose: interactive plots, a live server, smoothing other than a trailing mean, all of TeX.
"""
import argparse
import base64
import csv
import glob
import gzip
import hashlib
import json
import math
import os
import re
import sys
import textwrap
import zlib

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))

# ---------------------------------------------------------------------------------------------------------------
# Style: one block. 8 inches at 200 dpi, so that a 11 pt letter is 15 pixels where the picture is shown 800 wide
# ---------------------------------------------------------------------------------------------------------------

WIDTH, DPI = 8.0, 200
# Okabe & Ito's eight, told apart with any colour vision: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
GREY, LIGHT = "#595959", "#D0D0D0"
SERIES = [(BLUE, "o", "-"), (RED, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"), (ORANGE, "v", "--"),
          (SKY, "P", "-."), (BLACK, "X", "-")]
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.labelsize": 11, "axes.titlesize": 11, "legend.fontsize": 10,
    "xtick.labelsize": 10, "ytick.labelsize": 10, "figure.titlesize": 12.5, "figure.titleweight": "bold",
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "axes.edgecolor": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.color": "#E4E4E4", "grid.linewidth": 0.8, "lines.linewidth": 1.8,
    "lines.markersize": 5, "legend.frameon": False, "legend.handlelength": 2.6, "hatch.linewidth": 0.7,
    "figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.07, "figure.dpi": DPI,
    "text.parse_math": False,  # names come from files: a $ in one is a dollar sign
    "svg.fonttype": "path", "svg.hashsalt": "nanoscaler",  # the same picture is the same file, byte for byte
}
PHASES = [("generate", BLUE, ""), ("reward", YELLOW, ".."), ("logprobs", SKY, "//"), ("update", ORANGE, ""),
          ("sync", GREEN, "\\\\"), ("idle", LIGHT, "xx"), ("rest", "#FFFFFF", "..")]
OUTCOMES = [("right", BLUE, "-"), ("wrong", ORANGE, "--"), ("truncated", BLACK, ":")]
AIME24 = {"o1-preview": 40.0, "DeepScaleR-1.5B": 43.1, "R1-Distill-Qwen-1.5B": 28.8}  # published, per cent pass@1
TITLES = {
    "pass_at_1": "pass@1 against step",
    "length_and_reward": "Response length and reward",
    "turning_over": "Reward turning over at the end of a stage",
    "truncation": "Responses cut off at the limit",
    "accuracy_vs_size": "Accuracy against model size",
    "length_distributions": "Lengths of right, wrong and truncated responses",
    "time_per_step": "Where the time of a step went",
}


def canvas(title, height, rows=1, columns=1, **kw):
    figure = Figure(figsize=(WIDTH, height))
    figure.suptitle(title, x=0.012, ha="left")
    return figure, figure.subplots(rows, columns, squeeze=False, **kw)


def save(figure, folder, name):
    """NAME.png and NAME.svg, each replaced as a whole; no date and no version inside. -> the two paths"""
    os.makedirs(folder, exist_ok=True)
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        path = os.path.join(folder, f"{name}.{kind}")
        figure.savefig(path + ".tmp", format=kind, dpi=DPI, metadata=metadata)
        os.replace(path + ".tmp", path)
        paths.append(path)
    return paths


def label(text, most=34):
    r"""A name out of a file, fit to be drawn: one line, printable, not too long.

    >>> label("a\nb\ud800" + "c" * 40)
    'a b?ccccccccccccccccccccccccccccc…'
    """
    text = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in str(text))
    return text if len(text) <= most else text[:most - 1] + "…"


def legend(figure, axis, **kw):
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        columns = max(1, min(len(labels), 84 // (max(map(len, labels)) + 9)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, **kw)


# ---------------------------------------------------------------------------------------------------------------
# Reading a run
# ---------------------------------------------------------------------------------------------------------------

def open_text(path):
    return (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8", errors="replace")


def read_text(path):
    with open_text(path) as f:
        return f.read()


def read_json(path):
    try:
        with open_text(path) as f:
            return json.load(f)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e}); repair it or move it away") from None


def parse_line(text, path, number, needs=()):
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}, line {number}: not JSON ({e}); repair or remove the line") from None
    if not isinstance(row, dict) or any(k not in row for k in needs):
        raise ValueError(f"{path}, line {number}: expected an object with {', '.join(needs) or 'fields'}")
    return row


def read_metrics(path):
    """metrics.jsonl -> rows sorted by step; of a step written twice the later one counts. A last line that is not
    JSON is what a crash leaves, and is passed over; any other bad line is an error."""
    with open_text(path) as f:
        lines = [(i, text) for i, text in enumerate(f, 1) if text.strip()]
    rows = {}
    for number, text in lines:
        try:
            row = parse_line(text, path, number, ["step"])
        except ValueError:
            if number == lines[-1][0] and not is_json(text):
                break
            raise
        if isinstance(row["step"], bool) or not isinstance(row["step"], int) or row["step"] < 0:
            raise ValueError(f"{path}, line {number}: step must be a whole number from 0 on, not {row['step']!r}")
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def is_json(text):
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def number(value):
    """A finite float, or nan for null, text, infinities: nan is what matplotlib leaves out."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if ok else math.nan


def column(rows, key):
    return np.array([number(row.get(key)) for row in rows])


def read_stage(folder, name, start, plan):
    """One grpo.py run. `start`: steps before it; `picked`: the step whose checkpoint was handed on, or None."""
    config = {}
    if os.path.exists(os.path.join(folder, "config.json")):
        config = read_json(os.path.join(folder, "config.json"))
    options = config.get("options") if isinstance(config, dict) else None
    options = options if isinstance(options, dict) else {}
    path = os.path.join(folder, "metrics.jsonl")
    rows = read_metrics(path) if os.path.exists(path) else []
    picked = plan.get("picked")
    limit = plan.get("max_len") or options.get("max_len")
    data = options.get("eval_data")
    return {"name": name, "folder": folder, "start": start, "picked": picked if isinstance(picked, int) else None,
            "evidence": plan.get("evidence"), "limit": limit if isinstance(limit, int) else None, "rows": rows,
            "steps": [r for r in rows if r["step"] > 0], "last": max([r["step"] for r in rows], default=0),
            "eval_data": data if isinstance(data, str) else "", "model": options.get("model")}


def read_run(folder):
    """-> list of stages, in order; [] for a folder that holds no training run."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} is not a folder; give the folder of a run (its --out), or of evaluations")
    plan_path = os.path.join(folder, "plan.json")
    if not os.path.exists(plan_path):
        if os.path.exists(os.path.join(folder, "metrics.jsonl")):
            return [read_stage(folder, "", 0, {})]
        return []
    plan = read_json(plan_path)
    if not isinstance(plan, dict) or not isinstance(plan.get("stages"), list):
        raise ValueError(f"{plan_path}: expected an object with a list of stages")
    stages, start = [], 0
    for i, entry in enumerate(plan["stages"], 1):
        if not isinstance(entry, dict):
            raise ValueError(f"{plan_path}: stage {i} is not an object")
        name = str(entry.get("folder") or f"stage{i}")
        stages.append(read_stage(os.path.join(folder, name), name, start, entry))
        start += stage_end(stages[-1])
    stages[0:1] = [stages[0] | {"model": plan.get("model")}] if stages else []
    return stages


def stage_end(stage):
    """Steps that count: up to the picked checkpoint; all of them while none is picked."""
    return stage["last"] if stage["picked"] is None else stage["picked"]


def read_results(paths, strict):
    """evaluate.py's NAME.json files -> list of results. Other JSON is passed over, or refused if `strict`."""
    results = []
    for path in paths:
        result = read_json(path)
        if isinstance(result, dict) and isinstance(result.get("benchmarks"), dict):
            scores = {k: v for k, v in result["benchmarks"].items() if isinstance(v, dict)
                      and not math.isnan(number(v.get("pass@1")))}
            results.append(result | {"benchmarks": scores, "path": str(path),
                                     "name": str(result.get("name") or os.path.basename(path)[:-5])})
        elif strict:
            raise ValueError(f"{path}: no result of evaluate.py (it has no benchmarks)")
    return results


def result_files(folder):
    places = (folder, os.path.join(folder, "eval"))
    found = [path for place in places for path in glob.glob(os.path.join(glob.escape(place), "*.json"))]
    return sorted(p for p in found if os.path.basename(p) not in ("plan.json", "config.json"))


def place(result, stages):
    """The step, counted from the first stage, of an evaluated checkpoint; None if it cannot be told."""
    name, model = result["name"], str(result.get("model") or "").replace("\\", "/")
    found = re.search(r"([^/]+)/checkpoints/0*(\d+)(/|$)", model)
    for stage in stages:
        if name == stage["name"] and name:
            return stage["start"] + stage_end(stage)
        if found and found[1] == os.path.basename(os.path.normpath(os.path.abspath(stage["folder"]))):
            return stage["start"] + int(found[2])
    if stages and (name == "base" or (model and model == stages[0]["model"])):
        return 0
    found = re.fullmatch(r"(?:step|checkpoint)?[-_ ]?0*(\d+)", name)
    return int(found[1]) if found and len(stages) == 1 else None


def is_aime24(name):
    """By the exact name of the benchmark or its file: a toy that resembles it must not be measured against o1.

    >>> is_aime24("assets/benchmarks/aime24.jsonl"), is_aime24("AIME_2024"), is_aime24("toy-aime24")
    (True, True, False)
    """
    stem = os.path.basename(str(name).replace("\\", "/")).split(".")[0].lower()
    return re.sub(r"[-_ ]", "", stem) in ("aime24", "aime2024")


# ---------------------------------------------------------------------------------------------------------------
# Shared parts of the figures
# ---------------------------------------------------------------------------------------------------------------

def moving_average(values, window):
    """Mean of the last `window` values up to each one, nan left out; the first ones average what is there.

    >>> moving_average(np.array([1.0, 3.0, np.nan, 5.0]), 2).tolist()
    [1.0, 2.0, 3.0, 5.0]
    """
    known = ~np.isnan(values)
    total = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
    count = np.cumsum(np.concatenate([[0], known]))
    low = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    n = count[1:] - count[low]
    return np.where(n > 0, (total[1:] - total[low]) / np.maximum(n, 1), math.nan)


def fit_window(stages, window):
    """A window as long as the longest stage would draw one flat line: a quarter of that stage is taken instead.
    -> (window, words for the axis label, words for the footer or "")"""
    longest = max([len(s["steps"]) for s in stages], default=0)
    fitted = window if longest > window else max(1, min(window, longest // 4))
    words = f"line: average of {fitted} steps" if fitted > 1 else "every step"
    least = f"the {'longest stage' if len(stages) > 1 else 'run'} has {longest} step{'s' * (longest != 1)}"
    return fitted, words, "" if fitted == window else f"moving average over {fitted}, not {window}: {least}"


def step_axis(axis, stages, points=()):
    """Stage switches as lines with their limit above, whole steps below. points: further x that must be seen."""
    first = [s["start"] + s["steps"][0]["step"] for s in stages if s["steps"]]
    ends = [s["start"] + max(s["last"], stage_end(s)) for s in stages] + list(points)
    low, high = min(first + list(points), default=0), max(ends, default=1)
    pad = max(0.5, 0.015 * (high - low))
    axis.set_xlim(low - pad, high + pad)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    for i, stage in enumerate(stages[1:]):
        axis.axvline(stage["start"], color=GREY, lw=1.1, ls=(0, (4, 3)), zorder=1)


def stage_names(axis, stages):
    """Over the top of a step axis: which stage, which limit; a stage too narrow for its name shows the limit only."""
    if len(stages) < 2:
        return
    low, high = axis.get_xlim()
    for i, stage in enumerate(stages):
        begin = max(stage["start"], low)
        end = stages[i + 1]["start"] if i + 1 < len(stages) else high
        share = (end - begin) / (high - low)
        limit = tokens_short(stage["limit"])
        name = label(stage["name"], 12)
        text = f"{name}\n{limit} tokens" if limit and share > 0.12 else limit or name
        if share > 0.04:
            axis.annotate(text, (begin, 1), (3, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                          fontsize=9.5, color=GREY, va="bottom", linespacing=1.1)


def tokens_short(n):
    """
    >>> tokens_short(24576), tokens_short(192), tokens_short(None)
    ('24K', '192', '')
    """
    return "" if not n else f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}"


def draw_series(axis, stages, key, window, style, scale=1.0, name=None):
    """Raw values pale, their moving average strong; what came after the picked step faded."""
    color, marker, dash = style
    for stage in stages:
        rows = [r for r in stage["steps"] if not math.isnan(number(r.get(key)))]
        steps, values = column(rows, "step"), scale * column(rows, key)
        x, mean = stage["start"] + steps, moving_average(values, window)
        mean[:min(window // 10, len(mean) // 4)] = math.nan  # an average of two or three values is still noise
        kept = steps <= stage_end(stage)
        few = len(x) <= 120
        for chosen, strength, named in ((kept, 1.0, name), (~kept, 0.35, None)):
            if not chosen.any():
                continue
            axis.plot(x[chosen], values[chosen], color=color, alpha=0.35 * strength, lw=0.9, zorder=2,
                      marker="." if few else None, ls="-" if len(x) > 12 else "none", ms=6)
            line = np.flatnonzero(chosen)
            if strength < 1 and kept.any():
                line = np.concatenate([[line[0] - 1], line])  # the faded part hangs on to the rest
            axis.plot(x[line], mean[line], color=color, alpha=strength, ls=dash, lw=2.2 if strength == 1 else 1.6,
                      zorder=3, label=named, marker=marker if len(x) < 3 else None)
        name = name if not kept.any() else None


def has(stages, key):
    return any(np.isfinite(column(s["steps"], key)).any() for s in stages)


def need(stages, *keys):
    """Why a figure of these metrics cannot be drawn, or None."""
    if not stages:
        return "no training run here (no metrics.jsonl, no plan.json)"
    if not any(s["steps"] for s in stages):
        return "metrics.jsonl holds no training step yet"
    absent = [k for k in keys if not has(stages, k)]
    return f"metrics.jsonl holds no number for {', '.join(absent)}" if absent else None


def faded_note(stages):
    return "faded: steps after the checkpoint handed on" if any(s["last"] > stage_end(s) for s in stages) else ""


def footer(axis, text, *notes):
    """Label of the x axis, and below it in grey what a reader has to know, wrapped."""
    axis.set_xlabel(text)
    lines = textwrap.wrap("; ".join(filter(None, notes)), 92)
    if lines:
        axis.annotate("\n".join(lines), (0.5, 0), (0, -40), xycoords="axes fraction", textcoords="offset points",
                      ha="center", va="top", fontsize=9.5, color=GREY)


def reference_lines(axis, lines):
    """{name: per cent} as thin lines, named in the right margin; names close to each other are pushed apart."""
    if not lines:
        return
    low, high = axis.get_ylim()
    low, high = min([low, *[v - 1 for v in lines.values()]]), max([high, *[v + 1 for v in lines.values()]])
    axis.set_ylim(low, high)
    gap, last = 0.062 * (high - low), -math.inf
    for i, (name, value) in enumerate(sorted(lines.items(), key=lambda x: x[1])):
        dash = [(0, (1, 1.5)), (0, (5, 2)), (0, (5, 1.5, 1, 1.5))][i % 3]
        axis.axhline(value, color=GREY, lw=1.1, ls=dash, zorder=1)
        last = max(value, last + gap)
        axis.annotate(f"{label(name, 22)} {value:g}", (1, value), (1.015, last), xycoords=("axes fraction", "data"),
                      textcoords=("axes fraction", "data"), fontsize=9.5, color=GREY, va="center",
                      arrowprops=dict(arrowstyle="-", color=GREY, lw=0.7) if last > value else None)


# ---------------------------------------------------------------------------------------------------------------
# The seven figures. Each takes the loaded run, returns a Figure, or a string: why there is none
# ---------------------------------------------------------------------------------------------------------------

def pass_at_1(run):
    """In-training evaluations and those of evaluate.py, both with one standard error."""
    stages = run["stages"]
    placed = [(place(r, stages), r) for r in run["results"]]
    during = [s for s in stages if np.isfinite(column(s["rows"], "eval_reward")).any()]
    dated = sorted([(x, r) for x, r in placed if x is not None and r["benchmarks"]], key=lambda x: x[0])
    if not stages:
        return need(stages)
    if not during and not dated:
        return "no evaluation: train with --eval_data, or put results of evaluate.py into eval/"
    figure, [[axis]] = canvas(TITLES["pass_at_1"], 5.2)
    xs = [x for x, _ in dated]
    trained_on = {os.path.basename(s["eval_data"]).split(".")[0] for s in during} - {""}
    bench = trained_on.pop() if len(trained_on) == 1 else ""
    for stage in during:
        rows = [r for r in stage["rows"] if not math.isnan(number(r.get("eval_reward")))]
        x = stage["start"] + column(rows, "step")
        xs += x.tolist()
        y, se = 100 * column(rows, "eval_reward"), 100 * np.nan_to_num(column(rows, "eval_se"))
        kept = column(rows, "step") <= stage_end(stage)
        for chosen, strength in ((kept, 1.0), (~kept, 0.35)):
            if chosen.any():
                named = strength == 1 and stage is during[0]
                axis.plot(x[chosen], y[chosen], color=GREY, marker="o", ms=3.5, lw=1.2, alpha=strength, zorder=2,
                          label=f"in training: {label(bench) or 'held-out'}" if named else None)
                spread(axis, x[chosen], y[chosen], se[chosen], strength)
    benchmarks = list(dict.fromkeys(b for _, r in dated for b in r["benchmarks"]))
    for i, name in enumerate(benchmarks):
        color, marker, dash = SERIES[i % 6]
        points = [(x, r["benchmarks"][name]) for x, r in dated if name in r["benchmarks"]]
        axis.errorbar([x for x, _ in points], [100 * number(b["pass@1"]) for _, b in points],
                      100 * np.nan_to_num([number(b.get("se")) for _, b in points]), color=color, marker=marker,
                      ls=dash, ms=6.5, capsize=3, label=label(name))
    mean = [(x, r["average"]) for x, r in dated if isinstance(r.get("average"), dict)
            and not math.isnan(number(r["average"].get("pass@1")))]
    if len(benchmarks) > 1 and mean:
        axis.errorbar([x for x, _ in mean], [100 * number(a["pass@1"]) for _, a in mean],
                      100 * np.nan_to_num([number(a.get("se")) for _, a in mean]), color=BLACK, marker="X", ms=7,
                      capsize=3, lw=2.4, label="average")
    step_axis(axis, stages, xs)
    stage_names(axis, stages)
    low, high = axis.get_ylim()
    axis.set_ylim(max(0, low), max(high, 1))
    measured = benchmarks + [bench]
    published = AIME24 if any(map(is_aime24, measured)) else {}
    lines = dict(published if run["references"] is None else run["references"])
    main = next((b for b in benchmarks if is_aime24(b)), benchmarks[0] if benchmarks else bench)
    lines |= {r["name"]: round(100 * r["benchmarks"][main]["pass@1"], 1) for x, r in
              placed + [(None, r) for r in run["extra"]] if x is None and main in r["benchmarks"]}
    reference_lines(axis, lines)
    axis.set_ylabel("pass@1 (%)")
    footer(axis, "training step", "bars and band: one standard error", faded_note(stages))
    legend(figure, axis)
    return figure


def spread(axis, x, y, se, strength):
    """One standard error around points: bars, or a band where bars would run into each other."""
    if len(x) > 15:
        axis.fill_between(x, y - se, y + se, color=GREY, alpha=0.18 * strength, lw=0, zorder=1)
    else:
        axis.errorbar(x, y, se, fmt="none", ecolor=GREY, capsize=2.5, elinewidth=1, alpha=strength, zorder=2)


def length_and_reward(run):
    reason = need(run["stages"], "length_mean", "reward")
    if reason:
        return reason
    window, note, shrunk = fit_window(run["stages"], run["window"])
    figure, axes = canvas(TITLES["length_and_reward"], 6.4, 2, sharex=True)
    for axis, key, style, text in ((axes[0][0], "length_mean", SERIES[0], "response length (tokens)"),
                                   (axes[1][0], "reward", SERIES[1], "mean reward (0 to 1)")):
        draw_series(axis, run["stages"], key, window, (*style[:2], "-"))
        axis.set_ylabel(f"{text}\n{note}")
        step_axis(axis, run["stages"])
        axis.yaxis.set_major_formatter(FuncFormatter(plain_number))
    stage_names(axes[0][0], run["stages"])
    flat_zero(axes[1][0])
    footer(axes[1][0], "training step", shrunk, faded_note(run["stages"]))
    figure.align_ylabels()
    return figure


def plain_number(value, _=None):
    """
    >>> plain_number(14000.0), plain_number(0.30000000000000004)
    ('14,000', '0.3')
    """
    return f"{value:,.8g}"


def flat_zero(axis, floor=0.02):
    """A series that is 0 throughout sits on the floor of its axis, not in the middle of -0.05 to 0.05."""
    low, high = axis.get_ylim()
    if low < 0:
        axis.set_ylim(-0.02 * max(high, floor), max(high, floor))


def windows_of(evidence):
    """The windows of steps that schedule.py compared to see the turn -> [(name, first step, last step)].

    >>> windows_of({"turn": 30, "top": [1, 9], "before": [30, 39], "after": None})
    [('top', 1, 9), ('before', 30, 39)]
    """
    pairs = [(k, (evidence if isinstance(evidence, dict) else {}).get(k)) for k in ("top", "before", "after")]
    return [(k, *v) for k, v in pairs if isinstance(v, list) and len(v) == 2 and all(type(x) is int for x in v)]


def turning_over(run):
    """Reward, truncation and length around the end of each stage, in the steps of that stage."""
    reason = need(run["stages"], "reward")
    if reason:
        return reason
    stages = [s for s in run["stages"] if s["steps"]]
    shown = stages[-4:]
    window, note, shrunk = fit_window(stages, run["window"])
    figure, axes = canvas(TITLES["turning_over"], 6.6, 3, len(shown), sharex="col")
    for k, stage in enumerate(shown):
        end = stage_end(stage)
        windows = windows_of(stage["evidence"])
        first = min([max(stage["steps"][0]["step"], end - max(20, int(0.6 * end))), *[low for _, low, _ in windows]])
        local = [stage | {"start": 0}]
        for axis, key, style, text, scale in zip(
                axes[:, k], ("reward", "truncated", "length_mean"), SERIES,
                ("reward (0 to 1)", "truncated (%)", "length (tokens)"), (1, 100, 1)):
            draw_series(axis, local, key, window, (*style[:2], "-"), scale)
            near(axis, stage, key, first, scale)
            axis.axvline(end, color=BLACK, lw=1.3, ls="--", zorder=1)
            for i, (name, low, high) in enumerate(windows):
                axis.axvspan(low, high, color=(GREY, SKY, ORANGE)[i], alpha=(0.16, 0.3, 0.22)[i], lw=0, zorder=0)
                if key == "reward":
                    axis.annotate(name, ((low + high) / 2, 0.03), xycoords=("data", "axes fraction"), rotation=90,
                                  ha="center", va="bottom", fontsize=9.5, color=BLACK)
            if k == 0:
                axis.set_ylabel(text)
            axis.yaxis.set_major_locator(MaxNLocator(5))
            axis.yaxis.set_major_formatter(FuncFormatter(plain_number))
        picked = stage["picked"] is not None
        title = [label(stage["name"], 12), f"{tokens_short(stage['limit'])} tokens" if stage["limit"] else "",
                 f"{'picked' if picked else 'last'} step {end:,}"]
        axes[0][k].set_title((",  " if len(shown) == 1 else "\n").join(filter(None, title)), fontsize=10.5)
        axes[-1][k].set_xlabel("step of the stage" if len(shown) > 2 else "step of the stage, from its start")
        axes[-1][k].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4, min_n_ticks=1))
        axes[-1][k].xaxis.set_major_formatter(FuncFormatter(plain_number))
        pad = max(0.5, 0.03 * (stage["last"] - first))
        axes[-1][k].set_xlim(first - pad, max(stage["last"], end) + pad)
    figure.align_ylabels()
    parts = [f"line: {shrunk}" if shrunk else note, "dashed: end of the stage"]
    parts += ["shaded: the windows compared to see the turn"] if any(windows_of(s["evidence"]) for s in shown) else []
    parts += ["faded: later steps"] if faded_note(shown) else []
    parts += [f"the last 4 of {len(stages)} stages"] if len(stages) > 4 else []
    figure.supxlabel(textwrap.fill("; ".join(filter(None, parts)), 100), fontsize=9.5, color=GREY)
    return figure


def near(axis, stage, key, first, scale):
    """Limits of the y axis from the steps that are shown, not from those left of them."""
    values = scale * column([r for r in stage["steps"] if r["step"] >= first], key)
    values = values[np.isfinite(values)]
    if len(values):
        low, high = values.min(), values.max()
        pad = 0.08 * (high - low) or max(0.02 * scale, 0.05 * abs(high))
        axis.set_ylim(max(low - pad, -0.02 * (high + pad)), high + pad)


def truncation(run):
    reason = need(run["stages"], "truncated")
    if reason:
        return reason
    stages = run["stages"]
    window, note, shrunk = fit_window(stages, run["window"])
    figure, [[axis]] = canvas(TITLES["truncation"], 3.9)
    draw_series(axis, stages, "truncated", window, (RED, "o", "-"), 100, "training rollouts")
    evals = []
    for stage in stages:
        rows = [r for r in stage["rows"] if not math.isnan(number(r.get("eval_truncated")))]
        named = "in-training evaluation" not in axis.get_legend_handles_labels()[1]
        kept = column(rows, "step") <= stage_end(stage)
        for chosen, strength in ((kept, 1.0), (~kept, 0.35)):
            if chosen.any():
                axis.plot((stage["start"] + column(rows, "step"))[chosen], 100 * column(rows, "eval_truncated")[chosen],
                          color=BLUE, marker="s", ls="none", ms=6, mfc="white", mew=1.6, zorder=4, alpha=strength,
                          label="in-training evaluation" if named and strength == 1 else None)
        evals += (stage["start"] + column(rows, "step")).tolist()
    step_axis(axis, stages, evals)
    stage_names(axis, stages)
    flat_zero(axis, 1.0)
    axis.set_ylabel(f"truncated responses (%)\n{note}")
    footer(axis, "training step", shrunk, faded_note(stages))
    legend(figure, axis)
    return figure


def parse_size(text):
    """Number of parameters out of a table's cell; None if it is not known.

    >>> parse_size("1.5B"), parse_size("135M"), parse_size(7e9), parse_size(" - "), parse_size("")
    (1500000000.0, 135000000.0, 7000000000.0, None, None)
    """
    found = re.fullmatch(r"\s*([\d.,]+(?:[eE][+-]?\d+)?)\s*([KMBT]?)\s*", str(text), re.I)
    try:
        size = float(found[1].replace(",", "")) * 1000 ** " KMBT".index(found[2].upper() or " ")
    except (ValueError, TypeError):
        return None
    return size if 0 < size < 1e18 else None


def read_sizes(path):
    """Rows name, parameters, accuracy of a CSV or JSON table -> [(name, parameters or None, per cent)]. Accuracies
    are taken as shares if none is above 1, else as per cent."""
    if str(path).endswith(".json"):
        rows = read_json(path)
    else:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = list(csv.DictReader(f))
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise ValueError(f"{path}: expected a list of rows with name, parameters, accuracy")
    out = []
    for i, row in enumerate(rows, 1):
        try:
            name, accuracy = str(row["name"]), float(str(row["accuracy"]).strip().rstrip("%"))
        except (KeyError, ValueError):
            raise ValueError(f"{path}, row {i}: needs a name and a number as accuracy (columns name, parameters, "
                             f"accuracy), got {label(row, 80)}") from None
        if not 0 <= accuracy <= 100:
            raise ValueError(f"{path}, row {i}: accuracy {accuracy} is not between 0 and 100")
        out.append((name, parse_size(row.get("parameters")), accuracy))
    share = bool(out) and max(a for _, _, a in out) <= 1
    return [(name, size, 100 * a if share else a) for name, size, a in out]


def pareto(points):
    """Indices of (size, accuracy) points that no other one beats, being no larger and no worse; by size.

    >>> pareto([(1, 10), (2, 5), (3, 20), (1, 8), (3, 20)])
    [0, 2, 4]
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    best, front = (-math.inf, 0), []
    for i in order:
        size, accuracy = points[i]
        if accuracy > best[0] or (accuracy, size) == best:
            front.append(i)
            best = (accuracy, size)
    return front


def sized_results(run):
    """Results that know their parameter count -> [(name, parameters, per cent, se or nan)], name of what is measured.
    The score: AIME24 where all have it, their only common benchmark, or the mean over the common ones."""
    known = [r for r in run["results"] + run["extra"] if number(r.get("parameters")) > 0 and r["benchmarks"]]
    if not known:
        return [], ""
    common = [b for b in known[0]["benchmarks"] if all(b in r["benchmarks"] for r in known)]
    common = [b for b in common if is_aime24(b)][:1] or common
    if not common:
        return [], "no common benchmark"
    points = []
    for r in known:
        scores = [r["benchmarks"][b] for b in common]
        se = math.sqrt(sum(number(s.get("se")) ** 2 for s in scores)) / len(scores)
        mean = sum(s["pass@1"] for s in scores) / len(scores)
        points.append((r["name"], float(r["parameters"]), 100 * mean, 100 * se))
    return points, common[0] if len(common) == 1 else f"mean of {', '.join(common)}"


def accuracy_vs_size(run):
    points, measured = sized_results(run)
    if measured == "no common benchmark" and not run["sizes"]:
        return "the results that know their parameter count share no benchmark"
    unknown = {name: a for name, size, a in run["sizes"] if size is None}
    points = points + [(name, size, a, math.nan) for name, size, a in run["sizes"] if size]
    if not points:
        return ("no result with a parameter count: give --sizes TABLE (name, parameters, accuracy) "
                "or results of evaluate.py")
    figure, [[axis]] = canvas(TITLES["accuracy_vs_size"], 4.8)
    x, y = np.array([p[1] for p in points]), np.array([p[2] for p in points])
    front = pareto(list(zip(x, y)))
    axis.errorbar(x, y, np.nan_to_num([p[3] for p in points]), fmt="none", ecolor=GREY, capsize=3, lw=1, zorder=2)
    others = [i for i in range(len(points)) if i not in front]
    axis.plot(x[front], y[front], color=RED, marker="D", ms=8, drawstyle="steps-post", ls="--", zorder=3,
              label="Pareto front")
    if others:
        axis.plot(x[others], y[others], color=BLUE, marker="o", ms=7, mfc="white", mew=1.6, ls="none", zorder=3,
                  label="other models")
    axis.set_xscale("log")
    axis.set_xlim(x.min() / 1.7, x.max() * 1.7)
    size_ticks(axis)
    error = np.nan_to_num([p[3] for p in points])
    low, high = (y - error).min(), (y + error).max()
    height = max(high - low, 5)
    axis.set_ylim(max(-0.04 * high - 0.1, low - 0.1 * height), high + 0.1 * height)
    reference_lines(axis, unknown)
    axis.set_xlabel("parameters (log scale)")
    axis.set_ylabel(f"pass@1 (%)\n{label(measured, 48)}" if measured else "accuracy (%)")
    legend(figure, axis)
    name_points(figure, axis, [(p[0], p[1], p[2]) for p in points])
    return figure


def size_ticks(axis):
    """Ticks at 1, 2, 5 x 10^k within the limits, thinned to what fits, written 135M, 1.5B."""
    low, high = axis.get_xlim()
    ticks = [m * 10.0 ** e for e in range(0, 19) for m in (1, 2, 5) if low <= m * 10.0 ** e <= high]
    if len(ticks) > 9:
        ticks = [t for t in ticks if math.log10(t).is_integer()]
    axis.set_xticks(ticks, [size_short(t) for t in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())


def size_short(n):
    """
    >>> size_short(1.5e9), size_short(135e6), size_short(2000), size_short(7)
    ('1.5B', '135M', '2K', '7')
    """
    for unit, value in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= value:
            return f"{n / value:.3g}{unit}"
    return f"{n:g}"


def name_points(figure, axis, points):
    """Names beside their points, each at the first of twelve places where it covers no point and no other name."""
    figure.draw_without_rendering()  # the layout must be final before boxes are compared
    figure.set_layout_engine("none")
    renderer, frame = FigureCanvasAgg(figure).get_renderer(), axis.get_window_extent()
    unit = DPI / 72
    white = dict(facecolor="white", edgecolor="none", pad=0.6, alpha=0.85)
    taken = [(px - 6 * unit, py - 6 * unit, px + 6 * unit, py + 6 * unit)
             for px, py in axis.transData.transform([(p[1], p[2]) for p in points])]
    places = [(dx, dy, "left" if dx > 0 else "right" if dx else "center")
              for far in (6, 18)
              for dx, dy in ((8, far), (8, -far), (-8, far), (-8, -far), (0, far + 6), (0, -far - 6))]
    for name, x, y in points:
        for dx, dy, side in places:
            text = axis.annotate(label(name, 26), (x, y), (dx, dy), textcoords="offset points", fontsize=9.5,
                                 ha=side, va="center", bbox=white)
            b = text.get_window_extent(renderer)
            inside = b.x0 > frame.x0 and b.x1 < frame.x1 and b.y0 > frame.y0 and b.y1 < frame.y1
            if inside and all(b.x1 < t[0] or b.x0 > t[2] or b.y1 < t[1] or b.y0 > t[3] for t in taken):
                taken.append((b.x0, b.y0, b.x1, b.y1))
                break
            text.remove()


def outcome(row):
    """Each sample is one of three: cut off at the limit, else right, else wrong."""
    if row.get("finish_reason") == "length":
        return "truncated"
    return "right" if number(row.get("reward")) > 0 else "wrong"


def rollout_files(stage):
    found = glob.glob(os.path.join(glob.escape(stage["folder"]), "rollouts", "*.jsonl.gz"))
    named = [(int(os.path.basename(p).split(".")[0]), p) for p in found if os.path.basename(p).split(".")[0].isdigit()]
    return sorted(named)


def evenly(items, most):
    """
    >>> evenly(list(range(10)), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, max(most, 1))]


def read_lines(path):
    """(number, text) of the lines of a rollouts or responses file; half of a compressed file is an error."""
    try:
        with open_text(path) as f:
            yield from ((i, text) for i, text in enumerate(f, 1) if text.strip())
    except (EOFError, OSError, zlib.error) as e:
        raise ValueError(f"{path}: cannot be read ({e}); remove the file, or restore it") from None


def length_distributions(run, most=40):
    """Per stage, from at most `most` of its rollout files, evenly over the steps."""
    stages = [s for s in run["stages"] if rollout_files(s)]
    if not stages:
        return need(run["stages"]) if not run["stages"] else (
            "no rollouts folder: only grpo.py's rollouts/*.jsonl.gz hold single lengths")
    counts = []
    for stage in stages:
        files = [(step, p) for step, p in rollout_files(stage) if stage["picked"] is None or step <= stage["picked"]]
        chosen, lengths = evenly(files or rollout_files(stage), most), {name: [] for name, *_ in OUTCOMES}
        for _, path in chosen:
            for line, text in read_lines(path):
                row = parse_line(text, path, line)
                if not math.isnan(number(row.get("response_tokens"))):
                    lengths[outcome(row)].append(row["response_tokens"])
        counts.append((lengths, len(chosen), len(files or rollout_files(stage))))
    if not any(any(lengths.values()) for lengths, *_ in counts):
        return "the rollouts hold no sample"
    figure, axes = canvas(TITLES["length_distributions"], 1.6 + 1.75 * len(stages), len(stages), sharex=True)
    longest = max(max(v) for lengths, *_ in counts for v in lengths.values() if v)
    bins = np.arange(0, longest + 2) - 0.5 if longest <= 40 else np.linspace(0, longest * 1.0001, 41)
    for axis, stage, (lengths, some, files) in zip(axes[:, 0], stages, counts):
        total = max(1, sum(map(len, lengths.values())))
        for name, color, dash in OUTCOMES:
            heights, _ = np.histogram(lengths[name], bins)
            share = 100 * heights / total
            axis.stairs(share, bins, fill=True, color=color, alpha=0.22, lw=0, zorder=2)
            axis.stairs(np.where(heights > 0, share, math.nan), bins, color=color, ls=dash, lw=1.8, zorder=3,
                        label=name)
        shares = ", ".join(f"{name} {100 * len(lengths[name]) / total:.1f} %" for name, *_ in OUTCOMES)
        sampled = f"{some} of {files} steps" if some < files else f"{files} step{'s' * (files > 1)}"
        axis.set_title("   ".join(filter(None, [label(stage["name"], 14), f"{total:,} samples, {sampled}: {shares}"])),
                       fontsize=10, loc="left")
        axis.set_ylabel("samples (%)")
        if stage["limit"] and stage["limit"] <= bins[-1] * 1.02:
            axis.axvline(stage["limit"], color=GREY, lw=1.1, ls=(0, (4, 3)), zorder=1)
    axes[-1][0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes[-1][0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1][0].set_xlabel("response length (tokens); thin dashed line: the limit")
    legend(figure, axes[0][0])
    return figure


def phase_seconds(rows):
    """{phase: [steps] seconds}; `rest` is what the step took beyond the phases that were clocked."""
    spent = {name: np.nan_to_num(column(rows, f"seconds_{name}")) for name, *_ in PHASES[:-1]}
    return spent | {"rest": np.maximum(np.nan_to_num(column(rows, "seconds")) - sum(spent.values()), 0)}


def time_per_step(run):
    """Bars per step (means of several where steps are many), and each stage's shares below."""
    reason = need(run["stages"], "seconds")
    if reason:
        return reason
    stages = [s for s in run["stages"] if s["steps"]]
    figure, axes = canvas(TITLES["time_per_step"], 4.7 + 0.42 * len(stages), 2,
                          height_ratios=[3.0, 0.5 + 0.42 * len(stages)])
    axis, shares = axes[:, 0]
    group = math.ceil(sum(len(s["steps"]) for s in stages) / 160)
    named = set()
    for k, stage in enumerate(stages):
        rows = [r for r in stage["steps"] if r["step"] <= stage_end(stage)]
        pieces = [rows[i:i + group] for i in range(0, len(rows), group)]
        x = np.array([stage["start"] + p[0]["step"] - 0.5 for p in pieces])
        width = np.array([p[-1]["step"] - p[0]["step"] + 1 for p in pieces])
        means = [{name: v.mean() for name, v in phase_seconds(p).items()} for p in pieces]
        whole = {name: v.sum() for name, v in phase_seconds(rows).items()}
        floor, left = np.zeros(len(pieces)), 0.0
        for name, color, hatch in PHASES:
            heights = np.array([m[name] for m in means])
            if heights.any():
                axis.bar(x, heights, width, floor, align="edge", color=color, hatch=hatch, edgecolor=GREY, lw=0.25,
                         label=name if name not in named else None)
                named.add(name)
                share = 100 * whole[name] / sum(whole.values())
                shares.barh(k, share, 0.72, left, color=color, hatch=hatch, edgecolor=GREY, lw=0.5)
                if share >= 5:
                    shares.text(left + share / 2, k, f"{share:.0f} %", ha="center", va="center", fontsize=9.5,
                                color="white" if color == BLUE else "black", bbox=None if not hatch else dict(
                                    facecolor="white", edgecolor="none", pad=1.2, alpha=0.85))
                left += share
            floor = floor + heights
    step_axis(axis, stages, [s["start"] + stage_end(s) for s in stages])
    axis.set_xlim(min(s["start"] + s["steps"][0]["step"] for s in stages) - 1,
                  max(s["start"] + stage_end(s) for s in stages) + 1)
    stage_names(axis, stages)
    axis.set_ylabel("seconds a step" + (f"\nbar: mean of {group} steps" if group > 1 else ""))
    axis.set_xlabel("training step (evaluation and saving not included)")
    shares.set_yticks(range(len(stages)), [label(s["name"], 12) or "whole run" for s in stages])
    shares.invert_yaxis()
    shares.set_xlim(0, 100)
    shares.set_xlabel("share of the time (%)")
    shares.grid(False)
    legend(figure, axis)
    return figure


FIGURES = [pass_at_1, length_and_reward, turning_over, truncation, accuracy_vs_size, length_distributions,
           time_per_step]


def draw(run_dir, window=100, out=None, results=(), references=None, sizes=None):
    """Write every figure the data allows -> (paths written, {figure: why it is missing}).

    window: steps of the moving average. out: folder (default run_dir/figures). results: further result files of
    evaluate.py. references: {name: per cent} instead of the published AIME24 ones. sizes: path of a table.
    ValueError names a file, and the line, that is not what it should be."""
    if window < 1:
        raise ValueError(f"--window must be at least 1 step, not {window}")
    run = {"stages": read_run(run_dir), "results": read_results(result_files(run_dir), strict=False), "window": window,
           "extra": read_results(results, strict=True), "references": references,
           "sizes": read_sizes(sizes) if sizes else []}
    written, missing = [], {}
    with matplotlib.rc_context(STYLE):
        for make in tqdm(FIGURES, desc="figures", disable=None, leave=False):
            try:
                figure = make(run)
            except ValueError as e:
                if make is not length_distributions:  # a damaged rollouts file costs the one figure that reads them
                    raise
                figure = str(e)
            if isinstance(figure, str):
                missing[make.__name__] = figure
            else:
                written += save(figure, out or os.path.join(run_dir, "figures"), make.__name__)
    return written, missing


# ---------------------------------------------------------------------------------------------------------------
# Transcripts: one HTML page that opens by double click
# ---------------------------------------------------------------------------------------------------------------

MAX_CHARS = 200_000         # of one response: the middle of a longer one is left out, and the page says so
MAX_PAGE_CHARS = 40_000_000  # of all responses: a browser opens that in seconds; fewer samples are taken beyond it


def sources(run_dir, stages):
    """{where from: [(step or None, path)]} of all files that hold samples: rollouts by stage, then evaluations."""
    found = {s["name"] or "training": rollout_files(s) for s in stages if rollout_files(s)}
    for folder in (run_dir, os.path.join(run_dir, "eval")):
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.responses.jsonl.gz"))):
            found["eval " + os.path.basename(path)[:-len(".responses.jsonl.gz")]] = [(None, path)]
    return found


def share_out(sizes, total):
    """Split `total` evenly; what a small one cannot use goes to the others.

    >>> share_out([10, 1, 10], 12)
    [5, 1, 6]
    """
    shares = [0] * len(sizes)
    for rank, i in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        shares[i] = min(sizes[i], total // (len(sizes) - rank))
        total -= shares[i]
    return shares


def sample_rows(path, most):
    """At most `most` rows of a file, evenly, in one pass with bounded memory -> (rows, rows there are)."""
    kept, stride, total = [], 1, 0
    for line, text in read_lines(path):
        if total % stride == 0:
            row = parse_line(text, path, line)
            kept.append(row | {"response": shorten(str(row.get("response", "")))})
        total += 1
        if len(kept) > 2 * most:
            kept, stride = kept[::2], 2 * stride
    return evenly(kept, most)[:most], total


def shorten(text):
    """Well formed text (a lone surrogate becomes U+FFFD) of at most about MAX_CHARS characters."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if len(text) <= MAX_CHARS:
        return text
    half = MAX_CHARS // 2
    return f"{text[:half]}\n\n[... {len(text) - 2 * half:,} characters left out of this page ...]\n\n{text[-half:]}"


def collect(found, most, files_each=100):
    """-> ([(where, step, row)], note): evenly over sources, over the steps of each, over the samples of a step.
    A source's files are opened a hundred at a time, evenly, until there are samples enough."""
    read, unread, seen = [], 0, 0
    for where, files in found.items():
        group, left = [], list(files)
        while left and sum(len(kept) for *_, kept, _ in group) < most:
            chosen = evenly(left, min(files_each, most))
            left = [f for f in left if f not in chosen]
            cap = min(most, 2 * math.ceil(most / len(chosen)))
            bar = tqdm(chosen, desc=label(where), disable=None, leave=False)
            group += [(where, step, *sample_rows(path, cap)) for step, path in bar]
        unread, seen = unread + len(left), seen + sum(total for *_, total in group)
        read.append(sorted(group, key=lambda r: r[1] or 0))
    rows = []
    for group, n in zip(read, share_out([sum(len(r[2]) for r in g) for g in read], most)):
        for (where, step, kept, _), k in zip(group, share_out([len(r[2]) for r in group], n)):
            rows += [(where, step, row) for row in evenly(kept, k)[:k]]
    while len(rows) > 1 and sum(len(row["response"]) for *_, row in rows) > MAX_PAGE_CHARS:
        rows = evenly(rows, len(rows) * 9 // 10)
    if not seen:
        return rows, "The files hold no sample."
    if len(rows) == seen and not unread:
        return rows, f"All {seen:,} samples."
    more = f"; {unread:,} further step files were not opened" if unread else ""
    return rows, (f"{len(rows):,} samples of {seen:,}{more}, taken evenly over the steps; "
                  f"--max_transcripts changes how many.")


def page_data(name, rows, note):
    """What the page's script reads. Everything is made text or a number here; problems are stored once."""
    problems, samples = {}, []
    for where, step, row in rows:
        size, text = number(row.get("response_tokens")), lambda key: "" if row[key] is None else shorten(str(row[key]))
        row = dict.fromkeys(("id", "benchmark", "sample", "reward", "finish_reason", "reason", "extracted", "answer",
                             "problem")) | row
        samples.append({"where": where, "step": step, "id": text("id"), "benchmark": text("benchmark"),
                        "sample": text("sample"), "outcome": outcome(row),
                        "reward": text("reward"), "tokens": 0 if math.isnan(size) else int(size),
                        "finish": text("finish_reason"), "reason": text("reason"), "extracted": text("extracted"),
                        "answer": text("answer"), "response": row["response"],
                        "problem": problems.setdefault(text("problem"), len(problems))})
    return {"run": name, "note": note, "problems": list(problems), "samples": samples}


def embed_json(value):
    r"""JSON that may stand in a <script> element: pure ASCII (so no U+2028, no lone surrogate), no <, > or &.

    >>> embed_json("</script>&\u2028\ud800")
    '"\\u003c/script\\u003e\\u0026\\u2028\\ud800"'
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def transcripts(run_dir, out=None, most=2000):
    """Write the page of transcripts -> its path (default run_dir/transcripts.html). ValueError if there are none."""
    found = sources(run_dir, read_run(run_dir))
    if not found:
        raise ValueError(f"{run_dir} holds no samples: no rollouts/*.jsonl.gz of grpo.py, no *.responses.jsonl.gz "
                         f"of evaluate.py")
    name = label(os.path.basename(os.path.abspath(run_dir)), 60)
    csp = lambda text: "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
    page, style, script = (read_text(os.path.join(HERE, "assets", "transcripts", f"page.{kind}"))
                           for kind in ("html", "css", "js"))
    html = (page.replace("SCRIPT_HASH", csp(script)).replace("STYLE_HASH", csp(style))
            .replace("/*style*/", style).replace("/*script*/", script)
            .replace("/*data*/", embed_json(page_data(name, *collect(found, most)))))  # last: nothing is replaced in it
    path = out or os.path.join(run_dir, "transcripts.html")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(html)
    os.replace(path + ".tmp", path)
    return path


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------

def parse_references(pairs):
    """["name=37.5", ...] -> {name: per cent}, None for no list at all.

    >>> parse_references(["a model=37.5"]), parse_references(None)
    ({'a model': 37.5}, None)
    """
    out = {}
    for pair in pairs or []:
        name, equal, value = pair.rpartition("=")
        try:
            out[name] = float(value)
        except ValueError:
            equal = ""
        if not equal or not name or not 0 <= out[name] <= 100:
            raise ValueError(f"--reference {pair}: write NAME=VALUE with a value in per cent, like o1-preview=40.0")
    return out if pairs is not None else None


def main(argv=None):
    p = argparse.ArgumentParser(description="Figures and transcripts of a run.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("run_dir", help="run of grpo.py or schedule.py, or a folder of evaluate.py results")
    p.add_argument("--window", type=int, default=100, 
                   help="steps of the moving average; a shorter run gets a quarter of its steps")
    p.add_argument("--transcripts", action="store_true", help="also write the page of transcripts")
    p.add_argument("--max_transcripts", type=int, default=2000, 
                   help="samples on that page at most, taken evenly over the steps")
    p.add_argument("--results", nargs="+", default=[], metavar="FILE",
                   help="further results of evaluate.py: reference lines, accuracy against size")
    p.add_argument("--reference", nargs="+", metavar="NAME=VALUE",
                   help="reference lines for pass@1, in per cent; without it the published ones, on AIME24 only")
    p.add_argument("--sizes", metavar="TABLE",
                   help="CSV or JSON with name, parameters (1.5B; empty: a line), accuracy (per cent)")
    p.add_argument("--out", help="folder for everything written; default RUN_DIR/figures, the page beside it")
    args = p.parse_args(argv)
    try:
        if args.max_transcripts < 1:
            raise ValueError(f"--max_transcripts must be at least 1, not {args.max_transcripts}")
        references = parse_references(args.reference)
        written, missing = draw(args.run_dir, args.window, args.out, args.results, references, args.sizes)
        for path in written:
            print(f"wrote {path}")
        for name, reason in missing.items():
            print(f"missing {name}: {reason}")
        if args.transcripts:
            page = os.path.join(args.out, "transcripts.html") if args.out else None
            print(f"wrote {transcripts(args.run_dir, page, args.max_transcripts)}")
    except (ValueError, OSError) as e:
        sys.exit(f"figures.py: {e}")


if __name__ == "__main__":
    main()
