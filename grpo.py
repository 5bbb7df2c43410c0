"""grpo.py - one stage of DeepScaleR: GRPO with a 0/1 answer-checking reward.

    torchrun --nproc_per_node 8 grpo.py --max_len 8192                # 8 GPUs; more nodes: --nnodes ...
    python grpo.py --model DIR --data FILE --max_len 256 --out RUN    # one process, GPU or laptop
    python grpo.py --out RUN --resume ...                             # go on from the newest checkpoint
    touch RUN/stop                                                    # save and leave after this step

One step: P problems are answered G times each. A right answer earns 1, a wrong one 0. The advantage of an
answer is its reward compared with the other answers to the same problem. A clipped policy gradient moves the
probability of every response token, and the engine gets the new weights. `train` shows this on one screen.

Unlike GRPO as published: every token of a mini-batch weighs the same (a mean over each response favours
short right and long wrong answers), and engine and trainer may differ (--tis_cap corrects that). Unlike
DeepScaleR as run: the KL has the right sign (its 8K stage maximised it), losses divide by the global token
count (it summed means), `</think>` alone closes the thought. Left out: value models, LoRA, asynchrony.
Shapes: P prompts, G samples of each, S sequences of a micro-batch, R their response tokens, end to end.
"""
import gzip
import importlib.util
import json
import math
import os
import resource
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import common
import data
import evaluate
import policy as policy_lib
from common import RankError, say, together
from rollout import Sampling, compute_dtype, make_engine, rollout

LATER = {"temperature": 1.0, "clip_high": 0.28, "kl_coef": 0.0, "entropy_coef": 0.0, "tis_cap": 2.0}
RECIPES = {"deepscaler": {},  # its first stage: its scripts and the defaults they left on
           "improved": {**LATER, "drop_zero_variance": 1},  # found by JustRL, Archer, POLARIS, Skywork-OR1
           "justrl": {**LATER, "prompts": 256, "updates": 4, "max_len": 15360, "steps": 4380,  # 2512.16649
                      "warmup_steps": 10, "weight_decay": 0.1}}
LOSSES = {"clip": {}, "cispo": {"clip_low": 1.0, "clip_high": 4.0}}  # cispo: no lower bound, weights up to 5
MAX_SKIPS = 5  # updates in a row that are not finite and end a run


# ----- The algorithm ----------------------------------------------------------------------------------------

def group_advantages(rewards, normalize="std", eps=1e-6):
    """[P, G] rewards -> [P, G] advantages: each sample against the other answers to its own problem.

    normalize "std": (r - mean) / (std + eps) with the unbiased std (DeepSeekMath 2402.03300, as in verl).
    "mean": r - mean (Dr. GRPO 2503.20783: the std overweights nearly solved and nearly hopeless problems).
    A group whose rewards are all equal gets exactly 0.

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [0., 0., 0., 0.]]), "mean").tolist()
    [[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2 or not torch.isfinite(rewards).all():
        raise ValueError(f"rewards must be finite, in groups of at least two, not {tuple(rewards.shape)}")
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

    agg: what one token weighs. `total` is the *global* count, over all micro-batches and ranks, so that
    cutting a batch differently cannot change the gradient (default: the count of this call):
      "token"  1 / total response tokens                      TRL dapo, verl token-mean
      "seq"    1 / own length / total sequences               TRL grpo, verl seq-mean-token-mean
      "const"  1 / total, a constant: sequences x max_len     TRL dr_grpo, verl seq-mean-token-sum-norm

    >>> logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    >>> loss, _ = grpo_loss(logp, None, torch.tensor([1.0, -1.0]), torch.tensor([2, 1]))
    >>> round(loss.item(), 4), torch.autograd.grad(loss, logp)[0].mul(3).tolist()
    (-0.3333, [-1.0, -1.0, 1.0])
    """
    if loss not in LOSSES or agg not in ("token", "seq", "const") or agg == "const" and total is None:
        raise ValueError(f"loss: clip, cispo; agg: token, seq or, with a total, const; not {loss!r}, {agg!r}")
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
        per_token = per_token - entropy_coef * entropy
    if agg == "seq":
        per_token = per_token / lengths.clamp(min=1).repeat_interleave(lengths, output_size=len(logp))
    total = total or (len(lengths) if agg == "seq" else len(logp))
    return per_token.sum() / total, {name: x.detach() for name, x in stats.items()}


def mismatch(logp, engine_logp):
    """Trainer against engine, token sums: |d|, k3 KL(engine || trainer), exp|d|, number outside [1/2, 2]."""
    d = (logp - engine_logp).double()  # in fp32 exp(d) - 1 - d of a small d is 0
    return {"mismatch_mean": d.abs().sum(), "mismatch_kl": (d.exp() - 1 - d).sum(),
            "mismatch_mult": d.abs().exp().sum(), "mismatch_far": (d.abs() > math.log(2)).sum()}


# ----- The run, in the order of time ------------------------------------------------------------------------

def train(args, device):
    """Build the parts, then the loop: one turn is one step of the paper -> the signal that ended it, or 0."""
    model = policy_lib.open_model(args.model)
    names = common.gather(policy_lib.checkpoints(f"{args.out}/checkpoints"))[0]  # a shared disk may lag
    task = together("start", lambda: Task(args, model, names))
    # the engine first: vLLM measures the memory that is free when it starts; it sleeps while the rest loads
    engine = make_engine(args.engine, model.folder, max_model_len=task.longest, dtype=args.dtype,
                         device=device, max_seqs=args.max_seqs, gpu_memory=args.gpu_memory, enable_sleep=True)
    engine.sleep()
    learner = Learner(args, task, model.folder, device)
    step, generated, unwritten = learner.load()
    log = Log(args, step, unwritten)
    engine.push(learner.policy.full_weights())
    say(f"{model.parameters / 1e6:,.1f} M parameters, {len(task.problems):,} problems, {args.dtype}, "
        f"engine {engine.name}, {dist.get_world_size()} x {device.type}\n{HEADER}")
    signals, writer = common.catch_signals(), ThreadPoolExecutor(1)
    training = Sampling(n=args.group, temperature=args.temperature, max_tokens=args.max_len, seed=args.seed)
    validation = Sampling(n=args.eval_n, temperature=args.eval_temperature, top_p=args.eval_top_p,
                          max_tokens=args.eval_max_len or args.max_len, seed=args.eval_seed)

    def generate(*work):
        engine.wake()
        return rollout(engine, task.tokenizer, *work, task.grade, stop=lambda: bool(signals))

    def lap(phase):
        if device.type == "cuda":
            torch.cuda.synchronize()  # else a phase would end when its kernels are launched
        seconds[phase] = time.time() - began - sum(seconds.values())

    while True:
        if log.unfinished:  # the last line, even if a signal or a kill cut it short, may want a validation
            if args.eval_every and (step % args.eval_every == 0 or step == args.steps):
                samples, seconds = generate(task.eval_problems, task.eval_prompts, validation, "eval")
                engine.sleep(keep_weights=True)
                if samples is None:  # a signal
                    break
                scores = evaluate.curve_point(samples, task.eval_problems, args.eval_n)
                log.rows[-1] |= {**scores, "eval_seconds": sum(seconds.values())}
            log.write()
        if step >= args.steps or common.any_rank(signals or os.path.exists(f"{args.out}/stop")):
            break
        began = time.time()
        batch = data.batch_indices(len(task.problems), step, args.prompts, args.seed)
        problems, prompts = [task.problems[i] for i in batch], [task.prompts[i] for i in batch]
        samples, seconds = generate(problems, prompts, training, step + 1)
        if samples is None:  # a signal: the unfinished rollout is dropped
            break
        engine.sleep()
        if not all(np.isfinite(s.logprobs).all() for s in samples):  # else they would only look unlucky
            raise FloatingPointError(f"after step {step} the engine's log-probs are not finite")
        rewards = torch.tensor([s.reward for s in samples]).view(args.prompts, args.group)          # [P, G]
        advantages = group_advantages(rewards, args.advantage)                                      # [P, G]
        saving = writer.submit(log.save_samples, step + 1, samples, problems, advantages)  # beside the update
        rows = torch.arange(args.prompts).chunk(args.updates)
        minibatches = [learner.pack(samples, advantages, prompts) for prompts in rows]
        lap("pack")
        # the first mini-batch needs no old log-probs: its policy is still the old one
        old = [learner.score(learner.policy if k else None, mini) for k, mini in enumerate(minibatches)]
        ref = [learner.score(learner.reference, mini) for mini in minibatches]
        lap("logprobs")
        stats = Counter()
        for mini, old_logp, ref_logp in zip(minibatches, old, ref):
            learner.update(step, mini, old_logp, ref_logp, stats)
        lap("update")
        engine.push(learner.policy.full_weights())
        lap("sync")

        step, generated = step + 1, generated + sum(len(s.response_ids) for s in samples)
        metrics = step_metrics(learner, samples, rewards, stats, began, seconds)
        saving.result()
        log.add({"step": step, "tokens_total": generated, **metrics})
        if step % args.save_every == 0 or step == args.steps:
            learner.save(step, generated, log.rows[log.written:])
    if learner.saved != step:
        learner.save(step, generated, log.rows[log.written:])
    engine.close()
    saved = f"{args.out}/checkpoints/{learner.saved:06d}"
    say(f"stopped after step {step}; --resume goes on from {saved}" if step < args.steps else
        f"done. Next: evaluate.py --model {saved}/hf, figures.py {args.out}, or a larger --steps --resume")
    return signals[0] if signals else 0


class Task:
    """The data and sizes of a run, checked before a weight is loaded."""

    def __init__(self, args, model, names):  # names of the checkpoints that are there
        self.checkpoint = f"{args.out}/checkpoints/{names[-1]}" if names and args.resume else None
        if not args.resume and os.path.exists(f"{args.out}/metrics.jsonl"):
            raise ValueError(f"{args.out} holds a run: --resume goes on, another --out starts afresh")
        whole = max(1, (args.keep or 2) + 1 - len(names))  # 16 bytes a parameter; 4 where only hf/ stays
        need = model.parameters * (16 * whole + (0 if args.keep else 4 * (args.steps // args.save_every)))
        if shutil.disk_usage(args.out).free < need:
            raise ValueError(f"needs {need / 2**30:.1f} GiB free in {args.out}: see --keep, --save_every")
        response, most = max(args.max_len, args.eval_max_len), model.positions or 10**9
        if response >= most:
            raise ValueError(f"--max_len {response} leaves no room for a prompt in {most} positions")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model.folder)
        style, room, sets = evaluate.load_style(args.style), min(args.max_prompt_len, most - response), []
        self.grade = evaluate.load_reward(args.reward, style)
        for path in [args.data, args.eval_data] if args.eval_every else [args.data]:
            *both, dropped = evaluate.load_prompts(path, args, model, self.tokenizer, style, room)
            sets += both
            if dropped:
                say(f"{path}: {dropped} of {dropped + len(both[0])} prompts have over {room} tokens: dropped")
        self.problems, self.prompts, self.eval_problems, self.eval_prompts = [*sets, [], []][:4]
        data.batch_indices(len(self.problems), 0, args.prompts, args.seed)  # refuses a set that is too small
        self.longest = response + max(map(len, self.prompts + self.eval_prompts))  # tokens
        self.budget = args.token_budget or max(32768 if torch.cuda.is_available() else 2048, self.longest)
        if self.budget < self.longest:
            raise ValueError(f"--token_budget {self.budget} holds no full sequence of {self.longest} tokens")


class Learner:
    """The policy, its frozen reference and the optimizer: pack, score, update, save, load."""

    def __init__(self, args, task, model, device):
        self.args, self.task, self.model, self.device = args, task, model, device
        self.pooled = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # vLLM's, also asleep
        self.policy = self.build()
        self.reference = self.build(frozen=True) if args.kl_coef else None
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), args.lr, fused=True)
        self.saved = self.skipped = self.in_a_row = 0

    def build(self, frozen=False):
        """A Policy from --model, sharded wherever there is a GPU, a second rank or mixed precision."""
        recompute, dtype = self.args.recompute and not frozen, getattr(torch, self.args.dtype)
        policy = together("model", lambda: policy_lib.Policy(self.model, recompute))
        if frozen:
            for p in policy.requires_grad_(False).parameters():  # .to(dtype) would round rotary frequencies
                p.data = p.data.to(dtype)
        alone = self.device.type == "cpu" and dist.get_world_size() == 1 and dtype == torch.float32
        return policy if alone else policy.shard(dtype, self.device)

    def pack(self, samples, advantages, prompts):
        """One update on some rows of `advantages` [P, G] -> this rank's micro-batches, each with its
        advantages [S] and engine log-probs [R], and the global count that the loss divides by."""
        args, device, group = self.args, self.device, self.args.group
        kept = [p for p in prompts.tolist() if not args.drop_zero_variance or advantages[p].any()]
        rows = [samples[p * group + j] for p in kept for j in range(group)]
        flat, out = advantages[kept].flatten(), []
        sequences = [(s.prompt_ids, s.response_ids) for s in rows]
        for m in policy_lib.pack(sequences, self.task.budget, dist.get_rank(), dist.get_world_size(), device):
            engine_logp = np.concatenate([[], *(rows[i].logprobs for i in m.rows)], dtype=np.float32)
            out.append((m, flat[m.rows].to(device), torch.from_numpy(engine_logp).to(device)))
        tokens = sum(len(s.response_ids) for s in rows)
        return out, {"token": tokens, "seq": len(rows), "const": len(rows) * args.max_len}[args.loss_agg]

    @torch.no_grad()
    def score(self, model, mini):
        """Log-probs [R] of every micro-batch under `model`; of each None without a model."""
        if model is None:
            return [None] * len(mini[0])
        scores = [model(m, self.args.temperature)[0] for m, _, _ in mini[0]]
        model.reshard()  # FSDP keeps embedding and head gathered after a forward that no backward follows
        return scores

    def update(self, step, mini, old_logp, ref_logp, stats):
        """One optimizer step. A gradient that is not finite skips it, on all ranks together."""
        (micro, total), args = mini, self.args
        if total == 0:
            stats["updates_empty"] += 1  # every group of it was all right or all wrong
            return
        lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup_steps))
        self.optimizer.param_groups[0].update(lr=lr, weight_decay=args.weight_decay)
        bar = tqdm(micro, desc="update", leave=False, disable=None if dist.get_rank() == 0 else True)
        for (m, advantages, engine_logp), old, ref in zip(bar, old_logp, ref_logp):
            logp, entropy = self.policy(m, args.temperature, entropy_grad=args.entropy_coef != 0)
            loss, sums = grpo_loss(
                logp, old, advantages, m.lengths, ref_logp=ref, engine_logp=engine_logp, entropy=entropy,
                loss=args.loss, clip_low=args.clip_low, clip_high=args.clip_high, kl_coef=args.kl_coef,
                entropy_coef=args.entropy_coef, tis_cap=args.tis_cap, agg=args.loss_agg, total=total)
            # FSDP averages gradients over ranks; the loss is divided by the global count already: undo that
            (loss * self.policy.grad_divisor).backward()
            sums |= {**mismatch(logp.detach() if old is None else old, engine_logp), "loss": loss.detach()}
            stats.update({name: x.double() for name, x in sums.items()})  # added on the device: nobody waits
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), args.grad_clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if common.any_rank(not torch.isfinite(norm)):
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            say(f"ALARM update skipped: its gradient is not finite, {self.in_a_row} in a row")
            if self.in_a_row == MAX_SKIPS:
                raise FloatingPointError(f"{MAX_SKIPS} updates in a row had no finite gradient")
        else:
            self.optimizer.step()
            self.in_a_row = 0
            stats.update(updates=1, grad_norm=norm.item())
        self.optimizer.zero_grad()

    def save(self, step, generated, unwritten):
        """A checkpoint. A full disk costs it, not the run. Damaged weights are a FloatingPointError."""
        if self.in_a_row:
            return say(f"no checkpoint at step {step}: the last update was not finite")
        state = {"step": step, "generated": generated, "unwritten": unwritten, "skipped": self.skipped,
                 "config": vars(self.args)}
        try:
            policy_lib.save_checkpoint(f"{self.args.out}/checkpoints", step, self.policy, self.optimizer,
                                       self.task.tokenizer, state, self.args.keep)
            self.saved = step
        except OSError as e:
            say(f"ALARM {e}\n      training goes on; free some disk space or lower --keep")

    def load(self):
        """Go on from the last checkpoint, or take another run's moments -> step, tokens, unwritten lines."""
        checkpoint = self.task.checkpoint or self.args.optimizer_from
        state = policy_lib.load_checkpoint(checkpoint, self.policy, self.optimizer) if checkpoint else {}
        if not self.task.checkpoint:
            return 0, 0, [{"step": 0}] if self.args.eval_every else []
        self.saved, self.skipped = state["step"], state["skipped"]
        changed = evaluate.differences(state["config"], vars(self.args), ("resume", "steps", "out"))
        say(f"resuming from {checkpoint}" + (f" with other options: {changed}" if changed else ""))
        return self.saved, state["generated"], state.get("unwritten", [])


# ----- What is measured, written and said (docs/metrics.md lists every name with its unit) ------------------

HEADER = (" step/total | reward  none   all |  length   cut | entropy mismatch gradient | "
          "seconds  tok/s | eval")
COLUMNS = ("{reward:6.3f} {solve_none:5.2f} {solve_all:5.2f} | {length_mean:7.1f} {truncated:5.2f} | "
           "{entropy:7.3f} {mismatch_kl:8.1e} {grad_norm:8.2e} | {seconds:7.1f} {speed:6.0f}")
MISMATCH = {"float32": (1e-5, 1.01), "bfloat16": (5e-3, 1.1)}  # bounds: KL, ratio error (docs/metrics.md)
GROUPS = {"solve": "reward", "truncated": "length", "tokens": "length", "seconds": "time", "memory": "time",
          "reward": "reward", "length": "length", "mismatch": "mismatch", "eval": "eval"}  # all else: policy
REASONS = ("no_close", "no_box", "unparsed_answer", "unparsed_gold", "timeout", "error")
TOKEN_MEANS = ("pg_loss", "entropy", "kl_ref", "approx_kl", "clip_fraction", "ratio_mean", "mismatch_mean",
               "mismatch_kl", "mismatch_mult", "mismatch_far")


def step_metrics(learner, samples, rewards, stats, began, seconds):
    """What samples (rewards [P, G], lengths in tokens), updates (token sums of this rank -> means over all)
    and machine say: memory of the fullest rank, mean seconds of the phases. None: the mean of nothing."""
    length = torch.tensor([len(s.response_ids) for s in samples]).view_as(rewards)
    cut = torch.tensor([s.finish_reason == "length" for s in samples]).view_as(rewards)
    right, verdicts = rewards >= evaluate.RIGHT, Counter(s.verdict.split(":")[0] for s in samples)
    shares = {"reward": rewards, "solve_none": (~right).all(1), "solve_all": right.all(1), "truncated": cut,
              "length_mean": length, "length_right": length[right], "length_wrong": length[~right],
              "length_truncated": length[cut]}
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(30 if sys.platform == "darwin" else 20)
    if learner.device.type == "cuda":
        used = (torch.cuda.max_memory_allocated() - learner.pooled) / 2**30
        torch.cuda.reset_peak_memory_stats()
    ranks = common.gather(({name: float(x) for name, x in stats.items()}, used, seconds))
    sums = Counter({name: sum(part[name] for part, _, _ in ranks) for name in stats})
    tokens, updates = sums["tokens"] or math.nan, stats["updates"] or math.nan
    means = {name: sums.get(name, math.nan) / tokens for name in TOKEN_MEANS}
    means |= {"loss": sums["loss"] / updates, "grad_norm": stats["grad_norm"] / updates}
    return {**{name: x.float().mean().item() if len(x) else None for name, x in shares.items()},
            **{name: x if math.isfinite(x) else None for name, x in means.items()},
            **{f"seconds_{k}": sum(phases[k] for _, _, phases in ranks) / len(ranks) for k in seconds},
            **{f"reward_{reason}": verdicts[reason] for reason in REASONS},
            "length_max": length.max().item(), "length_min": length.min().item(),
            "tokens": length.sum().item(), "tokens_prompt": sum(len(s.prompt_ids) for s in samples),
            "tokens_trained": int(sums["tokens"]), "lr": learner.optimizer.param_groups[0]["lr"],
            "updates": stats["updates"], "updates_empty": stats["updates_empty"],
            "updates_skipped": learner.skipped, "memory_gib": max(used for _, used, _ in ranks),
            "seconds": time.time() - began}


def open_tracker(args):
    """A function (numbers, step) that mirrors metrics to --report_to, or None."""
    path = os.path.abspath(args.out)
    if args.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(f"{path}/tensorboard")
        return lambda numbers, step: [writer.add_scalar(k, v, step) for k, v in numbers.items()]
    if args.report_to != "none":
        tracker = importlib.import_module(args.report_to)
        same = {"id": path.replace("/", "-")[-128:], "resume": "allow"}  # one curve after --resume
        tracker.init(project=os.environ.get("WANDB_PROJECT", "nanoscaler"), name=os.path.basename(path),
                     config=vars(args), **(same if args.report_to == "wandb" else {}))
        return tracker.log


class Log:
    """metrics.jsonl (every number), rollouts/ (every sample), the console (one line a step), a tracker."""

    def __init__(self, args, step, waiting):
        """Lines of later steps go: those are done again. waiting: what the file lacked at the checkpoint."""
        self.args, self.first, self.path = args, dist.get_rank() == 0, f"{args.out}/metrics.jsonl"
        self.written, self.said, self.unpaid, self.unreadable = 0, {}, 0, []
        rows, self.track = together("report", lambda: self.open(step) if self.first else (None, None))
        rows = common.gather(rows)[0]
        late = [row for row in waiting if row["step"] not in [other["step"] for other in rows]]
        self.rows, self.unfinished = rows + late, bool(late)  # the last may still want its validation
        self.flush()

    def open(self, step):
        """What rank 0 does before the first step -> the lines so far, the tracker of the next ones."""
        stop, world = f"{self.args.out}/stop", dist.get_world_size()
        config = common.provenance() | {"options": vars(self.args), "world": world, "command": sys.argv}
        common.write_atomic(f"{self.args.out}/config.json", json.dumps(config, indent=1))
        if os.path.exists(stop):
            os.remove(stop)
            say(f"{stop} was there from before and has been removed")
        there = step and os.path.exists(self.path)  # from step 0 everything is done again
        rows = common.read_lines(self.path, lambda text: say(f"warning: {text}")) if there else []
        return [row for row in rows if row.get("step", step + 1) <= step], open_tracker(self.args)

    def flush(self):
        """All finished lines to metrics.jsonl. A full disk keeps lines back until there is room."""
        rows = self.rows[:-1] if self.unfinished else self.rows
        try:
            if self.first:
                common.write_atomic(self.path, common.json_lines(rows))
            self.written = len(rows)
        except OSError as e:
            say(f"ALARM {e}: {len(rows) - self.written} line(s) are kept and written later")

    def add(self, line):
        """The numbers of a step, finished by `write`."""
        self.rows, self.unfinished = [*self.rows, line], True

    def save_samples(self, step, samples, problems, advantages):
        """All samples of a step to rollouts/000STEP.jsonl.gz."""
        # not their verdicts: a response without a box is graded before its gold is read
        rows, self.unreadable = [], [] if self.args.reward else data.unreadable_golds(problems)
        for i, (s, advantage) in enumerate(zip(samples, advantages.flatten().tolist())):
            p, j = problems[i // self.args.group], i % self.args.group
            rows.append({"step": step, "id": p.id, "sample": j, "problem": p.problem, "answer": p.answer,
                         "response": s.text, "reward": s.reward, "advantage": advantage, "verdict": s.verdict,
                         "prompt_tokens": len(s.prompt_ids), "response_tokens": len(s.response_ids),
                         "finish_reason": s.finish_reason})
        try:
            if self.first:
                packed = gzip.compress(common.json_lines(rows).encode(), 1, mtime=0)
                common.write_atomic(f"{self.args.out}/rollouts/{step:06d}.jsonl.gz", packed)
        except OSError as e:
            say(f"ALARM rollouts of step {step} not written ({e}); training goes on")

    def write(self):
        """The finished line to metrics.jsonl, tracker and console, and the alarms it gives cause for."""
        line, self.unfinished = self.rows[-1], False
        self.flush()
        if self.track:
            self.track({f"{GROUPS.get(k.split('_')[0], 'policy')}/{k}": v for k, v in line.items()
                        if v is not None and k != "step"}, step=line["step"])
        m = {k: math.nan if v is None else v for k, v in line.items()}
        text = [f"{m['step']:5d}/{self.args.steps:<5d}"]
        text += [COLUMNS.format(**m, speed=m["tokens"] / m["seconds"])] if "reward" in m else []
        text += [f"{m['eval_reward']:.3f} ± {m['eval_se']:.3f}"] if "eval_reward" in m else []
        say(" | ".join(text).replace("nan", "  -"))
        for name, value, words in self.alarms(m) if "reward" in m else []:
            if value > 1.5 * self.said.get(name, 0):  # said once, and again when it is half as bad again
                self.said[name] = value
                say(f"ALARM {words}")

    def alarms(self, m):
        """Signs of a run that looks healthy and is not: (name, how bad it is or 0, words and cure)."""
        golds, cut = [p.answer for p, _ in self.unreadable], m["truncated"]
        kl, mult, most_kl, most_mult = m["mismatch_kl"], m["mismatch_mult"], *MISMATCH[self.args.dtype]
        self.unpaid = 0 if m["reward"] else self.unpaid + 1
        yield "gold", len(golds), f"the grader cannot read {len(golds)} of the right answers: {golds[:2]}"
        yield "reward", 0 if golds else self.unpaid, (
            f"no reward in {self.unpaid} step(s): {m['reward_no_close']} samples had no </think> (--style "
            f"plain?), {m['reward_no_box']} no \\boxed{{}}, {cut:.0%} were cut off (--max_len?)")
        yield "mismatch", kl if kl > most_kl or mult > most_mult else 0, (
            f"engine and trainer disagree: KL {kl:.1e} (bound {most_kl:g}), ratio error {mult:.3f} (bound "
            f"{most_mult}). If it grows, the engine's weights are stale; if not, take --tis_cap 2 or fp32")
        yield "length", cut * (cut > .5), f"{cut:.0%} were cut off at --max_len {self.args.max_len}: raise it"


# ----- Options ----------------------------------------------------------------------------------------------

OPTIONS = {
    "model and data": [
        ("recipe", list(RECIPES), "deepscaler", None, "defaults of many options; what is given by hand wins"),
        ("model", str, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", None, "folder or hub name"),
        ("data", str, str(evaluate.ASSETS.parent / "train.jsonl.gz"), None, "problems: a file or a hub name"),
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
        ("loss", list(LOSSES), "clip", None, "see grpo_loss; cispo has clip defaults of its own"),
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
    "files and machine": [
        ("out", str, "runs/stage1", None, "run folder: config.json, metrics.jsonl, rollouts/, checkpoints/"),
        ("resume", bool, False, None, "go on from the newest checkpoint in --out, or start if there is none"),
        ("save_every", int, 20, 1, "steps between checkpoints; one is written at the end as well"),
        ("keep", int, 2, 0, "checkpoints kept; 0: hf/ of all, the optimizer state of the newest two"),
        ("report_to", ["none", "tensorboard", "wandb", "trackio"], "none", None, "mirror the metrics"),
        ("seed", int, 0, None, "of data order and samples"),
        ("token_budget", int, 0, 0, "packed tokens of a micro-batch; 0: 32,768 on a GPU, 2,048 on a CPU"),
        ("recompute", int, -1, -1, "activation checkpointing, 0 or 1; -1: on a GPU yes, else no"),
        ("gpu_memory", float, 0.6, 0.01, "vLLM's share of each GPU"), *evaluate.MACHINE_OPTIONS]}
GONE = {**dict.fromkeys(("--difficulty", "--min_rate", "--max_rate", "--max_chars"), "use data.py select"),
        "--ref_model": "it is always --model", "--show_every": "python figures.py RUN shows samples"}
TOO_LARGE = ": lower --token_budget, --gpu_memory or --max_len, or use more ranks"
DAMAGED = ". Resuming repeats it from the last good checkpoint: lower --lr or --grad_clip, or take float32"


def parse_args(argv=None):
    """Defaults, then those of --recipe and --loss, then what is given by hand."""
    early, _ = common.Parser(OPTIONS, add_help=False).parse_known_args(argv)
    p = common.Parser(OPTIONS, GONE, description=__doc__.split("\n")[0])
    p.set_defaults(**RECIPES[early.recipe] | LOSSES[early.loss])
    args = p.parse(argv)
    if args.prompts % args.updates:
        p.error(f"--prompts {args.prompts} cannot be cut into {args.updates} equal mini-batches (--updates)")
    if max(args.eval_top_p, args.gpu_memory, args.drop_zero_variance, args.recompute) > 1:
        p.error("--eval_top_p, --gpu_memory, --drop_zero_variance and --recompute are at most 1")
    if args.report_to != "none" and not importlib.util.find_spec(args.report_to):
        p.error(f"--report_to {args.report_to}: pip install {args.report_to}")
    if args.eval_data == "auto":
        args.eval_data = evaluate.BENCHMARKS["aime24"] if args.data == p.get_default("data") else "none"
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
            ended_by = train(args, device)
    except Exception as e:
        memory, told = common.is_out_of_memory(e), isinstance(e, (RankError, FloatingPointError))
        if not (memory or told):
            raise
        advice = TOO_LARGE if memory else DAMAGED if isinstance(e, FloatingPointError) else ""
        if rank == 0 or not told:  # those two are raised on all ranks alike
            print(f"grpo.py: {str(e).strip()}{'' if told else f' (rank {rank})'}{advice}", file=sys.stderr)
        sys.exit(2)
    dist.destroy_process_group()
    sys.exit(128 + ended_by if ended_by and world == 1 else 0)


if __name__ == "__main__":
    main()
