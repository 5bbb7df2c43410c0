"""grpo.py - one stage of DeepScaleR: GRPO with a 0/1 answer-checking reward.

    torchrun --nproc_per_node 8 grpo.py --max_len 8192                # 8 GPUs; more nodes: --nnodes ...
    python grpo.py --model DIR --data FILE --max_len 256 --out RUN    # one process, GPU or laptop
    python grpo.py --out RUN --resume ...                             # go on from the newest checkpoint
    touch RUN/stop                                                    # save and leave after this step

One step: P problems are answered G times each. A right answer earns 1, a wrong one 0. The advantage of an
answer is its reward compared with the other answers to the same problem. A clipped policy gradient moves the
probability of every response token, and the engine gets the new weights. `train` shows this on one screen.

What differs from GRPO as published: every token of a mini-batch weighs the same (a mean over each response
favours short right and long wrong answers); the gap between engine and trainer can be corrected (--tis_cap).
What differs from DeepScaleR as run: the KL term has the right sign (its 8K stage maximised the KL), losses
divide by the global token count (it summed means), `</think>` alone closes the thought.
Left out on purpose: value models, reward models, tools, LoRA, asynchronous rollouts.

Shapes: P prompts, G samples of each, S sequences of a micro-batch, R their response tokens, end to end.
"""
import argparse
import gzip
import importlib
import json
import math
import os
import resource
import shutil
import sys
import textwrap
import time
import uuid
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer

import common
import data
import evaluate
import policy as policy_lib
from common import RankError, say, together
from rollout import Sampling, compute_dtype, make_engine, rollout

HERE = os.path.dirname(os.path.abspath(__file__))
RECIPES = {
    # DeepScaleR's first stage: its scripts and the defaults they left on
    "deepscaler": {},
    # what JustRL, Archer, POLARIS and Skywork-OR1 found better since
    "improved": {"temperature": 1.0, "clip_high": 0.28, "kl_coef": 0.0, "entropy_coef": 0.0, "tis_cap": 2.0,
                 "drop_zero_variance": 1},
    # JustRL (2512.16649): one long stage, no KL, no entropy bonus, nothing filtered
    "justrl": {"temperature": 1.0, "clip_high": 0.28, "kl_coef": 0.0, "entropy_coef": 0.0, "tis_cap": 2.0,
               "prompts": 256, "updates": 4, "max_len": 15360, "steps": 4380, "warmup_steps": 10,
               "weight_decay": 0.1},
}
CISPO = {"clip_low": 1.0, "clip_high": 4.0}  # no lower bound (MiniMax-M1), weights up to 5 (TRL's advice)
MEMORY = ": lower --token_budget, --gpu_memory or --max_len, or use more ranks"
MAX_SKIPS = 5                                # updates in a row that are not finite and end a run
DAMAGED = ("the weights are damaged. They are not saved, the last good checkpoint stays. Resuming repeats "
           "what broke them, so change something: a lower --lr or --grad_clip, or --dtype float32")


# ------------------------------------------------------------------------------------------------------------
# The algorithm
# ------------------------------------------------------------------------------------------------------------

def group_advantages(rewards, normalize="std", eps=1e-6):
    """[P, G] rewards -> [P, G] advantages: each sample against the other answers to its own problem.

    normalize "std": (r - mean) / (std + eps) with the unbiased std (DeepSeekMath 2402.03300, as in verl).
    "mean": r - mean (Dr. GRPO 2503.20783: the std overweights nearly solved and nearly hopeless problems).
    A group whose rewards are all equal gets exactly 0.

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [0., 0., 0., 0.]]), "mean").tolist()
    [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least two samples to compare, got shape {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite: one NaN would spread over its whole group")
    if normalize not in ("std", "mean"):
        raise ValueError(f'normalize must be "std" or "mean", not {normalize!r}')
    rewards = rewards.float()
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)  # rounding of the mean is no advantage
    advantages = rewards - rewards.mean(1, keepdim=True)
    if normalize == "std":
        advantages = advantages / (rewards.std(1, keepdim=True) + eps)
    return advantages.masked_fill(constant, 0.0)


def grpo_loss(logp, old_logp, advantages, lengths=None, *, ref_logp=None, engine_logp=None, entropy=None,
              loss="clip", clip_low=0.2, clip_high=0.2, kl_coef=0.0, entropy_coef=0.0, tis_cap=0.0,
              agg="token", total=None):
    """The GRPO loss of one micro-batch of packed response tokens -> (scalar loss, statistics as token sums).

    logp [R] with gradient. old_logp [R] of the policy that the batch started from, None for this very policy
    (first update after a rollout: the ratio is 1, its gradient is not). advantages [R] or [S]; lengths [S] in
    tokens; ref_logp [R] for the KL term, entropy [R] for the bonus, engine_logp [R] as sampled.

      ratio = exp(logp - old)           in log space a quotient of probabilities is a difference
      "clip"   -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)
      "cispo"  -stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high)) A logp         MiniMax-M1 2506.13585
      L = ("clip" or "cispo") * w  +  kl_coef * k3  -  entropy_coef * entropy
      k3 = exp(ref - logp) - (ref - logp) - 1       http://joschu.net/blog/kl-approx.html
      w = min(exp(old - engine), tis_cap)           truncated importance weight; tis_cap 0: w = 1

    agg says what one token weighs. `total` is the *global* count, over all micro-batches and ranks, so that
    cutting a batch differently cannot change the gradient (default: the count of this call):
      "token"  1 / total response tokens                      TRL dapo, verl token-mean
      "seq"    1 / own length / total sequences               TRL grpo, verl seq-mean-token-mean
      "const"  1 / total, a constant: sequences x max_len     TRL dr_grpo, verl seq-mean-token-sum-norm

    >>> logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    >>> loss, _ = grpo_loss(logp, None, torch.tensor([1.0, -1.0]), torch.tensor([2, 1]))
    >>> round(loss.item(), 4), torch.autograd.grad(loss, logp)[0].mul(3).tolist()
    (-0.3333, [-1.0, -1.0, 1.0])
    """
    if loss not in ("clip", "cispo") or agg not in ("token", "seq", "const"):
        raise ValueError(f'loss must be "clip" or "cispo", agg "token", "seq" or "const": {loss!r}, {agg!r}')
    if agg == "const" and total is None:
        raise ValueError('agg="const" needs total: the number of sequences times max_len')
    if lengths is not None and advantages.shape == lengths.shape:
        advantages = advantages.repeat_interleave(lengths, output_size=len(logp))
    old_logp = logp.detach() if old_logp is None else old_logp
    log_ratio = (logp - old_logp).clamp(-20, 20)  # verl's guard: one wild token must not make the batch inf
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    if loss == "clip":
        per_token = torch.maximum(-advantages * ratio, -advantages * bounded)
        clipped = -advantages * bounded > -advantages * ratio
    else:
        per_token = -advantages * bounded.detach() * logp
        clipped = bounded != ratio
    if tis_cap > 0:
        per_token = per_token * (old_logp - engine_logp).clamp(-20, 20).exp().clamp(max=tis_cap).detach()
    stats = {"tokens": torch.ones_like(logp).sum(), "pg_loss": per_token.sum(), "ratio_mean": ratio.sum(),
             "clip_fraction": clipped.sum(), "approx_kl": (ratio - 1 - log_ratio).sum()}
    if kl_coef:
        d = (ref_logp - logp).clamp(-20, 20)
        k3 = (d.exp() - d - 1).clamp(-10, 10)
        per_token = per_token + kl_coef * k3
        stats["kl_ref"] = k3.sum()
    if entropy is not None:
        stats["entropy"] = entropy.sum()
    if entropy_coef:
        per_token = per_token - entropy_coef * entropy
    if agg == "seq":
        per_token = per_token / lengths.clamp(min=1).repeat_interleave(lengths, output_size=len(logp))
    if total is None:
        total = len(lengths) if agg == "seq" else len(logp)
    return per_token.sum() / total, {name: x.detach() for name, x in stats.items()}


@torch.no_grad()
def mismatch(logp, engine_logp):
    """Trainer against engine on the sampled tokens, as sums: |d|, k3 KL(engine || trainer), exp|d|, number
    outside [1/2, 2]. NeMo-RL calls the second gen_kl_error and the third token_mult_prob_error."""
    d = (logp - engine_logp).double()  # in fp32 exp(d) - 1 - d of a small d is 0
    return {"mismatch_mean": d.abs().sum(), "mismatch_kl": (d.exp() - 1 - d).sum(),
            "mismatch_mult": d.abs().exp().sum(), "mismatch_far": (d.abs() > math.log(2)).sum()}


# ------------------------------------------------------------------------------------------------------------
# The run, in the order of time
# ------------------------------------------------------------------------------------------------------------

def train(args, device):
    """Build the parts, then the loop: one turn is one step of the paper -> the signal that ended it, or 0."""
    task, log = Task(args), together("report", lambda: Log(args))
    # the engine first: vLLM measures the memory that is free when it starts; it sleeps while the rest loads
    engine = make_engine(args.engine, task.model.folder, max_model_len=task.longest, dtype=args.dtype,
                         device=device, max_seqs=args.max_seqs, gpu_memory=args.gpu_memory, seed=args.seed,
                         enable_sleep=True)
    engine.sleep()
    learner = Learner(args, task, device)
    state = learner.load()
    step, generated = state["step"], state["generated"]
    line = log.start(step, state.get("unwritten", []))
    engine.push(learner.policy.full_weights())
    say(f"{task.model.parameters / 1e6:,.1f} M parameters, {len(task.problems):,} problems, {args.dtype}, "
        f"engine {engine.name}, {dist.get_world_size()} x {device.type}\n{HEADER}")
    signals = common.catch_signals()
    training = Sampling(n=args.group, temperature=args.temperature, max_tokens=args.max_len, seed=args.seed)
    validation = Sampling(n=args.eval_n, temperature=args.eval_temperature, top_p=args.eval_top_p,
                          max_tokens=args.eval_max_len or args.max_len, seed=args.eval_seed)

    def generate(*work):
        engine.wake()
        return rollout(engine, task.tokenizer, *work, task.grade, stop=lambda: bool(signals))

    def validate():
        """Scores on the held-out problems, by functions and seeds of evaluate.py; None if a signal came."""
        samples, seconds = generate(task.eval_problems, task.eval_prompts, validation, "eval")
        engine.sleep(keep_weights=True)
        scores = samples and evaluate.curve_point(samples, task.eval_problems, args.eval_n)
        return scores and {**scores, "eval_seconds": sum(seconds.values())}

    while True:
        if line:  # of the last step, or of one that a signal or a kill cut short: it may want its validation
            due = args.eval_every and (step % args.eval_every == 0 or step == args.steps)
            scores = validate() if due else {}
            if scores is None:
                break
            log.write({**line, **scores})
            line = None
        if step >= args.steps or common.any_rank(signals or os.path.exists(f"{args.out}/stop")):
            break
        clock = Clock(device)
        batch = data.batch_indices(len(task.problems), step, args.prompts, args.seed)
        problems, prompts = [task.problems[i] for i in batch], [task.prompts[i] for i in batch]

        samples, seconds = generate(problems, prompts, training, step + 1)
        if samples is None:  # a signal: the unfinished rollout is dropped
            break
        engine.sleep()
        if not all(np.isfinite(s.logprobs).all() for s in samples):  # else they would only look unlucky
            raise RankError(f"after step {step} the engine's log-probs are not finite: {DAMAGED}")
        rewards = torch.tensor([s.reward for s in samples]).view(args.prompts, args.group)          # [P, G]
        advantages = group_advantages(rewards, args.advantage)                                      # [P, G]

        rows = torch.arange(args.prompts).chunk(args.updates)
        minibatches = [learner.pack(samples, advantages, prompts) for prompts in rows]
        clock.lap("rollout")
        # the first mini-batch needs no old log-probs: its policy is still the old one
        old = [None, *(learner.score(learner.policy, mini) for mini in minibatches[1:])]
        ref = [learner.score(learner.reference, mini) for mini in minibatches]
        clock.lap("logprobs")
        stats = Counter()
        for mini, old_logp, ref_logp in zip(minibatches, old, ref):
            learner.update(step, mini, old_logp, ref_logp, stats)
        clock.lap("update")
        engine.push(learner.policy.full_weights())
        clock.lap("sync")

        step, generated = step + 1, generated + sum(len(s.response_ids) for s in samples)
        line = {"step": step, **rollout_metrics(samples, rewards), **update_metrics(stats),
                **learner.metrics(), **clock.metrics(seconds), "tokens_total": generated}
        log.write_rollouts(step, samples, problems, advantages)
        if step % args.save_every == 0 or step == args.steps:
            learner.save(step, generated, [*log.unwritten(), line])
    if step and learner.saved != step:
        learner.save(step, generated, log.unwritten() + ([line] if line else []))
    engine.close()
    if step < args.steps:
        say(f"stopped after step {step}; --resume goes on from checkpoint {learner.saved}")
    else:
        say(f"done. Next: python evaluate.py --model {args.out}/checkpoints/{learner.saved:06d}/hf\n"
            f"            python figures.py {args.out}\n      or go on: --resume with a larger --steps")
    return signals[0] if signals else 0


class Task:
    """What is trained on, checked before anything is loaded: model, tokenizer, problems, prompts, grader."""

    def __init__(self, args):
        self.model, folder = policy_lib.open_model(args.model), f"{args.out}/checkpoints"
        names = common.gather(policy_lib.checkpoints(folder))[0]  # of rank 0: a shared disk may lag
        self.checkpoint = f"{folder}/{names[-1]}" if names and args.resume else None
        together("start", lambda: self.open(args))
        check_disk(args, self.model.parameters, len(names))
        if args.resume:
            say(f"resuming from {self.checkpoint}" if names else f"no checkpoint in {folder}: a fresh start")

    def open(self, args):
        if self.checkpoint:
            policy_lib.check_checkpoint(self.checkpoint, self.model.shapes)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model.folder)
        style = evaluate.load_style(args.style)
        self.grade = evaluate.load_reward(args.reward, style)
        response, most = max(args.max_len, args.eval_max_len), self.model.positions or 10**9
        if response >= most:
            raise ValueError(f"--max_len {response} leaves no room for a prompt in the {most} positions of "
                             f"{args.model}: lower it below {most}")
        room, sets = min(args.max_prompt_len, most - response), []
        for path in (args.data, args.eval_data if args.eval_every else None):
            problems, prompts, dropped = evaluate.load_prompts(
                path, args, self.model, self.tokenizer, style, room) if path else ([], [], 0)
            if dropped:
                say(f"{path}: {dropped} of {dropped + len(problems)} prompts are longer than {room} tokens "
                    f"and were dropped")
            sets += [problems, prompts]
        self.problems, self.prompts, self.eval_problems, self.eval_prompts = sets
        data.batch_indices(len(self.problems), 0, args.prompts, args.seed)  # refuses a set that is too small
        self.longest = response + max(map(len, self.prompts + self.eval_prompts))
        self.budget = args.token_budget or max(32768 if torch.cuda.is_available() else 2048, self.longest)
        if self.budget < self.longest:
            raise ValueError(f"--token_budget {self.budget} holds no full sequence of {self.longest} tokens: "
                             f"raise it, or lower --max_len or --max_prompt_len")


def check_disk(args, parameters, there):
    """Refuse a disk too small for the checkpoints to come: 16 bytes a parameter, 4 where only hf/ stays."""
    need = parameters * 16 * max(1, (args.keep or 2) + 1 - there)
    need += 0 if args.keep else parameters * 4 * (args.steps // args.save_every)
    free = shutil.disk_usage(args.out).free
    if free < need:
        raise RankError(f"{args.out} has {free / 2**30:.1f} GiB free, checkpoints need {need / 2**30:.1f}: "
                        f"take another --out, a smaller --keep or a larger --save_every")


class Learner:
    """The policy, its frozen reference and the optimizer: pack, score, update, save, load."""

    def __init__(self, args, task, device):
        self.args, self.task, self.device = args, task, device
        # vLLM's pools count as torch's memory, also while they sleep
        self.pooled = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        self.policy = self.build()
        self.reference = self.build(frozen=True) if args.kl_coef else None
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), args.lr, weight_decay=args.weight_decay,
                                           fused=True)
        self.saved = self.skipped = self.skipped_in_a_row = 0

    def build(self, frozen=False):
        """A Policy from --model, sharded wherever there is a GPU, a second rank or mixed precision."""
        recompute, dtype = bool(self.args.recompute) and not frozen, getattr(torch, self.args.dtype)
        policy = together("model", lambda: policy_lib.Policy(self.task.model.folder, recompute))
        if frozen:
            policy.requires_grad_(False)
            for p in policy.parameters():  # not policy.to(dtype): that would round the rotary frequencies too
                p.data = p.data.to(dtype)
        shard = self.device.type == "cuda" or dist.get_world_size() > 1 or dtype != torch.float32
        return policy.shard(dtype, self.device) if shard else policy

    def pack(self, samples, advantages, prompts):
        """One update on some rows of `advantages` [P, G] -> this rank's micro-batches, each with its
        advantages [S] and engine log-probs [R], and the global count that the loss divides by."""
        args, device = self.args, self.device
        kept = [p for p in prompts.tolist() if not args.drop_zero_variance or advantages[p].any()]
        rows = [samples[p * args.group + j] for p in kept for j in range(args.group)]
        micro = policy_lib.pack([(s.prompt_ids, s.response_ids.tolist()) for s in rows], self.task.budget,
                                dist.get_rank(), dist.get_world_size(), device)
        flat, none, out = advantages[kept].flatten(), np.zeros(0, np.float32), []
        for m in micro:
            logp = torch.from_numpy(np.concatenate([none, *(rows[i].logprobs for i in m.rows)]))
            out.append((m, (flat[m.rows] if m.rows else torch.zeros(1)).to(device), logp.to(device)))
        tokens = sum(len(s.response_ids) for s in rows)
        return out, {"token": tokens, "seq": len(rows), "const": len(rows) * args.max_len}[args.loss_agg]

    @torch.no_grad()
    def score(self, model, mini):
        """Log-probs [R] of every micro-batch under `model`; None without a model."""
        if model is None:
            return None
        scores = [model(m, self.args.temperature)[0] for m, _, _ in mini[0]]
        model.reshard()  # FSDP keeps embedding and head gathered after a forward that no backward follows
        return scores

    def update(self, step, mini, old_logp, ref_logp, stats):
        """One optimizer step. A loss or gradient that is not finite skips it, on all ranks together."""
        (micro, total), args = mini, self.args
        options = {name: getattr(args, name) for name in LOSS_OPTIONS}
        if total == 0:
            stats["updates_empty"] += 1  # every group of it was all right or all wrong
            return
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup_steps))
        bar = tqdm(micro, desc="update", leave=False, disable=None if dist.get_rank() == 0 else True)
        for i, (m, advantages, engine_logp) in enumerate(bar):
            logp, entropy = self.policy(m, args.temperature, entropy_grad=args.entropy_coef != 0)
            old = old_logp[i] if old_logp else logp.detach()
            loss, sums = grpo_loss(logp, old, advantages, m.lengths, engine_logp=engine_logp, entropy=entropy,
                                   ref_logp=ref_logp[i] if ref_logp else None, agg=args.loss_agg, total=total,
                                   **options)
            # FSDP averages gradients over ranks; the loss is divided by the global count already: undo that
            (loss * self.policy.grad_divisor).backward()
            sums |= {**mismatch(old, engine_logp), "loss": loss.detach()}
            for name, value in sums.items():  # they stay on the device: reading one would wait for it
                stats[name] = stats[name] + value.double()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), args.grad_clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if common.any_rank(not torch.isfinite(norm + stats["loss"].to(norm))):
            self.skipped += 1
            self.skipped_in_a_row += 1
            say(f"ALARM update skipped: loss or gradient not finite, {self.skipped_in_a_row} in a row")
        else:
            self.optimizer.step()
            self.skipped_in_a_row = 0
            stats["updates"] += 1
            stats["grad_norm"] += norm.item()
        self.optimizer.zero_grad()
        if self.skipped_in_a_row >= MAX_SKIPS:
            raise RankError(f"{MAX_SKIPS} updates in a row had a loss or gradient that is not finite. The "
                            f"last checkpoint stays: lower --lr or --grad_clip, look at the last rollouts")

    def metrics(self):
        """What the optimizer did; memory is the largest of all ranks, of the card or else of the process."""
        unit = 2**30 if sys.platform == "darwin" else 2**20
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        if self.device.type == "cuda":
            used = (torch.cuda.max_memory_allocated() - self.pooled) / 2**30
            torch.cuda.reset_peak_memory_stats()
        rate = self.optimizer.param_groups[0]["lr"]
        return {"updates_skipped": self.skipped, "lr": rate, "memory_gib": max(common.gather(used))}

    def save(self, step, generated, unwritten):
        """A checkpoint. A full disk costs it, not the run. Damaged weights end the run: the last good one
        must stay. `unwritten`: lines that metrics.jsonl does not hold yet."""
        if self.skipped_in_a_row:
            return say(f"no checkpoint at step {step}: the last update was not finite")
        state = {"step": step, "generated": generated, "skipped": self.skipped, "unwritten": unwritten,
                 "world": dist.get_world_size(), "config": vars(self.args)}
        try:
            policy_lib.save_checkpoint(f"{self.args.out}/checkpoints", step, self.policy, self.optimizer,
                                       self.task.tokenizer, state, self.args.keep)
            self.saved = step
        except FloatingPointError:
            raise RankError(f"after step {step} a weight is not finite: {DAMAGED}") from None
        except OSError as e:
            say(f"ALARM {e}\n      training goes on; free some disk space or lower --keep")

    def load(self):
        """Go on from the newest checkpoint, or take over another run's optimizer -> the state of this run."""
        checkpoint = self.task.checkpoint or self.args.optimizer_from
        state = policy_lib.load_checkpoint(checkpoint, self.policy, self.optimizer) if checkpoint else {}
        if not self.task.checkpoint:  # a stage boundary hands moments and weights over, not the step
            for group in self.optimizer.param_groups:
                group["weight_decay"] = self.args.weight_decay
            return {"step": 0, "generated": 0}
        self.saved, self.skipped, now = state["step"], state["skipped"], vars(self.args)
        changed = [f"{k} {v} -> {now[k]}" for k, v in state["config"].items()
                   if now.get(k, v) != v and k not in ("resume", "steps", "out", "engine", "report_to")]
        if changed:
            say("resuming with other options than before: " + ", ".join(changed))
        return state


# ------------------------------------------------------------------------------------------------------------
# What is measured, written and said (docs/metrics.md lists every name with its unit)
# ------------------------------------------------------------------------------------------------------------

HEADER = " step/total | reward  none   all |  length   cut | entropy mismatch gradient | seconds  tok/s | eval"
# mean KL and ratio error of engine and trainer: an honest bf16 engine with an fp32 head was measured at 1.2e-3,
# fp32 ones below 1e-9; NeMo-RL asserts 5e-4 and 1.05 for this very model in bf16
MISMATCH = {"float32": (1e-5, 1.01), "bfloat16": (5e-3, 1.1)}
GROUPS = {"solve": "reward", "truncated": "length", "tokens": "length", "seconds": "time", "memory": "time",
          "reward": "reward", "length": "length", "mismatch": "mismatch", "eval": "eval"}  # all else: policy
LOSS_OPTIONS = ("loss", "clip_low", "clip_high", "kl_coef", "entropy_coef", "tis_cap")


def rollout_metrics(samples, rewards):
    """What the samples of a step say by themselves. rewards [P, G]; lengths in tokens, None of no sample."""
    length = torch.tensor([len(s.response_ids) for s in samples], dtype=torch.float32)
    cut = torch.tensor([s.finish_reason == "length" for s in samples])
    right = rewards >= evaluate.RIGHT                                                               # [P, G]
    out = {"reward": rewards.mean(), "solve_none": (~right).all(1).float().mean(),
           "solve_all": right.all(1).float().mean(), "truncated": cut.float().mean(),
           "length_mean": length.mean(), "length_max": length.max(), "length_min": length.min()}
    for name, chosen in (("right", right.view(-1)), ("wrong", ~right.view(-1)), ("truncated", cut)):
        out[f"length_{name}"] = length[chosen].mean() if chosen.any() else None
    out = {name: x if x is None else x.item() for name, x in out.items()}
    out |= {"tokens": int(length.sum()), "tokens_prompt": sum(len(s.prompt_ids) for s in samples)}
    verdicts = Counter(s.verdict.split(":")[0] for s in samples)
    reasons = ("no_close", "no_box", "unparsed_answer", "unparsed_gold", "timeout", "error")
    return out | {f"reward_{reason}": verdicts[reason] for reason in reasons}


def update_metrics(stats):
    """Token sums of this rank's micro-batches -> means over all tokens and ranks."""
    names = ("pg_loss", "entropy", "kl_ref", "approx_kl", "clip_fraction", "ratio_mean", "mismatch_mean",
             "mismatch_kl", "mismatch_mult", "mismatch_far")
    sums = torch.tensor([float(stats[name]) for name in ("tokens", "loss", *names)], dtype=torch.float64)
    dist.all_reduce(sums)
    (tokens, loss, *sums), updates = sums.tolist(), stats["updates"]
    out = {name: x / tokens if tokens and name in stats else None for name, x in zip(names, sums)}
    out |= {"loss": loss / updates if updates else None, "tokens_trained": int(tokens), "updates": updates,
            "grad_norm": stats["grad_norm"] / updates if updates else None,
            "updates_empty": stats["updates_empty"]}
    return {name: x if x is None or math.isfinite(x) else None for name, x in out.items()}


class Clock:
    """Seconds of one step by phase."""

    def __init__(self, device):
        self.device, self.began, self.last, self.phases = device, time.time(), time.time(), {}

    def lap(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # else the time of a phase is that of launching its kernels
        self.phases[phase], self.last = time.time() - self.last, time.time()

    def metrics(self, rollout_seconds):
        """Means over ranks; of "rollout" the rollout tells the parts."""
        ranks = common.gather({**self.phases, **rollout_seconds})
        means = {f"seconds_{k}": sum(r[k] for r in ranks) / len(ranks) for k in ranks[0] if k != "rollout"}
        return {"seconds": time.time() - self.began, **means}


def open_tracker(args):
    """A function (numbers, step) that mirrors metrics to --report_to; a missing package is refused here."""
    if args.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(f"{args.out}/tensorboard")
        writer.add_text("options", json.dumps(vars(args), indent=1))
        return lambda numbers, step: [writer.add_scalar(k, v, step) for k, v in numbers.items()]
    tracker, path = importlib.import_module(args.report_to), os.path.abspath(args.out)
    # the id lets a resumed run go on in the same curves
    run = {"id": uuid.uuid5(uuid.NAMESPACE_URL, path).hex, "resume": "allow"}
    project = os.environ.get("WANDB_PROJECT", "nanoscaler")
    tracker.init(project=project, name=os.path.basename(path), config=vars(args),
                 **(run if args.report_to == "wandb" else {}))
    return lambda numbers, step: tracker.log(numbers, step=step)


class Log:
    """metrics.jsonl (every number), rollouts/ (every sample), the console (one line a step), a tracker."""

    def __init__(self, args):
        self.args, self.rank, self.path = args, dist.get_rank(), f"{args.out}/metrics.jsonl"
        self.rows, self.written, self.alarmed, self.unpaid, self.unreadable = [], 0, {}, 0, []
        self.track = open_tracker(args) if args.report_to != "none" and self.rank == 0 else None

    def start(self, step, waiting):
        """Make metrics.jsonl agree with the checkpoint -> the line that still has to be finished, or None.
        Lines of later steps go: those steps are done again. `waiting`: lines that the file did not have when
        the checkpoint was written; the one of its own step may still want its validation."""
        mine = together("metrics.jsonl", lambda: self.read(step) if self.rank == 0 else None)
        self.rows = common.gather(mine)[0]
        there = [row["step"] for row in self.rows]
        self.rows += [row for row in waiting if row["step"] < step and row["step"] not in there]
        self.flush()
        if step >= self.args.steps:
            say(f"{self.args.out} has done its {self.args.steps} steps; a larger --steps goes on")
        waiting = waiting if step else [{"step": 0}] if self.args.eval_every else []
        return next((row for row in waiting if row["step"] == step and step not in there), None)

    def read(self, step):
        """What rank 0 does before the first step: config.json, a stop file left behind, the lines so far."""
        options, stop, config = vars(self.args), f"{self.args.out}/stop", common.provenance()
        config |= {"options": options, "world": dist.get_world_size(), "command": sys.argv}
        common.write_atomic(f"{self.args.out}/config.json", json.dumps(config, indent=1))
        say(textwrap.fill("  ".join(f"{k}={v}" for k, v in options.items()), 118, break_on_hyphens=False))
        if os.path.exists(stop):
            os.remove(stop)
            say(f"{stop} was there from before and has been removed")
        if step == 0 or not os.path.exists(self.path):  # from step 0 everything is done again
            return []
        rows = common.read_lines(self.path, on_bad=lambda text: say(f"warning: {text}; the others are kept"))
        return [row for row in rows if row.get("step", step + 1) <= step]

    def unwritten(self):
        return self.rows[self.written:]

    def flush(self):
        """metrics.jsonl, written whole. A full disk keeps lines back until there is room."""
        text = common.json_lines(self.rows)
        try:
            together(self.path, lambda: self.rank or common.write_atomic(self.path, text))
            self.written = len(self.rows)
        except RankError as e:
            say(f"ALARM {e}: {len(self.unwritten())} line(s) are kept and written later")

    def write(self, line):
        """One line to metrics.jsonl, console and tracker, and the alarms it gives cause for."""
        self.rows.append(line)
        self.flush()
        if self.track:
            numbers = {f"{GROUPS.get(k.split('_')[0], 'policy')}/{k}": v for k, v in line.items()
                       if isinstance(v, (int, float)) and k != "step"}
            self.track(numbers, line["step"])
        self.print_line({k: math.nan if v is None else v for k, v in line.items()})
        if "reward" in line:
            self.alarms(line)

    def write_rollouts(self, step, samples, problems, advantages):
        """Every sample of a step with its problem, reward and advantage, in rollouts/000STEP.jsonl.gz."""
        group = self.args.group
        items = [(problems[i // group], i % group, s, a)
                 for i, (s, a) in enumerate(zip(samples, advantages.flatten().tolist()))]
        self.unreadable = [p for p, _, s, _ in items if s.verdict == "unparsed_gold"]
        rows = [{"step": step, "id": p.id, "sample": j, "problem": p.problem, "answer": p.answer,
                 "response": s.text, "reward": s.reward, "advantage": a, "verdict": s.verdict,
                 "prompt_tokens": len(s.prompt_ids), "response_tokens": len(s.response_ids),
                 "finish_reason": s.finish_reason} for p, j, s, a in items]
        try:
            if self.rank == 0:
                packed = gzip.compress(common.json_lines(rows).encode(), 3, mtime=0)
                common.write_atomic(f"{self.args.out}/rollouts/{step:06d}.jsonl.gz", packed)
        except OSError as e:
            say(f"ALARM rollouts of step {step} not written ({e}); training goes on")

    def print_line(self, m):
        """The numbers of a step under HEADER."""
        columns = ("{reward:6.3f} {solve_none:5.2f} {solve_all:5.2f} | {length_mean:7.1f} {truncated:5.2f} "
                   "| {entropy:7.3f} {mismatch_kl:8.1e} {grad_norm:8.2e} | {seconds:7.1f} {speed:6.0f}")
        text = [f"{m['step']:5d}/{self.args.steps:<5d}"]
        text += [columns.format(**m, speed=m["tokens"] / m["seconds"])] if "reward" in m else []
        text += [f"{m['eval_reward']:.3f} ± {m['eval_se']:.3f}"] if "eval_reward" in m else []
        say(" | ".join(text).replace("nan", "  -"))

    def alarm(self, name, value, text):
        """Said once, and again when it has become half as bad again."""
        if value > 1.5 * self.alarmed.get(name, 0):
            self.alarmed[name] = value
            say(f"ALARM {text}")

    def alarms(self, m):
        """Signs of a run that looks healthy and is not, each with its cure."""
        n, cut = self.args.prompts * self.args.group, f"{m['truncated']:.0%}"
        self.unpaid = 0 if m["reward"] else self.unpaid + 1
        if self.unreadable:
            p, k = self.unreadable[0], len(self.unreadable)
            self.alarm("gold", k, f"{k} of {n} samples can earn nothing: the grader cannot read the answers "
                       f"they need, such as {p.answer!r} of problem {p.id}")
        elif self.unpaid in (1, 3, 10):
            say(f"ALARM no reward in {self.unpaid} step(s): of {n} samples {m['reward_no_close']} had no "
                f"</think>, {m['reward_no_box']} no \\boxed{{}}, {cut} were cut off. A model that never writes "
                f"</think> needs --style plain, one that is cut off a larger --max_len")
        kl, mult, (most_kl, most_mult) = m["mismatch_kl"], m["mismatch_mult"], MISMATCH[self.args.dtype]
        if kl is not None and (kl > most_kl or mult > most_mult):
            self.alarm("mismatch", kl, f"engine and trainer disagree: KL {kl:.1e} (bound {most_kl:g}), ratio "
                       f"error {mult:.3f} (bound {most_mult}). If it grows, the engine's weights are stale; "
                       f"if not, it is precision: --dtype float32, or --tis_cap 2")
        if m["truncated"] > 0.5:
            self.alarm("cut", m["truncated"], f"{cut} of the samples were cut off at --max_len "
                       f"{self.args.max_len} and earn nothing: raise it, or use a model that writes less")


# ------------------------------------------------------------------------------------------------------------
# Options
# ------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "model and data": [
        ("recipe", list(RECIPES), "deepscaler", None, "defaults of many options; what is given by hand wins"),
        ("model", str, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", None, "folder or hub name"),
        ("data", str, os.path.join(HERE, "assets/train.jsonl.gz"), None, "problems: a file or a hub name"),
        *evaluate.PROMPT_OPTIONS,
        ("max_prompt_len", int, 1024, 1, "tokens; longer prompts are dropped and counted"),
        ("max_len", int, 8192, 1, "tokens of a response: the stage's context")],
    "algorithm": [
        ("steps", int, 1040, 1, "rollout batches, counted from the start of the run"),
        ("prompts", int, 128, 1, "problems a step (P)"),
        ("group", int, 8, 2, "samples of each problem (G)"),
        ("updates", int, 2, 1, "optimizer updates for each rollout batch"),
        ("temperature", float, 0.6, 1e-6, "of sampling and of the training logits"),
        ("advantage", ["std", "mean"], "std", None, "divide by the group's std, or not (Dr. GRPO)"),
        ("loss", ["clip", "cispo"], "clip", None, "see grpo_loss; cispo has clip defaults of its own"),
        ("clip_low", float, 0.2, 0, "the ratio may fall to 1 - this"),
        ("clip_high", float, 0.2, 0, "the ratio may rise to 1 + this"),
        ("kl_coef", float, 0.001, 0, "weight of the KL to the start weights; 0: no reference is loaded"),
        ("entropy_coef", float, 0.001, 0, "weight of the entropy bonus"),
        ("tis_cap", float, 0.0, 0, "cap of the engine/trainer importance weight; 0: off"),
        ("loss_agg", ["token", "seq", "const"], "token", None, "what a token weighs; see grpo_loss"),
        ("drop_zero_variance", int, 0, 0, "1: leave out groups that are all right or all wrong")],
    "optimizer": [
        ("lr", float, 1e-6, 1e-12, "of AdamW, constant after the warm-up"),
        ("warmup_steps", int, 0, 0, "steps of linear warm-up"),
        ("weight_decay", float, 0.01, 0, "decoupled"),
        ("grad_clip", float, 1.0, 0, "largest global norm; 0: any"),
        ("optimizer_from", str, None, None, "checkpoint of the run that wrote --model: take its optimizer")],
    "validation": [
        ("eval_data", str, "auto", None, "held-out problems or none; auto: AIME 2024 with default --data"),
        ("eval_every", int, 20, 0, "steps; also before the first and after the last. 0: never"),
        ("eval_n", int, 8, 1, "samples of each held-out problem"),
        ("eval_temperature", float, 0.6, 0, "of validation samples"),
        ("eval_top_p", float, 1.0, 1e-6, "nucleus of validation samples; evaluate.py's default is 0.95"),
        ("eval_max_len", int, 0, 0, "tokens of a validation response; 0: --max_len"),
        ("eval_seed", int, 0, None, "of validation samples; 0 as in evaluate.py, whatever the stage")],
    "files": [
        ("out", str, "runs/stage1", None, "run folder: config.json, metrics.jsonl, rollouts/, checkpoints/"),
        ("resume", bool, False, None, "go on from the newest checkpoint in --out, or start if there is none"),
        ("save_every", int, 20, 1, "steps between checkpoints; one is written at the end as well"),
        ("keep", int, 2, 0, "checkpoints kept; 0: hf/ of all, the optimizer state of the newest two"),
        ("report_to", ["none", "tensorboard", "wandb", "trackio"], "none", None, "mirror the metrics"),
        ("seed", int, 0, None, "of data order and samples")],
    "machine": [
        ("engine", ["auto", "vllm", "torch"], "auto", None, "who generates; auto: vLLM if installed"),
        ("dtype", ["auto", "bfloat16", "float32"], "auto", None, "auto: bfloat16 if the card has it"),
        ("token_budget", int, 0, 0, "packed tokens of a micro-batch; 0: 32,768 on a GPU, 2,048 on a CPU"),
        ("recompute", int, -1, -1, "activation checkpointing, 0 or 1; -1: on a GPU yes, else no"),
        ("gpu_memory", float, 0.6, 0.01, "vLLM's share of each GPU"),
        ("max_seqs", int, 0, 0, "rows generated at once on each rank; 0: vLLM 256 (CPU 128), torch 64")],
}
SELECT = "python data.py select leaves problems out"
GONE = {"--difficulty": SELECT, "--min_rate": SELECT, "--max_rate": SELECT, "--max_chars": SELECT,
        "--ref_model": "the reference of the KL term is --model", "--enforce_eager": "it was for debugging",
        "--show_every": "python figures.py RUN shows samples", "--logit_chunk": "tiles take at most 0.6 GB",
        "--max_skips": f"{MAX_SKIPS} bad updates in a row end a run", "--sleep": "vLLM always sleeps"}


def parse_args(argv=None):
    """Defaults, then those of --recipe and --loss, then what is given by hand."""
    p = common.Parser(OPTIONS, GONE, description=__doc__.split("\n")[0])
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--loss")
    early, _ = first.parse_known_args(argv)
    p.set_defaults(**{**RECIPES.get(early.recipe, {}), **(CISPO if early.loss == "cispo" else {})})
    args = p.parse(argv)
    if args.prompts % args.updates:
        p.error(f"--prompts {args.prompts} cannot be cut into {args.updates} equal mini-batches (--updates)")
    if max(args.eval_top_p, args.gpu_memory, args.drop_zero_variance, args.recompute) > 1:
        p.error("--eval_top_p, --gpu_memory, --drop_zero_variance and --recompute are at most 1")
    if args.eval_data == "auto":
        aime = os.path.join(HERE, "assets/benchmarks/aime24.jsonl")
        args.eval_data = aime if args.data == p.get_default("data") else "none"
    args.eval_every *= args.eval_data != "none"
    args.recompute = int(torch.cuda.is_available()) if args.recompute < 0 else args.recompute
    return args


def main(argv=None):
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    rank, world, device = common.join_processes()
    args.dtype = compute_dtype(args.dtype, device)
    try:
        with common.lock(f"{args.out}/lock"):
            if common.any_rank(os.path.exists(f"{args.out}/metrics.jsonl") and not args.resume):
                raise RankError(f"{args.out} holds a run: --resume goes on, another --out starts afresh")
            ended_by = train(args, device)
    except RankError as e:
        memory = MEMORY if common.is_out_of_memory(e) else ""
        print(f"grpo.py: {e}{memory}", file=sys.stderr) if rank == 0 else None
        sys.exit(2)
    except Exception as e:
        if not common.is_out_of_memory(e):
            raise
        sys.exit(f"out of memory on rank {rank} ({str(e).splitlines()[0]}){MEMORY}")
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(128 + ended_by if ended_by and world == 1 else 0)


if __name__ == "__main__":
    main()
