"""scaling.py - how an update phase grows: with response length, group size, model size and ranks; what it communicates.

    python bench/scaling.py                     # an hour on two cores
    python bench/scaling.py --axes ranks        # one and two processes over gloo, or two GPUs over NCCL
    python bench/scaling.py --quick             # seconds; what CI runs

Our side only (grpo.py's Run.pack, score and update on a saved rollout file, two updates; the second of two passes):
seconds, peak memory beyond the loaded model, and for two ranks the bytes of every collective, counted where
torch.distributed is called, beside the formula that the projection uses. One thread a rank, so that two ranks on two
cores mean twice the hardware.

The projection to 8 and 32 GPUs and to 7B is arithmetic, not a measurement: operations and bytes by the formulas
below, with the assumptions it prints. It is there to be contradicted by a measurement.
"""
import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness as common  # noqa: E402

BASE = dict(prompts=8, group=8, mean=83, max_len=208, prompt_len=32, hidden=192, layers=4, ranks=1)
AXES = {
    "length": [dict(mean=83 * k, max_len=208 * k) for k in (1, 2, 4, 8)],
    "group": [dict(group=g) for g in (4, 8, 16, 32)],
    "model": [dict(hidden=h, layers=n) for h, n in ((192, 4), (384, 6), (768, 12))],
    "ranks": [dict(ranks=1), dict(ranks=2)],
    "ranks_long": [dict(ranks=1, mean=332, max_len=832), dict(ranks=2, mean=332, max_len=832)],  # more work a gather
}
QUICK = dict(prompts=2, group=4, mean=12, max_len=32, prompt_len=8, hidden=64, layers=2)


# ---------------------------------------------------------------------------------------------------------------
# Measured
# ---------------------------------------------------------------------------------------------------------------

def count_collectives(counts):
    """Wrap the collectives of FSDP and Run.update: bytes of a gather's output or a reduction's input on a rank."""
    import torch.distributed as dist

    def wrap(name, buffer, torch_name=None):
        torch_name = torch_name or name
        inner = getattr(dist, torch_name, None)
        if inner is None:
            return

        def counted(*args, **kwargs):
            t = buffer(args, kwargs)
            counts[name] += t.numel() * t.element_size()
            counts[name + " calls"] += 1
            return inner(*args, **kwargs)
        setattr(dist, torch_name, counted)

    argument = lambda i, *keys: lambda a, k: a[i] if len(a) > i else next(k[key] for key in keys if key in k)
    for torch_name in ("all_gather_into_tensor", "all_gather_single"):  # renamed in torch 2.13
        wrap("all_gather", argument(0, "output_tensor", "output"), torch_name)
    for torch_name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        wrap("reduce_scatter", argument(1, "input"), torch_name)
    wrap("all_reduce", argument(0, "tensor"))


def update(spec):
    """The update phase of grpo.train, as in update.py, on every rank of a torchrun."""
    counts = Counter()
    count_collectives(counts)  # before FSDP is imported
    import torch
    import torch.distributed as dist
    import grpo
    from rollout import Sample
    run = common.grpo_run(spec, dtype=spec["dtype"], group=spec["group"], prompts=spec["prompts"], updates=2,
                          max_len=spec["max_len"],
                          temperature=1.0, token_budget=spec["token_budget"])
    rows = common.read_rollouts(spec["rollouts"])
    samples = [Sample(r["prompt"], r["response"], r["logprobs"], r["finish_reason"]) for r in rows]
    rewards = torch.tensor([r["reward"] for r in rows]).view(spec["prompts"], spec["group"])
    run.policy(run.pack(samples, rewards, torch.arange(1))[0][0])[0].sum().backward()
    run.optimizer.zero_grad()
    dist.barrier()
    with common.meter() as m:
        for _ in m.twice():
            counts.clear()
            stats = Counter()
            advantages = grpo.group_advantages(rewards)
            minibatches = [run.pack(samples, advantages, p) for p in torch.arange(spec["prompts"]).chunk(2)]
            for mini in minibatches[1:]:
                run.score(run.policy, mini, "old_logp")
            for mini in minibatches:
                run.update(mini, stats)
    layers = sum(p.numel() for layer in run.policy.model.base_model.layers for p in layer.parameters())
    parameters = sum(p.numel() for p in run.policy.parameters())
    formula = traffic(layers, parameters - layers, len(minibatches[1][0]), sum(len(m[0]) for m in minibatches), 4, 4)
    return m.answer(parameters=parameters, micro_batches=sum(len(m[0]) for m in minibatches),
                    bytes_counted=dict(counts),
                    bytes_formula=formula if run.world > 1 else None, grad_norm=float(stats["grad_norm"]) / 2,
                    tokens=sum(len(r["response"]) + len(r["prompt"]) for r in rows))


def traffic(layers, root, scored, trained, compute_bytes, reduce_bytes=4):
    """Bytes of all-gather outputs and reduce-scatter inputs of one rank in one update phase.

    FSDP2 gathers each layer in forward and again in backward, and once in a forward without backward; embedding and
    head (the root) stay gathered until a backward, so scoring and the update behind it share one. scored and trained:
    micro-batches of this rank, trained of at least one.
    """
    return {"all_gather": compute_bytes * (trained * (2 * layers + root) + scored * layers),
            "reduce_scatter": reduce_bytes * trained * (layers + root)}


# ---------------------------------------------------------------------------------------------------------------
# Projected
# ---------------------------------------------------------------------------------------------------------------

ASSUMED = {
    "gpu": "H100 SXM", "peak_flops_bf16": 989e12, "mfu_training": 0.35, "mfu_scoring": 0.45,
    "nvlink_bytes_per_s": 300e9,
    "network_bytes_per_s_per_gpu": 40e9, "generation_tokens_per_s_per_gpu_1.5B": 12000, "generation_tail_s": 5,
    "token_budget": 32768, "samples": 1024, "length_mean": 4458, "prompt_mean": 130,
}
MODELS = {  # parameters in layers, embedding and head; layers; width of the attention
    "1.5B": dict(layers_n=28, layers=1.310e9, embedding=0.2334e9, head=0.2334e9, width=1536),
    "7B": dict(layers_n=28, layers=6.525e9, embedding=0.5450e9, head=0.5450e9, width=3584),
}


def projection():
    """Rows of a step of the recipe's 8K stage (128 x 8 samples, two updates, no reference model) by arithmetic."""
    rows, a = [], ASSUMED
    tokens = a["samples"] * (a["length_mean"] + a["prompt_mean"])
    length = a["length_mean"] + a["prompt_mean"]
    for name, m in MODELS.items():
        for gpus in (8, 32):
            # 2 operations a parameter and token forward, 4 backward, 2 recomputed; attention sees half of the length
            matmul, attention = m["layers"] + m["head"], m["layers_n"] * m["width"] * length
            train, score = tokens * (8 * matmul + 8 * attention), tokens / 2 * (2 * matmul + 2 * attention)
            micro = tokens / gpus / a["token_budget"]
            moved = traffic(m["layers"], m["embedding"] + m["head"], micro / 2, micro, 2)
            wire = sum(moved.values()) * (gpus - 1) / gpus
            bandwidth = a["nvlink_bytes_per_s"] if gpus <= 8 else a["network_bytes_per_s_per_gpu"]
            full = 4 * (m["layers"] + m["embedding"] + m["head"])
            small = MODELS["1.5B"]["layers"] + MODELS["1.5B"]["head"]
            speed = a["generation_tokens_per_s_per_gpu_1.5B"] * small / matmul
            seconds = {"generate": a["samples"] * a["length_mean"] / gpus / speed + a["generation_tail_s"],
                       "logprobs": score / gpus / a["peak_flops_bf16"] / a["mfu_scoring"],
                       "update": train / gpus / a["peak_flops_bf16"] / a["mfu_training"],
                       "communication if none is hidden": wire / bandwidth, "sync": full / bandwidth}
            rows.append({"model": name, "gpus": gpus, "tflop": (train + score) / 1e12,
                         "gigabytes_moved_per_gpu": wire / 1e9,
                         "state_gib_per_gpu": 4 * full / gpus / 2**30, "seconds": seconds,
                         "seconds_total": sum(seconds.values())})
    return {"label": "PROJECTION by arithmetic from counted operations and bytes; nothing here was measured",
            "assumed": a, "rows": rows}


def assumptions(p):
    """What a projection assumes, in one line."""
    return ", ".join(f"{k} {v:g}" if not isinstance(v, str) else v for k, v in p["assumed"].items())


def show(p):
    print(f"\n{p['label']}\nassumed: {assumptions(p)}")
    common.table([{**r, **r["seconds"]} for r in p["rows"]],
                 [("model", "model", ""), ("GPUs", "gpus", ""), ("TFLOP", "tflop", ",.0f"),
                  ("GB moved by a GPU", "gigabytes_moved_per_gpu", ",.0f"),
                  ("state GiB a GPU", "state_gib_per_gpu", ".1f"), ("generate s", "generate", ".0f"),
                  ("log-probs s", "logprobs", ".1f"),
                  ("update s", "update", ".0f"), ("communication s, none hidden", "communication if none is hidden",
                                                  ".1f"),
                  ("sync s", "sync", ".2f"), ("total s", "seconds_total", ".0f")])


# ---------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------

def measure_case(shape, args, work):
    """All repetitions of one point of one axis -> its row."""
    model = common.tiny_model(work / f"scaling-{shape['hidden']}-{shape['layers']}", hidden=shape["hidden"],
                              layers=shape["layers"])
    path = work / "rollouts-scaling.jsonl"
    holds = common.rollouts(path, 4096, **{k: shape[k] for k in ("prompts", "group", "mean", "max_len", "prompt_len")},
                            seed=args.seed)
    longest = max(len(r["prompt"]) + len(r["response"]) for r in common.read_rollouts(path))
    settings = {**shape, "model": model, "rollouts": str(path), "dtype": args.dtype,
                "token_budget": max(args.token_budget, longest)}
    runs = [common.measure(__file__, "update", settings, ranks=shape["ranks"]) for _ in range(args.repeats)]
    row = common.rows_of({"ours": runs}, **holds)[0]
    return {**row, "token_budget": settings["token_budget"], "shape": shape}


def compare(rows):
    """Every point in units of the first of its axis."""
    first = rows[0]
    for row in rows:
        if "error" in row or "error" in first:
            continue
        row["times_tokens"] = row["tokens"] / first["tokens"]
        row["times_seconds"] = row["seconds"]["median"] / first["seconds"]["median"]
        row["grad_norm_off"] = abs(row["grad_norm"] / first["grad_norm"] - 1)
        if row["memory_mb"] and first["memory_mb"]:
            row["times_memory"] = row["memory_mb"]["median"] / first["memory_mb"]["median"]
        row["gigabytes"] = sum(v for k, v in row["bytes_counted"].items() if "calls" not in k) / 1e9
        if row["bytes_formula"]:
            counted = sum(row["bytes_counted"].get(k, 0) for k in row["bytes_formula"])
            row["counted_over_formula"] = counted / sum(row["bytes_formula"].values())


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common(p, "scaling")
    add = p.add_argument
    add("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="what to vary")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    add("--token_budget", type=int, default=2048, help="packed tokens of a micro-batch, at least one sequence")
    add("--work", default=str(common.ROOT / "runs" / "bench"), help="folder for the rollout files and models")
    add("--seed", type=int, default=0, help="of the rollout files")
    args = p.parse_args(argv)
    if args.worker:
        return common.serve({"update": update}, args.worker)
    before = common.start(args)
    os.environ["OMP_NUM_THREADS"] = str(args.threads or 1)
    if args.quick:
        args.axes, args.token_budget = ["ranks"], 96
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    rows, began = [], time.time()
    for axis in args.axes:
        some = []
        for change in AXES[axis]:
            shape = {**BASE, **(QUICK if args.quick else {}), **change}
            point = ", ".join(f"{k} {v}" for k, v in change.items())
            some.append({"axis": axis, "point": point, **measure_case(shape, args, work)})
            said = some[-1].get("error") or common.cell(some[-1]["seconds"], ".2f") + " s"
            print(f"  {axis}: {point}: {said}", flush=True)
        compare(some)
        rows += some
    print()
    common.table(rows, [("axis", "axis", ""), ("point", "point", ""), ("tokens", "tokens", ","),
                        ("x", "times_tokens", ".1f"),
                        ("seconds", "seconds", ".2f"), ("x", "times_seconds", ".2f"),
                        ("memory MiB", "memory_mb", ",.0f"),
                        ("x", "times_memory", ".2f"), ("parameters", "parameters", ",.0f"),
                        ("GB a rank", "gigabytes", ".3f"),
                        ("counted / formula", "counted_over_formula", ".4f"), ("|g| off", "grad_norm_off", ".1e")])
    projected = projection()
    show(projected)
    common.write(args.out, "how an update phase grows", {k: v for k, v in vars(args).items() if k != "worker"}, rows,
                 before,
                 projection=projected, minutes=(time.time() - began) / 60)


if __name__ == "__main__":
    main()
