"""evaluate.py - a score, its standard error, and the protocol it was measured with.

    python evaluate.py --model M --benchmarks aime24 amc23 math500 --n 16     # one GPU, or a CPU
    torchrun --nproc_per_node 8 evaluate.py --model M -n 16                   # eight GPUs
    python evaluate.py --regrade eval/M.json              # grade the saved responses again, generate nothing
    python evaluate.py --compare eval/A.json eval/B.json  # problem by problem: is B better than A, or lucky?
    python evaluate.py --table eval/*.json --published    # models x benchmarks, as in DeepScaleR's blog

The same weights were published with 37.0 and with 43.1 on AIME 2024: prompts, samples, limits and graders
differ. So every result (OUT/NAME.json) carries its protocol and standard errors, and all responses are kept
(OUT/NAME.responses.jsonl.gz), until then in part files: what was stopped goes on, on any number of ranks.
Left out on purpose: judges that are models, answers that are programs, votes, prompts tuned by benchmark.
"""
import glob
import gzip
import hashlib
import json
import math
import os
import pkgutil
import sys
import time
from collections import Counter, namedtuple
from contextlib import closing, suppress
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import chain, groupby, product
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
import transformers

import common
import data
import policy
import reward
import rollout

ASSETS = Path(__file__).resolve().parent / "assets" / "benchmarks"
BENCHMARKS = {path.stem: str(path) for path in sorted(ASSETS.glob("*.jsonl"))}
FIVE = ["aime24", "math500", "amc23", "minerva", "olympiad"]
RIGHT = 0.5  # a sample is right from this reward on; only rewards of one's own know values in between


# ----- What the trainer uses too: prompts, rewards, a point of the validation curve ------------------------

class Style(NamedTuple):
    """How a kind of model is asked, and which part of its response is graded."""
    template: str | None  # the whole prompt around {problem}; None: the chat template and an instruction
    think: bool           # the answer counts only after </think>; else the whole text is searched
    stop: tuple = ()      # texts that end a response

    def cut(self, text):
        return text[:min((text.find(mark) for mark in self.stop if mark in text), default=None)]


QWEN = ("<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n")
RSTAR = "<|user|>:\n{problem}\n<|assistant|>: Let's think step by step and solve the problem with code."
STYLES = {
    "r1": Style(None, True),          # R1 distillations, DeepScaleR, Still
    "plain": Style(None, False),      # chat models that do not think in tags
    "qwen-math": Style(QWEN, False),  # Qwen2.5-Math-Instruct, SimpleRL
    "rstar": Style(RSTAR, False, ("<end_of_answer>", "<end_of_code>")),  # its code is not run
}


def load_style(name):
    """A Style of the table, or one read from a text file that holds the whole prompt, with {problem} in it.
    If the file mentions <think>, the answer counts only after </think>."""
    if name in STYLES:
        return STYLES[name]
    template = Path(name).read_text("utf-8", "replace") if os.path.isfile(name) else ""
    if template.count("{problem}") != 1:
        raise ValueError(f"--style {name}: not {', '.join(STYLES)} or a file with {{problem}} exactly once")
    return Style(template, "<think>" in template)


def encode(style, problems, tokenizer, room, instruction=data.INSTRUCTION, chat=True, examples=(),
           vocabulary=math.inf):
    """(kept problems, their prompts as token ids, number dropped for being longer than `room` tokens).
    ValueError if a prompt loses text on its way, or has tokens from `vocabulary` on."""
    if style.template and (instruction != data.INSTRUCTION or not chat or examples):
        raise ValueError("this --style is the whole prompt: put --instruction and --examples into its file")
    chat = chat and not style.template
    template = style.template or " ".join(filter(None, ["{problem}", instruction]))

    def ask(some):
        return [replace(p, problem=template.replace("{problem}", p.problem)) for p in some]

    added = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])  # such as a begin-of-text token
    plain = partial(tokenizer, add_special_tokens=not any(token in template for token in added))
    asked, prompts, dropped = data.encode_problems(
        ask(problems), tokenizer if chat else plain, room, "", chat, ask(examples))
    rollout.check_tokenizer(tokenizer, [p.problem for p in asked], prompts, vocabulary)
    kept = {p.id for p in asked}
    return [p for p in problems if p.id in kept], prompts, dropped


def load_prompts(path, args, model, tokenizer, style, room, limit=0):
    """Problems and their prompts of at most `room` tokens, checked -> (problems, prompts, number dropped).
    args: values of PROMPT_OPTIONS. limit: only the first problems; 0: all."""
    problems = data.load_problems(path, problem_field=args.problem_field, answer_field=args.answer_field,
                                  need_answer=not args.reward)
    examples = data.load_problems(args.examples) if args.examples else ()
    problems, prompts, dropped = encode(style, problems[:limit or None], tokenizer, room, args.instruction,
                                        not args.no_chat, examples, model.vocabulary)
    if not args.reward:
        notes = data.check_golds(problems, args.allow_unreadable), data.format_warning(problems)
        for note in filter(None, notes):
            common.say(f"{path}: {note}")
    return problems, prompts, dropped


def load_reward(name, style):
    """grade(problem, sample) -> (reward, verdict), for `rollout`: by reward.py or your "module:function",
    called with (response, problem). Whatever goes wrong in that one is a ValueError that names it."""
    def grade(problem, sample):
        text = style.cut(sample.text)
        if not name:
            verdict = reward.explain(text, problem.answer, problem.problem, style.think)
            return verdict.reward, verdict.reason
        try:
            value = float(function(text, problem))
            if not math.isfinite(value):
                raise ValueError(f"{value} is no finite number")
        except (Exception, SystemExit) as e:  # code of somebody else may raise anything
            raise ValueError(f"--reward {name} failed on {problem.id}: {type(e).__name__}: {e}") from e
        return value, "scored"

    if name:
        sys.path.append(os.getcwd())  # last: a file there that is named like one of ours must not replace it
        try:
            function = pkgutil.resolve_name(name)
            if not callable(function):
                raise TypeError("it is no function")
        except (Exception, SystemExit) as e:
            raise ValueError(f"--reward {name}: nothing to import there ({type(e).__name__}: {e})") from e
    return grade


def curve_point(samples, problems, n):
    """Metrics of a validation by the function behind the tables. samples: P x n, in order."""
    b = summarize([{"id": problems[i // n].id, "reward": s.reward, "reason": s.verdict,
                    "finish_reason": s.finish_reason, "response_tokens": len(s.response_ids)}
                   for i, s in enumerate(samples)], n)
    return {"eval_reward": b["pass@1"], "eval_se": b["se"], "eval_problems": b["problems"], "eval_n": n,
            "eval_truncated": b["truncated"], "eval_length": b["tokens"]}


# ----- Estimators (P problems, n samples of each) ----------------------------------------------------------

def mean_and_se(values):
    """[P] means of the problems -> (their mean, its standard error; None of one problem).

    Samples of one problem are alike, so P x n verdicts are not P x n independent ones: the spread of problem
    means covers the choice of problems and the luck of sampling (Miller 2411.00640, clustered). A mean of 0
    or 1 has no spread; there the error is half the rule of three: 95 % sure within 3 / P."""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
    if not spread and mean in (0, 1):
        return mean, min(0.5, 1.5 / len(values))
    return mean, None if spread is None else spread / len(values) ** 0.5


def pass_at_k(right, n):
    """[pass@1 .. pass@n] of a problem with `right` of n: the share of the subsets of k samples that hold a
    right one (Chen et al. 2107.03374)."""
    return [1.0 - math.comb(n - right, k) / math.comb(n, k) for k in range(1, n + 1)]


def summarize(rows, n):
    """Scores of one benchmark. rows: n of each problem, one after another.

    "pass@1" is the mean reward as it is; "pass@k" and "per_problem" count samples with a reward of RIGHT or
    more. "rewards" are the means by problem, for --compare. Tokens are means a response."""
    ids = [row["id"] for row in rows[::n]]
    rewards = np.array([row["reward"] for row in rows], dtype=float).reshape(-1, n)  # [P, n]
    tokens = np.array([row["response_tokens"] for row in rows]).reshape(-1, n)       # [P, n]
    means, right = rewards.mean(1), rewards >= RIGHT
    counts = right.sum(1).tolist()
    passes = [mean_and_se(column) for column in np.transpose([pass_at_k(c, n) for c in counts])]  # [n]
    lengths = {"tokens": tokens, "tokens_right": tokens[right], "tokens_wrong": tokens[~right]}
    score, se = mean_and_se(means)
    return {
        "problems": len(ids), "n": n, "pass@1": score, "se": se,
        "pass@k": [mean for mean, _ in passes], "pass@k_se": [error for _, error in passes],
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        "verdicts": dict(Counter(row["reason"] for row in rows)), "per_problem": dict(zip(ids, counts)),
        "rewards": dict(zip(ids, means.tolist())),
        **{key: float(x.mean()) if x.size else None for key, x in lengths.items()}}


def average(benchmarks):
    """Unweighted mean over benchmarks, as in the blog; the errors of different benchmarks are independent."""
    scores, ses = zip(*[(b["pass@1"], b["se"]) for b in benchmarks])
    return {"pass@1": float(np.mean(scores)), "se": None if None in ses else math.hypot(*ses) / len(ses)}


def paired_bootstrap(a, b, draws=10_000, seed=0):
    """Is b better than a on the same problems? a, b: lists (one entry a benchmark) of [P] problem means.

    Problems are drawn with replacement, the same for both, within each benchmark; the statistic is the
    unweighted mean of the benchmarks' differences. -> difference, its se, 95 % interval, two-sided p-value
    (Efron and Tibshirani 1993, ch. 16: twice the smaller tail beyond 0, never below 1 / draws)."""
    rng = np.random.default_rng(seed)
    gains = [np.subtract(y, x) for x, y in zip(a, b)]
    boot = np.mean([[rng.choice(g, len(g)).mean() for _ in range(draws)] for g in gains], axis=0)
    low, high = np.quantile(boot, (0.025, 0.975)).tolist()
    tail = int(min((boot <= 0).sum(), (boot >= 0).sum()))
    return {"difference": float(np.mean([g.mean() for g in gains])), "se": float(boot.std(ddof=1)),
            "low": low, "high": high, "p": min(1.0, max(2 * tail, 1) / draws)}


# ----- Tables and sentences --------------------------------------------------------------------------------

def percent(value, se=None):
    """Text in percent: 37.5 ± 12.5, 0.0 (at most 10.0), 25.0 without an error."""
    if se and value in (0, 1):
        return f"100.0 (at least {100 - 200 * se:.1f})" if value else f"0.0 (at most {200 * se:.1f})"
    return f"{100 * value:.1f}" + ("" if se is None else f" ± {100 * se:.1f}")


def report(results, published=False):
    """Tables of the scores (percent) and of what the responses look like, then protocols and alarms."""
    names = list(dict.fromkeys(name for r in results for name in r["benchmarks"]))
    head, scores, shapes, notes = names + ["average"] * (len(names) > 1), [], [], []
    known = common.read_json(ASSETS / "published.json") if published else {}
    models = [(f"{model} (published)", {name: {"pass@1": x / 100, "se": None} for name, x in row.items()})
              for model, row in known.items()]
    for model, found in models + [(r["name"], r["benchmarks"]) for r in results]:
        if names and all(name in found for name in names):
            found = found | {"average": average([found[name] for name in names])}
        cells = [percent(found[name]["pass@1"], found[name]["se"]) if name in found else "-" for name in head]
        scores.append([model, *cells])
    for r in results:
        for name, b in r["benchmarks"].items():
            tokens = [b[key] for key in ("tokens", "tokens_right", "tokens_wrong")]
            silent = sum(b["verdicts"].get(k, 0) for k in ("no_close", "no_box")) / b["problems"] / b["n"]
            shapes.append([r["name"], name, *("-" if x is None else f"{x:,.0f}" for x in tokens),
                           percent(b["truncated"]), percent(silent), b["n"],
                           percent(b["pass@k"][-1], b["pass@k_se"][-1])])
        notes += filter(None, [f"{r['name']}: {protocol_line(r['protocol'])}", r.get("curve"), *alarms(r)])
    columns = ["model", "benchmark", "tokens", "right", "wrong", "cut off %", "no answer %", "n", "pass@n"]
    return "\n".join([common.table(["model", *head], scores), common.table(columns, shapes), *notes])


def protocol_line(p):
    """Everything that would change the number, on one line."""
    hidden = ["model", "weights", "template", "stop", "versions", "", None]
    shown = [f"{k} {v}" for k, v in (p | p["versions"]).items() if k not in hidden and v not in hidden]
    own = f"; scores: mean rewards x 100, pass@n: from {RIGHT:g} on" if p.get("reward") else ""
    return f"{', '.join(shown)}{own}; ±: one standard error, problems clustered; at 0 and 100 a 95 % bound"


def alarms(result):
    """Sentences about scores that seem to be the model's fault and are not; unreadable golds come first."""
    for name, b in result["benchmarks"].items():
        seen, total, alarm = Counter(b["verdicts"]), b["problems"] * b["n"], f"ALARM {result['name']}, {name}"
        cut, silent = round(b["truncated"] * total), seen["no_close"]
        if 20 * seen["unparsed_gold"] > total:
            yield f"{alarm}: {seen['unparsed_gold']} of {total} answers met a gold that cannot be read"
        if silent == total or 2 * (silent - cut) > total - cut:
            yield (f"{alarm}: {silent} of {total} responses have no </think> ({cut} were cut off), and "
                   "only what follows is graded: --style plain for models without it, else more --max_tokens")
        elif 2 * seen["no_box"] > total:
            yield f"{alarm}: {seen['no_box']} of {total} responses have no \\boxed{{}}. Ask for it"


def differences(old, new, free=()):
    """The settings in which two protocols differ, as text, but for those in `free`."""
    names = [name for name in old | new if name not in free and old.get(name) != new.get(name)]
    return "; ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in names)


def compare(first, other):
    """The second result against the first, on the problems both have, with intervals and p-values."""
    changed = differences(first["protocol"], other["protocol"], ("model", "weights", "commit", "versions"))
    notes = [f"CAUTION the models are not all that differs: {changed}"] if changed else []
    groups, rows = {}, []
    for name in [name for name in first["benchmarks"] if name in other["benchmarks"]]:
        x, y = first["benchmarks"][name]["rewards"], other["benchmarks"][name]["rewards"]
        pairs = 100 * np.array([(x[i], y[i]) for i in x if i in y])  # [P, 2] means of the problems in both
        if len(pairs) < max(len(x), len(y)):
            notes.append(f"{name}: only {len(pairs)} problems in both results are compared")
        if len(pairs):
            groups[name] = [pairs]
    if not groups:
        raise ValueError(f"{first['name']} and {other['name']} have no problem of a benchmark in common")
    if len(groups) > 1:
        groups["average"] = [group[0] for group in groups.values()]
    for title, group in groups.items():
        r = paired_bootstrap([pairs[:, 0] for pairs in group], [pairs[:, 1] for pairs in group])
        means = np.mean([pairs.mean(0) for pairs in group], axis=0)  # [2]
        gains = np.diff(np.concatenate(group))  # [P, 1]
        rows.append([title, len(gains), *(f"{mean:.1f}" for mean in means),
                     f"{r['difference']:+.1f} ± {r['se']:.1f}", f"{r['low']:+.1f} to {r['high']:+.1f}",
                     f"{r['p']:.4f}", (gains > 0).sum(), (gains < 0).sum()])
    head = ["benchmark", "problems", first["name"], other["name"], "difference", "95 % interval", "p"]
    return "\n".join([*notes, common.table([*head, "better", "worse"], rows)])


# ----- Files -----------------------------------------------------------------------------------------------

def label(name):
    """What a benchmark is called in results."""
    return Path(name).name.split(".")[0]


def read_result(path):
    """A result file, or a ValueError that names what it lacks."""
    try:
        result = common.read_json(path)
        itemgetter("name", "protocol", "benchmarks")(result)
        itemgetter("template", "think", "stop", "n", "versions")(result["protocol"])
        for b in result["benchmarks"].values():
            sum(b["per_problem"].values()) + sum(b["rewards"].values())
        report([result])  # what cannot be shown is no result
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is no result of evaluate.py, or of an old one ({e!r})") from e
    return result


def write_result(base, result, rows):
    """Score the rows and write both files, responses first: a result never stands without them."""
    n, by_benchmark = result["protocol"]["n"], groupby(rows, itemgetter("benchmark"))
    result["benchmarks"] = {name: summarize(list(found), n) for name, found in by_benchmark}
    result["average"] = average(result["benchmarks"].values())
    text = common.json_lines(rows).encode()
    common.write_atomic(base + ".responses.jsonl.gz", gzip.compress(text, 6, mtime=0))
    common.write_atomic(base + ".json", json.dumps(result, indent=1))
    return result


def regrade(path):
    """Grade the responses behind a result again with today's grader -> the new result."""
    result, base = read_result(path), path.removesuffix(".json")
    p, changed = result["protocol"], 0
    grade = load_reward(p.get("reward"), Style(p["template"], p["think"], p["stop"]))
    with common.lock(base + ".lock"):
        rows = list(common.read_lines(base + ".responses.jsonl.gz"))
        need = "benchmark", "id", "response", "reward", "response_tokens", "finish_reason"
        have = [tuple(row.get(key) for key in need) for row in rows]
        asked = [(name, i) for name, b in result["benchmarks"].items() for i in b["rewards"]]
        lost = asked and [key[:2] for key in have] != [key for key in asked for _ in range(p["n"])]
        if lost or not have or None in chain.from_iterable(have):
            raise ValueError(f"{base}.responses.jsonl.gz: not {p['n']} whole responses to each problem")
        for row in rows:
            problem = data.Problem(**{f.name: row.get(f.name) for f in fields(data.Problem)})
            value, row["reason"] = grade(problem, rollout.Sample([], [], [], "", row["response"]))
            changed += value != row["reward"]
            row["reward"] = value
        print(f"{path}: {changed} verdicts changed")
        p["commit"] = common.provenance()["commit"]
        return write_result(base, result, rows)


# ----- One evaluation --------------------------------------------------------------------------------------

# one sample to be made: index says which of the problem's n; `rollout` takes it for a problem of its own
Item = namedtuple("Item", "benchmark id index problem prompt")
SETTINGS = ("model", "style", "instruction", "no_chat", "examples", "reward", "temperature", "top_p",
            "max_tokens", "n", "seed", "limit", "engine")
SAME = ("style", "instruction", "no_chat", "examples", "reward", "temperature", "top_p", "n", "seed", "dtype")


class Evaluation:
    """What is asked of a model and how, checked before an engine loads, and the samples on the disk."""

    def __init__(self, args, model, device):
        self.args, self.model, self.device, self.base = args, model, device, f"{args.out}/{args.name}"
        self.style, self.items = load_style(args.style), {}
        self.grade = load_reward(args.reward, self.style)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model.folder)
        for path in args.benchmarks:
            name, path = label(path), BENCHMARKS.get(path, path)
            problems, prompts, dropped = load_prompts(path, args, model, self.tokenizer, self.style,
                                                      args.max_prompt_len, args.limit)
            if dropped:
                raise ValueError(f"{dropped} prompts of {name} are too long: raise --max_prompt_len")
            for (p, ids), j in product(zip(problems, prompts), range(args.n)):
                self.items[name, p.id, j] = Item(name, p.id, j, p, ids)
        self.room = args.max_tokens + max(len(item.prompt) for item in self.items.values())
        if model.positions and self.room > model.positions:
            raise ValueError(f"--max_tokens and a prompt: {self.room}, more than {model.positions} positions")
        weights = [np.memmap(p, np.uint8, "r") for p in sorted(Path(model.folder).glob("*.safetensors"))]
        some = b"".join(x[::1 + len(x) // 16384].tobytes() for x in weights)  # a path may get other weights
        self.protocol = {name: getattr(args, name) for name in SETTINGS} | common.provenance() | {
            "weights": hashlib.blake2b(some, digest_size=8).hexdigest(), "template": self.style.template,
            "think": self.style.think, "stop": list(self.style.stop),
            "dtype": rollout.compute_dtype(args.dtype, device)}

    def saved(self):
        """{(benchmark, id, sample): row} of what is on the disk, in the finished result and in part files.
        Refused are samples of other settings and those that this command would lose."""
        free = ["n", "limit", "commit", "versions"] + ["engine"] * (self.protocol["engine"] == "auto")
        rows, paths = {}, glob.glob(glob.escape(self.base) + ".part.*")
        for path in paths + [self.base + ".responses.jsonl.gz"] * os.path.exists(self.base + ".json"):
            lines = common.read_lines(path)
            first = read_result(self.base + ".json") if path.endswith(".gz") else next(lines, {})
            old = first.get("protocol", self.protocol)  # none: killed before its first line was whole
            if changed := differences(old, self.protocol, free):
                raise ValueError(f"{path}: other settings ({changed}). Take those, or another --name")
            self.protocol["engine"] = old["engine"]
            rows |= {(row["benchmark"], row["id"], row["sample"]): row for row in lines}
        for key, row in rows.items():
            p = self.items[key].problem if key in self.items else None
            if p is None or (p.problem, p.answer) != (row["problem"], row["answer"]):
                why = "has changed" if p else "is not asked for by this command and would be lost"
                raise ValueError(f"{self.base}: {key[0]} {key[1]}, sample {key[2]} {why}: use another --name")
        return rows

    def row(self, item, sample):
        """A graded response as it is kept, up to the style's end mark; lengths in tokens."""
        if np.isnan(sample.logprobs).any():
            raise ValueError(f"the log-probs on {item.id} are NaN: {self.args.model} is damaged")
        text, finish, tokens = self.style.cut(sample.text), sample.finish_reason, len(sample.response_ids)
        if len(text) < len(sample.text):
            finish, tokens = "stop", len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        value, reason = self.grade(item.problem, sample)
        return {"benchmark": item.benchmark, **asdict(item.problem), "sample": item.index, "response": text,
                "reason": reason, "reward": value, "prompt_tokens": len(item.prompt),
                "response_tokens": tokens, "finish_reason": finish}

    def generate(self, missing, stop):
        """Each rank appends what it has made and graded to a part file. -> False if a signal came first."""
        args, part = self.args, f"{self.base}.part.{time.time_ns()}.{dist.get_rank()}.jsonl"

        def keep(item, sample):
            row = self.row(item, sample)
            try:
                with open(part, "a", encoding="utf-8") as file:
                    head = [] if file.tell() else [{"protocol": self.protocol}]
                    file.write(common.json_lines([*head, row]))
            except OSError as e:
                raise ValueError(f"{part} cannot be written ({e}): make room, then the run goes on") from e
            sample.text, sample.response_ids, sample.logprobs = "", (), ()  # kept: they need not travel
            return row["reward"], row["reason"]

        sampling = rollout.Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                                    max_tokens=args.max_tokens)
        engine = rollout.make_engine(
            self.protocol["engine"], self.model.folder, max_model_len=self.room, dtype=self.protocol["dtype"],
            device=self.device, max_seqs=args.max_seqs, gpu_memory=args.gpu_memory, load_weights=True)
        with closing(engine):
            self.protocol["engine"] = engine.name
            samples, _ = rollout.rollout(
                engine, self.tokenizer, missing, [item.prompt for item in missing], sampling, "eval", keep,
                only=[(k, item.index) for k, item in enumerate(missing)], stop=stop, desc="evaluate")
        return samples is not None

    def finish(self, seconds):
        """Score all samples and write the result; the part files go last."""
        rows, path = self.saved(), self.base + ".json"
        if os.path.exists(path):
            seconds += read_result(path).get("seconds", 0.0)
        rows = [rows[key] for key in self.items]
        result = write_result(self.base, {
            "name": self.args.name, "model": self.args.model, "parameters": self.model.parameters,
            "protocol": self.protocol, "curve": curve_note(self.args, self.protocol), "seconds": seconds,
            "tokens_generated": sum(row["response_tokens"] for row in rows)}, rows)
        for path in glob.glob(glob.escape(self.base) + ".part.*"):
            os.remove(path)
        return result


def curve_note(args, protocol):
    """Whether this score is a point of the validation curve of the run that made the model, in a sentence."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # of no run of grpo.py
        o = common.read_json(os.path.join(args.model, "../../../config.json"))["options"]
        there = {name: o.get(f"eval_{name}", o.get(name)) for name in SAME}
        there |= {"max_tokens": o["eval_max_len"] or o["max_len"], "limit": 0}
        name, changed = label(o["eval_data"]), differences(there, {key: protocol[key] for key in there})
        if o["eval_every"] and name in map(label, args.benchmarks):
            return f"{name}: " + (f"not the number of the validation in training: {changed}" if changed else
                                  "same settings and seeds as the validation in training, so the same number")


def evaluate(args):
    """Make the samples that are missing, score all -> (result on rank 0, the signal that came first or 0)."""
    signals, start = common.catch_signals(), time.time()
    rank, _, device = common.join_processes()
    model = policy.open_model(args.model)
    job = common.together("start", lambda: Evaluation(args, model, device))
    common.say("  ".join(f"{k}={v}" for k, v in vars(args).items()))
    with common.lock(job.base + ".lock"):
        mine = common.together("samples", lambda: set(job.saved()) if rank == 0 else None)
        done, job.protocol["engine"] = common.gather((mine, job.protocol["engine"]))[0]
        missing = [item for key, item in job.items.items() if key not in done]
        if done:
            common.say(f"{job.base}: {len(done):,} of {len(job.items):,} samples are there already")
        if missing and not job.generate(missing, stop=lambda: bool(signals)):
            common.say("stopped by a signal: the samples are kept, the same command goes on")
            return None, max(common.gather(max(signals, default=0)))
        seconds = time.time() - start if missing else 0.0
        return common.together("result", lambda: job.finish(seconds) if rank == 0 else None), 0


# ----- Options ---------------------------------------------------------------------------------------------

PROMPT_OPTIONS = [
    ("style", str, "r1", None, f"how to ask and what to grade: {', '.join(STYLES)}, or a file"),
    ("instruction", str, data.INSTRUCTION, None, "sentence behind each problem"),
    ("no_chat", bool, False, None, "prompt without a chat template, for base models that have none"),
    ("examples", str, None, None, "file of solved problems shown before each problem"),
    ("reward", str, None, None, "your own: MODULE:FUNCTION (response, problem) -> float"),
    ("problem_field", str, None, None, "field with the problem, if it is not found by itself"),
    ("answer_field", str, None, None, "field with the answer, if it is not found by itself"),
    ("allow_unreadable", bool, False, None, "go on although the grader cannot read many of the answers")]
MACHINE_OPTIONS = [
    ("engine", ["auto", "vllm", "torch"], "auto", None, "who generates; auto: vLLM if it is installed"),
    ("dtype", ["auto", "bfloat16", "float32"], "auto", None, "auto: bfloat16 where the card has it"),
    ("max_seqs", int, 0, 0, "rows generated at once on each rank; 0: vLLM 256 (CPU 128), torch 64")]
OPTIONS = {
    "model and benchmarks": [
        ("model", str, None, None, "folder or hub name"),
        ("limit", int, 0, 0, "only the first problems of each benchmark; 0: all")],
    "prompts and grading": [*PROMPT_OPTIONS, (
        "max_prompt_len", int, 4096, 1, "tokens; longer prompts are refused")],
    "samples": [
        ("n", int, 16, 1, "of each problem"),
        ("max_tokens", int, 32768, 1, "of a response"),
        ("temperature", float, 0.6, 0, "0 is greedy"),
        ("top_p", float, 0.95, 1e-6, "nucleus; the validation in training uses 1.0"),
        ("seed", int, 0, None, "of the samples; the validation in training uses 0")],
    "files and machine": [
        ("out", str, "eval", None, "folder for the results"),
        ("name", str, None, None, "of the result files and of the table's row (default: from --model)"),
        ("published", bool, False, None, "add the published rows of DeepScaleR's blog to the table"),
        ("gpu_memory", float, 0.9, 0.01, "vLLM's share of each GPU"), *MACHINE_OPTIONS],
}


def parse_args(argv=None):
    p = common.Parser(OPTIONS, {"--show": "per_problem of the results"}, description=__doc__.split("\n")[0])
    p.add_argument("-n", type=int, help="as --n, which some torchruns take")
    p.add_argument("--benchmarks", nargs="+", default=FIVE, help=f"files, or of {', '.join(BENCHMARKS)}")
    p.add_argument("--regrade", nargs="+", default=[], help="saved results, to be graded again")
    p.add_argument("--compare", nargs="+", default=[], help="saved results: each against the first")
    p.add_argument("--table", nargs="+", default=[], help="saved results, to be shown in one table")
    args = p.parse(argv)
    if args.model and not args.name:  # RUN/checkpoints/000120/hf -> RUN-000120
        parts = [x for x in Path(args.model).parts if x not in ("hf", "checkpoints", "/", "..")] or ["model"]
        args.name = "-".join(parts[-2 if parts[-1].isdigit() else -1:])
    if not (args.model or args.regrade or args.compare or args.table):
        p.error("--model is missing (or --regrade, --compare, --table)")
    if len(args.compare) == 1:
        p.error("--compare needs two results or more")
    if max(args.top_p, args.gpu_memory) > 1 or args.temperature == 0 and args.n > 1:
        p.error("--top_p and --gpu_memory are at most 1; --temperature 0 always says the same, so take --n 1")
    if args.model and ("/" in args.name or args.name.startswith(".") or ".part." in args.name):
        p.error(f"--name {args.name} is no plain file name")
    if len(set(map(label, args.benchmarks))) < len(args.benchmarks):
        p.error("--benchmarks names one of them twice")
    return args


def main(argv=None):
    args, signal_number, results = parse_args(argv), 0, []
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    try:
        for path in args.compare[1:]:
            print(compare(read_result(args.compare[0]), read_result(path)))
        results = [*map(regrade, args.regrade), *map(read_result, args.table)]
        if args.model:
            result, signal_number = evaluate(args)
            results += [result] if result else []
        if results:
            print(report(results, args.published))
    except (ValueError, OSError, RuntimeError) as e:
        if os.environ.get("RANK", "0") == "0" or not isinstance(e, common.RankError):
            advice = ". Lower --gpu_memory or --max_seqs" if common.is_out_of_memory(e) else ""
            print(f"evaluate.py: {e}{advice}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(128 + signal_number if signal_number else 0)


if __name__ == "__main__":
    main()
