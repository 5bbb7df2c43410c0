"""figures.py - the pictures of a run, and a page of its transcripts.

    python figures.py RUN                # -> RUN/figures/NAME.png, NAME.svg; says what is not drawn, and why
    python figures.py RUN RUN_B          # two runs in one picture -> RUN/figures-RUN_B/
    python figures.py RUN --window 20    # a shorter moving average (100 is what was published)
    python figures.py RUN --transcripts  # RUN/transcripts.html as well: one file, no script, works offline

RUN is a run of schedule.py, a run of grpo.py, or a folder of evaluate.py's results (also of other models).
Stages are laid end to end: each begins at the checkpoint that the one before handed on; what that one did
afterwards is drawn faded. Missing and damaged files are named on stderr, and what can be read is drawn.
Left out on purpose: interactive plots, a live server, TeX that latex2mathml does not read.
"""
import base64
import csv
import functools
import glob
import hashlib
import html
import io
import itertools
import os
import re
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import numpy as np
from latex2mathml.converter import convert_to_element
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from common import Parser, read_json, read_lines, write_atomic

# Okabe & Ito's colours, which are told apart with any colour vision; each goes with a marker and a dash
COLORS = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
BLUE, RED, GREEN, ORANGE, SKY, PINK = COLORS
GREY, DASHES = "#595959", ("-", "--", "-.", ":", (0, (6, 2)), (0, (6, 1, 1, 1)))
LOOKS = [{"color": c, "marker": m, "ls": ls} for c, m, ls in zip(COLORS, "osD^vP", DASHES)]
STYLE = {
    "font.size": 11, "figure.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#E4E4E4",
    "legend.frameon": False, "legend.fontsize": 10, "figure.constrained_layout.use": True, "figure.dpi": 200,
    "text.parse_math": False, "svg.hashsalt": "nanoscaler"}  # a $ in a name is a dollar; same run, same bytes
AIME24 = {"R1-Distill-Qwen-1.5B": 28.8, "o1-preview": 40.0, "DeepScaleR-1.5B": 43.1}  # published pass@1 (%)
PHASES = {"generate": BLUE, "reward": PINK, "logprobs": SKY, "update": ORANGE, "sync": GREEN,
          "idle": "#D0D0D0"}


# --- Reading a run -----------------------------------------------------------------------------------------

def read_objects(path):
    """Yield the objects of a file of JSON or JSON lines, maybe gzipped; damage is named on stderr."""
    bad = []
    try:
        for row in [read_json(path)] if path.endswith(".json") else read_lines(path, bad.append):
            if isinstance(row, dict):
                yield row
            else:
                bad.append(f"{path} holds a {type(row).__name__} where an object is expected")
    except (ValueError, OSError, RecursionError) as e:
        bad.append(str(e) if path in str(e) else f"{path}: {e}")
    if bad:
        print(f"figures.py: {bad[0]}" + f", and {len(bad) - 1} more" * (len(bad) > 1), file=sys.stderr)


def number(value):
    """A finite float. Anything else becomes nan, which is not drawn."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else float("nan")


def label(text, most=34):
    """A name out of a file, fit to be drawn: one line, printable, not too long."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return text if len(text) <= most else text[:most - 1] + "…"


def dictionary(value):
    return value if isinstance(value, dict) else {}


def read_stage(folder, plan, start):
    """One run of grpo.py. Its step s is step start + s of the whole run, `end` its last step that counts."""
    name, picked = str(plan.get("folder") or ""), plan.get("picked")
    evidence = dictionary(plan.get("evidence"))
    path = os.path.join(folder, name, "config.json")
    options = dictionary(next(read_objects(path), {}).get("options")) if os.path.exists(path) else {}
    path = os.path.join(folder, name, "metrics.jsonl")
    rows = {}
    for row in read_objects(path) if picked or os.path.exists(path) else ():
        if type(row.get("step")) is int and 0 <= row["step"] < 1e9:
            rows[row["step"]] = row  # a step that was done twice, after a crash, counts as it was done last
    windows = [evidence.get(key) for key in ("before", "after")]  # the steps that were compared to see a turn
    return SimpleNamespace(
        name=label(name, 16), rows=[rows[step] for step in sorted(rows)], start=start,
        end=picked if type(picked) is int else max(rows, default=0),
        limit=plan.get("max_len") or options.get("max_len"), eval_data=str(options.get("eval_data")),
        windows=[w for w in windows if isinstance(w, list) and [type(step) for step in w] == [int, int]])


def read_run(folder):
    """-> a run: its name, its stages in order, and its evaluations [(step or None, result)]."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder; give the folder of a run, or of evaluations")
    path, stages = os.path.join(folder, "plan.json"), []
    plans = next(read_objects(path), {}).get("stages") if os.path.exists(path) else [{}]
    if type(plans) is not list:
        raise ValueError(f"{path} holds no list of stages")
    for plan in plans:
        start = stages[-1].start + stages[-1].end if stages else 0
        stages.append(read_stage(folder, dictionary(plan), start))
    stages = [stage for stage in stages if stage.rows]
    name, here = label(os.path.basename(os.path.abspath(folder))), glob.escape(folder)
    paths = glob.glob(os.path.join(here, "*.json")) + glob.glob(os.path.join(here, "eval", "*.json"))
    results = [(step_of(r, stages, name), r) for path in sorted(paths) for r in read_result(path)]
    return SimpleNamespace(name=name, stages=stages, results=results)


def read_result(path):
    """[a result of evaluate.py], its scores {benchmark: (pass@1, standard error)} in per cent; else []."""
    row = next(read_objects(path), {})
    found = dictionary(row.get("benchmarks"))
    found |= {"average": row.get("average")} if len(found) > 1 else {}
    scores = {label(name): [100 * number(dictionary(score).get(key)) for key in ("pass@1", "se")]
              for name, score in found.items()}
    scores = {name: (mean, np.nan_to_num(se)) for name, (mean, se) in scores.items() if np.isfinite(mean)}
    name, model = label(row.get("name") or os.path.basename(path)[:-5]), str(row.get("model"))
    result = SimpleNamespace(name=name, model=model, scores=scores, size=number(row.get("parameters")))
    return [result] if found else []


def step_of(result, stages, run_name):
    """The step of the whole run whose checkpoint was evaluated; None for a model from elsewhere."""
    found = re.search(r"([^/]+)/checkpoints/0*(\d+)(/|$)", result.model)
    for stage in stages:
        if result.name == stage.name:
            return stage.start + stage.end
        if found and found[1] == (stage.name or run_name):
            return stage.start + int(found[2])
    return 0 if stages and result.name == "base" else None


def read_sizes(path):
    """A CSV file with name, parameters (7e9, 7B or empty) and accuracy (per cent) -> its rows as results."""
    with open(path, newline="", encoding="utf-8-sig") as f:
        rows = list(csv.DictReader(f))
    try:
        sizes = [re.sub("[bB]$", "e9", re.sub("[mM]$", "e6", row["parameters"] or "nan")) for row in rows]
        scores = [{"": (float(row["accuracy"]), 0.0)} for row in rows]
        return [SimpleNamespace(name=label(row["name"]), size=float(size), scores=score)
                for row, size, score in zip(rows, sizes, scores)]
    except (KeyError, ValueError, AttributeError, TypeError) as e:
        raise ValueError(f"{path}: every row needs a name, parameters and an accuracy ({e})") from None


def columns(stage, *keys):
    """[1 + keys, rows]: steps of the whole run, then values of each key, where the first key has a number."""
    rows = [[stage.start + row["step"], *(number(row.get(key)) for key in keys)] for row in stage.rows]
    return np.array([row for row in rows if np.isfinite(row[1])]).reshape(-1, 1 + len(keys)).T


def moving_average(values, window):
    """Centred mean of `window` values. Towards the ends it narrows on both sides: no rise is drawn late.

    >>> moving_average(np.array([0.0, 3.0, 3.0, 6.0, 9.0]), 3).tolist()
    [0.0, 2.0, 4.0, 6.0, 9.0]
    """
    total, at = np.cumsum(np.concatenate([[0.0], values])), np.arange(len(values))
    half = np.minimum(window // 2, np.minimum(at, at[::-1]))
    return (total[at + half + 1] - total[at - half]) / (2 * half + 1)


# --- The six pictures. Each takes the runs and the rows of --sizes -> a Figure, or why there is none --------

def canvas(title, height, rows=1, columns=1, **kw):
    figure = Figure(figsize=(8, height))
    figure.suptitle(title, x=0.012, ha="left")
    return figure, figure.subplots(rows, columns, squeeze=False, **kw)


def draw_series(axis, runs, key, color, scale=1, name="", bars=None):
    """Each step pale and the moving average strong; or, with the key of a standard error, points with bars.
    After the checkpoint handed on all is faded. Two runs get a colour and a dash each, and their names."""
    for run, look in zip(runs, LOOKS):
        color = color if len(runs) == 1 else look["color"]
        text = ", ".join([name] * bool(name) + [run.name] * (len(runs) > 1))
        for stage in run.stages:
            x, y, error = columns(stage, key, bars)
            mean, end = moving_average(y, run.window), stage.start + stage.end
            drawn = ((x <= end, 1.0), (x >= end, 0.35))[:1 + bool((x > end).any())] if len(x) else ()
            for part, alpha in drawn:
                kw = {"color": color, "alpha": alpha, "ls": look["ls"], "label": text}
                if bars:
                    error = np.nan_to_num(error)
                    axis.errorbar(x[part], scale * y[part], scale * error[part], marker="o", ms=4, **kw)
                else:
                    axis.plot(x[part], scale * y[part], ".-", ms=4, lw=0.6, color=color, alpha=0.3 * alpha)
                    axis.plot(x[part], scale * mean[part], lw=2.2, marker="o" if sum(part) < 3 else "", **kw)
                text = None


def step_axis(axis, runs, names=True):
    """Whole steps; a dashed line where a stage begins, its name and limit above, higher if near another."""
    low, high = axis.get_xlim()
    ends = []  # of the last name in each row
    for run, color in zip(runs, (GREY,) if len(runs) == 1 else COLORS):
        for stage in run.stages if len(run.stages) > 1 else ():
            axis.axvline(stage.start, color=color, lw=1.1, ls="--", zorder=1)
            name = stage.name + (f", {stage.limit:,}" if type(stage.limit) is int else "")
            row = next((i for i, end in enumerate(ends) if end <= stage.start), len(ends))
            ends[row:row + 1] = [stage.start + 0.0125 * (len(name) + 1) * (high - low)]
            if names:
                axis.annotate(name, (stage.start, 1), (2, 3 + 13 * row), xycoords=("data", "axes fraction"),
                              textcoords="offset points", fontsize=9.5, color=color)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    faded = any(line.get_alpha() == 0.35 for line in axis.lines)
    axis.set_xlabel("training step" + " (faded: after the checkpoint handed on)" * faded)


def finish(figure, axis, runs, top=None):
    """The axis of steps, with the names of stages over the top panel, and a legend under the picture."""
    step_axis(axis, runs, names=top is None)
    if top:
        step_axis(top, runs)
        top.set_xlabel("")
    handles, names = (top or axis).get_legend_handles_labels()
    if handles:
        columns = min(3, 100 // (max(map(len, names)) + 12))
        figure.legend(handles, names, loc="outside lower center", ncols=columns)
    return figure


def is_aime24(name):
    """By the exact name of the benchmark or its file: no toy that resembles it may be measured against o1."""
    return re.sub("[-_ ]", "", os.path.basename(name).split(".")[0].lower()) in ("aime24", "aime2024")


def pass_at_1(runs, sizes):
    """Validations in training and evaluations of checkpoints; as lines other models, published or given."""
    figure, [[axis]] = canvas("pass@1 against step", 5.2)
    draw_series(axis, runs, "eval_reward", GREY, 100, "in training", bars="eval_se")
    measured = [s.eval_data for run in runs for s in run.stages if len(columns(s, "eval_reward")[0])]
    looks, benchmarks = itertools.cycle(LOOKS), []
    for run in runs:
        dated = [(step, result.scores) for step, result in run.results if step is not None]
        for name in dict.fromkeys(name for _, scores in dated for name in scores):
            x, y, se = np.array(sorted((step, *scores[name]) for step, scores in dated if name in scores)).T
            text = f"{name}, {run.name}" if len(runs) > 1 else name
            axis.errorbar(x, y, se, **next(looks), capsize=3, label=text)
            benchmarks.append(name)
    if not axis.containers:
        return "no evaluation: train with --eval_data, or put results of evaluate.py into eval/"
    lines = dict(AIME24) if any(map(is_aime24, measured + benchmarks)) else {}
    main = next(filter(is_aime24, benchmarks), benchmarks[0] if benchmarks else None)
    others = [r for run in runs for step, r in run.results if step is None and main in r.scores]
    lines |= {r.name: r.scores[main][0] for r in others}
    lines |= {r.name: r.scores[""][0] for r in sizes if np.isnan(r.size)}
    for i, (name, value) in enumerate(sorted(lines.items(), key=lambda line: line[1])):
        axis.axhline(value, color=GREY, lw=1.2, ls=DASHES[5 - i % 6], label=f"{name} {value:.3g}")
    axis.set_ylabel("pass@1 (%), one standard error")
    return finish(figure, axis, runs)


def length_and_reward(runs, _):
    figure, [[above], [below]] = canvas("Response length and reward", 6.4, 2, sharex=True)
    draw_series(above, runs, "length_mean", BLUE, name=runs[0].mean)
    draw_series(below, runs, "reward", RED)
    above.set_ylabel("length (tokens)")
    below.set_ylabel("mean reward")
    return finish(figure, below, runs, top=above)


def truncation(runs, _):
    figure, [[axis]] = canvas("Responses cut off at the limit", 4)
    draw_series(axis, runs, "truncated", RED, 100, f"training, {runs[0].mean}")
    draw_series(axis, runs, "eval_truncated", BLUE, 100, "validation", bars="eval_truncated_se")
    axis.set(ylabel="truncated (%)", ylim=(0, max(1, axis.get_ylim()[1])))
    return finish(figure, axis, runs)


def turning_over(runs, _):
    """Stages that turned, each in steps of its own; shaded are the steps that were compared to see it."""
    turned = [(run, stage) for run in runs for stage in run.stages if stage.windows][-4:]
    if not turned:
        return "no stage turned: plan.json holds no evidence of it"
    title = "Reward, truncation and length where a stage turned"
    figure, axes = canvas(title, 6.6, 3, len(turned), sharex="col")
    for column, (run, stage) in zip(axes.T, turned):
        alone = [SimpleNamespace(**vars(run) | {"stages": [SimpleNamespace(**vars(stage) | {"start": 0})]})]
        for axis, key, color in zip(column, ("reward", "truncated", "length_mean"), (RED, GREEN, BLUE)):
            draw_series(axis, alone, key, color, 100 if key == "truncated" else 1)
            axis.axvline(stage.end, color="black", lw=1.2, ls="--")
            for (first, last), shade in zip(stage.windows, (SKY, ORANGE)):
                axis.axvspan(first - 0.5, last + 0.5, color=shade, alpha=0.25, lw=0)
        step_axis(column[-1], alone)
        column[-1].set_xlabel("step of the stage")
        column[0].set_title(f"{run.name}, {stage.name}" if len(runs) > 1 else stage.name)
    for axis, text in zip(axes[:, 0], ("mean reward", "truncated (%)", "length (tokens)")):
        axis.set_ylabel(text)
    words = f"line: {runs[0].mean}; shaded: the steps compared; dashed: the checkpoint handed on"
    figure.supxlabel(words, fontsize=10, color=GREY)
    return figure


def accuracy_vs_size(runs, sizes):
    """Results that know their parameter count, by a benchmark that all of them have, and rows of --sizes."""
    known = [(run, r) for run in runs for _, r in run.results if r.size > 0 and r.scores]
    shared = [name for name in known[0][1].scores if all(name in r.scores for _, r in known)] if known else []
    main = next(filter(is_aime24, shared), shared[-1] if shared else None)
    points = [(r.size, *r.scores[main], f"{r.name}, {run.name}" if len(runs) > 1 else r.name)
              for run, r in known if main]
    points += [(r.size, *r.scores[""], r.name) for r in sizes if r.size > 0]
    if len({point[0] for point in points}) < 2:
        return "fewer than two sizes of models: give --sizes, or put results of other models into eval/"
    figure, [[axis]] = canvas("Accuracy against model size", 5.2)
    for i, (size, accuracy, error, name) in enumerate(sorted(points)):
        look = LOOKS[i % 6] | {"marker": LOOKS[(i + i // 6) % 6]["marker"], "ls": ""}
        axis.errorbar(size, accuracy, error, **look, ms=8, capsize=3, label=name)
    axis.set(xscale="log", xlabel="parameters (billions)", ylabel=f"pass@1 (%) {main or ''}")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda n, _: f"{n / 1e9:.3g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def time_per_step(runs, _):
    """Seconds of the steps that count, by phase; `rest` is what no phase claims."""
    figure, axes = canvas("Where the time of a step went", 1.4 + 3.2 * len(runs), len(runs), sharex=True)
    for axis, run in zip(axes[:, 0], runs):
        rows = [(s.start + r["step"], r) for s in run.stages for r in s.rows if 0 < r["step"] <= s.end]
        edges = np.array([step for step, _ in rows] + [rows[-1][0] + 1 if rows else 1]) - 0.5
        spent = {name: np.nan_to_num([number(r.get(f"seconds_{name}")) for _, r in rows]) for name in PHASES}
        whole = np.nan_to_num([number(r.get("seconds")) for _, r in rows])
        spent["rest"] = np.maximum(whole - sum(spent.values()), 0)
        floor = np.zeros(len(rows))
        for name, seconds in spent.items():
            if seconds.any():
                share = 100 * seconds.sum() / sum(map(np.sum, spent.values()))
                look = {"color": PHASES.get(name, "#8C8C8C"), "label": f"{name} {share:.0f} %"}
                axis.stairs(floor + seconds, edges, baseline=floor, fill=True, **look)
                floor = floor + seconds
        step_axis(axis, [run])
        axis.set_ylabel("seconds" + f", {run.name}" * (len(runs) > 1))
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    return figure


# Each picture, with the metrics that it cannot do without
FIGURES = {pass_at_1: (), length_and_reward: ("length_mean", "reward"), turning_over: (),
           truncation: ("truncated",), accuracy_vs_size: (), time_per_step: ("seconds",)}


def draw(run, run_b=None, *, window=100, out=None, sizes=None):
    """Write every picture the data allows -> (paths written, {picture: why it is not drawn}).

    window: steps of the moving average, at most a quarter of the longest stage. out: a folder.
    sizes: path of a CSV table. ValueError names what was given wrongly."""
    if window < 1:
        raise ValueError(f"--window must be at least 1 step, not {window}")
    runs = [read_run(folder) for folder in (run, run_b) if folder]
    name = "figures-" + os.path.basename(os.path.abspath(run_b)) if run_b else "figures"
    out = out or os.path.join(run, name)
    same = len({r.name for r in runs}) < len(runs)
    longest = max((len(stage.rows) for r in runs for stage in r.stages), default=0)
    for r, folder in zip(runs, (run, run_b)):
        r.window = max(1, min(window, longest // 4))
        r.mean = f"mean of {r.window} steps" if r.window > 1 else "each step"
        r.name = label(folder) if same else r.name
    models = read_sizes(sizes) if sizes else []
    written, missing = [], {}
    with matplotlib.rc_context(STYLE):
        for make, needs in FIGURES.items():
            stages = [stage for r in runs for stage in r.stages]
            absent = [key for key in needs if not any(columns(stage, key).size for stage in stages)]
            figure = f"no step has a number for {', '.join(absent)} yet" if absent else make(runs, models)
            if isinstance(figure, str):
                missing[make.__name__] = figure
                continue
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                picture = io.BytesIO()
                figure.savefig(picture, format=kind, metadata=metadata)
                written.append(os.path.join(out, f"{make.__name__}.{kind}"))
                write_atomic(written[-1], picture.getvalue())
    return written, missing


# --- Transcripts: one page without a script, of whole groups, since a group is what GRPO compares -----------

PAGE_CHARS, MATH_CHARS = 30_000_000, 3_000_000  # all responses and all MathML: opened in 1 s each
TAGS = re.compile("math|mrow|mi|mn|mo|mtext|mspace|msup|msub|msubsup|mfrac|msqrt|mroot|munder|mover|"
                  "munderover|mtable|mtr|mtd|mstyle|menclose")
ATTRIBUTES = re.compile("(display|displaystyle|scriptlevel|stretchy|fence|form|movablelimits|linethickness|"
                        "columnalign|columnspacing|rowspacing|minsize|maxsize|width)=[a-z0-9. ]{0,20}")
REFUSED = re.compile(r"\\(def|newcommand|newenvironment|DeclareMathOperator|sideset|[bx]?cancel|sout)")
FORMULA = re.compile(r"""
    \$\$(?P<block1>[^$]+)\$\$ | \\\[(?P<block2>(?:[^\\]|\\[^][])*+)\\\] |
    \\\((?P<inline1>(?:[^\\]|\\[^()])*+)\\\) | (?<![\\$])\$(?P<inline2>(?![\s$])[^$\n]*[^\s$\\])\$(?![\d$])
    """, re.VERBOSE)
CSS = """
:root { color-scheme: light dark; --line: #8886; --right: #00689d; --wrong: #b34700; }
@media (prefers-color-scheme: dark) { :root { --right: #63b8ec; --wrong: #ff9a5c; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: auto; padding: 0.5em; }
body, pre { overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: 6px; margin: 0.5em 0; padding: 0.4em 0.7em; }
summary { cursor: pointer; }
label { white-space: nowrap; }
summary span { display: block; opacity: 0.75; max-height: 3em; overflow: hidden; }
[open] > summary span { display: none; }
article { border-top: 1px solid var(--line); content-visibility: auto; contain-intrinsic-size: auto 20em; }
pre { font: inherit; white-space: pre-wrap; margin: 0; padding: 0.4em; overflow: auto; }
.thought { max-height: 30em; background: #8882; border-left: 3px solid var(--line); font-size: 0.9em; }
.right b { color: var(--right); }
.wrong b { color: var(--wrong); }
menclose { border: 1px solid; padding: 0.1em 0.3em; }
#g2:checked ~ details:not(.mixed), #g3:checked ~ details:not(.none), #g4:checked ~ details:not(.all),
#a2:checked ~ details .wrong, #a3:checked ~ details .right, #a4:checked ~ details article:not(.cut) {
  display: none;
}
"""
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Transcripts of {run}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}</style>
<h1>Transcripts of {run}</h1><p>{note}</p>Groups: {groups}<br>Answers: {answers}
{body}</html>"""


def visible(text):
    """Control and direction characters and lone surrogates are shown by their numbers, like [U+202E]."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
                  lambda c: f"[U+{ord(c[0]):04X}]", str(text).replace("\r\n", "\n"))


def escape(text):
    return html.escape(visible(text))


@functools.lru_cache(100_000)
def mathml(tex, display):
    r"""TeX as MathML; "" if it is long or deep, defines commands, is not understood or gives other elements.

    >>> mathml(r"\frac12", "inline")
    '<math display="inline"><mrow><mfrac><mn>1</mn><mn>2</mn></mfrac></mrow></math>'
    """
    nested = max(itertools.accumulate((c == "{") - (c == "}") for c in "x" + tex))
    if len(tex) > 1000 or nested > 20 or REFUSED.search(tex):
        return ""
    try:
        tree = convert_to_element(tex.replace("{aligned}", "{align*}"), display=display)
    except Exception:  # noqa: BLE001, for it has a dozen errors of its own; whichever it is, the TeX is shown
        return ""
    todo = [(tree, 0)]
    while todo:
        e, depth = todo.pop()
        e.text = visible(html.unescape(e.text or ""))
        odd = "linebreak" in e.attrib or re.match(r"\\[a-zA-Z]|&", e.text)
        if not TAGS.fullmatch(e.tag) or odd or depth > 40:
            return ""
        e.attrib = {key: value for key, value in e.attrib.items() if ATTRIBUTES.fullmatch(f"{key}={value}")}
        todo += [(child, depth + 1) for child in e]
    return ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False)


class Typesetter:
    """Text to HTML: escaped, and its TeX as MathML while there is `room` for it, in characters."""
    room = 0

    def __call__(self, text):
        text, pieces, end = visible(text), [], 0
        for found in FORMULA.finditer(text):
            kind, tex = found.lastgroup, found[found.lastgroup]
            words = re.sub(r"\\[a-zA-Z]+({[^}]*})?", "", tex)
            if kind == "inline2" and re.match(r"\d.*\s[a-zA-Z]{2}", words):
                continue  # "$5 and 6$" is money
            math = ""
            if self.room > 0:
                math = mathml(tex, kind[:-1])
                self.room -= len(math or 16 * tex)  # what is refused takes time as well
            pieces.append(html.escape(text[end:found.start()]))
            pieces.append(math or f"<code>{html.escape(found[0])}</code>")
            end = found.end()
        return "".join(pieces) + html.escape(text[end:])


def answer_html(row, advantage, typeset, most):
    """One answer: how it was graded, its thought in a box, and what follows the thought."""
    text, cut = str(row.get("response")), row.get("finish_reason") == "length"
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"
    thought, close, rest = text.rpartition("</think>")
    if cut and not close:
        thought, rest = rest, ""  # the thought did not end
    rest = typeset(rest)  # before the thought, which may use up the room for formulas
    box = f'<pre class="thought">{typeset(thought + close)}</pre>' if thought else ""
    kind, word = ("right", "✓ right") if number(row.get("reward")) > 0 else ("wrong", "✗ wrong")
    facts = [word + ", ✂ cut off" * cut, f"reward {row.get('reward')}",
             f"advantage {advantage:+.2f}" if "step" in row else "",  # else an evaluation
             f"{row.get('response_tokens')} tokens", row.get("verdict") or row.get("reason")]
    facts = " · ".join(escape(fact) for fact in facts if fact)
    return f'<article class="{kind}{" cut" * cut}"><p><b>{facts}</b></p>{box}<pre>{rest}</pre></article>'


def group_html(where, rows, typeset, samples):
    """A group: the problem once, then its answers."""
    rewards = np.nan_to_num([number(row.get("reward")) for row in rows])
    spread = rewards.std(ddof=1) if len(rows) > 1 else 0.0
    name, problem, gold = (str(rows[0].get(key)) for key in ("id", "problem", "answer"))
    typeset.room += MATH_CHARS // samples
    asked, wanted = typeset(problem), typeset(f"${gold}$") if re.search(r"[\\^_]", gold) else escape(gold)
    answers = []
    for row, reward in zip(rows, rewards):
        typeset.room += MATH_CHARS // samples
        computed = (reward - rewards.mean()) / (spread + 1e-6)
        advantage = computed if row.get("advantage") is None else number(row["advantage"])
        answers.append(answer_html(row, advantage, typeset, PAGE_CHARS // samples))
    good, step = int((rewards > 0).sum()), f", step {rows[0]['step']}" if "step" in rows[0] else ""
    kind = "none" if good == 0 else "all" if good == len(rows) else "mixed"
    head = escape(f"{where}{step} · {name[:60]} · {good} of {len(rows)} right")
    return (f'<details class="{kind}"><summary>{head}<span>{escape(problem[:200])}</span></summary>'
            f'<pre>{asked}</pre><p>Wanted: {wanted}</p>{"".join(answers)}</details>')


def evenly(items, most):
    """At least one of the items, and at most `most`."""
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, max(1, min(most, len(items))))]


def transcripts(run, out=None, most=2000):
    """Write the page of transcripts -> its path, by default RUN/transcripts.html. ValueError if empty."""
    sources = {}  # {where from: its files}; each gets an equal share of the page
    for path in sorted(glob.glob(os.path.join(glob.escape(run), "**", "*.jsonl.gz"), recursive=True)):
        folder, name = os.path.split(os.path.relpath(path, run))
        if os.path.basename(folder) == "rollouts":
            sources.setdefault(os.path.dirname(folder) or "training", []).append(path)
        elif name.endswith(".responses.jsonl.gz"):
            sources[f"evaluation {name[:-len('.responses.jsonl.gz')]}"] = [path]
    groups = []
    for where, files in sources.items():
        files = evenly(files, most // len(sources) // 16)
        for path in files:
            rows = itertools.groupby(read_objects(path), key=lambda r: (r.get("benchmark"), r.get("id")))
            found = [(where, list(group)) for _, group in rows]
            if found:
                groups += evenly(found, most // len(sources) // len(files) // len(found[0][1]))
    if not groups:
        raise ValueError(f"{run} holds no samples: neither rollouts of grpo.py nor responses of evaluate.py")
    samples, typeset = sum(len(rows) for _, rows in groups), Typesetter()
    path = out or os.path.join(run, "transcripts.html")
    write_atomic(path, PAGE.format(
        run=escape(label(os.path.basename(os.path.abspath(run)), 60)), css=CSS,
        digest=base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode(),
        note=f"{samples:,} samples in {len(groups):,} groups, evenly from stages, steps and evaluations.",
        groups=radios("g", ("all", "right and wrong", "none right", "all right")),
        answers=radios("a", ("all", "right", "wrong", "cut off")),
        body="\n".join(group_html(where, rows, typeset, samples) for where, rows in groups)))
    return path


def radios(name, words):
    """Radio buttons with the ids by which CSS filters: name1, name2, ..."""
    return " ".join(f'<input type="radio" name="{name}" id="{name}{i}"{" checked" * (i == 1)}>'
                    f'<label for="{name}{i}">{word}</label>' for i, word in enumerate(words, 1))


def main(argv=None):
    p = Parser(description="The pictures of a run, and a page of its transcripts.")
    p.add_argument("run", help="folder of schedule.py or grpo.py, or of results of evaluate.py")
    p.add_argument("run_b", nargs="?", help="a second run, drawn into the same pictures")
    p.add_argument("--window", type=int, default=100, help="steps of the moving average")
    p.add_argument("--transcripts", action="store_true", help="also write the page of transcripts of RUN")
    p.add_argument("--max_transcripts", type=int, default=2000, help="samples on that page, in whole groups")
    p.add_argument("--sizes", help="CSV of models: name, parameters (none: a line in pass@1), accuracy (%%)")
    p.add_argument("--out", help="folder for everything written; default RUN/figures, and RUN for the page")
    args = p.parse(argv)
    try:
        written, missing = draw(args.run, args.run_b, window=args.window, out=args.out, sizes=args.sizes)
        if args.transcripts:
            page = os.path.join(args.out or args.run, "transcripts.html")
            written.append(transcripts(args.run, page, args.max_transcripts))
    except (ValueError, OSError) as e:
        sys.exit(f"figures.py: {e}")
    undrawn = [f"not drawn: {name}: {why}" for name, why in missing.items()]
    print("\n".join([f"wrote {path}" for path in written] + undrawn))


if __name__ == "__main__":
    main()
