"""step.py - a whole GRPO step, ours against TRL: generate, reward, update, weights to the engine.

    python bench/step.py --model models/smollm2 --peer_python PEERS/bin/python       # an hour on two cores
    python bench/step.py --workloads tiny --sides ours_torch trl_hf
    python bench/step.py --quick                                                     # seconds

  ours_vllm, ours_torch   grpo.py itself, as a command would run it, with --engine vllm or torch
  trl_vllm                GRPOTrainer.train with use_vllm and vllm_mode="colocate". TRL 1.16 names vLLM 0.22
                          to 0.31 as supported, with 0.32 it warns; needs an environment that has both
  trl_hf                  GRPOTrainer.train with its default generation, transformers' `generate`

Same model, prompts, samples a prompt, temperature, longest response, updates a rollout, learning rate and
grader (reward.py). The first step warms up; the seconds are those of the others. The sides draw different
random numbers, so responses differ in length: the table shows tokens a second (response tokens) beside
seconds. TRL's micro-batch is --micro: scan it with update.py.

Workloads: `tiny`, a random Qwen2 of 1.6 M parameters that writes 82 tokens on average and boxes a right
answer about every third time; `smollm2`, real easy problems with two solved examples in the prompt.
"""
import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
import update

SAME = ("steps", "prompts", "group", "updates", "max_len", "dtype")


# ----- The sides --------------------------------------------------------------------------------------------

def ours(spec, engine):
    """grpo.main in this process; its own metrics.jsonl says how long each step and phase took."""
    with tempfile.TemporaryDirectory() as out:
        lines = measure.run_grpo({
            "model": spec["model"], "data": spec["data"], "out": out, "engine": engine, "recipe": "improved",
            "drop_zero_variance": 0, "style": "plain", "eval_data": "none", "temperature": 1.0, "lr": 1e-6,
            "max_seqs": spec["prompts"] * spec["group"],  # TRL generates all of them at once as well
            **spec["options"], **{name: spec[name] for name in SAME}})[1:]

    def mean(name):
        return statistics.mean(line[name] for line in lines)

    phases = {n: mean(f"seconds_{n}") for n in ("generate", "reward", "logprobs", "update", "sync")}
    return report([line["seconds"] for line in lines], [line["tokens"] for line in lines],
                  tokens_prompt=lines[-1]["tokens_prompt"], reward=mean("reward"),
                  grad_norm=mean("grad_norm"), entropy=mean("entropy"), mismatch_kl=mean("mismatch_kl"),
                  phases=phases)


def report(seconds, tokens, **more):
    """Several steps of one process -> its answer: the median step."""
    unit = 2**20 if sys.platform == "darwin" else 1024
    return {"seconds": statistics.median(seconds), "steps": seconds, "tokens": statistics.mean(tokens),
            "tokens_per_second": sum(tokens) / sum(seconds),
            "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, **more}


def trl(spec, vllm):
    """GRPOTrainer on the same prompts, rewarded by the same function; a step ends with its last update."""
    for name, value in (("TRL_EXPERIMENTAL_SILENCE", "1"), ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
                        ("VLLM_CPU_KVCACHE_SPACE", "2"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
                        ("VLLM_LOGGING_LEVEL", "ERROR")):
        os.environ.setdefault(name, value)
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import reward
    from rollout import stop_token_ids
    rows = json.loads(Path(spec["trl_data"]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    for r in rows:  # TRL takes text; what it makes of it must be our token ids
        if tokenizer(r["prompt"])["input_ids"] != r["ids"]:
            raise ValueError("a prompt does not survive decoding and encoding: TRL would see other tokens")
    n, k, updates, ends = spec["prompts"] * spec["group"], spec["micro"], spec["updates"], []

    class Times(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % updates == 0:
                ends.append(time.perf_counter())

    def grade(completions, answer, **_):
        return [reward.compute_reward("</think>" + text, gold) for text, gold in zip(completions, answer)]

    engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": spec["max_model_len"],
              "vllm_gpu_memory_utilization": 0.5} if vllm else {}
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder, per_device_train_batch_size=k, gradient_accumulation_steps=n // updates // k,
            steps_per_generation=n // k, num_generations=spec["group"], max_completion_length=spec["max_len"],
            max_steps=updates * spec["steps"], top_p=1.0, top_k=0, model_init_kwargs={"dtype": "float32"},
            **update.trl_settings(spec["dtype"]), **engine)
        trainer = GRPOTrainer(
            spec["model"], args=args, reward_funcs=grade, processing_class=tokenizer, callbacks=[Times()],
            train_dataset=Dataset.from_list([{name: r[name] for name in ("prompt", "answer")} for r in rows]))
        if hasattr(trainer, "generation_config"):
            stops = stop_token_ids(spec["model"], trainer.model.config)
            trainer.generation_config.eos_token_id = sorted(stops)
        trainer.train()

    def after(name, every):  # without the warm-up step
        return statistics.mean([line[name] for line in trainer.state.log_history if name in line][every:])

    lengths = [line["completions/mean_length"] for line in trainer.state.log_history
               if "completions/mean_length" in line]
    return report([b - a for a, b in pairwise(ends)], [x * n for x in lengths[1:]],
                  reward=after("reward", 1), grad_norm=after("grad_norm", updates),
                  entropy=after("entropy", updates),
                  tokens_prompt=sum(len(r["ids"]) for r in rows[-spec["prompts"]:]) * spec["group"])


SIDES = {"ours_vllm": lambda s: ours(s, "vllm"), "trl_vllm": lambda s: trl(s, True),
         "ours_torch": lambda s: ours(s, "torch"), "trl_hf": lambda s: trl(s, False)}


# ----- The script -------------------------------------------------------------------------------------------

def prepare(name, args, work):
    """Model, problems for grpo.py, and for TRL the prompts that it makes of them, in order -> settings."""
    from transformers import AutoTokenizer

    import data
    if name == "tiny":
        shape = {"vocab": 256, "hidden": 64, "layers": 2, "stops": 3} if args.quick else {"stops": 50}
        model, options, examples = measure.tiny_model(work / "step", **shape), {"no_chat": True}, ()
        path = measure.random_problems(work / "step-problems.jsonl", 2 * args.prompts, seed=args.seed)
    else:
        model, path = args.model, str(measure.ROOT / "assets" / "easy" / "train.jsonl")
        options = {"examples": str(measure.ROOT / "assets" / "examples.jsonl")}
        examples = data.load_problems(options["examples"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    problems, prompts, _ = data.encode_problems(data.load_problems(path), tokenizer, 1024,
                                                chat=name != "tiny", examples=examples)
    order = [i for step in range(args.steps)
             for i in data.batch_indices(len(problems), step, args.prompts, 0)]
    rows = [{"prompt": tokenizer.decode(prompts[i]), "ids": list(prompts[i]), "answer": problems[i].answer}
            for i in order]
    trl_data = work / f"trl-{name}.json"
    trl_data.write_text(json.dumps(rows))
    return {"model": str(model), "data": path, "trl_data": str(trl_data), "options": options,
            "micro": args.micro, "max_model_len": args.max_len + max(map(len, prompts)),
            **{name: getattr(args, name) for name in SAME}}


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
    measure.add_common(p, "step")
    add = p.add_argument
    add("--workloads", nargs="+", choices=["tiny", "smollm2"], help="default: tiny, and smollm2 with --model")
    add("--model", help="SmolLM2 folder: python toy/make.py smollm2 makes it")
    add("--sides", nargs="+", choices=list(SIDES), help="default: all that can run")
    add("--steps", type=int, default=3, help="steps of each repetition, the first not counted")
    add("--prompts", type=int, default=16, help="problems a step")
    add("--group", type=int, default=8, help="samples for each")
    add("--updates", type=int, default=2, help="optimizer updates a step")
    add("--max_len", type=int, default=208, help="tokens of a response at most")
    add("--micro", type=int, default=16, help="samples of TRL's micro-batch")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    args = p.parse_args(argv)
    if args.worker:
        return measure.serve(SIDES, args.worker)
    before = measure.start(args)
    if args.quick:
        args.workloads, args.prompts, args.group, args.max_len, args.steps = ["tiny"], 4, 4, 24, 2
        args.sides = args.sides or ["ours_torch"]
    workloads = args.workloads or ["tiny"] + ["smollm2"] * bool(args.model)
    if "smollm2" in workloads and not args.model:
        p.error("smollm2 needs --model FOLDER: python toy/make.py smollm2 makes it")
    peer, vllm = args.peer_python or measure.has("trl"), measure.has("vllm")
    sides = args.sides or [s for s in SIDES if (peer or "trl" not in s) and (vllm or "vllm" not in s)]
    rows = []
    for name in workloads:
        settings = prepare(name, args, Path(args.work))
        print(f"{name}: {args.prompts} x {args.group} samples a step", flush=True)
        jobs = {s: (s, settings, args.peer_python if "trl" in s else None) for s in sides}
        some = measure.rows_of(measure.alternate(__file__, jobs, args.repeats), workload=name)
        compare(some)
        rows += some
    measure.print_rows(rows, [
        ("workload", "workload", ""), ("side", "side", ""), ("seconds a step", "seconds", ".2f"),
        ("x ours", "times_ours", ".2f"), ("tokens/s", "tokens_per_second", ",.0f"),
        ("x ours, per token", "times_ours_per_token", ".2f"), ("tokens", "tokens", ",.0f"),
        ("reward", "reward", ".3f"), ("H", "entropy", ".3f"), ("|g|", "grad_norm", ".1e"),
        ("process MiB", "memory_mb", ",.0f")])
    measure.write(args, "a whole GRPO step", rows, before,
                  memory="peak of the whole process, interpreter, libraries and model included")


if __name__ == "__main__":
    main()
