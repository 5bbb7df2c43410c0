r"""lazy.py - what a policy earns that does not solve its problems, by three graders.

    python bench/lazy.py                       # all 34,868 problems, 400 of them for math-verify; 5 minutes
    PYTHONPATH=FOLDER python bench/lazy.py     # math-verify from pip --target FOLDER; --quick: a minute

A trick is a response made without work on the problem, or the right answer spoiled. The table has the share
of problems where one pays. A trick that does not apply (no formula) does not pay, and a formula that says the
gold is no trick. reward.py gets the problem's text; math-verify the whole response, as its own users do it.
"""
import argparse
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import grader
import measure

import reward

FORMULA = re.compile(r"\$\$?([^$]+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
RELATION = re.compile(r"=|<|>|\\(?:le|ge|leq|geq|ne|neq|equiv|approx)(?![a-z])")
OPERATION = re.compile(r"[+*!^]|[\w)}]\s*-|\\(?:cdot|times|sqrt|log|ln|sin|cos|tan|binom|sum|prod|int|lim)\b")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def boxed(*texts):
    return "</think>\n\n" + ", ".join(f"$\\boxed{{{text}}}$" for text in texts)


def formulas(problem, gold):
    """(terms, relations) of a problem that hold something to calculate and do not say the gold."""
    def is_work(text):
        said = [re.sub(r"[\s{}]|\^\{?\\circ", "", part) for part in (gold, text, RELATION.split(text)[-1])]
        whole = text.count("{") == text.count("}")  # not the second half of \sum_{n=1}^9, which says 1
        return whole and OPERATION.search(text) and said[0] not in said[1:]

    found = [next(filter(None, match.groups())).strip(" \n.,") for match in FORMULA.finditer(problem)]
    relations = [text for text in found if RELATION.search(text)]
    terms = [side.strip() for text in found for side in RELATION.split(text)]
    return [list(filter(is_work, dict.fromkeys(some))) for some in (terms, relations)]


def tricks(problem, gold, common):
    """{name: responses}. common: the most frequent answers of all problems."""
    terms, relations = formulas(problem, gold)
    whole = [gold] if re.fullmatch("-?[1-9][0-9]*", gold) else []  # 0 thousandths would be right
    return {
        "a formula of the problem, or a side of one": [boxed(text) for text in terms],
        "an equation or inequality of the problem": [boxed(text) for text in relations],
        "the last number in the problem": [boxed(text) for text in NUMBER.findall(problem)[-1:]],
        "the most common answer": [boxed(common[0])],
        "the ten most common answers in one box": [boxed(", ".join(common))],
        "the ten most common answers, a box each": [boxed(*common)],
        "the number, then `thousandths`": [boxed(rf"{n}\text{{ thousandths}}") for n in whole],
        "`not`, then the number": [boxed(rf"\text{{not }}{n}") for n in whole],
        "the number `or` ten times it": [boxed(rf"{n}\text{{ or }}{n}0") for n in whole],
        "an empty box": [boxed(""), boxed(" ")],
        "the answer, then an empty box": [boxed(gold, "")],
        "the answer in a box without an end": [boxed(gold).removesuffix("}$")],
        "the answer boxed in the thought alone": [
            f"<think>\n$\\boxed{{{gold}}}$", f"<think>\n$\\boxed{{{gold}}}$\n</think>\n\nI am done."]}


def math_verify():
    from math_verify import parse, verify

    def respond(response, gold, problem):
        return any(verify(parse(f"${text}$"), parse(response)) for text in reward.gold_texts(gold))
    return respond


GRADERS = {"reward.py": lambda: reward.compute_reward, "DeepScaleR": lambda: grader.deepscaler()[1],
           "math-verify": math_verify}


def paid(respond, problems, common):
    """{trick: how many of the problems pay}"""
    count = Counter()
    for row in problems:
        problem, gold = row["problem"], row["answer"]
        for name, responses in tricks(problem, row["text"], common).items():
            count[name] += any(respond(response, gold, problem) for response in responses)
    return count


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, default=400, help="problems for math-verify, drawn by seed 0")
    parser.add_argument("--quick", action="store_true", help="100 problems, and 10 for math-verify")
    parser.add_argument("--out", default=str(measure.RESULTS / "lazy.json"), help="JSON to write")
    args = parser.parse_args(argv)
    before = {"busy_cores": None, "time": time.time()}  # verdicts mind no other process
    problems = list(measure.common.read_lines(str(measure.ROOT / "assets" / "train.jsonl.gz")))
    for row in problems:
        row["text"] = reward.gold_texts(row["answer"])[0]
    common = [text for text, _ in Counter(row["text"] for row in problems).most_common(10)]
    random.Random(0).shuffle(problems)
    rows = {}
    for name, make in GRADERS.items():
        some = problems[:10 if args.quick else args.sample] if name == "math-verify" else problems
        some = some[:100] if args.quick else some
        try:
            counts = paid(make(), some, common)
        except ImportError as e:
            print(f"{name}: not measured, {e}")
            continue
        print(f"{name}, {len(some):,} problems")
        for trick, count in counts.items():
            print(f"  {count / len(some):7.2%}  {trick}", flush=True)
            rows.setdefault(trick, {"trick": trick})[name] = {"paid": count, "problems": len(some)}
    measure.write(args, "share of problems that pay for a trick", list(rows.values()), before,
                  most_common=common)


if __name__ == "__main__":
    main()
