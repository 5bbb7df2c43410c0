"""The toy world: problems and teacher against independent arithmetic, the committed files, and the disease of
its base model."""
import doctest
import gzip
import hashlib
import random
import re
import sys
from statistics import mean

import pytest
import torch
from conftest import ROOT, metrics, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import reward
from rollout import Sampling, make_engine, sample_seed

TOY = ROOT / "toy"
sys.path.insert(0, str(TOY))
import make as toy

MODEL = str(TOY / "model")
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
HELDOUT = data.load_problems(str(TOY / "heldout.jsonl"))
NOTHING_OF_LINUX = """
import builtins, multiprocessing, sys
sys.modules['vllm'] = None
multiprocessing.set_start_method('spawn')
system_open = builtins.open
def no_proc(file, *more, **named):
    if str(file).startswith(('/proc', '/sys')):
        raise FileNotFoundError(file)
    return system_open(file, *more, **named)
builtins.open = no_proc
"""


def taught(n):
    """[(values, tokens)] of the teacher."""
    rng = random.Random(3)
    drawn = (toy.draw_values(rng) for _ in range(n))
    return [(values, toy.teach(values, rng)) for values in drawn]


def terms(problem):
    """The numbers of a problem, read from its text alone."""
    return [int(x) for x in re.findall(r"[a-zA-Z] (\d+)", problem.split(":")[1])]


def test_problems_are_right_and_made_again_bit_for_bit(tmp_path):
    train = data.load_problems(str(TOY / "train.jsonl.gz"))
    for p in HELDOUT + train:
        values = terms(p.problem)
        assert 3 <= len(values) <= 30 and max(values) < 100 and p.problem == toy.problem_text(values)
        assert int(p.answer) == sum(values) % 100
    assert len({p.problem for p in HELDOUT + train}) == len(HELDOUT) + len(train) == 256 + 4096
    assert {len(terms(p.problem)) for p in HELDOUT} == set(range(3, 31)) - {9}  # none has nine terms
    toy.main(["problems", "--out", str(tmp_path)])
    assert (tmp_path / "heldout.jsonl").read_bytes() == (TOY / "heldout.jsonl").read_bytes()
    again, committed = (gzip.decompress((d / "train.jsonl.gz").read_bytes()) for d in (tmp_path, TOY))
    assert again == committed  # of the gzip file itself every zlib makes its own
    toy.main(["problems", "--out", str(tmp_path), "--seed", "1"])
    assert (tmp_path / "heldout.jsonl").read_bytes() != (TOY / "heldout.jsonl").read_bytes()


def test_one_token_a_number_and_text_is_tokens_end_to_end():
    for _, tokens in taught(300):
        ids = TOKENIZER("".join(tokens))["input_ids"]
        assert TOKENIZER.convert_ids_to_tokens(ids) == tokens and TOKENIZER.decode(ids) == "".join(tokens)
    fresh = toy.make_tokenizer()
    assert fresh.get_vocab() == TOKENIZER.get_vocab() and fresh.chat_template == TOKENIZER.chat_template
    for p in HELDOUT[:40]:  # and prompts are short
        ids, values = data.encode_prompt(TOKENIZER, p.problem), terms(p.problem)
        assert TOKENIZER.convert_ids_to_tokens(ids) == toy.prompt_tokens(values)
        assert len(ids) == 2 * len(values) + 5
    shown = data.encode_prompt(TOKENIZER, HELDOUT[0].problem, examples=HELDOUT[1:2])
    assert TOKENIZER.unk_token_id not in shown and len(shown) > len(data.encode_prompt(TOKENIZER, "?"))


def test_the_teacher_adds_up_and_is_that_of_the_committed_base():
    """Word for word, so the disease of the base, below, is the teacher's. Right answers show every term, or
    are a lucky guess."""
    text = "".join(word for _, tokens in taught(2000) for word in tokens)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("bb051d7a3980175a")
    assert doctest.testmod(toy).failed == 0
    for values in ([0, 0, 0], [99] * 30, [50, 50, 1]):  # of the first lessons
        tokens = toy.plain(values)
        assert reward.compute_reward("".join(tokens), str(sum(values) % 100)) == 1
        assert len(tokens) == 3 * len(values) + 5
    for values, tokens in taught(500):
        if reward.compute_reward("".join(tokens), str(sum(values) % 100)):
            assert tokens[-3] == f" {sum(values) % 100}" and tokens[-5] == "</think>"
            assert " guess" in tokens or len(tokens) >= 3 * len(values) + 5
    short, middle, long = (3 * toy.SIZES[name][1] + 5 for name in ("short", "middle", "long"))
    assert short <= 40 < middle <= 80 < long <= 120 < toy.LONG  # each stage's context holds one more size


@pytest.mark.slow
def test_the_committed_base_has_the_disease():
    problems = [p for p in HELDOUT[:48] for _ in range(4)]
    engine = make_engine("torch", MODEL, max_model_len=300, dtype="float32", device="cpu", max_seqs=256)
    samples = engine.generate([data.encode_prompt(TOKENIZER, p.problem) for p in problems],
                              [sample_seed(0, 0, p.id, i) for i, p in enumerate(problems)],
                              Sampling(temperature=1.0, max_tokens=toy.LONG))
    rewards = [reward.compute_reward(TOKENIZER.decode(s.response_ids.tolist()), p.answer)
               for s, p in zip(samples, problems)]
    right, wrong = (mean(len(s.response_ids) for s, r in zip(samples, rewards) if r == x) for x in (1, 0))
    assert 0.15 < mean(rewards) < 0.55 and wrong > 1.6 * right
    assert mean(r for r, p in zip(rewards, problems) if len(terms(p.problem)) <= 7) > 0.35
    cut = [s for s in samples if s.finish_reason == "length"]
    loops = [s for s in cut if len(set(s.response_ids[-24:].tolist())) <= 8]
    assert len(cut) > 0.15 * len(samples) and len(loops) > 0.5 * len(cut)


@pytest.mark.slow
def test_the_committed_model_is_small_and_distill_writes_one_like_it(tmp_path, capsys):
    """The same seed, the same weights; and it says by how much they are not the committed ones."""
    committed = AutoModelForCausalLM.from_pretrained(MODEL)
    assert type(committed).__name__ == "Qwen2ForCausalLM" and committed.dtype == torch.float32
    assert 0.5e6 < sum(p.numel() for p in committed.parameters()) < 1.5e6
    assert committed.generation_config.eos_token_id == TOKENIZER.eos_token_id
    assert committed.config.max_position_embeddings >= 2 * toy.SIZES["long"][1] + 5 + toy.LONG
    assert sum(f.stat().st_size for f in TOY.rglob("*") if f.is_file()) < 6e6
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in "ab":
        toy.distill(tmp_path / name, 0, steps=3, tokens=512)
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "3 steps" in said and re.search(r"up to 0\.\d+ off toy/model, loss on lessons [4-9]\.\d+", said)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b and AutoModelForCausalLM.from_pretrained(tmp_path / "a").config.vocab_size == len(TOKENIZER)
    assert "bit for bit" in toy.compare(committed, TOKENIZER.get_vocab(), ())


def test_lessons_never_show_a_heldout_problem():
    def lessons(avoid):
        return list(toy.lessons(TOKENIZER.get_vocab(), 14, 512, random.Random(0), avoid))

    def shown(avoid):
        texts = [TOKENIZER.decode(row) for ids, _ in lessons(avoid) for row in ids.tolist()]
        return {text.split("<|user|>")[1].split(" Let's")[0] for text in texts}

    avoid = set(sorted(shown(()))[::3])
    assert not avoid & shown(avoid)
    for ids, targets in lessons(()):
        assert ids.numel() <= 512 or len(ids) == 1
        for row, target in zip(ids, targets):
            asked = (target >= 0).nonzero()[:, 0]
            assert asked[0] == (row == TOKENIZER.convert_tokens_to_ids("<think>")).nonzero()[0, 0]
            assert (target[asked[:-1]] == row[asked[1:]]).all()


@pytest.mark.slow
def test_the_preset_is_paid_and_needs_nothing_of_linux(tmp_path):
    """A Mac has no vLLM, no /proc, no multiprocessing by fork: all are taken away, and the toy trains."""
    (tmp_path / "sitecustomize.py").write_text(NOTHING_OF_LINUX)
    run([sys.executable, str(ROOT / "schedule.py"), "--preset", "toy", "--run", str(tmp_path / "run"),
         "--gpus", "1", "--stages", "40:2:8", "--prompts", "16", "--eval_every", "0", "--evaluate",
         "-n 1 --limit 8 --max_tokens 40 --temperature 1"], timeout=600, PYTHONPATH=str(tmp_path))
    lines = metrics(tmp_path / "run/stage1")
    assert [m["step"] for m in lines] == [1, 2]
    assert all(0 < m["reward"] < 1 and m["updates"] == 1 and m["mismatch_kl"] < 1e-6 for m in lines), lines
    assert sorted(x.name for x in (tmp_path / "run/eval").glob("*.json")) == ["base.json", "stage1.json"]
    report = (tmp_path / "run/report.md").read_text()
    assert "| base" in report and "| stage1" in report and "style r1" in report
