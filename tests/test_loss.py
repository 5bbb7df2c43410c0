"""group_advantages, grpo_loss and mismatch by hand, in float64, so that no bound depends on the processor.

test_against_trl_verl.py holds them against other people's code, also in float32 and in micro-batches. There
are the sums over tokens and sequences, the entropy bonus, the engine's weight, wild tokens.
"""
import doctest
import math

import pytest
import torch

import grpo
import policy
import rollout
from grpo import group_advantages, grpo_loss, mismatch


@pytest.mark.parametrize("module", [grpo, policy, rollout])
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


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


def test_kl_pulls_towards_the_reference():
    """DeepScaleR's own 8K run had this sign flipped. Without advantages a step downhill reduces the KL."""
    logp, ref = doubles(-1, -3).requires_grad_(), doubles(-2, -1)
    loss, stats = grpo_loss(logp, None, doubles(0, 0), ref_logp=ref, kl_coef=0.1)
    d = ref - logp.detach()
    assert loss > 0 and same(loss, 0.1 * (d.exp() - d - 1).mean()) and same(stats["kl_ref"], 20 * loss.item())
    g = gradient(loss, logp)
    assert g[0] > 0 and g[1] < 0  # downhill moves -1 to -2 and -3 to -1


@pytest.mark.parametrize("options, word", [
    ({"agg": "const"}, "total"), ({"agg": "mean"}, "mean"), ({"loss": "ppo"}, "ppo")])
def test_loss_refuses(options, word):
    with pytest.raises(ValueError, match=word):
        grpo_loss(doubles(-1), None, doubles(1), **options)


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
