"""Grade the same cases with reward.py and with every other grader at hand; print the bounds, write JSON.

    python bench/grader.py                                  the cases and the training set of this repository
    python bench/grader.py --cases MORE.jsonl --adversarial MORE_HOSTILE.jsonl --out FILE.json

Columns: accuracy, false positives (paid though wrong) and false negatives, answers a second in one process,
p50 and p99 in ms, and for hostile responses how many were paid, took more than 2 s, raised or left a file.
Then the share of training problems that pay for a formula of their own text or one side of it, with the
problem given and without, and how many golds that stand in their problem are refused.

Hold-out discipline.  The default files are VISIBLE: reward.py was developed while looking at them, so its
accuracy on them only shows that nothing broke.  A number worth quoting needs cases of the same kinds that
nobody looked at: give them with --cases.

Each grader runs in a child process of its own, one case at a time, killed and restarted after 6 s, because
some of them hang.  math-verify needs `pip install math-verify`; it is reported as missing otherwise.
DeepScaleR's original verdicts are reproduced below (`strict`), with reward.py's values for sympy's simplify.
"""

import argparse
import collections
import gzip
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import re
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import reward

LIMIT = 6.0          # seconds for one case; 2 is the bound that counts


# ---- DeepScaleR's original verdicts

def compiled(*rules):
    return [(re.compile(pattern), new) for pattern, new in rules]


def rewritten(text, rules):
    for pattern, new in rules:
        text = pattern.sub(new, text)
    return text


def strict_answer(response):
    """The original cuts at the first and second </think>.  (It also wanted <think>.)"""
    parts = response.split("</think>") if isinstance(response, str) else []
    return reward.extract_answer(parts[1], require_think=False) if len(parts) > 1 else None


def strict(answer, gold):
    """MATH's string equality, or prm800k's grader with `simplify(a - b) == 0` replaced by reward.py's values.

    Same blind spots on purpose: ordered lists, unreduced fractions wrong, no trigonometry or logarithms.
    Source: github.com/agentica-project/deepscaler, rewards/math_utils; its hangs are answered with 0.

    >>> strict(r"5 \\text{ or } 6", "5"), strict("2^{10}", "1024")
    (True, False)
    """
    gold = reward.extract_answer(gold, require_think=False) or "" if "\\boxed" in gold else gold
    if max(len(answer), len(gold)) > reward.MAX_CHARS:
        return False
    if rewritten(answer.strip(), MATHD) == rewritten(gold.strip(), MATHD):
        return True
    a, b = prm800k(answer), prm800k(gold)
    if a == b or not a:
        return a == b
    xs, ys = strict_elements(a), strict_elements(b)
    if len(ys) > 1 and (a[0], a[-1]) != (b[0], b[-1]) or len(xs) != len(ys):
        return False
    reward._deadline = time.monotonic() + reward.SECONDS
    try:
        return all(map(strict_element, xs, ys))
    except reward.REFUSALS:
        return False


MATHD = compiled(
    (r"^\s*\\text\{(.+?)\}\s*$", r"\1"), (r"\n|\\!", ""), (r"\\\\", r"\\"), (r"[td]frac", "frac"),
    (r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", ""),
    (r"^((?:(?!\\text\{ ).)*)\\text\{ (?!.*\\text\{ ).*", r"\1"), (r"\\%", ""),
    (r" \.", " 0."), (r"\{\.", "{0."), (r"^\s*\.", "0."), (r"^\s*[^=]{0,2}=([^=]*)$", r"\1"),
    (r"\\sqrt([^{\s])", r"\\sqrt{\1}"), (r" ", ""), (r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{\\])\{", r"\\frac{\1}{"), (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?[0-9]+)/(-?[0-9]+)$", r"\\frac{\1}{\2}"))
PRM800K = compiled(
    (r"^\s*\\text\{(.+?)\}\s*$", r"\1"), (r"\\?[%$]", ""), (r" (?:or|and) ", " , "),
    (r"million", "*10^6"), (r"billion", "*10^9"), (r"trillion", "*10^12"),
    (r"(degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)"
     r"(es)?s? *(\^[0-9]+)?", ""),
    (r"\^ *\\circ|\^ *\{\\circ\}", ""), (r"^\{(.*)\}$", r"\1"), (r",\\!", ""))
PRM800K_END = compiled((r"- *", "-"), (r"([0-9]) +([0-9])", r"\1+\2"), (r"[ {}]", ""))
STRICT_SYMBOLS = reward.table(r"""\pi=pi \infty=inf \cup=u \cdot=* \times=* \le=≤ \ge=≥ \leq=≤ \geq=≥ \pm=±
    \in=∈ \not=≠""")


def prm800k(text):
    """The prm800k normaliser.  LaTeX becomes plain text and braces go, which merges 9/(4 pi) with 9/4 pi."""
    text = rewritten(text.strip(), PRM800K)
    if is_integral(text):
        text = str(int(float(text)))
    if "\\" in text:
        text = strict_plain(text)
    text = rewritten(text, PRM800K_END).lower()
    return str(int(float(text.replace(",", "")))) if is_integral(strip_commas(text)) else text


def strip_commas(text):
    return re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?:[^0-9]|$))", "", text)


def is_integral(text):
    try:
        return text.isascii() and abs(float(text) - round(float(text))) <= 1e-7
    except (ValueError, OverflowError):
        return False


PLAIN = compiled(
    (r"\\[td]?frac", r" \\frac"), (r"\\sqrt *\[[^\]]*\]", r"\\sqrt"),
    (r"\\frac *(?:\{([^{}]*)\}|([0-9a-z])) *(?:\{([^{}]*)\}|([0-9a-z]))", r"\1\2/\3\4"),
    (r"\\sqrt *(?:\{([^{}]*)\}|([0-9a-z]))", r"sqrt(\1\2)"),
    (r"\\(?:text|mathrm|mathbf|textbf|mbox) *\{([^{}]*)\}", r"\1"))


def strict_plain(text):
    r"""What pylatexenc prints: \frac{a}{b} as a/b, \sqrt{a} as sqrt(a), the index of a root lost."""
    text = rewritten(text, PLAIN[:2])
    for _ in range(20):                # innermost first; a bounded number of levels
        text = rewritten(text, PLAIN[2:])
    text = re.sub(r"\\[,;: ]", " ", text)
    kept = reward.FUNCTIONS | reward.GREEK
    text = re.sub(r"\\([A-Za-z]+|.)", lambda m: STRICT_SYMBOLS.get(m[0], m[1] if m[0] in kept else ""), text)
    return text.strip()


def strict_elements(text):
    text = strip_commas(text)
    is_tuple = re.fullmatch(r"[(\[][^()\[\]]+[)\]]", text)
    return [e.strip() for e in text[1:-1].split(",")] if is_tuple else [text]


def strict_element(a, b):
    fraction = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?")
    if fraction.fullmatch(a) and fraction.fullmatch(b):
        return a == b
    if is_integral(strip_commas(a)) != is_integral(strip_commas(b)):
        return False
    both = f"({b})-({a})"
    found = {c for c in re.sub("sqrt|frac", "", both) if c.isalpha()}
    if len(found) > 2 or re.search(r"\^[{(]|\^[0-9]+\^|\^[0-9][0-9]+", both):
        return False
    trees = [reward.Parser(reward.tokenize(text)).whole() for text in (a, b)]
    for letter in "ei":                # lower-cased, both were plain symbols to the original
        trees = [reward.substituted(tree, ("const", letter), ("var", letter)) for tree in trees]
    return reward.agree(*trees)


# ---- the graders

def nanoscaler():
    return reward.grade, reward.compute_reward


def deepscaler():
    def grade(answer, gold, problem):
        return any(strict(answer, text) for text in reward.gold_texts(gold))

    def respond(response, gold, problem):
        answer = strict_answer(response)
        return float(answer is not None and grade(answer, gold, problem))
    return grade, respond


def math_verify():
    """Behind our extractor (its own pays for answers outside the box); its alarm of 5 s per call is kept."""
    from math_verify import parse, verify

    def grade(answer, gold, problem):
        golds = gold if isinstance(gold, list) else [gold]
        golds = [str(g).strip().strip("$") for g in golds]
        return any(verify(parse(f"${g}$"), parse(f"\\boxed{{{answer}}}")) for g in golds)

    def respond(response, gold, problem):
        answer = reward.extract_answer(response)
        return float(answer is not None and grade(answer, gold, problem))
    return grade, respond


GRADERS = {"nanoscaler": (nanoscaler, "sympy"), "DeepScaleR": (deepscaler, "sympy"),
           "math-verify": (math_verify, "math-verify")}


def serve(name, pipe, folder):
    """Child process: grade what comes, report (verdict, seconds, exception)."""
    os.chdir(folder)
    grade, respond = GRADERS[name][0]()
    pipe.send("ready")
    while True:
        case = pipe.recv()
        start = time.perf_counter()
        error = ""
        try:
            problem = case.get("problem")
            verdict = respond(case["response"], case["gold"], problem) == 1.0 if "response" in case else \
                bool(grade(case["answer"], case["gold"], problem))
        except Exception as e:
            verdict, error = False, type(e).__name__
        pipe.send((verdict, time.perf_counter() - start, error))


class Child:
    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.start()

    def start(self):
        self.pipe, other = multiprocessing.get_context("spawn").Pipe()
        spawn = multiprocessing.get_context("spawn")
        self.process = spawn.Process(target=serve, args=(self.name, other, self.folder))
        self.process.start()
        assert self.pipe.recv() == "ready"

    def __call__(self, case):
        self.pipe.send(case)
        if self.pipe.poll(LIMIT):
            try:
                return self.pipe.recv()
            except EOFError:
                pass
        self.stop()
        self.start()
        return False, LIMIT, "killed"

    def stop(self):
        self.process.kill()
        self.process.join()


def run(name, cases, hostile):
    with tempfile.TemporaryDirectory() as folder:
        child = Child(name, folder)
        sums = [case for case in cases if "\\sum" in case["gold"]][-2:]                # start sympy
        for case in cases[:50] + sums:          # imports and first calls are not the speed we ask for
            child({**case})
        results = [child(case) for case in cases]
        attacks = [child(case) for case in hostile]
        child.stop()
        canaries = len(list(pathlib.Path(folder).iterdir()))
    return summary(cases, results, attacks, canaries)


def summary(cases, results, attacks, canaries):
    answers = sorted(r[1] for c, r in zip(cases, results) if "answer" in c)
    kinds = collections.defaultdict(lambda: [0, 0, 0, 0])      # positives, their misses, negatives, theirs
    for case, (verdict, _, _) in zip(cases, results):
        k = kinds[case["kind"]]
        k[0 if case["correct"] else 2] += 1
        k[1 if case["correct"] else 3] += verdict != case["correct"]
    total = [sum(k[i] for k in kinds.values()) for i in range(4)]
    return {
        "cases": len(cases), "accuracy": 1 - (total[1] + total[3]) / len(cases),
        "false_negatives": total[1], "positives": total[0],
        "false_positives": total[3], "negatives": total[2],
        "answers_per_second": len(answers) / sum(answers), "p50_ms": 1e3 * answers[len(answers) // 2],
        "p99_ms": 1e3 * answers[int(len(answers) * 0.99)], "max_ms": 1e3 * answers[-1],
        "raised": sum(bool(r[2]) for r in results),
        "hostile": len(attacks), "hostile_paid": sum(r[0] for r in attacks),
        "hostile_over_2s": sum(r[1] > 2 for r in attacks),
        "hostile_raised": sum(bool(r[2]) for r in attacks),
        "hostile_max_s": max((r[1] for r in attacks), default=0.0),
        "hostile_files_left": canaries,
        "kinds": {k: {"positives": v[0], "false_negatives": v[1], "negatives": v[2], "false_positives": v[3]}
                  for k, v in sorted(kinds.items())}}


# ---- formulas of the problem as answers

SIDES = re.compile(r"=|<|>|\\(?:le|ge|leq|geq|ne|neq|equiv|approx)(?![a-z])")


def own_formulas(problem):
    """Every formula of a problem and every side of it, where there is something to calculate."""
    for m in reward.FORMULA.finditer(problem[:20_000]):
        formula = next(filter(None, m.groups()))
        for part in {formula, *SIDES.split(formula)}:
            tree = reward.read(part.strip().rstrip(".,")).tree if len(part) <= 1000 else None
            if tree and any(map(reward.is_operation, reward.nodes(tree))):
                yield part.strip().rstrip(".,")


def restating(path, every):
    """How many training problems pay for their own formulas, with the problem given and without."""
    counts = collections.Counter()
    for row in rows(path)[::every]:
        problem, gold = row["problem"], row["answer"]
        first = gold[0] if isinstance(gold, list) else gold
        said = reward.bare(reward.read(first).tokens or [])          # AC = 5 says the gold 5 token for token
        parts = [f for f in own_formulas(problem) if not reward.bare(reward.read(f).tokens).endswith(said)]
        counts["problems"] += 1
        counts["pay"] += any(reward.grade(f, gold, problem) for f in parts)
        counts["pay without the problem"] += any(reward.grade(f, gold) for f in parts)
        counts["golds in their problem"] += first in problem
        counts["of them refused"] += first in problem and not reward.grade(first, gold, problem)
        counts["golds not equal to themselves"] += not reward.grade(first, gold)
    return dict(counts)


def rows(path):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8", errors="surrogatepass") as f:
        return [json.loads(line) for line in f if line.strip()]


def installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(table):
    print(f"{'grader':12s} {'right':>7s} {'FP':>9s} {'FN':>10s} {'answers/s':>10s} {'p50 ms':>8s} "
          f"{'p99 ms':>8s} {'paid':>5s} {'>2 s':>5s} {'raised':>6s} {'files':>5s}")
    for name, r in table.items():
        print(f"{name:12s} {r['accuracy']:7.2%} {r['false_positives']:4d}/{r['negatives']:<4d} "
              f"{r['false_negatives']:5d}/{r['positives']:<4d} {r['answers_per_second']:10.0f} "
              f"{r['p50_ms']:8.2f} {r['p99_ms']:8.2f} {r['hostile_paid']:5d} {r['hostile_over_2s']:5d} "
              f"{r['hostile_raised'] + r['raised']:6d} {r['hostile_files_left']:5d}")
    print("\nFN/positives FP/negatives by kind")
    print(f"{'':24s}" + "".join(f"{n:>26s}" for n in table))
    for kind in next(iter(table.values()))["kinds"]:
        cells = [r["kinds"][kind] for r in table.values()]
        print(f"{kind:24s}" + "".join(f"{c['false_negatives']:>12d}/{c['positives']:<4d}"
                                      f"{c['false_positives']:>4d}/{c['negatives']:<4d}" for c in cells))


def bounds(result):
    """The bounds of the grader, one a line, kept or missed."""
    ours, own = result["graders"].get("nanoscaler"), result["restating"]
    if ours:
        yield "accuracy at least 99.5 %", f"{ours['accuracy']:.2%}", ours["accuracy"] >= 0.995
        yield "no wrong answer paid", ours["false_positives"], not ours["false_positives"]
        yield "no hostile answer paid, slow or raised", ours["hostile_paid"] + ours["hostile_over_2s"], not (
            ours["hostile_paid"] + ours["hostile_over_2s"] + ours["hostile_raised"])
        speed = ours["answers_per_second"]
        yield "at least 3,000 answers a second", f"{speed:.0f}", speed >= 3000
        yield "p99 under 20 ms", f"{ours['p99_ms']:.1f}", ours["p99_ms"] < 20
        yield "slowest answer under 2 s", f"{ours['max_ms'] / 1e3:.2f}", ours["max_ms"] < 2000
    if own:
        share = own["pay"] / own["problems"]
        yield "at most 0.1 % pay for their own formula", f"{share:.3%}", share <= 0.001
        yield "no gold in its problem refused", own["of them refused"], not own["of them refused"]
        yield "no gold fails against itself", own["golds not equal to themselves"], not own[
            "golds not equal to themselves"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", default=[ROOT / "tests/data/grader_cases.jsonl.gz",
                                                       ROOT / "tests/data/grader_more.jsonl.gz"])
    parser.add_argument("--adversarial", default=ROOT / "tests/data/grader_adversarial.jsonl.gz")
    parser.add_argument("--problems", default=ROOT / "assets/train.jsonl.gz", help="problem and answer")
    parser.add_argument("--every", type=int, default=1, help="take each Nth problem (all: ten minutes)")
    parser.add_argument("--only", choices=sorted(GRADERS), action="append")
    parser.add_argument("--out", default=ROOT / "bench/results/grader.json")
    args = parser.parse_args()
    cases, hostile = [case for path in args.cases for case in rows(path)], rows(args.adversarial)
    table = {}
    for name in args.only or GRADERS:
        package = GRADERS[name][1]
        if installed(package) is None:
            print(f"{name}: not measured, {package} is not installed")
            continue
        table[name] = run(name, cases, hostile)
    show(table)
    packages = ("sympy", "mpmath", "math-verify", "latex2sympy2_extended", "antlr4-python3-runtime")
    visible = args.cases == parser.get_default("cases")
    result = {"versions": {"python": platform.python_version(), **{p: installed(p) for p in packages}},
              "cores": os.cpu_count(), "load": os.getloadavg()[0], "cases_are_visible": visible,
              "graders": table, "restating": restating(args.problems, args.every)}
    print()
    for bound, measured, kept in bounds(result):
        print(f"{'kept  ' if kept else 'MISSED'} {bound}: {measured}")
    print("formulas of the problem:", result["restating"])
    pathlib.Path(args.out).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
