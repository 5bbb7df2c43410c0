"""evaluate.py - a score, its standard error, and the protocol it was measured with.

    python evaluate.py --model M --benchmarks aime24 amc23 math500 --n 16     # one GPU, or a CPU
    torchrun --nproc_per_node 8 evaluate.py --model M -n 16                   # eight GPUs
    python evaluate.py --regrade eval/M.json              # grade the saved responses again, generate nothing
    python evaluate.py --compare eval/A.json eval/B.json  # problem by problem: is B better than A, or lucky?
    python evaluate.py --table eval/*.json --published    # models x benchmarks, as in DeepScaleR's blog

The same weights were published with 37.0 and with 43.1 on AIME 2024: prompts, samples, limits and graders
differ. So every result carries its protocol, every score its standard error, and every response is kept, in
OUT/NAME.responses.jsonl.gz beside OUT/NAME.json. Until both are written each rank keeps its samples in a part
file: stopped at any time, the same command goes on with the missing ones, on any number of ranks.
Left out on purpose: judges that are models, answers that are programs, votes, prompts tuned by benchmark.

Shapes: P problems, n samples of each.
"""
import glob
import gzip
import hashlib
import importlib
import json
import math
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
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
FIVE = ["aime24", "math500", "amc23", "minerva", "olympiad"]
RIGHT = 0.5  # a sample is right from this reward on; only rewards of one's own know values in between


# ----- What the trainer uses too: prompts, rewards, a point of the validation curve ------------------------

@dataclass(frozen=True)
class Style:
    """How a kind of model is asked, and which part of its response is graded."""
    template: str | None  # the whole prompt around {problem}; None: the chat template and an instruction
    think: bool           # the answer counts only after </think>; else the whole text is searched
    stop: tuple           # texts that end a response
    note: str

    def cut(self, text):
        """The response up to its first end mark."""
        return text[:min((text.find(mark) for mark in self.stop if mark in text), default=None)]

    def graded(self, text):
        """The text as reward.py wants it: without a thought to close, everything is the answer."""
        return self.cut(text) if self.think else "</think>" + self.cut(text)


QWEN = ("<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n")
RSTAR = "<|user|>:\n{problem}\n<|assistant|>: Let's think step by step and solve the problem with code."
STYLES = {
    "r1": Style(None, True, (), "R1 distillations, DeepScaleR, Still: last \\boxed{} after </think>"),
    "plain": Style(None, False, (), "chat models that do not think in tags: last \\boxed{} of the text"),
    "qwen-math": Style(QWEN, False, (), "Qwen2.5-Math-Instruct, SimpleRL: instruction as system message"),
    "rstar": Style(RSTAR, False, ("<end_of_answer>", "<end_of_code>"),
                   "rStar-Math: last \\boxed{} before its end mark; as by its authors, its code is not run"),
}


def load_style(name):
    """A Style of the table, or one read from a text file that holds the whole prompt, with {problem} in it.
    If the file mentions <think>, the answer counts only after </think>."""
    if name in STYLES:
        return STYLES[name]
    try:
        template = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"--style {name}: not one of {', '.join(STYLES)}, and no file of text ({e})") from e
    if template.count("{problem}") != 1:
        raise ValueError(f"--style {name}: the file must hold {{problem}} exactly once, for the problem")
    return Style(template, "<think>" in template, (), f"prompt from {name}")


def encode(style, problems, tokenizer, room, instruction=data.INSTRUCTION, chat=True, examples=()):
    """(kept problems, their prompts as token ids, number dropped for being longer than `room` tokens)."""
    if style.template is None:
        return data.encode_problems(problems, tokenizer, room, instruction, chat=chat, examples=examples)
    if instruction != data.INSTRUCTION or not chat or examples:
        raise ValueError("this --style is the whole prompt: --instruction, --no_chat and --examples have no "
                         "effect on it, put their text into a style file")
    added = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])  # such as a begin-of-text token
    add = not any(token in style.template for token in added)
    texts = [style.template.replace("{problem}", problem.problem) for problem in problems]
    prompts = [list(tokenizer(text, add_special_tokens=add)["input_ids"]) for text in texts]
    kept = [(problem, ids) for problem, ids in zip(problems, prompts) if len(ids) <= room]
    if not kept:
        raise ValueError(f"all {len(problems)} prompts are longer than {room} tokens: raise --max_prompt_len")
    return [problem for problem, _ in kept], [ids for _, ids in kept], len(problems) - len(kept)


PROMPT_OPTIONS = [  # rows of an option table, the same in grpo.py
    ("problem_field", str, None, None, "field with the problem, if it is not found by itself"),
    ("answer_field", str, None, None, "field with the answer, if it is not found by itself"),
    ("allow_unreadable", bool, False, None, "go on although the grader cannot read many of the answers"),
    ("style", str, "r1", None, "how to ask and what to grade: a style, or a file with {problem} in it"),
    ("instruction", str, data.INSTRUCTION, None, "sentence behind each problem"),
    ("no_chat", bool, False, None, "prompt without a chat template, for base models that have none"),
    ("examples", str, None, None, "file of solved problems shown before each problem"),
    ("reward", str, None, None, "your own: MODULE:FUNCTION (response, problem) -> float")]


def load_prompts(path, args, model, tokenizer, style, room):
    """Problems of a file or hub name -> (problems, prompts, number dropped as longer than `room` tokens)."""
    problems = data.load_problems(path, problem_field=args.problem_field, answer_field=args.answer_field,
                                  need_answer=not args.reward)
    examples = data.load_problems(args.examples) if args.examples else ()
    problems, prompts, dropped = encode(style, problems, tokenizer, room, args.instruction, not args.no_chat,
                                        examples)
    golds = None if args.reward else data.check_golds(problems, args.allow_unreadable)
    for note in filter(None, (golds, data.format_warning(problems))):
        common.say(f"{path}: {note}")
    rollout.check_tokenizer(tokenizer, [p.problem for p in problems], prompts, model.vocabulary)
    return problems, prompts, dropped


def load_reward(name, style):
    """grade(problem, sample) -> (reward, verdict), for `rollout`. Without a name reward.py decides, 0 or 1.

    "module:function" is imported, from the current folder too, and called as function(response, problem). It
    returns a finite number; whatever goes wrong in it is a ValueError that names it."""
    def grade(problem, sample):
        verdict = reward.explain(style.graded(sample.text), problem.answer, problem.problem)
        return verdict.reward, verdict.reason

    def grade_own(problem, sample):
        try:
            value = float(function(style.cut(sample.text), problem))
        except (Exception, SystemExit) as e:
            raise ValueError(f"--reward {name} failed on {problem.id}: {type(e).__name__}: {e}") from e
        if not math.isfinite(value):
            raise ValueError(f"--reward {name} gave {value} on {problem.id}: a reward is a finite number")
        return value, "scored"

    if not name:
        return grade
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file there that is named like one of ours must not replace it
    try:
        module, _, attribute = name.partition(":")
        function = getattr(importlib.import_module(module), attribute)
        if not callable(function):
            raise TypeError(f"{attribute} is no function")
    except (Exception, SystemExit) as e:  # code of somebody else may raise anything
        raise ValueError(f"--reward {name}: no module:function to import ({type(e).__name__}: {e})") from e
    return grade_own


def curve_point(samples, problems, n):
    """Metrics of a validation by the function behind the tables. samples: P x n, in order."""
    rows = [{"id": problems[i // n].id, "reward": s.reward, "reason": s.verdict,
             "finish_reason": s.finish_reason, "response_tokens": len(s.response_ids)}
            for i, s in enumerate(samples)]
    b = summarize(rows, n)
    return {"eval_reward": b["pass@1"], "eval_se": b["se"], "eval_problems": b["problems"], "eval_n": n,
            "eval_truncated": b["truncated"], "eval_length": b["tokens"]}


# ----- Estimators ------------------------------------------------------------------------------------------

def mean_and_se(values):
    """Mean over problems and its standard error, problems being the sample: [P] values -> (mean, se or None).

    values[p] is a mean over the n samples of problem p. These are alike, so P x n verdicts are not P x n
    independent ones; the spread of problem means covers the choice of problems and the luck of sampling
    (Miller 2411.00640, clustered standard errors). A mean of 0 or 1 has no spread; there the rule of three
    says: with 95 % confidence no further than 3 / P off, twice the error given.

    >>> mean_and_se([1.0, 0.0, 1.0, 0.0]), mean_and_se([0.0] * 30)
    ((0.5, 0.28867513459481287), (0.0, 0.05))
    """
    values = np.asarray(values, dtype=float)
    mean, spread = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
    if not spread and mean in (0, 1):
        return mean, min(0.5, 1.5 / len(values))
    return mean, None if spread is None else spread / len(values) ** 0.5


def pass_at_k(right, n):
    """[pass@1 .. pass@n] of one problem with `right` right answers among n: the share of all k-subsets with
    at least one of them, 1 - C(n - right, k) / C(n, k), which is unbiased (Chen et al. 2107.03374).

    >>> pass_at_k(1, 4)
    [0.25, 0.5, 0.75, 1.0]
    """
    return [1.0 - math.comb(n - right, k) / math.comb(n, k) for k in range(1, n + 1)]


def summarize(rows, n):
    """Scores of one benchmark. rows: n a problem, with id, reward, reason, response_tokens and finish_reason.

    "pass@1" is the mean reward as it is; "pass@k" and "per_problem" count samples with a reward of RIGHT or
    more. "rewards" has the means by problem when some reward is neither 0 nor 1. "se_samples" is the error
    over reruns with other seeds on the very same problems. Tokens are means a response."""
    by_problem = {}
    for row in rows:
        by_problem.setdefault(row["id"], []).append(row["reward"])
    rewards = np.array(list(by_problem.values()), dtype=float)  # [P, n]
    right = (rewards >= RIGHT).sum(1).tolist()
    score, se = mean_and_se(rewards.mean(1))
    passes = [mean_and_se(column) for column in np.array([pass_at_k(c, n) for c in right]).T]  # [n]
    tokens = np.array([row["response_tokens"] for row in rows])
    good = np.array([row["reward"] >= RIGHT for row in rows])
    out = {
        "problems": len(rewards), "n": n, "pass@1": score, "se": se,
        "se_samples": math.sqrt((rewards.var(1, ddof=1) / n).sum()) / len(rewards) if n > 1 else None,
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        "verdicts": dict(Counter(row["reason"] for row in rows)),
        "tokens": float(tokens.mean()), "tokens_max": int(tokens.max()),
        "tokens_right": float(tokens[good].mean()) if good.any() else None,
        "tokens_wrong": float(tokens[~good].mean()) if not good.all() else None,
        "pass@k": [mean for mean, _ in passes], "pass@k_se": [error for _, error in passes],
        "per_problem": dict(zip(by_problem, right))}
    if not np.isin(rewards, (0, 1)).all():
        out["rewards"] = dict(zip(by_problem, rewards.mean(1).tolist()))
    return out


def average(benchmarks):
    """Unweighted mean over benchmarks, as in the blog; the errors of different benchmarks are independent."""
    ses = [b["se"] for b in benchmarks]
    return {"pass@1": float(np.mean([b["pass@1"] for b in benchmarks])),
            "se": None if None in ses else math.sqrt(sum(se * se for se in ses)) / len(ses)}


def paired_bootstrap(a, b, draws=10_000, seed=0):
    """Is b better than a on the same problems? a, b: lists (one entry a benchmark) of [P] problem means.

    Problems are drawn with replacement, the same for both, within each benchmark; the statistic is the
    unweighted mean of the benchmarks' differences. -> difference, its se, 95 % interval, two-sided p-value
    (Efron and Tibshirani 1993, ch. 16: twice the smaller tail beyond 0, never below 1 / draws)."""
    rng = np.random.default_rng(seed)
    gains = [np.asarray(y, dtype=float) - np.asarray(x, dtype=float) for x, y in zip(a, b)]
    boot = np.mean([g[rng.integers(len(g), size=(draws, len(g)))].mean(1) for g in gains], axis=0)
    tail = min((boot <= 0).sum(), (boot >= 0).sum())
    return {"difference": float(np.mean([g.mean() for g in gains])), "se": float(boot.std(ddof=1)),
            "low": float(np.quantile(boot, 0.025)), "high": float(np.quantile(boot, 0.975)),
            "p": float(min(1.0, max(2 * tail, 1) / draws))}


# ----- Tables and sentences --------------------------------------------------------------------------------

def percent(value, se=None):
    """
    >>> percent(0.375, 0.125), percent(0.0, 0.05), percent(1.0, 0.05), percent(0.25)
    ('37.5 ± 12.5', '0.0 (at most 10.0)', '100.0 (at least 90.0)', '25.0')
    """
    text = f"{100 * value:.1f}"
    if se and value in (0, 1):
        return text + (f" (at least {100 - 200 * se:.1f})" if value else f" (at most {200 * se:.1f})")
    return text if se is None else f"{text} ± {100 * se:.1f}"


def report(results, published=False):
    """Two tables, the protocols, alarms. The first: pass@1 of models x benchmarks in percent, and the average
    of models that lack none; the second: what the responses look like, and what n samples can do together."""
    names = list(dict.fromkeys(name for r in results for name in r["benchmarks"]))
    known = common.read_json(ASSETS / "published.json") if published else {}
    models = [(f"{model} (published)", {k: {"pass@1": score / 100, "se": None} for k, score in row.items()})
              for model, row in known.items()] + [(r["name"], r["benchmarks"]) for r in results]
    scores, shapes = [], []
    for model, found in models:
        cells = [found.get(name) for name in names]
        cells += [None if None in cells else average(cells)] * (len(names) > 1)
        scores.append([model, *("-" if b is None else percent(b["pass@1"], b["se"]) for b in cells)])
    for r in results:
        for name, b in r["benchmarks"].items():
            tokens = ["-" if b[k] is None else f"{b[k]:,.0f}"
                      for k in ("tokens", "tokens_right", "tokens_wrong")]
            silent = sum(b.get("verdicts", {}).get(k, 0) for k in ("no_close", "no_box"))
            shapes.append([r["name"], name, *tokens, percent(b["truncated"]),
                           percent(silent / b["problems"] / b["n"]), b["n"],
                           percent(b["pass@k"][-1], b["pass@k_se"][-1])])
    notes = [line for r in results
             for line in (f"{r['name']}: {r['protocol_line']}", r.get("curve"), *alarms(r))]
    head = ["model", "benchmark", "tokens", "right", "wrong", "cut off %", "no answer %", "n", "pass@n"]
    return "\n".join([common.table(["model", *names] + ["average"] * (len(names) > 1), scores),
                      common.table(head, shapes), *filter(None, notes)])


def protocol_line(p):
    """Everything that would change the number, on one line."""
    hidden = ("model", "weights", "template", "stop", "versions", "commit")
    shown = {k: v for k, v in p.items() if k not in hidden and v not in ("", None)} | p["versions"]
    own = f"; scores: mean rewards x 100, pass@n: from {RIGHT:g} on" * bool(p.get("reward"))
    text = ", ".join(f"{k} {v}" for k, v in shown.items()) + f", nanoscaler {p['commit'] or 'unknown'}{own}"
    return text + "; ±: one standard error, problems clustered; at 0 and 100 a 95 % bound"


def alarms(result):
    """Sentences about scores that seem to be the model's fault and are not; unreadable golds come first."""
    lines = []
    for name, b in result["benchmarks"].items():
        seen, total = Counter(b.get("verdicts")), b["problems"] * b["n"]
        cut, close = round(b["truncated"] * total), seen["no_close"]
        if 20 * seen["unparsed_gold"] > total:
            lines.append(f"{name}: {seen['unparsed_gold']} of {total} answers met a gold that cannot be read")
        if result["protocol"].get("think") and (close == total or 2 * (close - cut) > total - cut):
            lines.append(f"{name}: {close} of {total} responses have no </think> ({cut} were cut off), and "
                         "only what follows it is graded. A model that does not think in tags needs --style "
                         "plain, one that is cut off a larger --max_tokens")
        elif 2 * seen["no_box"] > total:
            lines.append(f"{name}: {seen['no_box']} of {total} responses have no \\boxed{{}}. Ask for it")
    return [f"ALARM {result['name']}, {line}" for line in lines]


def compare(first, other, show=10):
    """The second result against the first, on the problems both have, with intervals and p-values."""
    p, q = first["protocol"], other["protocol"]
    differ = [f"{k} {p.get(k)!r} / {q.get(k)!r}" for k in {**p, **q}
              if k not in ("model", "weights", "commit", "versions") and p.get(k) != q.get(k)]
    lines = [f"CAUTION the models are not all that differs: {'; '.join(differ)}"] * bool(differ)
    rows, pairs, moved = [], [], []
    for name in [name for name in first["benchmarks"] if name in other["benchmarks"]]:
        a, b = (r["benchmarks"][name] for r in (first, other))
        x, y = (c.get("rewards") or {i: k / c["n"] for i, k in c["per_problem"].items()} for c in (a, b))
        shared = [i for i in x if i in y]
        if not shared:
            raise ValueError(f"{name}: {first['name']} and {other['name']} have no problem in common")
        if len(shared) < max(len(x), len(y)):
            lines.append(f"{name}: only {len(shared)} problems in both results are compared")
        pairs.append(([x[i] for i in shared], [y[i] for i in shared]))
        moved += [(x[i], y[i], f"{name} {i}") for i in shared if x[i] != y[i]]
        rows.append(comparison_row(name, pairs[-1:]))
    if not rows:
        raise ValueError(f"{first['name']} and {other['name']} have no benchmark in common")
    if len(rows) > 1:
        rows.append(comparison_row("average", pairs))
    head = ["benchmark", "problems", first["name"], other["name"], "difference", "95 % interval", "p",
            "better", "worse"]
    lines += [common.table(head, rows), f"Problems that changed most, {first['name']} -> {other['name']}:"]
    moved.sort(key=lambda change: -abs(change[1] - change[0]))
    lines += [f"  {i}: {x:.2f} -> {y:.2f} ({y - x:+.2f})" for x, y, i in moved[:show or None]] or ["  none"]
    lines += [f"  and {len(moved) - show} more (--show 0 prints them all)"] * (0 < show < len(moved))
    return "\n".join(lines)


def comparison_row(title, pairs):
    """pairs: (problem means, problem means) of each benchmark that the row covers."""
    r = paired_bootstrap(*zip(*pairs))
    means = [f"{100 * np.mean([np.mean(pair[side]) for pair in pairs]):.1f}" for side in (0, 1)]
    gains = np.concatenate([np.subtract(b, a) for a, b in pairs])
    change, low, high, se = (100 * r[key] for key in ("difference", "low", "high", "se"))
    return [title, len(gains), *means, f"{change:+.1f} ± {se:.1f}", f"{low:+.1f} to {high:+.1f}",
            f"{r['p']:.4f}", sum(gains > 0), sum(gains < 0)]


# ----- Files -----------------------------------------------------------------------------------------------

def label(name):
    """What a benchmark is called in results."""
    return Path(name).name.split(".")[0]


def load_benchmarks(names, limit=0, need_answer=True):
    """{label: problems}. A name is one of assets/benchmarks, or anything that data.load_problems reads."""
    out, known = {}, {path.stem: str(path) for path in sorted(ASSETS.glob("*.jsonl"))}
    for name in names:
        if name not in known and "/" not in name and not os.path.exists(name):
            raise ValueError(f"--benchmarks {name}: no such file; by name there are {', '.join(known)}")
        if label(name) in out:
            raise ValueError(f"--benchmarks names {label(name)} twice")
        out[label(name)] = data.load_problems(known.get(name, name), need_answer=need_answer)[:limit or None]
    return out


def weights_digest(folder):
    """Of the sizes and some bytes of the weight files: a resumed evaluation cannot mix two models of one
    path."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(folder).glob("*.safetensors")) + sorted(Path(folder).glob("*.bin")):
        content = np.memmap(path, np.uint8, "r")
        digest.update(f"{path.name} {len(content)}".encode())
        digest.update(content[::1 + len(content) // 16384].tobytes())
    return digest.hexdigest()


def read_result(path, need=("name", "benchmarks", "protocol", "protocol_line")):
    """A result file, with an error that names what is wrong with it."""
    try:
        result = common.read_json(path)
        lacks = [key for key in need if key not in result]
        lacks = lacks or [key for key in ("template", "think", "stop", "n") if key not in result["protocol"]]
        if not lacks and "benchmarks" in need:
            lacks = [f"per_problem of {name} (--regrade {path} mends that)"
                     for name, b in result["benchmarks"].items() if not (b.get("per_problem") and b.get("n"))]
        if lacks:
            raise ValueError(f"it lacks {', '.join(lacks)}")
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise ValueError(f"{path} is no result of evaluate.py: {e}") from e
    return result


def write_result(base, result, rows):
    """Score the rows and write both files. Responses first: a result never stands without them."""
    text = common.json_lines(rows).encode()
    names, n = dict.fromkeys(row["benchmark"] for row in rows), result["protocol"]["n"]
    scores = {name: summarize([row for row in rows if row["benchmark"] == name], n) for name in names}
    result |= {"protocol_line": protocol_line(result["protocol"]), "benchmarks": scores,
               "average": average(scores.values())}
    common.write_atomic(base + ".responses.jsonl.gz", gzip.compress(text, 6, mtime=0))
    common.write_atomic(base + ".json", json.dumps(result, indent=1))


def append(file, row):
    """One line, unbuffered, so that it survives a kill; a full disk is an error here and now."""
    line, why = common.json_lines([row]).encode(), "no space left"
    try:
        if file.write(line) == len(line):
            return
    except OSError as e:
        why = e.strerror
    raise ValueError(f"{file.name} cannot be written ({why}). Make room; the same command goes on then")


def saved_samples(base, items, protocol):
    """{(benchmark, id, sample): row} of what is on the disk: in the finished result and in part files.

    Refused are samples of other settings, problems that have changed, and commands that would lose samples;
    more samples or problems of the same benchmarks are no other settings."""
    sources = []
    if os.path.exists(base + ".json"):
        rows = common.read_lines(base + ".responses.jsonl.gz")
        sources.append((base + ".json", read_result(base + ".json"), rows))
    for path in glob.glob(glob.escape(base) + ".part.*"):
        rows = common.read_lines(path)
        sources.append((path, next(rows, None), rows))
    asked, rows = {item[:3]: item.problem for item in items}, {}
    for path, first, lines in sources:
        old = first["protocol"] if first else protocol  # none: killed before its first line was whole
        free = ("n", "versions", "commit", "limit", "engine" if protocol["engine"] == "auto" else "")
        changed = [f"{k} {old.get(k)!r} -> {new!r}" for k, new in protocol.items()
                   if k not in free and old.get(k) != new]
        if changed:
            raise ValueError(f"{path} was begun with other settings ({'; '.join(changed)}): the old ones go "
                             f"on, another --name starts afresh")
        for row in lines:
            key = row["benchmark"], row["id"], row["sample"]
            if key not in asked:
                raise ValueError(f"{path} holds samples that this command does not ask for, such as {key}. "
                                 f"They would be lost: use another --name")
            if (row["problem"], row["answer"]) != (asked[key].problem, asked[key].answer):
                raise ValueError(f"{key[0]} {key[1]} has changed since {path} was begun: use another --name")
            rows[key] = row
        protocol["engine"] = old["engine"]
    return rows


# ----- One evaluation --------------------------------------------------------------------------------------

class Item(NamedTuple):
    """One sample to be made, named by the first three fields; `rollout` takes it for a problem of its own."""
    benchmark: str
    id: str
    index: int  # which of the problem's n samples
    problem: data.Problem
    prompt: list


def prepare(args, model, device):
    """All that can be checked before an engine loads -> (tokenizer, style, grade, items, protocol)."""
    style = load_style(args.style)
    grade = load_reward(args.reward, style)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.folder)
    examples, items = data.load_problems(args.examples) if args.examples else (), []
    for name, problems in load_benchmarks(args.benchmarks, args.limit, not args.reward).items():
        problems, prompts, dropped = encode(style, problems, tokenizer, args.max_prompt_len, args.instruction,
                                            not args.no_chat, examples)
        if dropped:
            raise ValueError(f"{name}: {dropped} prompts are longer than {args.max_prompt_len} tokens. A "
                             f"score without them would not be the benchmark's: raise --max_prompt_len")
        rollout.check_tokenizer(tokenizer, [p.problem for p in problems], prompts, model.vocabulary)
        notes = () if args.reward else (data.check_golds(problems, allow=True), data.format_warning(problems))
        for note in filter(None, notes):
            common.say(f"{name}: {note}")
        items += [Item(name, p.id, j, p, ids) for p, ids in zip(problems, prompts) for j in range(args.n)]
    longest = max(len(item.prompt) for item in items)
    if model.positions and longest + args.max_tokens > model.positions:
        raise ValueError(f"--max_tokens {args.max_tokens} and a prompt of {longest} do not fit the "
                         f"{model.positions} positions of {args.model}: --max_tokens "
                         f"{model.positions - longest} does")
    given = ("model", "style", "examples", "reward", "temperature", "top_p", "max_tokens", "n", "seed")
    protocol = {key: getattr(args, key) for key in (*given, "limit", "engine")} | {
        "weights": weights_digest(model.folder), "template": style.template, "think": style.think,
        "stop": list(style.stop), "chat": not args.no_chat, **common.provenance(),
        "instruction": None if style.template else args.instruction,
        "dtype": rollout.compute_dtype(args.dtype, device)}
    return tokenizer, style, grade, items, protocol


def sample_row(item, sample, style, grade, tokenizer):
    """One graded response as it is kept, up to the style's end mark; lengths in tokens."""
    text, finish, tokens = style.cut(sample.text), sample.finish_reason, len(sample.response_ids)
    if len(text) < len(sample.text):
        finish, tokens = "stop", len(tokenizer(text, add_special_tokens=False)["input_ids"])
    value, reason = grade(item.problem, sample)
    return {"benchmark": item.benchmark, **asdict(item.problem), "sample": item.index, "response": text,
            "extracted": reward.extract_answer(style.graded(text)), "reason": reason, "reward": value,
            "prompt_tokens": len(item.prompt), "response_tokens": tokens, "finish_reason": finish}


def make_samples(args, engine, missing, base, protocol, tokenizer, style, grade, stop):
    """Generate and grade; each rank appends what it finishes to a part file of its own. False if a signal
    came first. An error in here, a full disk too, ends the generation of all ranks at once."""
    def keep(item, sample):
        if np.isnan(sample.logprobs).any():
            raise ValueError(f"the log-probs on {item.id} are NaN: the weights of {args.model} are damaged")
        row = sample_row(item, sample, style, grade, tokenizer)
        append(part, row)
        sample.response_ids, sample.logprobs, sample.text = sample.response_ids[:0], sample.logprobs[:0], ""
        return row["reward"], row["reason"]

    sampling = rollout.Sampling(n=args.n, temperature=args.temperature, top_p=args.top_p,
                                max_tokens=args.max_tokens, seed=args.seed)
    prompts, pairs = [item.prompt for item in missing], [(k, item.index) for k, item in enumerate(missing)]
    path = f"{base}.part.{time.time_ns()}.{dist.get_rank()}.jsonl"
    common.together("samples", lambda: common.write_atomic(path, common.json_lines([{"protocol": protocol}])))
    with open(path, "ab", buffering=0) as part:
        samples, _ = rollout.rollout(engine, tokenizer, missing, prompts, sampling, "eval", keep, only=pairs,
                                     stop=stop, desc="evaluate")
    return samples is not None


def evaluate(args):
    """Make the samples that are missing, score all -> (result on rank 0, number of the signal that came
    first)."""
    stopped = common.catch_signals()
    rank, _, device = common.join_processes()
    model = policy.open_model(args.model)
    tokenizer, style, grade, items, protocol = common.together("start", lambda: prepare(args, model, device))
    common.say("  ".join(f"{k}={v}" for k, v in vars(args).items()))
    base, start, engine = os.path.join(args.out, args.name), time.time(), None
    with common.lock(base + ".lock"):
        found = common.together("samples", lambda: saved_samples(base, items, protocol) if rank == 0 else {})
        done, protocol["engine"] = common.gather((set(found), protocol["engine"]))[0]
        missing = [item for item in items if item[:3] not in done]
        if done:
            common.say(f"{base}: {len(done):,} of {len(items):,} samples are there already")
        try:
            if missing:
                room = max(len(item.prompt) for item in items) + args.max_tokens
                engine = rollout.make_engine(
                    protocol["engine"], model.folder, max_model_len=room, dtype=protocol["dtype"],
                    device=device, max_seqs=args.max_seqs, gpu_memory=args.gpu_memory, seed=args.seed,
                    load_weights=True)
                protocol["engine"] = engine.name
                if not make_samples(args, engine, missing, base, protocol, tokenizer, style, grade,
                                    stop=lambda: bool(stopped)):
                    common.say("stopped by a signal: the samples are kept, the same command goes on")
                    return None, max(common.gather(max(stopped, default=0)))
            seconds = time.time() - start if missing else 0.0
            return common.together("result", lambda: finish(args, base, items, model, protocol, seconds)), 0
        finally:
            if engine is not None:
                engine.close()  # vLLM takes the process group with it


def finish(args, base, items, model, protocol, seconds):
    """Rank 0 scores all samples on the disk and writes the result; the part files go last."""
    if dist.get_rank() > 0:
        return None
    found = saved_samples(base, items, protocol)
    rows = [found[item[:3]] for item in items]
    if os.path.exists(base + ".json"):
        seconds += read_result(base + ".json").get("seconds", 0.0)
    result = {"name": args.name, "model": args.model, "parameters": model.parameters, "protocol": protocol,
              "curve": curve_note(args, protocol), "seconds": seconds,
              "tokens_generated": sum(row["response_tokens"] for row in rows),
              "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_result(base, result, rows)
    for path in glob.glob(glob.escape(base) + ".part.*"):
        os.remove(path)
    return result


def curve_note(args, protocol):
    """One sentence: is this score a point of the validation curve of the run that made the model?"""
    try:
        o = common.read_json(os.path.join(args.model, "../../../config.json"))["options"]
        name = label(o["eval_data"]) if o["eval_every"] else ""
        o |= {f"eval_{key}": o[key] for key in ("style", "reward", "examples", "instruction", "dtype")}
        o |= {"eval_max_tokens": o["eval_max_len"] or o["max_len"], "eval_chat": not o["no_chat"]}
        o |= {"eval_limit": 0, "eval_seed": o.get("eval_seed", o["seed"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if name not in map(label, args.benchmarks):
        return None
    differ = [f"{key} {o[f'eval_{key}']} there, {here} here" for key, here in protocol.items()
              if o.get(f"eval_{key}", here) != here and not (key == "instruction" and protocol["template"])]
    if differ:
        return f"{name}: not the number of the validation in training: {'; '.join(differ)}"
    return f"{name}: same settings and seeds as the validation in training, so the same number"


def regrade(path):
    """Grade the responses behind a result again with today's grader -> (new result, changed verdicts as
    text)."""
    result, base = read_result(path, need=("name", "protocol")), path.removesuffix(".json")
    p, changed = result["protocol"], []
    style = Style(p["template"], p["think"], tuple(p["stop"]), "")
    grade = load_reward(p.get("reward"), style)
    with common.lock(base + ".lock"):
        rows = list(common.read_lines(base + ".responses.jsonl.gz"))
        for row in rows:
            problem = data.Problem(**{f.name: row[f.name] for f in fields(data.Problem) if f.name in row})
            old, sample = row["reward"], rollout.Sample([], [], [], "", text=row["response"])
            row["reward"], row["reason"] = grade(problem, sample)
            row["extracted"] = reward.extract_answer(style.graded(row["response"]))
            if row["reward"] != old:
                changed.append(f"  {row['benchmark']} {row['id']} sample {row['sample']}: {old:g} -> "
                               f"{row['reward']:g}, {row['extracted']!r} for {row['answer']!r}")
        p["commit"] = common.provenance()["commit"]
        write_result(base, result, rows)
    return result, changed


# ----- Options ---------------------------------------------------------------------------------------------

# group: (name, type or choices, default, smallest value, help); bool is a flag, list several words
OPTIONS = {
    "what is measured": [
        ("model", str, None, None, "folder or hub name"),
        ("benchmarks", list, FIVE, None, "files of problems, or names of assets/benchmarks"),
        ("limit", int, 0, 0, "only the first problems of each benchmark; 0: all"),
        ("reward", str, None, None, "your own: MODULE:FUNCTION (response, problem) -> float")],
    "prompt": [
        ("style", str, "r1", None, f"how to ask, what is graded: {', '.join(STYLES)}, or a file"),
        ("instruction", str, data.INSTRUCTION, None, "sentence behind each problem"),
        ("examples", str, None, None, "file of solved problems shown before each problem"),
        ("no_chat", bool, False, None, "prompt without a chat template, for base models that have none"),
        ("max_prompt_len", int, 4096, 1, "tokens; longer prompts are refused")],
    "samples": [
        ("n", int, 16, 1, "of each problem (write -n after torchrun: older Pythons let it take --n)"),
        ("max_tokens", int, 32768, 1, "of a response"),
        ("temperature", float, 0.6, 0, "0 is greedy"),
        ("top_p", float, 0.95, 1e-6, "nucleus; the validation in training uses 1.0"),
        ("seed", int, 0, None, "of the samples; the validation in training uses 0")],
    "files and machine": [
        ("out", str, "eval", None, "folder for the results"),
        ("name", str, None, None, "of the result files and of the table's row (default: from --model)"),
        ("engine", ["auto", "vllm", "torch"], "auto", None, "who generates; auto: vLLM if it is installed"),
        ("dtype", ["auto", "bfloat16", "float32"], "auto", None, "auto: bfloat16 where the card has it"),
        ("gpu_memory", float, 0.9, 0.01, "vLLM's share of each GPU"),
        ("max_seqs", int, 0, 0, "rows generated at once on each rank; 0: vLLM 256 (CPU 128), torch 64")],
    "saved results, instead of a model": [
        ("regrade", list, [], None, "grade their responses again"),
        ("compare", list, [], None, "two or more: each against the first"),
        ("show", int, 10, 0, "problems that --compare lists, those that changed most; 0: all"),
        ("table", list, [], None, "print their tables"),
        ("published", bool, False, None, "add the published rows of DeepScaleR's blog to the table")],
}


def parse_args(argv=None):
    styles = "; ".join(f"{name} = {style.note}" for name, style in STYLES.items())
    p = common.Parser(description=__doc__.split("\n")[0], epilog="styles: " + styles)
    for title, group in OPTIONS.items():
        add = p.add_argument_group(title).add_argument
        for name, kind, default, _, text in group:
            how = {"choices": kind} if isinstance(kind, list) else {"type": kind}
            how = {"action": "store_true"} if kind is bool else {"nargs": "+"} if kind is list else how
            add(*["-n"] * (name == "n"), f"--{name}", default=default, help=text, **how)
    args = p.parse(argv)
    if args.model and not args.name:  # RUN/checkpoints/000120/hf -> RUN-000120
        parts = [x for x in Path(args.model).parts if x not in ("hf", "checkpoints", "/", "..")] or ["model"]
        args.name = "-".join(parts[-2 if parts[-1].isdigit() else -1:])
    for name, _, _, smallest, _ in [row for group in OPTIONS.values() for row in group]:
        if smallest is not None and not smallest <= getattr(args, name) < math.inf:
            p.error(f"--{name} must be finite and at least {smallest:g}")
    if not (args.model or args.regrade or args.compare or args.table):
        p.error("--model is missing (or --regrade, --compare, --table)")
    if len(args.compare) == 1:
        p.error("--compare needs two results or more")
    if max(args.top_p, args.gpu_memory) > 1 or args.temperature == 0 and args.n > 1:
        p.error("--top_p and --gpu_memory are at most 1; --temperature 0 always says the same, so take --n 1")
    if args.model and ("/" in args.name or args.name.startswith(".") or ".part." in args.name):
        p.error(f"--name {args.name} is no plain file name")
    return args


def main(argv=None):
    args, signal_number = parse_args(argv), 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    try:
        for path in args.regrade:
            result, changed = regrade(path)
            print(f"{path}: {len(changed)} verdicts changed", *changed[:20], report([result]), sep="\n")
        if args.table:
            print(report([read_result(path) for path in args.table], args.published))
        for path in args.compare[1:]:
            print(compare(read_result(args.compare[0]), read_result(path), args.show))
        if args.model:
            result, signal_number = evaluate(args)
            if result:
                print(report([result], args.published))
    except KeyboardInterrupt:
        sys.exit(130)
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
