"""tables.py - all tables of bench/README.md, and the one of README.md, made from bench/results/*.json.

    python bench/tables.py              # name the files that say anything else, and exit with 1
    python bench/tables.py --write      # put the tables between the markers of the two files

A number that is not in a results file cannot get into a table. Medians; in brackets the range over
repetitions. A file of results that is not named here gets a table of all its numbers.
"""
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import measure
from measure import common

TABLES = {  # results: the columns, keys of their rows
    "update": "seconds first_seconds times_ours tokens_per_second memory_mb grad_norm_off",
    "logprobs": "length seconds times_limit memory_mb off",
    "generate": "tokens_per_second times_bare times_bare_same seconds length_mean greedy_equal",
    "step": "seconds times_ours tokens_per_second times_ours_per_token memory_mb",
    "grader": "accuracy positives false_negatives negatives false_positives answers_per_second p50_ms p99_ms "
              "hostile hostile_paid hostile_over_2s"}
NAMES = {"ours": "**ours**", "trl": "TRL", "sorted": "plain loop, sorted by length",
         "vllm": "**ours, vLLM**", "bare_vllm": "bare vLLM",
         "bare_vllm+": "bare vLLM with seeds and log-probs", "torch": "**ours, torch**",
         "hf": "transformers' generate", "ours_vllm": "**ours, vLLM**", "ours_torch": "**ours, torch**",
         "trl_hf": "TRL, transformers' generate", "nanoscaler": "**reward.py**",
         "DeepScaleR": "DeepScaleR's original verdicts"}


# ----- All tables, for bench/README.md ----------------------------------------------------------------------

def cell(value):
    """A number to three digits, a spread as median and range, any other value as it is.

    >>> cell({"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}), cell(None), cell(12345.6), cell(2e-5)
    ('2 (1-3)', '-', '12,346', '2e-05')
    """
    if isinstance(value, dict) and "paid" in value:
        return f"{value['paid'] / value['problems']:.2%} of {value['problems']:,}"
    if isinstance(value, dict):
        middle, low, high = (cell(value[k]) for k in ("median", "min", "max"))
        return middle if value["n"] == 1 else f"{middle} ({low}-{high})"
    if isinstance(value, float):
        small, large = 0 < abs(value) < 1e-3, abs(value) >= 100
        return format(value, ".0e" if small else ",.0f" if large else ".3g")
    number = isinstance(value, int) and not isinstance(value, bool)
    return "-" if value is None else f"{value:,}" if number else str(value)


def table(rows, columns=None):
    """Rows as a Markdown table. columns: keys, default: all that `cell` knows. A side that failed says why in
    its last cell."""
    one = dict.fromkeys(k for row in rows for k, v in row.items()
                        if not isinstance(v, (list, dict)) or "median" in v or "paid" in v)
    columns, lines = ["side", *columns.split()] if columns else list(one), []
    for row in rows:
        lines.append([NAMES.get(row[k], row[k]) if k == "side" else cell(row.get(k)) for k in columns])
        if isinstance(row.get("error"), str):
            lines[-1][-1] = row["error"][:90]
    return common.table([k.replace("_", " ") for k in columns], lines)


def about(d):
    """Command, machine, versions, commit of a result in one line."""
    versions = {}
    for each in d["versions"].values():  # peers may live in an environment of their own
        for k, v in each.items():
            versions.setdefault(k, set()).add(v)
    machine, n = d["machine"], d["repeats"]
    said = ", ".join(f"{k} {' and '.join(sorted(v))}" for k, v in sorted(versions.items())
                     if k in measure.PACKAGES)
    warning = f" **{d['warning']}.**" if d["warning"] else ""
    return (f"`{d['command']}`, {n} repetition{'s' * (n != 1)} in {d['minutes']:.0f} minutes, "
            f"{d['date'][:10]}, commit {d['commit']}, {machine['cpu']}, "
            f"{' and '.join(map(str, machine['threads']))} threads; {said}.{warning}\n")


def section(path):
    """Tables of a file of results, with what was measured, how and where."""
    d, columns = common.read_json(path), TABLES.get(Path(path).stem.split("_")[0])
    parts = [d] if "rows" in d else d.values()
    return "\n".join(f"{part['what']}\n\n{table(part['rows'], columns)}\n{about(part)}" for part in parts)


def sections(results=measure.RESULTS):
    """All sections for which there is a file, as Markdown. A workload may have a file of its own."""
    def place(path):
        name = path.stem.split("_")[0]
        return [*TABLES, name].index(name), path.stem

    files = sorted(Path(results).glob("*.json"), key=place)
    return "\n\n".join(f"### {f.stem}\n\n{section(f)}".strip() for f in files)


# ----- One table of at most eight rows, for README.md -------------------------------------------------------

def tricks(rows):
    best = {name: max(row[name]["paid"] / row[name]["problems"] for row in rows if name in row)
            for name in ("reward.py", "DeepScaleR", "math-verify") if name in rows[0]}
    return ", ".join(f"{name} {share:.1%}" for name, share in best.items()) + f" for the best of {len(rows)}"


def ratios(rows):
    some = [row["predicted_over_simulated"] for row in rows]
    return f"{min(some):.2f} to {max(some):.2f} of the simulation in {len(some)} settings"


# what, results, and words about the rows of their sides, or a function of the rows
UPDATE = "{trl.times_ours:.1f} × as fast, {ours.memory_mb:,.0f} MiB instead of {trl.memory_mb:,.0f}"
HEAD = ("{ours.length:,} tokens: {ours.seconds:.0f} s and {ours.memory_mb:,.0f} MiB, TRL {trl.seconds:.0f} s "
        "and {trl.memory_mb:,.0f} MiB")
STEP = "{trl_hf.times_ours:.1f} × as fast, {trl_hf.times_ours_per_token:.1f} × per token"
GRADER = ("{nanoscaler.accuracy:.1%} ({math_verify.accuracy:.1%}) right, {nanoscaler.false_positives} "
          "({math_verify.false_positives}) wrong paid, {nanoscaler.answers_per_second:,.0f} "
          "({math_verify.answers_per_second:,.0f}) a second")
SUMMARY = [
    ("update of a random model of 1.6 M parameters / SmolLM2, beside TRL", "update update_smollm2", UPDATE),
    ("log-probs at a vocabulary of 151,936, beside TRL", "logprobs", HEAD),
    ("generation through vLLM, beside bare vLLM asked for the same: both models",
     "generate generate_smollm2", "{vllm.times_bare_same:.2f} ×"),
    ("generation by the torch engine, beside `generate`: both models", "generate generate_smollm2",
     "{torch.times_bare:.1f} ×"),
    ("whole step, beside TRL: both models", "step step_smollm2", STEP),
    ("grader (math-verify) on visible cases", "grader", GRADER),
    ("problems that pay for a lazy answer", "lazy", tricks),
    ("predicted memory of an update of the 1.5B model", "memory", ratios)]


def summary(results=measure.RESULTS):
    """The rows of SUMMARY for which there are numbers, as one Markdown table."""
    lines = ["what|result|file", "-|-|-"]
    for what, names, words in SUMMARY:
        said, files = [], []
        for name in names.split():
            with suppress(OSError, LookupError, AttributeError):  # a result or a side is missing
                rows = common.read_json(Path(results) / f"{name}.json")["rows"]
                said.append(words(rows) if callable(words) else words.format(**by_side(rows)))
                files.append(f"[{name}.json](bench/results/{name}.json)")
        lines += [f"{what}|{' / '.join(said)}|{', '.join(files)}"] if said else []
    return "\n".join(lines)


def by_side(rows):
    """{name of a side: its last row, with medians for spreads}."""
    return {row["side"].replace("-", "_"): SimpleNamespace(**{
        k: v["median"] if isinstance(v, dict) and "median" in v else v for k, v in row.items()})
        for row in rows if "error" not in row}


# ----- The two files ----------------------------------------------------------------------------------------

FILES = [(measure.ROOT / "bench" / "README.md", "<!-- tables -->", "<!-- end tables -->", sections),
         (measure.ROOT / "README.md", "<!-- measured -->", "<!-- end measured -->", summary)]


def main(write):
    """-> exit code: 1 if a file differs from its tables and is left so."""
    code = 0
    for path, start, end, make in FILES:
        text = path.read_text()
        before, _, rest = text.partition(start)
        new = f"{before}{start}\n{make().strip()}\n{end}{rest.partition(end)[2]}"
        if new != text and write:
            common.write_atomic(str(path), new)
        elif new != text:
            print(f"{path}: python bench/tables.py --write")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(write="--write" in sys.argv))
