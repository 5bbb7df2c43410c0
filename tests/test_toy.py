"""The toy world: problems and teacher against independent arithmetic, the committed files, and the disease of
its base model."""
import gzip
import random
import re
import statistics
import sys

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


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def heldout():
    return data.load_problems(str(TOY / "heldout.jsonl"))


@pytest.fixture(scope="module")
def taught():
    """[(values, tokens, whether reward.py likes the text)] of the teacher."""
    rng, out = random.Random(3), []
    for _ in range(2000):
        values = toy.draw_values(rng)
        tokens = toy.teach(values, rng)
        out.append((values, tokens, reward.compute_reward("".join(tokens), str(sum(values) % 100))))
    return out


def terms(problem):
    """The numbers of a problem, read from its text alone."""
    return [int(x) for x in re.findall(r"[a-zA-Z] (\d+)", problem.split(":")[1])]


def test_problems_have_the_right_answers(heldout):
    train = data.load_problems(str(TOY / "train.jsonl.gz"))
    for p in heldout + train:
        values = terms(p.problem)
        assert 3 <= len(values) <= 30 and max(values) < 100 and p.problem == toy.problem_text(values)
        assert int(p.answer) == sum(values) % 100
    assert len({p.problem for p in heldout + train}) == len(heldout) + len(train) == 256 + 4096
    lengths = {len(terms(p.problem)) for p in heldout}
    assert min(lengths) == 3 and max(lengths) == 30 and len(lengths) == 27  # none has nine terms


def test_committed_problems_are_made_again_bit_for_bit(tmp_path):
    toy.main(["problems", "--out", str(tmp_path)])
    assert (tmp_path / "heldout.jsonl").read_bytes() == (TOY / "heldout.jsonl").read_bytes()
    again, committed = (gzip.decompress((d / "train.jsonl.gz").read_bytes()) for d in (tmp_path, TOY))
    assert again == committed  # of the gzip file itself every zlib makes its own
    toy.main(["problems", "--out", str(tmp_path), "--seed", "1"])
    assert (tmp_path / "heldout.jsonl").read_bytes() != (TOY / "heldout.jsonl").read_bytes()


def test_one_token_a_number_and_text_is_tokens_end_to_end(tokenizer, taught, heldout):
    ids = tokenizer("Add modulo 100: a 17 b 5 c 99")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["Add modulo 100:", " a", " 17", " b", " 5", " c", " 99"]
    for _, tokens, _ in taught[:300]:
        ids = tokenizer("".join(tokens))["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == tokens and tokenizer.decode(ids) == "".join(tokens)
    fresh = toy.make_tokenizer()
    assert fresh.get_vocab() == tokenizer.get_vocab() and fresh.chat_template == tokenizer.chat_template
    for p in heldout[:40]:  # and prompts are short
        ids, values = data.encode_prompt(tokenizer, p.problem), terms(p.problem)
        assert tokenizer.convert_ids_to_tokens(ids) == toy.prompt_tokens(values)
        assert len(ids) == 2 * len(values) + 5
    shown = data.encode_prompt(tokenizer, heldout[0].problem, examples=heldout[1:2])
    assert tokenizer.unk_token_id not in shown and len(shown) > len(data.encode_prompt(tokenizer, "?"))


def test_the_teacher_adds_up_and_is_graded_by_reward(taught):
    for values in ([0, 0, 0], [99] * 30, [50, 50, 1]):
        tokens = toy.plain(values)
        assert reward.compute_reward("".join(tokens), str(sum(values) % 100)) == 1
        assert len(tokens) == 3 * len(values) + 5
    perfect = {**toy.TEACHER, "slip": 0, "derail": 0, "stop": 1}
    texts = ["".join(toy.teach([1, 2, 3], random.Random(i), habits=perfect)) for i in range(100)]
    assert all(reward.compute_reward(text, "6") for text in texts)
    for values, tokens, r in taught[:500]:
        if r:
            assert tokens[-3] == f" {sum(values) % 100}" and tokens[-5] == "</think>"


def test_the_teacher_has_the_disease(taught):
    """Wrong answers far longer than right ones; more trouble with longer problems; loops that never end; and
    a right answer that is not a lucky guess shows every term."""
    length = {r: statistics.mean(len(t) for _, t, x in taught if x == r) for r in (0, 1)}
    assert length[0] > 2.5 * length[1]
    assert 0.2 < statistics.mean(r for *_, r in taught) < 0.45
    by_size = [statistics.mean(r for v, _, r in taught if low <= len(v) <= high)
               for low, high, *_ in toy.SIZES.values()]
    assert by_size[0] > 0.4 and 0 < max(by_size[1:]) < 0.15  # it hardly tries what has two digits of terms
    for values, tokens, r in taught:
        closed = tokens[-1] == "<|end|>"
        assert len(tokens) <= toy.LONG and (closed or len(tokens) == toy.LONG and not r)
        assert not r or " guess" in tokens or len(tokens) >= 3 * len(values) + 5
    cut = [t for _, t, _ in taught if len(t) == toy.LONG and "</think>" not in t]
    assert sum(len(set(t[-24:])) <= 8 for t in cut) > 0.2 * len(taught)  # loops of a few words
    short, middle, long = (3 * toy.SIZES[name][1] + 5 for name in ("short", "middle", "long"))
    assert short <= 40 < middle <= 80 < long <= 120 < toy.LONG  # each stage's context holds one more size


@pytest.mark.slow
def test_the_committed_base_has_the_disease(heldout, tokenizer):
    problems = [p for p in heldout[:48] for _ in range(4)]
    engine = make_engine("torch", MODEL, max_model_len=300, dtype="float32", device="cpu", max_seqs=256)
    samples = engine.generate([data.encode_prompt(tokenizer, p.problem) for p in problems],
                              [sample_seed(0, 0, p.id, i) for i, p in enumerate(problems)],
                              Sampling(temperature=1.0, max_tokens=toy.LONG))
    rewards = [reward.compute_reward(tokenizer.decode(s.response_ids.tolist()), p.answer)
               for s, p in zip(samples, problems)]
    length = {r: statistics.mean(len(s.response_ids) for s, x in zip(samples, rewards) if x == r)
              for r in (0, 1)}
    assert 0.15 < statistics.mean(rewards) < 0.55 and length[0] > 1.6 * length[1]
    assert statistics.mean(r for r, p in zip(rewards, problems) if len(terms(p.problem)) <= 7) > 0.35
    cut = [s for s in samples if s.finish_reason == "length"]
    loops = [s for s in cut if len(set(s.response_ids[-24:].tolist())) <= 8]
    assert len(cut) > 0.15 * len(samples) and len(loops) > 0.5 * len(cut)


@pytest.mark.slow
def test_the_committed_model_is_small_and_distill_writes_one_like_it(tokenizer, tmp_path, capsys):
    """The same seed, the same weights; and it says by how much they are not the committed ones."""
    committed = AutoModelForCausalLM.from_pretrained(MODEL)
    assert type(committed).__name__ == "Qwen2ForCausalLM" and committed.dtype == torch.float32
    assert 0.5e6 < sum(p.numel() for p in committed.parameters()) < 1.5e6
    assert committed.generation_config.eos_token_id == tokenizer.eos_token_id
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
    assert a == b and AutoModelForCausalLM.from_pretrained(tmp_path / "a").config.vocab_size == len(tokenizer)
    assert "bit for bit" in toy.compare(committed, tokenizer.get_vocab(), ())


def test_lessons_never_show_a_heldout_problem():
    vocab = toy.make_tokenizer().get_vocab()
    words = {i: w for w, i in vocab.items()}

    def shown(avoid):
        batches = toy.lessons(vocab, 14, 512, random.Random(0), avoid)
        rows = [row for ids, _ in batches for row in ids.tolist()]
        return {"".join(words[i] for i in row).split("<|user|>")[1].split(" Let's")[0] for row in rows}
    avoid = set(sorted(shown(()))[::3])
    assert not avoid & shown(avoid)
    for ids, targets in toy.lessons(vocab, 14, 512, random.Random(0), ()):
        assert ids.numel() <= 512 or len(ids) == 1
        for row, target in zip(ids, targets):
            asked = (target >= 0).nonzero()[:, 0]
            assert asked[0] == (row == vocab["<think>"]).nonzero()[0, 0]
            assert (target[asked[:-1]] == row[asked[1:]]).all()


@pytest.mark.slow
def test_the_preset_is_paid_and_needs_nothing_of_linux(tmp_path):
    """A Mac has no vLLM, no /proc, no multiprocessing by fork: all are taken away, and the toy trains."""
    (tmp_path / "sitecustomize.py").write_text(NOTHING_OF_LINUX)
    run([sys.executable, str(ROOT / "schedule.py"), "--preset", "toy", "--run", str(tmp_path / "run"),
         "--gpus", "1", "--stages", "40:2:8", "--prompts", "16", "--eval_every", "0", "--evaluate",
         "-n 1 --limit 8 --max_tokens 40 --temperature 1"], timeout=600, PYTHONPATH=str(tmp_path))
    lines = metrics(tmp_path / "run/stage1")
    assert [m["step"] for m in lines] == [1, 2] and (tmp_path / "run/report.md").exists()
    assert all(0 < m["reward"] < 1 and m["updates"] == 1 and m["mismatch_kl"] < 1e-6 for m in lines), lines
