"""update.py - the training half of a step on a saved rollout file: TRL, plain loops, ours, and the limit.

    python bench/update.py --model models/smollm2 --peer_python PEERS/bin/python      # an hour on two cores
    python bench/update.py --workloads tiny                                           # no model folder needed
    python bench/update.py --quick                                                    # seconds

Timed: advantages, packing or padding, old log-probs, loss, backward, clipping, AdamW, from the samples in
hand to the last optimizer step. Every side does it twice on the same samples, and `seconds` is the second
time: the first optimizer step of a run creates Adam's moments, 3 s of first touches of memory with SmolLM2,
and no later one does (`first_seconds` shows it). The recipe's two updates a rollout (--updates): the second
needs old log-probs. TRL scores all samples for that; ours and the plain loops only the second half, because
at the first update the policy is the old one.

  ours     grpo.py's own Learner.pack, score and update; computes the entropy as well
  trl      GRPOTrainer.train with the samples handed in through `rollout_func`; its shuffling of samples is
           switched off so that its two mini-batches are ours; computes the entropy as well
  padded   the plain loop: micro-batches in file order, padded to their longest, full logits
  sorted   samples sorted by length, no attention mask (right-padding needs none), head on response tokens
  limit    as many tokens forward and backward through the bare model as ours, in full rows of one length
           without any padding: body, head on response tokens, cross-entropy; no entropy and no optimizer

Micro-batch sizes of trl, padded and sorted are scanned first (--micro), each plays with its best. Workloads:
`tiny`, a random Qwen2 of 1.6 M parameters, 32 x 8 samples of 82 tokens on average, cut at 208 (the ratio of
the 16K stage); `smollm2`, 2 x 8 samples of 133 tokens on average, cut at 240. The JSON says what the files
hold. Checked: the gradient norm of each update against ours (an on-policy GRPO loss is about 0 whatever the
log-probs are, its gradient is not) and the mean entropy.
"""
import argparse
import os
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

SHAPE = ("prompts", "group", "mean", "max_len", "prompt_len", "micro")  # micro: micro-batch sizes to scan
WORKLOADS = {name: dict(zip(SHAPE, values)) for name, values in {
    "tiny": (32, 8, 101, 208, 32, [8, 16, 32, 64]),
    "smollm2": (2, 8, 200, 240, 64, [1, 2, 4, 8]),
    "quick": (4, 4, 24, 60, 8, [4]),
}.items()}


# ----- The sides: spec in, {"seconds", "cpu_seconds", "memory_mb", "grad_norm" of each update, ...} out ----

def ours(spec):
    """As grpo.train does it between `generate` and `push`."""
    import grpo
    same = {name: spec[name] for name in ("dtype", "group", "prompts", "updates", "max_len")}
    # no correction for an engine: the file's log-probs are random, and the other sides get none
    learner = measure.make_learner(spec["model"], spec["token_budget"], temperature=1.0, lr=1e-6, tis_cap=0,
                                   **same)
    rows = measure.read_rollouts(spec["rollouts"])
    samples = measure.as_samples(rows)
    rewards = torch.tensor([r["reward"] for r in rows]).view(spec["prompts"], spec["group"])
    first, _ = learner.pack(samples, rewards, torch.arange(1))
    warm_up(lambda: learner.policy(first[0][0])[0].sum(), learner.optimizer)
    norms, entropies, halves = [], [], torch.arange(spec["prompts"]).chunk(spec["updates"])
    with measure.meter() as m:
        for _ in m.twice():
            advantages = grpo.group_advantages(rewards)
            minibatches = [learner.pack(samples, advantages, p) for p in halves]
            old = [learner.score(learner.policy if k else None, mini) for k, mini in enumerate(minibatches)]
            for mini, old_logp in zip(minibatches, old):
                stats = Counter()
                learner.update(0, mini, old_logp, learner.score(None, mini), stats)
                norms.append(stats["grad_norm"])
                entropies.append(float(stats["entropy"] / stats["tokens"]))
    return m.answer(grad_norm=norms, entropy=entropies, token_budget=spec["token_budget"])


def trl(spec):
    """GRPOTrainer's own loop; the clock runs from rollout_func to the last optimizer step's end."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl.trainer.grpo_trainer as module
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    module.shuffle_sequence_dict = lambda batch: batch
    rows = measure.read_rollouts(spec["rollouts"])
    n, k, updates, stack = len(rows), spec["micro"], spec["updates"], ExitStack()

    def rollout_func(prompts, trainer):
        if box:
            box[0].again()
        else:
            box.append(stack.enter_context(measure.meter()))
        return {"prompt_ids": [r["prompt"] for r in rows], "completion_ids": [r["response"] for r in rows],
                "logprobs": None}

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2 * updates:
                stack.close()

    box, rewards = [], [r["reward"] for r in rows]
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    with tempfile.TemporaryDirectory() as folder:
        args = module.GRPOConfig(
            folder, per_device_train_batch_size=k, gradient_accumulation_steps=n // updates // k,
            steps_per_generation=n // k,
            num_generations=spec["group"], max_completion_length=spec["max_len"], max_steps=2 * updates,
            **trl_settings(spec["dtype"]))
        trainer = module.GRPOTrainer(
            model, args=args, reward_funcs=lambda completions, **_: rewards, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [str(r["problem"]) for r in rows[::spec["group"]]]}),
            rollout_func=rollout_func, callbacks=[Stop()])
        warm_up(lambda: plain_logp(trainer.model, rows[:2], spec["dtype"], logits=True).sum(), trainer.model)
        trainer.train()
    log = [line for line in trainer.state.log_history if "grad_norm" in line]
    # TRL divides each mini-batch by the mean token count of all mini-batches, we by its own: put on our scale
    counts = [sum(len(r["response"]) for r in rows[i:i + n // updates]) for i in range(0, n, n // updates)]
    norms = [line["grad_norm"] * sum(counts) / updates / c for line, c in zip(log, counts * 2, strict=True)]
    return box[0].answer(grad_norm=norms, entropy=[line["entropy"] for line in log], micro=k)


def trl_settings(dtype):
    """What GRPOConfig is told in every benchmark: the recipe, no logs, nothing saved."""
    cuda = torch.cuda.is_available()
    return {"learning_rate": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0,
            "lr_scheduler_type": "constant", "loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28,
            "beta": 0.0, "temperature": 1.0,
            "bf16": dtype == "bfloat16", "use_cpu": not cuda, "gradient_checkpointing": cuda,
            "dataloader_pin_memory": cuda, "shuffle_dataset": False, "logging_steps": 1, "report_to": [],
            "save_strategy": "no", "disable_tqdm": True}


def plain_logp(model, rows, dtype, logits):
    """Log-probs [R] of the response tokens of a padded micro-batch; full logits, or head on these only."""
    device = next(model.parameters()).device
    longest = max(len(r["prompt"]) + len(r["response"]) for r in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    scored = torch.zeros(len(rows), longest, dtype=torch.bool)  # positions that predict a response token
    mask = torch.zeros_like(ids)
    for i, r in enumerate(rows):
        p, t = len(r["prompt"]), len(r["prompt"]) + len(r["response"])
        ids[i, :t], mask[i, :t], scored[i, p - 1:t - 1] = torch.tensor(r["prompt"] + r["response"]), 1, True
    ids, mask, scored = ids.to(device), mask.to(device), scored.to(device)
    targets = ids.roll(-1, 1)[scored]
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        if logits:
            z = model(ids, attention_mask=mask, use_cache=False).logits.float()
            return torch.log_softmax(z, -1).gather(-1, ids.roll(-1, 1)[..., None])[..., 0][scored]
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[scored]
        tiles = [-F.cross_entropy(model.lm_head(h).float(), t, reduction="none")
                 for h, t in zip(hidden.split(1024), targets.split(1024))]
        return torch.cat(tiles)


def plain(spec, by_length):
    """A loop as one would write it in an afternoon, on the loss function of grpo.py."""
    from transformers import AutoModelForCausalLM

    import grpo
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
    rows, k, norms = measure.read_rollouts(spec["rollouts"]), spec["micro"], []
    rewards = torch.tensor([r["reward"] for r in rows]).view(spec["prompts"], spec["group"])
    warm_up(lambda: plain_logp(model, rows[:2], spec["dtype"], not by_length).sum(), optimizer)
    with measure.meter() as m:
        for _ in m.twice():
            for r, a in zip(rows, grpo.group_advantages(rewards).view(-1).tolist()):
                r["advantage"] = a
            half = len(rows) // spec["updates"]
            minis = [rows[i:i + half] for i in range(0, len(rows), half)]
            if by_length:
                minis = [sorted(mini, key=lambda r: len(r["prompt"]) + len(r["response"])) for mini in minis]
            minis = [[mini[i:i + k] for i in range(0, half, k)] for mini in minis]
            with torch.no_grad():
                old = {id(batch): plain_logp(model, batch, spec["dtype"], not by_length)
                       for mini in minis[1:] for batch in mini}
            for mini in minis:
                total = sum(len(r["response"]) for batch in mini for r in batch)
                for batch in mini:
                    logp = plain_logp(model, batch, spec["dtype"], not by_length)
                    advantages = torch.tensor([r["advantage"] for r in batch], device=device)
                    lengths = torch.tensor([len(r["response"]) for r in batch], device=device)
                    loss, _ = grpo.grpo_loss(logp, old.get(id(batch)), advantages, lengths, clip_high=0.28,
                                             total=total)
                    loss.backward()
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
                optimizer.step()
                optimizer.zero_grad()
    return m.answer(grad_norm=norms, micro=k)


def limit(spec):
    """The same numbers of tokens through the bare model, in micro-batches [B, L] without any padding."""
    from transformers import AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, spec["dtype"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype).to(device).train()
    rows = measure.read_rollouts(spec["rollouts"])
    half = len(rows) // spec["updates"]
    batches = []
    for i in range(0, len(rows), half):
        mini = rows[i:i + half]
        scored = sum(len(r["response"]) for r in mini)
        tokens = scored + sum(len(r["prompt"]) for r in mini)
        length = round(tokens / len(mini))
        pieces = -(-tokens // spec["token_budget"])  # as many micro-batches as ours, at least
        for j in range(pieces):
            b = (len(mini) * (j + 1)) // pieces - (len(mini) * j) // pieces
            batches.append((torch.randint(5, model.config.vocab_size, (b, length), device=device),
                            scored * b // len(mini), i > 0))

    def loss(ids, n):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)[:n]
        return F.cross_entropy(hidden @ model.get_output_embeddings().weight.T, ids.flatten()[:n])

    warm_up(lambda: loss(batches[0][0][:2], 8), model)
    with measure.meter() as m:
        for _ in m.twice():
            with torch.no_grad():
                for ids, n, old in batches:
                    if old:
                        loss(ids, n)
            for ids, n, _ in batches:
                loss(ids, n).backward()
            model.zero_grad()
    return m.answer(tokens=sum(ids.numel() for ids, _, _ in batches))


def warm_up(loss, optimizer):
    """One small forward and backward before the clock starts, for every side: kernels are loaded then."""
    loss().backward()
    optimizer.zero_grad(set_to_none=True)


SIDES = {"ours": ours, "trl": trl, "padded": lambda s: plain(s, False), "sorted": lambda s: plain(s, True),
         "limit": limit}


# ----- The script ------------------------------------------------------------------------------------------

def scan(side, settings, sizes, python):
    """The micro-batch size with which a side is fastest -> (size, {size: seconds or error})."""
    seen = {}
    for k in sizes:
        a = measure.measure(__file__, side, {**settings, "micro": k}, python)
        seen[k] = a.get("error") or a["seconds"]
        print(f"  scan {side}, micro-batch {k}: {seen[k] if 'error' in a else round(seen[k], 2)}", flush=True)
    good = {k: s for k, s in seen.items() if not isinstance(s, str)}
    return min(good, key=good.get) if good else sizes[0], seen


def one_workload(name, dtype, args):
    """Rows of one workload: make the rollout file, scan, alternate, check."""
    shape = dict(WORKLOADS["quick" if args.quick else name])
    sizes = args.micro or shape.pop("micro")
    shape.pop("micro", None)
    work = Path(args.work)
    model = measure.tiny_model(work / "tiny") if name == "tiny" else args.model
    vocab = 4096 if name == "tiny" else vocabulary(model)
    path = work / f"rollouts-{'quick' if args.quick else name}.jsonl"
    holds = measure.rollouts(path, vocab, **shape, seed=args.seed)
    longest = max(len(r["prompt"]) + len(r["response"]) for r in measure.read_rollouts(path))
    settings = {**shape, "model": str(model), "rollouts": str(path), "dtype": dtype, "updates": args.updates,
                "token_budget": max(args.token_budget, longest), "longest": longest}
    print(f"{name} {dtype}: {holds}", flush=True)
    jobs, scans = {}, {}
    for side in args.sides:
        python = args.peer_python if side == "trl" else None
        micro = None
        if side in ("trl", "padded", "sorted"):
            micro, scans[side] = scan(side, settings, sizes, python) if len(sizes) > 1 else (sizes[0], {})
        jobs[side] = (side, {**settings, "micro": micro}, python)
    rows = measure.rows_of(measure.alternate(__file__, jobs, args.repeats), workload=name, dtype=dtype)
    compare(rows, holds)
    for row in rows:
        row["scan"] = scans.get(row["side"])
    return rows, holds


def vocabulary(model):
    from transformers import AutoConfig
    return AutoConfig.from_pretrained(model).vocab_size


def compare(rows, holds):
    """Tokens a second, times against ours, and how far the gradient norms are from ours."""
    ours = next((r for r in rows if r["side"] == "ours" and "error" not in r), None)
    for row in rows:
        if "error" in row:
            continue
        row["tokens_per_second"] = holds["tokens_response"] / row["seconds"]["median"]
        if ours is None:
            continue
        row["times_ours"] = row["seconds"]["median"] / ours["seconds"]["median"]
        if "grad_norm" in row:
            norms = zip(row["grad_norm"], ours["grad_norm"], strict=True)
            row["grad_norm_off"] = max(abs(a / b - 1) for a, b in norms)
        if "entropy" in row:
            row["entropy_off"] = max(abs(a - b) for a, b in zip(row["entropy"], ours["entropy"], strict=True))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common(p, "update")
    add = p.add_argument
    add("--workloads", nargs="+", default=None,
        help="tiny, smollm2:float32, smollm2:bfloat16; default: tiny, and both with --model")
    add("--model", help="SmolLM2 folder (python toy/make.py smollm2) or any other causal LM")
    add("--sides", nargs="+", choices=list(SIDES), help="default: all, trl where it is installed")
    add("--micro", type=int, nargs="+", default=None, help="micro-batch sizes (samples) to scan")
    add("--updates", type=int, default=2, help="optimizer updates for the rollout batch, as in the recipe")
    add("--token_budget", type=int, default=2048, help="of our micro-batch; 2,048 is grpo.py's on a CPU")
    args = p.parse_args(argv)
    if args.worker:
        return measure.serve(SIDES, args.worker)
    before = measure.start(args)
    if args.quick:
        args.repeats, args.workloads, args.token_budget = 1, ["tiny"], 256
        args.sides = args.sides or ["ours", "padded", "sorted", "limit"]
    args.sides = args.sides or [s for s in SIDES if s != "trl" or args.peer_python or measure.has("trl")]
    workloads = args.workloads or ["tiny"] + ["smollm2:float32", "smollm2:bfloat16"] * bool(args.model)
    if not args.model and any(w != "tiny" for w in workloads):
        p.error("smollm2 needs --model FOLDER: python toy/make.py smollm2 --out FOLDER makes it")
    rows, files = [], {}
    for workload in workloads:
        name, _, dtype = workload.partition(":")
        more, files[workload] = one_workload(name, dtype or "float32", args)
        rows += more
    measure.print_rows(rows, [("workload", "workload", ""), ("dtype", "dtype", ""), ("side", "side", ""),
                        ("seconds", "seconds", ".2f"), ("first", "first_seconds", ".2f"),
                        ("CPU s", "cpu_seconds", ".2f"), ("x ours", "times_ours", ".2f"),
                        ("response tokens/s", "tokens_per_second", ",.0f"),
                        ("memory MiB", "memory_mb", ",.0f"), ("micro", "micro", ""),
                        ("|g| off", "grad_norm_off", ".1e"),
                        ("H off", "entropy_off", ".1e")])
    measure.write(args, "one update phase on a saved rollout file", rows, before, rollout_files=files)


if __name__ == "__main__":
    main()
