"""policy.py - the model being trained: packed tokens in, log-probabilities out.

    policy = Policy("Qwen/Qwen2.5-0.5B").shard(torch.bfloat16)        # FSDP2; one process may skip .shard
    for batch in pack(sequences, budget=32768):                       # sequences: [(prompt_ids, response_ids)]
        logp, entropy = policy(batch, temperature=0.6)                # [R], [R]: response tokens only
        (-logp.mean()).backward()

Three ideas, each a piece you can copy:

  token_logprobs   log-prob and entropy of the taken tokens without ever holding the [T, V] logits: at 32K tokens
                   and a 152K vocabulary these are 20 GB in fp32, one 1,024-token tile is 0.6 GB.
  packing          sequences lie end to end in one row, positions restart, nothing is padded, and the prompt of
                   samples that lie together is there once. `varlen` attention keeps documents apart: PyTorch's own
                   flash kernel on CUDA, SDPA on documents of similar length elsewhere.
  Policy           any causal LM that transformers can load with a custom attention function, under FSDP2 with
                   fp32 master weights (at lr 1e-6 a bf16 weight of 0.02 would never move) and bf16 compute.

Shapes: T packed tokens, R response tokens among them, S sequences, V vocabulary, H hidden.
Left out on purpose: tensor, pipeline and context parallelism (a 1.5B model at 24K needs none), LoRA, quantisation,
torch.compile (10-15 % of an update on a GPU at best, against minutes of warm-up and graph breaks at varlen).
"""
import inspect
import json
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

try:
    from torch.nn.attention.varlen import varlen_attn
    # torch 2.11 takes fewer key heads without being told; later versions want to be told
    GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
except ImportError:  # an older torch: attention falls back to padded batches
    varlen_attn = None


# ---------------------------------------------------------------------------------------------------------------
# Log-probabilities without logits
# ---------------------------------------------------------------------------------------------------------------

def token_logprobs_plain(hidden, head_weight, targets, temperature=1.0):
    """The readable twin of `token_logprobs`: holds all [T, V] logits, uses autograd. For tests and for reading."""
    logits = (hidden.float() @ head_weight.float().T) / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


def token_logprobs(hidden, head_weight, targets, temperature=1.0, chunk=0, entropy_grad=True):
    """Log-probability and entropy of each taken token, in tiles of `chunk` tokens (0: as many as 0.6 GB of logits are).

    hidden [T, H] final hidden states, head_weight [V, H], targets [T] int64, temperature > 0 divides the logits
    (sampling at T = 0.6 means training at T = 0.6) -> logp [T], entropy [T] in nats, both fp32.
    Gradients reach `hidden` and `head_weight`; with `entropy_grad=False` the entropy is a metric only, which
    saves nothing but keeps an accidental bonus out of the loss. Memory: one or two fp32 tiles [chunk, V] whatever T is,
    plus the fp32 gradient of the head in backward; price: the head's matmul once more in backward, except for the last
    tile, which stays.
    Reference for the idea: verl's FusedLinearForPPO, prime-rl's FusedOutputLinear.

    >>> h, w, y = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    >>> fast, plain = token_logprobs(h, w, y, 0.6, chunk=2), token_logprobs_plain(h, w, y, 0.6)
    >>> all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fast, plain))
    True
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    chunk = chunk or max(1, TILE // len(head_weight))
    logp, entropy = _TokenLogprobs.apply(hidden, head_weight, targets, float(temperature), chunk)
    return logp, entropy if entropy_grad else entropy.detach()


TILE = 150_000_000  # logits of a tile, 0.6 GB in fp32: 987 tokens at a vocabulary of 151,936


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps [T] numbers and its last tile; backward recomputes the others and spends each at once.

    With q = softmax(z), z = h W^T / temperature, H = entropy:
      d logp_y / dz = onehot(y) - q          d H / dz = -q (log q + H)
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, targets, temperature, chunk):
        logp = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy, lse, z = torch.empty_like(logp), torch.empty_like(logp), None
        for s, z in _tiles(hidden, head_weight, temperature, chunk):
            for b in _blocks(s, z):
                rows = z[b.start - s.start:b.stop - s.start]
                top = rows.amax(-1, keepdim=True)
                e = rows.sub_(top).exp()  # shifted: the entropy below is then a sum of small terms
                log_total = e.sum(-1).log()
                lse[b] = top[:, 0] + log_total
                logp[b] = rows.gather(-1, targets[b, None])[:, 0] - log_total
                entropy[b] = log_total - e.mul_(rows).sum(-1) / log_total.exp()
                if s.stop == len(hidden):
                    rows.sub_(log_total[:, None])
        ctx.save_for_backward(hidden, head_weight, targets, lse, entropy)
        ctx.last = z  # its log-probs of the whole vocabulary; backward begins with it: no memory more at the peak
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)  # an entropy that is only a metric comes back as None
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, head_weight, targets, lse, entropy = ctx.saved_tensors
        grad_logp = torch.zeros_like(lse) if grad_logp is None else grad_logp
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # fp32: a bf16 running sum over tiles would lose the small contributions
        grad_head = torch.zeros_like(head_weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        narrow = hidden.dtype if hidden.is_cuda else torch.float32
        head = head_weight.to(narrow)
        # d logp / dz is a multiple of the token's gradient: that factor is cheaper on the [T, H] side of both products
        ones = torch.ones_like(lse)
        inside, outside = (ones, grad_logp) if grad_entropy is None else (grad_logp, ones)
        outside = (outside / -ctx.temperature)[:, None]

        def spend(s, z):
            """The gradients of tokens s from their log-probs [t, V], which are overwritten."""
            for b in _blocks(s, z):
                log_q = z[b.start - s.start:b.stop - s.start]
                if grad_entropy is None:
                    log_q.exp_()
                else:
                    factor = (log_q + entropy[b, None]).mul_(grad_entropy[b, None]).add_(inside[b, None])
                    log_q.exp_().mul_(factor)
            dz = z.scatter_add_(-1, targets[s, None], -inside[s, None]).to(narrow)
            if grad_hidden is not None:
                grad_hidden[s] = (dz @ head) * outside[s]
            if grad_head is not None:
                scaled = (hidden[s] * outside[s]).to(narrow)
                if narrow == torch.float32:
                    grad_head.addmm_(dz.T, scaled)
                else:
                    grad_head.add_(dz.T @ scaled)

        end = len(hidden)
        if ctx.last is not None:  # gone if this backward ran before (retain_graph)
            end -= len(ctx.last)
            spend(slice(end, len(hidden)), ctx.last)
            ctx.last = None
        for s, z in _tiles(hidden[:end], head_weight, ctx.temperature, ctx.chunk):
            for b in _blocks(s, z):
                z[b.start - s.start:b.stop - s.start].sub_(lse[b, None])
            spend(s, z)
        return grad_hidden, None if grad_head is None else grad_head.to(head_weight.dtype), None, None, None


def _tiles(hidden, head_weight, temperature, chunk):
    """Yield (slice of tokens, their logits / temperature [t, V] in fp32); on a CPU in one buffer used again and again,
    since fresh pages cost three times the arithmetic.

    A bf16 result would round a logit of 20 by up to 0.06, and the log-prob with it; CUDA keeps the fp32 accumulator,
    elsewhere the inputs are widened first.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        for i in range(0, len(hidden), chunk):
            h = hidden[i:i + chunk]
            yield slice(i, i + len(h)), torch.mm(h, head_weight.T, out_dtype=torch.float32).div_(temperature)
        return
    hidden, head_weight = hidden.float(), head_weight.float()
    tile = torch.empty(min(chunk, len(hidden)), len(head_weight), dtype=torch.float32, device=hidden.device)
    for i in range(0, len(hidden), chunk):
        h = hidden[i:i + chunk]
        z = tile[:len(h)]
        yield slice(i, i + len(h)), torch.addmm(z, h, head_weight.T, beta=0, alpha=1 / temperature, out=z)


def _blocks(s, z):
    """Cut a tile into slices of rows: on a CPU as many as fit its cache, so that the passes over them are cheap."""
    step = len(z) if z.is_cuda else max(1, 2**18 // z.shape[1])
    return [slice(i, min(i + step, s.stop)) for i in range(s.start, s.stop, step)]


# ---------------------------------------------------------------------------------------------------------------
# Attention over packed documents
# ---------------------------------------------------------------------------------------------------------------

def document_attention(q, k, v, cu_seqlens, scale, window=None):
    """Causal attention inside each document, one SDPA call a document: the readable twin of the two fast paths.

    q [T, Hq, D], k and v [T, Hkv, D], cu_seqlens [S+1] -> [T, Hq, D]. `window` counts the visible tokens,
    the current one included (transformers' and Gemma's meaning).
    """
    # split, not slices: the gradient of a slice is a tensor of zeros as large as the whole row, one for each document
    parts = zip(*(x.split(cu_seqlens.diff().tolist()) for x in (q, k, v)))
    return torch.cat([_causal(*(x[None] for x in document), scale, window)[0] for document in parts])


def _causal(q, k, v, scale, window):
    """q [B, L, Hq, D], k and v [B, L, Hkv, D] -> [B, L, Hq, D]."""
    groups, mask, n = q.shape[2] // k.shape[2], None, q.shape[1]
    if groups > 1:  # by hand: SDPA's own enable_gqa leaves the flash path on CPU
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    if window is not None and n > window:
        i = torch.arange(n, device=q.device)
        mask = (i[None] <= i[:, None]) & (i[None] > i[:, None] - window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale).transpose(1, 2)


def padded_attention(q, k, v, cu_seqlens, scale, window=None, layout=None):
    """As `document_attention` (of the unfolded row, where there is a layout), documents of similar length together:
    many small SDPA calls leave most cores idle. Runs anywhere, any dtype; on CUDA `varlen_attn` needs no padding."""
    index, shapes, back = padded_batches(tuple(cu_seqlens.diff().tolist()), layout)
    if len(back) != len(q):
        raise ValueError("the model does not hand `layout` through to its attention: it cannot train on shared prompts")
    # F.embedding: rows by number, whose gradient is summed by several threads
    padded = (F.embedding(index.to(q.device), x.flatten(1)).split([b * n for b, n in shapes]) for x in (q, k, v))
    out = [_causal(*(x.view(b, n, -1, q.shape[-1]) for x in documents), scale, window).flatten(0, 1).flatten(1)
           for (b, n), documents in zip(shapes, zip(*padded))]
    return F.embedding(back.to(q.device), torch.cat(out)).view_as(q)


@lru_cache(maxsize=64)  # every layer asks the same
def padded_batches(lengths, layout=None):
    """Cut documents into padded batches -> (the row's tokens in them, end to end; shape of each batch; where in them
    each of the row's T tokens lies). Padding stands at the end of a document, where nothing that counts can see it.

    A document joins a batch if padding the others to its length costs less than a call: about 2**13 pairs of tokens.

    >>> index, shapes, back = padded_batches((2, 3))
    >>> index.tolist(), shapes, back.tolist()
    ([0, 1, 0, 2, 3, 4], [(2, 3)], [0, 1, 3, 4, 5])
    """
    row = torch.arange(sum(layout[0] if layout else lengths))
    documents = (unfold(row, layout) if layout else row).split(lengths)
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        group = groups[-1] if groups else []
        if group and len(group) * (lengths[i] ** 2 - lengths[group[-1]] ** 2) <= 2 ** 13:
            group.append(i)
        else:
            groups.append([i])
    back, start, index, shapes = torch.empty_like(row), 0, [], []
    for group in groups:
        shapes.append((len(group), lengths[group[-1]]))
        for i in group:
            index.append(F.pad(documents[i], (0, shapes[-1][1] - lengths[i])))
            back[documents[i]] = start + torch.arange(lengths[i])  # of a prompt's copies, which are equal, the last
            start += len(index[-1])
    return torch.cat(index), shapes, back


def unfold(x, layout):
    """x [T, ...], a row in which some documents share their prompt -> [D, ...], every document with its own copy.

    layout: (lengths of the row's pieces, which of them each document is made of, end to end).

    >>> unfold(torch.tensor([7, 8, 1, 2, 3]), ([2, 1, 2], [0, 1, 0, 2])).tolist()
    [7, 8, 1, 7, 8, 2, 3]
    """
    pieces, order = layout
    parts = x.split(pieces)
    return torch.cat([parts[i] for i in order])


def fold(x, layout):
    """The way back: of a prompt's copies, which are equal, the first.

    >>> fold(torch.tensor([7, 8, 1, 7, 8, 2, 3]), ([2, 1, 2], [0, 1, 0, 2])).tolist()
    [7, 8, 1, 2, 3]
    """
    pieces, order = layout
    parts = dict(reversed(list(zip(order, x.split([pieces[i] for i in order])))))
    return torch.cat([parts[i] for i in range(len(pieces))])


def varlen_attention(module, query, key, value, attention_mask=None, scaling=None, cu_seq_lens_q=None,
                     max_length_q=None, sliding_window=None, softcap=None, s_aux=None, layout=None, **_):
    """The attention function registered with transformers under the name "varlen".

    query [1, Hq, T, D], key and value [1, Hkv, T, D], cu_seq_lens_q [S+1] int32 -> ([1, T, Hq, D], None).
    layout: see `unfold`; attention is the only place where a shared prompt must be seen by each of its documents.
    It must honour what a model passes: Gemma 3's `sliding_window`, silently dropped, costs 2 nats a token past it.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with soft-capping or sinks is not covered by the varlen kernel")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = module.head_dim ** -0.5 if scaling is None else scaling
    if not (q.is_cuda and varlen_attn is not None and q.dtype in (torch.bfloat16, torch.float16)):
        return padded_attention(q, k, v, cu_seq_lens_q, scale, sliding_window, layout)[None], None
    if layout:
        q, k, v = (unfold(x, layout) for x in (q, k, v))
    left = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scale,
                      window_size=(left, 0), **GQA)
    return (fold(out, layout) if layout else out)[None], None


AttentionInterface.register("varlen", varlen_attention)


# ---------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------

@dataclass
class MicroBatch:
    """One packed row. A hidden state predicts the token after it, so response token j of a sequence is scored at
    the position before it, and the last token of one document never predicts the first of the next.

    Neighbours with the same prompt share it: it lies once before their responses, whose first tokens are all scored
    at its last position. Only attention then works on whole documents, of which cu_seqlens and layout tell."""
    rows: list                  # which of the packed sequences, in this order
    ids: torch.Tensor           # [T]
    positions: torch.Tensor     # [T], restarting at 0
    cu_seqlens: torch.Tensor    # [S+1] int32, bounds of the whole documents
    max_seqlen: int
    where: torch.Tensor         # [R] index into T of the state that predicts each response token
    targets: torch.Tensor       # [R] the response tokens
    lengths: torch.Tensor       # [S] response tokens of each sequence
    layout: tuple | None        # how documents are made of the row's pieces, see `unfold`; None: they are the row


def split_by_budget(lengths, budget, world=1):
    """Deal sequences into micro-batches of at most `budget` tokens, the same number for each of `world` ranks.

    Longest first into the lightest bin; bins sorted by cost, so that the `world` micro-batches which run at the
    same moment (FSDP meets at every layer) cost about the same. -> [rank][micro-batch] -> sequence indices.
    Bins may be empty when there are fewer sequences than bins: a rank must still take part.

    >>> split_by_budget([5, 3, 3, 1], budget=6, world=2)
    [[[0, 3]], [[1, 2]]]
    """
    if not lengths:
        return [[] for _ in range(world)]
    if max(lengths) > budget:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit the budget of {budget}: "
                         f"raise --token_budget")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    n_bins = world * max(1, -(-sum(lengths) // (budget * world)))
    while True:
        bins, load = [[] for _ in range(n_bins)], [0] * n_bins
        for i in order:
            j = load.index(min(load))
            bins[j].append(i)
            load[j] += lengths[i]
        if max(load) <= budget:
            break
        n_bins += world
    # attention grows with the square: 36,000 is where it costs as much as the matmuls of a 1.5B model
    cost = [sum(36000 * lengths[i] + lengths[i] ** 2 for i in b) for b in bins]
    bins = [bins[j] for j in sorted(range(n_bins), key=lambda j: -cost[j])]
    return [bins[r::world] for r in range(world)]


def bundles(sequences, limit):
    """Runs of neighbours with one prompt, cut evenly into bundles that count for at most `limit` tokens (or hold one
    sequence) -> [[indices]].

    >>> bundles([([7, 8], [1]), ([7, 8], [2, 3]), ([7, 8], [4]), ([9], [5])], limit=6)
    [[0, 1], [2], [3]]
    """
    out, start = [], 0
    for end in range(1, len(sequences) + 1):
        if end < len(sequences) and sequences[end][0] == sequences[start][0]:
            continue
        for n in range(1, end - start + 1):  # the fewest bundles that all fit
            cuts = [start - (start - end) * i // n for i in range(n + 1)]
            parts = [list(range(a, b)) for a, b in zip(cuts, cuts[1:])]
            if all(bundle_tokens(sequences, part) <= limit for part in parts):
                break
        out += parts
        start = end
    return out


def bundle_tokens(sequences, rows):
    """What sequences with one prompt count for in a budget. The prompt lies in the row once; its other copies exist in
    attention alone, which holds about a quarter of a layer's activations.

    >>> bundle_tokens([([7] * 8, [1]), ([7] * 8, [2, 3])], [0, 1])
    13
    """
    prompt = len(sequences[rows[0]][0])
    return prompt + sum(len(sequences[i][1]) for i in rows) + -(-prompt * (len(rows) - 1) // 4)


def pack_row(sequences, rows=None, device="cpu", share=True):
    """[(prompt_ids, response_ids)] -> one MicroBatch; nothing is padded, an empty list makes a one-token row.

    Neighbours with the same prompt share it; `share=False` is the plain twin with every document whole.

    >>> pack_row([([7, 8], [9]), ([1], [2, 3])]).positions.tolist()
    [0, 1, 2, 0, 1, 2]
    >>> row = pack_row([([7, 8], [9]), ([7, 8], [5, 6])])
    >>> row.ids.tolist(), row.positions.tolist(), row.where.tolist(), row.layout
    ([7, 8, 9, 5, 6], [0, 1, 2, 2, 3], [1, 1, 3], ((2, 1, 2), (0, 1, 0, 2)))
    """
    ids, positions, where, targets, bounds, lengths = [], [], [], [], [0], []
    pieces, order, before = [], [], None
    for prompt, response in sequences or [([0], [])]:
        prompt, response = list(prompt), list(response)
        if not prompt:
            raise ValueError("an empty prompt cannot predict the first response token")
        if not share or prompt != before:
            first, before = len(pieces), prompt
            ids += prompt
            positions += range(len(prompt))
            pieces.append(len(prompt))
            predicts = len(ids) - 1
        order += [first, len(pieces)]
        where += ([predicts] + list(range(len(ids), len(ids) + len(response) - 1)))[:len(response)]
        ids += response
        positions += range(len(prompt), len(prompt) + len(response))
        targets += response
        pieces.append(len(response))
        lengths.append(len(response))
        bounds.append(bounds[-1] + len(prompt) + len(response))
    shared = len(order) > len(pieces)
    tensor = lambda x, dtype=torch.int64: torch.tensor(x, dtype=dtype).to(device, non_blocking=True)
    return MicroBatch(list(range(len(sequences))) if rows is None else rows, tensor(ids), tensor(positions),
                      tensor(bounds, torch.int32), max(b - a for a, b in zip(bounds, bounds[1:])), tensor(where),
                      tensor(targets), tensor(lengths),
                      (tuple(pieces), tuple(order)) if shared else None)


def pack(sequences, budget, rank=0, world=1, device="cpu", share=True):
    """[(prompt_ids, response_ids)] -> this rank's micro-batches of at most `budget` tokens each.

    Every rank is given the same `sequences` and takes its share; `MicroBatch.rows` says which. Neighbours with the
    same prompt stay together where they fit a quarter of a micro-batch, so that micro-batches still fill evenly (one
    row that holds everything has nothing to fill evenly).
    """
    total = sum(len(p) + len(r) for p, r in sequences)
    limit = budget if world == 1 and total <= budget else min(budget, total // world) // 4
    items = bundles(sequences, limit if share else 0)
    dealt = split_by_budget([bundle_tokens(sequences, rows) for rows in items], budget, world)[rank]
    micro = [[i for item in bin for i in items[item]] for bin in dealt]
    return [pack_row([sequences[i] for i in rows], rows, device, share) for rows in micro]


# ---------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------

class Policy(nn.Module):
    """A causal LM whose forward returns log-probabilities, so that FSDP's hooks cover the head as well."""

    def __init__(self, model, recompute=False, chunk=0):
        """model: a path, a hub name, or a transformers causal LM in fp32. recompute: activation checkpointing."""
        super().__init__()
        if isinstance(model, (str, os.PathLike)):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="varlen")
        else:
            model.set_attn_implementation("varlen")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # old, new and engine log-probs must be those of one function
        self.model, self.chunk, self.device = model, chunk, torch.device("cpu")
        self.grad_divisor = 1  # by what data parallelism divides the sum of the ranks' gradients
        model.train()  # transformers checkpoints activations only in train mode
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._check_head()

    def forward(self, batch, temperature=1.0, entropy_grad=False):
        """MicroBatch -> logp [R], entropy [R] of its response tokens, at `temperature`."""
        # use_cache=False: with a cache transformers no longer sees the packing, and documents attend to each other
        hidden = self.model.base_model(
            input_ids=batch.ids[None], position_ids=batch.positions[None], attention_mask=None, use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens, cu_seq_lens_k=batch.cu_seqlens, max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen, layout=batch.layout).last_hidden_state[0]
        weight = self.model.get_output_embeddings().weight
        return token_logprobs(hidden[batch.where], weight, batch.targets, temperature, self.chunk, entropy_grad)

    @torch.no_grad()
    def _check_head(self):
        """Refuse models whose logits are more than hidden @ head.T (soft-capping, scaling, a bias)."""
        vocab = self.model.get_output_embeddings().weight.shape[0]
        ids = torch.arange(2, 10) % vocab
        prompt, response = ids[:2].tolist(), ids[2:].tolist()
        alone = pack_row([(prompt, response)])
        logits = self.model(input_ids=ids[None], position_ids=alone.positions[None], use_cache=False,
                            cu_seq_lens_q=alone.cu_seqlens, cu_seq_lens_k=alone.cu_seqlens, max_length_q=8,
                            max_length_k=8).logits[0, 1:-1]
        theirs = torch.log_softmax(logits.float(), -1).gather(-1, ids[2:, None])[:, 0].repeat(2)
        ours = self(pack_row([(prompt, response)] * 2))[0]  # two, or a model that drops `layout` would go unnoticed
        if not torch.isfinite(theirs).all():
            raise ValueError("the model computes non-finite logits: its weights are damaged")
        if not torch.allclose(theirs, ours, atol=1e-3, rtol=1e-3):
            raise ValueError(f"{type(self.model).__name__} does more to its logits than hidden @ head.T "
                             "(soft-capping, scaling or a bias), which token_logprobs does not compute")

    def shard(self, dtype=torch.bfloat16, device="cpu"):
        """FSDP2 over all ranks: each decoder layer is gathered, used and freed in turn; embedding and head with
        the root. Masters and gradient reduction stay fp32, compute runs in `dtype`. Returns self."""
        self.device, self.grad_divisor = torch.device(device), dist.get_world_size()
        mesh = torch.distributed.device_mesh.init_device_mesh(self.device.type, (dist.get_world_size(),))
        # inputs are positions and masks: casting them to bf16 would round position 257 to 256
        mixed = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype,
                                     reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in self.model.base_model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=mixed)
        fully_shard(self, mesh=mesh, mp_policy=mixed)
        return self.to(self.device)  # buffers; parameters are there already

    @torch.no_grad()
    def full_weights(self, dtype=None):
        """Yield (name, full tensor) under the checkpoint's names, a tied head included, one gathered at a time.

        A collective: every rank must exhaust the generator.
        """
        for name, p in self.model.state_dict().items():
            full = p.full_tensor() if isinstance(p, DTensor) else p
            yield name, full if dtype is None or not full.is_floating_point() else full.to(dtype)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------

def save_checkpoint(folder, step, policy, optimizer, tokenizer, state, keep=2):
    """Write folder/000STEP with model, optimizer, RNG, `state` (JSON) and an HF copy in fp32, all or nothing.

    Everything goes to a temporary folder; one rename publishes it, `latest` follows, old ones are removed last,
    so a kill at any moment leaves the previous checkpoint whole. All ranks call it. Raises OSError on every rank
    (disk full) after removing what was written.
    """
    final = os.path.join(folder, f"{step:06d}")
    tmp = final + ".tmp"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp)
    dist.barrier()
    error = None
    try:
        model_state, optim_state = get_state_dict(policy, optimizer)
        dcp.save({"model": model_state, "optim": optim_state}, checkpoint_id=tmp)
        full = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        torch.save({"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available()
                    else []}, os.path.join(tmp, f"rng_{rank}.pt"))
        if rank == 0:
            weights = {k.removeprefix("model."): v for k, v in full.items()}
            policy.model.save_pretrained(os.path.join(tmp, "hf"), state_dict=weights)
            tokenizer.save_pretrained(os.path.join(tmp, "hf"))
            with open(os.path.join(tmp, "trainer.json"), "w") as f:
                json.dump(state, f, indent=1)
            _fsync_tree(tmp)
    except (Exception, CheckpointException) as e:  # which is no Exception; a full disk surfaces as either
        error = f"{type(e).__name__}: {str(e).strip().splitlines()[-1][:300]}"
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if any(errors):
        if rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f"checkpoint {final} not written: {next(e for e in errors if e)}")
    if rank == 0:
        shutil.rmtree(final, ignore_errors=True)  # left by a run that died before `latest` moved
        os.rename(tmp, final)
        write_atomic(os.path.join(folder, "latest"), os.path.basename(final) + "\n")
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(os.path.join(folder, old), ignore_errors=True)
    dist.barrier()
    return final


def checkpoints(folder):
    """Names of the complete checkpoints, oldest first: a name without suffix is complete by construction."""
    return sorted(n for n in os.listdir(folder) if n.isdigit()) if os.path.isdir(folder) else []


def latest_checkpoint(folder):
    """Path of the newest complete checkpoint, or None. A `latest` that is missing or stale is not trusted blindly."""
    names = checkpoints(folder)
    try:
        with open(os.path.join(folder, "latest")) as f:
            name = f.read().strip()
    except FileNotFoundError:
        name = None
    if name not in names:
        name = names[-1] if names else None
    return None if name is None else os.path.join(folder, name)


def load_checkpoint(path, policy, optimizer):
    """Restore model, optimizer and RNG in place, on the same or another number of ranks; returns `state`.

    Raises OSError with the way out when the folder cannot be read.
    """
    try:
        with open(os.path.join(path, "trainer.json")) as f:
            state = json.load(f)
        model_state, optim_state = get_state_dict(policy, optimizer)
        dcp.load({"model": model_state, "optim": optim_state}, checkpoint_id=path)
        set_state_dict(policy, optimizer, model_state_dict=model_state, optim_state_dict=optim_state)
        rng = os.path.join(path, f"rng_{dist.get_rank()}.pt")
        if os.path.exists(rng):
            saved = torch.load(rng, weights_only=True)
            torch.set_rng_state(saved["cpu"])
            if saved["cuda"] and len(saved["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(saved["cuda"])
    except (Exception, CheckpointException) as e:
        raise OSError(f"checkpoint {path} cannot be read ({type(e).__name__}). Delete that folder to resume "
                      f"from the one before it") from e
    return state


def write_atomic(path, text):
    """Replace a small file so that a reader, or a crash, sees the old text or the new, never half of one."""
    with open(path + ".tmp", "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def _fsync_tree(folder):
    """Data must be on the disk before the rename that declares it complete."""
    for root, _, files in os.walk(folder):
        for name in files:
            fd = os.open(os.path.join(root, name), os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


def model_limits(model):
    """(positions, parameters) read from a model's config without loading a weight."""
    config = AutoConfig.from_pretrained(model)
    config = config.get_text_config()
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    return getattr(config, "max_position_embeddings", None), sum(p.numel() for p in shell.parameters())
