"""The toy world: problems and teacher against independent arithmetic, the committed files, and its base model's disease."""
import gzip
import json
import random
import re
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT, metrics, run
import sys

import data
import reward
import toy
from rollout import make_engine, sample_seed

ASSETS = ROOT / "assets" / "toy"
MODEL = str(ASSETS / "model")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def heldout():
    return data.load_problems(str(ASSETS / "heldout.jsonl"))


def terms(problem):
    """The numbers of a problem, read from its text alone."""
    return [int(x) for x in re.findall(r"[a-zA-Z] (\d+)", problem.split(":")[1])]


def traces(n=4000, seed=3):
    """[(values, tokens, whether reward.py likes the text)] of the teacher."""
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        values = toy.draw_values(rng)
        tokens = toy.teach(values, rng)
        out.append((values, tokens, reward.compute_reward("".join(tokens), str(sum(values) % 100))))
    return out


@pytest.fixture(scope="module")
def taught():
    return traces()


def test_problems_have_the_right_answers(heldout):
    train = data.load_problems(str(ASSETS / "train.jsonl.gz"))
    for p in heldout + train:
        values = terms(p.problem)
        assert 3 <= len(values) <= 30 and max(values) < 100
        assert int(p.answer) == sum(values) % 100
        assert p.problem == toy.problem_text(values)
    assert len(heldout) >= 200 and len(train) >= 4000
    assert len({p.problem for p in heldout + train}) == len(heldout) + len(train)
    lengths = {len(terms(p.problem)) for p in heldout}
    assert min(lengths) == 3 and max(lengths) == 30 and len(lengths) == 27  # none has nine terms


def test_committed_problems_are_made_again_bit_for_bit(tmp_path):
    toy.main(["data", "--out", str(tmp_path)])
    assert (tmp_path / "heldout.jsonl").read_bytes() == (ASSETS / "heldout.jsonl").read_bytes()
    again, committed = (gzip.decompress((d / "train.jsonl.gz").read_bytes()) for d in (tmp_path, ASSETS))
    assert again == committed  # of the gzip file itself every zlib makes its own
    toy.main(["data", "--out", str(tmp_path), "--seed", "1"])
    assert (tmp_path / "heldout.jsonl").read_bytes() != (ASSETS / "heldout.jsonl").read_bytes()


def test_one_token_a_number_and_text_is_tokens_end_to_end(tokenizer, taught):
    ids = tokenizer("Add modulo 100: a 17 b 5 c 99")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["Add modulo 100:", " a", " 17", " b", " 5", " c", " 99"]
    for _, tokens, _ in taught[:300]:
        text = "".join(tokens)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == tokens
        assert tokenizer.decode(ids) == text
    fresh = toy.make_tokenizer()
    assert fresh.get_vocab() == tokenizer.get_vocab() and fresh.chat_template == tokenizer.chat_template


def test_chat_template_makes_short_prompts(tokenizer, heldout):
    for p in heldout[:40]:
        ids = data.encode_prompt(tokenizer, p.problem)
        values = terms(p.problem)
        assert tokenizer.convert_ids_to_tokens(ids) == toy.prompt_tokens(values)
        assert len(ids) == 2 * len(values) + 5
        assert tokenizer.decode(ids).startswith("<|user|>" + p.problem + " Let's think")
    shown = data.encode_prompt(tokenizer, heldout[0].problem, examples=heldout[1:2])
    assert tokenizer.unk_token_id not in shown and len(shown) > len(data.encode_prompt(tokenizer, heldout[0].problem))


def test_the_teacher_adds_up_and_is_graded_by_reward(taught):
    for values in ([0, 0, 0], [99] * 30, [50, 50, 1]):
        tokens = toy.plain(values)
        assert reward.compute_reward("".join(tokens), str(sum(values) % 100)) == 1
        assert len(tokens) == 3 * len(values) + 5
    perfect = dict(toy.TEACHER, slip=0, derail=0, stop=1)
    right = sum(reward.compute_reward("".join(toy.teach([1, 2, 3], random.Random(i), habits=perfect)), "6")
                for i in range(200))
    assert right == 200
    for values, tokens, r in taught[:500]:
        if r:
            assert tokens[-3] == f" {sum(values) % 100}" and tokens[-5] == "</think>"


def test_the_teacher_has_the_disease(taught):
    """Wrong answers far longer than right ones; more trouble with longer problems; loops that never end."""
    length = {r: statistics.mean(len(t) for _, t, x in taught if x == r) for r in (0, 1)}
    assert length[0] > 2.5 * length[1]
    assert 0.2 < statistics.mean(r for *_, r in taught) < 0.45
    by_size = [statistics.mean(r for v, _, r in taught if low <= len(v) <= high) for low, high, *_ in toy.SIZES.values()]
    assert by_size[0] > 0.4 and 0 < max(by_size[1:]) < 0.15  # it hardly tries what has two digits of terms
    for values, tokens, r in taught:
        assert len(tokens) <= toy.LONG
        closed = tokens[-1] == "<|end|>"
        assert closed == ("</think>" in tokens) or len(tokens) == toy.LONG
        if len(tokens) == toy.LONG and not closed and r:
            pytest.fail("a response without an end was paid")
    looping = [t for _, t, _ in taught if len(t) == toy.LONG and len(set(t[-24:])) <= 8 and "</think>" not in t]
    assert len(looping) > 0.2 * len(taught)


def test_longer_problems_need_longer_thoughts(taught):
    """A right answer that is not a lucky guess shows every term; so the shortest one grows by three tokens a term."""
    for values, tokens, r in taught:
        if r and " guess" not in tokens:
            assert len(tokens) >= 3 * len(values) + 5
    need = lambda name: 3 * toy.SIZES[name][1] + 5
    assert need("short") <= 40 < need("middle") <= 80 < need("long") <= 120 < toy.LONG


def test_the_committed_base_has_the_disease(heldout, tokenizer):
    problems = heldout[:64]
    prompts = [data.encode_prompt(tokenizer, p.problem) for p in problems for _ in range(4)]
    engine = make_engine("torch", MODEL, max_model_len=300, dtype="float32", max_seqs=256)
    samples = engine.generate(prompts, [sample_seed(0, 0, p.id, j) for p in problems for j in range(4)], toy.LONG, 1.0)
    rewards = [reward.compute_reward(tokenizer.decode(s.response_ids), problems[i // 4].answer)
               for i, s in enumerate(samples)]
    lengths = {r: [len(s.response_ids) for s, x in zip(samples, rewards) if x == r] for r in (0, 1)}
    assert 0.15 < statistics.mean(rewards) < 0.55
    assert statistics.mean(lengths[0]) > 1.6 * statistics.mean(lengths[1])
    cut = [s for s in samples if s.finish_reason == "length"]
    assert len(cut) > 0.15 * len(samples)
    easy = [r for r, i in zip(rewards, range(len(samples))) if len(terms(problems[i // 4].problem)) <= 7]
    assert statistics.mean(easy) > 0.35
    loops = [s for s in cut if len(set(s.response_ids[-24:])) <= 8]
    assert len(loops) > 0.5 * len(cut)


def test_committed_model_is_small_and_ordinary():
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.dtype == torch.float32
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(MODEL).eos_token_id
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) < 6e6


def test_distill_writes_a_folder_that_loads(tmp_path):
    command = [sys.executable, str(ROOT / "toy.py"), "distill", "--steps", "21", "--tokens", "512", "--out"]
    done = run([*command, str(tmp_path / "a")])
    assert "21 steps" in done.stdout and " s on 1 thread" in done.stdout
    run([*command, str(tmp_path / "b")])
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b  # the same seed, the same weights
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.config.max_position_embeddings >= 2 * toy.SIZES["long"][1] + 5 + toy.LONG
    assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template


def test_lessons_never_show_a_heldout_problem():
    vocab = toy.make_tokenizer().get_vocab()
    words = {i: w for w, i in vocab.items()}
    plain = lambda: [ids for ids, _ in toy.lessons(vocab, 14, 512, random.Random(0), avoid=())]
    shown = lambda batches: {"".join(words[i] for i in row.tolist()).split("<|user|>")[1].split(" Let's")[0]
                             for ids in batches for row in ids}
    texts = shown(plain())
    avoid = set(sorted(texts)[::3])
    assert not avoid & shown([ids for ids, _ in toy.lessons(vocab, 14, 512, random.Random(0), avoid)])
    for ids, targets in toy.lessons(vocab, 14, 512, random.Random(0), ()):
        assert ids.numel() <= 512 or len(ids) == 1
        for row, target in zip(ids, targets):
            asked = (target >= 0).nonzero()[:, 0]
            start = (row == vocab["<think>"]).nonzero()[0, 0]
            assert asked[0] == start and (target[asked[:-1]] == row[asked[1:]]).all()


def test_three_steps_of_training_are_paid(tmp_path):
    run([sys.executable, str(ROOT / "grpo.py"), "--model", MODEL, "--data", str(ASSETS / "train.jsonl.gz"), "--eval_data",
         "none", "--recipe", "improved", "--max_len", "40", "--prompts", "16", "--group", "4", "--updates", "1", "--lr",
         "1e-4", "--steps", "3", "--engine", "torch", "--show_every", "0", "--out", str(tmp_path / "run")])
    lines = metrics(tmp_path / "run")
    assert [m["step"] for m in lines] == [1, 2, 3]
    assert all(0 < m["reward"] < 1 and m["updates"] == 1 for m in lines), lines
    assert all(m["mismatch_kl"] < 1e-6 for m in lines)
