"""policy.py: tiles = full logits, packed = separate = shared prompts, any budget = one batch; checkpoints are
whole or not there; models are refused in words. Fp32 is compared with float64, relative to its scale."""
import json
import os
import resource
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import KINDS, exact_logp, in_processes, make_model, make_tokenizer, off, save_model, sequences
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import policy as lib
from common import RankError, gather, join_processes
from policy import Policy, check_checkpoint, checkpoints, open_model, pack, pack_row, token_logprobs

# ----- Log-probabilities without logits

def both(function, hidden, weight, targets, parts, **options):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = function(h, w, targets, **options)
    g = torch.Generator().manual_seed(9)
    loss = {name: (x * torch.randn(len(x), generator=g)).sum()
            for name, x in (("logp", logp), ("entropy", entropy))}
    sum(loss[part] for part in parts).backward()
    return logp.detach(), entropy.detach(), h.grad, w.grad


@pytest.mark.parametrize("temperature, parts", [(1.0, ["logp"]), (0.6, ["entropy"]),
                                                (0.6, ["logp", "entropy"])])
@pytest.mark.parametrize("tokens, vocab, chunk", [(37, 1000, 8), (5, 151_936, 2), (64, 50, 64), (1, 11, 9)])
def test_tiles_equal_full_logits(tokens, vocab, chunk, temperature, parts):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, 32, generator=g), 0.3 * torch.randn(vocab, 32, generator=g)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    exact = hidden.double(), weight.double()
    truth = both(lib.token_logprobs_plain, *exact, targets, parts, temperature=temperature)
    fast = both(token_logprobs, hidden, weight, targets, parts, temperature=temperature, chunk=chunk)
    assert all(off(a, b) < 1e-5 for a, b in zip(fast, truth))


@in_processes(MKL_CBWR="COMPATIBLE")
def test_tiles_on_kernels_of_other_processors():
    """MKL's code for any processor adds 152 K products one after the other, as an AMD EPYC does."""
    assert pytest.main(["-q", "-k", "tiles_equal", __file__]) == 0


def test_two_backwards_and_an_entropy_that_is_only_a_metric():
    """The kept tile is gone after the first backward, and computed again in the second."""
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(30, 8)
    logp, entropy = token_logprobs(hidden, weight, torch.arange(7), chunk=4, entropy_grad=False)
    first, = torch.autograd.grad(logp.sum(), hidden, retain_graph=True)
    again, = torch.autograd.grad(logp.sum(), hidden)
    assert off(again, first.double()) < 1e-6 and not entropy.requires_grad


# ----- Attention and packing

def groups(seed=0):
    """Sequences as a rollout has them: neighbours with one prompt, an empty response, a prompt met twice."""
    g = torch.Generator().manual_seed(seed)

    def some(n):
        return torch.randint(0, 60, (n,), generator=g).tolist()

    a, b, c = some(7), some(21), some(1)
    shape = [(a, 5), (a, 0), (a, 30), (b, 9), (c, 12), (c, 1), (b, 2), (b, 17), (b, 17)]
    return [(prompt, some(n)) for prompt, n in shape]


@pytest.mark.parametrize("sequences", [sequences, groups])
@KINDS
def test_packed_equals_separate(kind, tied, sequences):
    """Log-probs and gradients; in eval mode too, where a cache left on would let documents see each other.
    `groups` share their prompts: every token of a row is there once, and every document sees its own."""
    plain, batch = make_model(kind, tied).eval(), sequences()
    plain.set_attn_implementation("eager")
    truth = torch.cat([exact_logp(plain, p, r, 0.6) for p, r in batch])
    truth.mean().backward()
    scale = max(p.grad.abs().max() for p in plain.parameters())
    for recompute, train in ((False, False), (False, True), (True, False), (True, True)):
        policy = Policy(make_model(kind, tied), recompute=recompute).train(train)
        logp, _ = policy(pack_row(batch), temperature=0.6)
        assert off(logp, truth.detach()) < 1e-5
        logp.mean().backward()
        for (name, a), b in zip(policy.model.named_parameters(), plain.parameters()):
            assert (a.grad - b.grad).abs().max() < 1e-5 * scale, name


def test_rows_by_hand(monkeypatch):
    """pad == EOS == 0 here: masks come from lengths, so a response that ends in EOS keeps that token."""
    row = pack_row([([5, 0, 6], [7, 0]), ([0], [0])])
    assert row.targets.tolist() == row.ids[row.predictors + 1].tolist() == [7, 0, 0]
    assert row.predictors.tolist() == [2, 3, 5] and row.lengths.tolist() == [2, 1]
    row = pack_row([([1], [2] * n) for n in (29, 8000, 30, 8001, 28, 32)])  # similar ones have one length
    assert row.cu_seqlens.diff().tolist() == [33] * 4 + [8001, 8002]
    row = pack_row(groups())  # neighbours share one copy of their prompt
    assert len(row.ids) == sum(len(p) + len(r) for p, r in groups()) - (2 * 7 + 2 * 21 + 1)
    assert row.max_seqlen == row.cu_seqlens.diff().max() == 38
    with pytest.raises(ValueError, match="empty prompt"):
        pack_row([([], [1])])
    # on a GPU nothing is padded; there is none here: tensors are left where they are
    tensor = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, to, **_: x if to == "cuda" else tensor(x, to))
    row = pack_row([([1, 2], [3]), ([4], [5, 6, 7])], device="cuda")
    assert row.document_index.tolist() == list(range(7)) and row.cu_seqlens.tolist() == [0, 3, 7]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [60, 75, 200, 10_000])
@pytest.mark.parametrize("batch", [sequences(25, seed=3), [s for seed in range(4) for s in groups(seed)]],
                         ids=["sequences", "groups"])
def test_packing(batch, budget, world):
    """Each sequence once, no row over the budget, as many rows on each rank, no more tokens than unshared."""
    ranks = [pack(batch, budget, r, world) for r in range(world)]
    assert sorted(i for r in ranks for m in r for i in m.rows) == list(range(len(batch)))
    assert len({len(r) for r in ranks}) == 1 and all(len(m.ids) <= budget for r in ranks for m in r)
    for m in (m for r in ranks for m in r if m.rows):
        assert m.targets.tolist() == [t for i in m.rows for t in batch[i][1]]
        assert len(m.ids) <= sum(len(p) + len(r) for p, r in (batch[i] for i in m.rows))


def test_ranks_are_balanced_at_each_moment_and_groups_stay_together():
    g = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(256, generator=g) * 0.7 + 7.5).long().clamp(max=9000).tolist()
    ranks = lib.split_by_budget(lengths, 32768, 8)
    loads = torch.tensor([[sum(lengths[i] for i in b) for b in r] for r in ranks], dtype=torch.float)
    assert (loads.max(0).values.sum() / loads.mean(0).sum()) < 1.05
    with pytest.raises(ValueError, match="--token_budget"):
        lib.split_by_budget([10, 50], 40)
    batch = [([p] * 8, [p] * 4) for p in range(40) for _ in range(4)]  # 8 + 4 + 3 * 6 = 30 tokens a group
    rows = [m.rows for m in pack(batch, 480)]
    assert all({i - i % 4 + j for j in range(4)} <= set(r) for r in rows for i in r)
    assert any(len({i // 4 for i in r}) > 2 for r in rows)


def test_an_empty_micro_batch_takes_part():
    policy = Policy(make_model())
    logp, entropy = policy(pack_row([]), 0.6)
    (logp.sum() + entropy.sum()).backward()
    assert len(logp) == 0 and all(p.grad is None or not p.grad.any() for p in policy.parameters())
    assert pack([], 100, 1, 2) == [] and [m.rows for m in pack([([1], [2])], 100, 1, 2)] == [[]]


def test_budget_does_not_change_the_gradient():
    batch = sequences(9, seed=5)
    total = sum(len(r) for _, r in batch)
    plain = make_model()
    (sum(exact_logp(plain, p, r, 0.6).sum() for p, r in batch) / total).backward()
    truth = torch.cat([p.grad.flatten() for p in plain.parameters()])
    for budget in (80, 150, 100_000):
        policy = Policy(make_model())
        for row in pack(batch, budget):
            (policy(row, 0.6)[0].sum() / total).backward()
        assert off(torch.cat([p.grad.flatten() for p in policy.parameters()]), truth) < 1e-5


# ----- Models

@pytest.mark.parametrize("words, change", [
    ("does more to its logits", lambda m: m.lm_head.register_forward_hook(lambda _, inputs, out: out / 2)),
    ("handed no `packing`", lambda m: m.model.register_forward_pre_hook(
        lambda _, args, named: (args, {k: v for k, v in named.items() if k != "packing"}), with_kwargs=True)),
    ("non-finite", lambda m: m.model.norm.weight.data.fill_(float("nan")))])
def test_a_model_that_computes_something_else_is_refused(words, change):
    """A head that does more, attention that is not handed our keywords, damaged weights."""
    model = make_model()
    change(model)
    with pytest.raises(ValueError, match=words):
        Policy(model)


@pytest.mark.parametrize("options", [{"do_sample": False, "temperature": 0.6}, {"pad_token_id": -1},
                                     {"num_beams": 1, "length_penalty": 0.5}])
def test_a_generation_config_that_cannot_be_saved_is_repaired(options, tmp_path, capsys):
    path = save_model(tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], **options}))
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "refused")
    save(tmp_path / "run", 1, Policy(path))
    assert "generation_config" in capsys.readouterr().out
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run/000001/hf").generation_config
    assert kept.eos_token_id == [0, 5] and not kept.do_sample


def test_a_misspelt_folder_is_not_blamed_on_the_network(tmp_path, monkeypatch):
    save_model(tmp_path / "models" / "smollm2")
    (tmp_path / "models" / "t5").mkdir()
    (tmp_path / "models" / "t5" / "config.json").write_text('{"model_type": "t5"}')
    monkeypatch.chdir(tmp_path)
    near = r"no such folder, did you mean \S*models/smollm2\?$"  # and not a word about the hub
    for name, words in (("models/smolm2", near), ("./models/smolm2", near), ("models/smolm2/", near),
                        (str(tmp_path / "models/smolm2"), near), ("./nowhere/at/all", "no such folder$"),
                        ("models", "no config.json"), ("models/t5", "AutoModelForCausalLM"),
                        ("org/no-such-model", "no such folder, and the hub")):  # HF_HUB_OFFLINE: not cached
        with pytest.raises(RankError, match=words):
            open_model(name)
    monkeypatch.setattr(lib, "snapshot_download", lambda name, **_: save_model(tmp_path / "cached"))
    assert open_model("org/model").folder == str(tmp_path / "cached")


# ----- Checkpoints

def save(folder, step, policy=None, keep=2, seed=0):
    """A checkpoint after one update, so that the optimizer has a state."""
    policy = policy or Policy(make_model(seed=seed))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy(pack_row(sequences()), 0.6)[0].mean().backward()
    optimizer.step()
    lib.save_checkpoint(folder, step, policy, optimizer, make_tokenizer(), {"step": step}, keep)
    return policy, optimizer


def shapes(policy):
    return {k: tuple(v.shape) for k, v in policy.model.state_dict().items()}


def load(path, **changes):
    policy = Policy(make_model(seed=9, **changes))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    return lib.load_checkpoint(path, policy, optimizer), policy, optimizer


@KINDS
def test_a_checkpoint_restores_every_bit(kind, tied, tmp_path):
    policy, optimizer = save(tmp_path, 7, Policy(make_model(kind, tied)))
    state, other, others = load(tmp_path / "000007", kind=kind, tied=tied)
    assert state == {"step": 7}
    for a, b in zip(policy.parameters(), other.parameters()):
        assert torch.equal(a, b)
        assert all(torch.equal(v, others.state[b][k]) for k, v in optimizer.state[a].items())
    folder = str(tmp_path / "000007" / "hf")
    exported = dict(Policy(folder).full_weights())  # a tied head under both names
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(exported)
    assert all(torch.equal(w, exported[name]) for name, w in policy.full_weights())
    model, parameters = open_model(folder), sum(p.numel() for p in policy.parameters())
    assert model[:4] == (folder, 1024, parameters, 106) and model.shapes == shapes(policy)


@pytest.mark.parametrize("keep", [1, 2, 0])
def test_what_stays_of_old_checkpoints(keep, tmp_path):
    assert checkpoints(tmp_path / "nowhere") == []
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=keep)
    whole = ["000004"] if keep == 1 else ["000003", "000004"]
    assert checkpoints(tmp_path) == whole
    assert checkpoints(tmp_path, "hf") == (["000001", "000002", "000003", "000004"] if keep == 0 else whole)
    assert sorted(os.listdir(tmp_path)) == checkpoints(tmp_path, "hf")
    if keep == 0:
        assert os.listdir(tmp_path / "000001") == ["hf"] and Policy(str(tmp_path / "000001" / "hf"))
        with pytest.raises(RankError, match="nothing to go on from"):
            load(tmp_path / "000001")
        save(tmp_path, 2, keep=0)  # a run that went back saves over what is left
        assert "000002" in checkpoints(tmp_path, "hf")


@contextmanager
def full_disk():
    """Every write of this process beyond 4 KB fails."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("where", [
    "policy.dcp.save", "os.rename", "policy.write_atomic", "transformers.PreTrainedModel.save_pretrained",
    "transformers.PreTrainedTokenizerFast.save_pretrained", ""])
def test_a_full_disk_costs_this_checkpoint_only(where, tmp_path):
    """Damaged weights, too, are never saved."""
    policy, _ = save(tmp_path, 1)
    full = mock.patch(where, side_effect=OSError("No space left on device")) if where else full_disk()
    with full, pytest.raises(OSError, match="000002 not written: .*(No space|File too large)"):
        save(tmp_path, 2, policy)
    assert os.listdir(tmp_path) == ["000001"]
    policy, optimizer = save(tmp_path, 3, policy)
    assert checkpoints(tmp_path) == ["000001", "000003"]
    for value in (float("nan"), float("inf")):
        policy.model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
        with pytest.raises(FloatingPointError, match="not finite"):
            lib.save_checkpoint(tmp_path, 4, policy, optimizer, make_tokenizer(), {})
        assert sorted(os.listdir(tmp_path)) == ["000001", "000003"]


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 2, 0])
def test_a_kill_at_any_moment_leaves_a_whole_newest_checkpoint(keep, tmp_path):
    """Of the operations that change what a folder holds, each is once the first that does not happen."""
    policy, optimizer = [save(tmp_path / "first", step, keep=keep) for step in (1, 2, 3)][-1]
    for last in range(100):
        run, made = tmp_path / str(last), []
        shutil.copytree(tmp_path / "first", run)

        def dies(function, last=last, made=made):
            def wrapped(*args, **kwargs):
                if len(made) == last:  # the dead stay dead
                    raise KeyboardInterrupt
                made.append(function)
                return function(*args, **kwargs)
            return wrapped

        dying = {name: dies(getattr(os, name)) for name in ("rename", "remove", "unlink", "rmdir", "replace")}
        with mock.patch.multiple(os, **dying), suppress(KeyboardInterrupt):
            lib.save_checkpoint(run, 4, policy, optimizer, make_tokenizer(), {"step": 4}, keep)
        newest = checkpoints(run)[-1]
        assert newest in ("000003", "000004") and load(run / newest)[0]["step"] == int(newest)
        for name in checkpoints(run):
            check_checkpoint(run / name, shapes(policy))
        save(run, 4, policy, keep=keep)  # as the resumed run does, over whatever is left
        assert not [n for n in os.listdir(run) if n.endswith(".tmp")] and len(checkpoints(run)) == (keep or 2)
        if len(made) < last:  # it came to its end
            break
    assert 4 < last < 99


@pytest.mark.parametrize("changes", [
    {"hidden_size": 32}, {"num_hidden_layers": 3}, {"kind": "llama"}, {"vocab_size": 107}])
def test_a_checkpoint_of_another_model_is_named_as_such(changes, tmp_path):
    save(tmp_path, 1)
    with pytest.raises(RankError, match="of another model: .* there, and .* in this one"):
        load(tmp_path / "000001", **changes)


@pytest.mark.parametrize("file", ["trainer.json", ".metadata", "__0_0.distcp"])
def test_a_damaged_file_is_named(file, tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "000001" / file
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-10]), path.unlink):  # cut short, then gone
        damage()
        with pytest.raises(RankError) as e:
            load(tmp_path / "000001")
        assert file in str(e.value) and "000001" in str(e.value) and "elete" not in str(e.value)


# ----- Two ranks

@in_processes(ranks=2)
def test_two_ranks_save_fail_and_refuse_together(tiny, tmp_path):
    """One of them downloads, before the other looks. Errors are the same on both."""
    os.chdir(tmp_path)
    rank, world, _ = join_processes()
    policy, optimizer = save("run", 1, Policy(make_model()).shard(torch.float32))
    said = []

    def cannot_save(step, words):
        with pytest.raises((OSError, FloatingPointError), match=words) as e:
            lib.save_checkpoint("run", step, policy, optimizer, make_tokenizer(), {})
        said.append(str(e.value))

    for failing in range(world):  # a disk that is full for one rank
        with full_disk() if rank == failing else nullcontext():
            cannot_save(2, "000002 not written")
    with mock.patch("os.rename", side_effect=OSError("no rename")) if rank == 0 else nullcontext():
        cannot_save(2, "no rename")
    save("run", 3, policy)

    with torch.no_grad():
        policy(pack_row(sequences()))
    embedding = policy.model.get_input_embeddings()
    assert not isinstance(embedding.weight, DTensor)  # gathered
    policy.reshard()
    assert isinstance(embedding.weight, DTensor)

    def download(name, **_):
        if rank == 0:
            time.sleep(1)
            Path("downloaded").touch()
        return tiny if os.path.exists("downloaded") else "too early"

    with mock.patch.object(lib, "snapshot_download", download):
        assert open_model("org/name").folder == tiny
    with (mock.patch.object(lib, "snapshot_download", side_effect=ZeroDivisionError),
          pytest.raises(RankError, match="no such folder")):
        open_model("org/name")
    if rank == 1:  # on the shard of one rank
        policy.model.model.norm.weight.to_local().data.fill_(float("nan"))
    cannot_save(4, "not finite")
    assert gather(said) == [said, said] and checkpoints("run") == ["000001", "000003"]
