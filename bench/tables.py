"""tables.py - all tables of bench/README.md, and the one of README.md, made from bench/results/*.json.

    python bench/tables.py              # name the files that say anything else, and exit with 1
    python bench/tables.py --write      # put the tables between the markers of the two files

A number that is not in a results file cannot get into a table. Medians; in brackets the range over
repetitions. A file of results that is not named here gets a table of all its numbers.
"""
import sys
from contextlib import suppress
from pathlib import Path

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


def flat(row):
    """{"staged": {"seconds": 1.0}} as {"staged seconds": 1.0}; spreads and shares stay what they are."""
    out = {}
    for k, v in row.items():
        inside = isinstance(v, dict) and not {"median", "paid"} & set(v)
        out |= {f"{k} {name}": x for name, x in v.items()} if inside else {k: v}
    return out


def table(rows, columns=None):
    """Rows as a Markdown table. columns: keys, default: all that `cell` knows. A side that failed says why in
    its last cell."""
    rows = [flat(row) for row in rows]
    known = dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, list))
    columns, lines = ["side", *columns.split()] if columns else list(known), []
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

def number(value):
    """The median of a spread, the share of problems that pay, any other value as it is."""
    if isinstance(value, dict):
        return value["median"] if "median" in value else value["paid"] / value["problems"]
    return value


def numbers(path):
    """What summary.md may name of a result: the last row of each side, or the spread of each column."""
    rows = [{k: number(v) for k, v in flat(row).items()} for row in common.read_json(path)["rows"]]
    if "side" in rows[0]:
        return {row["side"]: row for row in rows}
    names = [k for k, v in rows[0].items() if not isinstance(v, str)]
    return {k: measure.spread([row.get(k) for row in rows]) for k in names}


def summary(results=measure.RESULTS):
    """The lines of summary.md for which there are numbers, filled in."""
    known, lines = {f.stem: numbers(f) for f in Path(results).glob("*.json") if f.stem != "gpu"}, []
    for line in (measure.ROOT / "bench" / "summary.md").read_text().splitlines():
        with suppress(KeyError):  # a result or a side is missing
            lines.append(line.format(**known))
    return "\n".join(lines)


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
