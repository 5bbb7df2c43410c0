"""Pictures of made-up and real runs: what is drawn equals what was logged, no text lies on another or outside, damaged
files are named. The page of transcripts is read with a parser: hostile text stays text, formulas are MathML alone."""
import ast
import gzip
import html.parser
import json
import math
import re
import struct
import sys
import time
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from conftest import ROOT, command, metrics, run
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import figures

NAMES = [make.__name__ for make in figures.FIGURES]


def write_gz(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def sample(step, i, response="\\boxed{1}", reward=0.0, tokens=5, finish="stop", **more):
    return dict(step=step, id=f"p{i // 4}", sample=i % 4, problem="1+1?", answer="2", response=response, reward=reward,
                prompt_tokens=3, response_tokens=tokens, finish_reason=finish) | more


def made_up(folder, steps=40, limit=64, eval_data="toy.jsonl", rollouts=2, **changes):
    """A folder as grpo.py leaves it, with numbers that can be recognised."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"max_len": limit, "eval_data": eval_data, "model": "start"}
    (folder / "config.json").write_text(json.dumps({"options": options}))
    rows = []
    for t in range(steps + 1):
        row = {"step": t}
        if t:
            row |= dict(reward=0.3 + 0.01 * (t % 9), length_mean=limit / 2 + t % 5, truncated=0.02 * (t % 3),
                        seconds=10.0 + t % 4, seconds_generate=6.0, seconds_reward=0.5, seconds_logprobs=0.5,
                        seconds_update=2.0, seconds_sync=0.25, seconds_idle=0.25)
        if t % 10 == 0:
            row |= dict(eval_reward=0.2 + t / 400, eval_se=0.03, eval_truncated=0.1)
        rows.append(row | changes)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for t in range(1, min(steps, rollouts) + 1):
        write_gz(folder / f"rollouts/{t:06d}.jsonl.gz", [sample(t, i, reward=float(i % 3 == 0)) for i in range(20)])
    return folder


def result(path, name, model="elsewhere", parameters=None, **scores):
    path.parent.mkdir(parents=True, exist_ok=True)
    bench = {b: {"problems": 30, "n": 16, "pass@1": v, "se": 0.02, "per_problem": {}} for b, v in scores.items()}
    average = {"pass@1": sum(scores.values()) / len(scores), "se": 0.01}
    path.write_text(json.dumps({"name": name, "model": model, "parameters": parameters, "benchmarks": bench,
                                "average": average}))


def schedule(folder, bench="aime24", steps=(40, 26, 12), picked=(30, 20, None)):
    """Three stages; two ran on past the step that was picked, the first of them turned, the last is running."""
    stages = []
    for i, (ran, pick, limit) in enumerate(zip(steps, picked, (8192, 16384, 24576)), 1):
        made_up(folder / f"stage{i}", ran, limit, f"assets/benchmarks/{bench}.jsonl")
        turn = {"turn": 30, "before": [10, 19], "after": [20, 29], "length": [3, 2, 3]}
        stages.append({"folder": f"stage{i}", "max_len": limit, "steps": ran, "group": 8, "picked": pick,
                       "evidence": turn if i == 1 else None})
    (folder / "plan.json").write_text(json.dumps({"model": "start", "stages": stages}))
    for k, name in enumerate(["base", "stage1", "stage2"]):
        scores = {bench: 0.288 + 0.05 * k, "math500": 0.82 + 0.01 * k}
        result(folder / f"eval/{name}.json", name, f"x/{name}/hf", 1_777_088_000, **scores)
    return folder


def make(name, *folders, window=100, sizes=()):
    runs = [figures.read_run(str(folder)) for folder in folders]
    for each in runs:
        each.window = window
    with matplotlib.rc_context(figures.STYLE):
        figure = getattr(figures, name)(runs, list(sizes))
        if not isinstance(figure, str):
            FigureCanvasAgg(figure)
            figure.draw_without_rendering()
    return figure


def texts(figure):
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]


def said(figure):
    return " | ".join(t.get_text() for t in texts(figure))


# --- Pictures ----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_pictures_and_page_of_a_real_run(tiny, problems, tmp_path):
    out = tmp_path / "run"
    run(command(tiny, problems, out, "--steps", 8, "--eval_data", problems, "--eval_every", 4, "--eval_n", 2))
    done = run([sys.executable, str(ROOT / "figures.py"), str(out), "--transcripts"])
    assert re.findall(r"not drawn: (\w+)", done.stdout) == ["turning_over", "accuracy_vs_size"]
    for name in set(NAMES) - {"turning_over", "accuracy_vs_size"}:
        head = (out / f"figures/{name}.png").read_bytes()[:24]
        width, height = struct.unpack(">II", head[16:24])
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and width == 1600 and 600 <= height <= 1600
        tags = [e.tag.rpartition("}")[2] for e in ET.parse(out / f"figures/{name}.svg").iter()]
        assert tags.count("path") + tags.count("use") > 20 and "image" not in tags
    before = {p.name: p.read_bytes() for p in (out / "figures").iterdir()}
    figures.draw(str(out))
    assert {p.name: p.read_bytes() for p in (out / "figures").iterdir()} == before
    rewards = [m["reward"] for m in metrics(out) if m["step"]]
    assert np.allclose(make("length_and_reward", out).axes[1].lines[0].get_ydata(), rewards)
    assert "192 samples in 48 groups" in (out / "transcripts.html").read_text()


def test_numbers_drawn_are_the_ones_logged(tmp_path):
    folder = made_up(tmp_path / "run", steps=8)
    rows = metrics(folder, timing=True)
    raw, mean = make("length_and_reward", folder, window=3).axes[1].lines[:2]
    reward = [r["reward"] for r in rows[1:]]
    assert list(raw.get_xdata()) == list(range(1, 9)) and np.allclose(raw.get_ydata(), reward)
    assert np.allclose(mean.get_ydata(), [reward[0], *np.convolve(reward, np.ones(3) / 3, "valid"), reward[-1]])
    cut = make("truncation", folder).axes[0].lines[0].get_ydata()
    assert np.allclose(cut, [100 * r["truncated"] for r in rows[1:]])
    during = make("pass_at_1", made_up(tmp_path / "two", steps=20)).axes[0].lines[0]
    assert [tuple(p) for p in np.round(during.get_xydata(), 6)] == [(0, 20), (10, 22.5), (20, 25)]
    figure = make("time_per_step", folder)
    tops = np.max([patch.get_data().values for patch in figure.axes[0].patches], axis=0)
    assert np.allclose(tops, [r["seconds"] for r in rows[1:]])  # the phases and the rest are the whole step
    share = 600 * 8 / sum(r["seconds"] for r in rows[1:])
    assert f"generate {share:.0f} %" in said(figure) and "faded" not in said(figure)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.integers(1, 50))
def test_moving_average(values, window):
    values = np.array(values)
    mean = figures.moving_average(values, window)
    for i, x in enumerate(mean):
        half = min(window // 2, i, len(values) - 1 - i)
        assert x == pytest.approx(values[i - half:i + half + 1].mean(), abs=1e-6)
    line = figures.moving_average(np.arange(float(len(values))), window)
    assert np.allclose(line, np.arange(len(values)))  # a steady rise is drawn where it is, at both ends too


def test_window_is_at_most_a_quarter_of_the_longest_stage(tmp_path):
    runs = []
    keep = {make: needs for make, needs in figures.FIGURES.items()}
    try:
        figures.FIGURES.clear()
        figures.FIGURES[lambda found, _: runs.extend(found) or "not today"] = None
        for steps, window in ((40, 100), (40, 7), (1, 100), (700, 100)):
            figures.draw(str(made_up(tmp_path / "run", steps, rollouts=0)), window=window)
    finally:
        figures.FIGURES.clear()
        figures.FIGURES.update(keep)
    assert [r.window for r in runs] == [10, 7, 1, 100]


KINDS = {
    "schedule": lambda d: [schedule(d)],
    "short stages": lambda d: [schedule(d, "toy", (300, 2, 1), (300, 2, 1))],
    "stages just begun": lambda d: [schedule(d, steps=(300, 3, 3), picked=(300, 3, None))],
    "one run": lambda d: [made_up(d)],
    "one step": lambda d: [made_up(d, steps=1)],
    "long": lambda d: [made_up(d, steps=700, limit=24576)],
    "nothing earned, nothing cut": lambda d: [made_up(d, reward=0.0, truncated=0.0, eval_reward=0.0)],
    "two schedules": lambda d: [schedule(d / "a"), schedule(d / "b", steps=(60, 50, 8), picked=(50, 44, None))],
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_outside_the_picture_or_on_another(kind, tmp_path):
    folders = KINDS[kind](tmp_path / "run")
    sizes = [figures.SimpleNamespace(name=f"model {i}", size=s, scores={"": (40.0 + i, 0.0)})
             for i, s in enumerate((1.5e9, 1.6e9, 7e9, math.nan))]
    for name in NAMES:
        figure = make(name, *folders, sizes=sizes)
        if isinstance(figure, str):
            assert name == "turning_over" and "schedule" not in kind and "stages" not in kind
            continue
        renderer = figure.canvas.get_renderer()
        ticks = [(tick, one.get_view_interval()) for a in figure.axes for one in (a.xaxis, a.yaxis)
                 for tick in one.get_major_ticks()]
        hidden = {id(tick.label1) for tick, (low, high) in ticks if not low <= tick.get_loc() <= high}
        shown = [(t.get_text(), t.get_window_extent(renderer)) for t in texts(figure) if id(t) not in hidden]
        for text, b in shown:
            inside = b.x0 >= -1 and b.y0 >= -1 and b.x1 <= figure.bbox.width + 1 and b.y1 <= figure.bbox.height + 1
            assert inside, (name, text)
        for i, (one, a) in enumerate(shown):
            for two, b in shown[i + 1:]:
                apart = a.x1 <= b.x0 + 2 or b.x1 <= a.x0 + 2 or a.y1 <= b.y0 + 2 or b.y1 <= a.y0 + 2
                assert apart, (name, one, two)
        if "stages" in kind and name != "accuracy_vs_size" and name != "turning_over":
            assert all(f"stage{i}, " in said(figure) for i in (1, 2, 3))  # a stage too short for its name has one


def test_stages_end_to_end_and_faded_past_the_checkpoint(tmp_path):
    folder = schedule(tmp_path / "run")
    assert [s.start for s in figures.read_run(str(folder)).stages] == [0, 30, 50]
    figure = make("length_and_reward", folder, window=5)
    lines = figure.axes[1].lines
    strong = [(min(n.get_xdata()), max(n.get_xdata())) for n in lines if n.get_lw() == 2.2 and n.get_alpha() == 1]
    faded = [(min(n.get_xdata()), max(n.get_xdata())) for n in lines if n.get_lw() == 2.2 and n.get_alpha() < 0.5]
    assert strong == [(1, 30), (31, 50), (51, 62)] and faded == [(30, 40), (50, 56)] and "faded" in said(figure)
    assert [n.get_xdata()[0] for n in lines if n.get_ls() == "--"] == [0, 30, 50]
    assert "stage2, 16,384" in said(figure)
    points = {name: step for step, name in [(s, r.name) for s, r in figures.read_run(str(folder)).results]}
    assert points == {"base": 0, "stage1": 30, "stage2": 50}
    assert "faded" not in said(make("length_and_reward", made_up(tmp_path / "one")))


def test_evaluations_of_checkpoints_and_lines_of_other_models(tmp_path):
    folder = made_up(tmp_path / "run")
    result(folder / "eval/late.json", "late", f"{folder}/checkpoints/000030/hf", toy=0.5)
    result(folder / "eval/base.json", "base", "start", toy=0.1)
    result(folder / "eval/rival.json", "rival", "/models/rival", toy=0.44)
    figure = make("pass_at_1", folder)
    final = next(c for c in figure.axes[0].containers if c.get_label() == "toy")
    assert [tuple(p) for p in np.round(final.lines[0].get_xydata(), 6)] == [(0, 10), (30, 50)] and final.has_yerr
    assert "rival 44" in said(figure)
    aime, toy = said(make("pass_at_1", schedule(tmp_path / "a"))), said(make("pass_at_1", schedule(tmp_path / "b", "toy")))
    for line in ("o1-preview 40", "DeepScaleR-1.5B 43.1", "R1-Distill-Qwen-1.5B 28.8"):
        assert line in aime and line not in toy  # published scores are of AIME 2024
    assert not figures.is_aime24("data/toy_aime24.jsonl") and figures.is_aime24("assets/aime24.jsonl")


def test_a_turn_is_drawn_where_there_was_one(tmp_path):
    figure = make("turning_over", schedule(tmp_path / "run"))
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == ["stage1"]
    spans = [(p.get_x(), p.get_x() + p.get_width()) for p in figure.axes[0].patches]
    assert spans == [(9.5, 19.5), (19.5, 29.5)]
    written, missing = figures.draw(str(made_up(tmp_path / "fixed")))
    assert "no stage turned" in missing["turning_over"] and not any("turning_over" in path for path in written)
    both = make("turning_over", schedule(tmp_path / "x"), schedule(tmp_path / "y"))
    assert [axis.get_title() for axis in both.axes if axis.get_title()] == ["x, stage1", "y, stage1"]


def test_two_runs_in_one_picture(tmp_path):
    a, b = schedule(tmp_path / "a"), made_up(tmp_path / "b", steps=100)
    written, missing = figures.draw(str(a), str(b))
    assert {p.rpartition("/")[0] for p in written} == {str(a / "figures-b")} and list(missing) == ["accuracy_vs_size"]
    figure = make("length_and_reward", a, b)
    lines = [n for n in figure.axes[0].lines if n.get_lw() == 2.2]
    assert max(n.get_xdata()[-1] for n in lines) == 100 and len({n.get_color() for n in lines}) == 2
    assert {"mean of 100 steps, a", "mean of 100 steps, b"} <= set(said(figure).split(" | "))
    assert "in training, b" in said(make("pass_at_1", a, b))
    figures.draw(str(a), str(a))  # a run beside itself


def test_accuracy_against_size_needs_two_sizes(tmp_path):
    folder = schedule(tmp_path / "run")
    assert "fewer than two sizes" in make("accuracy_vs_size", folder)
    result(folder / "eval/rival.json", "rival", parameters=7e9, aime24=0.5)
    result(folder / "eval/other.json", "other", parameters=9e9, amc23=0.5)
    assert "fewer than two sizes" in make("accuracy_vs_size", folder)  # without a benchmark that all have
    (folder / "eval/other.json").unlink()
    figure = make("accuracy_vs_size", folder)
    points = {c.get_label(): tuple(np.round(c.lines[0].get_xydata()[0], 3)) for c in figure.axes[0].containers}
    assert points["rival"] == (7e9, 50) and points["stage2"] == (1777088000, 38.8) and len(points) == 4
    table = tmp_path / "sizes.csv"
    table.write_text("name,parameters,accuracy\nsmall $x$,500M,28.8\nbig,7B,55.5\nclosed,,40.0\n")
    figure = make("accuracy_vs_size", made_up(tmp_path / "one"), sizes=figures.read_sizes(table))
    assert "small $x$" in said(figure) and [c.lines[0].get_xdata()[0] for c in figure.axes[0].containers] == [5e8, 7e9]
    assert "closed 40" in said(make("pass_at_1", folder, sizes=figures.read_sizes(table)))
    for text in ("name,parameters,accuracy\na,1B,lots\n", "name,size\na,1\n", "name,parameters,accuracy\na\n"):
        table.write_text(text)
        with pytest.raises(SystemExit, match=r"sizes\.csv: every row needs"):
            figures.main([str(folder), "--sizes", str(table)])


# --- Damaged and missing input -----------------------------------------------------------------------------

@pytest.mark.parametrize("line", ['{"step": 3, "rew', "[1, 2]", "[" * 100_000, "nonsense", "9" * 5000])
def test_a_bad_line_is_named_and_the_rest_drawn(line, tmp_path, capsys):
    folder = made_up(tmp_path / "run", steps=5)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[3] = line
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    figures.main([str(folder)])
    said = capsys.readouterr()
    assert "metrics.jsonl" in said.err and "length_and_reward.png" in said.out


def test_rows_without_a_step_and_values_that_are_no_numbers_are_left_out(tmp_path):
    folder = made_up(tmp_path / "run", steps=7)
    rows = metrics(folder, timing=True)
    for step, value in ((2, None), (3, math.nan), (4, math.inf), (5, "much"), (6, 10 ** 400)):
        rows[step]["reward"] = value
    rows += [{"reward": 1}, {"step": "3"}, {"step": -1}, {"step": 10 ** 400}, {"step": True}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 8, "rewa')
    raw = make("length_and_reward", folder).axes[1].lines[0]
    assert raw.get_xdata().tolist() == [1, 7] and np.isfinite(raw.get_ydata()).all()
    assert not figures.draw(str(folder))[1].keys() - {"turning_over", "accuracy_vs_size"}


@pytest.mark.parametrize("name, text", [
    ("plan.json", "{"), ("plan.json", "[]"), ("plan.json", '{"stages": 3}'), ("config.json", "{"), ("eval/x.json", '{"bench'),
    ("plan.json", "\0\xff"), ("eval/x.json", "[" * 100_000)])
def test_a_broken_json_file_is_named(name, text, tmp_path, capsys, monkeypatch):
    folder = made_up(tmp_path / "run")
    (folder / "eval").mkdir()
    (folder / name).write_text(text)
    monkeypatch.setattr(figures, "FIGURES", {figures.truncation: ("truncated",)})
    try:
        figures.main([str(folder)])
        told = capsys.readouterr().err
    except SystemExit as e:
        told = capsys.readouterr().err + str(e)
    assert name in told and ("plan" in name or (folder / "figures/truncation.png").exists())


def test_odd_plans_configurations_and_results(tmp_path):
    folder = made_up(tmp_path / "run/stage1")
    odd = [None, 3, "x", [], {}, [1], {"x": []}]
    for value in odd:
        (folder / "config.json").write_text(json.dumps({"options": value}))
        stages = [{"folder": "stage1", "max_len": value, "picked": value, "evidence": value}, value,
                  {"folder": "gone", "evidence": {"before": value, "after": [1, "x"]}}]
        (tmp_path / "run/plan.json").write_text(json.dumps({"stages": stages}))
        result = {"name": value, "model": value, "parameters": value, "average": value,
                  "benchmarks": {"a": value, "b": {"pass@1": value}, "c": {"pass@1": 0.5, "se": value}}}
        (tmp_path / "run/odd.json").write_text(json.dumps(result))
        written, _ = figures.draw(str(tmp_path / "run"))
        assert len(written) == 8


def test_what_is_missing_is_said(tmp_path, capsys):
    folder = made_up(tmp_path / "run", rollouts=0, eval_reward=None, truncated=None, seconds=None)
    written, missing = figures.draw(str(folder))
    assert {p.rpartition("/")[2] for p in written} == {"length_and_reward.png", "length_and_reward.svg"}
    assert "no evaluation" in missing["pass_at_1"] and "truncated" in missing["truncation"]
    assert "seconds" in missing["time_per_step"]
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval_reward": 0.1, "eval_se": null}\n')
    written, missing = figures.draw(str(folder))
    assert len(written) == 2 and set(missing) == set(NAMES) - {"pass_at_1"}  # evaluated, not yet trained
    (folder / "metrics.jsonl").write_text("")
    written, missing = figures.draw(str(folder))
    assert written == [] and "none of its steps is done" in missing["length_and_reward"]
    for arguments in ([str(tmp_path / "nowhere")], [str(folder), "--transcripts"], [str(folder), "--window", "0"]):
        with pytest.raises(SystemExit, match=r"^figures.py: "):
            figures.main(arguments)
    made_up(tmp_path / "plan/stage1")
    (tmp_path / "plan/plan.json").write_text(json.dumps({"stages": [{"folder": "stage1", "picked": 30}, {"folder": "gone", "picked": 5}]}))
    assert len(figures.draw(str(tmp_path / "plan"))[0]) == 8 and "gone/metrics.jsonl" in capsys.readouterr().err


def test_names_out_of_files_are_text(tmp_path):
    folder = made_up(tmp_path / "run", eval_data="$\\frac$.jsonl")
    for k in (1, 2):
        result(folder / f"eval/{k}.json", f"{k}$\\badtex{{$\n\ud800" + "x" * 300, "m", k * 1e9, **{"$b$\ud800": 0.4})
    written, missing = figures.draw(str(folder))
    assert list(missing) == ["turning_over"] and len(written) == 10


def test_imports_little():
    tree = ast.parse((ROOT / "figures.py").read_text())
    names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    theirs = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
    assert theirs == {"matplotlib", "numpy", "latex2mathml", "common"}


# --- Transcripts -------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>document.title='OWNED'</script>", "</script><img src=x onerror=alert(1)>", "<!--<script>", "--> ]]> </title></style>",
    "<svg onload=alert(1)>", "$<img src=x onerror=alert(1)>$", "\\(\\href{javascript:alert(1)}{click}\\)",
    "$\\text{&lt;script&gt;&#x202e;}$ $\\style{color:red}{x}$ $\\class{a}{b}$", "${1} {run} {css} %s", "a" * 300_000,
    "\ud800 lone \udfff \x00 nul \x1b[31m \r", "\u2028\u2029 \u202e reversed \u2066", "{" * 9000, "$" + "{" * 900 + "$", "$" * 20_000,
    "\\[" * 20_000, "\\boxed{" * 5000, "\\begin{array}" * 3000, "&lt;b&gt; &amp; &#x3c;", "$f" + "'" * 800 + "$", "$" + "\\frac" * 160 + "$",
    "$$" + "\\frac{1}{" * 300 + "x" + "}" * 300 + "$$", "$\\def\\a{xx}\\def\\b{\\a\\a\\a}\\b$", "\u0335" * 3000, "</details></article>", "\\(" * 20_000,
    "$\\phantom{hidden}\\hspace{-99em}\\rlap{x}\\raise{9em}{x}$", None, ["a"], {"b": 1},
]


class Page(html.parser.HTMLParser):
    """Tags with attributes, and the text of every group's answers, as a browser would see them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.math, self.open = [], "", [], []
        self.source = open(path, encoding="utf-8").read()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def page(folder, **kw):
    return Page(figures.transcripts(str(folder), **kw))


MATHML = set("math mrow mi mn mo mtext mspace msup msub msubsup mfrac msqrt mroot munder mover munderover mtable mtr mtd mstyle "
             "menclose".split())
PLAIN = set("html meta title style h1 p br input label details summary span article pre b code".split())


def test_hostile_text_stays_text(tmp_path):
    for i, text in enumerate(HOSTILE):
        write_gz(tmp_path / f"run/rollouts/{i:06d}.jsonl.gz", [
            sample(i, 0, text, id=text, problem=text, answer=text, finish=text, verdict=text, reward=text, tokens=text)])
    start = time.time()
    found = page(tmp_path / "run")
    assert time.time() - start < 20  # 0.3 s on an idle core
    assert {tag for tag, _ in found.tags} <= MATHML | PLAIN
    names = {name for _, attributes in found.tags for name in attributes}
    allowed = "class name content charset type id for checked http-equiv lang display displaystyle stretchy columnalign width"
    assert names <= set(allowed.split()) | {"form", "fence", "linethickness", "scriptlevel"}, names
    assert [value for tag, value in found.tags if tag == "meta"][1] == {
        "http-equiv": "Content-Security-Policy", "content": re.search(r"default-src 'none'; style-src 'sha256-[^']+'", found.source)[0]}
    for text in ("<script>document.title='OWNED'</script>", "[U+D800] lone [U+DFFF] [U+0000] nul [U+001B][31m [U+000D]",
                 "[U+202E] reversed [U+2066]", "&lt;b&gt; &amp; &#x3c;", "${1} {run} {css} %s", "</details></article>"):
        assert text in found.text
    assert sum(tag == "details" for tag, _ in found.tags) == len(HOSTILE) and "characters left out" not in found.text
    assert not re.search(r"[\0-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", found.source)


def test_groups_are_whole_with_advantages_and_words(tmp_path):
    rows = [sample(7, i, "<think>\nlong way</think>so \\boxed{2}", float(i in (0, 1, 4, 5, 6, 7)), verdict="equal") for i in range(12)]
    rows[3] |= dict(finish_reason="length", response="<think>\nnever done")
    rows[11]["advantage"] = -7.25
    write_gz(tmp_path / "run/stage2/rollouts/000007.jsonl.gz", rows)
    evaluation = [sample(0, i, benchmark="toy", reason="wrong") for i in range(4)]
    for row in evaluation:
        del row["step"]
    write_gz(tmp_path / "run/eval/base.responses.jsonl.gz", evaluation)
    found = page(tmp_path / "run")
    assert [a["class"] for tag, a in found.tags if tag == "details"] == ["none", "mixed", "all", "none"]
    assert [a["class"] for tag, a in found.tags if tag == "article"][4:8] == ["right", "right", "wrong", "wrong cut"]
    assert found.text.count("1+1?") == 2 * 4  # each problem in its head and, whole, above its answers
    spread = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert f"✓ right · reward 1.0 · advantage {spread:+.2f} · 5 tokens · equal" in found.text
    assert f"✗ wrong, ✂ cut off · reward 0.0 · advantage {-spread:+.2f}" in found.text
    assert "advantage +0.00" in found.text and "advantage -7.25" in found.text
    assert "evaluation base · p0 · 0 of 4 right" in found.text and "✗ wrong · reward 0.0 · 5 tokens · wrong" in found.text
    boxes = re.findall(r'<pre class="thought">(.*?)</pre><pre>(.*?)</pre>', found.source, re.DOTALL)
    assert len(boxes) == 12 and ("&lt;think&gt;\nnever done", "") in boxes
    for rule in ("#g2:checked ~ details:not(.mixed)", "#a2:checked ~ details .wrong", "prefers-color-scheme: dark"):
        assert rule in found.source
    assert {a["id"] for tag, a in found.tags if tag == "input"} == {f"{k}{i}" for k in "ga" for i in (1, 2, 3, 4)}


def test_samples_are_taken_evenly_and_as_whole_groups(tmp_path):
    folder = made_up(tmp_path / "run", steps=100, rollouts=100)  # 2,000 samples in groups of 4
    write_gz(folder / "eval/base.responses.jsonl.gz", [sample(None, i) for i in range(200)])
    found = page(folder, most=400)
    assert "392 samples in 98 groups" in found.text  # as near to 400 as even shares come
    steps = [int(s) for s in re.findall(r"training, step (\d+)", found.source)]
    assert {1, 100} <= set(steps) and len(set(steps)) == 12 and steps == sorted(steps)
    assert sum(tag == "article" for tag, _ in found.tags) == 392
    assert "2,200 samples in 550 groups" in page(folder, most=10_000).text


def test_damaged_files_cost_only_themselves(tmp_path, capsys):
    folder = made_up(tmp_path / "run")
    path = folder / "rollouts/000002.jsonl.gz"
    whole = path.read_bytes()
    for broken in (whole[:-20], b"no gzip", whole[:30] + b"x" * 40, gzip.compress(b'{"step": 2}\n{"ste\n{"step": 2}\n')):
        path.write_bytes(broken)
        assert "training, step 1" in page(folder).text
        assert "000002.jsonl.gz" in capsys.readouterr().err


MATH = (r"<think>Let $x=\frac12$, $$\sum_{k=1}^{n}k^2$$ \[\begin{pmatrix}1&2\\3&4\end{pmatrix}\]</think>It costs $5 and $6, "
        r"or $5 and 6$, \$7 or US$5-$10. Thus $a_1^2\le\sqrt[3]{2}\cdot\alpha$ and $\nosuch{x}$ is \(\boxed{\frac{3}{4}}\).")


def test_formulas_become_mathml_and_money_does_not(tmp_path):
    write_gz(tmp_path / "run/rollouts/000001.jsonl.gz", [sample(1, 0, MATH, answer=r"\frac{1}{3}")])
    source = page(tmp_path / "run").source
    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in source and '<math display="block">' in source
    assert "<munderover><mo>\u2211</mo>" in source and "<mtable>" in source and "<menclose>" in source
    assert "<msubsup><mi>a</mi><mn>1</mn><mn>2</mn></msubsup>" in source and "<mroot>" in source and "<mi>α</mi>" in source
    assert r"It costs $5 and $6, or $5 and 6$, \$7 or US$5-$10. Thus <math" in source
    assert r"<code>$\nosuch{x}$</code>" in source and "Wanted: <math" in source


@pytest.mark.parametrize("tree", [
    "<math><script>x</script></math>", "<math><mi href='javascript:x'>x</mi><maction>x</maction></math>", "<svg/>",
    "<math><semantics><annotation-xml encoding='text/html'><b>x</b></annotation-xml></semantics></math>",
    "<math><mtext><img/></mtext></math>", "<math><mglyph/></math>", "<math><mphantom><mi>x</mi></mphantom></math>"])
def test_what_the_converter_returns_is_checked(tree, monkeypatch):
    monkeypatch.setattr(figures, "convert_to_element", lambda tex, display: ET.fromstring(tree))
    assert figures.mathml.__wrapped__("x", "inline") == ""
    attributes = 'onclick="x" style="x" href="x" class="x" width="-99em" height="9em" mathcolor="red" stretchy="false"'
    safe = f"<math {attributes}><mi>&lt;b&gt;</mi></math>"
    monkeypatch.setattr(figures, "convert_to_element", lambda tex, display: ET.fromstring(safe))
    assert figures.mathml.__wrapped__("x", "inline") == '<math stretchy="false"><mi>&lt;b&gt;</mi></math>'


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*"{}{}[]()^_'&$#%~ 12abx+-=<>", r"\frac", r"\sqrt", r"\left(", r"\right)", r"\begin{array}{c}",
                                 r"\end{array}", r"\text{a}", r"\not", r"\displaystyle", r"\limits", r"\def\a", r"\href{x}{y}",
                                 r"\color{red}", r"\operatorname{f}", r"\\", r"\overset", r"\verb|<|"]), max_size=30), st.integers(1, 40))
def test_any_formula_takes_little_time_and_gives_mathml(tokens, times):
    tex = ("".join(tokens) * times)[:1000]
    start = time.process_time()
    found = figures.mathml.__wrapped__(tex, "inline")
    assert time.process_time() - start < 2 and len(found) < 60_000  # 0.1 s is the longest that was seen
    if found:
        assert {e.tag for e in ET.fromstring(found).iter()} <= MATHML


def test_a_page_has_room_for_so_much_mathml(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MATH_CHARS", 20_000)
    monkeypatch.setattr(figures, "PAGE_CHARS", 100_000)
    rows = [sample(1, i, "<think>" + " ".join(f"$x_{{{i}{k}}}$" for k in range(500)) + r"</think> $\frac{1}{2}$") for i in range(40)]
    write_gz(tmp_path / "run/rollouts/000001.jsonl.gz", rows)
    source = page(tmp_path / "run").source
    assert sum(map(len, re.findall("<math.*?</math>", source))) < 30_000
    assert len(re.findall(r"</pre><pre>\s*<math.*?mfrac", source)) == 40  # the answers come before the thoughts
    assert source.count("characters left out") == 40 and len(source) < 250_000
