"""make_golden.py - asks TRL and verl what loss and gradient *they* compute, and writes it down.

    pip install torch trl==1.16.0 tensordict codetiming orjson pyvers omegaconf hydra-core pillow
    pip install --no-deps verl==0.9.1     # its own list asks for ray and an older transformers: not needed
    python tests/data/make_golden.py      # rewrites golden_losses.json beside it

No line of either project is copied here. Their functions are called as they are, with only the model's
forward pass and the network of processes replaced by stand-ins:

  TRL   GRPOTrainer._generate_and_score_completions (advantages, truncated importance weights), then
        _compute_loss, both unbound, on a namespace that has the attributes of a trainer.
  verl  core_algos.compute_grpo_outcome_advantage, rollout_corr_helper.compute_rollout_correction_weights, and
        workers.utils.losses.ppo_loss, which puts a policy loss ("vanilla" or "cispo"), agg_loss and
        kl_penalty("low_var_kl") together with the signs verl trains with. `ray`, which verl imports but these
        functions never use, is stubbed during the import.

The file holds the inputs as well (multiples of 1/128, so float32, float64 and JSON hold them exactly), and
the results in float64. test_against_trl_verl.py holds grpo_loss against them, with neither project installed.
"""
import functools
import importlib
import importlib.util
import json
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

GOLDEN = Path(__file__).resolve().parent / "golden_losses.json"
VERSIONS = {"trl": "1.16.0", "verl": "0.9.1"}
EPS = {"trl": 1e-4, "verl": 1e-6}  # each adds its own to the standard deviation of a group
AGGREGATIONS = {  # ours -> theirs
    "trl": {"token": "dapo", "seq": "grpo", "const": "dr_grpo"},
    "verl": {"token": "token-mean", "seq": "seq-mean-token-mean", "const": "seq-mean-token-sum-norm"},
}
# verl clips the loss of a negative advantage a second time, at ratio clip_ratio_c (default 3). grpo_loss
# leaves that out on purpose, as DeepScaleR's verl had it not. No ratio is this large: verl clamps at exp(20)
NO_DUAL_CLIP = 1e10

MAX_LEN = 16
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
# without a lower bound, which TRL's cispo does not have. The cap is low, so that many ratios reach it
CISPO = {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.28}
EVERY_TERM = {"kl_coef": 0.1, "entropy_coef": 0.05, "tis_cap": 1.25}
CASES = {  # name -> (batch, arguments of grpo_loss). kl_coef is large so that its sign cannot hide
    "symmetric": ("usual", {"clip_low": 0.2, "clip_high": 0.2}),
    "asymmetric": ("usual", CLIP),
    "kl": ("usual", {**CLIP, "kl_coef": 0.1}),
    "on_policy": ("usual", {"on_policy": True, "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.1}),
    "tis": ("usual", {**CLIP, "tis_cap": 1.25}),
    "kl_tis": ("usual", {"clip_low": 0.1, "clip_high": 0.3, "kl_coef": 0.1, "tis_cap": 1.25}),
    "entropy": ("usual", {**CLIP, **EVERY_TERM}),
    "cispo": ("usual", CISPO),
    "cispo_two_sided": ("usual", {**CISPO, "clip_low": 0.2}),
    "cispo_on_policy": ("usual", {"on_policy": True, **CISPO, "kl_coef": 0.1}),
    "cispo_kl": ("usual", {**CISPO, "kl_coef": 0.1}),
    "cispo_tis": ("usual", {**CISPO, "tis_cap": 1.25}),
    "cispo_entropy": ("usual", {**CISPO, **EVERY_TERM}),
    # differences far beyond 20, so that verl's clamps act: of the log ratio, of k3, of the engine weight's
    # exponent (a cap must be above exp(20) here, or it would act first). TRL has no such clamps
    "wild_ratio": ("wild_ratio", CLIP),
    "wild_ref": ("wild_ref", {**CLIP, "kl_coef": 0.1}),
    "wild_engine": ("wild_engine", {**CLIP, "tis_cap": 1e9}),
    "wild_cispo": ("wild_ratio", {**CISPO, "clip_high": 4.0}),  # the cap acts before any clamp: TRL as well
    "wild_cispo_uncapped": ("wild_ratio", {**CISPO, "clip_high": 1e9}),
}


def comparisons(peer):
    """(case, agg) that this peer has an answer for."""
    for name, (_, options) in CASES.items():
        for agg in AGGREGATIONS[peer]:
            if peer == "verl" or trl_has(name, options, agg):
                yield name, agg


def trl_has(name, options, agg):
    if options.get("loss") == "cispo":  # an upper bound only, a mean over tokens only
        return agg == "token" and options["clip_low"] >= 1 and name != "wild_cispo_uncapped"
    # its entropy bonus is a mean over tokens under every loss type; verl's follows the loss, as ours does
    return not name.startswith("wild") and (agg == "token" or not options.get("entropy_coef"))


# ----- inputs

def grid(x):
    return (x * 128).round() / 128


def make_batch(seed, rewards, lengths, spread):
    """Packed log-probs as plain lists. spread: how far each of old, ref and engine is from the policy."""
    g, n = torch.Generator().manual_seed(seed), sum(lengths)
    batch = {"rewards": rewards, "lengths": lengths,
             "logp": grid(-torch.rand(n, generator=g) * 4 - 1 / 64),
             "entropy": grid(torch.rand(n, generator=g) * 3)}
    for name in ("old", "ref", "engine"):
        difference = grid(torch.randn(n, generator=g) * spread[name])
        base = batch["old_logp" if name == "engine" else "logp"]  # the engine runs the old policy
        batch[f"{name}_logp"] = base - difference
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def make_batches():
    usual = {"old": 0.35, "ref": 0.6, "engine": 0.4}  # e^0.35 = 1.42: half of the tokens leave the clip range
    groups = [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]]
    lengths = [7, 1, MAX_LEN, 3, 5, 2, 9, 12, 4, 11, 1, 6, 8, 2, 10, 3, MAX_LEN, 5, 1, 7]  # MAX_LEN: cut off
    short = [3, MAX_LEN, 1, 6, 2, 9, 4, 5]
    batches = {"usual": make_batch(0, groups, lengths, usual)}
    for i, name in enumerate(("ratio", "ref", "engine")):
        wild = {**usual, {"ratio": "old"}.get(name, name): 60.0}  # some beyond 89: exp is inf in float32
        batches[f"wild_{name}"] = make_batch(i + 1, [groups[0], groups[2]], short, wild)
    return batches


def tensors(batch, dtype):
    """The batch's lists as tensors; logp and entropy are leaves that collect a gradient."""
    out = {k: torch.tensor(v, dtype=dtype) for k, v in batch.items() if k.endswith("logp") or k == "entropy"}
    for name in ("logp", "entropy"):
        out[name].requires_grad_().grad = torch.zeros_like(out[name])
    return SimpleNamespace(**out, rewards=torch.tensor(batch["rewards"], dtype=torch.float32),
                           lengths=torch.tensor(batch["lengths"]))


def padded(packed, lengths):
    """Packed [R] -> [S, MAX_LEN], zero beyond each length. Differentiable."""
    rows = packed.split(lengths.tolist())
    return torch.stack([torch.nn.functional.pad(row, (0, MAX_LEN - len(row))) for row in rows])


def result(loss, b, advantages, clipped, kl):
    """What is compared: the loss, its gradients, the advantages it was computed from, and two statistics."""
    loss.backward()
    return {"loss": loss.item(), "grad": short(b.logp.grad), "entropy_grad": short(b.entropy.grad),
            "advantages": advantages.tolist(), "clipped": clipped, "kl": kl}


def short(tensor):
    return [float(f"{x:.12g}") for x in tensor.tolist()]


# ----- TRL

def trl_rollout(trainer, b):
    """TRL's own step from samples to the inputs of its loss. b answers for the engine and both models."""
    from trl import GRPOTrainer

    lengths, count = b.lengths.tolist(), len(b.lengths)
    completions = [[5] * n for n in lengths]
    trainer._generate = lambda prompts: ([[3]] * count, completions, None, completions,
                                         [x.tolist() for x in b.engine_logp.split(lengths)], {}, None, None)
    trainer._calculate_rewards = lambda *_: b.rewards.reshape(-1, 1)
    trainer._get_per_token_logps_and_entropies = lambda model, *_, **__: (
        padded(b.ref_logp if model is trainer.ref_model else b.old_logp, b.lengths), None, None)
    inputs = GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "?"}] * count)
    assert inputs["completion_mask"].sum(1).tolist() == lengths
    return inputs


def trl_trainer(b, loss_type="dapo", scale_rewards="group", on_policy=False, clip_low=0.2, clip_high=0.2,
                kl_coef=0.0, entropy_coef=0.0, tis_cap=0.0):
    """A namespace with the attributes that the two methods read, one process, no gradient accumulation."""
    alone = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, process_index=0, is_main_process=True,
        sync_gradients=True, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x)
    args = SimpleNamespace(
        steps_per_generation=1, gradient_accumulation_steps=1, per_device_train_batch_size=None,
        gradient_checkpointing_kwargs=None, report_to=[], delta=None, use_bias_correction_kl=False)
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    # num_iterations: 2 makes TRL keep the old log-probs, 1 makes it take the policy's own (the first update)
    return SimpleNamespace(
        accelerator=alone, args=args, model=model, ref_model=object(), state=SimpleNamespace(global_step=0),
        _tokenizer=SimpleNamespace(pad_token_id=0), eos_token_ids=[2], pad_to_multiple_of=None, tools=None,
        environment_factories=None, environments=None, mask_truncated_completions=False, _is_vlm=False,
        num_generations=b.rewards.shape[1], num_iterations=1 if on_policy else 2,
        multi_objective_aggregation="sum_then_normalize", scale_rewards=scale_rewards,
        reward_weights=torch.ones(1), reward_func_names=["r"], reward_funcs=[None],
        _metrics=defaultdict(lambda: defaultdict(list)), _pending_extra_logs={}, _pending_metrics={},
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)), log_multimodal=False,
        use_vllm=tis_cap > 0, vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_clip_max=tis_cap, loss_type=loss_type, beta=kl_coef, epsilon_low=clip_low,
        # for cispo this is the largest weight itself, not its distance from 1
        epsilon_high=1 + clip_high if loss_type == "cispo" else clip_high, aux_loss_enabled=False,
        importance_sampling_level="token", max_completion_length=MAX_LEN, top_entropy_quantile=1.0,
        current_gradient_accumulation_steps=1, off_policy_mask_threshold=None, entropy_coef=entropy_coef,
        _entropy_bonus_enabled=entropy_coef != 0, use_adaptive_entropy=False)


def trl_loss(batch, options, agg, dtype):
    from trl import GRPOTrainer

    b = tensors(batch, dtype)
    options = dict(options)
    cispo = options.pop("loss", "clip") == "cispo"
    trainer = trl_trainer(b, "cispo" if cispo else AGGREGATIONS["trl"][agg], **options)
    inputs = trl_rollout(trainer, b)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        padded(b.logp, b.lengths), padded(b.entropy, b.lengths), None)
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    seen = trainer._metrics["train"]
    kl = seen["kl"][0] if seen["kl"] else None
    # its cispo_clip_ratio does not count the clipped tokens of negative advantages, as verl and we do
    clipped = None if cispo else seen["clip_ratio/region_mean"][0]
    return result(loss, b, inputs["advantages"], clipped, kl)


def trl_advantages(rewards, normalize):
    """[P, G] -> [P, G], on samples of one token, whose log-probs do not matter here."""
    zero = torch.zeros(rewards.numel())
    b = SimpleNamespace(rewards=rewards, lengths=torch.ones_like(zero, dtype=torch.int64), old_logp=zero,
                        ref_logp=zero, engine_logp=zero)
    trainer = trl_trainer(b, scale_rewards={"std": "group", "mean": "none"}[normalize])
    return trl_rollout(trainer, b)["advantages"].reshape(rewards.shape)


# ----- verl

@functools.cache
def verl():
    """verl's modules. `ray` leaves sys.modules again: other code looks there whether it is installed."""
    stub = "ray" not in sys.modules and importlib.util.find_spec("ray") is None
    if stub:
        sys.modules["ray"] = MagicMock()
    try:
        names = {"core": "verl.trainer.ppo.core_algos", "correction": "verl.trainer.ppo.rollout_corr_helper",
                 "losses": "verl.workers.utils.losses", "config": "verl.workers.config"}
        return SimpleNamespace(**{k: importlib.import_module(v) for k, v in names.items()})
    finally:
        if stub:
            del sys.modules["ray"]


def verl_advantages(rewards, normalize, mask=None):
    """[P, G] -> [P, G]; with a mask [S, MAX_LEN] -> [S, MAX_LEN] as verl's loss wants it."""
    groups = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1]).numpy()
    scores = torch.zeros(rewards.numel(), 1) if mask is None else torch.zeros(mask.shape)
    scores[:, 0] = rewards.flatten()  # a reward may stand at any one token of its sample
    advantages, _ = verl().core.compute_grpo_outcome_advantage(
        scores, torch.ones_like(scores) if mask is None else mask, groups,
        norm_adv_by_std_in_grpo=normalize == "std")
    return advantages.reshape(rewards.shape) if mask is None else advantages


def verl_data(b, options, advantages, mask):
    """What verl's trainer hands to its loss."""
    from tensordict import TensorDict

    count = len(b.lengths)
    old = b.logp.detach() if options.get("on_policy") else b.old_logp
    prompts = torch.ones(count, 1, dtype=torch.int64)
    fields = {"prompts": prompts, "responses": mask.long(), "response_mask": mask,
              "attention_mask": torch.cat([prompts, mask.long()], 1),
              "old_log_probs": padded(old, b.lengths), "advantages": advantages.to(mask.dtype)}
    if options.get("kl_coef"):
        fields["ref_log_prob"] = padded(b.ref_logp, b.lengths)
    if options.get("tis_cap"):
        fields["rollout_is_weights"], _ = verl().correction.compute_rollout_correction_weights(
            padded(old - b.engine_logp, b.lengths), mask, "token", options["tis_cap"])
    data = TensorDict(fields, batch_size=count)
    data.set_non_tensor("dp_size", 1)
    data.set_non_tensor("batch_num_tokens", None)  # verl counts this batch, which is the whole one
    data.set_non_tensor("global_batch_size", None)
    return data


def verl_config(options, agg, clip_ratio_c):
    policy_loss = verl().config.PolicyLossConfig(loss_mode=options.get("loss", "vanilla"))
    return verl().config.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=AGGREGATIONS["verl"][agg],
        policy_loss=policy_loss, clip_ratio_low=options["clip_low"], clip_ratio_high=options["clip_high"],
        clip_ratio_c=clip_ratio_c, use_kl_loss="kl_coef" in options, kl_loss_coef=options.get("kl_coef", 0.0),
        kl_loss_type="low_var_kl", entropy_coeff=options.get("entropy_coef", 0.0),
        loss_scale_factor=MAX_LEN if agg == "const" else None)


def verl_loss(batch, options, agg, dtype, clip_ratio_c=NO_DUAL_CLIP):
    b = tensors(batch, dtype)
    mask = (torch.arange(MAX_LEN) < b.lengths[:, None]).to(dtype)
    advantages = verl_advantages(b.rewards, "std", mask.float())
    # verl's model answers for every token, the last prompt token predicting the first of the response
    output = {name: torch.cat([torch.nn.functional.pad(row, (0, 1)) for row in x.split(b.lengths.tolist())])
              for name, x in (("log_probs", b.logp), ("entropy", b.entropy))}
    loss, metrics = verl().losses.ppo_loss(verl_config(options, agg, clip_ratio_c), output,
                                           verl_data(b, options, advantages, mask))
    metrics = {name: float(x.aggregate()) for name, x in metrics.items() if hasattr(x, "aggregate")}
    kl = metrics.get("kl_loss") if agg == "token" else None  # under the others a weighted mean
    return result(loss, b, advantages[:, 0], metrics["actor/pg_clipfrac"], kl)


# ----- the file

def check_inputs(golden):
    """An agreement is worth what its inputs reach: clips on either sign, every clamp, all lengths."""
    b = tensors(golden["batches"]["usual"], torch.float64)
    advantage = torch.tensor(golden["advantages"]["verl"]["std"]).flatten().repeat_interleave(b.lengths)
    ratio, weight = (b.logp - b.old_logp).exp().detach(), (b.old_logp - b.engine_logp).exp()
    for outside in (ratio > 1.3, ratio < 0.8, (ratio > 0.81) & (ratio < 1.19)):
        for sign in (advantage > 0, advantage < 0, advantage == 0):
            assert (outside & sign).sum() >= 3
    assert ((ratio > 1.2) & (ratio < 1.28) & (advantage > 0)).any()  # tells 0.2 and 0.28 apart
    assert (weight > 1.25).sum() > 10 and (weight < 1.25).sum() > 10
    assert 1 in b.lengths and MAX_LEN in b.lengths and len(set(b.lengths.tolist())) > 5
    for name, a, c in (("wild_ratio", "logp", "old_logp"), ("wild_ref", "ref_logp", "logp"),
                       ("wild_engine", "old_logp", "engine_logp")):
        wild = tensors(golden["batches"][name], torch.float64)
        d = (getattr(wild, a) - getattr(wild, c)).detach()
        assert (d > 20).sum() >= 3 and (d < -20).sum() >= 3 and (d > 89).any()  # exp(89) is inf in float32
        assert ((d > 3) & (d < 20)).any() and ((d > -8) & (d < 0)).any()  # k3 clamped at 10, and not


LOSS = {"trl": trl_loss, "verl": verl_loss}
ADVANTAGES = {"trl": trl_advantages, "verl": verl_advantages}


def main():
    batches = make_batches()
    versions = {name: version(name) for name in ("trl", "verl", "torch", "transformers", "tensordict")}
    golden = {"versions": versions, "max_len": MAX_LEN, "batches": batches, "advantages": {}, "losses": {}}
    for peer, expected in VERSIONS.items():
        assert version(peer) == expected, f"{peer} is {version(peer)}; tests and readers expect {expected}"
        golden["advantages"][peer] = {
            n: ADVANTAGES[peer](torch.tensor(batches["usual"]["rewards"], dtype=torch.float32), n).tolist()
            for n in ("std", "mean")}
        golden["losses"][peer] = {}
        for name, agg in comparisons(peer):
            batch, options = CASES[name]
            r = LOSS[peer](batches[batch], options, agg, torch.float64)
            r["entropy_grad"] = r["entropy_grad"] if any(r["entropy_grad"]) else None
            golden["losses"][peer][f"{name}/{agg}"] = r
    check_inputs(golden)
    text = json.dumps(golden).replace('"batches"', '\n"batches"').replace('{"loss"', '\n{"loss"')
    GOLDEN.write_text(text + "\n")
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size / 1024:.0f} KB, "
          + ", ".join(f"{len(v)} losses of {k} {VERSIONS[k]}" for k, v in golden["losses"].items()))


if __name__ == "__main__":
    main()
