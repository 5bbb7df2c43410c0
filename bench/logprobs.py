"""logprobs.py - the head: log-prob and entropy of each token and their backward, at a vocabulary of 151,936.

    python bench/logprobs.py --peer_python PEERS/bin/python          # 8K and 24K tokens, hidden 512: an hour
    python bench/logprobs.py --lengths 8192 --hidden 1536 --dtype bfloat16
    python bench/logprobs.py --quick                                 # seconds

  ours     policy.token_logprobs, tiles of --chunk tokens
  full     log_softmax over all logits: what the tiles replace; refused where memory does not suffice
  trl      trl.kernels.chunked_logprob, its own chunk size (Triton on a GPU, torch on a CPU)
  verl     verl's FusedLinearForPPO, its own chunk size (512 tokens)
  limit    the four matmuls no version without stored logits can avoid (logits, logits again, d hidden, d
           head), into buffers that exist already, and nothing else

All get the same hidden states, head, targets and gradient of the log-probs; entropy is computed, and not
differentiated (the recipe's `improved` setting). Then, `--model_length` tokens in one sequence through 2
layers of hidden 512 with an untied head: ours, and TRL's fused head on the same model. Checked against ours:
mean log-prob, mean entropy and the norms of both gradients.
"""
import argparse
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

TEMPERATURE = 0.6


# ----- The sides -------------------------------------------------------------------------------------------

def inputs(spec):
    """hidden [T, H] and head [V, H] with gradient, targets [T], gradient of the log-probs [T]."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, spec["dtype"])
    g = torch.Generator().manual_seed(spec["seed"])
    hidden = torch.randn(spec["length"], spec["hidden"], generator=g)
    head = torch.randn(spec["vocab"], spec["hidden"], generator=g) / spec["hidden"] ** 0.5
    targets = torch.randint(0, spec["vocab"], (spec["length"],), generator=g)
    weight = torch.randn(spec["length"], generator=g) / spec["length"]
    hidden, head = (x.to(device, dtype).requires_grad_() for x in (hidden, head))
    return hidden, head, targets.to(device), weight.to(device)


def run(spec, function):
    """Time function(hidden, head, targets) -> (logp, entropy), and its backward."""
    hidden, head, targets, weight = inputs(spec)
    logp, _ = function(hidden[:8], head, targets[:8])
    logp.sum().backward()
    hidden.grad = head.grad = None
    del logp
    with measure.meter() as m:
        logp, entropy = function(hidden, head, targets)
        (logp * weight).sum().backward()
    return m.answer(logp=logp.mean().item(), entropy=entropy.float().mean().item(),
                    grad_hidden=hidden.grad.float().norm().item(), grad_head=head.grad.float().norm().item())


def ours(spec):
    from policy import token_logprobs
    return run(spec, lambda h, w, y: token_logprobs(h, w, y, TEMPERATURE, spec["chunk"], entropy_grad=False))


def full(spec):
    copies = 5  # in fp32, at the peak
    measure.refuse_if_too_big(copies * 4 * spec["length"] * spec["vocab"] / 2**30, "full logits")

    def function(hidden, head, targets):
        logprobs = torch.log_softmax((hidden @ head.T).float() / TEMPERATURE, -1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy
    return run(spec, function)


def trl(spec):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    def head(h, w, y):
        return ChunkedLogProbFunction.apply(h, w, None, y, TEMPERATURE, chunk, None, 1.0, ("entropy",))[:2]
    return run(spec, head) | {"chunk": chunk}


def verl(spec):
    sys.modules.setdefault("ray", MagicMock())  # verl imports it, this function never uses it
    from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction
    return run(spec, lambda h, w, y: FusedLinearForPPOFunction.apply(h, w, y, TEMPERATURE))


def limit(spec):
    hidden, head, _, _ = (x.detach() for x in inputs(spec))
    grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
    tile = hidden.new_empty(spec["chunk"], spec["vocab"])
    torch.mm(hidden[:8], head.T, out=tile[:8])
    with measure.meter() as m:
        for i in range(0, len(hidden), spec["chunk"]):
            h = hidden[i:i + spec["chunk"]]
            z = tile[:len(h)]
            torch.mm(h, head.T, out=z)
            torch.mm(h, head.T, out=z)
            torch.mm(z, head, out=grad_hidden[i:i + len(h)])
            grad_head.addmm_(z.T, h)
    return m.answer()


def small_model(spec):
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(spec["seed"])
    heads = max(1, spec["hidden"] // 64)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=spec["vocab"], hidden_size=spec["hidden"], intermediate_size=4 * spec["hidden"],
        num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=spec["length"] + 8, tie_word_embeddings=False))


def model_ours(spec):
    from policy import Policy, pack_row
    device, ids = "cuda" if torch.cuda.is_available() else "cpu", sequence(spec)
    policy = Policy(small_model(spec), chunk=spec["chunk"]).to(device)
    policy(pack_row([(ids[:2], ids[2:8])], device=device), TEMPERATURE)[0].sum().backward()
    policy.zero_grad(set_to_none=True)
    with measure.meter() as m, torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logp, entropy = policy(pack_row([(ids[:1], ids[1:])], device=device), TEMPERATURE)
        (-logp.mean()).backward()
    return m.answer(logp=logp.mean().item(), entropy=entropy.mean().item(),
                    grad_head=policy.model.lm_head.weight.grad.norm().item())


def model_trl(spec):
    from trl.trainer.utils import add_fused_lm_head
    device, ids = "cuda" if torch.cuda.is_available() else "cpu", sequence(spec)
    model = small_model(spec).to(device).train()
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    row = torch.tensor([ids], device=device)
    model(row[:, :8], labels=row[:, :8], fused_lm_head=True).log_probs.sum().backward()
    model.zero_grad(set_to_none=True)
    with measure.meter() as m, torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        out = model(row, attention_mask=torch.ones_like(row), labels=row, fused_lm_head=True)
        logp, entropy = (x[:, 1 - row.shape[1]:] for x in (out.log_probs, out.entropy))
        (-logp.mean()).backward()
    return m.answer(logp=logp.mean().item(), entropy=entropy.mean().item(),
                    grad_head=model.lm_head.weight.grad.norm().item())


def sequence(spec):
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, spec["vocab"], (spec["length"],), generator=g).tolist()


SIDES = {"ours": ours, "full": full, "trl": trl, "verl": verl, "limit": limit, "model_ours": model_ours,
         "model_trl": model_trl}
PEERS = {"trl": "trl", "verl": "verl", "model_trl": "trl"}


# ----- The script ------------------------------------------------------------------------------------------

def compare(rows):
    """Seconds against the limit's, and the largest relative distance from ours of what was computed."""
    by = {r["side"].removeprefix("model_"): r for r in rows if "error" not in r}
    for row in by.values():
        if "limit" in by:
            row["times_limit"] = row["seconds"]["median"] / by["limit"]["seconds"]["median"]
        if "ours" in by and "logp" in row:
            same = [k for k in ("logp", "entropy", "grad_hidden", "grad_head") if k in row]
            row["off"] = max(abs(row[k] / by["ours"][k] - 1) for k in same)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_common(p, "logprobs")
    add = p.add_argument
    add("--lengths", type=int, nargs="+", default=[8192, 24576], help="tokens")
    add("--model_length", type=int, default=24576, help="tokens through two layers; 0: none")
    add("--vocab", type=int, default=151936, help="vocabulary")
    add("--hidden", type=int, default=512, help="width of the hidden states (1,536 in the 1.5B model)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of hidden states and head")
    add("--chunk", type=int, default=1024, help="tokens of our tile")
    add("--sides", nargs="+", choices=["ours", "full", "trl", "verl", "limit"],
        help="default: all that can be imported")
    args = p.parse_args(argv)
    if args.worker:
        return measure.serve(SIDES, args.worker)
    before = measure.start(args)
    if args.quick:
        args.lengths, args.model_length, args.vocab, args.hidden, args.chunk = [192], 96, 2048, 64, 64
    sides = args.sides or [s for s in ("ours", "full", "trl", "verl", "limit") if s not in PEERS or
                           not args.quick and (args.peer_python or measure.has(PEERS[s]))]
    rows = []
    cases = [(n, sides) for n in args.lengths]
    if args.model_length:
        cases.append((args.model_length, [f"model_{s}" for s in ("ours", "trl") if s in sides]))
    for length, these in cases:
        settings = {k: getattr(args, k) for k in ("vocab", "hidden", "dtype", "chunk", "seed")}
        settings["length"] = length
        print(f"{length} tokens", flush=True)
        jobs = {s: (s, settings, args.peer_python if s in PEERS else None) for s in these}
        some = measure.rows_of(measure.alternate(__file__, jobs, args.repeats), length=length)
        compare(some)
        rows += some
    measure.print_rows(rows, [("tokens", "length", ","), ("side", "side", ""), ("seconds", "seconds", ".2f"),
                        ("CPU s", "cpu_seconds", ".2f"),
                        ("x limit", "times_limit", ".2f"), ("memory MiB", "memory_mb", ",.0f"),
                              ("off", "off", ".1e")])
    measure.write(args, "log-prob + entropy + backward of the head", rows, before)


if __name__ == "__main__":
    main()
