"""gpu_correctness.py - is what we compute on a card right? Each fast path against its plain twin, with bounds.

    python bench/gpu_correctness.py  # one GPU, two minutes; writes bench/results/gpu_correctness.json
    python bench/gpu_correctness.py --size tiny --out X.json  # any machine, seconds; what CI runs

  attention   policy.varlen_attention, forward and backward, against one call a document and against fp64
  packed      log-probs and gradients of packed rows against one sequence a call, same weights
  head        token_logprobs in tiles against full logits, values and both gradients
  update      Run.pack, score, update (two mini-batches, KL, entropy bonus) on the card against the CPU in fp32:
              gradients and weights. In bf16 the gradients only: Adam turns their rounding into signs
  step        grpo.py itself, two whole steps with the torch engine in fp32, on the card against on the CPU: same
              responses, same metrics

Errors are norms of differences over norms of the fp64 (or fp32) result. Where two paths round in bf16, the fast one may
be off by twice what its twin is off, or by the floor, whichever is more. A check that fails, or does not run, makes the
exit status 1 and says what differed. Without a GPU the card's side is the CPU with other tiles, budgets and
recomputation.

The other gpu_*.py scripts take from here what they share: the random 1.5B model, the header, the result file.
"""
import argparse
import datetime
import gzip
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))
import harness as common  # noqa: E402

SHAPES = {  # Qwen2 shapes
    "r1-1.5b": dict(  # R1-Distill-Qwen-1.5B
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=131072),
    "width": dict(  # three of its layers
        vocab_size=16384, hidden_size=1536, intermediate_size=8960, num_hidden_layers=3, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=131072),
    "small": dict(vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=4096),
    "tiny": dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, max_position_embeddings=1024),
}
FLOOR = {"float32": 3e-5, "bfloat16": 1e-2}  # relative errors that rounding explains


# ---------------------------------------------------------------------------------------------------------------
# What the GPU scripts share
# ---------------------------------------------------------------------------------------------------------------

class Results:
    """A table that grows on the screen and on the disk: JSON is complete after every row, so a kill costs one row."""

    def __init__(self, what, args, columns):
        import torch
        self.cuda = torch.cuda.is_available()
        self.began, self.limit, self.columns, self.rows = time.time(), args.minutes * 60, columns, []
        self.path = args.out or (str(common.RESULTS / f"{args.name}.json") if self.cuda else None)
        self.head = {
            "what": what, "device": torch.cuda.get_device_name() if self.cuda else "cpu", "size": args.size,
            "date": datetime.datetime.now().isoformat(timespec="minutes"), "command": command(), "commit": commit(),
            "versions": common.versions() | ({"cuda": torch.version.cuda} if self.cuda else {}),
            "cpu": common.cpu_name(),
            "settings": {k: v for k, v in vars(args).items() if k not in ("worker", "out", "name")}}
        print("\n".join(f"{k}: {v}" for k, v in self.head.items() if k not in ("settings", "cpu")))
        print("| " + " | ".join(title for title, _, _ in columns) + " |", flush=True)

    def left(self):
        """Seconds until --minutes are over."""
        return self.limit - (time.time() - self.began)

    def add(self, row):
        self.rows.append(row)
        cells = [common.cell(row.get(key), form) for _, key, form in self.columns]
        print("| " + " | ".join(cells) + " |" + (f" {row['error']}" if "error" in row else ""), flush=True)
        self.save()

    def save(self, **more):
        """Write the file; `more` is added to it."""
        self.head |= more
        if self.path:
            import policy
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            policy.write_atomic(self.path, json.dumps(self.head | {
                "minutes": round((time.time() - self.began) / 60, 2), "rows": self.rows}, indent=1) + "\n")

    def finish(self, lines, **more):
        """The whole table once more, aligned, then `lines`, which the file keeps as well."""
        self.save(verdict=lines, **more)
        print()
        common.table(self.rows, self.columns)
        print("\n" + "\n".join(lines))
        print(f"written: {self.path}" if self.path else "no GPU here: not written (--out FILE writes it)")


def options(p, name, minutes):
    """Options every GPU script has."""
    p.add_argument("--size", choices=["card", "tiny"], default="card", help="tiny: seconds on a CPU, what CI runs")
    p.add_argument("--minutes", type=float, default=minutes, help="start nothing new after so many minutes")
    p.add_argument("--out", default=None,
                   help=f"JSON to write; default bench/results/{name}.json with a GPU, nothing without")
    p.set_defaults(name=name)


def command():
    """This command as one would type it in the repository; folders outside of it are nobody's business."""
    inside = lambda a: os.path.relpath(a, common.ROOT) if a.startswith(str(common.ROOT)) else os.path.basename(a)
    return "python " + shlex.join([inside(os.path.abspath(sys.argv[0])),
                                   *(inside(a) if os.path.isabs(a) else a for a in sys.argv[1:])])


def commit():
    """The commit of this folder, or what $COMMIT says where the copy came without git."""
    from rollout import provenance
    return os.environ.get("COMMIT") or provenance()["commit"]


def device_of(kind=None):
    import torch
    cuda = torch.cuda.is_available() if kind is None else kind == "cuda"
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")


def empty_model(shape):
    """A Qwen2 of this shape on the CPU, all zeros: drawing 1.8 billion random numbers there
    would take half a minute."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    config = Qwen2Config(**SHAPES[shape], rope_theta=10000.0, tie_word_embeddings=False, eos_token_id=0,
                         bos_token_id=None, pad_token_id=0, dtype=torch.float32)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its frequencies are no parameters
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


def fill(module, seed=0, std=0.02, same_everywhere=False):
    """Random weights, norms around 1, drawn on the device they live on; same_everywhere: drawn on the CPU, so that
    every device gets the same. One rank: the shard of a parameter is all of it."""
    import torch
    from torch.distributed.tensor import DTensor
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            local = p.to_local() if isinstance(p, DTensor) else p
            at = torch.device("cpu") if same_everywhere else local.device
            g = torch.Generator(device=at).manual_seed(1000 * seed + i)
            local.copy_(torch.empty(local.shape, device=at).normal_(float("norm" in name), std, generator=g))
    return module


def make_run(shape, device, dtype="float32", seed=0, std=0.02, compile="none", same_everywhere=False, **flags):
    """grpo.py's Run with a random policy and an optimizer but no engine, data or folder; its pack, score and update are
    the real ones. flags: grpo.py's options. compile: see compile_layers."""
    import torch
    import grpo
    import policy as policy_lib
    flags = {"model": "random", "recipe": "improved", "drop_zero_variance": 0, "eval_data": "none", "prompts": 2,
             **flags}
    args = grpo.parse_args([x for k, v in flags.items() for x in (f"--{k}", str(v))])
    args.dtype, args.recompute = dtype, max(0, args.recompute)
    run = grpo.Run(args)
    run.policy = policy_lib.Policy(empty_model(shape), recompute=bool(args.recompute), chunk=args.logit_chunk)
    compile_layers(run.policy, compile)
    if device.type == "cuda" or dtype != "float32":  # as in grpo.build_policy
        run.policy = run.policy.shard(getattr(torch, dtype), device)
    fill(run.policy, seed, std, same_everywhere)
    run.optimizer = torch.optim.AdamW(run.policy.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    return run


def compile_layers(policy, how):
    """"none"; "parts": the MLP and the norms of each layer, which is all the elementwise work but the rotary embedding,
    with no hook and no attention inside; "layers": each decoder layer as a whole. A suffix names a backend
    (layers:eager)."""
    how, _, backend = how.partition(":")
    if how not in ("none", "parts", "layers"):
        raise ValueError(f'compile must be "none", "parts" or "layers", not {how!r}')
    for layer in policy.model.base_model.layers if how != "none" else ():
        for module in ([layer] if how == "layers" else
                       [layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]):
            module.compile(dynamic=True, backend=backend or "inductor")


def join():
    """grpo.py's process group, once."""
    import torch.distributed as dist
    from rollout import join_processes
    if not dist.is_initialized():
        join_processes()


def alone():
    """The environment for a program that makes its own process group."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in group} | {"TOKENIZERS_PARALLELISM": "false"}


def leave():
    import torch.distributed as dist
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------
# The checks: each yields (what, case, error, bound)
# ---------------------------------------------------------------------------------------------------------------

def off(a, b):
    """|a - b| / |b| over all numbers, tensors or lists of tensors."""
    import torch
    flat = lambda x: torch.cat([t.detach().double().cpu().flatten()
                                for t in (x if isinstance(x, (list, tuple)) else [x])])
    a, b = flat(a), flat(b)
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def dense_attention(q, k, v, lengths, scale, window):
    """Every score, one mask: token i sees j of its own document, not after it, fewer than `window` before it."""
    import torch
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    i = torch.arange(len(doc), device=q.device)
    sees = (doc[:, None] == doc[None]) & (i[:, None] >= i[None]) & (i[:, None] - i[None] < (window or len(doc)))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~sees, float("-inf")).softmax(-1), v)


def check_attention(device, dtype, size):
    import torch
    import policy
    heads = ([(12, 2, 128, None), (9, 3, 64, None), (4, 4, 128, 100)] if size == "card" else
             [(6, 2, 32, None), (2, 2, 32, 5)])
    documents = [[300, 1, 17, 500, 128], [4096, 1, 1500, 2600]] if size == "card" else [[30, 1, 17, 50]]
    for hq, hkv, d, window in heads:
        for lengths in documents:
            torch.manual_seed(0)
            q, k, v, g = (torch.randn(sum(lengths), h, d, device=device).to(getattr(torch, dtype))
                          for h in (hq, hkv, hkv, hq))
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
            module = SimpleNamespace(head_dim=d)

            def fast(q, k, v):
                return policy.varlen_attention(module, *(x.transpose(0, 1)[None] for x in (q, k, v)),
                                               scaling=d ** -0.5, cu_seq_lens_q=bounds, max_length_q=max(lengths),
                                               sliding_window=window)[0][0]

            twin = lambda q, k, v: policy.document_attention(q, k, v, bounds, d ** -0.5, window)
            exact = twin if sum(lengths) > 2000 else (
                lambda q, k, v: dense_attention(q, k, v, lengths, d ** -0.5, window))

            def run(f, dtype):
                leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
                out = f(*leaves)
                return [out, *torch.autograd.grad(out, leaves, g.to(out.dtype))]

            truth, plain, ours = run(exact, torch.float64), run(twin, q.dtype), run(fast, q.dtype)
            case = (f"{hq}/{hkv} heads of {d}, {len(lengths)} documents, {sum(lengths)} tokens"
                    + f", window {window}" * bool(window))
            for name, t, p, o in zip(("out", "dq", "dk", "dv"), truth, plain, ours):
                yield f"attention {name}", case, off(o, t), max(2 * off(p, t), FLOOR[dtype])


def check_packed(device, dtype, size):
    import torch
    import policy as policy_lib
    shape, longest = ("width", 700) if size == "card" else ("tiny", 30)
    g, vocab = random.Random(1), SHAPES[shape]["vocab_size"]
    draw = lambda n: [g.randrange(vocab) for _ in range(n)]
    sequences = [(draw(g.randint(1, longest // 2)), draw(1 if i == 3 else g.randint(1, longest))) for i in range(7)]
    weight = torch.randn(sum(len(r) for _, r in sequences), generator=torch.Generator().manual_seed(0)).to(device)

    def run(policy, batches):
        """Log-probs in the order of `sequences`, and the gradient of a random weighted sum of them."""
        policy.zero_grad()
        logps, done = [], 0
        for batch in batches:
            logps.append(policy(batch, 0.6)[0])
            (logps[-1] * weight[done:done + len(logps[-1])]).sum().backward()
            done += len(logps[-1])
        return torch.cat(logps), gradients(policy)

    row = [policy_lib.pack_row(sequences, device=device)]
    alone = [policy_lib.pack_row([s], device=device) for s in sequences]
    make = lambda dtype: make_run(shape, device, dtype, std=0.05 if size == "tiny" else 0.02, logit_chunk=100,
                                  recompute=int(size == "card")).policy
    exact = make("float32")
    truth = run(exact, alone)
    del exact
    policy = make(dtype)
    for name, t, p, o in zip(("log-probs", "gradients"), truth, run(policy, alone), run(policy, row)):
        yield (f"packed {name}", f"{shape}, 7 sequences, {len(row[0].ids)} tokens", off(o, t),
               max(2 * off(p, t), FLOOR[dtype]))


def gradients(policy):
    """Copies on the CPU, in fp32."""
    from torch.distributed.tensor import DTensor
    return [(p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad).detach().float().cpu().clone()
            for p in policy.parameters()]


def check_head(device, dtype, size):
    import torch
    import policy
    t, h, v, chunk = (1200, 1536, 151936, 500) if size == "card" else (50, 64, 300, 16)
    torch.manual_seed(0)
    hidden = torch.randn(t, h, device=device).to(getattr(torch, dtype))
    weight = (torch.randn(v, h, device=device) * 2 / h ** 0.5).to(hidden.dtype)
    targets, g = torch.randint(v, (t,), device=device), torch.randn(2, t, device=device)

    def run(f, dtype):
        a, b = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
        out = f(a, b)
        return [*out, *torch.autograd.grad(out, (a, b), [x.to(out[0].dtype) for x in g])]

    exact = run(lambda a, b: exact_head(a, b, targets, 0.6), torch.float64)
    plain = run(lambda a, b: policy.token_logprobs_plain(a, b, targets, 0.6), hidden.dtype)
    ours = run(lambda a, b: policy.token_logprobs(a, b, targets, 0.6, chunk), hidden.dtype)
    for name, e, p, o in zip(("log-probs", "entropy", "d hidden", "d weight"), exact, plain, ours):
        yield (f"head {name}", f"{t} tokens, vocabulary {v}, tiles of {chunk}", off(o, e),
               max(2 * off(p, e), FLOOR[dtype]))


def exact_head(hidden, weight, targets, temperature):
    """Full logits in the precision of the inputs."""
    import torch
    logp = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def one_update(device, dtype, size, **other):
    """Two mini-batches of two groups -> gradients before each optimizer step, change of the weights, statistics."""
    import torch
    import grpo
    from rollout import Sample
    shape, mean, cap = ("small", 150, 400) if size == "card" else ("tiny", 12, 30)
    make = lambda seed: make_run(shape, device, dtype, seed=seed, std=0.05, same_everywhere=True, lr=1e-4, prompts=4,
                                 group=4, temperature=0.6, updates=2, max_len=cap, kl_coef=0.01, entropy_coef=0.01,
                                 **other)
    run, reference = make(0), make(1).policy
    with tempfile.TemporaryDirectory() as folder:
        common.rollouts(Path(folder) / "r", SHAPES[shape]["vocab_size"], 4, 4, mean, cap, 8)
        rows = common.read_rollouts(Path(folder) / "r")
    samples = [Sample(r["prompt"], r["response"], r["logprobs"], r["finish_reason"]) for r in rows]
    before, seen, stats = weights(run.policy), [], []
    run.optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(run.policy)))
    advantages = grpo.group_advantages(torch.tensor([r["reward"] for r in rows]).view(4, 4))
    minibatches = [run.pack(samples, advantages, p) for p in torch.arange(4).chunk(2)]
    for mini in minibatches:
        run.score(run.policy, mini, "old_logp")
        run.score(reference, mini, "ref_logp")
    for mini in minibatches:
        stats.append(Counter())
        run.update(mini, stats[-1])
    numbers = [[float(s[k]) for k in ("entropy", "kl_ref", "grad_norm", "ratio", "tokens")] for s in stats]
    return seen, [b - a for a, b in zip(before, weights(run.policy))], torch.tensor(numbers)


def weights(policy):
    """Copies on the CPU."""
    from torch.distributed.tensor import DTensor
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().float().cpu().clone() for p in policy.parameters()]


def check_update(device, dtype, size):
    import torch
    case = f"{'small' if size == 'card' else 'tiny'}, two mini-batches, against fp32 on the CPU"
    truth = one_update(torch.device("cpu"), "float32", size, token_budget=4000)
    ours = one_update(device, dtype, size, token_budget=1000 if size == "card" else 90, recompute=1, logit_chunk=37)
    exact = dtype == "float32"
    for i, name in enumerate(("first", "second")):
        yield f"update gradients, {name}", case, off(ours[0][i], truth[0][i]), 1e-3 if exact else 0.1
        yield f"update statistics, {name}", case, off(ours[2][i], truth[2][i]), 1e-4 if exact else 0.02
    if exact:
        yield "update change of weights", case, off(ours[1], truth[1]), 0.03


def check_step(device, dtype, size):
    """grpo.py as a program. Its random numbers depend on (seed, step, problem, sample) alone, so
    sides can be compared."""
    if dtype != "float32":
        return
    cap, prompts = (80, 16) if size == "card" else (24, 4)
    with tempfile.TemporaryDirectory() as folder:
        folder, g = Path(folder), random.Random(0)
        shape = dict(stops=50) if size == "card" else dict(vocab=256, hidden=64, layers=2, stops=3)
        model, problems = common.tiny_model(folder / "model", **shape), folder / "problems.jsonl"
        problems.write_text("".join(
            json.dumps({"id": str(i), "problem": "".join(g.choices(common.LETTERS, k=20)),
                        "answer": str(i % 2)}) + "\n"
            for i in range(2 * prompts)))

        def run(name, visible, *more):
            line = [sys.executable, str(common.ROOT / "grpo.py"), "--model", model, "--data", str(problems),
                    "--out", str(folder / name), "--recipe", "improved", "--style", "plain", "--no_chat",
                    "--eval_data", "none", "--show_every", "0", "--engine", "torch", "--dtype", "float32",
                    "--steps", "2", "--prompts", str(prompts), "--group", "4", "--max_len", str(cap), "--lr", "1e-3",
                    *more]
            done = subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
                                  env=alone() | ({} if visible else {"CUDA_VISIBLE_DEVICES": ""}))
            if done.returncode:
                raise RuntimeError(f"grpo.py on {name}: {done.stderr.strip().splitlines()[-1][:200]}")
            rows = [json.loads(r) for n in (1, 2)
                    for r in gzip.open(folder / name / "rollouts" / f"{n:06d}.jsonl.gz", "rt")]
            return [json.loads(m) for m in (folder / name / "metrics.jsonl").read_text().splitlines()], rows

        metrics, rows = run("cpu", False)
        other, same = run("card", True, "--recompute", "1", "--token_budget", "300" if size == "card" else "100",
                          "--logit_chunk", "37")
    case = f"two steps of {prompts} x 4 samples, torch engine"
    yield ("step responses that differ", case,
           sum(a["response"] != b["response"] for a, b in zip(rows, same, strict=True)) / len(rows), 0.0)
    names = ("reward", "length_mean", "pg_loss", "entropy", "grad_norm", "approx_kl", "tokens_trained")
    yield ("step metrics", case,
           max(abs(a[n] - b[n]) / max(abs(a[n]), 0.01) for a, b in zip(metrics, other, strict=True) for n in names),
           2e-3)
    yield "step KL(engine, trainer)", case, max(abs(m["mismatch_kl"]) for m in other), 1e-7


CHECKS = {"attention": check_attention, "packed": check_packed, "head": check_head, "update": check_update,
          "step": check_step}


# ---------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------

def attention_path(device, dtype):
    """What policy.varlen_attention will call."""
    import policy
    kernel = device.type == "cuda" and policy.varlen_attn is not None and dtype != "float32"
    return "torch varlen_attn" if kernel else "SDPA, padded batches"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(p, "gpu_correctness", 5)
    p.add_argument("--checks", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="which")
    p.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"],
                   help="precisions")
    args = p.parse_args(argv)
    join()
    device = device_of()
    results = Results("correctness on one device", args, [
        ("check", "check", ""), ("dtype", "dtype", ""), ("case", "case", ""),
        ("error", "off", ".1e"), ("bound", "bound", ".1e"), ("verdict", "verdict", "")])
    results.head["attention"] = {t: attention_path(device, t) for t in args.dtypes}
    for name in args.checks:
        for dtype in args.dtypes:
            if results.left() < 0:
                results.add({"check": name, "dtype": dtype, "case": "--minutes were over", "verdict": "not run"})
                continue
            try:
                for what, case, error, bound in CHECKS[name](device, dtype, args.size):
                    results.add({"check": what, "dtype": dtype, "case": case, "off": error, "bound": bound,
                                 "verdict": "ok" if error <= bound else "WRONG"})  # a NaN is not <= anything
            except Exception as e:  # one path that does not run must not hide what the others say
                results.add({"check": name, "dtype": dtype,
                             "case": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}", "verdict": "FAILED"})
    bad = [f"{r['check']} {r['dtype']}: {r['verdict']} ({r['case']}, error {common.cell(r.get('off'), '.1e')}, "
           f"bound {common.cell(r.get('bound'), '.1e')})" for r in results.rows if r["verdict"] != "ok"]
    results.finish([*bad, f"{len(results.rows) - len(bad)} of {len(results.rows)} checks passed"])
    leave()
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
