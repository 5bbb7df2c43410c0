"""grpo_loss and group_advantages against TRL's and verl's own: loss, gradient, advantages, two statistics.

Always: against data/golden_losses.json, which make_golden.py wrote from TRL 1.16.0 and verl 0.9.1. Where one
of them is installed (each alone will do; make_golden.py says how), its functions are asked again, and the
file must be what they say.

  ours              TRL                         verl
  "clip", "token"   dapo                        vanilla, token-mean
  "clip", "seq"     grpo                        vanilla, seq-mean-token-mean
  "clip", "const"   dr_grpo                     vanilla, seq-mean-token-sum-norm
  "cispo"           cispo, a mean over tokens   cispo, under all three

verl's cispo takes our two bounds (clip_low 1 leaves no lower one). TRL's has no lower bound, and its
epsilon_high is the largest weight itself, our 1 + clip_high. KL, entropy bonus and the engine's truncated
importance weight are those of the clipped loss in all three.

What is not compared, because the two differ from each other:
  - TRL's entropy bonus under grpo and dr_grpo (always a mean over tokens there);
  - TRL on log ratios beyond 20 (it has no clamps), except for cispo, whose cap acts first;
  - TRL's share of clipped tokens under cispo: it counts those of positive advantages, verl and we count all;
  - verl's dual clip (switched off by a huge clip_ratio_c).
"""
import json
import math
from collections import Counter
from importlib.metadata import distributions

import make_golden as peers
import pytest
import torch

from grpo import group_advantages, grpo_loss

GOLDEN = json.loads(peers.GOLDEN.read_text())
# Relative to the scales in `check`. What remains in float64 is exp(-20) = 2e-9, where verl and we clamp and
# TRL does not; in float32 a few roundings of 6e-8, by which two processors differ as well
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-6}
EVERY = [(peer, case, agg) for peer in peers.VERSIONS for case, agg in peers.comparisons(peer)]


def ours(case, agg, advantages, dtype, size=0):
    """grpo_loss on a case as a training step calls it: one call per micro-batch of `size` sequences, each
    divided by the global total, gradients adding up. size 0: one call that finds the total itself."""
    batch, options = peers.CASES[case]
    on_policy, options = options.get("on_policy"), {k: v for k, v in options.items() if k != "on_policy"}
    b, sums = peers.tensors(GOLDEN["batches"][batch], dtype), Counter()
    sequences, tokens = len(b.lengths), len(b.logp)
    total = {"token": tokens, "seq": sequences, "const": sequences * GOLDEN["max_len"]}[agg]
    for first in range(0, sequences, size or sequences):
        rows = slice(first, first + (size or sequences))
        span = slice(int(b.lengths[:first].sum()), int(b.lengths[:rows.stop].sum()))
        part, stats = grpo_loss(
            b.logp[span], None if on_policy else b.old_logp[span],
            torch.tensor(advantages, dtype=dtype)[rows], b.lengths[rows], agg=agg,
            total=total if size or agg == "const" else None, ref_logp=b.ref_logp[span],
            engine_logp=b.engine_logp[span], entropy=b.entropy[span], **options)
        part.backward()
        sums.update({"loss": part.item(), **{name: x.item() for name, x in stats.items()}})
    assert sums["tokens"] == tokens and all(map(math.isfinite, sums.values()))
    assert distance(sums["entropy"], b.entropy.sum().item()) <= TOLERANCE[dtype]
    return {"loss": sums["loss"], "grad": b.logp.grad.tolist(), "entropy_grad": b.entropy.grad.tolist(),
            "clipped": sums["clip_fraction"] / tokens, "kl": sums["kl_ref"] / tokens}


def distance(a, b, scale=1.0):
    """The largest difference, relative to b, or to `scale` where b is smaller."""
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
    assert a.shape == b.shape and torch.isfinite(a).all() and torch.isfinite(b).all()
    return ((a - b).abs() / b.abs().clamp(min=scale)).max().item()


def check(dtype, mine, theirs):
    grad, weight = theirs["grad"], 1 / len(theirs["grad"])  # about what one token weighs
    # wild tokens of either sign may cancel in the loss: what they were is seen in the gradient
    assert distance(mine["loss"], theirs["loss"], max(1.0, sum(map(abs, grad)))) <= TOLERANCE[dtype]
    assert distance(mine["grad"], grad, weight) <= TOLERANCE[dtype]
    entropy_grad = theirs["entropy_grad"] or [0.0] * len(grad)
    assert distance(mine["entropy_grad"], entropy_grad, weight) <= TOLERANCE[dtype]
    for name in ("clipped", "kl"):
        if theirs[name] is not None:
            assert distance(mine[name], theirs[name]) <= 1e-6


@pytest.mark.parametrize("dtype, size", [(torch.float64, 0), (torch.float32, 0), (torch.float64, 20),
                                         (torch.float64, 7), (torch.float64, 1)])
@pytest.mark.parametrize("peer, case, agg", EVERY)
def test_loss_and_gradient(peer, case, agg, dtype, size):
    """In one call, and in uneven micro-batches, of one sequence and of many: what is wrong with a mean of
    means shows there. The advantages are compared as well, from rewards to the loss."""
    theirs = GOLDEN["losses"][peer][f"{case}/{agg}"]
    rewards = torch.tensor(GOLDEN["batches"][peers.CASES[case][0]]["rewards"], dtype=torch.float32)
    mine = group_advantages(rewards, "std", peers.EPS[peer]).flatten()
    assert distance(mine.tolist(), theirs["advantages"]) <= 1e-6
    check(dtype, ours(case, agg, theirs["advantages"], dtype, size), theirs)


@pytest.mark.parametrize("normalize", ["std", "mean"])
@pytest.mark.parametrize("peer", peers.VERSIONS)
def test_advantages(peer, normalize):
    rewards = torch.tensor(GOLDEN["batches"]["usual"]["rewards"], dtype=torch.float32)
    mine = group_advantages(rewards, normalize, peers.EPS[peer])
    assert distance(mine.tolist(), GOLDEN["advantages"][peer][normalize]) <= 1e-6
    assert (mine[1] == 0).all() and (mine[3] == 0).all()  # all right, all wrong


@pytest.mark.parametrize("peer", peers.VERSIONS)
def test_the_file_is_what_the_peer_says(peer):
    """Skipped, unless the peer is there in the version that make_golden.py knows how to call."""
    found = {d.name: d.version for d in distributions()}.get(peer, "not installed")
    if found != peers.VERSIONS[peer]:
        pytest.skip(f"{peer} is {found}: the calls were written for {peers.VERSIONS[peer]}")
    rewards = torch.tensor(GOLDEN["batches"]["usual"]["rewards"], dtype=torch.float32)
    for normalize, golden in GOLDEN["advantages"][peer].items():
        assert distance(peers.ADVANTAGES[peer](rewards, normalize).tolist(), golden) <= 1e-6
    for case, agg in peers.comparisons(peer):
        golden, (batch, options) = GOLDEN["losses"][peer][f"{case}/{agg}"], peers.CASES[case]
        for dtype in TOLERANCE:
            theirs = peers.LOSS[peer](GOLDEN["batches"][batch], options, agg, dtype)
            check(dtype, theirs, golden)
            assert distance(theirs["advantages"], golden["advantages"]) <= 1e-6
