"""update.py - the training half of a step on given samples: ours, TRL, a plain loop, and the limit.

    python bench/update.py --peer_python PEERS/bin/python                           # tiny
    python bench/update.py --peer_python PEERS/bin/python --model models/smollm2

Timed: advantages, packing or padding, old log-probs, loss, backward, clipping, AdamW, from the samples in
hand to the last optimizer step, in fp32. Every side does it twice, and `seconds` is the second time: the
first loads kernels and creates Adam's moments (`first_seconds`). The recipe's two updates a rollout: the
second needs old log-probs. TRL scores all samples for that, ours and the loop the second half, because at the
first update the policy is the old one. Micro-batches of TRL and the loop have as many samples as were fastest
for them. Checked: the gradient norm of each update against ours (an on-policy GRPO loss is about 0).
"""
import os
from collections import Counter
from pathlib import Path

import measure  # puts the project on the path
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import grpo

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


def rewards_of(samples, shape):
    return torch.tensor([s.reward for s in samples]).view(-1, shape["group"])


def split(samples):
    """Samples -> those of each update."""
    half = len(samples) // UPDATES
    return [samples[i:i + half] for i in range(0, len(samples), half)]


def responses(samples):
    return sum(len(s.response_ids) for s in samples)


def length(sample):
    return len(sample.prompt_ids) + len(sample.response_ids)


def updates(learner, samples, rewards):
    """What grpo.train does between `generate` and `push` -> the mini-batches and statistics of each."""
    advantages = grpo.group_advantages(rewards)
    halves = torch.arange(len(rewards)).chunk(learner.args.updates)
    minibatches = [learner.pack(samples, advantages, prompts) for prompts in halves]
    old = [learner.score(learner.policy if k else None, mini) for k, mini in enumerate(minibatches)]
    stats = [Counter() for _ in minibatches]
    for mini, old_logp, sums in zip(minibatches, old, stats):
        learner.update(0, mini, old_logp, learner.score(None, mini), sums)
    return minibatches, stats


def ours(spec):
    """grpo.py's Learner."""
    # no correction for an engine: the log-probs are random, and the other sides get none
    learner = measure.make_learner(
        spec["model"], spec["token_budget"], temperature=1.0, lr=1e-6, tis_cap=0, dtype="float32",
        updates=UPDATES, **{name: spec["shape"][name] for name in ("group", "prompts", "max_len")})
    (_, samples), meter, norms = load(spec), measure.Meter(), []
    meter.lap()
    for _ in range(2):
        _, stats = updates(learner, samples, rewards_of(samples, spec["shape"]))
        norms += [sums["grad_norm"] for sums in stats]
        meter.lap()
    return meter.answer(grad_norm=norms)


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
    (model, samples), meter = load(spec), measure.Meter()

    def rollout_func(prompts, trainer):
        meter.lap()
        return {"prompt_ids": [s.prompt_ids for s in samples], "logprobs": None,
                "completion_ids": [s.response_ids.tolist() for s in samples]}

    trainer = trl_trainer(
        spec, model, [{"prompt": str(i)} for i in range(spec["shape"]["prompts"])], 2,
        lambda k: k == 2 * UPDATES and meter.lap(), rollout_func=rollout_func,
        reward_funcs=lambda completions, **_: [s.reward for s in samples])
    trainer.train()
    log = [line for line in trainer.state.log_history if "grad_norm" in line]
    # TRL divides each mini-batch by the mean token count of all mini-batches, we by its own: put on our scale
    scale = [responses(samples) / UPDATES / responses(mini) for mini in split(samples)] * 2
    norms = [line["grad_norm"] * s for line, s in zip(log, scale, strict=True)]
    return meter.answer(grad_norm=norms)


def plain_logp(model, samples):
    """Log-probs [R] of the response tokens of a micro-batch, padded on the right, which needs no mask."""
    ids = pad_sequence([torch.tensor([*s.prompt_ids, *s.response_ids]) for s in samples], batch_first=True)
    scored = torch.zeros_like(ids, dtype=torch.bool)  # positions that predict a response token
    for row, s in zip(scored, samples):
        row[len(s.prompt_ids) - 1:length(s) - 1] = True
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[scored]
    tiles = zip(hidden.split(1024), ids.roll(-1, 1)[scored].split(1024))
    return torch.cat([-F.cross_entropy(model.lm_head(h), y, reduction="none") for h, y in tiles])


def plain(spec):
    """A loop as one would write it in an afternoon: samples sorted by length, the loss of grpo.py."""
    (model, samples), meter, k, norms = load(spec), measure.Meter(), spec["micro"], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
    rewards = rewards_of(samples, spec["shape"])
    meter.lap()
    for _ in range(2):
        for s, advantage in zip(samples, grpo.group_advantages(rewards).flatten()):
            s.advantage = advantage
        minis = [sorted(mini, key=length) for mini in split(samples)]
        minis = [[mini[i:i + k] for i in range(0, len(mini), k)] for mini in minis]
        with torch.no_grad():
            old = [[plain_logp(model, b) if i else None for b in mini] for i, mini in enumerate(minis)]
        for mini, old_logps in zip(minis, old):
            total = sum(map(responses, mini))
            for batch, old_logp in zip(mini, old_logps):
                advantages = torch.stack([s.advantage for s in batch])
                lengths = torch.tensor([len(s.response_ids) for s in batch])
                loss, _ = grpo.grpo_loss(plain_logp(model, batch), old_logp, advantages, lengths,
                                         clip_high=0.28, total=total)
                loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
        meter.lap()
    return meter.answer(grad_norm=norms)


def limit(spec):
    """As many tokens forward and backward through the bare model as ours, in full rows of one length without
    any padding: body, head on response tokens, cross-entropy; no entropy and no optimizer."""
    (model, samples), meter, batches = load(spec), measure.Meter(), []
    for i, mini in enumerate(split(samples)):
        scored, tokens = responses(mini), sum(map(length, mini))
        ids = torch.randint(5, model.config.vocab_size, (len(mini), round(tokens / len(mini))))
        for part in ids.tensor_split(-(-tokens // spec["token_budget"])):  # as many as ours, at least
            batches.append((part, scored * len(part) // len(mini), i > 0))

    def loss(ids, n):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)[:n]
        return F.cross_entropy(model.lm_head(hidden), ids.flatten()[:n])

    meter.lap()
    for _ in range(2):
        with torch.no_grad():
            for ids, n, scored_before in batches:
                if scored_before:
                    loss(ids, n)
        for ids, n, _ in batches:
            loss(ids, n).backward()
        model.zero_grad()
        meter.lap()
    return meter.answer(tokens=sum(ids.numel() for ids, _, _ in batches))


SIDES = {"ours": ours, "trl": trl, "sorted": plain, "limit": limit}
PEERS = ["trl"]


def cases(args):
    from transformers import AutoConfig
    shape = dict(WORKLOADS["quick" if args.quick else "smollm2" if args.model else "tiny"])
    model, micro = args.model or measure.random_model(Path(args.work) / "tiny"), shape.pop("micro")
    samples = measure.rollouts(AutoConfig.from_pretrained(model).vocab_size, **shape)
    cut = sum(s.finish_reason == "length" for s in samples) / len(samples)
    what = (f"old log-probs, loss, backward and AdamW on {len(samples)} samples: {responses(samples):,} "
            f"response tokens of at most {shape['max_len']}, {cut:.0%} cut off")
    settings = {"shape": shape, "micro": micro, "model": model, "work": args.work,
                "token_budget": 256 if args.quick else 2048}  # 2,048: grpo.py's own on a CPU
    return what, [({"tokens_response": responses(samples)}, settings)]


def compare(rows, _):
    """Times against ours, and how far the gradient norms are from ours."""
    ours = rows.get("ours")
    for row in rows.values() if ours else ():
        row["times_ours"] = row["seconds"]["median"] / ours["seconds"]["median"]
        row["tokens_per_second"] = row["tokens_response"] / row["seconds"]["median"]
        if "grad_norm" in row:
            norms = zip(row["grad_norm"], ours["grad_norm"], strict=True)
            row["grad_norm_off"] = max(abs(a / b - 1) for a, b in norms)


if __name__ == "__main__":
    measure.compare_sides("update")
