"""policy.py - the model being trained: packed tokens in, log-probabilities out.

    policy = Policy("Qwen/Qwen2.5-0.5B").shard(torch.bfloat16)        # FSDP2; one process may skip .shard
    for batch in pack(sequences, budget=32768):                       # sequences: [(prompt_ids, response_ids)]
        logp, entropy = policy(batch, temperature=0.6)                # [R], [R]: response tokens only
        (-logp.mean()).backward()

Three ideas, each a piece you can copy:

  token_logprobs   log-prob and entropy of the taken tokens without ever holding the [T, V] logits: at 32K tokens
                   and a 152K vocabulary these are 20 GB in fp32, one 1,024-token tile is 0.6 GB.
  packing          sequences lie end to end in one row, positions restart, nothing is padded, and neighbours share
                   one copy of their prompt. Attention alone sees whole documents: PyTorch's own flash kernel on
                   CUDA, SDPA on documents of similar length elsewhere.
  Policy           any causal LM that transformers can load with a custom attention function, under FSDP2 with
                   fp32 master weights (at lr 1e-6 a bf16 weight of 0.02 would never move) and bf16 compute.

Shapes: T packed tokens, R response tokens among them, S sequences, D tokens of the whole documents, V vocabulary.
Left out on purpose: tensor, pipeline and context parallelism (a 1.5B model at 24K needs none), LoRA, quantisation,
torch.compile (10-15 % of an update on a GPU at best, against minutes of warm-up and graph breaks at varlen).
"""
import difflib
import inspect
import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig

from common import RankError, any_rank, read_json, say, together

try:
    from torch.nn.attention.varlen import varlen_attn
    # torch 2.11 takes fewer key heads without being told; later versions want to be told
    GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
except ImportError:  # an older torch: SDPA as on a CPU
    varlen_attn = None


# ---------------------------------------------------------------------------------------------------------------
# Log-probabilities without logits
# ---------------------------------------------------------------------------------------------------------------

def token_logprobs_plain(hidden, head_weight, targets, temperature=1.0):
    """The readable twin of `token_logprobs`: holds all [T, V] logits, uses autograd. For tests and for reading; given
    float64 it computes in float64."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprobs = torch.log_softmax(hidden.to(dtype) @ head_weight.to(dtype).T / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


def token_logprobs(hidden, head_weight, targets, temperature=1.0, chunk=0, entropy_grad=True):
    """Log-probability and entropy of each taken token, in tiles of `chunk` tokens (0: 0.6 GB of logits each).

    hidden [T, H] final hidden states, head_weight [V, H], targets [T] int64, temperature > 0 divides the logits
    (sampling at T = 0.6 means training at T = 0.6) -> logp [T], entropy [T] in nats, both fp32. With
    `entropy_grad=False` the entropy is a metric only, which keeps an accidental bonus out of the loss.
    Memory: one or two fp32 tiles [chunk, V] whatever T is, and the fp32 gradient of the head. Price: the head's
    matmul once more in backward, except for the last tile, which stays.
    Reference for the idea: verl's FusedLinearForPPO, prime-rl's FusedOutputLinear.

    >>> h, w, y = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    >>> fast, plain = token_logprobs(h, w, y, 0.6, chunk=2), token_logprobs_plain(h, w, y, 0.6)
    >>> all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fast, plain))
    True
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    chunk = chunk or max(1, 150_000_000 // len(head_weight))
    logp, entropy = TokenLogprobs.apply(hidden, head_weight, targets, float(temperature), chunk)
    return logp, entropy if entropy_grad else entropy.detach()


class TokenLogprobs(torch.autograd.Function):
    """Forward keeps [T] numbers and its last tile; backward computes the logits of the other tiles once more.

    With q = softmax(z), z = h W^T / temperature, H = entropy:
      d logp_y / dz = onehot(y) - q          d H / dz = -q (log q + H)
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, targets, temperature, chunk):
        logp, entropy, lse = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        h, head = widen(hidden, head_weight)
        ctx.tiles, ctx.last = [slice(i, i + chunk) for i in range(0, len(hidden), chunk)], None
        # one buffer for all tiles: fresh pages cost a CPU three times the arithmetic
        ctx.buffer = torch.empty(min(chunk, len(h)), len(head), dtype=torch.float32, device=h.device)
        for t in ctx.tiles:
            ctx.last = logits(h[t], head, temperature, ctx.buffer)
            rows = rows_in_cache(ctx.last)
            parts = [log_softmax_(z, y) for z, y in zip(ctx.last.split(rows), targets[t].split(rows))]
            logp[t], entropy[t], lse[t] = (torch.cat(x) for x in zip(*parts))
        ctx.save_for_backward(hidden, head_weight, targets, lse, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an entropy that is only a metric comes back as None
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, head_weight, targets, lse, entropy = ctx.saved_tensors
        h, head = widen(hidden, head_weight)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head_weight, dtype=torch.float32)  # a bf16 sum would lose small contributions
        grad_logp = torch.zeros_like(lse) if grad_logp is None else grad_logp
        for t in reversed(ctx.tiles):
            log_q, ctx.last = ctx.last, None
            if log_q is None:
                log_q = logits(h[t], head, ctx.temperature, ctx.buffer).sub_(lse[t, None])
            rows, up = rows_in_cache(log_q), grad_logp[t, None] / ctx.temperature
            for i in range(0, len(log_q), rows):
                b, factor = slice(i, i + rows), -up[i:i + rows]
                if grad_entropy is not None:
                    factor = factor - (log_q[b] + entropy[t][b, None]).mul_(grad_entropy[t][b, None] / ctx.temperature)
                log_q[b].exp_().mul_(factor)
            dz = log_q.scatter_add_(-1, targets[t, None], up).to(h.dtype)
            grad_hidden[t] = sum_over_vocabulary(dz, head)
            grad_head += dz.T @ h[t]
        return grad_hidden, grad_head.to(head_weight.dtype), None, None, None


def widen(hidden, head_weight):
    """What the matmuls multiply: fp32, and on CUDA what is there, whose products its kernels add up in fp32."""
    return (hidden, head_weight) if hidden.is_cuda else (hidden.float(), head_weight.float())


def logits(hidden, head, temperature, out):
    """[t, H], [V, H] -> out[:t] [t, V] in fp32: a bf16 result would round a logit of 20 by up to 0.06."""
    kind = {} if hidden.dtype == torch.float32 else {"out_dtype": torch.float32}
    return torch.mm(hidden, head.T, out=out[:len(hidden)], **kind).div_(temperature)


def log_softmax_(z, targets):
    """Make log-probs [t, V] of logits, in place -> logp [t], entropy [t], log of the sum of exp(z) [t]."""
    top = z.amax(-1)
    e = z.sub_(top[:, None]).exp()  # shifted: the entropy is then a sum of small terms
    total = e.sum(-1)
    entropy = total.log() - e.mul_(z).sum(-1) / total
    z.sub_(total.log()[:, None])
    return z.gather(-1, targets[:, None])[:, 0], entropy, top + total.log()


def rows_in_cache(z):
    """How many rows of a tile to work on at once: on a CPU as many as its cache holds, so that passes are cheap."""
    return len(z) if z.is_cuda else max(1, 2**18 // z.shape[1])


def sum_over_vocabulary(dz, head):
    """dz [t, V] @ head [V, H]. In fp32 by pieces: some CPU kernels add 152 K products one after the other, which
    costs a digit."""
    if dz.dtype != torch.float32:
        return dz @ head
    out = dz.new_zeros(len(dz), head.shape[1])
    for a, b in zip(dz.split(4096, 1), head.split(4096)):
        out += a @ b  # not addmm_, which may go on with the running sum product by product
    return out


# ---------------------------------------------------------------------------------------------------------------
# Attention over packed documents
# ---------------------------------------------------------------------------------------------------------------

def document_attention(q, k, v, cu_seqlens, scale, window=None):
    """Causal attention inside each document, one SDPA call for neighbours of equal length. Anywhere, any dtype.

    q [D, Hq, E], k and v [D, Hkv, E], cu_seqlens [S+1] -> [D, Hq, E]. `window` counts the visible tokens, the current
    one included (transformers' and Gemma's meaning).
    """
    runs = [(n, len(list(same))) for n, same in groupby(cu_seqlens.diff().tolist())]
    groups, out = q.shape[1] // k.shape[1], []
    # split, not slices: the gradient of a slice is a tensor of zeros as large as the whole row
    for (n, count), *qkv in zip(runs, *(x.split([n * count for n, count in runs]) for x in (q, k, v))):
        q1, k1, v1 = (x.view(count, n, *x.shape[1:]).transpose(1, 2) for x in qkv)
        if groups > 1:  # by hand: SDPA's own enable_gqa leaves the flash path on CPU
            k1, v1 = (x.repeat_interleave(groups, dim=1) for x in (k1, v1))
        mask = None
        if window is not None and n > window:
            i = torch.arange(n, device=q.device)
            mask = (i[None] <= i[:, None]) & (i[None] > i[:, None] - window)
        y = F.scaled_dot_product_attention(q1, k1, v1, attn_mask=mask, is_causal=mask is None, scale=scale)
        out.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def varlen_attention(module, query, key, value, attention_mask=None, scaling=None, sliding_window=None, softcap=None,
                     s_aux=None, packing=None, **_):
    """The attention function registered with transformers under the name "varlen".

    query [1, Hq, T, E], key and value [1, Hkv, T, E], packing: the MicroBatch -> ([1, T, Hq, E], None).
    It must honour what a model passes: Gemma 3's `sliding_window`, silently dropped, costs 2 nats a token past it.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with soft-capping or sinks is not covered by the varlen kernel")
    if packing is None:
        raise ValueError("the model does not hand `packing` through to its attention: it cannot train on packed rows")
    # F.embedding is x[index] with a gradient that is summed in fp32 and by several threads
    q, k, v = (F.embedding(packing.document_index, x[0].transpose(0, 1).flatten(1)).unflatten(1, (x.shape[1], -1))
               for x in (query, key, value))
    scale, bounds = module.head_dim ** -0.5 if scaling is None else scaling, packing.cu_seqlens
    if q.is_cuda and varlen_attn is not None and q.dtype in (torch.bfloat16, torch.float16):
        left = -1 if sliding_window is None else sliding_window - 1
        out = varlen_attn(q, k, v, bounds, bounds, packing.max_seqlen, packing.max_seqlen, scale=scale,
                          window_size=(left, 0), **GQA)
    else:
        out = document_attention(q, k, v, bounds, scale, sliding_window)
    return F.embedding(packing.row_index, out.flatten(1)).view(1, -1, *out.shape[1:]), None


AttentionInterface.register("varlen", varlen_attention)


# ---------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------

@dataclass
class MicroBatch:
    """One packed row. A hidden state predicts the token after it, so response token j of a sequence is scored at
    the position before it, and the last token of one document never predicts the first of the next.

    Neighbours with the same prompt share it: it lies once before their responses, whose first tokens are all scored
    at its last position. Only attention works on whole documents: `document_index` takes them out of the row,
    `row_index` is the way back."""
    rows: list                    # which of the packed sequences, in this order
    ids: torch.Tensor             # [T]
    positions: torch.Tensor       # [T], restarting at 0
    predictors: torch.Tensor      # [R] index into T of the state that predicts each response token
    targets: torch.Tensor         # [R] the response tokens
    lengths: torch.Tensor         # [S] response tokens of each sequence
    document_index: torch.Tensor  # [D] index into T of each token of the whole documents, end to end
    row_index: torch.Tensor       # [T] index into D
    cu_seqlens: torch.Tensor      # [S+1] int32, bounds of the documents in D
    max_seqlen: int


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
    n_bins = world * -(-sum(lengths) // (budget * world))
    while True:
        bins, load = [[] for _ in range(n_bins)], [0] * n_bins
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            j = load.index(min(load))
            bins[j].append(i)
            load[j] += lengths[i]
        if max(load) <= budget:
            break
        n_bins += world
    # attention grows with the square: 36,000 is where it costs as much as the matmuls of a 1.5B model
    bins.sort(key=lambda b: -sum(36000 * lengths[i] + lengths[i] ** 2 for i in b))
    return [bins[r::world] for r in range(world)]


def share_prompts(sequences, limit):
    """Bundle neighbours that have one prompt, up to `limit` tokens a bundle -> (bundles of indices, their tokens).

    A prompt lies in the row once. Its other copies exist in attention alone, which holds about a quarter of a layer's
    activations, and count for that much.

    >>> share_prompts([([7, 8], [1]), ([7, 8], [2, 3]), ([7, 8], [4]), ([9], [5])], limit=6)
    ([[0, 1], [2], [3]], [6, 3, 2])
    """
    bundles, tokens, last = [], [], None
    for i, (prompt, response) in enumerate(sequences):
        more = len(response) + -(-len(prompt) // 4)
        if prompt == last and tokens[-1] + more <= limit:
            bundles[-1].append(i)
            tokens[-1] += more
        else:
            bundles.append([i])
            tokens.append(len(prompt) + len(response))
            last = prompt
    return bundles, tokens


def pack_row(sequences, rows=None, device="cpu"):
    """[(prompt_ids, response_ids)] -> one MicroBatch; nothing is padded, an empty list makes a one-token row.

    >>> row = pack_row([([7, 8], [9]), ([7, 8], [5, 6])])
    >>> row.ids.tolist(), row.positions.tolist(), row.predictors.tolist()
    ([7, 8, 9, 5, 6], [0, 1, 2, 2, 3], [1, 1, 3])
    >>> pack_row([([1], [2, 3])]).document_index.tolist()
    [0, 1, 2]
    """
    ids, positions, predictors, targets, documents, last = [], [], [], [], [], None
    for prompt, response in sequences or [([0], [])]:
        if not prompt:
            raise ValueError("an empty prompt cannot predict the first response token")
        if prompt != last:
            last, start = prompt, len(ids)
            ids += prompt
            positions += range(len(prompt))
        first, end = len(ids), start + len(prompt)
        ids += response
        positions += range(len(prompt), len(prompt) + len(response))
        predictors += [end - 1, *range(first, len(ids) - 1)][:len(response)]
        targets += response
        documents.append([*range(start, end), *range(first, len(ids))])
    if torch.device(device).type != "cuda":
        documents = pad_similar(documents)
    index, row_index, bounds = [i for d in documents for i in d], [0] * len(ids), [0]
    for i in range(len(index) - 1, -1, -1):  # backwards: of equal tokens the first, which is never padding
        row_index[index[i]] = i
    for d in documents:
        bounds.append(bounds[-1] + len(d))

    def tensor(values, dtype=torch.int64):
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return MicroBatch(list(range(len(sequences))) if rows is None else rows, tensor(ids), tensor(positions),
                      tensor(predictors), tensor(targets), tensor([len(r) for _, r in sequences] or [0]),
                      tensor(index), tensor(row_index), tensor(bounds, torch.int32), max(map(len, documents)))


def pad_similar(documents):
    """Sort documents by length and lengthen each to that of a similar one, so that one SDPA call serves both: many
    small calls leave most cores idle. The last token is repeated at the end, where no other can see it.

    A call costs about as much as 2**13 pairs of tokens.

    >>> pad_similar([[0, 1, 2], [0, 3]])
    [[0, 3, 3], [0, 1, 2]]
    """
    batches = []
    for document in sorted(documents, key=len):
        batch = batches[-1] if batches else []
        if batch and len(batch) * (len(document) ** 2 - len(batch[-1]) ** 2) <= 2**13:
            batch.append(document)
        else:
            batches.append([document])
    return [d + d[-1:] * (len(batch[-1]) - len(d)) for batch in batches for d in batch]


def pack(sequences, budget, rank=0, world=1, device="cpu"):
    """[(prompt_ids, response_ids)] -> this rank's micro-batches of at most `budget` tokens each.

    Every rank is given the same `sequences` and takes its share; `MicroBatch.rows` says which. Neighbours with the
    same prompt stay together up to a quarter of a micro-batch, so that micro-batches still fill evenly.
    """
    total = sum(len(p) + len(r) for p, r in sequences)
    bundles, tokens = share_prompts(sequences, min(budget, total // world) // 4)
    dealt = split_by_budget(tokens, budget, world)[rank]
    micro = [[i for bundle in bin for i in bundles[bundle]] for bin in dealt]
    return [pack_row([sequences[i] for i in rows], rows, device) for rows in micro]


# ---------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Model:
    """What can be known of a model before a weight is loaded."""
    folder: str            # where its files lie
    positions: int | None  # longest prompt and response together
    parameters: int
    vocabulary: int        # rows of the embedding: every token id is below
    shapes: dict           # name of each weight -> its shape


def open_model(name):
    """A folder written by save_pretrained, or a hub name, which one rank of each node downloads -> Model.

    Every rank calls it. Raises RankError on all of them when any rank cannot read the model."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    folder = together("model", lambda: find_folder(name) if first else None)
    folder = together("model", lambda: folder or find_folder(name))  # the others find what was downloaded
    return together("model", lambda: read_shapes(folder))


def read_shapes(folder):
    if not os.path.exists(os.path.join(folder, "config.json")):
        raise ValueError(f"{folder} holds no model: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError, ImportError) as e:
        raise ValueError(f"{folder} holds no causal language model that this program can read: {e}") from e
    return Model(folder, getattr(config, "max_position_embeddings", None), sum(p.numel() for p in shell.parameters()),
                 shell.get_input_embeddings().weight.shape[0],
                 {k: tuple(v.shape) for k, v in shell.state_dict().items()})


def find_folder(name):
    """The folder of a model's files: `name` itself, or where the hub's files lie once they are downloaded."""
    name = os.path.expanduser(name)
    if os.path.isdir(name):
        return name
    if os.path.isfile(name):
        raise ValueError(f"{name} is a file; a model is the folder that save_pretrained wrote")
    parent, base = os.path.split(name.rstrip("/"))
    there = [os.path.join(parent, n) for n in (os.listdir(parent or ".") if os.path.isdir(parent or ".") else [])
             if os.path.isdir(os.path.join(parent, n))]
    close = difflib.get_close_matches(os.path.join(parent, base), there, 1)
    missing = f"there is no folder {name}" + (f" (did you mean {close[0]}?)" if close else "")
    if name.startswith(("/", ".")) or name.endswith("/") or name.count("/") > 1:
        raise ValueError(missing)
    try:  # the files of the top folder that transformers and vLLM read; no second copies of the weights
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
                                 ignore_patterns=["*/*", "consolidated*"], etag_timeout=5)
    except GatedRepoError as e:
        raise ValueError(f"{name} is gated: accept its licence on the hub, then `hf auth login`") from e
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise ValueError(f"{missing}, and no such model on the hub") from e
    except Exception as e:  # whatever the network does
        why = "" if close else f": {str(e).splitlines()[0]}. A folder written by save_pretrained needs no network"
        raise ValueError(f"{missing}, and the hub cannot be reached{why}") from e


class Policy(nn.Module):
    """A causal LM whose forward returns log-probabilities, so that FSDP's hooks cover the head as well."""

    def __init__(self, model, recompute=False, chunk=0):
        """model: a folder, or a transformers causal LM in fp32. recompute: activation checkpointing. chunk: tokens of
        a tile of logits, see `token_logprobs`. Raises ValueError for a model that cannot be trained or saved here."""
        super().__init__()
        if isinstance(model, (str, os.PathLike)):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # old, new and engine log-probs must be those of one function
        self.model, self.chunk, self.device = model, chunk, torch.device("cpu")
        self.grad_divisor = 1  # by what data parallelism divides the sum of the ranks' gradients
        model.train()  # transformers checkpoints activations only in train mode
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._check()
        make_savable(model)

    def forward(self, batch, temperature=1.0, entropy_grad=False):
        """MicroBatch -> logp [R], entropy [R] of its response tokens, at `temperature`."""
        # use_cache=False: with a cache transformers no longer sees the packing, and documents attend to each other
        hidden = self.model.base_model(input_ids=batch.ids[None], position_ids=batch.positions[None],
                                       attention_mask=None, use_cache=False, packing=batch).last_hidden_state[0]
        weight = self.model.get_output_embeddings().weight
        return token_logprobs(hidden[batch.predictors], weight, batch.targets, temperature, self.chunk, entropy_grad)

    @torch.no_grad()
    def _check(self):
        """Compare with the model's own logits and attention on one short document, packed twice with a shared prompt.
        Leaves the model with `varlen` attention."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        ids = [i % vocabulary for i in range(2, 10)]
        theirs = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 1:-1].float().log_softmax(-1)
        if not torch.isfinite(theirs).all():
            raise ValueError("the model computes non-finite logits: its weights are damaged")
        self.model.set_attn_implementation("varlen")
        ours = self(pack_row([(ids[:2], ids[2:])] * 2))[0]
        theirs = theirs.gather(-1, torch.tensor(ids[2:])[:, None])[:, 0].repeat(2)
        if not torch.allclose(theirs, ours, atol=1e-3, rtol=1e-3):
            raise ValueError(f"{type(self.model).__name__} computes other log-probs than policy.py: it does more to its "
                             f"logits than hidden @ head.T (soft-capping, scaling or a bias), or to its attention")

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

    def reshard(self):
        """Give back the gathered embedding and head, which FSDP2 keeps after a forward without backward: call it after
        scoring. `shard` puts FSDP's own method in this one's place; without it there is nothing to give back."""

    @torch.no_grad()
    def is_finite(self):
        """Whether every weight is finite, on all ranks."""
        finite = [torch.isfinite(p.to_local() if isinstance(p, DTensor) else p).all() for p in self.parameters()]
        return not any_rank(not torch.stack(finite).all().item())

    @torch.no_grad()
    def full_weights(self):
        """Yield (name, full tensor) under the checkpoint's names, a tied head included, one gathered at a time.

        A collective: every rank must exhaust the generator.
        """
        for name, p in self.model.state_dict().items():
            yield name, p.full_tensor() if isinstance(p, DTensor) else p


def make_savable(model):
    """Save the model without its weights, as every checkpoint will. A generation_config that save_pretrained refuses
    (do_sample false beside a temperature) is reduced to its token ids; anything else raises ValueError."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder, state_dict={})
            return
        except Exception as e:
            first = e
        kept = {k: v for k, v in model.generation_config.to_dict().items() if k.endswith("token_id") and v is not None}
        model.generation_config = GenerationConfig(**kept)
        try:
            model.save_pretrained(folder, state_dict={})
        except Exception as e:
            raise ValueError(f"transformers cannot save this model, so there would be no checkpoints: {e}") from e
    say(f"its generation_config cannot be saved ({str(first).splitlines()[0]}): checkpoints keep its token ids only")


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------

def save_checkpoint(folder, step, policy, optimizer, tokenizer, state, keep=2):
    """Write folder/000STEP with sharded model and optimizer, `state` (JSON) and hf/, an fp32 copy for transformers.

    All ranks call it, and it succeeds or fails on all of them. Everything goes to a folder *.tmp which one rename
    publishes; older ones are removed last, so that a kill at any moment leaves the newest one whole. keep: how many
    stay; 0: hf/ of all, the rest of the newest two. Raises OSError (disk full) after removing what was written, and
    FloatingPointError, with nothing written, if a weight is not finite.
    """
    if not policy.is_finite():
        raise FloatingPointError(f"a weight is not finite at step {step}: no checkpoint is written")
    final = os.path.join(folder, f"{step:06d}")
    what, tmp, first = f"checkpoint {final} not written", final + ".tmp", is_first()
    try:
        together(what, lambda: first and start_folder(folder, tmp))
        together(what, lambda: save_shards(tmp, policy, optimizer))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = together(what, lambda: get_model_state_dict(policy, options=options))  # on rank 0 alone
        together(what, lambda: first and save_rest(tmp, policy, weights, tokenizer, state))
        together(what, lambda: first and publish(tmp, final))
    except RankError as e:
        if first:
            shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(str(e)) from e
    if first:
        prune(folder, keep)


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0


def start_folder(folder, tmp):
    remove_leftovers(folder)
    os.makedirs(tmp)


def remove_leftovers(folder):
    """Remove what killed saves left. Called at the start of a run, by rank 0, and before each save."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if name.endswith(".tmp"):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def save_shards(tmp, policy, optimizer):
    model, optim = get_state_dict(policy, optimizer)
    try:
        dcp.save({"model": model, "optim": optim}, checkpoint_id=tmp)
    except CheckpointException as e:  # no Exception; the same on all ranks
        raise OSError(str(e).strip().splitlines()[-1]) from None


def save_rest(tmp, policy, weights, tokenizer, state):
    hf = os.path.join(tmp, "hf")
    policy.model.save_pretrained(hf, state_dict={k.removeprefix("model."): v for k, v in weights.items()})
    tokenizer.save_pretrained(hf)
    with open(os.path.join(tmp, "trainer.json"), "w") as f:
        json.dump(state, f, indent=1)


def publish(tmp, final):
    """Data must be on the disk before the rename that declares it complete, and the rename before older ones go."""
    for root, _, files in os.walk(tmp):
        for name in [*files, "."]:
            sync(os.path.join(root, name))
    if os.path.exists(final):  # only hf/ was left of it, or it was damaged
        os.rename(final, final + ".old.tmp")
    os.rename(tmp, final)
    sync(os.path.dirname(final))


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def prune(folder, keep):
    """Remove older checkpoints. What makes one count goes first, so that none is ever half a checkpoint."""
    with suppress(OSError):  # what cannot be removed now is tried again at the next save
        for name in checkpoints(folder)[:-(keep or 2)]:
            os.remove(os.path.join(folder, name, "trainer.json"))
        whole = checkpoints(folder)
        for name in checkpoints(folder, "hf"):
            path = os.path.join(folder, name)
            if name in whole:
                continue
            if keep:
                os.rename(path, path + ".tmp")
                shutil.rmtree(path + ".tmp")
            for file in os.listdir(path) if not keep else []:
                if file != "hf":
                    os.remove(os.path.join(path, file))


def checkpoints(folder, part="trainer.json"):
    """Names of the checkpoints in `folder` that one can resume from, oldest first. part="hf": of all whose weights
    are there, those included of which `keep=0` left nothing else."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((n for n in names if n.isdigit() and os.path.exists(os.path.join(folder, n, part))), key=int)


def check_checkpoint(path, shapes):
    """Refuse a checkpoint by another model, or a damaged one, before anything is loaded. shapes: `Model.shapes`.

    Raises ValueError or OSError with the cause."""
    state = os.path.join(path, "trainer.json")
    if not os.path.exists(state):
        raise OSError(f"{path} is no checkpoint to go on from: it has no trainer.json"
                      + (", only weights for transformers in hf/" if os.path.isdir(os.path.join(path, "hf")) else ""))
    read_json(state)
    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
    except Exception as e:  # whatever a damaged pickle does
        raise OSError(f"{path}/.metadata is damaged ({type(e).__name__}: {e})") from e
    prefix = "model.model."
    saved = {k.removeprefix(prefix): tuple(v.size) for k, v in metadata.state_dict_metadata.items()
             if k.startswith(prefix)}
    for name in sorted(saved.keys() | shapes.keys()):
        if saved.get(name) != shapes.get(name):
            raise ValueError(f"{path} is a checkpoint of another model: {name} is {saved.get(name, 'missing')} there and "
                             f"{shapes.get(name, 'missing')} here")
    for part in metadata.storage_data.values():
        file = os.path.join(path, part.relative_path)
        if not os.path.exists(file) or os.path.getsize(file) < part.offset + part.length:
            raise OSError(f"{file} is damaged: it is missing or too short")


def load_checkpoint(path, policy, optimizer):
    """Restore model and optimizer in place, on the same or another number of ranks; returns `state`.

    Raises RankError on all ranks, with the cause (see `check_checkpoint`)."""
    shapes = {k: tuple(v.shape) for k, v in policy.model.state_dict().items()}
    together("checkpoint", lambda: check_checkpoint(path, shapes))

    def load():
        model, optim = get_state_dict(policy, optimizer)
        try:
            dcp.load({"model": model, "optim": optim}, checkpoint_id=path)
        except CheckpointException as e:  # no Exception; the same on all ranks
            raise OSError(f"{path} is damaged: {str(e).strip().splitlines()[-1]}") from None
        set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
        return read_json(os.path.join(path, "trainer.json"))

    return together("checkpoint", load)
