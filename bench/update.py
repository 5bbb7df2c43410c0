"""update.py - the training half of a step on given samples: ours, TRL, a plain loop, and the limit.

    python bench/update.py --peer_python PEERS/bin/python                           # tiny
    python bench/update.py --peer_python PEERS/bin/python --model models/smollm2

Timed: advantages, packing or padding, old log-probs, loss, backward, clipping, AdamW, from the samples in
hand to the last optimizer step, in fp32. Every side does it twice, and `seconds` is the second time: a run's
first optimizer step creates Adam's moments, 3 s of first touches of memory with SmolLM2 (`first_seconds`).
The recipe's two updates a rollout: the second needs old log-probs. TRL scores all samples for that, ours and
the loop the second half, because at the first update the policy is the old one. Ours and TRL compute the
entropy as well. Micro-batches of TRL and the loop have as many samples as were fastest for them. Checked: the
gradient norm of each update against ours (an on-policy GRPO loss is about 0 whatever the log-probs are).
"""
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

# lengths have the ratios of the 16K stage; micro: samples in a micro-batch of trl and sorted
WORKLOADS = {
    "tiny": {"prompts": 32, "group": 8, "mean": 101, "max_len": 208, "prompt_len": 32, "micro": 8},
    "smollm2": {"prompts": 2, "group": 8, "mean": 200, "max_len": 240, "prompt_len": 64, "micro": 4},
    "quick": {"prompts": 4, "group": 4, "mean": 24, "max_len": 60, "prompt_len": 8, "micro": 4}}
UPDATES = 2


def load(spec):
    """Model in fp32 and its samples."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).train()
    return model, measure.rollouts(model.config.vocab_size, **spec["shape"])


def warm_up(loss, optimizer):
    """One small forward and backward before the clock starts, for every side: kernels are loaded then."""
    loss.backward()
    optimizer.zero_grad(set_to_none=True)


def split(rows):
    """Samples -> those of each update."""
    half = len(rows) // UPDATES
    return [rows[i:i + half] for i in range(0, len(rows), half)]


def responses(rows):
    return sum(len(r["response"]) for r in rows)


def ours(spec):
    """grpo.py's Learner as grpo.train uses it between `generate` and `push`."""
    import grpo
    # no correction for an engine: the log-probs are random, and the other sides get none
    learner = measure.make_learner(
        spec["model"], spec["token_budget"], temperature=1.0, lr=1e-6, tis_cap=0, dtype="float32",
        updates=UPDATES, **{name: spec["shape"][name] for name in ("group", "prompts", "max_len")})
    _, rows = load(spec)
    samples, norms, entropies = measure.as_samples(rows), [], []
    rewards = torch.tensor([r["reward"] for r in rows]).view(-1, spec["shape"]["group"])
    first, _ = learner.pack(samples, rewards, torch.arange(1))
    warm_up(learner.policy(first[0][0])[0].sum(), learner.optimizer)
    meter = measure.Meter()
    for begin in (meter.start, meter.lap):
        begin()
        advantages = grpo.group_advantages(rewards)
        halves = torch.arange(len(rewards)).chunk(UPDATES)
        minibatches = [learner.pack(samples, advantages, prompts) for prompts in halves]
        old = [learner.score(learner.policy if k else None, mini) for k, mini in enumerate(minibatches)]
        for mini, old_logp in zip(minibatches, old):
            stats = Counter()
            learner.update(0, mini, old_logp, learner.score(None, mini), stats)
            norms.append(stats["grad_norm"])
            entropies.append(float(stats["entropy"] / stats["tokens"]))
    meter.stop()
    return meter.answer(grad_norm=norms, entropy=entropies)


def trl_trainer(spec, model, prompts, rollouts, on_update, **more):
    """GRPOTrainer with what both sides share, no logs, nothing saved. prompts: rows of its data set.
    on_update(k) is called after the k-th optimizer step."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class OnUpdate(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            on_update(state.global_step)

    shape, k = spec["shape"], spec["micro"]
    n = shape["prompts"] * shape["group"]
    config = GRPOConfig(
        f"{spec['work']}/trl", per_device_train_batch_size=k, gradient_accumulation_steps=n // UPDATES // k,
        steps_per_generation=n // k, num_generations=shape["group"], max_steps=UPDATES * rollouts,
        max_completion_length=shape["max_len"], learning_rate=1e-6, weight_decay=0.01, max_grad_norm=1.0,
        lr_scheduler_type="constant", loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0,
        temperature=1.0, top_p=1.0, top_k=0, bf16=False, use_cpu=True, gradient_checkpointing=False,
        dataloader_pin_memory=False, shuffle_dataset=False, logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True)
    return GRPOTrainer(model, args=config, train_dataset=Dataset.from_list(prompts), callbacks=[OnUpdate()],
                       processing_class=AutoTokenizer.from_pretrained(spec["model"]), **more)


def trl(spec):
    """GRPOTrainer.train with the samples handed in through `rollout_func`, where the clock starts; its
    shuffling of samples is switched off so that its two mini-batches are ours."""
    import trl.trainer.grpo_trainer as module
    module.shuffle_sequence_dict = lambda batch: batch
    (model, rows), meter = load(spec), measure.Meter()
    begins = iter((meter.start, meter.lap))

    def rollout_func(prompts, trainer):
        next(begins)()
        return {"prompt_ids": [r["prompt"] for r in rows], "completion_ids": [r["response"] for r in rows],
                "logprobs": None}

    trainer = trl_trainer(
        spec, model, [{"prompt": str(r["problem"])} for r in rows[::spec["shape"]["group"]]], 2,
        lambda k: k == 2 * UPDATES and meter.stop(), rollout_func=rollout_func,
        reward_funcs=lambda completions, **_: [r["reward"] for r in rows])
    warm_up(plain_logp(trainer.model, rows[:2]).sum(), trainer.model)
    trainer.train()
    log = [line for line in trainer.state.log_history if "grad_norm" in line]
    # TRL divides each mini-batch by the mean token count of all mini-batches, we by its own: put on our scale
    scale = [responses(rows) / UPDATES / responses(mini) for mini in split(rows)] * 2
    norms = [line["grad_norm"] * s for line, s in zip(log, scale, strict=True)]
    return meter.answer(grad_norm=norms, entropy=[line["entropy"] for line in log], micro=spec["micro"])


def plain_logp(model, rows):
    """Log-probs [R] of the response tokens of a micro-batch, padded on the right, which needs no mask."""
    longest = max(len(r["prompt"]) + len(r["response"]) for r in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    scored = torch.zeros(len(rows), longest, dtype=torch.bool)  # positions that predict a response token
    for i, r in enumerate(rows):
        p, t = len(r["prompt"]), len(r["prompt"]) + len(r["response"])
        ids[i, :t], scored[i, p - 1:t - 1] = torch.tensor(r["prompt"] + r["response"]), True
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[scored]
    tiles = zip(hidden.split(1024), ids.roll(-1, 1)[scored].split(1024))
    return torch.cat([-F.cross_entropy(model.lm_head(h), y, reduction="none") for h, y in tiles])


def plain(spec):
    """A loop as one would write it in an afternoon: samples sorted by length, the loss of grpo.py."""
    import grpo
    (model, rows), k, norms = load(spec), spec["micro"], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
    rewards = torch.tensor([r["reward"] for r in rows]).view(-1, spec["shape"]["group"])
    warm_up(plain_logp(model, rows[:2]).sum(), optimizer)
    meter = measure.Meter()
    for begin in (meter.start, meter.lap):
        begin()
        for r, advantage in zip(rows, grpo.group_advantages(rewards).flatten().tolist()):
            r["advantage"] = advantage
        minis = [sorted(mini, key=lambda r: len(r["prompt"]) + len(r["response"])) for mini in split(rows)]
        minis = [[mini[i:i + k] for i in range(0, len(mini), k)] for mini in minis]
        with torch.no_grad():
            old = [[plain_logp(model, b) if i else None for b in mini] for i, mini in enumerate(minis)]
        for mini, old_logps in zip(minis, old):
            total = sum(map(responses, mini))
            for batch, old_logp in zip(mini, old_logps):
                advantages = torch.tensor([r["advantage"] for r in batch])
                lengths = torch.tensor([len(r["response"]) for r in batch])
                loss, _ = grpo.grpo_loss(plain_logp(model, batch), old_logp, advantages, lengths,
                                         clip_high=0.28, total=total)
                loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
    meter.stop()
    return meter.answer(grad_norm=norms, micro=k)


def limit(spec):
    """As many tokens forward and backward through the bare model as ours, in full rows of one length without
    any padding: body, head on response tokens, cross-entropy; no entropy and no optimizer."""
    (model, rows), batches = load(spec), []
    for i, mini in enumerate(split(rows)):
        scored = responses(mini)
        tokens = scored + sum(len(r["prompt"]) for r in mini)
        ids = torch.randint(5, model.config.vocab_size, (len(mini), round(tokens / len(mini))))
        for part in ids.tensor_split(-(-tokens // spec["token_budget"])):  # as many as ours, at least
            batches.append((part, scored * len(part) // len(mini), i > 0))

    def loss(ids, n):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)[:n]
        return F.cross_entropy(model.lm_head(hidden), ids.flatten()[:n])

    warm_up(loss(batches[0][0][:2], 8), model)
    meter = measure.Meter()
    for begin in (meter.start, meter.lap):
        begin()
        with torch.no_grad():
            for ids, n, scored_before in batches:
                if scored_before:
                    loss(ids, n)
        for ids, n, _ in batches:
            loss(ids, n).backward()
        model.zero_grad()
    meter.stop()
    return meter.answer(tokens=sum(ids.numel() for ids, _, _ in batches))


SIDES = {"ours": ours, "trl": trl, "sorted": plain, "limit": limit}
PEERS = {"trl": "trl"}


def cases(args):
    from transformers import AutoConfig
    name = "smollm2" if args.model else "tiny"
    shape = dict(WORKLOADS["quick" if args.quick else name])
    model, micro = args.model or measure.random_model(Path(args.work) / "tiny"), shape.pop("micro")
    rows = measure.rollouts(AutoConfig.from_pretrained(model).vocab_size, **shape)
    cut = sum(r["finish_reason"] == "length" for r in rows) / len(rows)
    what = (f"old log-probs, loss, backward and AdamW on {len(rows)} samples: {responses(rows):,} response "
            f"tokens of at most {shape['max_len']}, {cut:.0%} cut off")
    settings = {"shape": shape, "micro": micro, "model": model, "work": args.work,
                "token_budget": 256 if args.quick else 2048}  # 2,048: grpo.py's own on a CPU
    return [(what, {"workload": name, "tokens_response": responses(rows)}, settings)]


def compare(rows, _):
    """Times against ours, and how far the gradient norms are from ours."""
    good = [r for r in rows if "error" not in r]
    ours = next((r for r in good if r["side"] == "ours"), None)
    for row in good if ours else []:
        row["times_ours"] = row["seconds"]["median"] / ours["seconds"]["median"]
        row["tokens_per_second"] = row["tokens_response"] / row["seconds"]["median"]
        if "grad_norm" in row:
            norms = zip(row["grad_norm"], ours["grad_norm"], strict=True)
            row["grad_norm_off"] = max(abs(a / b - 1) for a, b in norms)


if __name__ == "__main__":
    measure.main("update")
