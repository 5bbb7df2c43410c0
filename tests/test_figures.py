"""Figures of real and made-up runs: what is drawn equals what was logged, nothing is cut off or unreadable, broken files
are named; the page of transcripts is driven in headless Chromium with hostile text."""
import ast
import base64
import gzip
import hashlib
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from conftest import ROOT, command, metrics, run

import figures

NAMES = ["pass_at_1", "length_and_reward", "turning_over", "truncation", "accuracy_vs_size", "length_distributions", "time_per_step"]


@pytest.fixture(scope="module")
def real(tiny, problems, tmp_path_factory):
    """Eight steps of grpo.py on the tiny model, with evaluations."""
    out = tmp_path_factory.mktemp("figures") / "run"
    run(command(tiny, problems, out, "--steps", 8, "--eval_data", problems, "--eval_every", 4, "--eval_n", 2))
    return out


def write_gz(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)


def sample(step, i, response="\\boxed{1}", reward=0.0, tokens=5, finish="stop", **more):
    return dict(step=step, id=f"p{i // 4}", sample=i % 4, problem="1+1?", answer="2", response=response, reward=reward,
                prompt_tokens=3, response_tokens=tokens, finish_reason=finish) | more


def made_up(folder, steps=40, limit=64, eval_data="toy.jsonl", rollouts=2, **changes):
    """A run folder as grpo.py leaves it, with numbers that can be recognised."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"options": {"max_len": limit, "eval_data": eval_data, "model": "start"}}))
    lines = []
    for t in range(steps + 1):
        row = {"step": t}
        if t:
            row |= dict(reward=0.3 + 0.01 * (t % 9), length_mean=limit / 2 + t % 5, truncated=0.02 * (t % 3), length_right=None,
                        seconds=10.0 + t % 4, seconds_generate=6.0, seconds_reward=0.5, seconds_logprobs=0.5,
                        seconds_update=2.0, seconds_sync=0.25, seconds_idle=0.25)
        if t % 10 == 0:
            row |= dict(eval_reward=0.2 + t / 400, eval_se=0.03, eval_truncated=0.1)
        lines.append(json.dumps(row | changes))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for t in range(1, min(steps, rollouts) + 1):
        write_gz(folder / f"rollouts/{t:06d}.jsonl.gz",
                 [sample(t, i, reward=float(i % 3 == 0), tokens=limit if i % 5 == 4 else 3 + i, finish="length" if i % 5 == 4 else "stop")
                  for i in range(20)])
    return folder


def result(path, name, model="elsewhere", parameters=None, **scores):
    path.parent.mkdir(parents=True, exist_ok=True)
    bench = {b: {"problems": 30, "n": 16, "pass@1": v, "se": 0.02, "per_problem": {}} for b, v in scores.items()}
    path.write_text(json.dumps({"name": name, "model": model, "parameters": parameters, "protocol_line": "p", "benchmarks": bench,
                                "average": {"pass@1": sum(scores.values()) / len(scores), "se": 0.01}}))
    return path


def schedule(folder, bench="aime24"):
    """Three stages; the first two ran on past the step that was picked, the last one is still running."""
    stages = []
    for i, (steps, picked, limit) in enumerate([(40, 30, 8192), (26, 20, 16384), (12, None, 24576)], 1):
        made_up(folder / f"stage{i}", steps, limit, f"assets/benchmarks/{bench}.jsonl")
        stages.append({"folder": f"stage{i}", "max_len": limit, "steps": steps, "group": 8, "picked": picked,
                       "status": "done" if picked else "training",
                       "evidence": {"before": [10, 19], "after": [20, 29]} if i == 1 else None})
    (folder / "plan.json").write_text(json.dumps({"options": {}, "model": "start", "stages": stages, "evals": ["base", "stage1"]}))
    for k, name in enumerate(["base", "stage1", "stage2"]):
        result(folder / f"eval/{name}.json", name, "start" if name == "base" else f"x/{name}/checkpoints/000030/hf", 1_777_088_000,
               **{bench: 0.288 + 0.05 * k, "math500": 0.82 + 0.01 * k})
    return folder


def load(folder, window=100, **more):
    return {"stages": figures.read_run(folder), "results": figures.read_results(figures.result_files(str(folder)), False),
            "window": window, "extra": [], "references": None, "sizes": []} | more


def make(name, folder, **more):
    with matplotlib.rc_context(figures.STYLE):
        figure = getattr(figures, name)(load(folder, **more))
        if not isinstance(figure, str):
            FigureCanvasAgg(figure)
            figure.draw_without_rendering()
        return figure


def texts(figure):
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]


def said(figure):
    return " | ".join(t.get_text() for t in texts(figure))


# ---------------------------------------------------------------------------------------------------------------
# What is drawn
# ---------------------------------------------------------------------------------------------------------------

def test_every_figure_of_a_real_run(real):
    """All the data allows, as a program: both kinds of file, the same bytes when drawn again, and a reason for the rest."""
    done = run([sys.executable, str(ROOT / "figures.py"), str(real)])
    assert re.findall(r"missing (\w+): .*--sizes", done.stdout) == ["accuracy_vs_size"]
    folder = real / "figures"
    names = [n for n in NAMES if n != "accuracy_vs_size"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{n}.{kind}" for n in names for kind in ("png", "svg"))
    for n in names:
        head = (folder / f"{n}.png").read_bytes()[:24]
        width, height = struct.unpack(">II", head[16:24])
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and width == 1600 and 600 <= height <= 1600  # 800 wide at two pixels a dot
        svg = (folder / f"{n}.svg").read_text()
        tags = [e.tag.rpartition("}")[2] for e in ET.fromstring(svg).iter()]
        assert tags.count("path") + tags.count("use") > 20 and "image" not in tags  # drawn, not a bitmap in disguise
        assert "<dc:date>" not in svg
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    written, missing = figures.draw(real)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and list(missing) == ["accuracy_vs_size"]
    assert sorted(written) == sorted(str(p) for p in folder.iterdir())


def test_numbers_of_a_real_run_are_the_ones_drawn(real):
    lines = [m for m in metrics(real, timing=True) if m["step"]]
    reward = np.array([m["reward"] for m in lines])
    figure = make("length_and_reward", real, window=3)
    raw, mean = figure.axes[1].lines[:2]
    assert list(raw.get_xdata()) == list(range(1, 9)) and np.allclose(raw.get_ydata(), reward)
    expected = [reward[max(0, i - 2):i + 1].mean() for i in range(8)]
    assert np.allclose(mean.get_ydata(), expected)
    assert "average of 3 steps" in figure.axes[0].get_ylabel()
    cut = make("truncation", real).axes[0].lines[0].get_ydata()
    assert np.allclose(cut, [100 * m["truncated"] for m in lines])
    during = make("pass_at_1", real).axes[0].lines[0]
    evals = [(m["step"], 100 * m["eval_reward"]) for m in metrics(real) if "eval_reward" in m]
    assert [(x, pytest.approx(y)) for x, y in zip(*during.get_data())] == evals and len(evals) == 3
    bars = make("time_per_step", real).axes[0].patches
    tops = {}
    for b in bars:
        step = round(b.get_x() + 0.5)
        tops[step] = max(tops.get(step, 0), b.get_y() + b.get_height())
    assert tops == {m["step"]: pytest.approx(m["seconds"]) for m in lines}  # the phases and the rest are the whole step
    title = make("length_distributions", real).axes[0].get_title(loc="left")
    rows = [json.loads(t) for p in (real / "rollouts").iterdir() for t in gzip.open(p, "rt")]
    share = 100 * sum(r["finish_reason"] == "length" for r in rows) / len(rows)
    assert f"{len(rows)} samples" in title and f"truncated {share:.1f} %" in title


KINDS = {
    "schedule": lambda d: schedule(d),
    "toy schedule": lambda d: schedule(d, "toy"),
    "one run": lambda d: made_up(d),
    "one step": lambda d: made_up(d, steps=1),
    "long": lambda d: made_up(d, steps=700, limit=24576),
    "nothing earned, nothing cut": lambda d: made_up(d, reward=0.0, truncated=0.0, eval_reward=0.0),
    "no evaluation": lambda d: made_up(d, eval_reward=None, eval_truncated=None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_clipped_nothing_tiny_nothing_overlapping(kind, tmp_path):
    """What looking at the pictures found, kept: every text inside the picture, at 800 pixels no letter under 13 (9.5 pt),
    names of stages, titles, axis labels, legends and tick labels clear of each other."""
    folder = KINDS[kind](tmp_path / "run")
    table = [("a model", 1.5e9, 43.1), ("another model", 1.6e9, 43.0), ("third", 7e9, 50.0), ("closed", None, 40.0)]
    drawn = 0
    for name in NAMES:
        figure = make(name, folder, sizes=table)
        if isinstance(figure, str):
            assert kind == "no evaluation" and name == "pass_at_1", figure
            continue
        drawn += 1
        renderer = figure.canvas.get_renderer()
        width, height = figure.bbox.width, figure.bbox.height
        hidden = {id(tick.label1) for a in figure.axes for one in (a.xaxis, a.yaxis) for tick in one.get_major_ticks() + one.get_minor_ticks()
                  if not min(one.get_view_interval()) <= tick.get_loc() <= max(one.get_view_interval())}
        shown = [(t.get_text(), t.get_window_extent(renderer)) for t in texts(figure) if id(t) not in hidden]
        for text, b in shown:
            assert b.x0 >= -1 and b.y0 >= -1 and b.x1 <= width + 1 and b.y1 <= height + 1, (name, text)
        assert min(t.get_fontsize() for t in texts(figure)) >= 9.5
        for i, (one, a) in enumerate(shown):
            for two, b in shown[i + 1:]:
                apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
                assert apart, (name, one, two)
    assert drawn >= 6


def test_stages_end_to_end_with_switches_and_what_ran_on_faded(tmp_path):
    folder = schedule(tmp_path / "run")
    assert [s["start"] for s in figures.read_run(folder)] == [0, 30, 50]
    figure = make("length_and_reward", folder, window=5)
    axis = figure.axes[1]
    switches = [line.get_xdata()[0] for line in axis.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2]
    assert switches == [30, 50]
    strong = [line for line in axis.lines if line.get_linewidth() == 2.2]
    faded = [line for line in axis.lines if line.get_linewidth() == 1.6]
    assert [(min(s.get_xdata()), max(s.get_xdata())) for s in strong] == [(1, 30), (31, 50), (51, 62)]
    assert [(min(s.get_xdata()), max(s.get_xdata())) for s in faded] == [(30, 40), (50, 56)]
    assert all(line.get_alpha() < 0.5 for line in faded) and "faded" in said(figure)
    assert "stage2\n16K tokens" in said(figure)
    places = [figures.place(r, load(folder)["stages"]) for r in load(folder)["results"]]
    assert places == [0, 30, 50]  # base, stage1, stage2: where their checkpoints were picked


def test_final_evaluations_of_single_runs_are_placed_by_their_checkpoint(tmp_path):
    folder = made_up(tmp_path / "run")
    result(folder / "eval/late.json", "late", f"{folder}/checkpoints/000030/hf", toy=0.5)
    result(folder / "eval/start.json", "start", "start", toy=0.1)
    result(folder / "eval/rival.json", "rival", "/models/rival", toy=0.44)
    figure = make("pass_at_1", folder)
    final = next(c for c in figure.axes[0].containers if c.get_label() == "toy")
    assert [tuple(p) for p in np.round(final.lines[0].get_xydata(), 6)] == [(0, 10), (30, 50)]
    assert final.has_yerr and "rival 44" in said(figure)  # a model from elsewhere is a line, not a step


def test_turning_over_shades_the_windows_the_plan_compared(tmp_path):
    folder = schedule(tmp_path / "run")
    figure = make("turning_over", folder)
    first = figure.axes[0]
    spans = [(p.get_x(), p.get_x() + p.get_width()) for p in first.patches]
    assert spans == [(10, 19), (20, 29)] and not figure.axes[1].patches
    dashed = [line.get_xdata()[0] for line in first.lines if line.get_linestyle() == "--"]
    assert dashed == [30] and "picked step 30" in first.get_title() and "last step 12" in said(figure)
    assert first.get_xlim()[1] > 40  # also the steps in which it turned


def test_references_are_published_ones_on_aime24_only(tmp_path):
    aime, toy = schedule(tmp_path / "a"), schedule(tmp_path / "b", "toy")
    assert {"o1-preview 40", "DeepScaleR-1.5B 43.1", "R1-Distill-Qwen-1.5B 28.8"} <= set(said(make("pass_at_1", aime)).split(" | "))
    for text in ("o1", "DeepScaleR", "R1-"):
        assert text not in said(make("pass_at_1", toy))
    assert "mine 12.5" in said(make("pass_at_1", toy, references={"mine": 12.5}))
    assert "o1" not in said(make("pass_at_1", aime, references={}))
    assert not figures.is_aime24("data/toy_aime24.jsonl") and not figures.is_aime24("aime25")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=30), st.integers(1, 12))
def test_moving_average_against_the_plain_definition(values, window):
    got = figures.moving_average(np.array(values), window)
    for i, x in enumerate(got):
        seen = [v for v in values[max(0, i - window + 1):i + 1] if not math.isnan(v)]
        assert math.isnan(x) if not seen else x == pytest.approx(np.mean(seen), abs=1e-3)


def test_window_shrinks_with_the_run_and_says_so(tmp_path):
    long, short = made_up(tmp_path / "long", steps=150), made_up(tmp_path / "short", steps=40)
    assert "average of 100 steps" in said(make("length_and_reward", long)) and "not 100" not in said(make("length_and_reward", long))
    figure = make("length_and_reward", short)
    assert "average of 10 steps" in figure.axes[0].get_ylabel() and "over 10, not 100: the run has 40 steps" in said(figure)
    with pytest.raises(ValueError, match="at least 1"):
        figures.draw(short, window=0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=9))
def test_pareto_front_against_the_definition(points):
    beaten = lambda p: any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)
    assert sorted(figures.pareto(points)) == [i for i, p in enumerate(points) if not beaten(p)]


def test_accuracy_against_size_from_tables_and_results(tmp_path):
    table = tmp_path / "sizes.csv"
    table.write_text("name,parameters,accuracy\nsmall $x$,1.5B,28.8\nbig,7B,55.5\nworse,7.6e9,20\no1-preview,,40.0\n")
    (tmp_path / "shares.json").write_text(json.dumps([{"name": "a", "parameters": 1e9, "accuracy": 0.5}]))
    assert figures.read_sizes(tmp_path / "shares.json") == [("a", 1e9, 50.0)]
    run_dir = schedule(tmp_path / "run")
    figure = make("accuracy_vs_size", run_dir, sizes=figures.read_sizes(table))
    drawn = {line.get_label(): np.round(line.get_xydata(), 3).tolist() for line in figure.axes[0].lines}
    assert drawn["Pareto front"] == [[1.5e9, 28.8], [1777088000, 38.8], [7e9, 55.5]]  # the best of ours joins in
    assert [7.6e9, 20.0] in drawn["other models"] and len(drawn["other models"]) == 3
    assert "o1-preview 40" in said(figure) and "small $x$" in said(figure) and "aime24" in said(figure)
    for text, reason in (("name,parameters,accuracy\na,1B,lots\n", "row 1"), ("name,size\na,1\n", "row 1"), ("name,accuracy\na,140\n", "140")):
        table.write_text(text)
        with pytest.raises(ValueError, match=reason) as error:
            figures.draw(run_dir, sizes=table)
        assert "sizes.csv" in str(error.value)


def test_a_folder_of_evaluations_alone(tmp_path):
    result(tmp_path / "one.json", "one", parameters=1e9, math500=0.7, amc23=0.5)
    extra = result(tmp_path / "elsewhere/two.json", "two", parameters=2e9, math500=0.9, amc23=0.7)
    written, missing = figures.draw(tmp_path, results=[extra])
    assert [p.rpartition("/")[2] for p in written] == ["accuracy_vs_size.png", "accuracy_vs_size.svg"]
    assert set(missing) == set(NAMES) - {"accuracy_vs_size"} and all("no training run" in r for r in missing.values())
    points, measured = figures.sized_results(load(tmp_path, extra=figures.read_results([extra], True)))
    assert [p[2] for p in points] == [pytest.approx(60), pytest.approx(80)] and measured == "mean of math500, amc23"


# ---------------------------------------------------------------------------------------------------------------
# Broken and missing input
# ---------------------------------------------------------------------------------------------------------------

def test_half_a_last_line_is_what_a_crash_leaves(tmp_path):
    folder = made_up(tmp_path / "run", steps=5)
    text = (folder / "metrics.jsonl").read_text()
    for tail in ('{"step": 6, "rewa', '{"step": 6, "rewa\n', "\0\0\0"):
        (folder / "metrics.jsonl").write_text(text + tail)
        assert [r["step"] for r in figures.read_metrics(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("line, reason", [('{"step": 3, "rew', "not JSON"), ("[1, 2]", "object with step"), ('{"reward": 1}', "object with step"),
                                          ('{"step": "3"}', "whole number"), ("[" * 100000, "not JSON"), ('{"step": -1}', "whole number")])
def test_any_other_bad_line_is_named(line, reason, tmp_path):
    folder = made_up(tmp_path / "run", steps=5)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[3] = line
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"metrics.jsonl, line 4: .*{reason}"):
        figures.draw(folder)
    done = run([sys.executable, str(ROOT / "figures.py"), str(folder)], check=False)
    assert done.returncode == 1 and "metrics.jsonl, line 4" in done.stderr and "Traceback" not in done.stderr


def test_null_nan_and_text_are_left_out(tmp_path):
    folder = made_up(tmp_path / "run", steps=6)
    rows = [json.loads(t) for t in (folder / "metrics.jsonl").read_text().splitlines()]
    for step, value in ((2, None), (3, math.nan), (4, math.inf), (5, "much")):
        rows[step]["reward"] = value
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw = make("length_and_reward", folder).axes[1].lines[0]
    assert raw.get_xdata().tolist() == [1, 6] and np.isfinite(raw.get_ydata()).all()


def test_what_is_missing_is_named_with_the_reason(tmp_path):
    folder = made_up(tmp_path / "run", rollouts=0, eval_reward=None, truncated=None, seconds=None)
    written, missing = figures.draw(folder)
    assert {p.rpartition("/")[2] for p in written} == {f"{n}.{k}" for n in ("length_and_reward", "turning_over") for k in ("png", "svg")}
    assert "no evaluation" in missing["pass_at_1"] and "truncated" in missing["truncation"] and "seconds" in missing["time_per_step"]
    assert "no rollouts folder" in missing["length_distributions"]
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval_reward": 0.1, "eval_se": null}\n')
    written, missing = figures.draw(folder)
    assert len(written) == 2 and set(missing) == set(NAMES) - {"pass_at_1"}  # evaluated, not yet trained
    (folder / "metrics.jsonl").write_text("")
    written, missing = figures.draw(folder)
    assert written == [] and set(missing) == set(NAMES) and "no training step yet" in missing["length_and_reward"]
    with pytest.raises(FileNotFoundError, match="not a folder"):
        figures.draw(tmp_path / "nowhere")


def test_a_damaged_rollouts_file_costs_one_figure_and_is_named(tmp_path):
    folder = made_up(tmp_path / "run")
    path = folder / "rollouts/000002.jsonl.gz"
    whole = path.read_bytes()
    for broken in (whole[:-20], b"no gzip", whole[:30] + b"x" * 40, gzip.compress(b'{"step": 2}\n{"ste\n{"step": 2}\n')):
        path.write_bytes(broken)
        for read in (figures.transcripts, lambda d: make("length_distributions", d)):
            with pytest.raises(ValueError, match="000002.jsonl.gz"):
                read(folder)
    written, missing = figures.draw(folder)
    assert "000002.jsonl.gz, line 2" in missing["length_distributions"] and len(written) == 10


@pytest.mark.parametrize("name, text", [("plan.json", "{"), ("plan.json", "[]"), ("plan.json", '{"stages": [3]}'), ("config.json", "{"),
                                        ("eval/x.json", '{"bench')])
def test_a_broken_json_file_is_named(name, text, tmp_path):
    folder = made_up(tmp_path / "run")
    (folder / "eval").mkdir()
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        figures.draw(folder)


def test_names_out_of_files_are_text(tmp_path):
    """Dollars, line breaks, lone surrogates and great length in a name neither fail nor become mathematics."""
    folder = made_up(tmp_path / "run", eval_data="$\\frac$.jsonl")
    result(folder / "eval/x.json", "$\\badtex{$\n\ud800" + "x" * 300, "m", 1e9, **{"$b$\ud800": 0.4})
    written, missing = figures.draw(folder, references={"$r$": 10.0})
    assert not missing and len(written) == 14


def test_command_line(tmp_path):
    folder = made_up(tmp_path / "run")
    program = [sys.executable, str(ROOT / "figures.py")]
    help_text = run([*program, "--help"]).stdout
    for option in ("--window", "--transcripts", "--max_transcripts", "--results", "--reference", "--sizes", "--out"):
        assert option in help_text
    out = tmp_path / "out"
    done = run([*program, str(folder), "--out", str(out), "--transcripts", "--window", "4", "--reference", "a=b=30"])
    assert (out / "pass_at_1.svg").exists() and (out / "transcripts.html").exists() and not (folder / "figures").exists()
    assert "missing accuracy_vs_size" in done.stdout
    for wrong in (["--reference", "x"], ["--reference", "x=400"], ["--window", "0"], ["--results", str(folder / "config.json")],
                  ["--max_transcripts", "0", "--transcripts"]):
        with pytest.raises(SystemExit, match="^figures.py: "):
            figures.main([str(folder), *wrong])
    assert not (folder / "figures").exists()  # refused before anything is drawn


def test_imports_nothing_of_ours():
    tree = ast.parse((ROOT / "figures.py").read_text())
    names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) == {"matplotlib", "numpy", "tqdm"}


# ---------------------------------------------------------------------------------------------------------------
# Transcripts
# ---------------------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>document.title='OWNED'</script>", "</script><script>document.title='OWNED'</script>",
    "<img src=x onerror=\"document.title='OWNED'\">", "<!--<script>", "--> ]]> </title></style>", "<svg onload=document.title='OWNED'>",
    "$<img src=x onerror=document.title='OWNED'>$", "\\(\\href{javascript:document.title='OWNED'}{click}\\)",
    "[x](javascript:document.title='OWNED')", "${document.title='OWNED'} `${1}` \\u003cscript\\u003e", "a" * 300_000,
    "\ud800 lone \udfff \x00 nul \x1b[31m", "\u2028\u2029 \u202e reversed", "{" * 9000, "$" + "{" * 900 + "$", "$" * 20_000,
    "\\[" * 20_000, "\\boxed{" * 5000, "\\begin{array}" * 3000, "&lt;b&gt; &amp; &#x3c;",
]
MATH = ("<think>\nLet $x=\\frac12$, $$\\sum_{k=1}^{n}k^2$$ \\[\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}\\]\n</think>\nIt costs $5 and $6. "
        "Thus $a_1^2\\le\\sqrt[3]{2}\\cdot\\alpha$ and $\\nosuch{x}$ <｜User｜> <|im_start|> is \\boxed{\\frac{3\\sqrt{2}}{4}}.")


def page_parts(path):
    html = path.read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1]
    return html, data, json.loads(data)


def test_page_is_self_contained_and_its_policy_allows_one_script(tmp_path):
    folder = made_up(tmp_path / "run", steps=1, rollouts=0)
    write_gz(folder / "rollouts/000001.jsonl.gz", [sample(1, i, t, problem=t, answer=t, id=t) for i, t in enumerate(HOSTILE)])
    html, data, value = page_parts(type(tmp_path)(figures.transcripts(folder)))
    assert data.isascii() and not re.search(r"[<>&]", data)
    assert [s["response"] for s in value["samples"][:10]] == HOSTILE[:10]
    outside = html.replace(data, "")
    assert not re.search(r"https?://(?!www\.w3\.org/1998/Math)|\ssrc=|\shref=|@import|url\(|innerHTML|insertAdjacent|document\.write|eval\(|\son\w+=", outside)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    digest = lambda tag: base64.b64encode(hashlib.sha256(re.search(rf"<{tag}>(.*?)</{tag}>", outside, re.S)[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert f"script-src 'sha256-{digest('script')}'" in policy and f"style-src 'sha256-{digest('style')}'" in policy
    assert len(re.findall("<script", html)) == 2
    long = next(s["response"] for s in value["samples"] if s["response"].startswith("aaa"))
    assert len(long) < 201_000 and "100,000 characters left out" in long


def test_page_takes_samples_evenly_and_says_so(tmp_path):
    folder = made_up(tmp_path / "run", steps=30, rollouts=30)  # 600 samples
    write_gz(folder / "eval/base.responses.jsonl.gz",
             [sample(None, i, extracted="7", reason="wrong", benchmark="toy") for i in range(50)])
    _, _, value = page_parts(type(tmp_path)(figures.transcripts(folder, most=100)))
    assert len(value["samples"]) == 100 and "100 samples of 650" in value["note"]
    trained = [s["step"] for s in value["samples"] if s["where"] == "training"]
    assert len(trained) == 50 and len(set(trained)) == 30 and sum(s["where"] == "eval base" for s in value["samples"]) == 50
    _, _, value = page_parts(type(tmp_path)(figures.transcripts(folder, most=5000)))
    assert len(value["samples"]) == 650 and value["note"] == "All 650 samples."
    rows, note = figures.collect({"a": [(i, folder / f"rollouts/{i:06d}.jsonl.gz") for i in range(1, 31)]}, 100, files_each=10)
    assert len(rows) == 100 and {step for _, step, _ in rows} >= {1, 30} and "20 further step files were not opened" in note
    rows, note = figures.collect({"a": [(i, folder / f"rollouts/{i:06d}.jsonl.gz") for i in range(1, 31)]}, 400, files_each=10)
    assert len(rows) == 400 and "further" in note and [r[1] for r in rows] == sorted(r[1] for r in rows)
    write_gz(tmp_path / "only/base.responses.jsonl.gz", [sample(None, i, reason=None, benchmark="toy") for i in range(3)])
    _, _, value = page_parts(type(tmp_path)(figures.transcripts(tmp_path / "only")))  # evaluations without a run
    assert [(s["where"], s["step"], s["benchmark"]) for s in value["samples"]] == [("eval base", None, "toy")] * 3
    with pytest.raises(ValueError, match="no samples"):
        figures.transcripts(made_up(tmp_path / "none", rollouts=0))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


def open_page(path, fragment="", *options):
    """The document after its scripts ran, as text, from a headless browser that keeps no profile."""
    profile = path.parent / "profile"
    done = subprocess.run([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}",
                           *(options or ("--dump-dom",)), path.as_uri() + fragment], capture_output=True, text=True, errors="replace", timeout=180)
    shutil.rmtree(profile, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def drive(path, script):
    """A copy of the page with a second script, allowed by its hash, that acts as a reader would -> what it reports."""
    script = ("const report = {}; const count = () => $('count').textContent;\n"
              "const set = (id, value) => { $(id).value = value; };\n" + script +
              "\nconst out = document.createElement('pre'); out.id = 'report'; out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(report)))); document.body.append(out);\n")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = path.read_text(encoding="utf-8").replace("script-src ", f"script-src 'sha256-{digest}' ", 1).replace("</body>", f"<script>{script}</script></body>")
    copy = path.with_name("driven.html")
    copy.write_text(html, encoding="utf-8")
    return json.loads(base64.b64decode(re.search(r'<pre id="report">([^<]*)</pre>', open_page(copy))[1]))


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    folder = made_up(tmp_path_factory.mktemp("hostile") / "run", steps=2, rollouts=0)
    all_texts = HOSTILE + [MATH]
    write_gz(folder / "rollouts/000001.jsonl.gz",
             [sample(1, i, t, float(i % 3 == 0), i, "length" if i % 3 == 1 else "stop", problem=t[:5000], answer=t[:50], id=t[:50])
              for i, t in enumerate(all_texts)])
    path = type(folder)(figures.transcripts(folder))
    assert len(all_texts) == 21
    return path


@browser
def test_hostile_text_does_not_run_in_a_real_browser(hostile_page):
    """Every sample is opened, as mathematics and as source; nothing but the page's own script ran, nothing was loaded."""
    report = drive(hostile_page, r"""
      report.violations = [];
      document.addEventListener('securitypolicyviolation', e => report.violations.push(e.blockedURI + e.violatedDirective));
      report.opened = 0;
      for (const plain of [false, true]) {
        $('source').checked = plain; $('think').checked = true;
        for (let i = 0; i < state.shown.length; i++) { go(i); report.opened += $('detail').textContent.length > 20; }
        report['foreign' + plain] = [...document.querySelectorAll('img, svg, iframe, object, embed, a, [onerror], [onload], [href], [src]')].length;
      }
      report.title = document.title; report.scripts = document.scripts.length;
      report.loaded = performance.getEntriesByType('resource').length;
    """)
    assert report == {"violations": [], "opened": 42, "foreignfalse": 0, "foreigntrue": 0, "title": "Transcripts", "scripts": 3, "loaded": 0}


@browser
def test_filters_in_a_real_browser(hostile_page):
    report = drive(hostile_page, r"""
      report.all = count();
      for (const name of ['right', 'wrong', 'truncated']) {
        document.querySelector(`input[value=${name}]`).checked = true; apply(); report[name] = count();
        report[name + 'only'] = state.shown.every(s => s.outcome === name);
      }
      document.querySelector('input[value=all]').checked = true;
      set('min', '5'); set('max', '9'); apply(); report.length = count(); set('min', ''); set('max', '');
      set('from', '2'); apply(); report.late = count() + $('detail').textContent; set('from', '1'); set('to', '1'); apply(); report.step = count();
      set('q', 'COSTS $5'); apply(); report.text = count(); set('q', ''); set('from', ''); set('to', ''); apply();
      const key = k => document.dispatchEvent(new KeyboardEvent('keydown', {key: k, bubbles: true}));
      key('j'); key('j'); key('k'); report.open = state.open; report.hash = location.hash;
      report.current = [...$('rows').children].findIndex(li => li.firstChild.hasAttribute('aria-current'));
      $('next').click(); report.clicked = state.open; $('rows').children[7].firstChild.click(); report.row = state.open;
      report.listed = $('rows').children.length; go(20);
      const [row, box] = [document.querySelector('li [aria-current]'), $('rows').parentNode].map(n => n.getBoundingClientRect());
      report.visible = row.top >= box.top && row.bottom <= box.bottom;
      report.unnamed = [...document.querySelectorAll('input, select, button')].filter(n => !n.labels?.length && !n.ariaLabel && !n.textContent.trim()).length;
    """)
    assert report == {"all": "21 of 21 shown", "right": "7 of 21 shown", "wrong": "7 of 21 shown", "truncated": "7 of 21 shown",
                      "rightonly": True, "wrongonly": True, "truncatedonly": True, "length": "5 of 21 shown",
                      "late": "0 of 21 shownNo sample passes these filters.", "step": "21 of 21 shown", "text": "1 of 21 shown", "open": 1,
                      "hash": "#open=2", "current": 1, "clicked": 2, "row": 7, "listed": 21, "visible": True, "unnamed": 0}


@browser
def test_mathematics_in_a_real_browser(hostile_page):
    """The last sample: TeX became MathML, money and special tokens stayed text, an unknown command is shown as written."""
    html = open_page(hostile_page, "#filter=wrong&open=7&think=1")
    assert "7 of 21 shown" in html and "<title>Transcripts</title>" in html
    detail = html[html.index('id="detail"'):html.index('<script type="application/json"')]
    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in detail  # \frac12
    assert re.search(r'<munderover><mo[^>]*>∑</mo>', detail) and '<mtable class="round">' in detail and 'class="boxed"' in detail
    assert re.search(r"<msubsup><mi>a</mi><mn>1</mn><mn>2</mn></msubsup>", detail) and "<mroot>" in detail and "<mi>α</mi>" in detail
    assert "It costs $5 and $6. Thus" in detail and "&lt;｜User｜&gt; &lt;|im_start|&gt;" in detail
    assert '<mtext class="unknown">\\nosuch</mtext>' in detail
    assert re.search(r"<details[^>]*open", detail) and "&lt;/think&gt;" in detail
    given_answer = detail[detail.index("<dt>given</dt>"):]
    assert given_answer.index("<mfrac>") < given_answer.index("<dt>reward</dt>")


@browser
def test_thousands_of_samples_of_a_run_page_by_page(tmp_path):
    """Only one page of rows and one transcript are in the document; the window of a telephone needs no sideways scrolling."""
    folder = made_up(tmp_path / "run", steps=150, rollouts=150)  # 3,000 samples
    path = type(tmp_path)(figures.transcripts(folder, most=3000))
    report = drive(path, r"""
      report.all = count(); report.rows = $('rows').children.length;
      for (let i = 0; i < 3; i++) $('forth').click();
      report.page = $('page').textContent; $('back').click(); report.back = $('page').textContent;
      go(2999); report.last = $('page').textContent + $('next').disabled + $('forth').disabled;
      report.sideways = document.documentElement.scrollWidth > document.documentElement.clientWidth;
      report.nodes = document.querySelectorAll('*').length < 600;
    """)
    assert report == {"all": "3,000 of 3,000 shown", "rows": 25, "page": "76–100", "back": "51–75",
                      "last": "2976–3000truetrue", "sideways": False, "nodes": True}
    shot = tmp_path / "phone.png"
    open_page(path, "", "--window-size=500,900", f"--screenshot={shot}")
    assert shot.stat().st_size > 10_000


@browser
def test_page_of_a_real_run(real, tmp_path):
    path = tmp_path / "page.html"
    figures.transcripts(real, str(path))
    rows = [json.loads(t) for p in (real / "rollouts").iterdir() for t in gzip.open(p, "rt")]
    cut = sum(r["finish_reason"] == "length" for r in rows)
    assert len(rows) == 8 * 24 and 0 < cut < len(rows)
    html = open_page(path, "#filter=truncated")
    assert f"{cut} of {len(rows)} shown" in html
