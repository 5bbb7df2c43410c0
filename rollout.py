"""rollout.py - prompts in, graded samples out.

    engine = make_engine("auto", "path/or/hub-name", max_model_len=9216, dtype="auto", device=device)
    engine.push(policy.full_weights())                # before the first rollout and after every update
    samples, seconds = rollout(engine, tokenizer, problems, prompts, sampling, step, grade)

VllmEngine is vLLM inside this very process, one engine a rank. TorchEngine is transformers and a KV cache,
anywhere torch runs. Both promise: log-probs of the *tempered* distribution a token was drawn from (anything
else makes every importance ratio wrong at T = 0.6); finish_reason "length" if and only if the limit cut the
sample; a sample that depends on its seed, not on its batch or the number of ranks, up to the last bits.

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
from contextlib import closing, suppress
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import RankError, any_rank, gather, join_processes, say, together


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


def rollout(engine, tokenizer, problems, prompts, sampling, step, grade, *, only=None, stop=None,
            desc="generate"):
    """Generate and grade on all ranks -> (samples, seconds), the same samples on every rank.

    problems [P] with an .id, prompts [P] of token ids. One sample for each (p, j), p < P, j < sampling.n, in
    this order, or for the pairs in `only`; rank r makes pairs r, r + world, ... so long problems spread out.
    grade(problem, sample) -> (reward, verdict) runs in a thread of that rank while others generate; it may
    empty a sample that nobody needs later. samples is None when stop() turned true on any rank. seconds:
    "generate", "reward", "idle" (waits for grade, for other ranks). Any error ends all ranks: RankError."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pairs = [(p, j) for p in range(len(problems)) for j in range(sampling.n)] if only is None else list(only)
    mine = pairs[rank::world]
    seeds = [sample_seed(sampling.seed, step, problems[p].id, j) for p, j in mine]
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else dist.HashStore()
    word = f"end of rollout {store.add(f'rollouts of rank {rank}', 1)}"  # the same number on all ranks
    errors, clock = [], [time.time()]

    def ended():
        """True on all ranks, in the middle of their generation, as soon as one of them stops or fails."""
        if errors or stop is not None and stop():
            store.set(word, "")
        return store.check([word])

    def finish(i, sample):
        try:
            if not errors:
                sample.text = tokenizer.decode(sample.response_ids, clean_up_tokenization_spaces=False)
                sample.reward, sample.verdict = grade(problems[mine[i][0]], sample)
        except BaseException as e:  # noqa: BLE001  raised below, by the main thread
            errors.append(e)

    def generate_and_grade():
        with ThreadPoolExecutor(1) as pool:
            try:
                samples = engine.generate(
                    [prompts[p] for p, _ in mine], seeds, sampling, stop=ended, desc=None if rank else desc,
                    on_sample=lambda i, sample: pool.submit(finish, i, sample))
            except BaseException as e:  # noqa: BLE001  raised below: no more samples are graded first
                errors.append(e)
            clock.append(time.time())
        clock.append(time.time())
        if errors:
            ended()  # the others hear of it before they are waited for
            raise errors[0]
        return samples

    parts = gather(together("rollout", generate_and_grade))
    clock.append(time.time())
    seconds = dict(zip(("generate", "reward", "idle"), np.diff(clock).tolist()))
    if None in parts:
        return None, seconds
    return [parts[i % world][i // world] for i in range(len(pairs))], seconds


def make_engine(kind, model, *, max_model_len, dtype, device, max_seqs=0, gpu_memory=0.6, seed=0,
                load_weights=False, enable_sleep=False, enforce_eager=False):
    """kind "vllm", "torch" or "auto": vLLM where it runs the model, else torch, and says why. On a GPU, where
    torch is many times slower, a vLLM that is installed but fails is an error. All ranks call it together and
    get the same engine, or RankError. max_model_len: prompt plus response. max_seqs: rows at once, 0: the
    engine's choice. gpu_memory: vLLM's share of the card. load_weights=False starts vLLM with dummy weights:
    training pushes the policy's first, and a forgotten push cannot hide."""
    if kind not in ("vllm", "torch", "auto"):
        raise ValueError(f'engine must be "vllm", "torch" or "auto", not {kind!r}')
    device, dtype = torch.device(device), compute_dtype(dtype, device)
    if kind != "torch":
        try:
            return VllmEngine(model, max_model_len, dtype, device, max_seqs, gpu_memory, seed, load_weights,
                              enable_sleep, enforce_eager)
        except RankError as e:
            problem = " ".join(str(e).split())  # vLLM says what is wrong in its second line
            if kind == "vllm" or device.type != "cpu" and any_rank(importlib.util.find_spec("vllm")):
                raise RankError(f"{problem}. --engine torch works without vLLM") from e
        say(f"engine: torch ({problem})")  # after the except block: its error holds half an engine in memory
    return together("engine", lambda: TorchEngine(model, max_model_len, dtype, device, max_seqs))


def compute_dtype(name, device):
    """"auto" -> "bfloat16" on a card that computes in it (compute capability 8.0 or more), else "float32"."""
    if name == "auto":
        able = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        name = "bfloat16" if able else "float32"
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
    """ValueError with the cause if prompts [P] of token ids do not give prompt_texts [P] back: whole prompts,
    or the problems inside. Case, Unicode forms, invisible characters and the kind of blanks may change."""
    def words(text):
        text = unicodedata.normalize("NFKC", text).casefold()
        return " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())

    check_prompts(prompts, vocabulary)
    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for text, prompt in zip(prompt_texts, prompts, strict=True):
        back = tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        if words(text) not in words(back) or not unknown.isdisjoint(prompt):
            raise ValueError(f"{type(tokenizer).__name__} or its template does not give text back: "
                             f"{text[:200]!r} becomes {back[:400]!r}. If blanks are missing, it misreads "
                             f'tokenizer.json: name "PreTrainedTokenizerFast" in tokenizer_config.json')


def stop_token_ids(model, config):
    """Ids that end a response: the tokenizer's own, and generation_config.json's or, without it, config's."""
    ids, own = config.eos_token_id, None
    with suppress(OSError):
        ids = GenerationConfig.from_pretrained(model).eos_token_id
    with suppress(OSError, ValueError, KeyError):  # a model without a tokenizer
        own = AutoTokenizer.from_pretrained(model).eos_token_id
    return {own, *(ids if isinstance(ids, list) else [ids])} - {None}


class Engine:
    """What both engines share. Each adds push(weights) and steps(prompts, seeds, sampling), which yields what
    each step has finished: [(i, response ids, log-probs, finish reason)]."""

    def generate(self, prompts, seeds, sampling, on_sample=None, stop=None, desc=None):
        """One Sample for each (prompt, seed), in order; None if stop() turned true. on_sample(i, sample) is
        called while the rest still generates. desc: title of a progress bar."""
        check_prompts(prompts, self.vocabulary, self.max_model_len - sampling.max_tokens)
        samples = [None] * len(prompts)
        bar = tqdm(total=len(prompts), desc=desc, disable=None if desc else True, leave=False)
        with bar, closing(self.steps(prompts, seeds, sampling)) as steps:
            for finished in steps:
                for i, ids, logps, end in finished:
                    if end not in ("stop", "length"):
                        raise RuntimeError(f"{self.name} ended a sample with {end!r}")
                    samples[i] = Sample(prompts[i], np.array(ids, np.int32), np.array(logps, np.float32), end)
                    bar.update()
                    if on_sample is not None:
                        on_sample(i, samples[i])
                if stop is not None and stop():
                    return None
        return samples

    def sleep(self, keep_weights=False):
        """TorchEngine has nothing to give back: its cache lives only inside `generate`."""

    wake = close = sleep


class VllmEngine(Engine):
    """vLLM in this process; each rank is an engine with its own prompts. By itself vLLM waits for all ranks
    twice: to make process groups, and for the smallest free memory. One that failed would be waited for. So
    all agree before the groups are made, each sizes its cache alone, and all agree after a first token. What
    is left is a rank that hangs in between: the time limit of the process group ends that."""

    def __init__(self, model, max_model_len, dtype, device, max_seqs, memory, seed, loaded, sleeps, eager):
        on_cpu = device.type == "cpu"
        self.name, self.llm, self.asleep, self.sleeps = "vllm", None, set(), sleeps and not on_cpu
        self.dtype, self.max_model_len, self.loaded = getattr(torch, dtype), max_model_len, loaded
        untied = {} if loaded else {"tie_word_embeddings": False}  # a tied head goes stale after a push
        options = {
            "model": model, "dtype": dtype, "max_model_len": max_model_len, "seed": seed,
            "gpu_memory_utilization": memory, "enable_sleep_mode": self.sleeps,
            "max_num_seqs": max_seqs or (128 if on_cpu else 256), "enforce_eager": eager or on_cpu,
            "load_format": "auto" if loaded else "dummy", "enable_chunked_prefill": not on_cpu,
            "distributed_executor_backend": "external_launcher",  # in torchrun's process group
            "logprobs_mode": "processed_logprobs",  # the default ignores the temperature
            # a seeded request whose prefill is split over two steps kills the CPU sampler of 0.32
            # ("CPU Generator does not use offset"), so there prompts are never split
            "max_num_batched_tokens": max(8192, max_model_len) if on_cpu else 8192,
            # fp32 logits as the trainer's: rounding them to bf16 makes half of the mismatch between the two
            "hf_overrides": {"head_dtype": "float32", **untied}}
        together("vLLM", lambda: self._prepare(options, device.type))
        try:
            together("vLLM", lambda: self._start(options))
        except RankError:
            self.close()
            raise

    def _prepare(self, options, device):
        """What can fail before ranks wait for each other."""
        defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2",
                    "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # 2 GiB; the trainer needs the cores later
        os.environ.update(defaults | os.environ)
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available" on CPUs
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        runs_on = "cuda" if current_platform.is_cuda_alike() else current_platform.device_type
        if runs_on != device:
            raise RuntimeError(f"the installed vLLM is for {runs_on}, this process runs on {device}")
        self.backend = current_platform.dist_backend
        self.config = EngineArgs(**options).create_engine_config()
        self.vocabulary = self.config.model_config.get_vocab_size()
        self.stop_ids = sorted(stop_token_ids(options["model"], self.config.model_config.hf_config))

    def _start(self, options):
        from vllm import LLM
        from vllm.config import set_current_vllm_config
        from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher, UniProcExecutor
        from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
        if not dist.is_initialized():
            join_processes()
        with set_current_vllm_config(self.config):
            init_worker_distributed_environment(self.config, dist.get_rank(), "env://",
                                                int(os.environ["LOCAL_RANK"]), self.backend)
        ExecutorWithExternalLauncher.determine_available_memory = UniProcExecutor.determine_available_memory
        with mock.patch.object(torch, "set_num_threads"):  # its CPU worker replaces it for good
            self.llm = LLM(**options)
        # a model may load and still find no kernel for its heads
        self.generate([[0, 0]], [0], Sampling(temperature=1.0, max_tokens=2))

    def steps(self, prompts, seeds, sampling):
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        engine, names = self.llm.llm_engine, [str(i) for i in range(len(prompts))]
        try:
            for name, prompt, seed in zip(names, prompts, seeds, strict=True):
                engine.add_request(name, {"prompt_token_ids": list(prompt)}, SamplingParams(
                    temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens,
                    seed=seed, stop_token_ids=self.stop_ids, logprobs=0, flat_logprobs=True, detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY))
            while engine.has_unfinished_requests():
                made = [(int(output.request_id), output.outputs[0]) for output in engine.step()]
                yield [(i, m.token_ids, m.logprobs.logprobs, m.finish_reason) for i, m in made]
        finally:
            engine.abort_request(names)

    def push(self, weights):
        """Load (name, tensor) pairs named as in the HF checkpoint. Never call `reload_weights` without its
        iterator: it would read the first checkpoint from disk again and make stale rollouts."""
        if self.loaded:
            raise RuntimeError("an engine made with load_weights=True takes no push")
        self.wake({"weights"})
        weights = ((name, w.to(self.dtype)) for name, w in weights)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()  # cached keys and values belong to the old weights

    def sleep(self, keep_weights=False):
        """Free the KV cache, and drop the weights (a push brings new ones) or park them in CPU memory."""
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
        with mock.patch.object(dist, "is_initialized", return_value=False):
            if self.llm is not None:
                self.llm.llm_engine.engine_core.shutdown()
            cleanup_dist_env_and_memory()


def slot_attention(module, query, key, value, attention_mask=None, scaling=None, cache=None, distance=None,
                   sliding_window=None, softcap=None, s_aux=None, **_):
    """Attention of query [B, Hq, T, D] over cache [layers, 2, B, Hkv, length, D], after key and value have
    gone there. distance [B, T, L]: from each token back to the positions 0 to L - 1. The g query heads that
    share a key head become g x T queries of that head, so that nothing is repeated."""
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with soft-capping or sinks is not covered by the torch engine")
    n, _, longest = distance.shape
    rows, positions = torch.arange(n, device=key.device)[:, None], distance[:, :, 0]
    cache = cache[module.layer_idx]
    cache[:, rows, :, positions] = torch.stack((key, value)).permute(1, 3, 0, 2, 4)
    visible = (distance >= 0) & (distance < (sliding_window or cache.shape[3]))
    mask = visible.repeat(1, query.shape[1] // key.shape[1], 1)[:, None]
    q = query.reshape(n, key.shape[1], -1, key.shape[3])
    out = F.scaled_dot_product_attention(q, *cache[..., :longest, :], attn_mask=mask, scale=scaling)
    return out.reshape(query.shape).transpose(1, 2), None


AttentionInterface.register("slots", slot_attention)


class TorchEngine(Engine):
    """Continuous batching in plain torch: finished rows leave at once, waiting prompts take their place."""

    def __init__(self, model, max_model_len, dtype, device, max_seqs=0):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype),
                                                          attn_implementation="slots").to(device).eval()
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(self.model.config, name, None) not in (None, 1.0):
                raise NotImplementedError(f"{name} in the model's config is not covered by the torch engine")
        self.name, self.max_model_len, self.max_seqs = "torch", max_model_len, max_seqs or 64
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self.stop_ids = stop_token_ids(model, self.model.config)

    @torch.inference_mode()
    def steps(self, prompts, seeds, sampling):
        ids, logprobs = [list(prompt) for prompt in prompts], [[] for _ in prompts]
        waiting, running = list(range(len(prompts)))[::-1], []  # prompt running[r] is row r of the cache
        config, head = self.model.config, self.model.get_output_embeddings().weight
        wide, slots = head.float().t(), min(self.max_seqs, len(prompts))
        length = max(map(len, prompts), default=0) + sampling.max_tokens
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = head.new_zeros(config.num_hidden_layers, 2, slots, config.num_key_value_heads, length, width)
        while waiting or running:
            # new prompts come first, a few at once: their mask grows with the square of the length
            new = [waiting.pop() for _ in range(min(16, slots - len(running), len(waiting)))]
            running += new
            rows = new or running[:]
            start = [0 if new else len(ids[i]) - 1 for i in rows]
            # what padding writes into the cache lies behind a row's last token, unseen, and is overwritten
            fed = [torch.tensor(ids[i][at:]) for i, at in zip(rows, start)]
            batch = torch.nn.utils.rnn.pad_sequence(fed, batch_first=True).to(head.device)
            seen = torch.arange(max(start) + batch.shape[1], device=head.device)
            positions = torch.tensor(start, device=head.device)[:, None] + seen[:batch.shape[1]]
            hidden = self.model.base_model(
                input_ids=batch, position_ids=positions, attention_mask=None, use_cache=False,
                cache=cache[:, :, len(running) - len(rows):len(running)],
                distance=positions[..., None] - seen).last_hidden_state
            hidden = hidden[range(len(rows)), [len(x) - 1 for x in fed]]
            logits = hidden.float() @ wide  # in fp32, as the trainer's and vLLM's
            tokens, logps = sample_tokens(logits, [seeds[i] for i in rows], [len(logprobs[i]) for i in rows],
                                          sampling.temperature, sampling.top_p)
            for i, token, logp in zip(rows, tokens.tolist(), logps.tolist()):
                ids[i].append(token)
                logprobs[i].append(logp)
            finished = []
            for row, i in reversed(list(enumerate(running))):
                ended = ids[i][-1] in self.stop_ids
                if ended or len(logprobs[i]) == sampling.max_tokens:
                    finished.append((i, ids[i][len(prompts[i]):], logprobs[i], "stop" if ended else "length"))
                    cache[:, :, row] = cache[:, :, len(running) - 1]
                    running[row] = running[-1]
                    running.pop()
            yield finished

    @torch.no_grad()
    def push(self, weights):
        """Load (name, tensor) pairs named as in the HF checkpoint; a missing or unknown name is an error."""
        own = self.model.state_dict()
        for name, w in weights:
            own.pop(name).copy_(w)
        if own:
            raise KeyError(f"push did not bring {sorted(own)[:3]} ({len(own)} tensors)")


def sample_tokens(logits, seeds, counts, temperature, top_p=1.0):
    """Draw one token a row from logits [B, V] -> tokens [B], logprobs [B] under the distribution drawn from:
    its cumulative one, inverted at a number that depends on (seed, count of tokens so far) alone, so that a
    row's sample is the same in any batch. Temperature 0 is greedy. Non-finite logits give any token and a NaN
    log-prob: what to do about a broken model is for the trainer to decide."""
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
