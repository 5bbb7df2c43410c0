"""logprobs.py - the head: log-prob and entropy of each token and their backward, at a vocabulary of 151,936.

    python bench/logprobs.py --peer_python PEERS/bin/python          # 8K and 24K tokens, hidden 512, fp32

All sides get the same hidden states, head, targets and gradient of the log-probs; entropy is computed, and
not differentiated (the recipe's `improved` setting). Checked against ours: mean log-prob, mean entropy and
the norms of both gradients.
"""
import measure  # puts the project on the path
import torch

from policy import token_logprobs

TEMPERATURE, TILE = 0.6, 1024


def inputs(spec):
    """hidden [T, H] and head [V, H] with gradient, targets [T], gradient of the log-probs [T]."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(spec["length"], spec["hidden"], generator=g)
    head = torch.randn(spec["vocab"], spec["hidden"], generator=g) / spec["hidden"] ** 0.5
    targets = torch.randint(0, spec["vocab"], (spec["length"],), generator=g)
    weight = torch.randn(spec["length"], generator=g) / spec["length"]
    return hidden.requires_grad_(), head.requires_grad_(), targets, weight


def run(spec, function):
    """Time function(hidden, head, targets) -> (logp, entropy), and its backward."""
    (hidden, head, targets, weight), meter = inputs(spec), measure.Meter()
    function(hidden[:8], head, targets[:8])[0].sum().backward()
    hidden.grad = head.grad = None
    meter.lap()
    logp, entropy = function(hidden, head, targets)
    (logp * weight).sum().backward()
    meter.lap()
    return meter.answer(logp=logp.mean().item(), entropy=entropy.mean().item(),
                        grad_hidden=hidden.grad.norm().item(), grad_head=head.grad.norm().item())


def ours(spec):
    return run(spec, lambda h, w, y: token_logprobs(h, w, y, TEMPERATURE, entropy_grad=False))


def trl(spec):
    """With its own chunk size, in torch, as always on a CPU."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk
    return run(spec, lambda h, w, y: ChunkedLogProbFunction.apply(
        h, w, None, y, TEMPERATURE, chunk, None, 1.0, ("entropy",))[:2])


@torch.no_grad()
def limit(spec):
    """The four matmuls no version without stored logits can avoid (logits, logits again, d hidden, d head),
    into buffers that exist already, and nothing else."""
    (hidden, head, _, _), meter = inputs(spec), measure.Meter()
    grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
    tile = hidden.new_empty(TILE, spec["vocab"])
    torch.mm(hidden[:8], head.T, out=tile[:8])
    meter.lap()
    for h, d in zip(hidden.split(TILE), grad_hidden.split(TILE)):
        z = tile[:len(h)]
        torch.mm(h, head.T, out=z)
        torch.mm(h, head.T, out=z)
        torch.mm(z, head, out=d)
        grad_head.addmm_(z.T, h)
    meter.lap()
    return meter.answer()


SIDES = {"ours": ours, "trl": trl, "limit": limit}
PEERS = ["trl"]


def cases(args):
    shape = {"vocab": 2048, "hidden": 64} if args.quick else {"vocab": 151936, "hidden": 512}
    what = "log-prob and entropy of each token, and backward; vocabulary {vocab:,}, hidden {hidden}"
    return what.format(**shape), [({"length": length}, {**shape, "length": length})
                                  for length in ([192] if args.quick else [8192, 24576])]


def compare(rows, _):
    """Seconds against the limit's, and the largest relative distance from ours of what was computed."""
    for row in rows.values():
        if "limit" in rows:
            row["times_limit"] = row["seconds"]["median"] / rows["limit"]["seconds"]["median"]
        if "ours" in rows and "logp" in row:
            row["off"] = max(abs(row[k] / rows["ours"][k] - 1)
                             for k in ("logp", "entropy", "grad_hidden", "grad_head"))


if __name__ == "__main__":
    measure.compare_sides("logprobs")
