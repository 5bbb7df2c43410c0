"""grpo.py - one stage of DeepScaleR: GRPO with a 0/1 answer-checking reward.

    torchrun --nproc_per_node 8 grpo.py --max_len 8192                 # the recipe, 8 GPUs; more nodes: --nnodes ...
    python grpo.py --model DIR --data FILE --max_len 256 --steps 5 --out RUN      # one process, GPU or laptop
    torchrun --nproc_per_node 2 grpo.py --model DIR --data FILE ...    # two CPU ranks over gloo
    python grpo.py --out RUN --resume ...                              # go on from RUN/checkpoints/latest

A step: P problems, G samples each; 1 for a right answer, 0 for a wrong one; a sample's advantage is its reward
against its group; a clipped policy gradient on every response token; new weights to the engine. `train` is that
on one screen.

What differs from GRPO as published: one normalisation over all tokens of the mini-batch (a per-response mean favours
short right and long wrong answers); optional cap for the gap between engine and trainer probabilities.
What differs from DeepScaleR as run: the KL term has the right sign (the original's 8K stage maximised it), losses
divide by the global token count (the original summed micro-batch means), `</think>` alone closes the thought.
Left out on purpose: value models, reward models, tools, LoRA, asynchronous rollouts.

Shapes: P prompts, G samples a group, S sequences of a micro-batch, R their response tokens, packed end to end.
"""
import argparse
import gzip
import json
import math
import os
import resource
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer

import data
import evaluate
import policy as policy_lib
import reward
from rollout import join_processes, make_engine, provenance, rollout, sample_seed

HERE = os.path.dirname(os.path.abspath(__file__))
RECIPES = {
    # DeepScaleR's first stage: its scripts and the defaults they left on
    "deepscaler": dict(temperature=0.6, clip_low=0.2, clip_high=0.2, kl_coef=0.001, entropy_coef=0.001,
                       loss_agg="token", drop_zero_variance=0),
    # what JustRL, Archer, POLARIS and Skywork-OR1 found better since
    "improved": dict(temperature=1.0, clip_low=0.2, clip_high=0.28, kl_coef=0.0, entropy_coef=0.0,
                     loss_agg="token", drop_zero_variance=1),
}


# ---------------------------------------------------------------------------------------------------------------
# The algorithm
# ---------------------------------------------------------------------------------------------------------------

def group_advantages(rewards, normalize="std", eps=1e-6):
    """[P, G] rewards -> [P, G] advantages: each sample against the other answers to its own problem.

    normalize "std": (r - mean) / (std + eps), unbiased std (DeepSeekMath 2402.03300 eq. 3, as verl computes it);
    "mean": r - mean (Dr. GRPO 2503.20783: dividing by the std overweights nearly solved and nearly hopeless
    problems). A group that is all right or all wrong gets exactly 0.

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [0., 0., 0., 0.]]), "mean").tolist()
    [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"a group needs at least two samples to compare, got rewards of shape {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite: one NaN would spread over its whole group")
    if normalize not in ("std", "mean"):
        raise ValueError(f'normalize must be "std" or "mean", not {normalize!r}')
    rewards = rewards.float()
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)  # rounding of the mean must not become an advantage
    advantages = rewards - rewards.mean(1, keepdim=True)
    if normalize == "std":
        advantages = advantages / (rewards.std(1, keepdim=True) + eps)
    return advantages.masked_fill(constant, 0.0)


def grpo_loss(logp, old_logp, advantages, lengths=None, *, ref_logp=None, engine_logp=None, entropy=None, clip_low=0.2,
              clip_high=0.2, kl_coef=0.0, entropy_coef=0.0, tis_cap=0.0, agg="token", total=None):
    """The GRPO loss of one micro-batch of packed response tokens -> (scalar loss, statistics as token sums).

    logp [R] with gradient; old_logp [R] of the policy that the batch started from, or None for "this very policy"
    (first update after a rollout: the ratio is 1, its gradient is not); advantages [R] or [S]; lengths [S] tokens
    of each sequence. ref_logp [R] for the KL term, entropy [R] for the bonus, engine_logp [R] as sampled.

      ratio = exp(logp - old)        in log space a quotient of probabilities is a difference
      L = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) * w  +  kl_coef * k3  -  entropy_coef * H
      k3 = exp(ref - logp) - (ref - logp) - 1         http://joschu.net/blog/kl-approx.html
      w = min(exp(old - engine), tis_cap)             truncated importance weight of the engine; tis_cap 0: w = 1

    agg says what one token weighs, `total` is always the *global* count, over all micro-batches and ranks, so that
    cutting a batch differently cannot change the gradient (default: the count of this call):
      "token"  1 / total response tokens                        TRL dapo, verl token-mean
      "seq"    1 / own length / total sequences                 TRL grpo, verl seq-mean-token-mean
      "const"  1 / total, a constant: sequences x max_len       TRL dr_grpo, verl seq-mean-token-sum-norm

    >>> logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    >>> loss, _ = grpo_loss(logp, None, torch.tensor([1.0, -1.0]), torch.tensor([2, 1]))
    >>> round(loss.item(), 4), torch.autograd.grad(loss, logp)[0].mul(3).tolist()
    (-0.3333, [-1.0, -1.0, 1.0])
    """
    if advantages.shape != logp.shape:
        advantages = advantages.repeat_interleave(lengths)
    old_logp = logp.detach() if old_logp is None else old_logp
    log_ratio = (logp - old_logp).clamp(-20, 20)  # verl's guards: one wild token must not make an inf of the batch
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = torch.maximum(unclipped, clipped)
    if tis_cap > 0:
        per_token = per_token * (old_logp - engine_logp).clamp(-20, 20).exp().clamp(max=tis_cap).detach()
    with torch.no_grad():
        stats = dict(tokens=float(len(logp)), clipped=(clipped > unclipped).sum(), ratio=ratio.sum(),
                     approx_kl=(ratio - 1 - log_ratio).sum(), pg_loss=per_token.sum())
    if kl_coef:
        d = (ref_logp - logp).clamp(-20, 20)
        k3 = (d.exp() - d - 1).clamp(-10, 10)
        per_token = per_token + kl_coef * k3
        stats["kl_ref"] = k3.detach().sum()
    if entropy is not None:
        stats["entropy"] = entropy.detach().sum()
        if entropy_coef:
            per_token = per_token - entropy_coef * entropy
    if agg == "token":
        loss = per_token.sum() / (len(logp) if total is None else total)
    elif agg == "seq":
        weight = (1.0 / lengths.clamp(min=1)).repeat_interleave(lengths)
        loss = (per_token * weight).sum() / (len(lengths) if total is None else total)
    elif agg == "const":
        if total is None:
            raise ValueError('agg="const" needs total: the number of sequences times max_len')
        loss = per_token.sum() / total
    else:
        raise ValueError(f'agg must be "token", "seq" or "const", not {agg!r}')
    return loss, stats


# ---------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------

def train(args, run):
    """The loop. `run` holds what `setup` built: problems, prompts, engine, policy, reference, optimizer."""
    while run.step < args.steps:
        step = run.step + 1
        clock = Clock()
        batch = data.batch_indices(len(run.problems), run.step, args.prompts, args.seed)
        problems = [run.problems[i] for i in batch]

        run.engine.wake()
        samples, rewards, texts = generate(run, problems, [run.prompts[i] for i in batch], args.group, args.temperature,
                                           step, clock)
        if samples is None:
            return run.leave("before the end of a rollout, which is dropped")
        run.engine.sleep()
        rewards = torch.tensor(rewards).view(args.prompts, args.group)                                    # [P, G]
        advantages = group_advantages(rewards, args.advantage)                                            # [P, G]

        minibatches = [run.pack(samples, advantages, p) for p in torch.arange(args.prompts).chunk(args.updates)]
        with clock("logprobs"):  # the first mini-batch needs no old log-probs: its policy is still the old one
            for mini in minibatches[1:]:
                run.score(run.policy, mini, "old_logp")
            if run.reference is not None:
                for mini in minibatches:
                    run.score(run.reference, mini, "ref_logp")

        stats = Counter()
        with clock("update"):
            for mini in minibatches:
                run.update(mini, stats)
        with clock("sync"):
            run.engine.push(run.policy.full_weights())

        run.step = step
        run.record(samples, rewards, texts, problems, stats, clock)
        if step % args.save_every == 0 or step == args.steps:
            run.save()
        if run.stopping():
            return run.leave(f"after step {step}")


def generate(run, problems, prompts, n, temperature, step, clock=None, desc="generate", top_p=1.0, max_len=0):
    """n samples for each prompt over all ranks -> (samples, rewards, texts), each of length P x n; Nones when a
    signal came. Rewards are computed by a thread of each rank while its engine goes on generating."""
    items = [(p, j) for p in range(len(problems)) for j in range(n)]
    seeds = [sample_seed(run.args.seed, step, problems[p].id, j) for p, j in items]

    def grade(i, sample):
        text = run.tokenizer.decode(sample.response_ids)
        return text, reward.compute_reward(run.style.graded(text), problems[items[i][0]].answer)

    with ThreadPoolExecutor(1) as pool:
        samples, graded, seconds = rollout(
            run.engine, [prompts[p] for p, _ in items], seeds, max_len or run.args.max_len, temperature, top_p,
            on_sample=lambda i, s: pool.submit(grade, i, s), stop=run.signal, desc=desc)
    for phase, s in seconds.items():
        if clock:
            clock.add(phase, s)
    return (None,) * 3 if samples is None else (samples, [r for _, r in graded], [t for t, _ in graded])


class Run:
    """Everything a step needs and the three things it does with it: pack, score, update; then the book-keeping."""

    def __init__(self, args):
        self.args, self.step, self.signal_seen = args, 0, False
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.skipped = self.skipped_in_a_row = self.generated = 0
        self.reward_seen, self.log = False, lambda line: None
        self.style = evaluate.STYLES[args.style]

    # ----- the update

    def pack(self, samples, advantages, prompt_rows):
        """This rank's micro-batches of one mini-batch, each with its advantages [S] and engine log-probs [R], and
        the mini-batch's global count, which every rank knows because every rank has seen all samples."""
        args, device = self.args, self.policy.device
        rows = [(p * args.group + j, a) for p in prompt_rows.tolist() for j, a in enumerate(advantages[p].tolist())
                if not args.drop_zero_variance or advantages[p].any()]
        chosen = [samples[i] for i, _ in rows]
        micro = policy_lib.pack([(s.prompt_ids, s.response_ids) for s in chosen], args.token_budget, self.rank,
                                self.world, device)
        for m in micro:
            m.advantages = torch.tensor([rows[i][1] for i in m.rows] or [0.0], device=device)
            m.engine_logp = torch.tensor([x for i in m.rows for x in chosen[i].logprobs], device=device)
            m.old_logp = m.ref_logp = None
        tokens = sum(len(s.response_ids) for s in chosen)
        total = {"token": tokens, "seq": len(chosen), "const": len(chosen) * args.max_len}[args.loss_agg]
        return micro, total

    @torch.no_grad()
    def score(self, model, minibatch, name):
        """Log-probs [R] of every micro-batch under `model`, kept as its attribute `name`."""
        for m in minibatch[0]:
            setattr(m, name, model(m, self.args.temperature)[0])

    def update(self, minibatch, stats):
        """One optimizer step on one mini-batch. A non-finite loss or gradient skips it, on all ranks together."""
        args, (micro, total) = self.args, minibatch
        if total == 0:
            stats["empty_updates"] += 1  # every group of it was all right or all wrong
            return
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (self.step + 1) / max(1, args.warmup_steps))
        finite = torch.tensor(1.0, device=self.policy.device)
        for m in tqdm(micro, desc="update", leave=False, disable=None if self.rank == 0 else True):
            logp, entropy = self.policy(m, args.temperature, entropy_grad=args.entropy_coef != 0)
            loss, s = grpo_loss(logp, m.old_logp, m.advantages, m.lengths, ref_logp=m.ref_logp,
                                engine_logp=m.engine_logp, entropy=entropy, clip_low=args.clip_low,
                                clip_high=args.clip_high, kl_coef=args.kl_coef, entropy_coef=args.entropy_coef,
                                tis_cap=args.tis_cap, agg=args.loss_agg, total=total)
            # FSDP averages gradients over ranks; the loss is divided by the global count already, so undo that
            (loss * self.policy.grad_divisor).backward()
            finite = finite * torch.isfinite(loss.detach())
            old = logp.detach() if m.old_logp is None else m.old_logp
            add_stats(stats, {**s, **mismatch(old, m.engine_logp), "loss": loss.detach()})
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), args.grad_clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if finite.item() and torch.isfinite(norm):
            self.optimizer.step()
            self.skipped_in_a_row = 0
            stats["updates"] += 1
            stats["grad_norm"] += norm.item()
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.say(f"ALARM update skipped: loss or gradient not finite ({self.skipped_in_a_row} in a row)")
        self.optimizer.zero_grad()
        if self.skipped_in_a_row >= args.max_skips:
            raise SystemExit(f"stopped: {args.max_skips} updates in a row had a non-finite loss or gradient. The last "
                             f"good checkpoint is whole; lower --lr or --grad_clip, or look at the newest rollouts")

    # ----- signals

    def signal(self):
        """True once SIGINT or SIGTERM has arrived at this rank."""
        return self.signal_seen

    def stopping(self):
        """True on every rank when any of them has seen the signal."""
        flag = torch.tensor(float(self.signal_seen))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def leave(self, when):
        """A clean exit: the state is that of the last finished step, whose checkpoint may exist already."""
        if policy_lib.latest_checkpoint(self.folder("checkpoints")) != self.folder("checkpoints", f"{self.step:06d}"):
            self.save()
        self.say(f"signal: stopped {when}; --resume continues after step {self.step}")

    # ----- files

    def folder(self, *parts):
        return os.path.join(self.args.out, *parts)

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def save(self):
        """A checkpoint; a disk that is full costs the checkpoint, not the run. Nothing is saved while updates fail:
        the weights may be damaged already, and must not push out the last good ones."""
        if self.skipped_in_a_row:
            return self.say(f"no checkpoint at step {self.step}: the last update was not finite")
        state = dict(step=self.step, data_position=self.step * self.args.prompts, generated=self.generated,
                     skipped=self.skipped, skipped_in_a_row=self.skipped_in_a_row, reward_seen=self.reward_seen,
                     world=self.world, config=vars(self.args))
        try:
            policy_lib.save_checkpoint(self.folder("checkpoints"), self.step, self.policy, self.optimizer, self.tokenizer,
                                       state, self.args.keep)
        except OSError as e:
            self.say(f"ALARM {e}\n      training goes on; free some disk space or lower --keep")

    def record(self, samples, rewards, texts, problems, stats, clock):
        """After a step: gather its numbers, look for alarms, write rollouts and metrics, print a line."""
        args = self.args
        self.generated += sum(len(s.response_ids) for s in samples)
        line = {"step": self.step, **rollout_metrics(samples, rewards), **self.update_metrics(stats),
                **self.reward_counters(), **clock.metrics(self.world), "lr": self.optimizer.param_groups[0]["lr"],
                "tokens_total": self.generated, "memory_gib": peak_memory(self.policy.device)}
        line["tokens_per_second"] = line["tokens"] / line["seconds"]
        if args.eval_every and (self.step % args.eval_every == 0 or self.step == args.steps):
            line |= self.validate()
        if self.rank == 0:
            self.write_rollouts(samples, rewards, texts, problems)
            self.log(line)
            if args.show_every and (self.step - 1) % args.show_every == 0:
                show(samples, rewards, texts, problems, args.group, self.step)
        self.print_line(line)
        self.alarms(line)

    def update_metrics(self, stats):
        """Token sums of this rank's micro-batches -> means over all ranks. Maxima are named max_*."""
        names = ("tokens", "clipped", "ratio", "approx_kl", "pg_loss", "kl_ref", "entropy", "loss", "gap", "gap_kl",
                 "gap_mult", "gap_far")
        sums = torch.tensor([float(stats[n]) for n in names], dtype=torch.float64)
        peaks = torch.tensor([float(stats[n]) for n in ("max_gap",)], dtype=torch.float64)
        dist.all_reduce(sums)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
        s = dict(zip(names, sums.tolist()))
        mean = lambda name: s[name] / s["tokens"] if s["tokens"] else None
        out = {"loss": s["loss"] / stats["updates"] if stats["updates"] else None, "pg_loss": mean("pg_loss"),
               "entropy": mean("entropy"), "kl_ref": mean("kl_ref") if self.args.kl_coef else None,
               "approx_kl": mean("approx_kl"), "clip_fraction": mean("clipped"), "ratio_mean": mean("ratio"),
               "grad_norm": stats["grad_norm"] / stats["updates"] if stats["updates"] else None,
               "updates": stats["updates"], "updates_empty": stats["empty_updates"], "updates_skipped": self.skipped,
               "tokens_trained": int(s["tokens"]), "mismatch_mean": mean("gap"), "mismatch_max": peaks[0].item(),
               "mismatch_kl": mean("gap_kl"), "mismatch_mult": mean("gap_mult"), "mismatch_far": mean("gap_far")}
        return {k: v if v is None or math.isfinite(v) else None for k, v in out.items()}

    def reward_counters(self):
        """Why answers earned nothing: the grader's own counts, summed over ranks."""
        counts = reward.reset_counters()
        everyone = [None] * self.world
        dist.all_gather_object(everyone, counts)
        total = sum((Counter(c) for c in everyone), Counter())
        return {f"reward_{k}": total[k] for k in ("no_close", "no_box", "unparsed_answer", "unparsed_gold", "timeout")}

    def validate(self):
        """Mean reward on the held-out problems with its standard error, by the functions and the seeds of evaluate.py:
        with the same temperature, top_p and limit it prints this very number for this checkpoint."""
        start, n = time.time(), self.args.eval_n
        self.engine.wake()
        samples, rewards, _ = generate(self, self.eval_problems, self.eval_prompts, n, self.args.eval_temperature,
                                       "eval", desc="evaluate", top_p=self.args.eval_top_p,
                                       max_len=self.args.eval_max_len)
        self.engine.sleep(keep_weights=True)
        reward.reset_counters()
        if samples is None:
            return {}
        rows = [{"id": self.eval_problems[i // n].id, "reward": r, "response_tokens": len(s.response_ids),
                 "finish_reason": s.finish_reason, "extracted": None} for i, (s, r) in enumerate(zip(samples, rewards))]
        scores = evaluate.summarize(rows, n, votes=False)
        return {"eval_reward": scores["pass@1"], "eval_se": scores["se"], "eval_problems": scores["problems"], "eval_n": n,
                "eval_truncated": scores["truncated"], "eval_length": scores["tokens"], "eval_seconds": time.time() - start}

    def write_rollouts(self, samples, rewards, texts, problems):
        path = self.folder("rollouts", f"{self.step:06d}.jsonl.gz")
        try:
            with gzip.open(path + ".tmp", "wt", compresslevel=3, encoding="utf-8") as f:
                for i, (s, text) in enumerate(zip(samples, texts)):
                    p = problems[i // self.args.group]
                    f.write(json.dumps({
                        "step": self.step, "id": p.id, "sample": i % self.args.group, "problem": p.problem,
                        "answer": p.answer, "response": text, "reward": rewards.view(-1)[i].item(),
                        "prompt_tokens": len(s.prompt_ids), "response_tokens": len(s.response_ids),
                        "finish_reason": s.finish_reason}) + "\n")
            os.replace(path + ".tmp", path)
        except OSError as e:
            self.say(f"ALARM rollouts of step {self.step} not written ({e}); training goes on")

    def print_line(self, m):
        number = lambda x, form: "-".rjust(len(format(0.0, form))) if x is None else format(x, form)
        line = (f"{m['step']:5d} | reward {m['reward']:5.3f} none {m['solve_none']:4.2f} all {m['solve_all']:4.2f} | "
                f"len {m['length_mean']:7.1f} cut {m['truncated']:4.2f} | H {number(m['entropy'], '5.3f')} "
                f"gap {number(m['mismatch_kl'], '7.1e')} |g| {number(m['grad_norm'], '8.2e')} | "
                f"{m['seconds']:6.1f}s {m['tokens_per_second']:6.0f} tok/s")
        if "eval_reward" in m:
            line += f" | eval {m['eval_reward']:.3f}" + (f" +- {m['eval_se']:.3f}" if m["eval_se"] is not None else "")
        self.say(line)

    def alarms(self, m):
        """Signs of a run that looks healthy and is not, each with its cure."""
        if m["reward"] > 0:
            self.reward_seen = True
        if not self.reward_seen and m["step"] in (1, 3, 10):
            n = self.args.prompts * self.args.group
            self.say(f"ALARM no reward in the first {m['step']} step(s): of the last {n} samples {m['reward_no_close']} had "
                     f"no </think>, {m['reward_no_box']} no \\boxed{{}}, {m['truncated']:.0%} were cut off. A model that "
                     f"never writes </think> needs --style plain; one that is cut off needs a larger --max_len; "
                     f"otherwise the problems are too hard for it")
        # NeMo-RL asserts these two bounds for this very model in its nightly runs
        if m["mismatch_kl"] is not None and (m["mismatch_kl"] > 5e-4 or m["mismatch_mult"] > 1.05):
            self.say(f"ALARM engine and trainer disagree: KL {m['mismatch_kl']:.1e} (bound 5e-4), mean ratio error "
                     f"{m['mismatch_mult']:.3f} (bound 1.05). If it grows with the steps the engine's weights are stale; "
                     f"if it is constant, precision: try --dtype float32, or --tis_cap 2 to live with it")
        if m["truncated"] > 0.5:
            self.say(f"ALARM {m['truncated']:.0%} of the samples were cut off at --max_len {self.args.max_len} and most of "
                     f"those earn nothing: raise --max_len, or start from a model that writes less")


def add_stats(stats, new):
    """Sum the numbers of one micro-batch into `stats`; names that begin with max_ take the larger one."""
    for name, value in new.items():
        value = float(value)
        stats[name] = max(stats[name], value) if name.startswith("max_") else stats[name] + value


@torch.no_grad()
def mismatch(logp, engine_logp):
    """Trainer against engine on the sampled tokens, as sums: |d|, k3 KL(engine || trainer), exp|d|, share outside
    [1/2, 2]. The names of the thresholds follow NeMo-RL's gen_kl_error and token_mult_prob_error."""
    d = (logp - engine_logp).double()  # in fp32 exp(d) - 1 - d of a small gap is 0
    return dict(gap=d.abs().sum(), gap_kl=(d.exp() - 1 - d).sum(), gap_mult=d.abs().exp().sum(),
                gap_far=(d.abs() > math.log(2)).sum(), max_gap=d.abs().max() if len(d) else 0.0)


def rollout_metrics(samples, rewards):
    """What the samples of a step say by themselves. rewards [P, G]; lengths in tokens, None for an empty class."""
    length = torch.tensor([len(s.response_ids) for s in samples], dtype=torch.float32)
    cut = torch.tensor([s.finish_reason == "length" for s in samples])
    right = rewards.view(-1) > 0
    mean = lambda chosen: length[chosen].mean().item() if chosen.any() else None
    solved = rewards.mean(1)
    return {"reward": rewards.mean().item(), "solve_none": (solved == 0).float().mean().item(),
            "solve_all": (solved == 1).float().mean().item(), "length_mean": length.mean().item(),
            "length_max": length.max().item(), "length_min": length.min().item(), "length_right": mean(right),
            "length_wrong": mean(~right), "length_truncated": mean(cut), "truncated": cut.float().mean().item(),
            "tokens": int(length.sum()), "tokens_prompt": sum(len(s.prompt_ids) for s in samples)}


def show(samples, rewards, texts, problems, group, step):
    """One transcript of the step, a right answer if there is one."""
    flat = rewards.view(-1)
    i = int(flat.argmax()) if flat.max() > 0 else step % len(samples)
    text = texts[i] if len(texts[i]) <= 1500 else texts[i][:700] + "\n      [...]\n" + texts[i][-700:]
    tqdm.write("\n".join(["", f"--- step {step}, reward {flat[i]:.0f}, {len(samples[i].response_ids)} tokens, "
                          f"{samples[i].finish_reason} ---", f"Q: {problems[i // group].problem}", f"A: {text.strip()}",
                          f"--- wanted: {problems[i // group].answer}", ""]), file=sys.stdout)


class Clock:
    """Seconds by phase of one step."""

    def __init__(self):
        self.start, self.phases = time.time(), Counter()

    @contextmanager
    def __call__(self, phase):
        began = time.time()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the time of a phase is that of launching its kernels
        self.add(phase, time.time() - began)

    def add(self, phase, seconds):
        self.phases[phase] += seconds

    def metrics(self, world):
        """Means over ranks; `idle` is what a rank waits for the slowest one."""
        names = ("generate", "reward", "logprobs", "update", "sync", "idle")
        times = torch.tensor([self.phases[n] for n in names], dtype=torch.float64)
        dist.all_reduce(times)
        return {"seconds": time.time() - self.start} | {f"seconds_{n}": t / world for n, t in zip(names, times.tolist())}


def peak_memory(device):
    """GiB: of the GPU, or of the process where there is none. The largest over ranks."""
    used = (torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    peak = torch.tensor(used)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item()


# ---------------------------------------------------------------------------------------------------------------
# Before the first step: options, checks, building the parts
# ---------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="One stage of GRPO on maths problems.", allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument

    add("--recipe", choices=list(RECIPES), default="deepscaler", help="defaults of temperature, clip, KL, entropy, "
        "aggregation and filtering; any of these options given by hand wins")
    # model and data
    add("--model", default="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", help="folder or hub name of the start weights")
    add("--ref_model", default=None, help="reference of the KL term (default: --model)")
    add("--data", default=os.path.join(HERE, "assets/train.jsonl.gz"), help="training problems: json, jsonl, csv, parquet")
    add("--eval_data", default="auto", help='held-out problems, or "none"; "auto": AIME 2024 when --data is the default')
    add("--style", choices=["r1", "plain"], default="r1", help="r1: only the text after </think> is graded; plain: all "
        "of it, for models that do not think in tags")
    add("--no_chat", action="store_true", help="prompt with the plain problem, for base models without a chat template")
    add("--examples", default=None, help="file of solved problems shown as finished turns before each problem, for models "
        "that do not know the format; the recipe uses none")
    add("--difficulty", default=None, help="solve rates written by data.py difficulty: keeps --min_rate < rate < --max_rate")
    add("--min_rate", type=float, default=0.0, help="with --difficulty: lower end, excluded")
    add("--max_rate", type=float, default=1.0, help="with --difficulty: upper end, excluded")
    add("--max_chars", type=int, default=0, help="longest problem text trained on; 0: any")
    add("--max_prompt_len", type=int, default=1024, help="tokens; longer prompts are dropped and counted")
    add("--max_len", type=int, default=8192, help="tokens of a response: the stage's context")
    # algorithm
    add("--steps", type=int, default=1040, help="rollout batches; counted from the start of the run, not of a resume")
    add("--prompts", type=int, default=128, help="problems a step (P)")
    add("--group", type=int, default=8, help="samples for each problem (G)")
    add("--updates", type=int, default=2, help="optimizer updates for each rollout batch")
    add("--temperature", type=float, default=0.6, help="of sampling and of the training logits")
    add("--advantage", choices=["std", "mean"], default="std", help="divide by the group's std, or not (Dr. GRPO)")
    add("--clip_low", type=float, default=0.2, help="ratio may fall to 1 - this")
    add("--clip_high", type=float, default=0.2, help="ratio may rise to 1 + this")
    add("--kl_coef", type=float, default=0.001, help="weight of the k3 KL to the reference; 0: no reference is loaded")
    add("--entropy_coef", type=float, default=0.001, help="weight of the entropy bonus")
    add("--tis_cap", type=float, default=0.0, help="cap of the engine/trainer importance weight; 0: off")
    add("--loss_agg", choices=["token", "seq", "const"], default="token", help="what a token weighs: see grpo_loss")
    add("--drop_zero_variance", type=int, choices=[0, 1], default=0, help="leave all-right and all-wrong groups out")
    # optimizer
    add("--lr", type=float, default=1e-6, help="AdamW, constant")
    add("--warmup_steps", type=int, default=0, help="linear warm-up")
    add("--weight_decay", type=float, default=0.01, help="decoupled")
    add("--optimizer_from", default=None, help="checkpoint folder of the run that wrote --model (RUN/checkpoints/000120): start with "
        "its optimizer state instead of a fresh one")
    add("--grad_clip", type=float, default=1.0, help="global norm; 0: off")
    add("--max_skips", type=int, default=5, help="stop after so many non-finite updates in a row")
    # evaluation during training
    add("--eval_every", type=int, default=20, help="steps; also before the first and after the last. 0: never")
    add("--eval_n", type=int, default=8, help="samples for each held-out problem")
    add("--eval_temperature", type=float, default=0.6, help="of evaluation samples")
    add("--eval_max_len", type=int, default=0, help="tokens of an evaluation response; 0: --max_len, as the original")
    add("--eval_top_p", type=float, default=1.0, help="nucleus of evaluation samples; evaluate.py's default is 0.95")
    # files and reports
    add("--out", default="runs/stage1", help="run folder: config.json, metrics.jsonl, rollouts/, checkpoints/")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out (from scratch if none is there)")
    add("--save_every", type=int, default=20, help="steps between checkpoints; one is written at the end as well")
    add("--keep", type=int, default=2, help="checkpoints kept")
    add("--show_every", type=int, default=10, help="steps between printed transcripts; 0: never")
    add("--report_to", choices=["none", "tensorboard", "wandb", "trackio"], default="none", help="mirror the metrics")
    add("--seed", type=int, default=0, help="of data order and samples")
    # machine
    add("--engine", choices=["auto", "vllm", "torch"], default="auto", help="who generates; auto: vLLM if it can")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="compute; auto: bf16 on GPU, fp32 on CPU")
    add("--token_budget", type=int, default=0, help="packed tokens of a micro-batch: memory against speed; 0: 32,768 on "
        "a GPU, 2,048 on a CPU, at least one full sequence")
    add("--logit_chunk", type=int, default=0, help="tokens of one tile of logits; 0: as many as 0.6 GB hold")
    add("--recompute", type=int, choices=[0, 1], default=-1, help="activation checkpointing; -1: on a GPU yes, else no")
    add("--gpu_memory", type=float, default=0.6, help="vLLM's share of each GPU")
    add("--max_seqs", type=int, default=0, help="rows generated at once on each rank; 0: vLLM 256 (CPU 128), torch 64")
    add("--sleep", type=int, choices=[0, 1], default=1, help="vLLM gives its memory back while training")
    add("--enforce_eager", action="store_true", help="vLLM without CUDA graphs, for debugging")
    recipe, _ = p.parse_known_args(argv)
    p.set_defaults(**RECIPES[recipe.recipe])
    args = p.parse_args(argv)
    check_options(p, args)
    return args


def check_options(p, args):
    """Refuse what cannot work before anything is loaded."""
    for name in ("steps", "prompts", "updates", "max_len", "max_prompt_len", "save_every", "keep", "eval_n", "max_skips"):
        if getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1")
    if args.group < 2:
        p.error("--group must be at least 2: a sample is judged against the others of its group")
    if args.prompts % args.updates:
        p.error(f"--prompts {args.prompts} cannot be cut into {args.updates} equal mini-batches (--updates)")
    for name in ("temperature", "lr"):
        if not (getattr(args, name) > 0 and math.isfinite(getattr(args, name))):
            p.error(f"--{name} must be a finite number above 0")
    for name in ("clip_low", "clip_high", "kl_coef", "entropy_coef", "tis_cap", "grad_clip", "weight_decay",
                 "eval_temperature", "eval_every", "eval_max_len", "show_every", "warmup_steps", "max_seqs", "token_budget",
                 "logit_chunk", "max_chars", "min_rate"):
        if not (getattr(args, name) >= 0 and math.isfinite(getattr(args, name))):
            p.error(f"--{name} must not be negative")
    if not 0 < args.eval_top_p <= 1:
        p.error("--eval_top_p must be above 0 and at most 1")
    default_data = p.get_default("data")
    if args.eval_data == "auto":
        args.eval_data = os.path.join(HERE, "assets/benchmarks/aime24.jsonl") if args.data == default_data else "none"
    if args.eval_data == "none":
        args.eval_every = 0
    args.ref_model = args.ref_model or args.model


def setup(args):
    """Build a Run: check everything that can be checked first, then load. Raises ValueError, OSError or
    RuntimeError with a message for the user."""
    run = Run(args)
    checkpoint = prepare_folder(run)
    report = reporter(args)
    run.tokenizer, positions, parameters = open_model(args)
    run.problems, run.prompts = encode(run, args.data, positions)
    data.batch_indices(len(run.problems), 0, args.prompts, args.seed)
    if args.eval_every:
        run.eval_problems, run.eval_prompts = encode(run, args.eval_data, positions)
    longest = args.max_len + max(map(len, run.prompts))
    longest_eval = (args.eval_max_len or args.max_len) + max(map(len, run.eval_prompts)) if args.eval_every else 0
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    gpu = device.type == "cuda"
    args.dtype = ("bfloat16" if gpu else "float32") if args.dtype == "auto" else args.dtype
    args.recompute = int(gpu) if args.recompute < 0 else args.recompute
    args.token_budget = args.token_budget or max(32768 if gpu else 2048, longest)
    if args.token_budget < longest:
        raise ValueError(f"--token_budget {args.token_budget} holds no full sequence of {longest} tokens: raise it, or "
                         f"lower --max_len or --max_prompt_len")
    check_disk(run, parameters)
    write_config(run)

    # the engine first: vLLM measures the memory that is free when it starts; then it sleeps while the rest loads
    run.engine = make_engine(args.engine, args.model, max_model_len=max(longest, longest_eval), dtype=args.dtype, device=device,
                             max_seqs=args.max_seqs, gpu_memory=args.gpu_memory, seed=args.seed,
                             enable_sleep=bool(args.sleep), enforce_eager=args.enforce_eager)
    run.engine.sleep()
    run.policy = build_policy(args.model, args, device)
    run.reference = build_policy(args.ref_model, args, device, frozen=True) if args.kl_coef else None
    run.optimizer = torch.optim.AdamW(run.policy.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    if checkpoint:
        restore(run, checkpoint)
    elif args.optimizer_from:  # carried over a stage boundary: its moments and weights, not its step
        policy_lib.load_checkpoint(args.optimizer_from, run.policy, run.optimizer)
        for group in run.optimizer.param_groups:
            group["weight_decay"] = args.weight_decay
    run.engine.push(run.policy.full_weights())
    run.say(f"{parameters / 1e6:,.1f} M parameters, {len(run.problems):,} problems, {run.world} x {device.type}, "
            f"{args.dtype}, engine {run.engine.name}, {args.prompts} x {args.group} samples of up to {args.max_len} tokens")
    run.log = metrics_file(run, report)
    return run


def prepare_folder(run):
    """Create the run folder, or find the checkpoint to go on from. An existing run is never overwritten."""
    args = run.args
    used = os.path.exists(run.folder("metrics.jsonl"))
    if used and not args.resume:
        raise ValueError(f"{args.out} holds a run already: --resume goes on with it, another --out starts a new one")
    dist.barrier()
    if run.rank == 0:
        for name in ("checkpoints", "rollouts"):
            os.makedirs(run.folder(name), exist_ok=True)
        for name in os.listdir(run.folder("checkpoints")):
            if name.endswith(".tmp"):  # a save that was killed
                shutil.rmtree(run.folder("checkpoints", name), ignore_errors=True)
    dist.barrier()
    checkpoint = policy_lib.latest_checkpoint(run.folder("checkpoints")) if args.resume else None
    if args.resume:
        run.say(f"resuming from {checkpoint}" if checkpoint else f"no checkpoint in {args.out}: starting from step 0")
    return checkpoint


def open_model(args):
    """(tokenizer, positions, parameters) without loading a weight."""
    try:
        positions, parameters = policy_lib.model_limits(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"--model {args.model} cannot be opened: {str(e).splitlines()[0]} (a folder written by "
                         f"save_pretrained works without a network)") from e
    response = max(args.max_len, args.eval_max_len)
    if positions and response >= positions:
        raise ValueError(f"--max_len {response} leaves no room for a prompt in the {positions} positions of "
                         f"{args.model}: lower it below {positions}")
    return tokenizer, positions, parameters


def encode(run, path, positions):
    """Problems and their prompts; those longer than the limit, or than the model has room for, are dropped."""
    args = run.args
    room = min(args.max_prompt_len, positions - max(args.max_len, args.eval_max_len)) if positions else args.max_prompt_len
    problems = data.load_problems(path)
    if path == args.data:
        rates = data.load_solve_rates(args.difficulty) if args.difficulty else {}
        problems, left = data.select_problems(problems, rates, args.min_rate, args.max_rate, max_chars=args.max_chars or None)
        if left:
            run.say(f"{path}: {len(problems)} problems kept; left out: {', '.join(f'{n} {why}' for why, n in left.items())}")
    examples = data.load_problems(args.examples) if args.examples else ()
    problems, prompts, dropped = data.encode_problems(problems, run.tokenizer, room, chat=not args.no_chat, examples=examples)
    if dropped:
        run.say(f"{path}: {dropped} of {dropped + len(problems)} prompts are longer than {room} tokens and were dropped")
    return problems, prompts


def check_disk(run, parameters):
    """Refuse a disk that cannot hold the checkpoints: fp32 weights twice (sharded and HF) and two Adam moments."""
    need, free = 16 * parameters * (run.args.keep + 1), shutil.disk_usage(run.args.out).free
    if free < need:
        raise ValueError(f"{run.args.out} has {free / 2**30:.1f} GiB free; {run.args.keep} checkpoints and one being "
                         f"written need {need / 2**30:.1f} GiB: another --out, or a smaller --keep")


def build_policy(model, args, device, frozen=False):
    """A Policy, sharded wherever there is a GPU, a second rank or mixed precision to be had."""
    dtype = getattr(torch, args.dtype)
    policy = policy_lib.Policy(model, recompute=bool(args.recompute) and not frozen, chunk=args.logit_chunk)
    if frozen:
        policy.requires_grad_(False)
        for p in policy.parameters():  # not policy.to(dtype): that would round the rotary frequencies as well
            p.data = p.data.to(dtype)
    if device.type == "cuda" or dist.get_world_size() > 1 or dtype != torch.float32:
        policy = policy.shard(dtype, device)
    return policy


def restore(run, checkpoint):
    state = policy_lib.load_checkpoint(checkpoint, run.policy, run.optimizer)
    for name in ("step", "generated", "skipped", "skipped_in_a_row", "reward_seen"):
        setattr(run, name, state[name])
    changed = {k: (v, vars(run.args).get(k)) for k, v in state["config"].items() if vars(run.args).get(k) != v
               and k not in ("resume", "steps", "out", "engine", "report_to")}
    if changed:
        run.say("resuming with other options than before: " + ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items()))


def write_config(run):
    config = {"options": vars(run.args), "world": run.world, **provenance(), "command": sys.argv}
    if run.rank == 0:
        policy_lib.write_atomic(run.folder("config.json"), json.dumps(config, indent=1))
    run.say(textwrap.fill("  ".join(f"{k}={v}" for k, v in vars(run.args).items()), 118, break_on_hyphens=False))


def metrics_file(run, report):
    """A function that appends one line to metrics.jsonl, synced: what was measured survives a crash. On resume, lines
    of steps after the checkpoint (and half a line, if the crash cut one) go: those steps are done again."""
    path = run.folder("metrics.jsonl")
    if run.rank == 0 and os.path.exists(path):
        kept = []
        with open(path) as f:
            for text in f:
                try:
                    if run.step and json.loads(text)["step"] <= run.step:  # from step 0 everything is done again
                        kept.append(text)
                except json.JSONDecodeError:
                    break
        policy_lib.write_atomic(path, "".join(kept))

    def log(line):
        with open(path, "a") as f:
            f.write(json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())
        report(line)

    return log


def reporter(args):
    """A function that mirrors a metrics line to --report_to; a missing package is refused here, before the work."""
    if args.report_to == "none" or dist.get_rank() != 0:
        return lambda line: None
    numbers = lambda line: {k: v for k, v in line.items() if isinstance(v, (int, float))}
    try:
        if args.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(os.path.join(args.out, "tensorboard"))
            return lambda line: [writer.add_scalar(k, v, line["step"]) for k, v in numbers(line).items()] and writer.flush()
        tracker = __import__(args.report_to)
    except ImportError as e:
        raise ValueError(f"--report_to {args.report_to}: {e}; pip install {args.report_to}") from e
    tracker.init(project="nanoscaler", name=os.path.basename(os.path.normpath(args.out)), config=vars(args))
    return lambda line: tracker.log(numbers(line), step=line["step"]) if args.report_to == "wandb" else tracker.log(numbers(line))


def main(argv=None):
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    join_processes()
    try:
        run = setup(args)
    except (ValueError, OSError, RuntimeError) as e:
        if dist.get_rank() == 0:
            print(f"grpo.py: {e}", file=sys.stderr)
        sys.exit(2)

    def on_signal(number, frame):
        if run.signal_seen:
            raise KeyboardInterrupt  # the second one means now
        run.signal_seen = True
        run.say(f"signal {number}: saving and leaving")

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        if run.step == 0 and args.eval_every:
            line = {"step": 0, **run.validate()}
            if run.rank == 0 and len(line) > 1:
                run.log(line)
                run.say(f"before training: eval reward {line['eval_reward']:.3f} +- {line['eval_se'] or 0:.3f}")
        if run.step >= args.steps:
            run.say(f"{args.out} has done its {args.steps} steps: nothing left to do (raise --steps to go on)")
        train(args, run)
    except (torch.OutOfMemoryError, MemoryError) as e:
        raise SystemExit(f"out of memory ({str(e).splitlines()[0]}): lower --token_budget (now {args.token_budget}), "
                         f"--gpu_memory ({args.gpu_memory}) or --max_len, or use more ranks") from e
    run.engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
