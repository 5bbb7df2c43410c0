"""step.py - a whole GRPO step, ours against TRL: generate, reward, update, weights to the engine.

    python bench/step.py --model models/smollm2 --peer_python PEERS/bin/python       # an hour on two cores
    python bench/step.py --workloads tiny --sides ours_torch trl_hf
    python bench/step.py --quick                                                     # seconds; what CI runs

  ours_vllm, ours_torch   grpo.py itself, as a command would run it, with --engine vllm or torch
  trl_vllm                GRPOTrainer.train with use_vllm and vllm_mode="colocate". TRL 1.16 names vLLM 0.22 to 0.31 as
                          supported, so with 0.32 it warns; needs an environment that has both
  trl_hf                  GRPOTrainer.train with its default generation, transformers' `generate`

Same model, prompts, samples a prompt, temperature, longest response, updates a rollout, learning rate and grader
(reward.py). The first step warms up; the seconds are those of the others. The sides draw different random numbers, so
responses differ in length: the table shows tokens a second (response tokens) beside seconds. TRL's micro-batch is
--micro: scan it with update.py.

Workloads: `tiny`, a random Qwen2 of 1.6 M parameters that writes 82 tokens on average and boxes a right answer about
every third time; `smollm2`, real easy problems with two solved examples in the prompt.
"""
import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness as common  # noqa: E402


# ---------------------------------------------------------------------------------------------------------------
# The sides
# ---------------------------------------------------------------------------------------------------------------

def ours(spec, engine):
    """grpo.main in this process; its own metrics.jsonl says how long each step and phase took."""
    import grpo
    with tempfile.TemporaryDirectory() as out:
        grpo.main(["--model", spec["model"], "--data", spec["data"], "--out", out, "--engine", engine, "--recipe",
                   "improved",
                   "--drop_zero_variance", "0", "--style", "plain", "--eval_data", "none", "--show_every", "0",
                   "--save_every", "100000",
                   "--temperature", "1.0", "--lr", "1e-6", "--dtype", spec["dtype"], *spec["options"],
                   "--max_seqs", str(spec["prompts"] * spec["group"]),  # TRL generates all of them at once as well
                   *(x for k in ("steps", "prompts", "group", "updates", "max_len") for x in (f"--{k}", str(spec[k])))])
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()][1:]
    mean = lambda name: statistics.mean(line[name] for line in lines)
    phases = {n: mean(f"seconds_{n}") for n in ("generate", "reward", "logprobs", "update", "sync")}
    return report([line["seconds"] for line in lines], [line["tokens"] for line in lines],
                  tokens_prompt=lines[-1]["tokens_prompt"], reward=mean("reward"), grad_norm=mean("grad_norm"),
                  entropy=mean("entropy"), gap_kl=mean("mismatch_kl"), phases=phases)


def report(seconds, tokens, **more):
    """Several steps of one process -> its answer: the median step."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    return {"seconds": statistics.median(seconds), "steps": seconds, "tokens": statistics.mean(tokens),
            "tokens_per_second": sum(tokens) / sum(seconds), "memory_mb": peak, **more}


def trl(spec, vllm):
    """GRPOTrainer on the same prompts, rewarded by the same function; a step ends with its last optimizer update."""
    import torch
    for name, value in (("TRL_EXPERIMENTAL_SILENCE", "1"), ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
                        ("VLLM_CPU_KVCACHE_SPACE", "2"),
                        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"), ("VLLM_LOGGING_LEVEL", "ERROR")):
        os.environ.setdefault(name, value)
    import reward
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    rows = json.loads(Path(spec["trl_data"]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    for r in rows:  # TRL takes text; what it makes of it must be our token ids
        if tokenizer(r["prompt"])["input_ids"] != r["ids"]:
            raise ValueError("a prompt does not survive decoding and encoding: the sides would train on other tokens")
    ends, cuda = [], torch.cuda.is_available()
    n, k, updates = spec["prompts"] * spec["group"], spec["micro"], spec["updates"]

    class Times(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % updates == 0:
                ends.append(time.perf_counter())

    def grade(completions, answer, **_):
        return [reward.compute_reward("</think>" + text, gold) for text, gold in zip(completions, answer)]

    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder, per_device_train_batch_size=k, gradient_accumulation_steps=n // updates // k,
            steps_per_generation=n // k,
            num_generations=spec["group"], max_completion_length=spec["max_len"], max_steps=updates * spec["steps"],
            learning_rate=1e-6, weight_decay=0.01, max_grad_norm=1.0, lr_scheduler_type="constant", loss_type="dapo",
            epsilon=0.2, epsilon_high=0.28, beta=0.0, temperature=1.0, top_p=1.0, top_k=0,
            bf16=spec["dtype"] == "bfloat16",
            use_cpu=not cuda, gradient_checkpointing=cuda, shuffle_dataset=False, logging_steps=1, report_to=[],
            save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=cuda, model_init_kwargs={"dtype": "float32"},
            **({"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": spec["max_model_len"],
                "vllm_gpu_memory_utilization": 0.5} if vllm else {}))
        trainer = GRPOTrainer(spec["model"], args=args, reward_funcs=grade, processing_class=tokenizer,
                              train_dataset=Dataset.from_list([{k: r[k] for k in ("prompt", "answer")} for r in rows]),
                              callbacks=[Times()])
        if hasattr(trainer, "generation_config"):
            from rollout import stop_token_ids
            trainer.generation_config.eos_token_id = sorted(stop_token_ids(spec["model"], trainer.model.config))
        trainer.train()
    log = trainer.state.log_history
    values = lambda name: [line[name] for line in log if name in line]
    after = lambda name, every: statistics.mean(values(name)[every:])  # without the warm-up step
    return report([b - a for a, b in zip(ends, ends[1:])], [x * n for x in values("completions/mean_length")[1:]],
                  reward=after("reward", 1), grad_norm=after("grad_norm", updates), entropy=after("entropy", updates),
                  tokens_prompt=sum(len(r["ids"]) for r in rows[-spec["prompts"]:]) * spec["group"])


SIDES = {"ours_vllm": lambda s: ours(s, "vllm"), "trl_vllm": lambda s: trl(s, True),
         "ours_torch": lambda s: ours(s, "torch"), "trl_hf": lambda s: trl(s, False)}


# ---------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------

def prepare(name, args, work):
    """Model, problems for grpo.py, and the very prompts it will make of them, in its order, for TRL -> settings."""
    import data
    from transformers import AutoTokenizer
    examples = str(common.ROOT / "assets" / "examples.jsonl")
    if name == "tiny":
        shape = dict(vocab=256, hidden=64, layers=2, stops=3) if args.quick else dict(stops=50)
        model, g = common.tiny_model(work / "step", **shape), random.Random(args.seed)
        path = work / "step-problems.jsonl"
        text = lambda: "".join(g.choice(common.LETTERS) for _ in range(g.randint(16, 48)))
        lines = [{"id": str(i), "problem": text(), "answer": str(i % 2)} for i in range(2 * args.prompts)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = ["--no_chat"]
    else:
        model, path, options = args.model, common.ROOT / "assets" / "easy" / "train.jsonl", ["--examples", examples]
    tokenizer = AutoTokenizer.from_pretrained(model)
    problems, prompts, _ = data.encode_problems(data.load_problems(str(path)), tokenizer, 1024, chat=name != "tiny",
                                                examples=data.load_problems(examples) if name != "tiny" else ())
    order = [i for step in range(args.steps) for i in data.batch_indices(len(problems), step, args.prompts, 0)]
    rows = [{"prompt": tokenizer.decode(prompts[i]), "ids": list(prompts[i]),
             "answer": problems[i].answer} for i in order]
    trl_data = work / f"trl-{name}.json"
    trl_data.write_text(json.dumps(rows))
    return {"model": str(model), "data": str(path), "trl_data": str(trl_data), "options": options, "dtype": args.dtype,
            "micro": args.micro,
            "max_model_len": args.max_len + max(map(len, prompts)),
            **{k: getattr(args, k) for k in ("steps", "prompts", "group", "updates", "max_len")}}


def compare(rows):
    """Each TRL side in units of ours with the same engine."""
    by = {r["side"]: r for r in rows if "error" not in r}
    for row in by.values():
        base = by.get("ours_vllm" if "vllm" in row["side"] else "ours_torch")
        if base:
            row["times_ours"] = row["seconds"]["median"] / base["seconds"]["median"]
            row["times_ours_per_token"] = base["tokens_per_second"] / row["tokens_per_second"]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common(p, "step")
    add = p.add_argument
    add("--workloads", nargs="+", choices=["tiny", "smollm2"], default=None,
        help="default: tiny, and smollm2 with --model")
    add("--model", default=None, help="SmolLM2 folder")
    add("--sides", nargs="+", choices=list(SIDES), default=None, help="default: all that can run")
    add("--steps", type=int, default=3, help="steps of each repetition, the first not counted")
    add("--prompts", type=int, default=16, help="problems a step")
    add("--group", type=int, default=8, help="samples for each")
    add("--updates", type=int, default=2, help="optimizer updates a step")
    add("--max_len", type=int, default=208, help="tokens of a response at most")
    add("--micro", type=int, default=16, help="samples of TRL's micro-batch")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    add("--work", default=str(common.ROOT / "runs" / "bench"), help="folder for prompts and the tiny model")
    add("--seed", type=int, default=0, help="of the problems")
    args = p.parse_args(argv)
    if args.worker:
        return common.serve(SIDES, args.worker)
    before = common.start(args)
    if args.quick:
        args.workloads, args.prompts, args.group, args.max_len, args.steps = ["tiny"], 4, 4, 24, 2
        args.sides = args.sides or ["ours_torch"]
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    workloads = args.workloads or ["tiny"] + ["smollm2"] * bool(args.model)
    if "smollm2" in workloads and not args.model:
        p.error("smollm2 needs --model FOLDER: python toy.py smollm2 --out FOLDER makes it")
    peer = args.peer_python or common.has("trl")
    sides = args.sides or [s for s in SIDES if (peer or "trl" not in s) and (common.has("vllm") or "vllm" not in s)]
    rows, began = [], time.time()
    for name in workloads:
        settings = prepare(name, args, work)
        print(f"{name}: {args.prompts} x {args.group} samples a step", flush=True)
        jobs = {s: (s, settings, args.peer_python if "trl" in s else None) for s in sides}
        some = common.rows_of(common.alternate(__file__, jobs, args.repeats), workload=name)
        compare(some)
        rows += some
    print()
    common.table(rows, [("workload", "workload", ""), ("side", "side", ""), ("seconds a step", "seconds", ".2f"),
                        ("x ours", "times_ours", ".2f"),
                        ("tokens/s", "tokens_per_second", ",.0f"), ("x ours, per token", "times_ours_per_token", ".2f"),
                        ("tokens", "tokens", ",.0f"), ("reward", "reward", ".3f"), ("H", "entropy", ".3f"),
                        ("|g|", "grad_norm", ".1e"), ("process MiB", "memory_mb", ",.0f")])
    common.write(args.out, "a whole GRPO step", {k: v for k, v in vars(args).items() if k != "worker"}, rows, before,
                 memory="peak of the whole process (VmHWM), interpreter, libraries and model included",
                 minutes=(time.time() - began) / 60)


if __name__ == "__main__":
    main()
