"""figures.py - the pictures of a run, and a page of its transcripts.

    python figures.py RUN                # -> RUN/figures/NAME.png, NAME.svg; says what is not drawn, and why
    python figures.py RUN RUN_B          # two runs in one picture -> RUN/figures-RUN_B/
    python figures.py RUN --transcripts  # RUN/transcripts.html as well: one file, no script, works offline

RUN is a run of schedule.py or grpo.py, or holds results of evaluate.py; a published score may stand in a file
RUN/NAME.json with name, parameters and benchmarks. Stages are laid end to end; damage is named on stderr.
Left out on purpose: interactive plots, a live server, TeX that latex2mathml does not read.
"""
import glob
import html
import io
import itertools
import math
import os
import re
import sys
from functools import lru_cache, partial
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib.figure
import numpy as np
from latex2mathml.converter import convert_to_element

from common import Parser, read_json, read_lines, write_atomic

COLORS = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#8C8C8C"  # Okabe & Ito, grey
STYLE = {  # a $ in a name is a dollar, and the same run gives the same bytes
    "axes.prop_cycle": matplotlib.cycler(color=COLORS, marker=list("osD^vPX")), "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": "small", "figure.dpi": 200,
    "figure.constrained_layout.use": True, "text.parse_math": False, "svg.hashsalt": "figures"}
METRICS = {"reward": ("mean reward", 1), "truncated": ("cut off (%)", 100), "length_mean": ("tokens", 1)}
PHASES = "generate", "reward", "logprobs", "update", "sync", "idle", "rest"
AIME24 = {"R1-Distill-Qwen-1.5B": 28.8, "o1-preview": 40.0, "DeepScaleR-1.5B": 43.1}  # published pass@1 (%)


def objects(path):
    """Yield the objects of a file of JSON or JSON lines, maybe gzipped; damage is named on stderr."""
    bad = []
    try:
        yield from [dict(read_json(path))] if path.endswith(".json") else read_lines(path, bad.append)
    except (ValueError, OSError, TypeError, RecursionError) as e:
        bad.append(str(e) if path in str(e) else f"{path}: {e}")
    if bad:
        print(f"figures.py: {bad[0]}" + f", and {len(bad) - 1} more" * (len(bad) > 1), file=sys.stderr)


def number(value):
    """A finite float. Anything else becomes nan, which is not drawn."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else math.nan


def visible(text, most=None):
    """Control and direction characters and lone surrogates are shown by their numbers, like [U+202E]."""
    text = re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
                  lambda c: f"[U+{ord(c[0]):04X}]", str(text).replace("\r\n", "\n"))
    return text if most is None or len(text) <= most else text[:most] + "…"


def read_run(folder, window, prefix):
    """-> a run: its stages in order, and the scores that evaluate.py left in it. Step s of a stage is step
    start + s of the run, and the stage counts up to its step `end`, the checkpoint that was handed on."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder; give the folder of a run, or of evaluations")
    plan, stages, start = os.path.join(folder, "plan.json"), [], 0
    try:
        for stage in next(objects(plan), {})["stages"] if os.path.exists(plan) else [{"folder": ""}]:
            path, rows = os.path.join(folder, stage["folder"], "config.json"), {}
            options = dict(next(objects(path), {}).get("options") or {}) if os.path.exists(path) else {}
            path = os.path.join(folder, stage["folder"], "metrics.jsonl")
            for row in objects(path) if stage.get("picked") or os.path.exists(path) else ():
                if type(row.get("step")) in (int, float) and 0 <= row["step"] < 1e9:
                    rows[int(row["step"])] = row  # what was done twice counts as it was done last
            end = start + int(stage.get("picked") or max(rows, default=0))
            stages.append(SimpleNamespace(
                name=visible(stage["folder"], 16), limit=number(stage.get("max_len")), start=start, end=end,
                rows=[rows[step] for step in sorted(rows)], turned=bool(stage.get("evidence")),
                benchmark=os.path.basename(str(options.get("eval_data"))).split(".")[0]))
            start = end
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise ValueError(f"{folder}: plan.json or a config.json has another form ({e!r})") from e
    stages = [stage for stage in stages if stage.rows]
    files = sorted(glob.glob("*.json", root_dir=folder) + glob.glob("eval/*.json", root_dir=folder))
    scores = [score for file in files for score in read_scores(folder, file, stages)]
    window = max(1, min(window, max((len(stage.rows) for stage in stages), default=0) // 4))
    return SimpleNamespace(stages=stages, scores=scores, window=window, prefix=prefix)


def read_scores(folder, file, stages):
    """Yield the scores of one result of evaluate.py, in per cent. The step is that of the whole run whose
    checkpoint was evaluated, or None for a model from elsewhere."""
    row = next(objects(os.path.join(folder, file)), {})
    name, found = visible(row.get("name") or os.path.basename(file)[:-5])[-24:], row.get("benchmarks")
    steps = {"base": 0} | {stage.name: stage.end for stage in stages} if stages else {}
    model = {"name": name, "step": steps.get(name), "size": number(row.get("parameters"))}
    for bench, score in found.items() if isinstance(found, dict) else ():
        score = score if isinstance(score, dict) else {}
        mean, se = (100 * number(score.get(key)) for key in ("pass@1", "se"))
        if math.isfinite(mean):
            yield SimpleNamespace(bench=visible(bench, 24), mean=mean, se=np.nan_to_num(se), **model)


def columns(stages, *keys):
    """[1 + keys, rows]: steps of the whole run, then values of each key, where the first key has a number."""
    rows = [[stage.start + row["step"], *(number(row.get(key)) for key in keys)]
            for stage in stages for row in stage.rows if stage.start + row["step"] <= stage.end]
    return np.array([row for row in rows if np.isfinite(row[1])]).reshape(-1, 1 + len(keys)).T


def moving_average(values, window):
    """Centred mean of `window` values. Towards the ends it narrows on both sides: no rise is drawn late."""
    total, at = np.cumsum(np.concatenate([[0.0], values])), np.arange(len(values))
    half = np.minimum(window // 2, np.minimum(at, at[::-1]))
    return (total[at + half + 1] - total[at - half]) / (2 * half + 1)


# --- The six pictures, each a function of the runs ----------------------------------------------------------
def canvas(title, rows=1, columns=1, runs=()):
    """Axes for steps, with a line where a stage begins; its name stands one higher than the last."""
    figure = matplotlib.figure.Figure(figsize=(8, 2 + 2 * max(rows, 1.5)))
    figure.suptitle(title, x=0.012, ha="left", weight="bold")
    axes = figure.subplots(rows, columns, squeeze=False, sharex="col")
    begun = [(stage.start, f"{run.prefix}{stage.name}, {stage.limit:,.0f}")
             for run in runs if len(run.stages) > 1 for stage in run.stages]
    for i, (start, name) in enumerate(sorted(begun)):
        axes[0, 0].annotate(name, (start, 1), (2, 3 + 12 * i), xycoords=("data", "axes fraction"),
                            textcoords="offset points", size=9)
        for axis in axes.flat:
            axis.axvline(start, color="grey", lw=1, ls="--")
    for axis in axes[-1]:
        axis.set_xlabel("training step")
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
    return figure, axes


def training(title, keys, runs, groups=None):
    """A row for each metric, a column for each group of runs: each step pale, the moving average strong."""
    groups = groups or [runs]
    figure, axes = canvas(title, len(keys), len(groups), runs)
    for (row, column), axis in np.ndenumerate(axes):
        name, scale = METRICS[keys[row]]
        axis.set_ylabel(name)
        for run, color in zip(groups[column], COLORS):
            for x, y in (columns([stage], keys[row]) for stage in run.stages):
                axis.plot(x, scale * y, ".", ms=4, color=color, alpha=0.4)
                if len(x):
                    axis.plot(x, scale * moving_average(y, run.window), lw=2, marker="", color=color,
                              label=f"{run.prefix}mean of {run.window} steps")
    return figure


def turning_over(runs):
    """Stages that turned, with what came after the checkpoint that was handed on."""
    turned = [(run, stage) for run in runs for stage in run.stages if stage.turned][-4:]
    wholes = [SimpleNamespace(**vars(stage) | {"end": math.inf}) for _, stage in turned]
    groups = [[SimpleNamespace(**vars(run) | {"stages": [whole]})] for (run, _), whole in zip(turned, wholes)]
    figure = training("Reward, truncation and length at a turn", list(METRICS), [], groups)
    for i, axis in enumerate(figure.axes if turned else ()):
        run, stage = turned[i % len(turned)]
        axis.set_title(run.prefix + stage.name, size="small")
        axis.axvline(stage.end, color="black", lw=1, ls="--", label="checkpoint handed on")
    return figure


def pass_at_1(runs):
    """Validations in training, evaluations of checkpoints; other models as lines, published or measured."""
    figure, [[axis]] = canvas("pass@1 against step", runs=runs)
    axis.set_ylabel("pass@1 (%), one standard error")
    benchmarks = []
    for run in runs:
        x, y, se = columns(run.stages, "eval_reward", "eval_se")
        if len(x):
            benchmarks += [stage.benchmark for stage in run.stages]
            axis.errorbar(x, 100 * y, 100 * np.nan_to_num(se), capsize=2, label=f"{run.prefix}in training")
        dated = [score for score in run.scores if score.step is not None]
        for bench in dict.fromkeys(score.bench for score in dated):
            benchmarks.append(bench)
            x, y, se = np.array(sorted((s.step, s.mean, s.se) for s in dated if s.bench == bench)).T
            axis.errorbar(x, y, se, capsize=3, label=run.prefix + bench)
    main = "aime24" if "aime24" in benchmarks else "".join(benchmarks[:1])
    lines = {(s.mean, s.name) for run in runs for s in run.scores if s.step is None and s.bench == main}
    lines |= {(value, name) for name, value in AIME24.items() if main == "aime24"}
    for i, (value, name) in enumerate(sorted(lines)):
        axis.axhline(value, color="grey", lw=1.2, ls=(0, (2 * i + 1, 2)), label=f"{name} {value:.3g}")
    return figure


def accuracy_vs_size(runs):
    known = [(run, score) for run in runs for score in run.scores if score.size > 0]
    names = [score.bench for _, score in known]
    main = max(names, key=lambda name: (names.count(name), name == "aime24"), default="")
    points = [(s.size / 1e9, s.mean, s.se, run.prefix + s.name) for run, s in known if s.bench == main]
    figure, [[axis]] = canvas("Accuracy against model size")
    for size, accuracy, se, name in sorted(points) if len({point[0] for point in points}) > 1 else ():
        axis.errorbar(size, accuracy, se, ls="", ms=8, capsize=3, label=name)
    axis.set(xlabel="parameters (billions)", ylabel=f"pass@1 (%) {main}")
    return figure


def time_per_step(runs):
    """Seconds of the steps that count, by phase; `rest` is what no phase claims."""
    figure, axes = canvas("Where the time of a step went", len(runs), runs=runs)
    for axis, run in zip(axes.flat, runs):
        axis.set_ylabel("seconds")
        table = columns(run.stages, "seconds", *(f"seconds_{phase}" for phase in PHASES[:-1]))
        if np.nansum(table[1]) > 0:
            step, whole, *spent = np.nan_to_num(table)
            spent = np.array([*spent, np.maximum(whole - sum(spent), 0)])
            names = [f"{run.prefix}{key} {part:.0%}" for key, part in zip(PHASES, spent.sum(1) / spent.sum())]
            edges, spent = np.append(step, step[-1] + 1) - 0.5, np.c_[spent, spent[:, -1]]
            axis.stackplot(edges, spent, step="post", labels=names, colors=COLORS)
    return figure


FIGURES = {  # {name: (how it is made, what is said where it has nothing to show)}
    "pass_at_1": (pass_at_1, "no evaluation: train with --eval_data, or evaluate.py --out RUN/eval"),
    "length_and_reward": (partial(training, "Length and reward", ["length_mean", "reward"]), "not logged"),
    "turning_over": (turning_over, "no stage turned: plan.json holds no evidence of it"),
    "truncation": (partial(training, "Responses cut off", ["truncated"]), "not logged"),
    "accuracy_vs_size": (accuracy_vs_size, "fewer than two sizes of models have results in eval/"),
    "time_per_step": (time_per_step, "not logged")}


def draw(run, run_b=None, *, window=100):
    """Write every picture, with means of `window` steps -> (paths, {what is not drawn: why})."""
    folders, written, missing = [run, run_b] if run_b else [run], [], {}
    runs = [read_run(f, window, f"{a} {visible(f)[-22:]}, " if run_b else "") for a, f in zip("AB", folders)]
    out = os.path.join(run, f"figures-{os.path.basename(os.path.abspath(run_b))}" if run_b else "figures")
    with matplotlib.rc_context(STYLE):
        for name, (make, reason) in FIGURES.items():
            figure = make(runs)
            legends = [axis.get_legend_handles_labels() for axis in figure.axes]
            if not all(labels for _, labels in legends):
                missing[name] = reason
                continue
            named = {label: line for lines, labels in legends for line, label in zip(lines, labels)}
            figure.legend(named.values(), named, loc="outside lower center", ncols=2 if run_b else 3)
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                picture = io.BytesIO()
                figure.savefig(picture, format=kind, metadata=metadata)
                written.append(os.path.join(out, f"{name}.{kind}"))
                write_atomic(written[-1], picture.getvalue())
    return written, missing


# --- Transcripts: one page without a script, of whole groups, since a group is what GRPO compares -----------
PAGE_CHARS, MATH_CHARS = 20_000_000, 2_000_000  # shared by the answers; a long one loses its beginning
TAGS = re.compile("math|mrow|mi|mn|mo|mtext|mspace|msup|msub|msubsup|mfrac|msqrt|mroot|munder|mover|"
                  "munderover|mtable|mtr|mtd|mstyle|menclose")
SAFE = re.compile("(display(style)?|stretchy|movablelimits|linethickness|m(in|ax)size|width)=[a-z0-9. ]{1,9}")
FORMULA = re.compile(r"""\$\$([^$]+)\$\$ | \\\[((?:[^\\]|\\[^][])*+)\\\] | \\\(((?:[^\\]|\\[^()])*+)\\\) |
    (?<![\\$])\$(?![\s$]|\d[^\\$\n]*\s[a-zA-Z]{2})([^$\n]*[^\s$\\])\$(?![\d$])  # "$5 and 6$" is money
    """, re.VERBOSE)
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Transcripts of {run}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: auto; padding: 0.5em; overflow-wrap: anywhere; }}
details, article {{ border-top: 1px solid #8886; padding: 0.4em 0; }}
pre {{ font: inherit; white-space: pre-wrap; overflow: auto; margin: 0.5em 0; }}
.thought {{ max-height: 30em; background: #8882; }}
.wrong b {{ color: light-dark(#b34700, #ff9a5c); }}
menclose {{ border: 1px solid; padding: 0.1em 0.3em; }}
#r:checked ~ details .wrong, #r:checked ~ details:not(:has(.right)),
#w:checked ~ details .right, #w:checked ~ details:not(:has(.wrong)) {{ display: none; }}
</style><h1>Transcripts of {run}</h1>
<p>{samples:,} samples in {count:,} groups, evenly from stages, steps and evaluations.</p>
<input type="radio" name="show" id="a" checked><label for="a">all answers</label>
<input type="radio" name="show" id="r"><label for="r">✓ right</label>
<input type="radio" name="show" id="w"><label for="w">✗ wrong</label>
{groups}</html>"""


def is_safe(element, depth=0):
    """May it and all within it stand on the page? Attributes that are not known are taken off."""
    element.text = visible(html.unescape(element.text or ""))
    odd = "linebreak" in element.attrib or element.get("notation", "box") != "box"  # browsers draw none
    unread = re.match(r"\\[a-zA-Z]|&", element.text)
    element.attrib = {k: v for k, v in element.attrib.items() if SAFE.fullmatch(f"{k}={v}")}
    return (TAGS.fullmatch(element.tag) and depth < 40 and not odd and not unread
            and all(is_safe(child, depth + 1) for child in element))


@lru_cache(100_000)
def mathml(tex, display):
    """TeX as MathML; "" if it is long or deep, defines commands, is not understood or has other elements."""
    if len(tex) > 1000 or re.search(r"\\(def|new|Declare|sideset)", tex):  # these can double again and again
        return ""
    try:
        tree = convert_to_element(tex.replace("{aligned}", "{align*}"), display=display)
    except Exception:  # noqa: BLE001, for it has a dozen errors of its own; whichever it is, the TeX is shown
        return ""
    return ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False) if is_safe(tree) else ""


def typeset(text, room):
    """Text as HTML, its formulas as MathML while there is room, in characters."""
    def one(found):
        nonlocal room
        tex = html.unescape(found[found.lastindex])
        shown = mathml(tex, "block" if found.lastindex < 3 else "inline") if room > 0 else ""
        room -= len(shown or 16 * tex)  # what is refused takes time as well
        return shown or f"<code>{found[0]}</code>"
    return FORMULA.sub(one, html.escape(visible(text)))


def group_html(source, rows, most, room):
    """A group: the problem once, then its answers: how each was graded, its thought in a box, the rest."""
    name, problem, gold = (visible(rows[0].get(key), most) for key in ("id", "problem", "answer"))
    right = [number(row.get("reward")) > 0 for row in rows]
    head = html.escape(f"{source} · {name[:60]} · {sum(right)} of {len(rows)} right · {problem[:100]}")
    gold = typeset(f"${gold}$" if re.search(r"[\\^_]", gold) else gold, room)
    parts = [f"<summary>{head}</summary><pre>{typeset(problem, room)}</pre><p>Wanted: {gold}</p>"]
    for row, good in zip(rows, right):
        text = str(row.get("response"))
        if len(text) > most:
            text = f"[{len(text) - most:,} characters left out]\n{text[-most:]}"
        thought, close, rest = text.rpartition("</think>")
        facts = ["✓ right" if good else "✗ wrong", f"reward {row.get('reward')}",
                 f"advantage {number(row['advantage']):+.2f}" if row.get("advantage") is not None else "",
                 f"{row.get('response_tokens')} tokens", row.get("verdict") or row.get("reason"),
                 "✂ cut off" if row.get("finish_reason") == "length" else ""]
        facts = html.escape(visible(" · ".join(str(fact) for fact in facts if fact), 300))
        parts.append(f'<article class="{"right" if good else "wrong"}"><b>{facts}</b><pre class="thought">'
                     f"{typeset(thought + close, room)}</pre><pre>{typeset(rest, room)}</pre></article>")
    return f"<details>{''.join(parts)}</details>"


def transcripts(run, most=2000):
    """Write RUN/transcripts.html, at most about `most` samples in whole groups -> its path."""
    folders, groups = {}, []  # a stage's rollouts, or the evaluations: each has an equal share of the page
    for path in sorted(glob.glob(os.path.join(glob.escape(run), "**", "*.jsonl.gz"), recursive=True)):
        folders.setdefault(os.path.dirname(path), []).append(path)
    for files in folders.values():
        share = most / len(folders)
        files = files[::math.ceil(16 * len(files) / share)]
        for path in files:
            rows = [row for row in objects(path) if "response" in row]  # not those of a data set
            rows = itertools.groupby(rows, key=lambda row: (row.get("benchmark"), row.get("id")))
            found = [(visible(os.path.relpath(path, run)[:-9]), list(group)) for _, group in rows]
            groups += found[::math.ceil(sum(len(group) for _, group in found) * len(files) / share) or 1]
    if not groups:
        raise ValueError(f"{run} holds no samples: neither rollouts of grpo.py nor responses of evaluate.py")
    samples, path = sum(len(rows) for _, rows in groups), os.path.join(run, "transcripts.html")
    pages = [group_html(*group, PAGE_CHARS // samples, MATH_CHARS // samples) for group in groups]
    write_atomic(path, PAGE.format(run=html.escape(visible(os.path.basename(os.path.abspath(run)))),
                                   samples=samples, count=len(groups), groups="\n".join(pages)))
    return path


def main(argv=None):
    p = Parser(description="The pictures of a run, and a page of its transcripts.")
    p.add_argument("run", help="folder of schedule.py or grpo.py, or of results of evaluate.py")
    p.add_argument("run_b", nargs="?", help="a second run, drawn into the same pictures")
    p.add_argument("--window", type=int, default=100, help="steps of the moving average")
    p.add_argument("--transcripts", action="store_true", help="also write the page of transcripts of RUN")
    args = p.parse(argv)
    try:
        written, missing = draw(args.run, args.run_b, window=args.window)
        written += [transcripts(args.run)] if args.transcripts else []
    except (ValueError, OSError) as e:
        sys.exit(f"figures.py: {e}")
    undrawn = [f"not drawn: {name}: {why}" for name, why in missing.items()]
    print(*(f"wrote {path}" for path in written), *undrawn, sep="\n")


if __name__ == "__main__":
    main()
