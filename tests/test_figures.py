"""Pictures: what is drawn equals what was logged, no text lies outside or on another, damage is named.
The page of transcripts, read with a parser: hostile text stays text, formulas are MathML and nothing else."""
import gzip
import itertools
import json
import math
import re
import struct
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from conftest import command, each_case, metrics, read_cases, run, text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import figures
from common import json_lines

NAMES = set(figures.FIGURES)


def made_up(folder, steps=40, limit=64, eval_data="toy.jsonl", **changes):
    """A folder as grpo.py leaves it, with numbers that can be recognised."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"options": {"eval_data": eval_data}}))
    rows = [{"step": t, "reward": 0.3 + 0.01 * (t % 9), "length_mean": limit / 2 + t % 5,
             "truncated": t % 3 / 50, "seconds": 10.0 + t % 4, "seconds_generate": 6.0, "seconds_update": 2.0}
            for t in range(steps + 1)]
    rows[0] = {"step": 0}
    for row in rows[::10]:
        row |= {"eval_reward": 0.2 + row["step"] / 400, "eval_se": 0.03}
    (folder / "metrics.jsonl").write_text(json_lines(row | changes for row in rows))
    return folder


def result(path, name, parameters=None, **scores):
    path.parent.mkdir(parents=True, exist_ok=True)
    bench = {b: {"pass@1": value, "se": 0.02} for b, value in scores.items()}
    path.write_text(json.dumps({"name": name, "parameters": parameters, "benchmarks": bench}))


def schedule(folder, bench="aime24", steps=(40, 26, 12), picked=(30, 20, None)):
    """Three stages; two ran on past the picked step, the first of them turned, the last is running."""
    stages = [{"folder": f"stage{i}", "max_len": 8192 * i, "picked": picked[i - 1]} for i in (1, 2, 3)]
    stages[0]["evidence"] = {"turn": 30, "before": [10, 19], "after": [20, 29]}
    for k, (stage, ran) in enumerate(zip(stages, steps)):
        made_up(folder / stage["folder"], ran, stage["max_len"], f"assets/benchmarks/{bench}.jsonl")
        name, scores = f"stage{k}" if k else "base", {bench: 0.288 + 0.05 * k, "math500": 0.82 + 0.01 * k}
        result(folder / f"eval/{name}.json", name, 1_777_088_000, **scores)
    (folder / "plan.json").write_text(json.dumps({"stages": stages}))
    return folder


def drawn(figure):
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    return figure


def make(name, *folders, window=100):
    prefixes = [f"{folder.name}, " if len(folders) > 1 else "" for folder in folders]
    runs = [figures.read_run(str(folder), window, prefix) for folder, prefix in zip(folders, prefixes)]
    with matplotlib.rc_context(figures.STYLE):
        return drawn(figures.FIGURES[name][0](runs))


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
    steps, reward, cut, seconds = np.array([
        [r["step"], r["reward"], r["truncated"], r["seconds"]] for r in metrics(folder, timing=True)[1:]]).T
    axis = make("length_and_reward", folder, window=3).axes[1]
    assert np.allclose(axis.lines[0].get_xydata().T, [steps, reward])
    inner = np.convolve(reward, np.ones(3) / 3, "valid")
    assert np.allclose(labelled(axis)["mean of 3 steps"][0][:, 1], [reward[0], *inner, reward[-1]])
    assert np.allclose(make("truncation", folder).axes[0].lines[0].get_ydata(), 100 * cut)
    during = labelled(make("pass_at_1", folder).axes[0])["in training"][0]
    assert np.allclose(during, [(0, 20), (10, 22.5), (20, 25)])
    axis = make("time_per_step", folder).axes[0]
    tops = [area.get_paths()[0].get_extents().y1 for area in axis.collections]
    assert tops[-1] == seconds.max()  # the phases and the rest are the whole step
    assert f"generate {600 * 20 / seconds.sum():.0f}%" in axis.get_legend_handles_labels()[1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.integers(1, 50))
def test_moving_average(values, window):
    for i, x in enumerate(figures.moving_average(np.array(values), window)):
        half = min(window // 2, i, len(values) - 1 - i)
        assert x == pytest.approx(np.mean(values[i - half:i + half + 1]), abs=1e-6)
    rise = np.arange(float(len(values)))
    assert np.allclose(figures.moving_average(rise, window), rise)  # a steady rise is drawn where it is


@each_case("pictured_runs")
def test_no_text_outside_the_picture_or_on_another(case, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: shown.update(
        {figure.get_suptitle(): drawn(figure)}))
    folders = [schedule(tmp_path / f"{k}/a name that is just as long", **how)
               for k, how in enumerate(case.get("schedules", []))]
    folders += [made_up(tmp_path / "run", **how) for how in case.get("runs", [])]
    for i, size in enumerate((1.5e9, 7e9)):
        result(folders[0] / f"m{i}.json", f"model {i}", size, math500=0.4, aime24=0.5)
    figures.draw(*map(str, folders))
    assert len(shown) == 5 + (folders[0] / "plan.json").exists()
    named = [text.get_text() for text in shown["Length and reward"].legends[0].get_texts()]
    assert len({name.rpartition("mean")[0] for name in named}) == len(folders)
    for title, figure in shown.items():
        ticks = [(tick, one.get_view_interval()) for a in figure.axes for one in (a.xaxis, a.yaxis)
                 for tick in one.get_major_ticks()]
        hidden = {id(tick.label1) for tick, (low, high) in ticks if not low <= tick.get_loc() <= high}
        texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in texts if id(t) not in hidden]
        for text, box in boxes:
            assert min(box.x0, box.y0, figure.bbox.x1 - box.x1, figure.bbox.y1 - box.y1) >= 0, (title, text)
        for (one, a), (two, b) in itertools.combinations(boxes, 2):
            assert not a.overlaps(b), (title, one, two)
        if "stages" in case["name"] and not re.search("Accuracy|turn", title):
            names = {t for t, _ in boxes if t.startswith("stage")}
            assert names == {"stage1, 8,192", "stage2, 16,384", "stage3, 24,576"}  # however short the stage


def test_a_schedule_is_drawn_end_to_end_with_its_turn_and_beside_another_run(tmp_path, monkeypatch):
    a, b, long = schedule(tmp_path / "a"), schedule(tmp_path / "b"), made_up(tmp_path / "long", steps=100)
    axis = make("length_and_reward", a, window=5).axes[1]
    ends = [(line[0, 0], line[-1, 0]) for line in labelled(axis)["mean of 5 steps"]]
    assert ends == [(1, 30), (31, 50), (51, 62)]
    assert [line.get_xdata()[0] for line in axis.lines if line.get_ls() == "--"] == [0, 30, 50]
    axes = make("turning_over", a, b).axes
    assert len(axes) == 6 and axes[1].get_title() == "b, stage1"
    assert labelled(axes[1])["checkpoint handed on"][0][0, 0] == 30
    assert labelled(axes[1])["b, mean of 10 steps"][0][-1, 0] == 40  # and what came after
    lines = labelled(make("length_and_reward", a, long, window=7).axes[0])
    assert lines["a, mean of 7 steps"][-1][-1, 0] == 62 and lines["long, mean of 7 steps"][-1][-1, 0] == 100
    assert "long, in training" in labelled(make("pass_at_1", a, long).axes[0])
    assert "a, mean of 10 steps" in labelled(make("truncation", a, long).axes[0])  # a quarter of a stage
    monkeypatch.setattr(figures, "FIGURES", {"truncation": figures.FIGURES["truncation"]})
    assert figures.draw(str(a), str(b))[0][0] == str(a / "figures-b/truncation.png")


def test_evaluations_and_other_models(tmp_path):
    staged, plain = schedule(tmp_path / "staged"), made_up(tmp_path / "plain")
    points = labelled(make("pass_at_1", staged).axes[0])["aime24"][0]
    assert np.allclose(points, [(0, 28.8), (30, 33.8), (50, 38.8)])
    result(staged / "other.json", "other $x$", 9e9, amc23=0.5)
    assert not labelled(make("accuracy_vs_size", staged).axes[0])  # the other size has another benchmark
    result(staged / "other.json", "other $x$", 9e9, aime24=0.5)
    points = labelled(make("accuracy_vs_size", staged).axes[0])
    assert np.allclose(points["other $x$"], [(9, 50)]) and np.allclose(points["stage2"], [(1.777088, 38.8)])
    for k in (1, 2):  # long names that differ in their last letter
        result(staged / f"long{k}.json", f"a name of more than 24 letters {k}", k * 1e9, aime24=k / 9)
    for name in ("pass_at_1", "accuracy_vs_size"):
        named = make(name, staged).axes[0].get_legend_handles_labels()[1]
        assert len({label for label in named if "letters" in label}) == 2
    result(plain / "eval/base.json", "base", toy=0.1)
    result(plain / "eval/rival.json", "rival", toy=0.4)  # another of the same name
    result(plain / "rival.json", "rival", toy=0.44)
    lines = labelled(make("pass_at_1", plain).axes[0])
    assert np.allclose(lines["toy"], [(0, 10)]) and np.allclose(lines["rival 44"][0][:, 1], 44)
    assert np.allclose(lines["rival 40"][0][:, 1], 40)
    published = {"o1-preview 40", "DeepScaleR-1.5B 43.1", "R1-Distill-Qwen-1.5B 28.8"}  # on AIME 2024 only
    for bench, shown in (("aime24", published), ("toy_aime24", set())):
        one = made_up(tmp_path / bench, eval_data=f"x/{bench}.jsonl")
        for folder in (one, schedule(tmp_path / f"staged {bench}", bench)):
            assert published & set(labelled(make("pass_at_1", folder).axes[0])) == shown, folder


# --- Damaged and missing input -----------------------------------------------------------------------------

@each_case("damaged_runs")
def test_damage_is_named_without_a_traceback(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {"truncation": figures.FIGURES["truncation"]})
    path = made_up(tmp_path) / case["file"]
    result(tmp_path / "eval/x.json", "x", toy=0.5)
    good = path.read_text() if path.name == "metrics.jsonl" else ""
    path.write_text(good + text_of(case))
    if path.name == "plan.json":
        with pytest.raises(SystemExit, match="plan"):
            figures.main([str(tmp_path)])
    else:
        figures.main([str(tmp_path)])
        told = capsys.readouterr()
        assert case["file"] in told.err and "truncation.png" in told.out  # the rest is drawn


def test_odd_values_are_left_out(tmp_path):
    folder = made_up(tmp_path / "run/stage1", steps=7)
    rows = metrics(folder, timing=True)
    for row, value in zip(rows[2:7], (None, math.nan, math.inf, "much", 10 ** 400)):
        row["reward"] = value
    rows += [{"reward": 1}, {"step": "3"}, {"step": -1}, {"step": 10 ** 400}, {"step": True}]
    (folder / "metrics.jsonl").write_text(json_lines(rows) + '{"step": 8, "rewa')
    for k, value in enumerate([None, 3, "$\\frac$\n\ud800" + "x" * 300, [], {}, [1], {"x": []}]):
        odd = {"a": value, "b": {"pass@1": value}, str(value): {"pass@1": 0.5, "se": value}}
        odd = dict.fromkeys(("name", "model", "parameters", "average"), value) | {"benchmarks": odd}
        (folder / f"odd{k}.json").write_text(json.dumps(odd))
        stages = [{"folder": "stage1", "max_len": value, "picked": value, "evidence": value}, value]
        (tmp_path / "run/plan.json").write_text(json.dumps({"stages": stages}))
        with pytest.raises(ValueError, match="plan.json or a config.json has another form"):
            make("truncation", tmp_path / "run")
    axes = {name: make(name, folder).axes for name in NAMES}
    raw = axes["length_and_reward"][1].lines[0]
    assert raw.get_xdata().tolist() == [1, 7] and np.isfinite(raw.get_ydata()).all()
    rows = [row | {"step": float(row["step"]), "seconds": 0.0, "seconds_generate": 0.0} for row in rows[1:8]]
    (folder / "metrics.jsonl").write_text(json_lines(rows))  # a table program made floats of the steps
    assert len(make("truncation", folder).axes[0].lines[0].get_xdata()) == 7
    assert not make("time_per_step", folder).axes[0].collections


def test_what_is_missing_is_said(tmp_path, capsys):
    folder = made_up(tmp_path / "run", eval_reward=None, truncated=None, seconds=None)
    written, missing = figures.draw(str(folder))
    assert {Path(p).name for p in written} == {"length_and_reward.png", "length_and_reward.svg"}
    assert "no evaluation" in missing["pass_at_1"] and "truncation" in missing
    begun = '{"step": 0, "eval_reward": 0.1, "eval_se": null}\n'  # evaluated, not yet trained
    for text, names in ((begun, {"pass_at_1"}), ("", set())):
        (folder / "metrics.jsonl").write_text(text)
        written, missing = figures.draw(str(folder))
        assert {Path(p).stem for p in written} == NAMES - set(missing) == names
    for words in (["nowhere"], [str(folder), "--transcripts"]):
        with pytest.raises(SystemExit, match=r"^figures.py: "):
            figures.main(words)
    (folder / "plan.json").write_text(json.dumps({"stages": [{"folder": "gone", "picked": 5}]}))
    assert figures.draw(str(folder))[0] == [] and "gone/metrics.jsonl" in capsys.readouterr().err


# --- Transcripts -------------------------------------------------------------------------------------------

HOSTILE = read_cases("hostile_transcripts")
MATHML = set(figures.TAGS.pattern.split("|"))
PLAIN = {"html", "meta", "title", "style", "h1", "p", "br", "input", "label", "details", "summary", "span",
         "article", "pre", "b", "code"}


def sample(step, i, response="\\boxed{1}", reward=0.0, **more):
    return {"step": step, "id": f"p{i // 4}", "sample": i % 4, "problem": "1+1?", "answer": "2",
            "response": response, "reward": reward, "response_tokens": 5, "finish_reason": "stop"} | more


def write_gz(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json_lines(rows).encode()))


def page_of(folder, rows=(), **how):
    """The page of a run, with these samples in step 1: source, tags with attributes, text, right or wrong."""
    if rows:
        write_gz(folder / "rollouts/000001.jsonl.gz", rows)
    source = Path(figures.transcripts(str(folder), **how)).read_text(encoding="utf-8")
    parser, tags, texts = HTMLParser(), [], []
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.handle_data = texts.append
    parser.feed(source)
    parser.close()
    answers = [attributes["class"] for tag, attributes in tags if tag == "article"]
    return SimpleNamespace(source=source, tags=tags, text="".join(texts), answers=answers)


def test_hostile_text_stays_text(tmp_path):
    for i, case in enumerate(HOSTILE):
        text = case["value"] if "value" in case else text_of(case)
        row = dict.fromkeys(sample(i, 0), text) | {"step": i, "verdict": text}
        write_gz(tmp_path / f"run/rollouts/{i:06d}.jsonl.gz", [row])
    rows = [{"id": "no sample"}, sample(0, 0, advantage=None)]
    write_gz(tmp_path / "run/\udce9\u202e<b>/data.jsonl.gz", rows)
    start = time.process_time()
    page = page_of(tmp_path / "run")
    assert time.process_time() - start < 20  # half a second on an idle core
    assert {tag for tag, _ in page.tags} <= MATHML | PLAIN
    names = {(tag, name) for tag, attributes in page.tags if tag not in MATHML for name in attributes}
    assert {name for tag, name in names if tag not in ("meta", "html", "input", "label")} == {"class"}
    policy = next(attributes for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    for case in HOSTILE:
        assert case.get("shown", "") in page.text
    assert "[U+DCE9][U+202E]<b>/data" in page.text and "nan" not in page.text and "no sample" not in page.text
    assert len(page.answers) == len(HOSTILE) + 1 and "characters left out" not in page.text
    assert not re.search("[\0-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page.source)


def test_groups_are_whole_with_advantages_and_words(tmp_path):
    text = "<think>\nlong way</think>so \\boxed{2}"
    rows = [sample(7, i, text, float(i in (0, 1, 4, 5, 6, 7)), advantage=i / 4) for i in range(12)]
    rows[3] |= {"finish_reason": "length", "response": "<think>\nnever done"}
    write_gz(tmp_path / "run/stage2/rollouts/000007.jsonl.gz", rows)
    rows = [sample(0, i, benchmark="toy", reason="no_box") for i in range(4)]
    write_gz(tmp_path / "run/eval/base.responses.jsonl.gz", rows)
    page = page_of(tmp_path / "run")
    right, wrong = ["right"], ["wrong"]  # the evaluation is first
    assert page.answers == 4 * wrong + 2 * right + 2 * wrong + 4 * right + 4 * wrong
    assert page.text.count("1+1?") == 2 * 4  # in the head of each group, and whole above its answers
    for text in ("stage2/rollouts/000007 · p0 · 2 of 4 right", "advantage +0.75 · 5 tokens · ✂ cut off",
                 "eval/base.responses · p0 · 0 of 4 right", "✗ wrong · reward 0.0 · 5 tokens · no_box",
                 "✓ right · reward 1.0 · advantage +0.25 · 5 tokens"):
        assert text in page.text
    boxes = re.findall(r'<pre class="thought">(.*?)</pre><pre>(.*?)</pre>', page.source, re.DOTALL)
    assert boxes[4] == ("&lt;think&gt;\nlong way&lt;/think&gt;", "so \\boxed{2}")
    for rule in ("#r:checked ~ details .wrong", "#w:checked ~ details .right", "color-scheme: light dark"):
        assert rule in page.source
    assert "".join(attributes["id"] for tag, attributes in page.tags if tag == "input") == "arw"


def test_samples_are_taken_evenly_and_damage_costs_only_itself(tmp_path, capsys):
    for step in range(1, 101):  # 2,000 samples in groups of 4
        rows = [sample(step, i, reward=float(i % 3 == 0)) for i in range(20)]
        write_gz(tmp_path / f"rollouts/{step:06d}.jsonl.gz", rows)
    write_gz(tmp_path / "eval/base.responses.jsonl.gz", [sample(None, i) for i in range(200)])
    page = page_of(tmp_path, most=400)
    assert 300 <= len(page.answers) <= 400 and page.text.count("eval/base") >= 40
    steps = [int(s) for s in re.findall(r"rollouts/(\d+) ·", page.source)]
    assert steps[0] == 1 and steps[-1] > 90 and len(set(steps)) > 10 and steps == sorted(steps)
    assert "2,200 samples in 550 groups" in page_of(tmp_path, most=10_000).text
    path = tmp_path / "rollouts/000002.jsonl.gz"
    whole = path.read_bytes()
    for broken in (whole[:-20], b"no gzip", whole[:30] + b"x" * 40, gzip.compress(b'{"step": 2}\n{"s\n\n')):
        path.write_bytes(broken)
        assert "rollouts/000003" in page_of(tmp_path, most=10_000).text
        assert path.name in capsys.readouterr().err


@each_case("formulas")
def test_formulas_become_mathml_and_money_does_not(tmp_path, case):
    source = page_of(tmp_path, [sample(1, 0, case["text"], answer=r"\frac{1}{3}")]).source
    assert all(part in source for part in [*case["shown"], "Wanted: <math"])


@each_case("converted")
def test_what_the_converter_returns_is_checked(case, monkeypatch):
    element = ET.fromstring(case["converted"])
    monkeypatch.setattr(figures, "convert_to_element", lambda tex, display: element)
    assert figures.mathml.__wrapped__("x", "inline") == case["shown"]


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
    source = page_of(tmp_path, rows).source
    assert sum(map(len, re.findall("<math.*?</math>", source))) < 30_000
    assert len(re.findall("</pre><pre><math[^/]*<mfrac", source)) == 40  # answers come before thoughts
    assert source.count("characters left out") == 40 and len(source) < 300_000
    huge = [row | {"problem": "x" * 10**6, "answer": "x" * 10**6, "verdict": "x" * 10**6} for row in rows[:4]]
    assert len(page_of(tmp_path, huge).source) < 300_000
