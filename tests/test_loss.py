"""group_advantages, grpo_loss and mismatch against formulas written out; the recipes that set their options.

Everything is computed in float64, so that no bound depends on the processor. test_against_trl_verl.py holds
the same functions against other people's code, also in float32 and in micro-batches.
"""
import doctest
import math

import pytest
import torch

import grpo
from grpo import group_advantages, grpo_loss, mismatch


def test_doctests():
    result = doctest.testmod(grpo)
    assert result.attempted and not result.failed


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def batch():
    """-> logp [R], old_logp [R], advantages [S], lengths [S] with R = 18, S = 4."""
    g, lengths = torch.Generator().manual_seed(0), torch.tensor([5, 1, 9, 3])
    logp = (-2 * torch.rand(18, generator=g, dtype=torch.float64)).requires_grad_()
    old = logp.detach() + 0.4 * torch.randn(18, generator=g, dtype=torch.float64)
    return logp, old, torch.randn(4, generator=g, dtype=torch.float64), lengths


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def same(a, b, relative=1e-12):
    b = torch.as_tensor(b, dtype=a.dtype)
    return a.shape == b.shape and (a - b).abs().max() <= relative * b.abs().max()


# ----- advantages

def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    std = group_advantages(rewards)
    assert same(std[0], [1.5, -0.5, -0.5, -0.5], 1e-5)  # the std of 1, 0, 0, 0 is 0.5 with n - 1; eps is 1e-6
    assert torch.equal(std[1:], torch.zeros(2, 4))
    assert group_advantages(rewards, "mean")[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    # the float mean of 0.1 x 7 is not 0.1; dividing the rounding error by eps would make an advantage of it
    assert torch.equal(group_advantages(torch.full((3, 7), 0.1)), torch.zeros(3, 7))


@pytest.mark.parametrize("rewards, normalize, word", [
    (torch.ones(4, 1), "std", "two"), (torch.ones(4), "std", "two"), (torch.ones(2, 2), "var", "var"),
    (torch.tensor([[1.0, math.nan]]), "std", "finite"), (torch.tensor([[1.0, math.inf]]), "mean", "finite")])
def test_advantages_refuse(rewards, normalize, word):
    with pytest.raises(ValueError, match=word):
        group_advantages(rewards, normalize)


# ----- the loss

def test_zero_loss_does_not_mean_zero_gradient():
    """What every reader asks: balanced advantages and ratio 1 give loss 0, and a gradient all the same."""
    logp = doubles(-1, -2).requires_grad_()
    loss, stats = grpo_loss(logp, None, doubles(1, -1))
    assert loss.item() == 0 and stats["approx_kl"] == 0 and stats["ratio_mean"] == 2
    assert same(gradient(loss, logp), [-0.5, 0.5])


@pytest.mark.parametrize("loss, low, weights, slopes, clipped", [
    ("clip", 0.2, [1.28, 0.5, 1.5, 0.8], [0, 0.5, 1.5, 0], 2),
    ("cispo", 0.2, [1.28, 0.8, 1.28, 0.8], [1.28, 0.8, 1.28, 0.8], 4),
    ("cispo", 1.0, [1.28, 0.5, 1.28, 0.5], [1.28, 0.5, 1.28, 0.5], 2)])
def test_clipping_by_hand(loss, low, weights, slopes, clipped):
    """Four corners. clip: only a step that goes too far in the direction of its advantage loses its gradient.
    cispo: the weight is bounded and has no gradient itself; every token keeps its gradient."""
    ratios, advantages = doubles(1.5, 0.5, 1.5, 0.5), doubles(1, 1, -1, -1)
    logp, weights = ratios.log().requires_grad_(), doubles(*weights)
    value, stats = grpo_loss(logp, torch.zeros_like(ratios), advantages, loss=loss, clip_low=low,
                             clip_high=0.28)
    assert same(value, -(weights * advantages * (ratios.log() if loss == "cispo" else 1)).mean())
    assert same(gradient(value, logp), -doubles(*slopes) * advantages / 4)
    assert stats["clip_fraction"] == clipped and stats["tokens"] == 4
    assert same(stats["pg_loss"], 4 * value.item()) and same(stats["ratio_mean"], 4)
    assert same(stats["approx_kl"], (ratios - 1 - ratios.log()).sum())


def test_no_old_log_probs_and_advantages_of_samples_are_shorthands():
    logp, _, advantages, lengths = batch()
    per_token = torch.cat([a.repeat(n) for a, n in zip(advantages, lengths.tolist())])
    a = grpo_loss(logp, None, advantages, lengths)[0]
    b = grpo_loss(logp, logp.detach().clone(), per_token)[0]
    assert torch.equal(a, b) and torch.equal(gradient(a, logp), gradient(b, logp))


def test_kl_pulls_towards_the_reference():
    """DeepScaleR's own 8K run had this sign flipped. Without advantages a step downhill reduces the KL."""
    logp, ref = doubles(-1, -3).requires_grad_(), doubles(-2, -1)
    loss, stats = grpo_loss(logp, None, doubles(0, 0), ref_logp=ref, kl_coef=0.1)
    d = ref - logp.detach()
    assert loss > 0 and same(loss, 0.1 * (d.exp() - d - 1).mean()) and same(stats["kl_ref"], 20 * loss.item())
    g = gradient(loss, logp)
    assert g[0] > 0 and g[1] < 0  # downhill moves -1 to -2 and -3 to -1


@pytest.mark.parametrize("loss", ["clip", "cispo"])
def test_clamps_keep_wild_tokens_finite(loss):
    logp = torch.tensor([-500.0, -1.0], requires_grad=True)
    old, ref, engine = torch.tensor([[-1.0, -500.0], [0.0, -900.0], [-300.0, -1.0]])
    value, stats = grpo_loss(logp, old, torch.tensor([1.0, -1.0]), loss=loss, ref_logp=ref, kl_coef=1.0,
                             engine_logp=engine, tis_cap=2.0)
    assert all(torch.isfinite(x).all() for x in (value, gradient(value, logp), *stats.values()))


def test_entropy_bonus_and_truncated_importance_weight_by_hand():
    logp, entropy = doubles(0, 0, 0).requires_grad_(), doubles(1, 2, 3).requires_grad_()
    engine = doubles(0, -5, 0.5)  # weights 1, e^5 capped at 2, e^-0.5
    loss, stats = grpo_loss(logp, None, doubles(1, 1, 1), entropy=entropy, entropy_coef=0.01,
                            engine_logp=engine, tis_cap=2.0)
    assert same(gradient(loss, entropy), [-0.01 / 3] * 3) and stats["entropy"] == 6
    assert same(gradient(loss, logp), [-1 / 3, -2 / 3, -math.exp(-0.5) / 3])


def test_aggregations_by_hand():
    logp, old, advantages, lengths = batch()
    per_token = -(advantages.repeat_interleave(lengths) * (logp - old).exp()).detach()
    per_sequence = torch.stack([x.mean() for x in per_token.split(lengths.tolist())])
    wide = {"clip_low": 1.0, "clip_high": 1e9}
    assert same(grpo_loss(logp, old, advantages, lengths, **wide)[0], per_token.mean())
    assert same(grpo_loss(logp, old, advantages, lengths, agg="seq", **wide)[0], per_sequence.mean())
    const = grpo_loss(logp, old, advantages, lengths, agg="const", total=4 * 16, **wide)[0]
    assert same(const, per_token.sum() / 64)


@pytest.mark.parametrize("options, word", [({"agg": "const"}, "total"), ({"agg": "mean"}, "mean"),
                                           ({"loss": "ppo"}, "ppo")])
def test_loss_refuses(options, word):
    with pytest.raises(ValueError, match=word):
        grpo_loss(*batch(), **options)


def test_empty_micro_batch_is_a_zero_that_backpropagates():
    """A rank without sequences still takes part: its loss is 0 and has a graph."""
    x = torch.ones(3, requires_grad=True)
    loss, stats = grpo_loss(x[:0] * 2, None, torch.zeros(1), torch.zeros(1, dtype=torch.int64), total=10)
    loss.backward()
    assert loss == 0 and stats["tokens"] == 0 and torch.equal(x.grad, torch.zeros(3))


def test_mismatch_by_hand():
    logp, d = doubles(-1, -2, -0.1), doubles(-0.3, 0.2, -1)  # e^-1 is outside [1/2, 2]
    equal, stale = mismatch(logp, logp), mismatch(logp, logp - d)
    assert [equal[f"mismatch_{name}"].item() for name in ("mean", "kl", "mult", "far")] == [0, 0, 3, 0]
    assert same(stale["mismatch_mean"], 1.5) and stale["mismatch_far"] == 1
    assert same(stale["mismatch_kl"], (d.exp() - 1 - d).sum())  # d is trainer - engine, not the reverse
    assert same(stale["mismatch_mult"], d.abs().exp().sum())
    tiny = mismatch(torch.full((4,), -1.0), torch.full((4,), -1.0 - 2**-14))  # float32 inputs, as in a run
    assert same(tiny["mismatch_kl"], 4 * 2**-29, 1e-4)  # d^2 / 2; computed in float32 it would be 0


# ----- recipes

LATER = {"temperature": 1.0, "clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0, "entropy_coef": 0,
         "tis_cap": 2, "loss": "clip", "loss_agg": "token", "group": 8, "lr": 1e-6}
DEEPSCALER = {**LATER, "temperature": 0.6, "clip_high": 0.2, "kl_coef": 0.001, "entropy_coef": 0.001,
              "tis_cap": 0, "drop_zero_variance": 0, "prompts": 128, "updates": 2, "max_len": 8192,
              "warmup_steps": 0}
IMPROVED = {**LATER, "drop_zero_variance": 1, "prompts": 128, "updates": 2, "max_len": 8192}
JUSTRL = {**LATER, "drop_zero_variance": 0, "prompts": 256, "updates": 4, "max_len": 15360, "steps": 4380,
          "warmup_steps": 10, "weight_decay": 0.1}
BOUNDS = {"loss": "cispo", "clip_low": 1, "clip_high": 4}


@pytest.mark.parametrize("argv, expected", [
    ("", DEEPSCALER), ("--recipe deepscaler", DEEPSCALER), ("--recipe improved", IMPROVED),
    ("--recipe=justrl", JUSTRL), ("--clip_high 0.3 --recipe justrl", {**JUSTRL, "clip_high": 0.3}),
    ("--loss cispo", {**DEEPSCALER, **BOUNDS}), ("--loss=cispo --recipe justrl", {**JUSTRL, **BOUNDS}),
    ("--recipe improved --clip_high 2 --loss cispo", {**IMPROVED, **BOUNDS, "clip_high": 2})])
def test_recipes(argv, expected, monkeypatch, capsys):
    """Given by hand wins over --loss, and that over --recipe, in any order. --help shows the outcome."""
    args = vars(grpo.parse_args(argv.split()))
    assert {name: args[name] for name in expected} == expected
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        grpo.parse_args([*argv.split(), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("temperature", "max_len", "clip_low"):
        assert f"(default: {args[name]})" in text.split(f" --{name} ")[1].split(" --")[0]
