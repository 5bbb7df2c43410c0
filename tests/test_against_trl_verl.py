"""grpo_loss and group_advantages against TRL's and verl's own functions: loss, gradient, advantages, two statistics.

Always: against data/golden_losses.json, which make_golden.py wrote from TRL 1.16.0 and verl 0.9.1. Where one of them is
installed (each alone will do; make_golden.py says how): its functions are called again, and both the file and we are
compared with the answer.

  ours      TRL       verl
  "token"   dapo      token-mean
  "seq"     grpo      seq-mean-token-mean
  "const"   dr_grpo   seq-mean-token-sum-norm

What is not compared, because they differ from each other: TRL's entropy bonus under grpo and dr_grpo (always a mean
over tokens there), TRL on log ratios beyond 20 (it has no clamps), verl's dual clip (switched off by a huge
clip_ratio_c; one test shows that verl's default would act).
"""
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import make_golden as peers  # noqa: E402
from grpo import group_advantages, grpo_loss  # noqa: E402

GOLDEN = json.loads(peers.GOLDEN.read_text())
# (loss, gradient), absolute below 1 and relative above. A gradient of the usual cases is about 1e-2; in the wild ones
# it is up to e^20 = 5e8, and the loss a difference of such numbers. In float64 what remains is verl's (length + 1e-8)
# under "seq", and the float32 in which 1 / length (ours), advantages and statistics (theirs) are computed
TOLERANCE = {("usual", torch.float64): (1e-8, 1e-9), ("usual", torch.float32): (1e-6, 1e-8),
             ("wild", torch.float64): (5e-8, 5e-8), ("wild", torch.float32): (5e-6, 2e-7)}
MICRO_BATCHES = {"one": [20], "uneven": [1, 11, 3, 5], "single": [1] * 20}  # sequences of each
EVERY = [(peer, case, agg) for peer in peers.VERSIONS for case, agg in peers.comparisons(peer)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def installed(peer):
    """Skip, saying why, unless the peer is there in the version that make_golden.py knows how to call."""
    if peer == "verl":
        try:  # importing it is make_golden.verl's work: without its stub of ray, verl would always be "missing"
            version("verl")
        except PackageNotFoundError:
            pytest.skip("verl is not installed")
    else:
        pytest.importorskip(peer)
    if version(peer) != peers.VERSIONS[peer]:
        pytest.skip(f"{peer} is {version(peer)}: the calls were written for {peers.VERSIONS[peer]}")


def ours(case, agg, advantages, dtype, sizes=None):
    """grpo_loss on a case as a training step calls it: one call per micro-batch of `sizes` sequences, each divided by
    the global total, gradients adding up. sizes None: one call that finds the total itself, where it can."""
    batch, options = peers.CASES[case]
    options = {k: v for k, v in options.items() if k != "on_policy"}
    on_policy = "on_policy" in peers.CASES[case][1]
    b = peers.tensors(GOLDEN["batches"][batch], dtype)
    sequences, tokens = len(b.lengths), len(b.logp)
    total = {"token": tokens, "seq": sequences, "const": sequences * GOLDEN["max_len"]}[agg]
    if sizes is None:
        sizes, total = [sequences], total if agg == "const" else None
    advantages = torch.tensor(advantages, dtype=dtype)
    loss, clipped, kl, first = 0.0, 0.0, 0.0, 0
    for size in sizes:
        rows = slice(first, min(first + size, sequences))
        if rows.start >= sequences:
            break
        a, z = int(b.lengths[:rows.start].sum()), int(b.lengths[:rows.stop].sum())
        part, stats = grpo_loss(b.logp[a:z], None if on_policy else b.old_logp[a:z], advantages[rows], b.lengths[rows],
                                ref_logp=b.ref_logp[a:z], engine_logp=b.engine_logp[a:z], entropy=b.entropy[a:z],
                                agg=agg, total=total, **options)
        part.backward()
        loss, clipped, kl = loss + part.item(), clipped + stats["clipped"], kl + stats.get("kl_ref", 0.0)
        first += size
    assert first >= sequences
    zero = torch.zeros(tokens)
    return {"loss": loss, "grad": b.logp.grad.tolist(),
            "entropy_grad": (zero if b.entropy.grad is None else b.entropy.grad).tolist(),
            "clipped": float(clipped) / tokens, "kl": float(kl) / tokens}


def distance(a, b):
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
    assert a.shape == b.shape and torch.isfinite(a).all() and torch.isfinite(b).all()
    return ((a - b).abs() / b.abs().clamp(min=1)).max().item()


def check(case, dtype, mine, theirs):
    loss_tolerance, grad_tolerance = TOLERANCE["wild" if case.startswith("wild") else "usual", dtype]
    assert distance(mine["loss"], theirs["loss"]) <= loss_tolerance
    assert distance(mine["grad"], theirs["grad"]) <= grad_tolerance
    assert distance(mine["entropy_grad"], theirs["entropy_grad"] or [0.0] * len(mine["grad"])) <= grad_tolerance
    assert distance(mine["clipped"], theirs["clipped"]) <= 1e-6
    if theirs["kl"] is not None:
        assert distance(mine["kl"], theirs["kl"]) <= 1e-6


@DTYPES
@pytest.mark.parametrize("peer, case, agg", EVERY)
def test_loss_and_gradient_equal_the_golden_file(peer, case, agg, dtype):
    golden = GOLDEN["losses"][peer][f"{case}/{agg}"]
    check(case, dtype, ours(case, agg, golden["advantages"], dtype), golden)


@pytest.mark.parametrize("split", MICRO_BATCHES)
@pytest.mark.parametrize("peer, case, agg", EVERY)
def test_micro_batches_add_up_to_their_whole_batch(peer, case, agg, split):
    """Uneven cuts, with micro-batches of one token and of many: what is wrong with a mean of means shows here."""
    golden = GOLDEN["losses"][peer][f"{case}/{agg}"]
    check(case, torch.float64, ours(case, agg, golden["advantages"], torch.float64, MICRO_BATCHES[split]), golden)


@pytest.mark.parametrize("normalize", ["std", "mean"])
@pytest.mark.parametrize("peer", peers.VERSIONS)
def test_advantages_equal_the_golden_file(peer, normalize):
    rewards = torch.tensor(GOLDEN["batches"]["usual"]["rewards"], dtype=torch.float32)
    mine = group_advantages(rewards, normalize, peers.EPS[peer])
    assert distance(mine.tolist(), GOLDEN["advantages"][peer][normalize]) <= 1e-6
    assert (mine[1] == 0).all() and (mine[3] == 0).all()  # all right, all wrong


@pytest.mark.parametrize("peer", peers.VERSIONS)
def test_the_losses_were_computed_from_these_advantages(peer):
    """The two halves of the file belong together: from rewards to the loss nothing is left uncompared."""
    for (case, agg), golden in ((k.split("/"), v) for k, v in GOLDEN["losses"][peer].items()):
        rewards = torch.tensor(GOLDEN["batches"][peers.CASES[case][0]]["rewards"], dtype=torch.float32)
        mine = group_advantages(rewards, "std", peers.EPS[peer]).flatten()
        assert distance(mine.tolist(), golden["advantages"]) <= 1e-6, (case, agg)


def test_the_cases_reach_every_branch():
    """An agreement is worth what its inputs reach: clips on either sign, every clamp, a length of one, a cut one."""
    assert set(GOLDEN["losses"]) == set(peers.VERSIONS) and GOLDEN["max_len"] == peers.MAX_LEN
    for peer in peers.VERSIONS:
        assert set(GOLDEN["losses"][peer]) == {"/".join(c) for c in peers.comparisons(peer)}
    b = peers.tensors(GOLDEN["batches"]["usual"], torch.float64)
    advantage = group_advantages(b.rewards).flatten().repeat_interleave(b.lengths)
    ratio, weight = (b.logp - b.old_logp).exp().detach(), (b.old_logp - b.engine_logp).exp()
    for outside in (ratio > 1.3, ratio < 0.8, (ratio > 0.81) & (ratio < 1.19)):
        for sign in (advantage > 0, advantage < 0, advantage == 0):
            assert (outside & sign).sum() >= 3
    assert ((ratio > 1.2) & (ratio < 1.28) & (advantage > 0)).any()  # tells 0.2 and 0.28 apart
    assert (weight > 1.25).sum() > 10 and (weight < 1.25).sum() > 10
    assert 1 in b.lengths and GOLDEN["max_len"] in b.lengths and len(set(b.lengths.tolist())) > 5
    for name, a, c in (("wild_ratio", "logp", "old_logp"), ("wild_ref", "ref_logp", "logp"),
                       ("wild_engine", "old_logp", "engine_logp")):
        wild = peers.tensors(GOLDEN["batches"][name], torch.float64)
        d = (getattr(wild, a) - getattr(wild, c)).detach()
        assert (d > 20).sum() >= 3 and (d < -20).sum() >= 3 and (d > 89).any()  # exp(89) is inf in float32
        assert ((d > 3) & (d < 20)).any() and ((d > -8) & (d < 0)).any()  # k3 clamped at 10 by either end, and not


# ----- with the peers themselves

def compare_live(peer, case, agg, dtype):
    batch, options = peers.CASES[case]
    live = peers.LOSS[peer](GOLDEN["batches"][batch], options, agg, dtype)
    golden = GOLDEN["losses"][peer][f"{case}/{agg}"]
    check(case, dtype, live, golden)
    assert distance(live["advantages"], golden["advantages"]) <= 1e-6
    check(case, dtype, ours(case, agg, live["advantages"], dtype), live)


@DTYPES
@pytest.mark.parametrize("case, agg", list(peers.comparisons("trl")))
def test_trl_itself(case, agg, dtype):
    installed("trl")
    compare_live("trl", case, agg, dtype)


@DTYPES
@pytest.mark.parametrize("case, agg", list(peers.comparisons("verl")))
def test_verl_itself(case, agg, dtype):
    installed("verl")
    compare_live("verl", case, agg, dtype)


@pytest.mark.parametrize("normalize", ["std", "mean"])
@pytest.mark.parametrize("peer", peers.VERSIONS)
def test_advantages_of_the_peer_itself(peer, normalize):
    installed(peer)
    rewards = torch.tensor(GOLDEN["batches"]["usual"]["rewards"], dtype=torch.float32)
    live = peers.ADVANTAGES[peer](rewards, normalize)
    assert distance(live.tolist(), GOLDEN["advantages"][peer][normalize]) <= 1e-6
    assert distance(group_advantages(rewards, normalize, peers.EPS[peer]).tolist(), live.tolist()) <= 1e-6


def test_verl_clips_twice_by_default_and_we_do_not():
    """The one place where the two differ on purpose: it has to be switched off, or the wild case would not agree."""
    installed("verl")
    batch, options = peers.CASES["wild_ratio"]
    live = peers.verl_loss(GOLDEN["batches"][batch], options, "token", torch.float64, clip_ratio_c=3.0)
    golden = GOLDEN["losses"]["verl"]["wild_ratio/token"]
    assert live["loss"] < golden["loss"] / 1000
    assert distance(ours("wild_ratio", "token", live["advantages"], torch.float64)["loss"], golden["loss"]) <= 1e-8
