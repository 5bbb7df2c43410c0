"""gpu_update.py - the update on one GPU: tokens a second, MFU and memory of a 1.5B model at packed budgets,
TRL beside it.

    python bench/gpu_update.py                           # nine minutes on an H100; bench/results/gpu_update.json
    python bench/gpu_update.py --budgets 16384 --recompute 1 --profile --trl_micro --out bench/results/gpu_profile.json
    python bench/gpu_update.py --budgets 16384 --recompute 1 --compile none parts layers --trl_micro --out ...
    python bench/gpu_update.py --budgets 16384 --recompute 1 --chunk 512 2048 4096 --trl_micro --out ...
    python bench/gpu_update.py --size tiny --out X.json  # any machine, seconds; what CI runs

The model has the exact shape of DeepSeek-R1-Distill-Qwen-1.5B and random weights: what they say changes no time. The
rollouts are --prompts x 8 samples with lengths like those of the 8K stage (see common.rollouts). Timed: Run.pack and
Run.update of grpo.py for one mini-batch, from samples in hand to the optimizer's step; then Run.score, a forward
without gradient, as old log-probs need it. Each row is a fresh process, warmed up; seconds are the median of --repeats.

Operations are counted as in the sizing notes of the original: 2 a matmul weight and token, attention 2 x layers x width
x length^2 a document (causal), training 3 forwards. MFU counts those 3 only. HFU counts what runs: body and attention
once more with activation checkpointing, the head once more always. The head counts on response tokens only, where it is
computed.
TRL: GRPOTrainer on the same rollouts and weights, one optimizer step, bf16, checkpointing, SDPA, micro-batches of
--trl_micro samples; its gradient norm is held against ours. Peak memory is absolute: weights, gradients, Adam, all.
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness as common  # noqa: E402
import gpu_correctness as card  # noqa: E402

# dense bf16 operations a second, NVIDIA's data sheets
PEAKS = {"H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12}
PRIME_RL = (0.11, 0.22)  # MFU of its published training benches on one H100 (Qwen3-0.6B at 16K, Qwen3-4B LoRA)


# ---------------------------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------------------------

def forward_flops(shape, tokens, responses, squares):
    """(body, attention, head) of one forward. tokens: packed tokens; responses: those the head scores; squares: sum of
    length^2 over documents.

    >>> body, attention, head = forward_flops(card.SHAPES["r1-1.5b"], 4000, 4000, 4000**2)
    >>> round((body + attention + head) / 1e12, 1)    # the sizing notes: 13.7 TFLOP for a sequence of 4,000
    13.7
    """
    h, n = shape["hidden_size"], shape["num_hidden_layers"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = 2 * h * h + 2 * h * kv + 3 * h * shape["intermediate_size"]
    return 2 * n * layer * tokens, 2 * n * h * squares, 2 * shape["vocab_size"] * h * responses


def training_flops(shape, tokens, responses, squares, recompute):
    """(model, hardware): 3 forwards, and what runs, see the top of this file."""
    body, attention, head = forward_flops(shape, tokens, responses, squares)
    return 3 * (body + attention + head), (3 + bool(recompute)) * (body + attention) + 4 * head


def peak_flops(device):
    """Operations a second of a device by its name, None for a CPU."""
    return next((v for k, v in PEAKS.items() if all(word in device for word in k.split())), None)


def rate(row, shape):
    """Tokens a second, MFU and HFU of a measured row, in place."""
    # a prompt that samples share is computed once: those operations are not counted twice
    packed = row.get("packed", row["tokens"])
    model, hardware = training_flops(shape, packed, row["responses"], row["squares"], row["recompute"])
    peak = peak_flops(row["device"])
    row["tokens_per_second"] = row["tokens"] / row["seconds"]
    row["mfu"], row["hfu"] = (x / row["seconds"] / peak if peak else None for x in (model, hardware))
    if row.get("score_seconds"):
        row["score_tokens_per_second"] = row["tokens"] / row["score_seconds"]


# ---------------------------------------------------------------------------------------------------------------
# The sides
# ---------------------------------------------------------------------------------------------------------------

def ours(spec):
    import torch
    import grpo
    from rollout import Sample
    card.join()
    rows = common.read_rollouts(spec["rollouts"])
    run = card.make_run(spec["shape"], card.device_of(), spec["dtype"], compile=spec["compile"], lr=1e-6,
                        prompts=spec["prompts"], group=spec["group"], updates=1, max_len=spec["max_len"],
                        token_budget=spec["budget"], recompute=spec["recompute"], logit_chunk=spec["chunk"])
    samples = [Sample(r["prompt"], r["response"], r["logprobs"], r["finish_reason"]) for r in rows]
    advantages = grpo.group_advantages(torch.tensor([r["reward"] for r in rows]).view(-1, spec["group"]))
    everything = torch.arange(spec["prompts"])
    # compiled code wants to see every shape before the clock starts; else one group suffices
    run.update(run.pack(samples, advantages, everything if spec["compile"] != "none" else everything[:1]), Counter())
    seconds, stats = [], Counter()
    for _ in range(spec["repeats"]):
        with common.meter() as m:
            run.update(run.pack(samples, advantages, everything), stats)
        seconds.append(m.seconds)
    peak, reserved = memory()
    mini = run.pack(samples, advantages, everything)
    run.score(run.policy, (mini[0][:1], None) if spec["compile"] == "none" else mini, "old_logp")
    with common.meter() as score:
        run.score(run.policy, mini, "old_logp")
    answer = {"seconds": statistics.median(seconds), "all_seconds": seconds, "peak_gib": peak, "reserved_gib": reserved,
              "score_seconds": score.seconds, "micro_batches": len(mini[0]),
              "grad_norm": float(stats["grad_norm"]) / spec["repeats"],
              "entropy": float(stats["entropy"]) / float(stats["tokens"]), **counts(rows)}
    answer["packed"] = sum(len(m.ids) for m in mini[0])
    answer["fill"] = answer["packed"] / (len(mini[0]) * spec["budget"])
    if spec["profile"]:
        answer["profile"] = profile(lambda: run.update(run.pack(samples, advantages, everything[:1]), Counter()))
    return answer


def counts(rows):
    lengths = [len(r["prompt"]) + len(r["response"]) for r in rows]
    return {"tokens": sum(lengths), "responses": sum(len(r["response"]) for r in rows),
            "squares": sum(n * n for n in lengths)}


def memory():
    """(allocated, reserved) at most, GiB; None without a GPU."""
    import torch
    if not torch.cuda.is_available():
        return None, None
    return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30


def trl(spec):
    """GRPOTrainer with the rollouts handed in; each of its steps is timed from the rollouts' return to its end."""
    import os
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    rows, cuda, k, starts, seconds = (common.read_rollouts(spec["rollouts"]), torch.cuda.is_available(), spec["micro"],
                                      [], [])
    wait = torch.cuda.synchronize if cuda else lambda: None

    def rollout_func(prompts, trainer):
        wait()
        if cuda and len(starts) == 1:  # the first step warms up
            torch.cuda.reset_peak_memory_stats()
        starts.append(time.perf_counter())
        return {"prompt_ids": [r["prompt"] for r in rows], "completion_ids": [r["response"] for r in rows],
                "logprobs": None}

    class Times(TrainerCallback):
        def on_step_end(self, *_, **__):
            wait()
            seconds.append(time.perf_counter() - starts[-1])

    model = card.empty_model(spec["shape"])
    model.set_attn_implementation("sdpa")
    card.fill(model.to(card.device_of()))
    rewards = [r["reward"] for r in rows]
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder, per_device_train_batch_size=k, gradient_accumulation_steps=len(rows) // k,
            steps_per_generation=len(rows) // k, num_generations=spec["group"], max_completion_length=spec["max_len"],
            max_steps=1 + spec["repeats"], learning_rate=1e-6, weight_decay=0.01, max_grad_norm=1.0,
            lr_scheduler_type="constant", loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0, temperature=1.0,
            bf16=spec["dtype"] == "bfloat16", use_cpu=not cuda, gradient_checkpointing=bool(spec["recompute"]),
            gradient_checkpointing_kwargs={"use_reentrant": False}, optim="adamw_torch_fused", shuffle_dataset=False,
            logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=cuda)
        trainer = GRPOTrainer(
            model, args=args, reward_funcs=lambda completions, **_: rewards,
            processing_class=AutoTokenizer.from_pretrained(spec["tokenizer"]),
            train_dataset=Dataset.from_dict({
                "prompt": [str(r["problem"]) for r in rows[::spec["group"]]] * (1 + spec["repeats"])}),
            rollout_func=rollout_func, callbacks=[Times()])
        trainer.train()
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    peak, reserved = memory()
    return {"seconds": statistics.median(seconds[1:]), "all_seconds": seconds, "peak_gib": peak,
            "reserved_gib": reserved, "micro_batches": len(rows) // k, "grad_norm": statistics.mean(norms[1:]),
            **counts(rows)}


SIDES = {"ours": ours, "trl": trl}


# ---------------------------------------------------------------------------------------------------------------
# Where the time goes
# ---------------------------------------------------------------------------------------------------------------

KINDS = {  # of kernels, by words in their names; the first that fits
    "attention": ("flash", "fmha", "attention"), "communication": ("nccl",), "optimizer": ("adam", "multi_tensor"),
    "matmul": ("gemm", "nvjet", "cutlass", "cublas", "wgmma", "addmm", "::mm", "bmm"),
    "copies": ("memcpy", "memset", "copy", "direct_copy", "cat"),
}
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense",
         "aten::nonzero")


def kind_of(name):
    """
    >>> kind_of("void flash::flash_bwd_kernel"), kind_of("nvjet_hsh_128x256"), kind_of("vectorized_elementwise_kernel")
    ('attention', 'matmul', 'rest')
    """
    name = name.lower()
    return next((kind for kind, words in KINDS.items() if any(w in name for w in words)), "rest")


def profile(work):
    """torch.profiler over work(): seconds by kind of kernel, the ten longest, how long the device was busy, and each
    kind of synchronisation with its count. Without a GPU, kernels are the CPU's operators."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    # FSDP and the optimizer mark ranges on the device's time line, which hold kernels that are listed by themselves
    on_device = lambda e: (e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
                           and not e.key.startswith(("FSDP::", "Optimizer.")))
    cuda = torch.cuda.is_available()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as prof:
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    events = prof.key_averages()
    spent = lambda e: (getattr(e, "self_device_time_total", 0) if cuda else e.self_cpu_time_total) / 1e6
    kernels = sorted((e for e in events if not cuda or on_device(e)), key=spent, reverse=True)
    kinds, total = Counter(), sum(map(spent, kernels))
    for e in kernels:
        kinds[kind_of(e.key)] += spent(e)
    return {"seconds": wall, "kernel_seconds": total, "busy": total / wall,
            "kinds": {k: v / total for k, v in kinds.most_common()},
            "top": [{"kernel": e.key[:110], "calls": e.count, "seconds": spent(e), "share": spent(e) / total}
                    for e in kernels[:15]],
            "syncs": {e.key: {"calls": e.count, "seconds": e.cpu_time_total / 1e6} for e in events if e.key in SYNCS},
            "launches": sum(e.count for e in events if e.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))}


def print_profile(label, p):
    print(f"\nprofile of {label}: {p['seconds']:.2f} s under the profiler, kernels {p['kernel_seconds']:.2f} s "
          f"(busy {p['busy']:.0%}), {p['launches']} launches")
    print("  shares: " + ", ".join(f"{k} {v:.1%}" for k, v in p["kinds"].items()))
    print("  synchronisations: "
          + (", ".join(f"{k} {v['calls']} x, {v['seconds']:.3f} s" for k, v in p["syncs"].items()) or "none"))
    common.table(p["top"], [("kernel", "kernel", ""), ("calls", "calls", ""), ("seconds", "seconds", ".4f"),
                            ("share", "share", ".1%")])


# ---------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------

def verdicts(rows, trl_asked):
    """The goals of the issue against the rows, one line each. What a CPU did says nothing about them."""
    good = [r for r in rows if "error" not in r]
    on_gpu = [r for r in good if r["device"] != "cpu"]
    mine = [r for r in good if r["side"] == "ours"]
    at = lambda budget: [r for r in mine if r["budget"] == budget and r["recompute"]]
    say = lambda what, found, met: (f"{what}: not measured" if found is None else
                                    f"{what}: {'MET' if met else 'MISSED'} ({found})")
    best = max((r for r in at(16384) if r["mfu"]), key=lambda r: r["mfu"], default=None)
    lines = [say("at least 40 % MFU at 16K with checkpointing",
                 best and f"MFU {best['mfu']:.1%}, HFU {best['hfu']:.1%}", best and best["mfu"] >= 0.4),
             say("prime-rl's published 11-22 % beaten",
                 best and f"{best['mfu']:.1%}", best and best["mfu"] > max(PRIME_RL))]
    memory = min((r["peak_gib"] for r in at(24576) if r["peak_gib"]), default=None)
    lines.append(say("24K with checkpointing in under 45 GiB",
                     memory and f"{memory:.1f} GiB allocated at most", memory and memory < 45))
    theirs = max((r for r in good if r["side"] == "trl"), key=lambda r: r["tokens_per_second"], default=None)
    fast = max((r for r in mine if r["recompute"]), key=lambda r: r["tokens_per_second"], default=None)
    if trl_asked:
        ratio = fast["tokens_per_second"] / theirs["tokens_per_second"] if fast and theirs and on_gpu else None
        lines.append(say("at least 2x TRL, both with checkpointing, each at its best setting",
                         ratio and f"{ratio:.2f}x", ratio and ratio >= 2))
    if fast and theirs:
        apart = abs(theirs["grad_norm"] / fast["grad_norm"] - 1)
        lines.append(f"gradient norms of TRL and ours are {apart:.1%} apart"
                     + ("" if apart < 0.1 else ": they do NOT compute the same"))
    return lines


def plan(args, settings):
    """[(side, settings)]: ours with checkpointing, TRL, ours without, so that what matters most is measured first."""
    mine = [("ours", settings | {"budget": b, "recompute": r, "chunk": c, "compile": k})
            for r in sorted(args.recompute, reverse=True) for b in args.budgets
            for c in args.chunk for k in args.compile]
    theirs = [("trl", settings | {"budget": None, "recompute": 1, "chunk": None, "compile": "none", "micro": k})
              for k in args.trl_micro]
    first = [job for job in mine if job[1]["recompute"]]
    return first + theirs + mine[len(first):]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    card.options(p, "gpu_update", 9)
    add = p.add_argument
    add("--budgets", type=int, nargs="+", default=[8192, 16384, 24576, 32768], help="packed tokens of a micro-batch")
    add("--recompute", type=int, nargs="+", choices=[0, 1], default=[1, 0], help="activation checkpointing")
    add("--chunk", type=int, nargs="+", default=[1024], help="tokens of a tile of logits")
    add("--compile", nargs="+", default=["none"],
        help="none, parts, layers: see compile_layers; a suffix names a backend (parts:eager)")
    add("--trl_micro", type=int, nargs="*", default=[1, 2],
        help="TRL's micro-batches in samples; without a number: no TRL")
    add("--peer_python", default=None, help="interpreter that has TRL; default: this one")
    add("--prompts", type=int, default=3, help="groups of 8 samples in the rollouts")
    add("--max_len", type=int, default=7900, help="longest response; with its prompt it must fit the smallest budget")
    add("--mean", type=int, default=4500, help="mean response before the cut")
    add("--repeats", type=int, default=2, help="timed updates of each row")
    add("--dtype", choices=["bfloat16", "float32"], default=None, help="default: bf16 on a GPU, fp32 on a CPU")
    add("--profile", action="store_true", help="torch.profiler over one group after the timing of each row")
    add("--worker", default=None, help="internal: run one side")
    args = p.parse_args(argv)
    if args.worker:
        return common.serve(SIDES, args.worker)
    shape, prompt_len = "r1-1.5b", 120
    if args.size == "tiny":
        shape, prompt_len, args.prompts, args.mean, args.max_len = "tiny", 8, 2, 20, 48
        args.budgets, args.repeats = [64] if args.budgets == p.get_default("budgets") else args.budgets, 1
        args.trl_micro = [] if args.trl_micro == p.get_default("trl_micro") else args.trl_micro
    results = card.Results("update throughput and memory on one device", args, [
        ("side", "side", ""), ("budget", "budget", ""), ("ckpt", "recompute", ""), ("tile", "chunk", ""),
        ("compile", "compile", ""), ("micro", "micro", ""), ("tokens/s", "tokens_per_second", ",.0f"),
        ("MFU", "mfu", ".1%"), ("HFU", "hfu", ".1%"), ("peak GiB", "peak_gib", ".1f"),
        ("reserved", "reserved_gib", ".1f"), ("seconds", "seconds", ".3f"),
        ("score tok/s", "score_tokens_per_second", ",.0f"), ("fill", "fill", ".0%"), ("|g|", "grad_norm", ".4f")])
    dtype = args.dtype or ("bfloat16" if results.cuda else "float32")
    with tempfile.TemporaryDirectory() as folder:
        # ids below the size of a small tokenizer, which TRL wants to decode with
        path, vocab = Path(folder) / "rollouts.jsonl", min(4096, card.SHAPES[shape]["vocab_size"])
        holds = common.rollouts(path, vocab, args.prompts, 8, args.mean, args.max_len, prompt_len)
        longest = max(len(r["prompt"]) + len(r["response"]) for r in common.read_rollouts(path))
        if longest > min(args.budgets):
            p.error(f"the longest sample has {longest} tokens, more than the budget of {min(args.budgets)}: "
                    "lower --max_len")
        settings = {"shape": shape, "rollouts": str(path), "dtype": dtype, "repeats": args.repeats,
                    "prompts": args.prompts, "group": 8, "max_len": args.max_len, "profile": args.profile,
                    "micro": None, "tokenizer": None}
        if args.trl_micro:
            settings["tokenizer"] = common.tiny_model(Path(folder) / "tokenizer", vocab=vocab, hidden=64, layers=1)
        results.save(shape=card.SHAPES[shape], rollouts=holds, dtype=dtype)
        for side, spec in plan(args, settings):
            row = {"side": side, **{k: spec[k] for k in ("budget", "recompute", "chunk", "compile", "micro")}}
            row |= measure(side, spec, results.left(), args.peer_python if side == "trl" else None)
            if "error" not in row:
                rate(row, card.SHAPES[shape])
            results.add(row)
            if "profile" in row:
                print_profile(f"{side} {row['budget']}, compile {row['compile']}", row["profile"])
    results.finish(verdicts(results.rows, bool(args.trl_micro)))
    return int(all("error" in r for r in results.rows))


def measure(side, spec, left, python):
    if left < 20:
        return {"error": "not run: --minutes are over"}
    try:
        return common.measure(__file__, side, spec, python, timeout=left)
    except subprocess.TimeoutExpired:
        return {"error": "stopped: --minutes are over"}


if __name__ == "__main__":
    sys.exit(main())
