"""Throughput of data.py: its steps one by one, and how its near-duplicate search grows from 5,000 to 40,000 problems.

    python bench/dedup.py --data SOURCE [--against assets/benchmarks/*.jsonl] [--work FOLDER] [--threads 2]

Prints two tables and writes bench/results/dedup.json. The steps are those of `data.py build` on the whole of SOURCE, in
its order, each timed once, embeddings at hand. SOURCE is anything `data.py build` reads; the
embeddings are kept in --work (the build's own work folder serves), so they are made once. Each size
runs in a process of its own, because peak memory can only be read per process; "memory" is the peak
beyond what the vectors and the interpreter take. The embedding rate is the best of three runs over 512
random rows.

What grows: embedding is linear and dominates; the search does N^2 / 2 cosines, so four times the work
for twice the rows, but only one 2,048 x 2,048 tile of them exists at a time (16 MB), whatever N is.

At 10 million rows, in this order. (1) Exact and 10-gram duplicates go first by hash, which is linear.
(2) Embedding takes days on two cores and less than an hour on one GPU. (3) The vectors are 15 GB in
float32, 7.7 GB in float16: on disk, read by blocks. (4) All pairs are 10^14 / 2 cosines, 4 x 10^16 FLOP:
with this very tiling about a week of two cores at the rate above, minutes of one GPU. Without a GPU,
cluster the vectors (k-means with some 3,000 centres) and search each row in its nearest ten cells: 300
times less work, at the price of some missed pairs, to be counted on a sample searched in full. (5)
"Kept before" is then decided in order of trust along the list of pairs found, which is short.
"""

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import harness as common  # noqa: E402
import data  # noqa: E402


def peak_mb():
    """Peak memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss is inherited from the parent process, this is not
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def seconds_of(function, *arguments):
    """How long one call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def steps(source, against, work, vectors):
    """The steps of data.build on one source -> (the rows read, [{step, rows, kept, seconds, rows_per_second}])."""
    tests, out = [t for b in against for t in data.load_problems(b)], []
    found = [data.parse_source(source, work / "hub")]
    of = lambda problems: vectors([p["problem"] for p in problems])

    def step(name, function, rows=()):
        start = time.perf_counter()
        kept, gone = function(rows)
        seconds = time.perf_counter() - start
        out.append({"step": name, "rows": len(rows) or len(kept) + len(gone), "kept": len(kept),
                    "seconds": round(seconds, 2), "rows_per_second": round((len(rows) or len(kept)) / seconds)})
        return kept

    first = rows = step("read", lambda _: data.read_sources(found, False))
    rows = step("answers out of solutions", lambda r: data.fill_answers(r, work), rows)
    rank = {s: k for k, s in enumerate(dict.fromkeys(r["source"] for r in rows))}
    rows = step("exact duplicates", lambda r: data.merge_exact(r, rank), rows)
    near = of(rows)
    rows = step("near duplicates", lambda r: data.merge_near(r, rank, near, 0.90), rows)
    if tests:
        left, theirs = of(rows), vectors([t.problem for t in tests])
        rows = step("benchmark problems", lambda r: data.decontaminate(r, tests, left, theirs, 0.90), rows)
    with tempfile.TemporaryDirectory() as fresh:  # or the grader's verdicts of an earlier build would serve
        step("gradable", lambda r: data.keep_gradable(r, Path(fresh)), rows)
    return first, out


def one_size(vectors_file, n):
    """Search the first n rows: a dict of seconds and memory."""
    vectors = np.array(np.load(vectors_file, mmap_mode="r")[:n])
    before, start = peak_mb(), time.perf_counter()
    match, _ = data.keep_first(vectors, 0.90)
    seconds = time.perf_counter() - start
    return {"rows": n, "pairs": n * (n - 1) // 2, "seconds": round(seconds, 2), "kept": int((match < 0).sum()),
            "extra_mb": round(peak_mb() - before), "vectors_mb": round(vectors.nbytes / 2**20),
            "all_pairs_would_be_mb": round(4 * n * n / 2**20)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="file of at least 40,000 problems")
    parser.add_argument("--against", nargs="*", default=[], help="benchmark files, as for data.py build")
    parser.add_argument("--work", default=".dedup.work", help="where embeddings are kept (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="*", default=[5000, 10000, 20000, 40000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results/dedup.json"))
    parser.add_argument("--one", nargs=2, metavar=("VECTORS", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(one_size(args.one[0], int(args.one[1]))))

    import torch
    import transformers
    torch.set_num_threads(args.threads)
    busy = common.busy_cores()
    name, embed = data.make_embedder("auto")
    embedded = lambda texts: data.cached_map(Path(args.work) / f"vectors-{data.digest(name)}", texts, embed, "embed")
    rows, timed = steps(args.data, args.against, Path(args.work), embedded)
    texts = [row["problem"] for row in rows]
    vectors = embedded(texts)
    vectors = vectors[np.random.default_rng(0).permutation(len(vectors))]
    file = Path(args.work) / "bench.npy"
    np.save(file, vectors)

    some = np.random.default_rng(1).choice(len(texts), min(512, len(texts)), replace=False)
    pick = sorted((texts[i] for i in some), key=len)
    rate = max(len(pick) / seconds_of(embed, pick) for _ in range(3))

    table = []
    for n in args.sizes:
        env = {"OMP_NUM_THREADS": str(args.threads), "OPENBLAS_NUM_THREADS": str(args.threads), "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, __file__, "--one", str(file), str(n)], env=env, check=True,
                              stdout=subprocess.PIPE, text=True)
        table.append(json.loads(done.stdout) | {"embedding_seconds_at_measured_rate": round(n / rate)})
    file.unlink()
    result = {"steps": timed, "table": table, "embedder": name, "embedded_rows_per_second": round(rate, 1),
              "threads": args.threads, "busy_cores_before": busy,
              "date": datetime.datetime.now().isoformat(timespec="minutes"), "commit": common.commit(),
              "machine": {"cpu": common.cpu_name(), "python": platform.python_version(), "numpy": np.__version__,
                          "torch": torch.__version__, "transformers": transformers.__version__}}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(data.table(["step", "rows", "kept", "seconds", "rows/s"], [tuple(t.values()) for t in timed]), end="\n\n")
    head = ["rows", "cosines", "search s", "memory MB", "vectors MB", "all pairs at once MB", "embedding s"]
    print(data.table(head, [
        (t["rows"], f"{t['pairs']:.1e}", t["seconds"], t["extra_mb"], t["vectors_mb"], t["all_pairs_would_be_mb"],
         t["embedding_seconds_at_measured_rate"]) for t in table]))


if __name__ == "__main__":
    main()
