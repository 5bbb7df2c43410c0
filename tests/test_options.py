"""Options of grpo.py: published defaults, recipes, refusals (of evaluate.py too) and the words that help."""
import pytest
from conftest import each_case

import evaluate
import grpo


@each_case("recipes")
def test_recipes(case, monkeypatch, capsys):
    """The default is the published first stage. Given by hand wins over --loss, and that over --recipe, in
    any order. --help shows the outcome in groups, each default once."""
    words, expected = case["words"].split()[1:], case["expected"]
    args = vars(grpo.parse_args(words))
    assert {name: args[name] for name in expected} == expected
    assert args["eval_data"].endswith("aime24.jsonl") and args["recompute"] in (0, 1)
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        grpo.parse_args([*words, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("temperature", "max_len", "clip_low"):
        row = text.split(f" --{name} ")[1].split(" --")[0]
        assert row.count("default") == 1 and f"(default: {args[name]})" in row
    assert "optimizer:" in text and "validation:" in text and "None" not in text


@each_case("refused_options")
def test_refusals(capsys, case):
    program, *words = case["words"].split()
    with pytest.raises(SystemExit, match="2"):
        {"grpo.py": grpo, "evaluate.py": evaluate}[program].parse_args(words)
    assert case["says"] in capsys.readouterr().err
