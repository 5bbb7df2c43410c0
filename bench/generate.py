"""generate.py - tokens a second of our two engines, bare vLLM and bare `generate`, on lengths that vary.

    python bench/generate.py                               # tiny
    python bench/generate.py --model models/smollm2

Workloads: a random Qwen2 of 1.6 M parameters of whose 4,096 tokens 50 are end tokens, so that lengths are
geometric, with a cut-off tail; or SmolLM2 on chat prompts of real problems, ended by the model itself. Sides
draw different random numbers, so they write different numbers of tokens: compare tokens a second. Checked:
greedy tokens of a few prompts are the same on every side (share of tokens equal to those of `generate`).
"""
import random
from itertools import zip_longest
from pathlib import Path

import measure  # puts the project on the path
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
from rollout import Sampling, make_engine, stop_token_ids

# prompts, samples of each, longest response, rows generated at once, turns of the vLLM sides
WORKLOADS = {"tiny": (32, 8, 256, 64, 6), "smollm2": (8, 8, 128, 64, 5), "quick": (6, 2, 24, 4, 1)}


# ----- The sides: prompts in, lists of token ids out -------------------------------------------------------

def measured(spec, ways, turns=1):
    """ways {side: generate(prompts, max_tokens, temperature) -> lists of response ids}, called in turns ->
    {"parts": {side: [numbers of a turn]}}."""
    prompts = [p for p in spec["prompts"] for _ in range(spec["group"])]
    parts, fixed = {side: [] for side in ways}, {}
    for side, generate in ways.items():
        generate(prompts[:2], 4, 1.0)
        fixed[side] = generate(spec["prompts"][:4], min(16, spec["max_len"]), 0.0)
    for _ in range(turns):
        for side, generate in ways.items():
            meter = measure.Meter()
            meter.lap()
            lengths = [len(ids) for ids in generate(prompts, spec["max_len"], 1.0)]
            meter.lap()
            parts[side].append(meter.answer(greedy=fixed[side], tokens=sum(lengths), samples=len(lengths),
                                            length_mean=sum(lengths) / len(lengths), length_max=max(lengths)))
    return {"parts": parts}


def open_engine(kind, spec):
    return make_engine(kind, spec["model"], max_model_len=spec["max_model_len"], dtype="float32",
                       device=measure.join(), max_seqs=spec["max_seqs"], load_weights=True)


def ours(engine):
    """generate as `measured` wants it, by one of our engines."""
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
    """Three sides in turns on one engine: they differ by less than two processes, or two minutes on a shared
    machine, do. The difference between ours and "bare_vllm+" is ours."""
    engine = open_engine("vllm", spec)
    return measured(spec, {"vllm": ours(engine), "bare_vllm": bare_vllm(engine, False),
                           "bare_vllm+": bare_vllm(engine, True)}, spec["turns"])


def hf(spec):
    """Batches of as many rows as the torch engine has slots, padded; each runs until its longest is done."""
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
    stops = stop_token_ids(spec["model"], model.config)

    @torch.inference_mode()
    def generate(prompts, n, temperature):
        how = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
        out = []
        for i in range(0, len(prompts), spec["max_seqs"]):
            batch = [torch.tensor(p) for p in prompts[i:i + spec["max_seqs"]]]
            ids = pad_sequence(batch, batch_first=True, padding_side="left")
            mask = pad_sequence([torch.ones_like(p) for p in batch], batch_first=True, padding_side="left")
            rows = model.generate(ids, attention_mask=mask, max_new_tokens=n, eos_token_id=sorted(stops),
                                  do_sample=bool(temperature), pad_token_id=min(stops), **how)
            for row in rows[:, ids.shape[1]:].tolist():  # up to the first end token
                end = next((j + 1 for j, t in enumerate(row) if t in stops), len(row))
                out.append(row[:end])
        return out
    return measured(spec, {"hf": generate})


SIDES = {"vllm": vllm, "torch": lambda spec: measured(spec, {"torch": ours(open_engine("torch", spec))}),
         "hf": hf}


# ----- What is compared -------------------------------------------------------------------------------------

def cases(args):
    name = "quick" if args.quick else "smollm2" if args.model else "tiny"
    count, group, max_len, max_seqs, turns = WORKLOADS[name]
    if args.model:
        model, tokenizer = args.model, AutoTokenizer.from_pretrained(args.model)
        problems = data.load_problems(str(measure.ROOT / "assets" / "easy" / "train.jsonl"))
        _, prompts, _ = data.encode_problems(problems[:count], tokenizer, 512)
    else:
        g, model = random.Random(0), measure.random_model(Path(args.work) / "stops", stops=50)
        prompts = [[g.randrange(100, 256) for _ in range(g.randint(8, 32))] for _ in range(count)]
    what = (f"{count * group} samples of at most {max_len} tokens, {max_seqs} rows at once, {turns} turns of "
            f"each vLLM side")
    return what, [({}, {"model": model, "prompts": prompts, "group": group, "max_len": max_len,
                        "max_seqs": max_seqs, "turns": turns,
                        "max_model_len": max_len + max(map(len, prompts))})]


def compare(rows, answers):
    """Tokens a second, against the bare side of the same kind turn by turn; greedy tokens against `hf`'s."""
    rates = {side: [t["tokens"] / t["seconds"] for t in answers[side] if "error" not in t] for side in rows}
    greedy = {side: row.pop("greedy") for side, row in rows.items()}
    for side, row in rows.items():
        row["tokens_per_second"] = measure.spread(rates[side])
        if "hf" in rows:
            both = zip(greedy[side], greedy["hf"], strict=True)
            pairs = [pair for a, b in both for pair in zip_longest(a, b)]
            row["greedy_equal"] = sum(a == b for a, b in pairs) / len(pairs)
    for side, bare, key in (("vllm", "bare_vllm", "times_bare"), ("bare_vllm+", "bare_vllm", "times_bare"),
                            ("vllm", "bare_vllm+", "times_bare_same"), ("torch", "hf", "times_bare")):
        if side in rows and bare in rows:
            rows[side][key] = measure.spread([a / b for a, b in zip(rates[side], rates[bare])])


if __name__ == "__main__":
    measure.compare_sides("generate")
