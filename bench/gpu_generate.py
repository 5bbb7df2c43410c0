"""gpu_generate.py - generation on one GPU: tokens a second at 8K, pushing weights, sleeping and waking,
engine against trainer.

    python bench/gpu_generate.py  # one GPU, eight minutes; bench/results/gpu_generate.json
    python bench/gpu_generate.py --size tiny --engine torch --out X.json  # any machine, seconds; what CI runs

The engine is made by rollout.make_engine, as training makes it, with the exact shape of DeepSeek-R1-Distill-Qwen-1.5B
and random weights; a sharded policy with fp32 masters of the same shape lives beside it. Of the vocabulary 35 tokens
end a text, so that lengths are roughly geometric with a mean near 4,000, cut at 8,192: one GPU's share
(16 problems x 8) of an 8K step.

  start, sleep, push, wake   seconds, and GiB of the card they took or gave back (the whole card, as the driver counts)
  match, stale               mean KL(engine, trainer) on sampled tokens: after a push, and after the policy changed
                             without one. Wrong, and exit status 1, if a fresh push exceeds 5e-4 (NeMo-RL's bound for
                             this model) or stale weights do not show
  short, step, context       generation: 1K responses, the step's share of 8K responses, 512 tokens behind contexts
                             of 7.6K
"""
import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness as common  # noqa: E402
import gpu_correctness as card  # noqa: E402

BOUND = 5e-4
SIZES = {  # shape; samples of a problem; (what, problems, prompt tokens, longest response) in the order of their price
    "card": dict(shape="r1-1.5b", group=8, stops=35, match=(8, 100, 384),
                 work=[("short", 16, 130, 1024), ("context", 8, 7600, 512), ("step", 16, 130, 8192)]),
    "tiny": dict(shape="tiny", group=2, stops=3, match=(4, 8, 24),
                 work=[("short", 3, 8, 16), ("context", 2, 40, 8), ("step", 3, 8, 48)]),
}


# ---------------------------------------------------------------------------------------------------------------
# Engine and policy
# ---------------------------------------------------------------------------------------------------------------

def model_folder(folder, size, weights):
    """config.json, end tokens and a tokenizer nobody reads; zeros for weights if the engine insists on a file."""
    import torch
    shape, vocab = size["shape"], min(4096, card.SHAPES[size["shape"]]["vocab_size"])
    common.tiny_model(folder, vocab=vocab, hidden=64, layers=1)
    (Path(folder) / "model.safetensors").unlink()
    model = card.empty_model(shape)
    if weights:
        model.to(torch.bfloat16).save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
    (Path(folder) / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(range(size["stops"])), "pad_token_id": 0}))
    return str(folder)


def free_gib():
    import torch
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else None


def timed(results, what, work, **more):
    """Run work() and add its row: seconds, GiB given back to the card (negative: taken)."""
    import torch
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    before, start = free_gib(), time.perf_counter()
    value = work()
    wait()
    seconds, after = time.perf_counter() - start, free_gib()
    results.add({"what": what, "seconds": seconds, "freed_gib": None if before is None else after - before,
                 "free_gib": after, **more})
    return value


def prompts_of(n, length, vocab, seed):
    """n prompts of about `length` random ids, none of them an end token."""
    import random
    g = random.Random(seed)
    return [[g.randrange(100, vocab) for _ in range(length + g.randint(-length // 8, length // 8))] for _ in range(n)]


# ---------------------------------------------------------------------------------------------------------------
# Engine against trainer
# ---------------------------------------------------------------------------------------------------------------

def match(run, engine, size, seed):
    """Sample, score the samples with the policy, -> means over tokens of the names of grpo.mismatch."""
    import torch
    import grpo
    problems, length, limit = size["match"]
    vocab, group = card.SHAPES[size["shape"]]["vocab_size"], run.args.group
    prompts = [p for p in prompts_of(problems, length, vocab, seed) for _ in range(group)]
    samples = engine.generate(prompts, list(range(len(prompts))), limit, run.args.temperature)
    micro, tokens = run.pack(samples, torch.ones(problems, group), torch.arange(problems))
    run.score(run.policy, (micro, tokens), "old_logp")
    sums = Counter()
    for m in micro:
        grpo.add_stats(sums, grpo.mismatch(m.old_logp, m.engine_logp))
    return {"tokens": tokens, "kl": sums["gap_kl"] / tokens, "mean_gap": sums["gap"] / tokens,
            "max_gap": sums["max_gap"], "mult": sums["gap_mult"] / tokens, "far": sums["gap_far"] / tokens}


def change(policy, seed):
    """Weights move by a few per cent, as after many updates."""
    import torch
    from torch.distributed.tensor import DTensor
    with torch.no_grad():
        for i, p in enumerate(policy.parameters()):
            local = p.to_local() if isinstance(p, DTensor) else p
            g = torch.Generator(device=local.device).manual_seed(seed * 1000 + i)
            local.mul_(1 + torch.empty_like(local).normal_(0, 0.1, generator=g))


def check_match(results, run, engine, size):
    """The policy's weights are in the engine already. Then they change: stale, pushed, fresh again.
    -> what is wrong."""
    wrong, add = [], lambda what, m: results.add({"what": what, "seconds": None, **m})
    fresh = [match(run, engine, size, 1)]
    add("match", fresh[0])
    change(run.policy, 5)
    stale = match(run, engine, size, 2)
    add("stale", stale)
    engine.sleep()
    timed(results, "push", lambda: engine.push(run.policy.full_weights()), detail="second push, other weights")
    engine.wake()
    fresh.append(match(run, engine, size, 2))
    add("match", fresh[1])
    wrong += [f"WRONG: KL(engine, trainer) {m['kl']:.1e} after a push is above {BOUND:.0e}"
              for m in fresh if not m["kl"] <= BOUND]
    if not stale["kl"] > 10 * fresh[1]["kl"]:
        wrong.append(f"WRONG: stale weights have a KL of {stale['kl']:.1e}, fresh ones of {fresh[1]['kl']:.1e}: "
                     "the check or the push does nothing")
    return wrong


# ---------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------

def generate(results, engine, what, problems, length, limit, group, vocab, temperature):
    """One row: all samples at once, each with its own seed, as rollout.rollout asks for them."""
    prompts = [p for p in prompts_of(problems, length, vocab, 7) for _ in range(group)]
    engine.generate(prompts[:2], [0, 1], 4, temperature)
    start = time.perf_counter()
    samples = engine.generate(prompts, list(range(len(prompts))), limit, temperature)
    seconds = time.perf_counter() - start
    lengths = [len(s.response_ids) for s in samples]
    results.add({"what": what, "seconds": seconds, "tokens": sum(lengths), "tokens_per_second": sum(lengths) / seconds,
                 "samples": len(samples), "length_mean": sum(lengths) / len(lengths), "length_max": max(lengths),
                 "prompt_mean": sum(map(len, prompts)) / len(prompts),
                 "truncated": sum(s.finish_reason == "length" for s in samples) / len(samples),
                 "seconds_a_token": seconds / max(lengths), "limit": limit})
    return sum(lengths) / seconds


def run_all(results, args, size, folder):
    """Everything, in the order in which training meets it. -> what is wrong."""
    import torch
    from rollout import make_engine
    device, vocab = card.device_of(), card.SHAPES[size["shape"]]["vocab_size"]
    dtype = "bfloat16" if results.cuda else "float32"
    longest = max(length + length // 8 + limit for _, _, length, limit in size["work"])
    model = model_folder(folder, size, weights=args.engine == "torch")
    engine = timed(
        results, "start", lambda: make_engine(
            args.engine, model, max_model_len=longest, dtype=dtype, device=device, max_seqs=args.max_seqs,
            gpu_memory=args.gpu_memory, enable_sleep=True, enforce_eager=args.enforce_eager),
        detail=f"{args.engine}, {dtype}, contexts of {longest}")
    try:
        timed(results, "sleep", engine.sleep, detail="weights dropped")
        run = card.make_run(size["shape"], device, dtype, std=0.02 if args.size == "card" else 0.1,
                            prompts=size["match"][0], group=size["group"], updates=1, max_len=longest,
                            temperature=args.temperature, token_budget=16384, recompute=0)
        gib = sum(p.numel() for p in run.policy.parameters()) * (2 if dtype == "bfloat16" else 4) / 2**30
        timed(results, "push", lambda: engine.push(run.policy.full_weights()),
              detail=f"first push, {gib:.2f} GiB to the engine")
        timed(results, "wake", engine.wake, detail="KV cache")
        wrong = check_match(results, run, engine, size)
        tokens_per_second = None
        for what, problems, length, limit in size["work"]:
            need = problems * size["group"] * limit / tokens_per_second if tokens_per_second else 0
            if results.left() < need:
                results.add({"what": what, "seconds": None,
                            "error": f"not run: may take {need:.0f} s, {results.left():.0f} are left of --minutes"})
                continue
            tokens_per_second = generate(results, engine, what, problems, length, limit, size["group"], vocab,
                                         args.temperature)
        timed(results, "sleep", lambda: engine.sleep(keep_weights=True),
              detail="weights parked in CPU memory, as before an evaluation ends")
        timed(results, "wake", engine.wake, detail="weights and KV cache")
        after = engine.generate([[101, 102]] * 2, [0, 1], 4, args.temperature)
        results.save(memory_of_trainer_gib=torch.cuda.memory_allocated() / 2**30 if results.cuda else None)
        return wrong if len(after) == 2 else [*wrong, "WRONG: no tokens after waking"]
    finally:
        engine.close()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    card.options(p, "gpu_generate", 8)
    add = p.add_argument
    add("--engine", choices=["vllm", "torch"], default="vllm", help="rollout.VllmEngine or rollout.TorchEngine")
    add("--temperature", type=float, default=0.6, help="of sampling, as in the recipe")
    add("--gpu_memory", type=float, default=0.6, help="vLLM's share of the card, grpo.py's default")
    add("--max_seqs", type=int, default=256, help="rows generated at once, grpo.py's default")
    add("--enforce_eager", action="store_true", help="vLLM without CUDA graphs")
    args = p.parse_args(argv)
    size = SIZES[args.size]
    results = card.Results("generation on one device", args, [
        ("what", "what", ""), ("seconds", "seconds", ".2f"), ("freed GiB", "freed_gib", ".1f"),
        ("tokens", "tokens", ",.0f"), ("tokens/s", "tokens_per_second", ",.0f"), ("samples", "samples", ""),
        ("mean length", "length_mean", ",.0f"), ("cut", "truncated", ".0%"),
        ("KL", "kl", ".1e"), ("max gap", "max_gap", ".1e"), ("", "detail", "")])
    results.save(shape=card.SHAPES[size["shape"]], engine=args.engine)
    card.join()
    with tempfile.TemporaryDirectory() as folder:
        try:
            wrong = run_all(results, args, size, folder)
        except RuntimeError as e:  # an engine that cannot start says why
            wrong = [f"FAILED: {' '.join(str(e).split())[:300]}"]
    results.finish(wrong or ["engine and trainer agree after each push, and disagree without one"])
    card.leave()
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
