r"""grader.py - the same cases graded by reward.py, by math-verify, and as DeepScaleR's own grader did.

    python bench/grader.py                            # math-verify where it is installed

Three thousand labelled answers and responses (tests/data/grader_*.jsonl.gz): how many are judged right, how
many wrong ones are paid, how many right ones refused, answers a second in one process. And hostile responses:
how many are paid, take more than 2 s, raise, or leave a file behind.

The cases are VISIBLE: reward.py was developed while looking at them, its row only shows that nothing broke.
Each grader works in a child of its own, one case at a time, replaced after 6 s, because some of them hang.
DeepScaleR's verdicts are reproduced here (`strict`), with reward.py's values for sympy's simplify.
"""
import multiprocessing
import os
import re
import tempfile
import time
from pathlib import Path

import measure  # puts the project on the path
import numpy as np

import reward

DATA = measure.ROOT / "tests" / "data"
VISIBLE, HOSTILE = ["grader_cases.jsonl.gz", "grader_more.jsonl.gz"], ["grader_adversarial.jsonl.gz"]
LIMIT = 6.0  # seconds for one case; 2 is the bound that counts


# ----- DeepScaleR's original verdicts -----------------------------------------------------------------------

def rewritten(text, rules):
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return text


def strict_answer(response):
    """The original cuts at the first and second </think>. (It also wanted <think>.)"""
    parts = response.split("</think>") if isinstance(response, str) else []
    return reward.extract_answer(parts[1], require_think=False) if len(parts) > 1 else None


def strict(answer, gold):
    """MATH's string equality, or prm800k's grader with `simplify(a - b) == 0` replaced by reward.py's values.

    Same blind spots on purpose: ordered lists, unreduced fractions wrong, no trigonometry or logarithms.
    Source: github.com/agentica-project/deepscaler, rewards/math_utils; its hangs are answered with 0.

    >>> strict(r"5 \text{ or } 6", "5"), strict("2^{10}", "1024")
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
    return all(map(strict_element, xs, ys))


MATHD = [
    (r"^\s*\\text\{(.+?)\}\s*$", r"\1"), (r"\n|\\!", ""), (r"\\\\", r"\\"), (r"[td]frac", "frac"),
    (r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", ""),
    (r"^((?:(?!\\text\{ ).)*)\\text\{ (?!.*\\text\{ ).*", r"\1"), (r"\\%", ""),
    (r" \.", " 0."), (r"\{\.", "{0."), (r"^\s*\.", "0."), (r"^\s*[^=]{0,2}=([^=]*)$", r"\1"),
    (r"\\sqrt([^{\s])", r"\\sqrt{\1}"), (r" ", ""), (r"\\frac([^{\\])([^{\\])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{\\])\{", r"\\frac{\1}{"), (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?[0-9]+)/(-?[0-9]+)$", r"\\frac{\1}{\2}")]
UNITS = "degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard"
PRM800K = [
    (r"^\s*\\text\{(.+?)\}\s*$", r"\1"), (r"\\?[%$]", ""), (r" (?:or|and) ", " , "),
    (r"million", "*10^6"), (r"billion", "*10^9"), (r"trillion", "*10^12"),
    (rf"({UNITS})(es)?s? *(\^[0-9]+)?", ""), (r"\^ *\\circ|\^ *\{\\circ\}", ""), (r"^\{(.*)\}$", r"\1"),
    (r",\\!", "")]
PRM800K_END = [(r"- *", "-"), (r"([0-9]) +([0-9])", r"\1+\2"), (r"[ {}]", "")]
# what pylatexenc prints: \frac{a}{b} as a/b, \sqrt{a} as sqrt(a), the index of a root lost
PLAIN = [(r"\\[td]?frac", r" \\frac"), (r"\\sqrt *\[[^\]]*\]", r"\\sqrt")]
PLAIN_INSIDE = [
    (r"\\frac *(?:\{([^{}]*)\}|([0-9a-z])) *(?:\{([^{}]*)\}|([0-9a-z]))", r"\1\2/\3\4"),
    (r"\\sqrt *(?:\{([^{}]*)\}|([0-9a-z]))", r"sqrt(\1\2)"),
    (r"\\(?:text|mathrm|mathbf|textbf|mbox) *\{([^{}]*)\}", r"\1")]
SYMBOLS = {r"\pi": "pi", r"\infty": "inf", r"\cup": "u", r"\cdot": "*", r"\times": "*", r"\le": "≤",
           r"\ge": "≥", r"\leq": "≤", r"\geq": "≥", r"\pm": "±", r"\in": "∈", r"\not": "≠"}


def prm800k(text):
    """The prm800k normaliser. LaTeX becomes plain text and braces go, which merges 9/(4 pi) with 9/4 pi."""
    text = rewritten(text.strip(), PRM800K)
    if is_integral(text):
        text = str(int(float(text)))
    if "\\" in text:
        text = rewritten(text, PLAIN)
        for _ in range(20):  # innermost first; a bounded number of levels
            text = rewritten(text, PLAIN_INSIDE)
        text = re.sub(r"\\[,;: ]", " ", text)
        kept = reward.FUNCTIONS | reward.GREEK
        text = re.sub(r"\\([A-Za-z]+|.)", lambda m: SYMBOLS.get(m[0], m[1] if m[0] in kept else ""), text)
    text = rewritten(text.strip(), PRM800K_END).lower()
    return str(int(float(text.replace(",", "")))) if is_integral(strip_commas(text)) else text


def strip_commas(text):
    return re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?:[^0-9]|$))", "", text)


def is_integral(text):
    try:
        return text.isascii() and abs(float(text) - round(float(text))) <= 1e-7
    except (ValueError, OverflowError):
        return False


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
    reward._deadline = time.monotonic() + reward.SECONDS
    try:
        trees = [reward.Parser(reward.tokenize(text)).whole() for text in (a, b)]
        for letter in "ei":  # lower-cased, both were plain symbols to the original
            trees = [reward.substituted(tree, ("const", letter), ("var", letter)) for tree in trees]
        return reward.agree(*trees)
    except reward.REFUSALS:
        return False


# ----- The graders: (response, gold, problem) -> paid? ------------------------------------------------------

def deepscaler(response, gold, _):
    answer = strict_answer(response)
    return answer is not None and any(strict(answer, text) for text in reward.gold_texts(gold))


def math_verify(read):
    """read(response) -> what it gets to see. Its alarm of 5 s per call is kept."""
    from math_verify import parse, verify

    def respond(response, gold, _):
        golds = [text.strip().strip("$") for text in reward.gold_texts(gold)]
        return any(verify(parse(f"${text}$"), parse(read(response))) for text in golds)
    return respond


def boxed_answer(response):
    """By our extractor: math-verify's own pays for answers outside the box."""
    return f"\\boxed{{{reward.extract_answer(response) or ''}}}"


GRADERS = {"nanoscaler": lambda: reward.compute_reward, "math-verify": lambda: math_verify(boxed_answer),
           "DeepScaleR": lambda: deepscaler}


# ----- Measuring one ----------------------------------------------------------------------------------------

def judge(case):
    """In the child: (verdict, seconds, raised?)."""
    began, verdict, raised = time.perf_counter(), False, False
    try:
        verdict = judge.grader(case["response"], case["gold"], case.get("problem")) == 1
    except Exception:  # noqa: BLE001  a grader that raises has not paid
        raised = True
    return verdict, time.perf_counter() - began, raised


def judge_all(cases, folder):
    """Results of `judge` by a child in `folder`, which is killed and replaced when it takes too long."""
    fork = multiprocessing.get_context("fork")
    pool = fork.Pool(1, os.chdir, (folder,))
    for case in cases:
        try:
            yield pool.apply_async(judge, (case,)).get(LIMIT)
        except multiprocessing.TimeoutError:
            pool.terminate()
            pool = fork.Pool(1, os.chdir, (folder,))
            yield False, LIMIT, True
    pool.terminate()


def measured(spec):
    judge.grader = GRADERS[spec["side"]]()
    cases, hostile = (load(names)[::spec["every"]] for names in (VISIBLE, HOSTILE))
    for case in cases + hostile:
        case.setdefault("response", f"</think>\\boxed{{{case.get('answer')}}}")
    warm = cases[:50] + [c for c in cases if "\\sum" in c["gold"]][-2:]  # imports and first calls; sympy
    with tempfile.TemporaryDirectory() as folder:
        results = list(judge_all(warm + cases + hostile, folder))[len(warm):]
        left = len(list(Path(folder).iterdir()))
    results, attacks = results[:len(cases)], results[len(cases):]
    seconds = np.array([r[1] for c, r in zip(cases, results) if "answer" in c])
    missed = [c for c, (verdict, *_) in zip(cases, results) if verdict != c["correct"]]
    return {"seconds": seconds.sum(), "answers_per_second": len(seconds) / seconds.sum(),
            "p50_ms": 1e3 * np.median(seconds), "p99_ms": 1e3 * np.quantile(seconds, 0.99),
            "cases": len(cases), "accuracy": 1 - len(missed) / len(cases),
            "positives": sum(c["correct"] for c in cases), "negatives": sum(not c["correct"] for c in cases),
            "false_negatives": sum(c["correct"] for c in missed),
            "false_positives": sum(not c["correct"] for c in missed), "raised": sum(r[2] for r in results),
            "hostile": len(attacks), "hostile_paid": sum(r[0] for r in attacks),
            "hostile_over_2s": sum(r[1] > 2 for r in attacks), "hostile_raised": sum(r[2] for r in attacks),
            "hostile_files_left": left}


def load(names):
    return [case for name in names for case in measure.common.read_lines(str(DATA / name))]


SIDES = dict.fromkeys(GRADERS, measured)
PEERS = ["math-verify"]


def cases(args):
    what = "labelled answers and responses, visible to whoever wrote reward.py"
    return what, [({}, {"every": 40 if args.quick else 1})]


if __name__ == "__main__":
    measure.compare_sides("grader")
