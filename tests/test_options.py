"""Options of grpo.py: published defaults, recipes, refusals and the words that help. Nothing is loaded."""
import pytest

import grpo

LATER = {"temperature": 1.0, "clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0, "entropy_coef": 0,
         "tis_cap": 2, "loss": "clip", "loss_agg": "token", "group": 8, "lr": 1e-6}
DEEPSCALER = {**LATER, "temperature": 0.6, "clip_high": 0.2, "kl_coef": 0.001, "entropy_coef": 0.001,
              "tis_cap": 0, "drop_zero_variance": 0, "prompts": 128, "updates": 2, "max_len": 8192,
              "max_prompt_len": 1024, "steps": 1040, "warmup_steps": 0, "grad_clip": 1, "weight_decay": 0.01,
              "model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"}
IMPROVED = {**LATER, "drop_zero_variance": 1, "prompts": 128, "updates": 2, "max_len": 8192}
JUSTRL = {**LATER, "drop_zero_variance": 0, "prompts": 256, "updates": 4, "max_len": 15360, "steps": 4380,
          "warmup_steps": 10, "weight_decay": 0.1}
BOUNDS = {"loss": "cispo", "clip_low": 1, "clip_high": 4}


@pytest.mark.parametrize("argv, expected", [
    ("", DEEPSCALER), ("--recipe deepscaler --recompute -1", DEEPSCALER),
    ("--recipe improved", IMPROVED), ("--recipe=justrl", JUSTRL),
    ("--clip_high 0.3 --recipe justrl", {**JUSTRL, "clip_high": 0.3}),
    ("--loss cispo", {**DEEPSCALER, **BOUNDS}), ("--loss=cispo --recipe justrl", {**JUSTRL, **BOUNDS}),
    ("--recipe improved --clip_high 2 --loss cispo", {**IMPROVED, **BOUNDS, "clip_high": 2})])
def test_recipes(argv, expected, monkeypatch, capsys):
    """The default is the published first stage. Given by hand wins over --loss, and that over --recipe, in
    any order. --help shows the outcome in groups, each default once."""
    args = vars(grpo.parse_args(argv.split()))
    assert {name: args[name] for name in expected} == expected
    assert args["eval_data"].endswith("aime24.jsonl") and args["recompute"] in (0, 1)
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        grpo.parse_args([*argv.split(), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("temperature", "max_len", "clip_low"):
        row = text.split(f" --{name} ")[1].split(" --")[0]
        assert row.count("default") == 1 and f"(default: {args[name]})" in row
    assert "optimizer:" in text and "validation:" in text and "None" not in text


@pytest.mark.parametrize("options, words", [
    ("--group 1", "--group must be finite and at least 2"), ("--temperature 0", "--temperature"),
    ("--prompts 5", "cannot be cut into 2 equal mini-batches"), ("--lr nan", "--lr"), ("--lr inf", "--lr"),
    ("--eval_top_p 1.5", "--eval_top_p"), ("--recompute 2", "--recompute"), ("--keep -1", "--keep"),
    ("--max_length 9", "did you mean --max_len?"), ("--difficulty rates.jsonl", "data.py select"),
    ("--difficulty=rates.jsonl", "data.py select"), ("--ref_model x", "--model"),
    ("--recipe deepscale", "invalid choice")])
def test_refusals(capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        grpo.parse_args(options.split())
    assert stop.value.code == 2 and words in capsys.readouterr().err
