"""group_advantages and grpo_loss against the formulas written out, and the traps that ruin runs silently."""
import doctest

import pytest
import torch

import grpo
import policy
import rollout
from grpo import group_advantages, grpo_loss, mismatch


@pytest.mark.parametrize("module", [grpo, policy, rollout], ids=lambda m: m.__name__)
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def batch(seed=0, lengths=(5, 1, 9, 3)):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logp = (-2 * torch.rand(n, generator=g)).requires_grad_()
    old = logp.detach() + 0.4 * torch.randn(n, generator=g)
    return logp, old, torch.randn(len(lengths), generator=g), torch.tensor(lengths)


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    std = group_advantages(rewards)
    assert torch.allclose(std[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-4)  # std of 1,0,0,0 is 0.5 with n-1
    assert torch.equal(std[1:], torch.zeros(2, 4))
    assert torch.allclose(group_advantages(rewards, "mean")[0], torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_constant_group_of_awkward_rewards_is_exactly_zero():
    # the float mean of 0.1 x 7 is not 0.1; dividing the rounding error by eps would make an advantage of it
    assert torch.equal(group_advantages(torch.full((3, 7), 0.1)), torch.zeros(3, 7))


@pytest.mark.parametrize("rewards, word", [(torch.ones(4, 1), "two"), (torch.ones(4), "two"),
                                           (torch.tensor([[1.0, float("nan")]]), "finite")])
def test_advantages_refuse(rewards, word):
    with pytest.raises(ValueError, match=word):
        group_advantages(rewards)


def test_zero_loss_does_not_mean_zero_gradient():
    """The question every reader asks: balanced advantages and ratio 1 give loss 0, and a gradient all the same."""
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, _ = grpo_loss(logp, None, torch.tensor([1.0, -1.0]))
    assert loss.item() == 0
    assert torch.allclose(gradient(loss, logp), torch.tensor([-0.5, 0.5]))


def test_clipping_by_hand():
    """Four corners: only a step that goes too far in the direction of its advantage loses its gradient."""
    old, ratios = torch.zeros(4), torch.tensor([1.5, 0.5, 1.5, 0.5])
    logp = ratios.log().requires_grad_()
    loss, stats = grpo_loss(logp, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), clip_low=0.2, clip_high=0.28)
    assert torch.allclose(loss, (-torch.tensor([1.28, 0.5, -1.5, -0.8])).mean())
    assert torch.allclose(gradient(loss, logp), torch.tensor([0, -0.5, 1.5, 0]) / 4)
    assert stats["clipped"] == 2


def test_kl_pulls_towards_the_reference():
    """DeepScaleR's own 8K run had this sign flipped. With no advantage, a step down the gradient must reduce the KL."""
    logp = torch.tensor([-1.0, -3.0], requires_grad=True)
    ref = torch.tensor([-2.0, -1.0])
    loss, _ = grpo_loss(logp, None, torch.zeros(2), ref_logp=ref, kl_coef=0.1)
    assert loss > 0
    g = gradient(loss, logp)
    assert g[0] > 0 and g[1] < 0  # descent moves -1.0 down to -2.0 and -3.0 up to -1.0
    d = ref - logp.detach()
    assert torch.allclose(loss, 0.1 * (d.exp() - d - 1).mean())


def test_clamps_keep_a_wild_token_finite():
    logp = torch.tensor([-500.0, -1.0], requires_grad=True)
    loss, _ = grpo_loss(logp, torch.tensor([-1.0, -500.0]), torch.tensor([1.0, -1.0]), ref_logp=torch.tensor([0.0, -900.0]),
                        kl_coef=1.0)
    assert torch.isfinite(loss) and torch.isfinite(gradient(loss, logp)).all()


def test_entropy_bonus_rewards_entropy():
    logp, entropy = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    loss, _ = grpo_loss(logp, None, torch.zeros(3), entropy=entropy, entropy_coef=0.01)
    assert torch.allclose(gradient(loss, entropy), torch.full((3,), -0.01 / 3))


def test_truncated_importance_weight():
    logp = torch.zeros(3, requires_grad=True)
    engine = torch.tensor([0.0, -5.0, 0.5])  # weights 1, e^5 capped at 2, e^-0.5
    loss, _ = grpo_loss(logp, None, torch.ones(3), engine_logp=engine, tis_cap=2.0)
    assert torch.allclose(gradient(loss, logp), -torch.tensor([1.0, 2.0, 0.60653]) / 3, atol=1e-5)


def test_aggregations_by_hand():
    logp, old, adv, lengths = batch()
    per_token = -(adv.repeat_interleave(lengths) * (logp - old).exp())
    wide = dict(clip_low=0.99, clip_high=1e9)
    per_seq = torch.stack([x.mean() for x in per_token.split(lengths.tolist())])
    assert torch.allclose(grpo_loss(logp, old, adv, lengths, **wide)[0], per_token.mean())
    assert torch.allclose(grpo_loss(logp, old, adv, lengths, agg="seq", **wide)[0], per_seq.mean())
    assert torch.allclose(grpo_loss(logp, old, adv, lengths, agg="const", total=4 * 16, **wide)[0], per_token.sum() / 64)
    with pytest.raises(ValueError, match="total"):
        grpo_loss(logp, old, adv, lengths, agg="const")


@pytest.mark.parametrize("agg, total", [("token", 18), ("seq", 4), ("const", 4 * 16)])
def test_cutting_the_batch_does_not_change_the_gradient(agg, total):
    logp, old, adv, lengths = batch()
    whole = gradient(grpo_loss(logp, old, adv, lengths, agg=agg, total=total)[0], logp)
    parts = 0
    for a, b in [(0, 1), (1, 4)]:
        t = slice(lengths[:a].sum(), lengths[:b].sum())
        parts = parts + gradient(grpo_loss(logp[t], old[t], adv[a:b], lengths[a:b], agg=agg, total=total)[0], logp)
    assert torch.allclose(whole, parts, atol=1e-8)


def test_no_old_means_this_very_policy():
    logp, _, adv, lengths = batch()
    a = grpo_loss(logp, None, adv, lengths)[0]
    b = grpo_loss(logp, logp.detach().clone(), adv, lengths)[0]
    assert torch.equal(a, b) and torch.equal(gradient(a, logp), gradient(b, logp))


def test_mismatch_is_zero_for_equal_and_large_for_stale():
    logp = torch.tensor([-1.0, -2.0, -0.1])
    same, stale = mismatch(logp, logp), mismatch(logp, logp + torch.tensor([0.3, -0.2, 1.0]))
    assert same["gap"] == same["gap_kl"] == same["gap_far"] == 0 and same["gap_mult"] == 3
    assert stale["gap_kl"] / 3 > 5e-4 and stale["gap_far"] == 1 and torch.isclose(stale["max_gap"], torch.tensor(1.0).double())


def test_empty_micro_batch_is_a_zero_that_backpropagates():
    """A rank without sequences still takes part: its loss is 0 and has a graph."""
    x = torch.ones(3, requires_grad=True)
    logp = x[:0] * 2
    loss, stats = grpo_loss(logp, None, torch.zeros(1), torch.zeros(1, dtype=torch.int64), total=10)
    loss.backward()
    assert loss == 0 and stats["tokens"] == 0 and torch.equal(x.grad, torch.zeros(3))
