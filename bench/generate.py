"""generate.py - tokens a second of our two engines, bare vLLM and bare `generate`, on lengths that vary.

    python bench/generate.py --model models/smollm2            # both workloads, twenty minutes on two cores
    python bench/generate.py --workloads tiny --sides torch hf
    python bench/generate.py --quick                           # seconds

  vllm        rollout.VllmEngine as training uses it: seeds, log-probs of the tempered distribution
  bare_vllm   LLM.generate with the same engine options, no seeds, no log-probs
  bare_vllm+  LLM.generate asked for what ours asks for: seeds and log-probs. The difference to `vllm` is ours
  torch       rollout.TorchEngine: finished rows leave the batch, waiting prompts enter
  hf          transformers' `generate` in batches of as many rows (--max_seqs) as the torch engine has slots;
              the prompts of a batch are padded, and it runs until its longest sample is done

The vLLM sides take turns on one engine in one process, --rounds times: they differ by less than two
processes, or two minutes on a shared machine, do. "x bare" is the median of the ratios of neighbouring turns,
with range.

Workloads: `tiny`, a random Qwen2 of 1.6 M parameters of whose 4,096 tokens --stops are end tokens, so that
lengths are geometric, with a cut-off tail; `smollm2`, chat prompts of real problems, ended by the model
itself. Sides draw different random numbers, so they write different numbers of tokens: compare tokens/s.
Checked: greedy tokens of a few prompts are the same on every side (share of tokens equal to those of
`generate`).
"""
import argparse
import json
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

# ----- The sides: prompts in, lists of token ids out -------------------------------------------------------

def measured(spec, ways, rounds=1):
    """ways {side: generate(prompts, max_tokens, temperature) -> lists of response ids}, called in turns ->
    {"parts": {side: [numbers of a turn]}}."""
    prompts = json.loads(Path(spec["prompts"]).read_text())
    few = list({tuple(p): p for p in prompts}.values())[:4]
    parts, fixed = {side: [] for side in ways}, {}
    for side, generate in ways.items():
        generate(prompts[:2], 4, spec["temperature"])
        fixed[side] = generate(few, min(16, spec["max_len"]), 0.0)
    for _ in range(rounds):
        for side, generate in ways.items():
            with measure.meter() as m:
                out = generate(prompts, spec["max_len"], spec["temperature"])
            lengths = [len(r) for r in out]
            parts[side].append(m.answer(greedy=fixed[side], tokens=sum(lengths), samples=len(out),
                                        length_mean=sum(lengths) / len(lengths), length_max=max(lengths)))
    return {"parts": parts, "seconds": sum(a["seconds"] for turns in parts.values() for a in turns)}


def open_engine(kind, spec):
    from rollout import make_engine
    return make_engine(kind, spec["model"], max_model_len=spec["max_model_len"], dtype=spec["dtype"],
                       device=measure.join(), max_seqs=spec["max_seqs"], load_weights=True)


def ours(engine):
    """generate as `measured` wants it, by one of our engines."""
    from rollout import Sampling

    def generate(prompts, n, temperature):
        sampling = Sampling(temperature=temperature, max_tokens=n)
        samples = engine.generate(prompts, list(range(len(prompts))), sampling)
        return [s.response_ids.tolist() for s in samples]
    return generate


def bare_vllm(engine, same):
    """generate by vLLM's own LLM.generate, on the very engine that VllmEngine made, so that the options
    cannot differ. same: ask for seeds and log-probs, as ours does."""
    from vllm import SamplingParams

    def generate(prompts, n, temperature):
        extra = {"logprobs": 0, "flat_logprobs": True} if same else {}
        params = [SamplingParams(temperature=temperature, max_tokens=n, detokenize=False,
                                 seed=i if same else None, **extra) for i in range(len(prompts))]
        out = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in out]
    return generate


def vllm(spec):
    engine = open_engine("vllm", spec)
    return measured(spec, {"vllm": ours(engine), "bare_vllm": bare_vllm(engine, False),
                           "bare_vllm+": bare_vllm(engine, True)}, spec["rounds"])


def torch_engine(spec):
    return measured(spec, {"torch": ours(open_engine("torch", spec))})


def hf(spec):
    from transformers import AutoModelForCausalLM

    from rollout import stop_token_ids
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    model = model.to(device).eval()
    stops = stop_token_ids(spec["model"], model.config)

    def generate(prompts, n, temperature):
        how = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
        how["do_sample"] = bool(temperature)
        out = []
        for i in range(0, len(prompts), spec["max_seqs"]):
            batch = prompts[i:i + spec["max_seqs"]]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device)
            with torch.inference_mode():
                rows = model.generate(ids, attention_mask=mask, max_new_tokens=n, eos_token_id=sorted(stops),
                                      pad_token_id=min(stops), **how)[:, longest:].tolist()
            for row in rows:  # up to the first end token
                end = next((j + 1 for j, t in enumerate(row) if t in stops), len(row))
                out.append(row[:end])
        return out
    return measured(spec, {"hf": generate})


SIDES = {"vllm": vllm, "torch": torch_engine, "hf": hf}


# ----- The script ------------------------------------------------------------------------------------------

def prepare(name, args, work):
    """Model folder and prompt file of a workload -> settings."""
    if name == "tiny":
        g = random.Random(args.seed)
        shape = {"vocab": 256, "hidden": 64, "layers": 2, "stops": 3} if args.quick else {"stops": args.stops}
        model = measure.tiny_model(work / "generate", **shape)
        prompts = [[g.randrange(100, 256) for _ in range(g.randint(8, 32))] for _ in range(args.prompts)]
    else:
        from transformers import AutoTokenizer

        import data
        model, tokenizer = args.model, AutoTokenizer.from_pretrained(args.model)
        problems = data.load_problems(str(measure.ROOT / "assets" / "easy" / "train.jsonl"))
        problems, prompts, _ = data.encode_problems(problems, tokenizer, 512)
        prompts = [list(prompts[i % len(prompts)]) for i in range(args.prompts)]
    path = work / f"prompts-{name}.json"
    path.write_text(json.dumps([p for p in prompts for _ in range(args.group)]))
    return {"model": str(model), "prompts": str(path), "max_len": args.max_len, "max_seqs": args.max_seqs,
            "dtype": args.dtype, "rounds": args.rounds, "temperature": args.temperature,
            "max_model_len": args.max_len + max(map(len, prompts))}


def by_side(answers):
    """{job: [answer of a process]} -> {side: [numbers of a turn]}, in the order of time."""
    turns = {}
    for job, processes in answers.items():
        for a in processes:
            parts = a.pop("parts", {job: [{}]})  # one that failed has none
            for side, some in parts.items():
                turns.setdefault(side, []).extend({**a, **t} for t in some)
    return turns


def compare(rows, turns):
    """Tokens a second, against the bare side of the same kind turn by turn; greedy tokens against `hf`'s."""
    by = {r["side"]: r for r in rows if "error" not in r}
    rates = {side: [t["tokens"] / t["seconds"] for t in turns[side] if "error" not in t] for side in by}
    fixed = by["hf"]["greedy"] if "hf" in by else None
    for side, row in by.items():
        row["tokens_per_second"] = measure.spread(rates[side])
        if fixed:
            pairs = [(a, b) for mine, theirs in zip(row["greedy"], fixed, strict=True)
                     for a, b in zip(mine + [None] * (len(theirs) - len(mine)), theirs)]
            row["greedy_equal"] = sum(a == b for a, b in pairs) / len(pairs)
    for side, bare, key in (("vllm", "bare_vllm", "times_bare"), ("bare_vllm+", "bare_vllm", "times_bare"),
                            ("vllm", "bare_vllm+", "times_bare_same"), ("torch", "hf", "times_bare")):
        if side in by and bare in by:
            by[side][key] = measure.spread([a / b for a, b in zip(rates[side], rates[bare])])
    for row in by.values():
        row.pop("greedy")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common(p, "generate")
    add = p.add_argument
    add("--workloads", nargs="+", choices=["tiny", "smollm2"], help="default: tiny, and smollm2 with --model")
    add("--model", help="SmolLM2 folder, or any other chat model")
    add("--sides", nargs="+", choices=list(SIDES),
        help="vllm is three sides; default: all, vllm where it is installed")
    add("--rounds", type=int, default=6, help="turns of the three vLLM sides in one process")
    add("--prompts", type=int, default=32, help="prompts")
    add("--group", type=int, default=8, help="samples for each")
    add("--max_len", type=int, default=256, help="tokens of a response at most")
    add("--max_seqs", type=int, default=64, help="rows generated at once, on every side")
    add("--temperature", type=float, default=1.0, help="of sampling")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    add("--stops", type=int, default=50, help="end tokens of the tiny model's 4,096; 50: 82 tokens a text")
    args = p.parse_args(argv)
    if args.worker:
        return measure.serve(SIDES, args.worker)
    before = measure.start(args)
    if args.quick:
        args.workloads, args.prompts, args.group, args.max_len, args.max_seqs = ["tiny"], 6, 2, 24, 4
        args.rounds = 1
        args.sides = args.sides or ["torch", "hf"]
    workloads = args.workloads or ["tiny"] + ["smollm2"] * bool(args.model)
    if "smollm2" in workloads and not args.model:
        p.error("smollm2 needs --model FOLDER: python toy/make.py smollm2 --out FOLDER makes it")
    sides = args.sides or [s for s in SIDES if s != "vllm" or measure.has("vllm")]
    rows = []
    for name in workloads:
        settings = prepare(name, args, Path(args.work))
        print(f"{name}: {args.prompts * args.group} samples", flush=True)
        turns = by_side(measure.alternate(__file__, {s: (s, settings, None) for s in sides}, args.repeats))
        some = measure.rows_of(turns, workload=name)
        compare(some, turns)
        rows += some
    measure.print_rows(rows, [("workload", "workload", ""), ("side", "side", ""),
                              ("tokens/s", "tokens_per_second", ",.0f"),
                        ("x bare", "times_bare", ".3f"), ("x bare+", "times_bare_same", ".3f"),
                        ("seconds", "seconds", ".2f"), ("CPU s", "cpu_seconds", ".2f"),
                        ("mean length", "length_mean", ".1f"), ("memory MiB", "memory_mb", ",.0f"),
                        ("greedy equal", "greedy_equal", ".2f")])
    measure.write(args, "generation", rows, before)


if __name__ == "__main__":
    main()
