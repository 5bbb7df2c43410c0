"""gpu.py - the proof on one GPU: is it right, how fast is it, does the predicted memory hold, does it learn?

    python bench/gpu.py                                    # all parts, meant for 14 minutes on one H100
    python bench/gpu.py correctness update                 # some of them, each at most --minutes
    python bench/gpu.py --device cpu --tiny --out X.json   # the same code anywhere, which claims nothing

The 1.5B model has the shape of R1-Distill-Qwen-1.5B and random weights: what they say changes no time. Of
its tokens 35 end a text, so lengths are geometric with a mean near 4,000. Every part is a process of its
own, and every result is in the JSON at once: what breaks or is stopped costs its own rows. A result with a
bound is "ok" or "WRONG"; one that is wrong, or a part that fails, makes the exit status 1. Without vLLM, or
with one that does not start (a row says why), the torch engine generates.
"""
import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import generate
import measure  # puts the project on the path
import torch
import update as training
from torch.distributed.tensor import DTensor

import grpo
import policy as policy_lib
import predict
import rollout

TINY = measure.TINY | {"layers": 2, "hidden": 64, "mlp": 96, "q": 64, "kv": 32, "vocab": 300, "tied": False}
BOUND = {"float32": 1e-4, "bfloat16": 2e-2}  # relative errors that rounding explains
SIZES = {
    "card": {"small": predict.SHAPE | {"layers": 3}, "big": predict.SHAPE, "stops": 35, "spread": 0.02,
             "heads": [(12, 2, 128, None), (4, 4, 128, 100)], "head": (1200, 1536, 500), "longest": 700,
             "match": (8, 100, 384),
             "rollouts": {"prompts": 3, "group": 8, "mean": 4500, "max_len": 7900, "prompt_len": 120},
             "update": [(8192, 1), (16384, 1), (24576, 1), (32768, 1), (8192, 0), (16384, 0)],
             "short": (16, 8, 130, 1024), "share": (16, 8, 130, 8192),  # problems, samples, prompt, response
             "step": {"prompts": 16, "group": 8, "max_len": 8192, "steps": 2, "updates": 2},
             "learn": {"prompts": 128, "group": 16, "max_len": 192, "steps": 60, "lr": 3e-4}},
    "tiny": {"small": TINY, "big": TINY, "stops": 3, "spread": 0.1,
             "heads": [(4, 2, 32, None), (2, 2, 32, 5)], "head": (50, 64, 16), "longest": 30,
             "match": (3, 8, 24),
             "rollouts": {"prompts": 2, "group": 4, "mean": 20, "max_len": 48, "prompt_len": 8},
             "update": [(64, 1), (64, 0)], "short": (3, 2, 8, 16), "share": (3, 2, 8, 48),
             "step": {"prompts": 4, "group": 4, "max_len": 24, "steps": 2, "updates": 2},
             "learn": {"prompts": 8, "group": 8, "max_len": 8, "steps": 20, "lr": 3e-3}}}


# ----- What the parts share ---------------------------------------------------------------------------------

def random_model(args, shape):
    """Folder of a random Qwen2 in bf16, made on the device."""
    folder = Path(args.work) / f"{'tiny' if args.tiny else 'card'}-{shape}"
    measure.random_model(folder, args.size[shape], args.size["stops"], args.device, "bfloat16",
                         args.size["spread"])
    forget_memory()
    return str(folder)


def prompts_of(args, problems, group, length):
    """`group` copies of each of `problems` prompts of about `length` random ids."""
    return [s.prompt_ids for s in measure.rollouts(args.size["big"]["vocab"], problems, group, 1, 1, length)]


def first_that_works(args, report, work):
    """work(name of an engine) with vLLM, else with torch -> what it returned; a row says what failed."""
    for name in ["vllm", "torch"] if args.engine == "auto" else [args.engine]:
        began = time.time()
        try:
            value = work(name)
        except RuntimeError as e:  # a RankError as well
            report.add(f"{name} fails", error_text=str(e)[:300])
        else:
            report.add("engine", engine=name, seconds=time.time() - began)
            return value
    raise RuntimeError("no engine works")


def off(a, b):
    """|a - b| / |b| over all numbers of two lists of tensors."""
    a, b = (torch.cat([t.detach().double().cpu().flatten() for t in x]) for x in (a, b))
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def set_recompute(policy, on):
    policy.model.gradient_checkpointing_disable()
    if on:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})


def seconds_of(work):
    """Seconds of work(), with what a GPU does behind Python's back."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.time()
    work()
    wait()
    return time.time() - began


def forget_memory():
    """Give a card's unused memory back, and forget its peak."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ----- correctness ------------------------------------------------------------------------------------------

def correctness(args, report):
    """Attention and head against float64; a whole model against the CPU in fp32: packed = separate, shared
    prompts, recomputation, bf16 gradients; engine against trainer, seeds, stop, finish reasons."""
    device = measure.join()
    check_kernels(args, report, device)
    check_model(args, report, device)
    check_engine(args, report)


def check_twin(report, what, dtype, names, ours, plain, inputs):
    """ours(*inputs) in `dtype` against plain(*inputs) in float64, outputs and gradients of the inputs."""
    up, results, rounded = None, [], [x.to(getattr(torch, dtype)) for x in inputs]
    for function, kind in ((ours, rounded[0].dtype), (plain, torch.float64)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in rounded]
        out = function(*leaves)
        up = up or [torch.randn_like(x) for x in out]
        results.append([*out, *torch.autograd.grad(out, leaves, [u.to(o) for u, o in zip(up, out)])])
    for name, a, b in zip(names, *results):
        report.add(f"{what}: {name}", BOUND[dtype], error=off([a], [b]), dtype=dtype)
    forget_memory()


def check_kernels(args, report, device):
    """policy.py's head and attention; in float64 attention takes the plain path, see test_policy.py."""
    (tokens, hidden, chunk), vocab = args.size["head"], args.size["big"]["vocab"]
    torch.manual_seed(0)
    y = torch.randint(vocab, (tokens,), device=device)
    head = [torch.randn(n, hidden, device=device) for n in (tokens, vocab)]
    head[1] *= 2 / hidden ** 0.5
    batch = policy_lib.pack_row(sequences(args), device=device)
    for dtype in BOUND:
        check_twin(report, "head", dtype, ("log-probs", "entropy", "d hidden", "d weight"),
                   lambda h, w: policy_lib.token_logprobs(h, w, y, 0.6, chunk),
                   lambda h, w: policy_lib.token_logprobs_plain(h, w, y, 0.6), head)
        for hq, hkv, width, window in args.size["heads"]:
            def attention(q, k, v, width=width, window=window):
                module = SimpleNamespace(head_dim=width)
                return policy_lib.varlen_attention(module, q, k, v, sliding_window=window, packing=batch)[:1]

            qkv = [torch.randn(1, h, len(batch.ids), width, device=device) for h in (hq, hkv, hkv)]
            check_twin(report, f"attention, {hq} and {hkv} heads of {width}, window {window}", dtype,
                       ("out", "dq", "dk", "dv"), attention, attention, qkv)


def sequences(args):
    """[(prompt, response)] of very uneven lengths: two share a prompt, one has a response of one token."""
    n, g = args.size["longest"], torch.Generator().manual_seed(1)
    ids = [torch.randint(args.size["big"]["vocab"], (size,), generator=g).tolist()
           for size in (n // 3, n, n // 2, n // 9, 1, 1, n // 2, n // 4, n)]
    return [(ids[0], ids[1]), (ids[0], ids[2]), (ids[3], ids[4]), (ids[5], ids[6]), (ids[7], ids[8])]


def check_model(args, report, device):
    """Log-probs and gradients of a whole model: one sequence at a time on the CPU in fp32 is the truth."""
    folder, these = random_model(args, "small"), sequences(args)
    weight = torch.randn(sum(len(r) for _, r in these), generator=torch.Generator().manual_seed(0))

    def run(policy, rows, recompute=False):
        set_recompute(policy, recompute)
        policy.zero_grad()
        logps, done = [], 0
        for row in rows:
            logp, _ = policy(policy_lib.pack_row(row, device=policy.device), 0.6)
            (logp * weight[done:done + len(logp)].to(logp.device)).sum().backward()
            logps.append(logp.detach())
            done += len(logp)
        return logps, [local(p.grad).float().cpu() for p in policy.parameters()]

    alone, packed = [[s] for s in these], [these]
    exact = measure.make_learner(folder, 0, torch.device("cpu"), dtype="float32", recompute=0).policy
    truth = run(exact, alone)
    for dtype, bounds in (("float32", (5e-4, 5e-4)), ("bfloat16", (2e-2, 0.15))):
        policy = measure.make_learner(folder, 0, dtype=dtype, recompute=0).policy
        for case, rows in (("one at a time", alone), ("packed", packed), ("recomputed", packed)):
            errors = list(map(off, run(policy, rows, case == "recomputed"), truth))
            for name, error, bound in zip(("log-probs", "gradients"), errors, bounds):
                report.add(f"model, {case}: {name}", bound, error=error, dtype=dtype)
            if rows is alone:  # packing may not cost more than rounding does
                bounds = [min(b, max(2 * e, BOUND[dtype])) for b, e in zip(bounds, errors)]
        del policy
        forget_memory()


def check_engine(args, report):
    """Mean KL(engine || trainer) on sampled tokens after everything that training does to the two."""
    folder, (problems, length, limit) = random_model(args, "small"), args.size["match"]
    engine = first_that_works(args, report, lambda name: rollout.make_engine(
        name, folder, max_model_len=2 * length + limit, dtype="auto", device=measure.join(), gpu_memory=0.3,
        enable_sleep=True))
    engine.sleep()
    learner = measure.make_learner(folder, 16 * (length + limit), prompts=problems, group=4, updates=1,
                                   max_len=limit, temperature=0.6)
    policy, sampling = learner.policy, rollout.Sampling(temperature=0.6, max_tokens=limit)
    prompts = prompts_of(args, problems, 4, length)

    def sample(stop=None):
        return engine.generate(prompts, list(range(len(prompts))), sampling, stop=stop)

    def kl():
        micro, tokens = learner.pack(sample(), torch.ones(problems, 4), torch.arange(problems))
        scores = zip(learner.score(policy, (micro, tokens)), micro)
        return sum(float(grpo.mismatch(s, logp)["mismatch_kl"]) for s, (_, _, logp) in scores) / tokens

    dtype, bound = learner.args.dtype, grpo.MISMATCH[learner.args.dtype][0]
    engine.push(policy.full_weights())
    engine.wake()
    report.add("KL(engine, trainer), first push", bound, error=kl(), dtype=dtype)
    engine.sleep(keep_weights=True)
    engine.wake()
    report.add("KL, after a sleep that kept the weights", bound, error=kl())
    for name, only in (("all weights", ""), ("the head", "lm_head")):
        with torch.no_grad():
            for parameter, p in policy.named_parameters():
                if only in parameter:
                    local(p).mul_(1 + 0.3 * torch.randn_like(local(p)))
        stale = kl()
        engine.sleep()
        engine.push(policy.full_weights())
        engine.wake()
        fresh = kl()
        report.add(f"KL, {name} changed, slept, pushed", bound, error=fresh)
        report.add(f"KL, {name} changed: as a share of stale weights'", 0.1, error=fresh / stale, stale=stale)
    first, again = sample(), sample()  # both find their prompts in the prefix cache
    differ = [float(a.response_ids.tolist() != b.response_ids.tolist()) for a, b in zip(first, again)]
    wrong = [float((s.finish_reason == "stop") != (s.response_ids[-1] < args.size["stops"])) for s in first]
    report.add("same seeds: share of samples that differ", 0.0 if dtype == "float32" else 0.5,
               error=statistics.mean(differ))
    report.add("finish reasons: share that is wrong", 0.0, error=statistics.mean(wrong))
    report.add("stop() ends a generation, the next one is whole", 0.0,
               error=float(sample(stop=lambda: True) is not None or None in sample()))
    engine.close()


# ----- Speed and memory -------------------------------------------------------------------------------------

def update(args, report):
    """Updates of the big model on samples as an 8K step has them, from samples in hand to the optimizer's
    step. MFU counts three forwards of the packed tokens, not what recomputation repeats. Peak memory must be
    0.9 to 1 of what schedule.py --dry_run predicts."""
    folder, shape = random_model(args, "big"), args.size["rollouts"]
    samples = measure.rollouts(300, **shape)
    options = {name: shape[name] for name in ("prompts", "group", "max_len")}
    learner = measure.make_learner(folder, 0, updates=1, lr=1e-6, **options)
    m = predict.model_shape(folder)
    card = predict.card(SimpleNamespace(gpu_type=None, gpu_memory_gib=0.0, gpu_price=None))

    def work():
        return training.updates(learner, samples, training.rewards_of(samples, shape))

    for budget, recompute in args.size["update"]:
        case = {"budget": budget, "recompute": recompute}
        learner.task.budget = learner.args.token_budget = budget
        learner.args.recompute = recompute
        set_recompute(learner.policy, recompute)
        try:
            [(micro, tokens)], _ = work()  # it warms up, and the first of all makes Adam's moments
            forget_memory()
            seconds = min(seconds_of(work) for _ in range(2))
        except torch.OutOfMemoryError as e:
            report.add("update", **case, error_text=str(e)[:200])
            learner.optimizer.zero_grad()
            continue
        documents = torch.cat([batch.cu_seqlens.diff() for batch, _, _ in micro]).double()
        packed = sum(len(batch.ids) for batch, _, _ in micro)  # tokens, a shared prompt once
        operations = 3 * predict.forward_flops(m, packed, float((documents**2).sum()), tokens)
        p = predict.predict_memory(m, vars(learner.args), 80.0, 1)
        predicted = p["weights + gradients + Adam"] + p["update"]
        numbers = {"seconds": seconds, "tokens_per_second": documents.sum().item() / seconds,
                   "tflops": operations / seconds / 1e12, "predicted_gib": predicted}
        if args.device == "cuda":  # elsewhere a process is more than its tensors: nothing to compare
            peak = torch.cuda.max_memory_allocated() / 2**30
            numbers |= {"mfu": numbers["tflops"] / card[2], "peak_gib": peak, "bound": 0.05,
                        "error": abs(peak / predicted - 0.95)}
        report.add("update", **case, **numbers)


def generation(args, report):
    """Seconds to start, sleep, push and wake; tokens a second of 1K responses beside bare vLLM, and of one
    GPU's share of an 8K step."""
    folder, card = random_model(args, "big"), args.device == "cuda"
    engine = first_that_works(args, report, lambda name: rollout.make_engine(
        name, folder, max_model_len=2 * args.size["share"][2] + args.size["share"][3], dtype="auto",
        device=measure.join(), max_seqs=256, enable_sleep=True))
    weights = dict(policy_lib.Policy(folder).to(args.device).full_weights())
    for what, action in (("sleep, weights dropped", engine.sleep),
                         ("push", lambda: engine.push(weights.items())), ("wake", engine.wake),
                         ("sleep, weights kept", lambda: engine.sleep(True)), ("wake", engine.wake)):
        before = torch.cuda.mem_get_info()[0] if card else 0
        seconds = seconds_of(action)
        freed = (torch.cuda.mem_get_info()[0] - before) / 2**30 if card else None
        report.add(what, seconds=seconds, freed_gib=freed)
    ways = {engine.name: generate.ours(engine)}
    if engine.name == "vllm":
        ways |= {"bare vLLM": generate.bare_vllm(engine, False),
                 "bare vLLM, seeds and log-probs": generate.bare_vllm(engine, True)}
    for what, some, turns in (("short", ways, 2), ("share", {engine.name: ways[engine.name]}, 1)):
        problems, group, length, limit = args.size[what]
        spec = {"prompts": prompts_of(args, problems, 1, length), "group": group, "max_len": limit}
        for name, rows in generate.measured(spec, some, turns)["parts"].items():
            for row in rows:
                report.add(what, engine=name, prompt=length, limit=limit, seconds=row["seconds"],
                           tokens_per_second=row["tokens"] / row["seconds"], samples=row["samples"],
                           length_mean=row["length_mean"])
    engine.close()


# ----- grpo.py itself ---------------------------------------------------------------------------------------

def step(args, report):
    """grpo.py itself on the big model: seconds of each phase, engine against trainer."""
    shape = args.size["step"]
    problems = measure.random_problems(Path(args.work) / "problems.jsonl", 2 * shape["prompts"])
    bound, _ = grpo.MISMATCH[grpo.compute_dtype("auto", args.device)]
    for m in run_grpo(args, report, model=random_model(args, "big"), data=problems, style="plain",
                      no_chat=True, **shape):
        shown = [k for k in m if k.startswith(("seconds", "tokens", "length_mean", "grad_norm", "memory"))]
        report.add(f"step {m['step']}, KL(engine, trainer)", bound, error=m["mismatch_kl"],
                   **{k: m[k] for k in shown})


def learn(args, report):
    """grpo.py on the toy problems for some minutes: the reward of the last tenth of the run must be above
    that of the first by two standard errors."""
    toy = measure.ROOT / "toy"
    options = {"model": toy / "model", "data": toy / "train.jsonl.gz"}
    if args.tiny:  # a random model learns to box the one right answer
        model = measure.random_model(Path(args.work) / "learn", TINY, stops=3)
        options = {"model": model, "style": "plain", "no_chat": True,
                   "data": measure.random_problems(Path(args.work) / "ones.jsonl", 16, ["1"])}
    lines = run_grpo(args, report, 60 * args.minutes - 90, updates=1, drop_zero_variance=1, **options,
                     **args.size["learn"])
    if len(lines) < 20:
        raise RuntimeError(f"only {len(lines)} steps in the time, 20 are needed")
    rewards, tenth = [m["reward"] for m in lines], len(lines) // 10
    first, last = rewards[:tenth], rewards[-tenth:]
    noise = sum(statistics.variance(x) / tenth for x in (first, last)) ** 0.5
    report.add("reward of the first tenth plus two standard errors, above that of the last", 0.0,
               error=statistics.mean(first) + 2 * noise - statistics.mean(last), steps=len(lines),
               first=statistics.mean(first), last=statistics.mean(last), skipped=lines[-1]["updates_skipped"],
               seconds_step=statistics.median(m["seconds"] for m in lines), rewards=rewards)


def run_grpo(args, report, seconds=None, **options):
    """grpo.py in a new folder, asked to stop after so many seconds -> its lines of metrics.jsonl."""
    def work(engine):
        out = Path(args.work) / f"run-{report.part}-{time.time_ns()}"
        return measure.run_grpo({**options, "engine": engine, "out": out}, seconds)

    return first_that_works(args, report, work)


# ----- The script -------------------------------------------------------------------------------------------

PARTS = {"correctness": correctness, "update": update, "generation": generation, "step": step, "learn": learn}


def run_part(part, args):
    """One part in this process -> whether all its results are right."""
    report = measure.Result(args.out, part, part, timed=False)
    try:
        PARTS[part](args, report)
    except Exception as e:  # noqa: BLE001  the parts behind it still run
        report.add("FAILED", error_text=" ".join(f"{type(e).__name__}: {e}".split())[:300])
    forget_memory()
    return not any(row.get("verdict") == "WRONG" or row["what"] == "FAILED" for row in report.rows)


def start_part(part, args):
    """One part in a process of its own, at most --minutes -> whether all its results are right."""
    words = [word for word in sys.argv[1:] if word not in PARTS]
    process = subprocess.Popen([sys.executable, __file__, *words, part, "--worker"], start_new_session=True)
    try:
        return not process.wait(60 * args.minutes)
    except subprocess.TimeoutExpired:
        print(f"{part}: stopped after {args.minutes:g} minutes; its results so far are in {args.out}")
        return False
    finally:  # and the programs that it started
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: where the same code runs")
    add("--tiny", action="store_true", help="sizes that take a CPU seconds")
    add("--engine", choices=["auto", "vllm", "torch"], default="auto", help="auto: vLLM if it runs")
    add("--minutes", type=float, default=7, help="longest time of a part")
    add("--out", default=str(measure.RESULTS / "gpu.json"), help="JSON that results are added to")
    add("--work", default=str(measure.WORK / "gpu"), help="folder for the random models and runs")
    add("--worker", action="store_true", help="internal: run the parts in this process")
    args = p.parse_args(argv)
    if unknown := [part for part in args.parts if part not in PARTS]:
        p.error(f"there is no part {unknown[0]}: {', '.join(PARTS)}")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        p.error("there is no GPU here; --device cpu --tiny runs the same code")
    args.size, run = SIZES["tiny" if args.tiny else "card"], run_part if args.worker else start_part
    Path(args.work).mkdir(parents=True, exist_ok=True)
    return int(sum(not run(part, args) for part in args.parts or PARTS) > 0)


if __name__ == "__main__":
    sys.exit(main())
