"""policy.py - the model being trained: packed tokens in, log-probabilities out.

    policy = Policy("models/smollm2").shard(torch.bfloat16)  # FSDP2; one process may skip .shard
    for batch in pack(sequences, budget=32768):              # sequences: [(prompt_ids, response_ids)]
        logp, entropy = policy(batch, temperature=0.6)       # [R], [R]: response tokens only

Logits [T, V] are never held (20 GB at 32K tokens), rows are not padded, neighbours share their prompt.
Master weights are fp32: at lr 1e-6 a bf16 weight of 0.02 would never move.
Left out: tensor, pipeline and context parallelism, LoRA, quantisation, torch.compile.
Shapes: T packed tokens, R response tokens among them, S sequences, D tokens of whole documents, V vocabulary.
"""
import difflib
import itertools
import json
import os
import shutil
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig

from common import RankError, any_rank, read_json, say, together, write_atomic


def token_logprobs_plain(hidden, head_weight, targets, temperature=1.0):
    """The readable twin of `token_logprobs`: all [T, V] logits, and autograd; float64 stays float64."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprobs = torch.log_softmax(hidden.to(dtype) @ head_weight.to(dtype).T / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


def token_logprobs(hidden, head_weight, targets, temperature=1.0, chunk=0, entropy_grad=True):
    """hidden [T, H], head_weight [V, H], targets [T] -> log-probability and entropy [T], in nats and fp32.
    temperature > 0 divides the logits. entropy_grad=False: the entropy is a metric only. Memory: two tiles of
    `chunk` tokens (0: 0.6 GB each) at most, an fp32 gradient of the head. Idea: verl's FusedLinearForPPO."""
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not hidden.is_cuda:  # CUDA kernels add up bf16 products in fp32, those of a CPU do not
        hidden, head_weight = hidden.float(), head_weight.float()
    chunk = chunk or max(1, 150_000_000 // len(head_weight))
    logp, entropy = TokenLogprobs.apply(hidden, head_weight, targets, float(temperature), chunk)
    return logp, entropy if entropy_grad else entropy.detach()


class TokenLogprobs(torch.autograd.Function):
    """Forward keeps [T] numbers and its last tile; backward computes the logits of the other tiles once more.
    With q = softmax(z): d logp_y / dz = onehot(y) - q, and of the entropy H: d H / dz = -q (log q + H)."""

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, chunk):
        logp, entropy, lse = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        ctx.save_for_backward(hidden, head, targets, lse, entropy)
        ctx.set_materialize_grads(False)  # an entropy that is only a metric comes back as None
        ctx.tiles = [slice(i, i + chunk) for i in range(0, len(hidden), chunk)]
        ctx.temperature, ctx.last, ctx.buffer = temperature, None, None
        if hidden.dtype == torch.float32:  # for all tiles: a CPU pays dearly for fresh pages
            ctx.buffer = hidden.new_empty(min(chunk, len(hidden)), len(head))
        for t in ctx.tiles:
            ctx.last = logits(hidden[t], head, temperature, ctx.buffer)
            for b in blocks(ctx.last):
                z, top = ctx.last[b], ctx.last[b].amax(-1)
                e = z.sub_(top[:, None]).exp()  # shifted: the entropy is then a sum of small terms
                total = e.sum(-1)
                entropy[t][b] = total.log() - e.mul_(z).sum(-1) / total
                logp[t][b] = z.sub_(total.log()[:, None]).gather(-1, targets[t][b, None])[:, 0]
                lse[t][b] = top + total.log()
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        hidden, head, targets, lse, entropy = ctx.saved_tensors
        up, up_entropy = ((torch.zeros_like(lse) if g is None else g / ctx.temperature)[:, None]
                          for g in (grad_logp, grad_entropy))
        buffer, ctx.buffer = ctx.buffer, None  # a graph outlives its backward in many loops, this must not
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=torch.float32)  # a bf16 sum would lose small terms
        piece = 4096 if hidden.dtype == torch.float32 else len(head)  # some CPU kernels add 152 K in a row
        for t in reversed(ctx.tiles):
            log_q, ctx.last = ctx.last, None
            if log_q is None:
                log_q = logits(hidden[t], head, ctx.temperature, buffer).sub_(lse[t, None])
            for b in blocks(log_q):
                factor = -up[t][b]
                if grad_entropy is not None:
                    factor = factor - up_entropy[t][b] * (log_q[b] + entropy[t][b, None])
                log_q[b].exp_().mul_(factor)
            dz = log_q.scatter_add_(-1, targets[t, None], up[t]).to(hidden.dtype)
            grad_hidden[t] = sum(d @ w for d, w in zip(dz.split(piece, 1), head.split(piece)))
            if dz.dtype == torch.float32:
                grad_head.addmm_(dz.T, hidden[t])
            else:
                grad_head += dz.T @ hidden[t]
        return grad_hidden, grad_head.to(head.dtype), None, None, None


def logits(hidden, head, temperature, buffer):
    """[t, H], [V, H] -> [t, V] in fp32: a bf16 result would round a logit of 20 by up to 0.06."""
    if hidden.dtype != torch.float32:
        return torch.mm(hidden, head.T, out_dtype=torch.float32).div_(temperature)
    z = hidden.new_empty(len(hidden), len(head)) if buffer is None else buffer[:len(hidden)]
    return z.addmm_(hidden, head.T, beta=0, alpha=1 / temperature)


def blocks(z):
    """Slices of a tile's rows: on a CPU as many rows as its cache holds, which makes several passes cheap."""
    rows = len(z) if z.is_cuda else max(1, 2**18 // z.shape[1])
    return [slice(i, i + rows) for i in range(0, len(z), rows)]


def document_attention(q, k, v, cu_seqlens, scale, window=None):
    """Causal attention inside each document, one SDPA call for neighbours of one length:
    q [D, Hq, E], k and v [D, Hkv, E], cu_seqlens [S+1] -> [D, Hq, E]. `window` includes the token itself."""
    runs = [(len(list(same)), n) for n, same in itertools.groupby(cu_seqlens.diff().tolist())]
    groups, out = q.shape[1] // k.shape[1], []
    # split, not slices: the gradient of a slice is a tensor of zeros as large as the whole row
    for run, *documents in zip(runs, *(x.split([count * n for count, n in runs]) for x in (q, k, v))):
        query, key, value = (x.unflatten(0, run).transpose(1, 2) for x in documents)  # [count, heads, n, E]
        if groups > 1:  # by hand: SDPA's own enable_gqa leaves the flash path on CPU
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        i, mask = torch.arange(run[1], device=q.device), None
        if window is not None and run[1] > window:
            mask = (i[None] <= i[:, None]) & (i[None] > i[:, None] - window)
        y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale)
        out.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def varlen_attention(module, query, key, value, attention_mask=None, scaling=None, sliding_window=None,
                     softcap=None, s_aux=None, packing=None, **_):
    """Attention of transformers models: query [1, Hq, T, E], key and value [1, Hkv, T, E], packing: the
    MicroBatch -> ([1, T, Hq, E], None). Gemma 3's `sliding_window`, dropped, would cost 2 nats a token."""
    if packing is None or softcap is not None or s_aux is not None:
        raise ValueError("attention with soft-capping or sinks, or that is handed no `packing`, is refused")
    rows = (x[0].transpose(0, 1) for x in (query, key, value))  # embedding is x[index] with a faster gradient
    q, k, v = (F.embedding(packing.document_index, x.flatten(1)).unflatten(1, x.shape[1:]) for x in rows)
    scale, bounds = module.head_dim ** -0.5 if scaling is None else scaling, packing.cu_seqlens
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        grouped = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__kwdefaults__ else {}  # torch 2.11: no
        out = varlen_attn(q, k, v, bounds, bounds, packing.max_seqlen, packing.max_seqlen, scale=scale,
                          window_size=((sliding_window or 0) - 1, 0), **grouped)
    else:
        out = document_attention(q, k, v, bounds, scale, sliding_window)
    return F.embedding(packing.row_index, out.flatten(1)).unflatten(1, out.shape[1:])[None], None


@dataclass
class MicroBatch:
    """One packed row. Neighbours share one copy of their prompt; attention alone sees whole documents."""
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


def pack(sequences, budget, rank=0, world=1, device="cpu"):
    """[(prompt_ids, response_ids)] -> this rank's micro-batches of at most `budget` tokens each.
    Neighbours share a prompt up to a quarter of one, so that all fill evenly; its further copies, which only
    attention sees, count for a quarter. All ranks are given the same `sequences`."""
    limit = min(budget, sum(len(p) + len(r) for p, r in sequences) // world) // 4
    bundles, tokens = [], []
    for i, (prompt, response) in enumerate(sequences):
        more = len(response) + -(-len(prompt) // 4)
        if i and prompt == sequences[i - 1][0] and tokens[-1] + more <= limit:
            bundles[-1].append(i)
            tokens[-1] += more
        else:
            bundles.append([i])
            tokens.append(len(prompt) + len(response))
    mine = [[i for b in bin for i in bundles[b]] for bin in split_by_budget(tokens, budget, world)[rank]]
    return [pack_row([sequences[i] for i in rows], rows, device) for rows in mine]


def split_by_budget(lengths, budget, world=1):
    """Deal sequences into micro-batches of at most `budget` tokens, as many on each rank -> their indices, by
    rank and micro-batch. Those that run at one moment cost about the same: FSDP meets at every layer.
    >>> split_by_budget([5, 3, 3, 1], budget=6, world=2)
    [[[0, 3]], [[1, 2]]]
    """
    if max(lengths, default=0) > budget:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit --token_budget {budget}")
    for n_bins in itertools.count(world * -(-sum(lengths) // (budget * world)), world):
        bins, load = [[] for _ in range(n_bins)], [0] * n_bins
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            j = load.index(min(load))
            bins[j].append(i)
            load[j] += lengths[i]
        if max(load, default=0) <= budget:
            # attention grows with the square: at 36,000 it costs as much as the matmuls of a 1.5B model
            bins.sort(key=lambda b: -sum(36000 * lengths[i] + lengths[i] ** 2 for i in b))
            return [bins[r::world] for r in range(world)]


def pack_row(sequences, rows=None, device="cpu"):
    """[(prompt_ids, response_ids)] -> one MicroBatch; an empty list makes a row of one token."""
    ids, predictors, targets, documents, last, end = [], [], [], [], None, 0
    for prompt, response in sequences or [([0], [])]:
        if not prompt:
            raise ValueError("an empty prompt cannot predict the first response token")
        if prompt != last:
            last, shared = prompt, np.arange(end, end + len(prompt))
            ids.append(prompt)
            end += len(prompt)
        documents.append(np.concatenate([shared, np.arange(end, end + len(response))]))
        end += len(response)
        ids.append(response)
        predictors.append(documents[-1][len(prompt) - 1:-1])
        targets.append(response)
    if torch.device(device).type != "cuda":  # similar lengths are made equal by unseen last tokens
        documents.sort(key=len)
        for i in range(len(documents) - 2, -1, -1):
            short, long = len(documents[i]), len(documents[i + 1])
            if long**2 - short**2 <= 2**12:  # pairs of tokens, which cost as much as an SDPA call
                documents[i] = np.pad(documents[i], (0, long - short), mode="edge")
    index, offsets = np.concatenate(documents), np.concatenate([np.arange(len(d)) for d in documents])
    row_index = np.unique(index, return_index=True)[1]  # of several the first, never padding
    fields = ids, [offsets[row_index]], predictors, targets, [list(map(len, targets))], [index], [row_index]
    bounds = torch.tensor([0, *itertools.accumulate(map(len, documents))], dtype=torch.int32)
    tensors = [torch.from_numpy(np.concatenate(x).astype(np.int64)) for x in fields] + [bounds]
    return MicroBatch(rows or [*range(len(sequences))], *(x.to(device, non_blocking=True) for x in tensors),
                      max(map(len, documents)))


Model = namedtuple("Model", "folder positions parameters vocabulary shapes")  # positions may be None


def open_model(name):
    """Folder, or hub name that one rank of each node downloads -> Model, unloaded. RankError on all ranks."""
    def read():
        folder = find_folder(name)
        config = AutoConfig.from_pretrained(folder).get_text_config()
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config)
        shapes = {k: tuple(v.shape) for k, v in shell.state_dict().items()}
        return Model(folder, getattr(config, "max_position_embeddings", None), shell.num_parameters(),
                     len(shell.get_input_embeddings().weight), shapes)

    together(f"model {name}", lambda: os.environ.get("LOCAL_RANK", "0") == "0" and find_folder(name))
    return together(f"model {name}", read)


def find_folder(name):
    path = Path(name).expanduser()
    if (path / "config.json").exists():
        return str(path)
    if path.exists():
        raise ValueError("it has no config.json: not a folder that save_pretrained wrote")
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], 1)
    missing = "there is no such folder" + "".join(f", did you mean {path.with_name(n)}?" for n in close)
    if name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1:
        raise ValueError(missing)
    try:  # what transformers and vLLM read: no other formats, no second copies of the weights
        return snapshot_download(name, ignore_patterns=["*/*", "consolidated*"], allow_patterns=[
            "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    except Exception as e:  # no such name, no permission, no network
        said = f", and the hub does not give it (a folder needs no network): {' '.join(str(e).split())}"
        raise ValueError(missing if close else missing + said) from e


class Policy(torch.nn.Module):
    """A causal LM in fp32, or its folder. Forward returns log-probabilities: FSDP's hooks cover the head too.
    recompute: activation checkpointing. ValueError for a model that cannot be trained here."""
    def __init__(self, model, recompute=False, chunk=0):
        super().__init__()
        if isinstance(model, (str, os.PathLike)):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
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
        # use_cache=False: with a cache transformers does not see the packing: documents attend to each other
        hidden = self.model.base_model(input_ids=batch.ids[None], position_ids=batch.positions[None],
                                       use_cache=False, packing=batch).last_hidden_state[0, batch.predictors]
        head = self.model.get_output_embeddings().weight
        return token_logprobs(hidden, head, batch.targets, temperature, self.chunk, entropy_grad)

    @torch.no_grad()
    def _check(self):
        """Refuse a model whose own attention and logits are not those of `forward`; then make it `varlen`."""
        ids = [i % len(self.model.get_output_embeddings().weight) for i in range(2, 10)]
        logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 1:-1].float()
        if not torch.isfinite(logits).all():
            raise ValueError("the model computes non-finite logits: its weights are damaged")
        theirs = logits.log_softmax(-1).gather(-1, torch.tensor(ids[2:])[:, None])[:, 0].repeat(2)
        AttentionInterface.register("varlen", varlen_attention)
        self.model.set_attn_implementation("varlen")
        ours = self(pack_row([(ids[:2], ids[2:])] * 2))[0]  # two that share their prompt
        if not torch.allclose(theirs, ours, atol=1e-3, rtol=1e-3):
            raise ValueError(f"{type(self.model).__name__} does more to its logits or in attention than is "
                             "computed here: soft-capping, scaling, a bias")

    def shard(self, dtype=torch.bfloat16, device="cpu"):
        """FSDP2 over all ranks, layer by layer: compute in `dtype`, the rest in fp32. Returns self."""
        self.device, self.grad_divisor = torch.device(device), dist.get_world_size()
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (dist.get_world_size(),))
        mixed = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)  # bf16(257) is 256
        for module in [*self.model.base_model.layers, self]:
            fully_shard(module, mesh=mesh, mp_policy=mixed)
        return self.to(self.device)  # buffers; parameters are there already

    def reshard(self):
        """Call it after scoring, which leaves embedding and head gathered. `shard` puts FSDP's own here."""

    def is_finite(self):
        """Whether every weight is finite, on every rank."""
        weights = (p.to_local() if hasattr(p, "to_local") else p for p in self.parameters())
        return not any_rank(not torch.stack([torch.isfinite(w).all() for w in weights]).all())

    def full_weights(self):
        """Yield (name, full tensor), a tied head included. A collective: every rank must exhaust it."""
        for name, p in self.model.state_dict().items():
            yield name, p.full_tensor() if hasattr(p, "full_tensor") else p


def make_savable(model):
    """Reduce a generation_config that save_pretrained would refuse at every checkpoint to its token ids."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as e:  # such as do_sample false beside a temperature
        old = model.generation_config.to_dict().items()
        model.generation_config = GenerationConfig(**{k: v for k, v in old if "token_id" in k and v != -1})
        say(f"checkpoints keep only the token ids of the generation_config: {' '.join(str(e).split())}")


def save_checkpoint(folder, step, policy, optimizer, tokenizer, state, keep=2):
    """Write folder/000STEP: sharded model and optimizer, `state` as trainer.json, hf/ in fp32.
    All ranks call it, and it succeeds or fails on all. One rename publishes it and old ones go last: a kill
    leaves the newest whole. keep: how many stay; 0: hf/ of all, the rest of two. OSError (a full disk) after
    removing what was written; FloatingPointError, before, if a weight is not finite."""
    if not policy.is_finite():
        raise FloatingPointError(f"a weight is not finite at step {step}: no checkpoint is written")
    final, first = os.path.join(folder, f"{step:06d}"), not dist.is_initialized() or dist.get_rank() == 0
    tmp, what = final + ".tmp", f"checkpoint {final} not written"

    def write():
        run_dcp(dcp.save, policy, optimizer, tmp)
        weights = {name: w.cpu() for name, w in policy.full_weights() if first}  # other ranks gather and drop
        if first:
            policy.model.save_pretrained(f"{tmp}/hf", state_dict=weights)
            tokenizer.save_pretrained(f"{tmp}/hf")
            write_atomic(os.path.join(tmp, "trainer.json"), json.dumps(state, indent=1))
            for file in filter(os.path.isfile, os.scandir(f"{tmp}/hf")):  # on the disk before the rename
                with open(file) as f:
                    os.fsync(f.fileno())
            if os.path.exists(final):  # hf/ that was left of it, at most
                os.rename(final, final + ".old.tmp")
            os.rename(tmp, final)

    try:
        together(what, lambda: first and remove_leftovers(folder))
        together(what, lambda: first and os.makedirs(tmp))
        together(what, write)
    except RankError as e:
        if first:
            shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(str(e)) from e
    with suppress(OSError):  # what cannot be removed today is tried again at the next save
        if first:
            prune(folder, keep)


def run_dcp(function, policy, optimizer, path):
    model, optim = states.get_state_dict(policy, optimizer)
    try:
        function({"model": model, "optim": optim}, checkpoint_id=path)
    except dcp.CheckpointException as e:  # no Exception; the same on all ranks
        raise OSError(str(e).strip().splitlines()[-1]) from None
    return model, optim


def remove_leftovers(folder):
    """Remove what a killed save left behind. For rank 0, before a run and before each save."""
    for path in sorted(Path(folder).glob("*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def prune(folder, keep):
    """Remove old checkpoints, with keep=0 all but their hf/. What makes one count goes first."""
    for name in checkpoints(folder, "trainer.json" if keep else "hf")[:-(keep or 2)]:
        path = os.path.join(folder, name)
        if keep:
            os.rename(path, path + ".old.tmp")
            continue
        for file in sorted(set(os.listdir(path)) - {"hf"}, reverse=True):  # trainer.json comes first
            os.remove(os.path.join(path, file))
    remove_leftovers(folder)


def checkpoints(folder, part="trainer.json"):
    """Names of the checkpoints to resume from, oldest first; part="hf": of all whose weights are there."""
    names = (path.parent.name for path in Path(folder).glob(f"*/{part}"))
    return sorted(filter(str.isdigit, names), key=int)


def check_checkpoint(path, shapes):
    """Refuse a checkpoint of a model of other `shapes` (ValueError) or a damaged one (OSError), unloaded."""
    if not os.path.exists(f"{path}/trainer.json"):
        raise OSError(f"{path} is nothing to go on from: it has no trainer.json (--keep 0 leaves hf/ alone)")
    read_json(f"{path}/trainer.json")
    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
    except Exception as e:  # whatever a damaged pickle does
        raise OSError(f"{path}/.metadata is damaged ({type(e).__name__})") from e
    saved = {k.removeprefix("model.model."): tuple(v.size) for k, v in metadata.state_dict_metadata.items()
             if k.startswith("model.model.")}
    for name, _ in sorted(saved.items() ^ shapes.items()):
        there, here = saved.get(name, "missing"), shapes.get(name, "missing")
        raise ValueError(f"{path} is of another model: {name} is {there} there, and {here} in this one")
    for part in metadata.storage_data.values():
        file = os.path.join(path, part.relative_path)
        if not os.path.exists(file) or os.path.getsize(file) < part.offset + part.length:
            raise OSError(f"{file} is damaged: missing or cut short")


def load_checkpoint(path, policy, optimizer):
    """Restore model and optimizer in place, on any number of ranks -> `state`. RankError, with the cause."""
    def load():
        model, optim = run_dcp(dcp.load, policy, optimizer, path)
        states.set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
        return read_json(os.path.join(path, "trainer.json"))

    shapes = {k: tuple(v.shape) for k, v in policy.model.state_dict().items()}
    together("checkpoint", lambda: check_checkpoint(path, shapes))
    return together(f"checkpoint {path} is damaged", load)
