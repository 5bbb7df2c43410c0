"""rollout.py - prompts in, graded samples out.

    engine = make_engine("auto", "path/or/hub-name", max_model_len=9216, dtype="auto", device=device)
    engine.push(policy.full_weights())                # before the first rollout and after every update
    samples, seconds = rollout(engine, tokenizer, problems, prompts, sampling, step, grade)

Two engines, one small interface: generate, push, sleep, wake, close.

  VllmEngine    vLLM inside this very process, one engine a rank, on GPUs and on vLLM's CPU backend.
  TorchEngine   transformers and a KV cache, anywhere torch runs: finished rows leave the batch at once and
                waiting prompts take their place. The plain twin: tests hold the two against each other.

Both promise: token ids without padding; log-probs of the *tempered* distribution a token was drawn from
(anything else makes every importance ratio wrong at T = 0.6); finish_reason "length" if and only if the
limit cut the sample; a sample depends on its seed, not on its batch, its rank or the number of ranks, up
to the last bits of the kernels.

Left out on purpose: tensor-parallel engines (a 1.5B model fits one GPU), asynchronous rollouts, tools.
"""
import hashlib
import importlib.util
import logging
import os
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import RankError, any_rank, gather, is_out_of_memory, join_processes, say, together


@dataclass(frozen=True, kw_only=True)
class Sampling:
    n: int = 1             # samples of each prompt
    temperature: float     # 0 is greedy
    top_p: float = 1.0
    max_tokens: int        # of the response
    seed: int = 0          # of the run, see sample_seed

    def __post_init__(self):
        if self.n < 1 or self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"n and max_tokens start at 1, temperature at 0, top_p is in (0, 1]: {self}")


@dataclass
class Sample:
    prompt_ids: list             # token ids
    response_ids: np.ndarray     # int32 [R], the end token included when there is one
    logprobs: np.ndarray         # float32 [R], under the tempered distribution; NaN from a broken model
    finish_reason: str           # "stop" or "length"
    text: str = ""               # the response with its special tokens
    reward: float = 0.0
    verdict: str = ""            # the grader's word for the reason


def sample_seed(*key):
    """A 63-bit number for (run seed, step, problem id, sample): the same on any number of ranks.

    >>> sample_seed(0, 1, "p7", 3) == sample_seed(0, 1, "p7", 3) != sample_seed(0, 1, "p7", 4)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


# ---- One rollout over all ranks --------------------------------------------------------------------------

def rollout(engine, tokenizer, problems, prompts, sampling, step, grade, *, only=None, stop=None,
            desc="generate"):
    """Generate and grade on all ranks -> (samples, seconds), the same samples on every rank.

    problems [P] with an .id, prompts [P] of token ids. One sample for each (p, j), p < P, j < sampling.n, in
    this order, or for the pairs in `only`. Rank r makes pairs r, r + world, ...: the samples of a long
    problem spread out, which saves a tenth of the time. grade(problem, sample) -> (reward, verdict) runs in a
    thread of that rank while others generate; it may empty a sample that nobody needs later. samples is None
    when stop() turned true on any rank. seconds: "generate", "reward" (waiting for the thread), "idle"
    (waiting for other ranks). An error of engine or grade ends the generation of all ranks: RankError.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pairs = [(p, j) for p in range(len(problems)) for j in range(sampling.n)] if only is None else list(only)
    mine = pairs[rank::world]
    seeds = [sample_seed(sampling.seed, step, problems[p].id, j) for p, j in mine]
    halt, work, clock = Halt(stop), [], [time.time()]

    def finish(i, sample):
        try:
            sample.text = tokenizer.decode(sample.response_ids.tolist(), clean_up_tokenization_spaces=False)
            sample.reward, sample.verdict = grade(problems[mine[i][0]], sample)
        except BaseException:
            halt.say()
            raise

    def generate_and_grade():
        pool = ThreadPoolExecutor(1)
        try:
            samples = engine.generate(
                [prompts[p] for p, _ in mine], seeds, sampling, stop=halt.heard,
                on_sample=lambda i, sample: work.append(pool.submit(finish, i, sample)),
                desc=desc if rank == 0 else None)
            clock.append(time.time())
            for future in work:
                future.result()
            clock.append(time.time())
            return samples
        except BaseException:
            halt.say()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # only an error leaves something to cancel

    samples = whole_error("rollout", generate_and_grade)
    parts = gather(None if samples is None else flatten(samples))
    clock.append(time.time())
    seconds = dict(zip(("generate", "reward", "idle"), np.diff(clock).tolist()))
    if any(part is None for part in parts):
        return None, seconds
    parts = [unflatten(part, [prompts[p] for p, _ in pairs[r::world]]) for r, part in enumerate(parts)]
    return [parts[i % world][i // world] for i in range(len(pairs))], seconds


class Halt:
    """A word that any rank says and all ranks hear within a second, in the middle of their generation."""

    made = 0  # every rank makes its rollouts in the same order, so the count names the same one on all

    def __init__(self, stop):
        Halt.made += 1
        self.stop, self.key, self.said, self.looked = stop, f"halt {Halt.made}", False, 0.0
        self.store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None

    def say(self):
        self.said = True
        if self.store is not None:
            self.store.set(self.key, "1")

    def heard(self):
        if not self.said and self.stop is not None and self.stop():
            self.say()
        if not self.said and self.store is not None and time.monotonic() > self.looked + 1:
            self.looked = time.monotonic()
            self.said = self.store.check([self.key])
        return self.said


def flatten(samples):
    """Samples as flat arrays, which travel 50 times faster than lists of numbers; all know the prompts."""
    ids = np.concatenate([np.empty(0, np.int32), *(s.response_ids for s in samples)])
    logprobs = np.concatenate([np.empty(0, np.float32), *(s.logprobs for s in samples)])
    ends = np.cumsum([len(s.response_ids) for s in samples])[:-1]
    return ids, logprobs, ends, [(s.finish_reason, s.text, s.reward, s.verdict) for s in samples]


def unflatten(part, prompts):
    ids, logprobs, ends, rest = part
    rows = zip(prompts, np.split(ids, ends), np.split(logprobs, ends), rest)
    return [Sample(prompt, row_ids, row_logprobs, *more) for prompt, row_ids, row_logprobs, more in rows]


def whole_error(what, work):
    """`together` with the whole text of an error: vLLM says what is wrong in its second line."""
    def one_line():
        try:
            return work()
        except Exception as e:
            text = " ".join(f"{type(e).__name__}: {e}".split())[:500]
            said = not is_out_of_memory(e) or "out of memory" in text.lower()
            raise RuntimeError(text if said else f"out of memory: {text}") from e
    return together(what, one_line)


# ---- Which engine, and what both refuse ------------------------------------------------------------------

def make_engine(kind, model, *, max_model_len, dtype, device, max_seqs=0, gpu_memory=0.6, seed=0,
                load_weights=False, enable_sleep=False, enforce_eager=False):
    """kind "vllm", "torch" or "auto": vLLM where it runs the model, else torch, and says why. On a GPU, where
    torch is many times slower, a vLLM that is installed but fails is an error. All ranks call it together and
    get the same engine, or RankError.

    model: path or hub name. max_model_len: prompt plus response. dtype: see compute_dtype. max_seqs: rows at
    once, 0: the engine's choice. gpu_memory: vLLM's share of the card. load_weights=False starts vLLM with
    dummy weights: training pushes the policy's first, and a forgotten push cannot hide.
    """
    if kind not in ("vllm", "torch", "auto"):
        raise ValueError(f'engine must be "vllm", "torch" or "auto", not {kind!r}')
    device = torch.device(device)
    dtype = compute_dtype(dtype, device)
    if kind != "torch":
        installed = any_rank(importlib.util.find_spec("vllm"))
        try:
            return VllmEngine(model, max_model_len, dtype, device, max_seqs, gpu_memory, seed, load_weights,
                              enable_sleep, enforce_eager)
        except RankError as e:
            problem = str(e)
            if kind == "vllm" or installed and device.type != "cpu":
                raise RankError(f"{problem}. --engine torch works without vLLM") from e
        say(f"engine: torch ({problem})")  # after the except block: its error holds half an engine in memory
    return whole_error("engine", lambda: TorchEngine(model, max_model_len, dtype, device, max_seqs))


def compute_dtype(name, device):
    """"auto" -> "bfloat16" on a card that computes in it (compute capability 8.0 or more), else "float32"."""
    if name == "auto":
        able = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return "bfloat16" if able else "float32"
    if name not in ("bfloat16", "float32"):
        raise ValueError(f'dtype must be "auto", "bfloat16" or "float32", not {name!r}')
    return name


def check_prompts(prompts, vocabulary, room=float("inf")):
    """ValueError unless every prompt has 1 to `room` tokens, all of them with an embedding."""
    for prompt in prompts:
        if not 0 < len(prompt) <= room:
            raise ValueError(f"a prompt has {len(prompt)} tokens, max_model_len leaves room for 1 to {room}")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(f"a prompt holds token {max(prompt)}, the model has {vocabulary} embeddings: "
                             f"tokenizer and model do not belong together")


def check_tokenizer(tokenizer, prompt_texts, prompts, vocabulary):
    """ValueError with the cause if prompts [P] of token ids lost something of prompt_texts [P]: whole
    prompts, or the problems that a template wrapped. What `plain` drops may differ."""
    check_prompts(prompts, vocabulary)
    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, None}
    for text, prompt in zip(prompt_texts, prompts, strict=True):
        back = tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        if plain(text) not in plain(back) or not unknown.isdisjoint(prompt):
            raise ValueError(
                f"the tokenizer ({type(tokenizer).__name__}) or its template does not give text back: "
                f"{text[:200]!r} becomes {back[:400]!r}. If blanks are missing, tokenizer_config.json may "
                f'name a class that misreads tokenizer.json: "PreTrainedTokenizerFast" reads it as it is')


def plain(text):
    """Text without what tokenizers may change: case, Unicode forms, invisible characters, repeated blanks.

    >>> plain("What  is\\n\\n x\\u00b2?") == plain("what is\\nX2?") != plain("what is X2?")
    True
    """
    text = unicodedata.normalize("NFKC", text.replace("\r", "\n")).casefold()
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return "\n".join(" ".join(line.split()) for line in text.split("\n") if line.strip())


def stop_token_ids(model, config):
    """All ids that end a response, in both engines: the tokenizer's own, and those of generation_config.json
    or, without that file, of the model's config."""
    try:
        ids = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ids = config.eos_token_id
    try:
        own = AutoTokenizer.from_pretrained(model).eos_token_id
    except (OSError, ValueError, KeyError):  # a model without a tokenizer
        own = None
    return {own, *(ids if isinstance(ids, list) else [ids])} - {None}


# ---- vLLM ------------------------------------------------------------------------------------------------

class VllmEngine:
    """vLLM in this process, fed one request a sample; each rank is an engine with its own prompts.

    By itself vLLM waits for all ranks twice: to make process groups, and for the smallest free memory. A rank
    that failed before would leave the others waiting. So all ranks agree before the groups are made, each
    sizes its cache alone, and all agree again after a first token. What is left is a rank that hangs, or
    fails between two groups: the time limit of the process group ends that.
    """

    name = "vllm"

    def __init__(self, model, max_model_len, dtype, device, max_seqs, gpu_memory, seed, load_weights,
                 enable_sleep, enforce_eager):
        on_cpu = device.type == "cpu"
        self.llm, self.asleep, self.sleeps = None, set(), enable_sleep and not on_cpu
        self.dtype, self.max_model_len, self.loaded = getattr(torch, dtype), max_model_len, load_weights
        untied = {} if load_weights else {"tie_word_embeddings": False}
        options = {
            "model": model, "dtype": dtype, "max_model_len": max_model_len, "seed": seed,
            "load_format": "auto" if load_weights else "dummy",
            "distributed_executor_backend": "external_launcher",  # in torchrun's process group
            "max_num_seqs": max_seqs or (128 if on_cpu else 256), "enable_prefix_caching": True,
            # a seeded request whose prefill is split over two steps kills the CPU sampler of 0.32
            # ("CPU Generator does not use offset"), so there prompts are never split
            "max_num_batched_tokens": max(8192, max_model_len) if on_cpu else 8192,
            "enable_chunked_prefill": not on_cpu, "enforce_eager": enforce_eager or on_cpu,
            "gpu_memory_utilization": gpu_memory, "enable_sleep_mode": self.sleeps,
            "logprobs_mode": "processed_logprobs",  # the default ignores the temperature
            # fp32 logits as the trainer's: rounding them to bf16 makes half of the mismatch between the two.
            # A tied head is packed once and goes stale after a push; untied, it is pushed like any tensor. A
            # model loaded from disk takes no push, and its checkpoint may hold no head of its own
            "hf_overrides": {"head_dtype": "float32", **untied}}
        whole_error("vLLM", lambda: self._prepare(options, device.type))
        try:
            whole_error("vLLM", lambda: self._start(options))
        except RankError:
            self.close()
            raise

    def _prepare(self, options, device):
        """What can fail before ranks wait for each other."""
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if device == "cpu":
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")          # GiB
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer needs the cores later
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available" on CPUs
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        runs_on = "cuda" if current_platform.is_cuda_alike() else current_platform.device_type
        if runs_on != device:
            raise RuntimeError(f"the installed vLLM is for {runs_on}, this process runs on {device}")
        self.config = EngineArgs(**options).create_engine_config()
        self.vocabulary = self.config.model_config.get_vocab_size()
        self.stop_ids = sorted(stop_token_ids(options["model"], self.config.model_config.hf_config))

    def _start(self, options):
        from vllm import LLM
        from vllm.config import set_current_vllm_config
        from vllm.platforms import current_platform
        from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher, UniProcExecutor
        from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
        if not dist.is_initialized():
            join_processes()
        with set_current_vllm_config(self.config):
            init_worker_distributed_environment(self.config, dist.get_rank(), "env://",
                                                int(os.environ["LOCAL_RANK"]), current_platform.dist_backend)
        ExecutorWithExternalLauncher.determine_available_memory = UniProcExecutor.determine_available_memory
        with mock.patch.object(torch, "set_num_threads"):  # its CPU worker replaces it for good
            self.llm = LLM(**options)
        # a model may load and still find no kernel for its heads
        self.generate([[0, 0]], [0], Sampling(temperature=1.0, max_tokens=2))

    def generate(self, prompts, seeds, sampling, on_sample=None, stop=None, desc=None):
        """One Sample for each (prompt, seed), in order; None if stop() turned true. on_sample(i, sample) is
        called while the rest still generates. desc: title of a progress bar."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        engine, samples = self.llm.llm_engine, [None] * len(prompts)
        check_prompts(prompts, self.vocabulary, self.max_model_len - sampling.max_tokens)
        bar = tqdm(total=len(prompts), desc=desc, disable=None if desc else True, leave=False)
        try:
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                engine.add_request(str(i), {"prompt_token_ids": list(prompt)}, SamplingParams(
                    temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens,
                    seed=seed, stop_token_ids=self.stop_ids, logprobs=0, flat_logprobs=True, detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY))
            while engine.has_unfinished_requests():
                if stop is not None and stop():
                    return None
                for output in engine.step():
                    i, made = int(output.request_id), output.outputs[0]
                    if made.finish_reason not in ("stop", "length"):
                        raise RuntimeError(f"vLLM ended a sample with {made.finish_reason!r}")
                    samples[i] = Sample(prompts[i], np.array(made.token_ids, np.int32),
                                        np.array(made.logprobs.logprobs, np.float32), made.finish_reason)
                    bar.update()
                    if on_sample is not None:
                        on_sample(i, samples[i])
        finally:
            engine.abort_request([str(i) for i, sample in enumerate(samples) if sample is None])
            bar.close()
        return samples

    def push(self, weights):
        """Load (name, tensor) pairs named as in the HF checkpoint. Never call `reload_weights` without its
        iterator: it would read the first checkpoint from disk again and make stale rollouts."""
        if self.loaded:
            raise RuntimeError("an engine made with load_weights=True takes no push")
        self.wake({"weights"})
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": (
            (name, w.to(self.dtype) if w.is_floating_point() else w) for name, w in weights)})
        self.llm.reset_prefix_cache()  # cached keys and values belong to the old weights

    def sleep(self, keep_weights=False):
        """Give the GPU memory back: the KV cache is freed, the weights are dropped (a push brings new ones)
        or, if the same ones will be needed again, parked in CPU memory."""
        if self.sleeps:
            self.llm.sleep(level=1 if keep_weights else 2)
            self.asleep = {"weights", "kv_cache"}

    def wake(self, tags=frozenset({"weights", "kv_cache"})):
        """Take the memory back before generating, only what sleeps: a part woken twice is mapped twice."""
        if self.asleep & tags:
            self.llm.wake_up(tags=sorted(self.asleep & tags))
            self.asleep -= tags

    def close(self):
        """Shut down, even what is half started. vLLM would end the caller's process group, too."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
        destroy = dist.destroy_process_group
        with mock.patch.object(dist, "destroy_process_group", lambda group=None: group and destroy(group)):
            if self.llm is not None:
                self.llm.llm_engine.engine_core.shutdown()
            cleanup_dist_env_and_memory()
        self.llm = None


# ---- torch -----------------------------------------------------------------------------------------------

class Slots:
    """KV cache of the torch engine: keys and values [slots, Hkv, length, D] of each layer, a slot for each
    running sample. Set before a forward of B rows by T tokens: first (their slots: first to first + B - 1),
    positions [B, T] and visible [B, T, L]."""

    def __init__(self, n_slots, length):
        self.n_slots, self.length, self.layers = n_slots, length, {}

    def update(self, layer, *new):
        """Write keys and values [B, Hkv, T, D] of the tokens at hand -> those of positions 0 to L - 1."""
        if layer not in self.layers:
            self.layers[layer] = [x.new_zeros(self.n_slots, x.shape[1], self.length, x.shape[3]) for x in new]
        rows = slice(self.first, self.first + len(self.positions))
        at = torch.arange(rows.start, rows.stop, device=self.positions.device)[:, None]
        for cache, x in zip(self.layers[layer], new):
            cache[at, :, self.positions] = x.transpose(1, 2)
        return [cache[rows, :, :self.visible.shape[-1]] for cache in self.layers[layer]]

    def move(self, source, target):
        """Row `source` takes the place of row `target`, which has finished."""
        for keys, values in self.layers.values():
            keys[target], values[target] = keys[source], values[source]


def slot_attention(module, query, key, value, attention_mask=None, scaling=None, slots=None,
                   sliding_window=None, softcap=None, s_aux=None, **_):
    """The attention function registered with transformers under the name "slots": query [B, Hq, T, D] attends
    to the cache of its row up to its own position. The g query heads that share a key head are laid out as
    g x T queries of that head, so that nothing is repeated."""
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with soft-capping or sinks is not covered by the torch engine")
    visible = slots.visible
    if sliding_window is not None:
        oldest = slots.positions[..., None] - sliding_window
        visible = visible & (torch.arange(visible.shape[-1], device=visible.device) > oldest)
    k, v = slots.update(module.layer_idx, key, value)
    q = query.reshape(len(query), k.shape[1], -1, query.shape[-1])
    mask = visible.repeat(1, query.shape[1] // k.shape[1], 1)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling or module.head_dim ** -0.5)
    return out.reshape(query.shape).transpose(1, 2), None


AttentionInterface.register("slots", slot_attention)


class TorchEngine:
    """Continuous batching in plain torch. Holds its own full copy of the model, beside a sharded one."""

    name = "torch"

    def __init__(self, model, max_model_len, dtype, device, max_seqs=0):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype),
                                                          attn_implementation="slots").to(device).eval()
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(self.model.config, name, None) not in (None, 1.0):
                raise NotImplementedError(f"{name} in the model's config is not covered by the torch engine")
        self.device, self.max_model_len, self.max_seqs = device, max_model_len, max_seqs or 64
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self.stop_ids = stop_token_ids(model, self.model.config)

    @torch.inference_mode()
    def generate(self, prompts, seeds, sampling, on_sample=None, stop=None, desc=None):
        """As VllmEngine.generate."""
        check_prompts(prompts, self.vocabulary, self.max_model_len - sampling.max_tokens)
        samples, ids, logprobs = [None] * len(prompts), [[] for _ in prompts], [[] for _ in prompts]
        waiting, running = list(range(len(prompts)))[::-1], []  # prompt running[row] lives in slot `row`
        longest = max(map(len, prompts), default=0) + sampling.max_tokens
        slots = Slots(min(self.max_seqs, len(prompts)), longest)
        with tqdm(total=len(prompts), desc=desc, disable=None if desc else True, leave=False) as bar:
            while waiting or running:
                if stop is not None and stop():
                    return None
                # new prompts come first, a few at once: their mask grows with the square of the length
                new = [waiting.pop() for _ in range(min(16, slots.n_slots - len(running), len(waiting)))]
                rows, first = (new, len(running)) if new else (running, 0)
                start = [0 if new else len(prompts[i]) + len(ids[i]) - 1 for i in rows]
                logits = self._logits(slots, first, [prompts[i] if new else ids[i][-1:] for i in rows], start)
                tokens, logps = sample_tokens(logits, [seeds[i] for i in rows], [len(ids[i]) for i in rows],
                                              sampling.temperature, sampling.top_p)
                for i, token, logp in zip(rows, tokens.tolist(), logps.tolist()):
                    ids[i].append(token)
                    logprobs[i].append(logp)
                running += new
                for row in reversed(range(len(running))):
                    i = running[row]
                    ended = ids[i][-1] in self.stop_ids
                    if not ended and len(ids[i]) < sampling.max_tokens:
                        continue
                    samples[i] = Sample(prompts[i], np.array(ids[i], np.int32),
                                        np.array(logprobs[i], np.float32), "stop" if ended else "length")
                    slots.move(len(running) - 1, row)
                    running[row] = running[-1]
                    running.pop()
                    bar.update()
                    if on_sample is not None:
                        on_sample(i, samples[i])
        return samples

    def _logits(self, slots, first, tokens, start):
        """Feed tokens [B][T] from positions start [B] on to the slots first, first + 1, ... -> logits [B, V]
        of the next token, in fp32 as the trainer's and vLLM's. Shorter rows are padded: what padding writes
        into the cache lies behind the row's last position, unseen, and is overwritten in time."""
        longest = max(map(len, tokens))
        ids = torch.tensor([[*t, *[0] * (longest - len(t))] for t in tokens], device=self.device)
        positions = torch.tensor(start)[:, None] + torch.arange(longest)
        slots.first, seen = first, torch.arange(positions.max() + 1)
        slots.positions = positions.to(self.device)
        slots.visible = (seen <= positions[..., None]).to(self.device)
        hidden = self.model.base_model(input_ids=ids, position_ids=slots.positions, attention_mask=None,
                                       use_cache=False, slots=slots).last_hidden_state
        hidden = hidden[range(len(tokens)), [len(t) - 1 for t in tokens]]
        weight = self.model.get_output_embeddings().weight.t()
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, weight, out_dtype=torch.float32)
        return hidden.float() @ weight.float()

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


def sample_tokens(logits, seeds, counts, temperature, top_p=1.0):
    """Draw one token a row. logits [B, V], seeds and counts (tokens drawn so far) of length B, temperature 0
    is greedy -> tokens [B], logprobs [B] under the distribution drawn from.

    Inverse of the cumulative distribution at a number that depends on (seed, count) alone, so that a row's
    sample is the same in any batch. A row of non-finite logits gives any token and a NaN log-prob: the
    trainer's guard, not the engine, decides what to do about a broken model.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if top_p < 1 and temperature > 0:
        ordered, order = logprobs.exp().sort(-1, descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p  # keep tokens until the mass before them reaches top_p
        logprobs = logprobs.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
        logprobs = torch.log_softmax(logprobs, -1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
        u = [[(sample_seed(s, n) >> 10) / 2 ** 53] for s, n in zip(seeds, counts)]
        point = torch.tensor(u, dtype=torch.float64, device=logits.device) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
