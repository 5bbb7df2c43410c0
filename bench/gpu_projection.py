"""gpu_projection.py - seconds of an 8K step on 8 GPUs, by arithmetic from what one GPU measured. A projection,
not a measurement.

    python bench/gpu_projection.py                        # reads bench/results/gpu_update.json and gpu_generate.json
    python bench/gpu_projection.py --update A --generate B --out X.json

The step is the original's: 128 problems x 8 samples, one eighth for each GPU. It refuses to run where a measurement is
missing or was made without a GPU. Each line of the table says how it comes about; what is not measured is an option
with its assumed value printed. The same arithmetic is done for both recipes: `deepscaler` scores all tokens with a
reference as well, `improved` has none. The second of the two updates needs old log-probs, the first does not
(grpo.train).
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness as common  # noqa: E402
import gpu_correctness as card  # noqa: E402

PUBLISHED = {"NeMo-RL, 8 H100": 252.0, "the original, 8 H200": 396.0}  # seconds an 8K step
LAYERS, ROOT = 1.3103e9, 0.4668e9  # parameters in decoder layers; embedding and head


# ---------------------------------------------------------------------------------------------------------------
# Measured
# ---------------------------------------------------------------------------------------------------------------

def read(path, tiny):
    """A result file of a GPU script. Raises SystemExit with what to run."""
    script = "gpu_generate.py" if "generate" in Path(path).name else "gpu_update.py"
    if not Path(path).is_file():
        raise SystemExit(f"{path} is missing: run bench/{script} on a GPU first")
    result = json.loads(Path(path).read_text())
    if result["device"] == "cpu" and not tiny:
        raise SystemExit(
            f"{path} was measured on a CPU, from which nothing follows for GPUs: run bench/{script} on a GPU")
    return result


def best_update(rows):
    """The fastest row of ours with checkpointing, not compiled (grpo.py compiles nothing)."""
    good = [r for r in rows if r["side"] == "ours" and "error" not in r and r["recompute"]
            and r["compile"] == "none" and r.get("score_tokens_per_second")]
    if not good:
        raise SystemExit("the update file has no finished row of ours with checkpointing: "
                         "run bench/gpu_update.py again")
    return max(good, key=lambda r: r["tokens_per_second"])


def named(rows, what, which=0):
    """The row of that name in the generation file; several: by order."""
    found = [r for r in rows if r["what"] == what and "error" not in r]
    if not found:
        raise SystemExit(
            f'the generation file has no finished row "{what}": run bench/gpu_generate.py again, with more --minutes')
    return found[which]


# ---------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------

def communication(tokens, budget, fill, scored, gpus, bytes_per_second):
    """Seconds of FSDP2's collectives on one GPU, nothing of them hidden behind computation. bf16 gathers of each layer
    twice in training (forward, backward) and once in scoring, of the root once; fp32 gradients reduced for each
    micro-batch. By hand: (2 x 2 x 1.3103e9 + 2 x 0.4668e9 + 4 x 1.7771e9) x 7/8 / 300e9.

    >>> round(communication(32768, 32768, 1.0, 0, 8, 300e9), 4)
    0.0387
    """
    micro = tokens / (budget * fill)
    size = micro * (2 * (2 * LAYERS + ROOT) + 4 * (LAYERS + ROOT)) + scored / (budget * fill) * 2 * LAYERS
    return size * (gpus - 1) / gpus / bytes_per_second


def project(update, generate, a, recipe):
    """[(part, seconds, how)] of one step on a.gpus GPUs."""
    step, samples = named(generate, "step"), a.problems * a.samples / a.gpus
    written, tokens = samples * a.length, samples * (a.length + a.prompt)
    # old log-probs of the second half; reference of all
    again = 0.5 * tokens + (tokens if recipe == "deepscaler" else 0)
    push = [r for r in generate if r["what"] == "push" and "error" not in r][-1]["seconds"]
    generation = written / step["tokens_per_second"]
    return [
        ("generate", generation,
         f"{samples:.0f} samples x {a.length:.0f} tokens / {step['tokens_per_second']:,.0f} tokens/s, measured with "
         f"{step['samples']} samples of {step['length_mean']:.0f}"),
        ("wait for the slowest GPU", generation * (a.imbalance - 1), f"ASSUMED: {a.imbalance:g} x the mean"),
        ("log-probs", again / update["score_tokens_per_second"],
         f"{again:,.0f} tokens / {update['score_tokens_per_second']:,.0f} tokens/s scored"),
        ("update", tokens / update["tokens_per_second"],
         f"{tokens:,.0f} tokens / {update['tokens_per_second']:,.0f} tokens/s at a budget of {update['budget']:,}"),
        ("communication", communication(tokens, update["budget"], update["fill"], again, a.gpus, a.nvlink * 1e9),
         f"ASSUMED: {a.nvlink:g} GB/s for each GPU, nothing hidden behind computation"),
        ("push, sleep, wake", push + named(generate, "sleep")["seconds"] + named(generate, "wake")["seconds"],
         "measured on one GPU"),
        ("reward, records", a.other, f"ASSUMED: {a.other:g} s; rewards are computed while others generate"),
    ]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    card.options(p, "gpu_projection", 1)
    add = p.add_argument
    add("--update", default=str(common.RESULTS / "gpu_update.json"), help="what bench/gpu_update.py wrote")
    add("--generate", default=str(common.RESULTS / "gpu_generate.json"), help="what bench/gpu_generate.py wrote")
    add("--gpus", type=int, default=8)
    add("--problems", type=int, default=128, help="of a step")
    add("--samples", type=int, default=8, help="of each problem")
    add("--length", type=float, default=4458, help="mean response of the 8K stage, tokens")
    add("--prompt", type=float, default=130, help="mean prompt, tokens")
    add("--imbalance", type=float, default=1.1, help="assumed: generation of the slowest GPU over the mean")
    add("--nvlink", type=float, default=300.0, help="assumed: GB/s that a collective reaches on each GPU")
    add("--other", type=float, default=2.0, help="assumed: seconds of everything else")
    args = p.parse_args(argv)
    update, generate = read(args.update, args.size == "tiny"), read(args.generate, args.size == "tiny")
    if update["device"] != generate["device"]:
        raise SystemExit(f"the two files come from different devices ({update['device']}, {generate['device']}): "
                         "measure both on one")
    row = best_update(update["rows"])
    if not args.out and args.size != "tiny":  # this machine needs no GPU, its sources had one
        args.out = str(common.RESULTS / "gpu_projection.json")
    results = card.Results(f"PROJECTION to {args.gpus} GPUs, not a measurement", args, [
        ("recipe", "recipe", ""), ("part", "part", ""), ("seconds", "seconds", ".1f"), ("how", "how", "")])
    results.head["device"] = f"{update['device']} (one measured, {args.gpus} projected)"
    results.head["sources"] = {k: {n: r.get(n) for n in ("date", "device", "command", "versions", "commit")}
                               for k, r in (("update", update), ("generate", generate))}
    lines = [f"PROJECTION by arithmetic from one {update['device']}, not measured on {args.gpus}:"]
    for recipe in ("deepscaler", "improved"):
        parts = project(row, generate["rows"], args, recipe)
        total = sum(seconds for _, seconds, _ in parts)
        for part, seconds, how in [*parts, ("TOTAL", total, "sum")]:
            results.add({"recipe": recipe, "part": part, "seconds": seconds, "how": how})
        lines.append(f"  {recipe}: {total:.0f} s a step; " + "; ".join(
            f"{who}: {s:.0f} s published, {s / total:.2f}x" for who, s in PUBLISHED.items()))
    results.finish(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
