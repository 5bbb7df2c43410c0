"""The texts are executable documentation: commands are run, numbers compared with files, links followed."""
import importlib
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT, metrics

import data
import evaluate
import reward
import rollout
import schedule

README = (ROOT / "README.md").read_text()
TEXTS = {path.name: path.read_text() for path in [*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md")]}
PROGRAMS = "grpo", "evaluate", "schedule", "figures", "reward"


def block(name, text=README):
    return re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", text, re.DOTALL).group(1)


def commands():
    """(program, its words) of every line of every text that starts one of ours."""
    for name, text in TEXTS.items():
        for code in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in re.sub(r"\\\n", " ", code).splitlines():
                found = re.search(rf"(?:python|torchrun .*?) ({'|'.join(PROGRAMS)})\.py (.*)", line)
                if found and not line.startswith("srun"):
                    yield pytest.param(found[1], found[2], id=f"{name}: {found[1]} {found[2][:50]}")


def test_sizes():
    assert len(README.splitlines()) <= 300 and len(README.split()) <= 2600
    assert len(TEXTS["README.zh.md"].splitlines()) <= 120 and len(TEXTS) <= 6


@pytest.mark.parametrize("program, words", list(commands()))
def test_commands_parse(program, words):
    """Every option and value in a command of a text is one that its program takes."""
    words = shlex.split(words, comments=True)
    module = importlib.import_module(program)
    if program == "reward":
        assert words[::2] == ["--answer", "--gold"]
    elif program == "figures":  # it reads the options and then says that there is no such run
        with pytest.raises(SystemExit, match="figures.py: "):
            module.main(words)
    elif program == "schedule":
        module.parse(words)
    else:
        module.parse_args(words)


@pytest.mark.slow
def test_the_first_training_as_written(tmp_path):
    """All after the installation, in a copy of the repository: real model, real problems, vLLM on the CPU."""
    for item in [*ROOT.glob("*.py"), ROOT / "toy", ROOT / "assets"]:
        (shutil.copytree if item.is_dir() else shutil.copy)(item, tmp_path / item.name)
    training = block("first training", TEXTS["toy.md"]).split("\n", 1)[1]
    one_step = training.replace("--steps 3", "--steps 1")  # the same three times
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", one_step], cwd=tmp_path, capture_output=True,
                          text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "engine vllm" in done.stdout
    line, = metrics(tmp_path / "runs/first")
    assert one_step != training and line["tokens"] > 0 and line["mismatch_kl"] < 5e-4
    assert (tmp_path / "runs/first/checkpoints/000001/hf/model.safetensors").exists()


def test_the_loop_is_quoted_word_for_word():
    quoted = block("loop")
    assert 30 <= len(quoted.splitlines()) <= 40 and quoted in (ROOT / "grpo.py").read_text()


def test_lines_of_the_map():
    rows = re.findall(r"^`(\w+\.py)`\|(\d+)\|", README, re.MULTILINE)
    assert len(rows) == len(list(ROOT.glob("*.py")))
    for name, lines in rows:
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name


def test_names_in_the_texts_exist():
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    code = "".join(p.read_text() for p in ROOT.glob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", "".join(TEXTS.values())))
    assert len(named) >= 10 and all(f"def {name}(" in tests for name in named)
    copied = re.findall(r"`(\w+)`", re.search("To copy.*", README)[0])
    assert len(copied) == 5 and all(f"def {name}(" in code for name in copied)


def test_links_lead_somewhere():
    for name, text in TEXTS.items():
        folder = ROOT if name.startswith("README") else ROOT / "docs"
        titles = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
                  for title in re.findall(r"^#+ (.*)", text, re.MULTILINE)]
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in titles, target
            elif not target.startswith("https://"):
                assert (folder / target).exists(), target


def test_the_example_is_the_walkthroughs():
    cells = json.loads((ROOT / "walkthrough.ipynb").read_text())["cells"]
    printed = "\n".join("".join(out["text"]) for cell in cells for out in cell.get("outputs", []))
    rows = {name: re.search(rf"^{name}[^|]*\|(.*)", README, re.MULTILINE)[1].split("|")
            for name in ("tokens", "reward", "advantage", "update multiplies")}
    found = re.findall(r"^(\d)  reward (\d), (\d+) tokens", printed, re.MULTILINE)
    assert rows["reward"] == [r for _, r, _ in found] and rows["tokens"] == [t for _, _, t in found]
    assert rows["advantage"] == re.search(r"advantages +\[(.*)\]", printed)[1].split(", ")
    assert rows["update multiplies"] == re.findall(r"probability times ([\d.]+)", printed)
    for line in re.findall(r"^\d: (a .*<\|end\|>)", README, re.MULTILINE):
        assert line in printed
    assert f"loss {re.search(r'The loss is ([^,]+)', README)[1]}" in printed
    assert f"tokens R: {re.search(r'.N. = (.+?)[.]', README)[1]}" in printed
    chinese = TEXTS["README.zh.md"]
    assert all(f"| {x} 倍 " in chinese for x in rows["update multiplies"])


def test_the_toys_numbers_are_its_reports():
    report = (ROOT / "assets/toy/run/report.md").read_text()
    shown = re.findall(r"^(?:base|after)[^|]*\|([\d.]+ ± [\d.]+) %\|(\d+)\|(\d+) / (\d+)\|([\d.]+) %$",
                       README, re.MULTILINE)
    scores = re.findall(r"^\| (?:base|stage\d) +\| ([\d.]+ ± [\d.]+) +\|$", report, re.MULTILINE)
    shapes = re.findall(r"^\| (?:base|stage\d) +\| heldout +\| (\d+) +\| (\d+) +\| (\d+) +\| ([\d.]+)",
                        report, re.MULTILINE)
    assert len(shown) == 4 and shown == [(score, *shape) for score, shape in zip(scores, shapes, strict=True)]
    said = re.search(r"> stage1: \[...\] (.*?)\n\n", README, re.DOTALL)[1].replace("\n> ", " ")
    assert said in " ".join(report.split())


def test_staged_against_direct_is_its_file():
    rows, page = json.loads((ROOT / "bench/results/staging.json").read_text())["rows"], TEXTS["toy.md"]
    tokens, seconds = (statistics.geometric_mean(row[f"{name}_ratio"] for row in rows)
                       for name in ("tokens", "seconds"))
    said = f"with {tokens:.2f} of the tokens in {seconds:.2f} times the seconds"
    assert said in " ".join(README.split()) and said in " ".join(page.split())
    for row in rows:
        scores = f"{100 * row['staged_accuracy']:.1f} % | {100 * row['direct_accuracy']:.1f} %"
        ratios = f"{row['tokens_ratio']:.2f} | {row['seconds_ratio']:.2f}"
        assert (f"| {row['seed']} | {row['staged_tokens'] / 1e6:.2f} M | {scores} "
                f"| {row['reached_tokens'] / 1e6:.2f} M | {ratios} |") in page


@pytest.mark.parametrize("row", re.findall(r"^\d of \d+ GB\|.*", README, re.MULTILINE))
def test_memory_is_predicted_as_written(row, capsys):
    _, options, training, generating, hours = row.split("|")
    schedule.main(["--dry_run", *shlex.split(options.strip("`"))])
    said = capsys.readouterr().out
    assert f"training {training}, generating {generating}," in said
    assert round(float(re.search(r"total ([\d.,]+) hours", said)[1].replace(",", ""))) == int(hours)


SMALL_CARDS = re.search(r"One RTX 4090 trains models up to ([\d.]+) B .* T4 .* up to ([\d.]+) B", README)


@pytest.mark.parametrize("options, size", [
    (["--gpu_type", "RTX4090"], SMALL_CARDS[1]),
    (["--gpu_memory_gib", "15", "--dtype", "float32"], SMALL_CARDS[2])])
def test_what_a_small_card_trains(options, size, capsys):
    assert schedule.main(["--dry_run", "--gpus", "1", *options]) == 2
    assert capsys.readouterr().err.count(f"--model to one of up to {size} B parameters") == 3


def test_the_reward_of_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(def score.*?)```", README, re.DOTALL)[1]
    (tmp_path / "readme_reward.py").write_text(code)
    grade = evaluate.load_reward("readme_reward:score", evaluate.STYLES["plain"])
    for text, reward_of in (("Two.", 1.0), ("two " * 1000, 0.5), ("3", 0.0)):
        sample = rollout.Sample([], [], [], "stop", text)
        assert grade(data.Problem("a", "1+1?", "two"), sample) == (reward_of, "scored")


def test_verdicts_of_the_graders_page():
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (right|wrong) \|", TEXTS["grader.md"], re.MULTILINE)
    assert len(rows) > 20
    for answer, gold, verdict in rows:
        right = reward.compute_reward(rf"</think>\boxed{{{answer}}}", gold) == 1
        assert right == (verdict == "right"), (answer, gold)


def test_the_tables_are_those_of_the_files():
    done = subprocess.run([sys.executable, str(ROOT / "bench/tables.py")], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
