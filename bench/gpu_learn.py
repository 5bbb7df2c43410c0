"""gpu_learn.py - does it learn? grpo.py itself for so many minutes, with the curve.

    python bench/gpu_learn.py --model models/smollm2  # nine minutes on a GPU: SmolLM2-135M-Instruct, easy real problems
    python bench/gpu_learn.py  # the same with the toy of this repository, if there is no SmolLM2
    python bench/gpu_learn.py --size tiny --out X.json  # any machine, a minute; what CI runs

  --model   the demonstration of the README at a larger scale: 48 problems x 16 samples a step
  toy       toy.py's base model on its sums modulo 100, at a larger scale: 128 problems x 16 samples of up to 192 tokens
  sums      (--world sums, and --size tiny) random weights that know nothing: a problem reads "3+4", an answer is one of
            the boxed numbers among the tokens, the reward is the only teacher

grpo.py runs as a program and is stopped by SIGTERM when the time is up, as a person would.

Reported: reward of training in tenths of the run, its first and last tenth with standard errors over steps, the KL
between engine and trainer, skipped updates. Exit status 1 if the last tenth is not above the first by two standard
errors, or if updates were skipped: then it did not learn, whatever it did.
"""
import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness as common  # noqa: E402
import gpu_correctness as card  # noqa: E402

SUMS = {
    "card": dict(digits=10, hidden=512, layers=8, heads=8, prompts=64, group=16, lr=3e-4),
    "tiny": dict(digits=2, hidden=64, layers=2, heads=2, prompts=4, group=16, lr=2e-3),
}
ASSETS = common.ROOT / "assets"


# ---------------------------------------------------------------------------------------------------------------
# What is learned
# ---------------------------------------------------------------------------------------------------------------

def sums(folder, digits, hidden, layers, heads, held_out=0.2, seed=0):
    """A random model that reads "a+b" and can write every boxed sum, its tokenizer, and the problems, a fifth of them
    held out where there are enough -> (model, train, test)."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    words = ["<eos>", "+", *"0123456789", *(f"\\boxed{{{n}}}" for n in range(2 * digits - 1))]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges=[]))
    core.decoder = decoders.Fuse()
    folder = Path(folder)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        folder / "model")
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=len(words), hidden_size=hidden, intermediate_size=2 * hidden,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                         max_position_embeddings=64, tie_word_embeddings=False, eos_token_id=0, pad_token_id=0,
                         bos_token_id=None)
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    rows = [{"id": f"{a}+{b}", "problem": f"{a}+{b}", "answer": str(a + b)}
            for a in range(digits) for b in range(digits)]
    random.Random(seed).shuffle(rows)
    cut = round(held_out * len(rows)) if digits > 2 else 0
    for name, part in (("test", rows[:cut] or rows), ("train", rows[cut:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return [str(folder / x) for x in ("model", "train.jsonl", "test.jsonl")]


def sums_options(args, folder):
    size = SUMS[args.size]
    model, train, test = sums(folder, *(size[k] for k in ("digits", "hidden", "layers", "heads")))
    return ["--model", model, "--data", train, "--eval_data", test, "--style", "plain", "--no_chat", "--max_len", "2",
            *(x for k in ("prompts", "group", "lr") for x in (f"--{k}", str(size[k])))]


def toy_options():
    toy = ASSETS / "toy"
    return ["--model", str(toy / "model"), "--data", str(toy / "train.jsonl.gz"),
            "--eval_data", str(toy / "heldout.jsonl"), "--prompts", "128", "--group", "16", "--max_len", "192",
            "--lr", "3e-4", "--eval_n", "4", "--max_seqs", "1024"]


def model_options(model):
    """The README's demonstration: easy real problems, two solved examples in the prompt."""
    return ["--model", model, "--examples", str(ASSETS / "examples.jsonl"),
            "--data", str(ASSETS / "easy" / "train.jsonl"), "--style", "plain",
            "--eval_data", str(ASSETS / "easy" / "heldout.jsonl"), "--prompts", "48", "--group", "16",
            "--max_len", "256", "--lr", "1e-5", "--max_seqs", "768"]


# ---------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------

def train(results, line, run):
    """grpo.py until the time or the steps are over; a row for every tenth of the way -> its metrics lines."""
    done = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=open(run + ".log", "w"), stderr=subprocess.STDOUT,
                            env=card.alone())
    reserve, shown, stopped = min(45, results.limit / 4), 0, False  # seconds for the checkpoint at the end
    try:
        while done.poll() is None:
            time.sleep(0.5)
            lines = metrics(run)
            if lines and (shown + 1) * results.limit / 10 < time.time() - results.began:
                shown = int(10 * (time.time() - results.began) / results.limit)
                note(results, lines)
            if results.left() < reserve and not stopped:
                done.send_signal(signal.SIGTERM)
                stopped = True
            if results.left() < -60:
                done.kill()
    finally:
        if done.poll() is None:
            done.kill()
        done.wait()
    if done.returncode:
        tail = " ".join(Path(run + ".log").read_text(errors="replace").strip().splitlines()[-3:])
        raise RuntimeError(f"grpo.py ended with {done.returncode}: {tail[-400:]}")
    return metrics(run)


def metrics(run):
    """Lines of metrics.jsonl, the last one may be half written."""
    out = []
    try:
        for text in Path(run, "metrics.jsonl").read_text().splitlines():
            out.append(json.loads(text))
    except (FileNotFoundError, json.JSONDecodeError):
        pass
    return out


def note(results, lines):
    """Print where the run is; the file keeps the curve so far."""
    last = [m for m in lines if "reward" in m][-10:]
    if last:
        print(f"  step {last[-1]['step']}: reward {statistics.mean(m['reward'] for m in last):.3f} "
              f"over the last {len(last)} steps", flush=True)
    results.save(curve=curve(lines))


def curve(lines):
    keys = ("step", "reward", "length_mean", "entropy", "grad_norm", "mismatch_kl", "seconds", "tokens_per_second",
            "memory_gib", "eval_reward", "eval_se")
    return [{k: m[k] for k in keys if m.get(k) is not None} for m in lines]


def mean_se(values):
    """Mean and standard error over steps, as if they were independent.

    >>> mean_se([0.0, 1.0])
    (0.5, 0.5)
    """
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def tenths(lines):
    """Steps in ten equal parts, fewer if that makes parts of one step, which has no spread -> a row for each."""
    steps, rows = [m for m in lines if "reward" in m], []
    n = min(10, max(1, len(steps) // 2)) if steps else 0
    for i in range(n):
        part = steps[i * len(steps) // n:(i + 1) * len(steps) // n]
        reward, se = mean_se([m["reward"] for m in part])
        average = lambda key: statistics.mean([m[key] for m in part if m.get(key) is not None] or [float("nan")])
        rows.append({"steps": f"{part[0]['step']}-{part[-1]['step']}", "reward": reward, "se": se,
                     "bar": "#" * round(40 * reward),
                     **{k: average(k) for k in ("entropy", "grad_norm", "mismatch_kl", "seconds", "tokens_per_second",
                                                "length_mean")}})
    return rows


def verdict(rows, lines):
    """-> (lines to print, whether it learned)."""
    first, last = rows[0], rows[-1]
    rise, se = last["reward"] - first["reward"], math.hypot(first["se"], last["se"])
    skipped = max((m.get("updates_skipped") or 0 for m in lines), default=0)
    evals = [(m["step"], m["eval_reward"], m["eval_se"]) for m in lines if m.get("eval_reward") is not None]
    learned = rise > 2 * se and rise > 0 and not skipped and len(rows) > 1
    out = [f"reward {first['reward']:.3f} +- {first['se']:.3f} -> {last['reward']:.3f} +- {last['se']:.3f} "
           f"in {lines[-1]['step']} steps: " + ("it learned" if learned else "it did NOT learn"),
           f"updates skipped: {skipped}"]
    if evals:
        out.append("held out: " + ", ".join(f"step {s} {r:.3f}" + (f" +- {e:.3f}" if e is not None else "")
                                            for s, r, e in (evals[0], evals[-1])))
    return out, learned


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    card.options(p, "gpu_learn", 9)
    add = p.add_argument
    add("--model", default=None, help="SmolLM2 folder (python toy.py smollm2 --out FOLDER)")
    add("--world", choices=["toy", "sums"], default=None, help="without --model; default: toy, at --size tiny sums")
    add("--engine", choices=["auto", "vllm", "torch"], default="auto", help="who generates; auto: vLLM where it runs")
    add("--steps", type=int, default=100000, help="at most")
    add("--grpo", default="", help="more options for grpo.py, in one string, for instance '--lr 1e-4'")
    args = p.parse_args(argv)
    if args.size == "tiny":
        args.steps, args.minutes, args.engine = min(args.steps, 30), min(args.minutes, 3), "torch"
    results = card.Results("a learning run on one device", args, [
        ("steps", "steps", ""), ("reward", "reward", ".3f"), ("+-", "se", ".3f"), ("H", "entropy", ".3f"),
        ("|g|", "grad_norm", ".3f"), ("KL gap", "mismatch_kl", ".1e"), ("seconds a step", "seconds", ".3f"),
        ("tokens/s", "tokens_per_second", ",.0f"), ("length", "length_mean", ".1f"), ("", "bar", "")])
    with tempfile.TemporaryDirectory() as folder:
        run = os.path.join(folder, "run")
        world = args.world or ("sums" if args.size == "tiny" else "toy")
        own = (model_options(args.model) if args.model else
               toy_options() if world == "toy" else sums_options(args, folder))
        line = [sys.executable, str(common.ROOT / "grpo.py"), "--recipe", "improved", "--show_every", "0",
                "--save_every", "100000", "--keep", "1", "--updates", "1", "--out", run, "--engine", args.engine,
                "--steps", str(args.steps), "--eval_every", str(10 if args.size == "tiny" else 50),
                *own, *args.grpo.split()]
        results.save(grpo=" ".join(os.path.basename(x) if os.path.isabs(x) else x for x in line[1:]))
        try:
            lines = train(results, line, run)
        except RuntimeError as e:
            results.finish([f"FAILED: {e}"])
            return 1
    rows = tenths(lines)
    if not rows:
        results.finish(["FAILED: no step was finished in the time"])
        return 1
    for row in rows:
        results.add(row)
    text, learned = verdict(rows, lines)
    results.finish(text, curve=curve(lines))
    return int(not learned)


if __name__ == "__main__":
    sys.exit(main())
