"""step.py - a whole GRPO step, ours against TRL: generate, reward, update, weights to the engine.

    python bench/step.py --peer_python PEERS/bin/python                           # tiny
    python bench/step.py --peer_python PEERS/bin/python --model models/smollm2

Same model, prompts, samples a prompt, temperature, longest response, updates a rollout, learning rate and
grader (reward.py), fp32. The first step warms up; the seconds are those of the others. The sides draw
different random numbers, so responses differ in length, and the table shows the time for a token as well.
Workloads: a random Qwen2 of 1.6 M parameters that writes 82 tokens on average and boxes a right answer about
every third time; or SmolLM2 on real easy problems with two solved examples in the prompt.
"""
import resource
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import measure  # puts the project on the path
import update
from transformers import AutoTokenizer

import data
import reward
from rollout import stop_token_ids

# micro: samples in a micro-batch of TRL; steps: the first is not counted
WORKLOADS = {"tiny": {"prompts": 16, "group": 8, "max_len": 208, "steps": 3, "micro": 8},
             "smollm2": {"prompts": 4, "group": 8, "max_len": 208, "steps": 3, "micro": 4},
             "quick": {"prompts": 8, "group": 8, "max_len": 24, "steps": 2, "micro": 4}}


def report(seconds, tokens, **more):
    """Several steps of one process -> its answer: the median step."""
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN  # ours is a child of its worker
    return {"seconds": statistics.median(seconds), "steps": seconds, "tokens": statistics.mean(tokens),
            "tokens_per_second": sum(tokens) / sum(seconds),
            "memory_mb": max(resource.getrusage(x).ru_maxrss for x in who) / 1024, **more}


def ours(spec, engine):
    """grpo.py itself; its own metrics.jsonl says how long each step and phase took."""
    shape = spec["shape"]
    with tempfile.TemporaryDirectory() as out:
        lines = measure.run_grpo({
            **shape, **spec["options"], "model": spec["model"], "data": spec["data"], "out": out,
            "engine": engine, "dtype": "float32", "lr": 1e-6, "style": "plain", "updates": update.UPDATES,
            "max_seqs": shape["prompts"] * shape["group"]})[1:]  # as TRL, which generates all at once
    means = {name: statistics.mean(line[name] for line in lines)
             for name in ("reward", "grad_norm", "entropy", "seconds_generate", "seconds_update")}
    return report([line["seconds"] for line in lines], [line["tokens"] for line in lines], **means)


def trl(spec):
    """GRPOTrainer with transformers' `generate` (with vLLM TRL 1.16 cannot push weights on a CPU), rewarded
    by the same function; a step ends with its last update."""
    rows, ends, shape = spec["rows"], [], spec["shape"]

    def grade(completions, answer, **_):
        return [reward.compute_reward("</think>" + text, gold) for text, gold in zip(completions, answer)]

    trainer = update.trl_trainer(spec, spec["model"], rows, shape["steps"],
                                 lambda k: k % update.UPDATES or ends.append(time.perf_counter()),
                                 reward_funcs=grade)
    for r in rows:  # TRL takes text; what it makes of it must be our token ids
        if trainer.processing_class(r["prompt"])["input_ids"] != r["ids"]:
            raise ValueError("a prompt does not survive decoding and encoding: TRL would see other tokens")
    trainer.generation_config.eos_token_id = sorted(stop_token_ids(spec["model"], trainer.model.config))
    trainer.train()

    def after_the_first(name):
        values = [line[name] for line in trainer.state.log_history if name in line]
        return values[len(values) // shape["steps"]:]

    lengths = after_the_first("completions/mean_length")
    tokens = [x * shape["prompts"] * shape["group"] for x in lengths]
    return report([b - a for a, b in pairwise(ends)], tokens,
                  **{k: statistics.mean(after_the_first(k)) for k in ("reward", "grad_norm", "entropy")})


SIDES = {"ours_vllm": lambda s: ours(s, "vllm"), "ours_torch": lambda s: ours(s, "torch"), "trl_hf": trl}
PEERS = ["trl_hf"]


def cases(args):
    """Model, problems for grpo.py, and for TRL the prompts that it makes of them, in order."""
    work, assets = Path(args.work), measure.ROOT / "assets"
    shape = dict(WORKLOADS["quick" if args.quick else "smollm2" if args.model else "tiny"])
    micro, examples = shape.pop("micro"), ()
    if args.model:
        model, path = args.model, str(assets / "easy" / "train.jsonl")
        options = {"examples": str(assets / "examples.jsonl")}
        examples = data.load_problems(options["examples"])
    else:
        model, options = measure.random_model(work / "stops", stops=50), {"no_chat": True}
        path = measure.random_problems(work / "step-problems.jsonl", 2 * shape["prompts"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    problems, prompts, _ = data.encode_problems(data.load_problems(path), tokenizer, 1024,
                                                chat=bool(args.model), examples=examples)
    order = [i for step in range(shape["steps"])
             for i in data.batch_indices(len(problems), step, shape["prompts"], 0)]
    rows = [{"prompt": tokenizer.decode(prompts[i]), "ids": list(prompts[i]), "answer": problems[i].answer}
            for i in order]
    what = f"a step of {shape['prompts']} x {shape['group']} samples of at most {shape['max_len']} tokens"
    return what, [({}, {"shape": shape, "micro": micro, "model": model, "data": path, "rows": rows,
                        "options": options, "work": args.work})]


def compare(rows, _):
    """TRL in units of ours with the torch engine."""
    for row in rows.values() if "ours_torch" in rows else ():
        row["times_ours"] = row["seconds"]["median"] / rows["ours_torch"]["seconds"]["median"]
        row["times_ours_per_token"] = rows["ours_torch"]["tokens_per_second"] / row["tokens_per_second"]


if __name__ == "__main__":
    measure.compare_sides("step")
