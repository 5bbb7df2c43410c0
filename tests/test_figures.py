"""Pictures: what is drawn equals what was logged, no text lies outside or on another, damage is named.
The page of transcripts, read with a parser: hostile text stays text, formulas are MathML and nothing else."""
import gzip
import html.parser
import json
import math
import re
import struct
import time
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from conftest import command, metrics, run
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import figures

NAMES = set(figures.FIGURES)


def write_gz(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def sample(step, i, response="\\boxed{1}", reward=0.0, **more):
    return {"step": step, "id": f"p{i // 4}", "sample": i % 4, "problem": "1+1?", "answer": "2",
            "response": response, "reward": reward, "response_tokens": 5, "finish_reason": "stop"} | more


def made_up(folder, steps=40, limit=64, eval_data="toy.jsonl", rollouts=2, **changes):
    """A folder as grpo.py leaves it, with numbers that can be recognised."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"max_len": limit, "eval_data": eval_data, "model": "start"}
    (folder / "config.json").write_text(json.dumps({"options": options}))
    rows = []
    for t in range(steps + 1):
        trained = {"reward": 0.3 + 0.01 * (t % 9), "length_mean": limit / 2 + t % 5, "truncated": t % 3 / 50,
                   "seconds": 10.0 + t % 4, "seconds_generate": 6.0, "seconds_update": 2.0}
        validated = {"eval_reward": 0.2 + t / 400, "eval_se": 0.03, "eval_truncated": 0.1}
        rows.append({"step": t} | (trained if t else {}) | ({} if t % 10 else validated) | changes)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for t in range(1, min(steps, rollouts) + 1):
        group = [sample(t, i, reward=float(i % 3 == 0)) for i in range(20)]
        write_gz(folder / f"rollouts/{t:06d}.jsonl.gz", group)
    return folder


def result(path, name, model="elsewhere", parameters=None, **scores):
    path.parent.mkdir(parents=True, exist_ok=True)
    bench = {b: {"pass@1": value, "se": 0.02} for b, value in scores.items()}
    path.write_text(json.dumps({"name": name, "model": model, "parameters": parameters, "benchmarks": bench}))


def schedule(folder, bench="aime24", steps=(40, 26, 12), picked=(30, 20, None)):
    """Three stages; two ran on past the picked step, the first of them turned, the last is running."""
    stages = []
    for i, (ran, pick, limit) in enumerate(zip(steps, picked, (8192, 16384, 24576)), 1):
        made_up(folder / f"stage{i}", ran, limit, f"assets/benchmarks/{bench}.jsonl")
        turn = {"turn": 30, "before": [10, 19], "after": [20, 29]} if i == 1 else None
        stages.append({"folder": f"stage{i}", "max_len": limit, "picked": pick, "evidence": turn})
    (folder / "plan.json").write_text(json.dumps({"model": "start", "stages": stages}))
    for k, name in enumerate(["base", "stage1", "stage2"]):
        scores = {bench: 0.288 + 0.05 * k, "math500": 0.82 + 0.01 * k}
        result(folder / f"eval/{name}.json", name, f"x/{name}/hf", 1_777_088_000, **scores)
    return folder


def make(name, *folders, window=100):
    prefixes = [f"{folder.name}, " if len(folders) > 1 else "" for folder in folders]
    runs = [figures.read_run(str(folder), window, prefix) for folder, prefix in zip(folders, prefixes)]
    with matplotlib.rc_context(figures.STYLE):
        figure = figures.FIGURES[name][0](runs)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    return figure


def labelled(axis):
    """{name in the legend: [points of each line of that name]}"""
    found = {}
    for line in axis.lines:
        found.setdefault(line.get_label(), []).append(np.asarray(line.get_xydata(), float))
    for bars in axis.containers:
        found.setdefault(bars.get_label(), []).append(bars.lines[0].get_xydata())
    return found


# --- Pictures ----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_pictures_and_page_of_a_real_run(tiny, problems, tmp_path, capsys):
    out = tmp_path / "run"
    run(command(tiny, problems, out, "--steps", 8, "--eval_data", problems, "--eval_every", 4, "--eval_n", 2))
    figures.main([str(out), "--transcripts"])
    undrawn = ["turning_over", "accuracy_vs_size"]
    assert re.findall(r"not drawn: (\w+)", capsys.readouterr().out) == undrawn
    for name in NAMES - set(undrawn):
        head = (out / f"figures/{name}.png").read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", head[16:20]) == (1600,)
        tags = [e.tag.rpartition("}")[2] for e in ET.parse(out / f"figures/{name}.svg").iter()]
        assert tags.count("path") + tags.count("use") > 20 and "image" not in tags
    before = {p.name: p.read_bytes() for p in (out / "figures").iterdir()}
    figures.draw(str(out))
    assert {p.name: p.read_bytes() for p in (out / "figures").iterdir()} == before  # byte for byte
    assert "192 samples in 48 groups" in (out / "transcripts.html").read_text()


def test_numbers_drawn_are_the_ones_logged(tmp_path):
    folder = made_up(tmp_path / "run", steps=20)
    rows = metrics(folder, timing=True)[1:]
    axis = make("length_and_reward", folder, window=3).axes[1]
    reward = [r["reward"] for r in rows]
    assert np.allclose(axis.lines[0].get_xydata().T, [range(1, 21), reward])
    inner = np.convolve(reward, np.ones(3) / 3, "valid")
    assert np.allclose(labelled(axis)["mean of 3 steps"][0][:, 1], [reward[0], *inner, reward[-1]])
    cut = make("truncation", folder).axes[0].lines[0].get_ydata()
    assert np.allclose(cut, [100 * r["truncated"] for r in rows])
    during = labelled(make("pass_at_1", folder).axes[0])["in training"][0]
    assert np.allclose(during, [(0, 20), (10, 22.5), (20, 25)])
    axis = make("time_per_step", folder).axes[0]
    tops = [area.get_paths()[0].get_extents().y1 for area in axis.collections]
    assert tops[-1] == max(r["seconds"] for r in rows)  # the phases and the rest are the whole step
    share = 600 * 20 / sum(r["seconds"] for r in rows)
    assert f"generate {share:.0f}%" in axis.get_legend_handles_labels()[1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.integers(1, 50))
def test_moving_average(values, window):
    for i, x in enumerate(figures.moving_average(np.array(values), window)):
        half = min(window // 2, i, len(values) - 1 - i)
        assert x == pytest.approx(np.mean(values[i - half:i + half + 1]), abs=1e-6)
    rise = np.arange(float(len(values)))
    assert np.allclose(figures.moving_average(rise, window), rise)  # a steady rise is drawn where it is


KINDS = {
    "schedule": lambda d: [schedule(d)],
    "short stages": lambda d: [schedule(d, "toy", (300, 2, 1), (300, 2, 1))],
    "stages just begun": lambda d: [schedule(d, steps=(300, 3, 3), picked=(300, 3, None))],
    "one step": lambda d: [made_up(d, steps=1)],
    "long": lambda d: [made_up(d, steps=700, limit=24576)],
    "nothing earned, nothing cut": lambda d: [made_up(d, reward=0.0, truncated=0.0, eval_reward=0.0)],
    "two schedules": lambda d: [schedule(d / "a"), schedule(d / "b", "aime24", (60, 50, 8), (50, 44, None))],
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_outside_the_picture_or_on_another(kind, tmp_path, monkeypatch):
    shown = {}

    def savefig(figure, *_, **__):
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        shown[figure.get_suptitle()] = figure

    monkeypatch.setattr(Figure, "savefig", savefig)
    folders = KINDS[kind](tmp_path / "run")
    for i, size in enumerate((1.5e9, 7e9)):
        result(folders[0] / f"m{i}.json", f"model {i}", parameters=size, math500=0.4, aime24=0.5)
    figures.draw(*map(str, folders))
    assert len(shown) == 5 + (folders[0] / "plan.json").exists()
    for title, figure in shown.items():
        ticks = [(tick, one.get_view_interval()) for a in figure.axes for one in (a.xaxis, a.yaxis)
                 for tick in one.get_major_ticks()]
        hidden = {id(tick.label1) for tick, (low, high) in ticks if not low <= tick.get_loc() <= high}
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts if id(t) not in hidden]
        for i, (one, a) in enumerate(boxes):
            assert min(a.x0, a.y0, figure.bbox.x1 - a.x1, figure.bbox.y1 - a.y1) >= -1, (title, one)
            for two, b in boxes[i + 1:]:
                apart = a.x1 <= b.x0 + 2 or b.x1 <= a.x0 + 2 or a.y1 <= b.y0 + 2 or b.y1 <= a.y0 + 2
                assert apart, (title, one, two)
        if "stages" in kind and not re.search("Accuracy|turn", title):
            names = {t for t, _ in boxes if t.startswith("stage")}
            assert names == {"stage1, 8,192", "stage2, 16,384", "stage3, 24,576"}  # however short the stage


def test_a_schedule_is_drawn_end_to_end_with_its_turn(tmp_path):
    folder = schedule(tmp_path / "run")
    axis = make("length_and_reward", folder, window=5).axes[1]
    drawn = [(line[0, 0], line[-1, 0]) for line in labelled(axis)["mean of 5 steps"]]
    assert drawn == [(1, 30), (31, 50), (51, 62)]
    assert [line.get_xdata()[0] for line in axis.lines if line.get_ls() == "--"] == [0, 30, 50]
    points = labelled(make("pass_at_1", folder).axes[0])["aime24"][0]
    assert np.allclose(points, [(0, 28.8), (30, 33.8), (50, 38.8)])
    axes = make("turning_over", folder, schedule(tmp_path / "b")).axes
    lines = labelled(axes[1])
    assert len(axes) == 6 and axes[1].get_title() == "b, stage1"
    assert lines["checkpoint handed on"][0][0, 0] == 30
    assert lines["b, mean of 10 steps"][0][-1, 0] == 40  # and what came after
    result(folder / "other.json", "other $x$", parameters=9e9, amc23=0.5)
    assert not labelled(make("accuracy_vs_size", folder).axes[0])  # the other size has another benchmark
    result(folder / "other.json", "other $x$", parameters=9e9, aime24=0.5)
    points = labelled(make("accuracy_vs_size", folder).axes[0])
    assert np.allclose(points["other $x$"], [(9, 50)]) and np.allclose(points["stage2"], [(1.777088, 38.8)])


def test_lines_of_other_models(tmp_path):
    folder = made_up(tmp_path / "run")
    result(folder / "eval/base.json", "base", "start", toy=0.1)
    result(folder / "rival.json", "rival", "/models/rival", toy=0.44)
    lines = labelled(make("pass_at_1", folder).axes[0])
    assert np.allclose(lines["toy"], [(0, 10)]) and np.allclose(lines["rival 44"][0][:, 1], 44)
    published = {"o1-preview 40", "DeepScaleR-1.5B 43.1", "R1-Distill-Qwen-1.5B 28.8"}  # on AIME 2024 only
    for name in ("aime24", "toy_aime24"):
        one = made_up(tmp_path / name, eval_data=f"x/{name}.jsonl")
        for folder in (one, schedule(tmp_path / f"staged {name}", name)):
            shown = published & set(labelled(make("pass_at_1", folder).axes[0]))
            assert shown == (published if name == "aime24" else set())


def test_two_runs_in_one_picture_and_a_window_that_fits(tmp_path, monkeypatch):
    a, b = schedule(tmp_path / "a"), made_up(tmp_path / "b", steps=100)
    lines = labelled(make("length_and_reward", a, b, window=7).axes[0])
    assert lines["a, mean of 7 steps"][-1][-1, 0] == 62 and lines["b, mean of 7 steps"][-1][-1, 0] == 100
    assert "b, in training" in labelled(make("pass_at_1", a, b).axes[0])
    assert "a, mean of 10 steps" in labelled(make("truncation", a, b).axes[0])  # a quarter of a stage
    monkeypatch.setattr(figures, "FIGURES", {"truncation": figures.FIGURES["truncation"]})
    assert figures.draw(str(a), str(b))[0][0] == str(a / "figures-b/truncation.png")


# --- Damaged and missing input -----------------------------------------------------------------------------

@pytest.mark.parametrize("name, texts", [
    ("metrics.jsonl", ['{"step": 3, "rew\n{}\n', "[1]\n", "9" * 5000 + "\n", "[" * 100_000 + "\n"]),
    ("config.json", ["{"]), ("eval/x.json", ['{"b', "[" * 100_000]),
    ("plan.json", ["{", "[]", "\0\xff", '{"stages": 3}'])])
def test_damage_is_named_without_a_traceback(name, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {"truncation": figures.FIGURES["truncation"]})
    folder = made_up(tmp_path / "run", rollouts=0)
    (folder / "eval").mkdir()
    good = (folder / name).read_text() if name == "metrics.jsonl" else ""
    for text in texts:
        (folder / name).write_text(good + text)
        if name == "plan.json":
            with pytest.raises(SystemExit, match="plan"):
                figures.main([str(folder)])
            continue
        figures.main([str(folder)])
        told = capsys.readouterr()
        assert name in told.err and "truncation.png" in told.out  # the rest is drawn


def test_odd_values_are_left_out(tmp_path, monkeypatch):
    folder = made_up(tmp_path / "run/stage1", steps=7)
    rows = metrics(folder, timing=True)
    for step, value in ((2, None), (3, math.nan), (4, math.inf), (5, "much"), (6, 10 ** 400)):
        rows[step]["reward"] = value
    rows += [{"reward": 1}, {"step": "3"}, {"step": -1}, {"step": 10 ** 400}, {"step": True}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 8, "rewa')
    raw = make("length_and_reward", folder).axes[1].lines[0]
    assert raw.get_xdata().tolist() == [1, 7] and np.isfinite(raw.get_ydata()).all()
    for value in [None, 3, "$\\frac$\n\ud800" + "x" * 300, [], {}, [1], {"x": []}]:
        odd = {"a": value, "b": {"pass@1": value}, str(value): {"pass@1": 0.5, "se": value}}
        (folder / "odd.json").write_text(json.dumps({
            "name": value, "model": value, "parameters": value, "average": value, "benchmarks": odd}))
        for name in NAMES:
            make(name, folder)
        stages = [{"folder": "stage1", "max_len": value, "picked": value, "evidence": value}, value]
        (tmp_path / "run/plan.json").write_text(json.dumps({"stages": stages}))
        with pytest.raises(ValueError, match="plan.json or a config.json has another form"):
            make("truncation", tmp_path / "run")


def test_what_is_missing_is_said(tmp_path, capsys):
    folder = made_up(tmp_path / "run", rollouts=0, eval_reward=None, truncated=None, seconds=None)
    written, missing = figures.draw(str(folder))
    assert {p.rpartition("/")[2] for p in written} == {"length_and_reward.png", "length_and_reward.svg"}
    assert "no evaluation" in missing["pass_at_1"] and "truncation" in missing
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval_reward": 0.1, "eval_se": null}\n')
    assert set(figures.draw(str(folder))[1]) == NAMES - {"pass_at_1"}  # evaluated, not yet trained
    (folder / "metrics.jsonl").write_text("")
    written, missing = figures.draw(str(folder))
    assert written == [] and set(missing) == NAMES
    for arguments in (["nowhere"], [str(folder), "--transcripts"]):
        with pytest.raises(SystemExit, match=r"^figures.py: "):
            figures.main(arguments)
    (folder / "plan.json").write_text(json.dumps({"stages": [{"folder": "gone", "picked": 5}]}))
    assert figures.draw(str(folder))[0] == [] and "gone/metrics.jsonl" in capsys.readouterr().err


# --- Transcripts -------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>document.title='OWNED'</script>", "</script><img src=x onerror=alert(1)>", "<!--<script>",
    "--> ]]> </title></style></details></article>", "<svg onload=alert(1)>", "$<img src=x onerror=alert(1)>$",
    "\\(\\href{javascript:alert(1)}{click}\\)", "$\\text{&lt;script&gt;&#x202e;}$ $\\style{color:red}{x}$",
    "\ud800 lone \udfff \x00 nul \x1b[31m \r", "\u2028\u2029 \u202e reversed \u2066", "${1} {run} {css} %s",
    "a" * 300_000, "\u0335" * 3000, "{" * 9000, "$" + "{" * 900 + "$", "$" * 20_000,
    "\\[" * 20_000, "\\(" * 20_000,
    "\\boxed{" * 5000, "\\begin{array}" * 3000, "&lt;b&gt; &amp; &#x3c;", "$f" + "'" * 800 + "$",
    "$" + "\\frac" * 160 + "$", "$$" + "\\frac{1}{" * 300 + "x" + "}" * 300 + "$$", None, ["a"], {"b": 1},
    "$\\def\\a{xx}\\def\\b{\\a\\a\\a}\\b$", "$\\phantom{hidden}\\hspace{-99em}\\rlap{x}\\raise{9em}{x}$"]
MATHML = set(figures.TAGS.pattern.split("|"))
PLAIN = {"html", "meta", "title", "style", "h1", "p", "br", "input", "label", "details", "summary", "span"}
PLAIN |= {"article", "pre", "b", "code"}


class Page(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, folder, **kw):
        super().__init__()
        self.tags, self.text = [], ""
        with open(figures.transcripts(str(folder), **kw), encoding="utf-8") as f:
            self.source = f.read()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def classes(self, tag):
        return [attributes["class"] for t, attributes in self.tags if t == tag]


def test_hostile_text_stays_text(tmp_path):
    for i, text in enumerate(HOSTILE):
        row = dict.fromkeys(sample(i, 0), text) | {"step": i, "verdict": text}
        write_gz(tmp_path / f"run/rollouts/{i:06d}.jsonl.gz", [row])
    start = time.process_time()
    page = Page(tmp_path / "run")
    assert time.process_time() - start < 20  # half a second on an idle core
    assert {tag for tag, _ in page.tags} <= MATHML | PLAIN
    names = {(tag, name) for tag, attributes in page.tags if tag not in MATHML for name in attributes}
    assert {name for tag, name in names if tag not in ("meta", "html", "input", "label")} == {"class"}
    policy = next(attributes for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    for text in ("<script>document.title='OWNED'</script>", "[U+D800] lone [U+DFFF] [U+0000] nul [U+001B]",
                 "[U+202E] rev", "&lt;b&gt; &amp; &#x3c;", "${1} {run} {css} %s", "</details></article>"):
        assert text in page.text
    assert len(page.classes("article")) == len(HOSTILE) and "characters left out" not in page.text
    assert not re.search("[\0-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page.source)


def test_groups_are_whole_with_advantages_and_words(tmp_path):
    text = "<think>\nlong way</think>so \\boxed{2}"
    rows = [sample(7, i, text, float(i in (0, 1, 4, 5, 6, 7)), advantage=i / 4) for i in range(12)]
    rows[3] |= {"finish_reason": "length", "response": "<think>\nnever done"}
    write_gz(tmp_path / "run/stage2/rollouts/000007.jsonl.gz", rows)
    write_gz(tmp_path / "run/eval/base.responses.jsonl.gz",
             [sample(0, i, benchmark="toy", reason="no_box") for i in range(4)])
    page = Page(tmp_path / "run")
    kinds = [("wrong", 4), ("right", 2), ("wrong", 2), ("right", 4), ("wrong", 4)]  # the evaluation is first
    assert page.classes("article") == [kind for kind, times in kinds for _ in range(times)]
    assert page.text.count("1+1?") == 2 * 4  # in the head of each group, and whole above its answers
    for text in ("✓ right · reward 1.0 · advantage +0.25 · 5 tokens",
                 "✗ wrong · reward 0.0 · 5 tokens · no_box",
                 "advantage +0.75 · 5 tokens · ✂ cut off", "eval/base.responses · p0 · 0 of 4 right",
                 "stage2/rollouts/000007 · p0 · 2 of 4 right"):
        assert text in page.text
    boxes = re.findall(r'<pre class="thought">(.*?)</pre><pre>(.*?)</pre>', page.source, re.DOTALL)
    assert boxes[4] == ("&lt;think&gt;\nlong way&lt;/think&gt;", "so \\boxed{2}")
    for rule in ("#r:checked ~ details .wrong", "#w:checked ~ details .right", "color-scheme: light dark"):
        assert rule in page.source
    assert "".join(a["id"] for tag, a in page.tags if tag == "input") == "arw"


def test_samples_are_taken_evenly_and_damage_costs_only_itself(tmp_path, capsys):
    folder = made_up(tmp_path / "run", steps=100, rollouts=100)  # 2,000 samples in groups of 4
    write_gz(folder / "eval/base.responses.jsonl.gz", [sample(None, i) for i in range(200)])
    page = Page(folder, most=400)
    assert 300 <= len(page.classes("article")) <= 400 and page.text.count("eval/base") >= 40
    steps = [int(s) for s in re.findall(r"rollouts/(\d+) ·", page.source)]
    assert steps[0] == 1 and steps[-1] > 90 and len(set(steps)) > 10 and steps == sorted(steps)
    assert "2,200 samples in 550 groups" in Page(folder, most=10_000).text
    path = folder / "rollouts/000002.jsonl.gz"
    whole = path.read_bytes()
    for broken in (whole[:-20], b"no gzip", whole[:30] + b"x" * 40, gzip.compress(b'{"step": 2}\n{"s\n\n')):
        path.write_bytes(broken)
        assert "rollouts/000003" in Page(folder, most=10_000).text and path.name in capsys.readouterr().err


def test_formulas_become_mathml_and_money_does_not(tmp_path):
    text = (r"<think>$x=\frac12$, $$\sum_{k=1}^{n}k^2$$ \[\begin{pmatrix}1&2\\3&4\end{pmatrix}\]</think>"
            r"costs $5 and $6, $5 and 6$, \$7, US$5-$10. $a_1^2\le\sqrt[3]{2}$ $\nosuch{x}$ \(\boxed{3}\)")
    write_gz(tmp_path / "run/rollouts/000001.jsonl.gz", [sample(1, 0, text, answer=r"\frac{1}{3}")])
    source = Page(tmp_path / "run").source
    for part in ("<mfrac><mn>1</mn><mn>2</mn></mfrac>", '<math display="block">', "<mtable>", "<mroot>",
                 "<munderover><mo>∑</mo>", "<menclose>", "Wanted: <math",
                 "<msubsup><mi>a</mi><mn>1</mn><mn>2</mn></msubsup>",
                 r"<code>$\nosuch{x}$</code>", r"costs $5 and $6, $5 and 6$, \$7, US$5-$10. <math"):
        assert part in source, part


def test_what_the_converter_returns_is_checked(monkeypatch):
    attributes = 'onclick="x" style="x" href="x" class="x" width="-99em" mathcolor="red" stretchy="false"'
    for tree, safe in {
            "<math><script>x</script></math>": "", "<math><mi>x</mi><maction>x</maction></math>": "",
            "<math><annotation-xml encoding='text/html'>x</annotation-xml></math>": "",
            "<math><mphantom/></math>": "", "<svg/>": "",
            f"<math {attributes}><mi>&lt;b&gt;</mi></math>":
                '<math stretchy="false"><mi>&lt;b&gt;</mi></math>'}.items():
        element = ET.fromstring(tree)
        monkeypatch.setattr(figures, "convert_to_element", lambda tex, display, element=element: element)
        assert figures.mathml.__wrapped__("x", "inline") == safe


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([
    *"{}{}[]()^_'&$#%~ 12abx+-=<>", r"\frac", r"\sqrt", r"\left(", r"\right)", r"\begin{array}{c}",
    r"\end{array}", r"\text{a}", r"\displaystyle", r"\limits", r"\def\a", r"\href{x}{y}", r"\not", r"\\",
    r"\color{red}", r"\overset", r"\operatorname{f}", r"\verb|<|"]), max_size=30), st.integers(1, 40))
def test_any_formula_takes_little_time_and_gives_mathml(tokens, times):
    start = time.process_time()
    found = figures.mathml.__wrapped__("".join(tokens * times)[:1000], "inline")
    assert time.process_time() - start < 2 and len(found) < 60_000  # at most 0.3 s in 4,000 others
    assert not found or {e.tag for e in ET.fromstring(found).iter()} <= MATHML


def test_a_page_has_room_for_so_much(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MATH_CHARS", 20_000)
    monkeypatch.setattr(figures, "PAGE_CHARS", 100_000)
    thoughts = [" ".join(f"$x_{{{i}{k}}}$" for k in range(500)) for i in range(40)]
    rows = [sample(1, i, f"<think>{text}</think>$\\frac{{1}}{{2}}$") for i, text in enumerate(thoughts)]
    write_gz(tmp_path / "run/rollouts/000001.jsonl.gz", rows)
    source = Page(tmp_path / "run").source
    assert sum(map(len, re.findall("<math.*?</math>", source))) < 30_000
    assert len(re.findall("</pre><pre><math[^/]*<mfrac", source)) == 40  # answers come before thoughts
    assert source.count("characters left out") == 40 and len(source) < 300_000
