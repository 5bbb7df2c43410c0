"""host.py - what a step of 1,024 samples costs outside of models: decode, grade, gather, pack, write.

    python bench/host.py          # samples of 4,500 tokens; a minute. With --quick 300 tokens, seconds

Fake samples: text of training problems, lognormal lengths, a box. gather joins two processes over gloo (as
many bytes come as with 8), pack is one rank's, and a step waits for both. decode and grade (one rank's
share) go on in a thread beside generation, write (rank 0's) in one beside the update: they cost a step as
much as they hold Python's lock, at most their seconds. Medians of three. The goal is 1 % of a step of 75 s.
"""
import multiprocessing
import tempfile
import timeit
from types import SimpleNamespace

import measure  # puts the project on the path
import numpy as np
import torch.distributed as dist
from tokenizers import ByteLevelBPETokenizer

import common
import data
import evaluate
import grpo
import policy
from rollout import Sample

RANKS, GROUP, STEP = 8, 8, 75.0  # of the run that is imitated; seconds of one of its steps


def make_samples(core, problems, mean):
    text, g = core.encode("\n".join(p.problem for p in problems)).ids, np.random.default_rng(0)
    for p in [p for p in problems for _ in range(GROUP)]:
        length = int(min(2 * mean, g.lognormal(np.log(mean) - 0.2, 0.7)))
        ids = np.resize(np.roll(text, -g.integers(len(text))), length).tolist()
        ids += core.encode(f"\n</think>\n\n\\boxed{{{p.answer}}}").ids
        logprobs = -g.exponential(0.3, len(ids)).astype(np.float32)
        yield Sample(core.encode(p.problem).ids, np.array(ids, np.int32), logprobs, "stop", core.decode(ids))


def seconds(work):
    return np.median(timeit.repeat(work, number=1, repeat=3))


def gather(rank, store, mine):  # in one process of two
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(store, 2))
    common.gather(0)  # connects
    return seconds(lambda: common.gather(mine))


def main():
    args = measure.parse("host")
    result = measure.Result(args.out, "host work of a step on 8 ranks")
    problems = data.load_problems(str(measure.ROOT / "assets" / "train.jsonl.gz"), limit=128)
    core = ByteLevelBPETokenizer()
    core.train_from_iterator([p.problem for p in problems], vocab_size=8000, show_progress=False)
    samples = list(make_samples(core, problems, 300 if args.quick else 4500))
    mine = [(problems[i // GROUP], samples[i]) for i in range(0, len(samples), RANKS)]
    grade = evaluate.load_reward(None, evaluate.load_style("r1"))
    log = SimpleNamespace(args=SimpleNamespace(reward=None, group=GROUP), first=True)
    parts = {
        "decode": seconds(lambda: [core.decode(s.response_ids.tolist()) for _, s in mine]),
        "grade": seconds(lambda: [grade(p, s) for p, s in mine]),
        "pack": seconds(lambda: [policy.pack([(s.prompt_ids, s.response_ids) for s in half],
                                             budget=32768, rank=0, world=RANKS)
                                 for half in (samples[:512], samples[512:])])}
    with tempfile.TemporaryDirectory() as log.args.out, multiprocessing.get_context("spawn").Pool(2) as pool:
        parts["write"] = seconds(lambda: grpo.Log.save_samples(log, 1, samples, problems, np.ones(1024)))
        halves = [(rank, f"{log.args.out}/store", samples[rank::2]) for rank in (0, 1)]
        parts["gather"] = max(pool.starmap(gather, halves, chunksize=1))
    parts["waited for"], parts["all"] = parts["pack"] + parts["gather"], sum(parts.values())
    for part, x in parts.items():
        result.add(part=part, seconds=x, share=x / STEP)


if __name__ == "__main__":
    main()
