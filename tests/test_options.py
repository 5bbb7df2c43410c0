"""Options of grpo.py: published defaults, recipes, refusals and the words that help. Nothing is loaded."""
import pytest

import grpo

BASIC = ("model", "prompts", "group", "updates", "max_len", "max_prompt_len", "steps", "temperature", "lr")


def values(args, *names):
    return tuple(getattr(args, n) for n in names)


def test_defaults_are_the_published_first_stage():
    a = grpo.parse_args([])
    assert values(a, *BASIC) == \
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 128, 8, 2, 8192, 1024, 1040, 0.6, 1e-6)
    assert values(a, "clip_low", "clip_high", "kl_coef", "entropy_coef", "grad_clip", "weight_decay") == \
        (0.2, 0.2, 0.001, 0.001, 1.0, 0.01)
    rest = values(a, "loss_agg", "drop_zero_variance", "tis_cap", "loss", "warmup_steps")
    assert rest == ("token", 0, 0, "clip", 0)
    assert a.eval_data.endswith("aime24.jsonl")


def test_the_documented_default_of_recompute_is_accepted():
    assert grpo.parse_args(["--recompute", "-1"]).recompute in (0, 1)


@pytest.mark.parametrize("options, words", [
    (["--group", "1"], "--group must be finite and at least 2"),
    (["--prompts", "5"], "cannot be cut into 2 equal mini-batches"),
    (["--temperature", "0"], "--temperature"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "inf"], "--lr"),
    (["--eval_top_p", "1.5"], "--eval_top_p"),
    (["--recompute", "2"], "--recompute"),
    (["--keep", "-1"], "--keep"),
    (["--max_length", "9"], "did you mean --max_len?"),
    (["--difficulty", "rates.jsonl"], "data.py select"),
    (["--difficulty=rates.jsonl"], "data.py select"),
    (["--ref_model", "x"], "--model"),
    (["--recipe", "deepscale"], "invalid choice"),
])
def test_refusals(capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        grpo.parse_args(options)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_help_has_groups_and_each_default_once(capsys):
    with pytest.raises(SystemExit):
        grpo.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    row = text[text.rindex("--temperature"):text.rindex("--advantage")]
    assert row.count("default") == 1 and "(default: 0.6)" in row
    assert "optimizer:" in text and "validation:" in text and "None" not in text
