r"""lazy.py - what a policy earns that does not solve its problems, by three graders.

    python bench/lazy.py                       # all 34,868 problems, 400 of them for math-verify; 5 minutes
    PYTHONPATH=FOLDER python bench/lazy.py     # math-verify from pip --target FOLDER; --quick: a minute

A trick is a response made without work on the problem, or the right answer spoiled. The table has the share
of problems where one pays. A trick that does not apply (no formula) does not pay, and a formula that says the
gold is no trick. reward.py gets the problem's text; math-verify the whole response, as its own users do it.
"""
import random
import re
from collections import Counter

import grader
import measure  # puts the project on the path

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


# how to make one, and how many problems it gets: all, or a sample where it is slow; with --quick
GRADERS = {"reward.py": (lambda: reward.compute_reward, None, 100),
           "DeepScaleR": (lambda: grader.deepscaler, None, 100),
           "math-verify": (lambda: grader.math_verify(str), 400, 10)}


def paid(respond, problems, common):
    """{trick: how many of the problems pay}"""
    count = Counter()
    for row in problems:
        problem, gold = row["problem"], row["answer"]
        for name, responses in tricks(problem, row["text"], common).items():
            count[name] += any(respond(response, gold, problem) for response in responses)
    return count


def main():
    args = measure.parse("lazy")
    # verdicts mind no other process
    result = measure.Result(args.out, "share of problems that pay for a trick", timed=False)
    problems = list(measure.common.read_lines(str(measure.ROOT / "assets" / "train.jsonl.gz")))
    for row in problems:
        row["text"] = reward.gold_texts(row["answer"])[0]
    common = [text for text, _ in Counter(row["text"] for row in problems).most_common(10)]
    random.Random(0).shuffle(problems)
    table = {}
    for name, (make, most, quick) in GRADERS.items():
        some = problems[:quick if args.quick else most]
        print(f"{name}, {len(some):,} problems", flush=True)
        try:
            counts = paid(make(), some, common)
        except ImportError as e:
            print(f"not measured, {e}")
            continue
        for trick, count in counts.items():
            table.setdefault(trick, {})[name] = {"paid": count, "problems": len(some)}
    for trick, by_grader in table.items():
        result.add(trick=trick, **by_grader)


if __name__ == "__main__":
    main()
