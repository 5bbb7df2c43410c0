"""Fast paths of policy.py against their plain twins: tiles = full logits, packed = separate, any budget = one batch."""
import pytest
import torch

from conftest import make_model, sequences
from policy import (Policy, bundles, document_attention, fold, pack, pack_row, padded_attention, padded_batches,
                    split_by_budget, token_logprobs, token_logprobs_plain, unfold)


def both(function, hidden, weight, targets, **options):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = function(h, w, targets, **options)
    g = torch.Generator().manual_seed(9)
    ((logp * torch.randn(len(logp), generator=g)).sum() + (entropy * torch.randn(len(logp), generator=g)).sum()).backward()
    return logp.detach(), entropy.detach(), h.grad, w.grad


@pytest.mark.parametrize("tokens, vocab, chunk", [(37, 1000, 8), (5, 151_936, 2), (64, 50, 64), (1, 11, 1024)])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_tiles_equal_full_logits(tokens, vocab, chunk, temperature):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, 32, generator=g), 0.3 * torch.randn(vocab, 32, generator=g)
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    for fast, plain in zip(both(token_logprobs, hidden, weight, targets, temperature=temperature, chunk=chunk),
                           both(token_logprobs_plain, hidden, weight, targets, temperature=temperature)):
        assert torch.allclose(fast, plain, atol=2e-5, rtol=1e-4)


def test_tiles_by_finite_differences():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, generator=g, dtype=torch.float64).float().requires_grad_()
    weight, targets = torch.randn(6, 4, generator=g), torch.tensor([0, 5, 2])
    logp, entropy = token_logprobs(hidden, weight, targets, 0.7)
    grad = torch.autograd.grad(logp[1] + 2 * entropy[1], hidden)[0]
    step = 2e-3
    for j in range(4):
        moved = hidden.detach().repeat(2, 1, 1)
        moved[0, 1, j] += step
        moved[1, 1, j] -= step
        up, down = [(lp[1] + 2 * e[1]) for lp, e in (token_logprobs_plain(m, weight, targets, 0.7) for m in moved)]
        assert abs((up - down) / (2 * step) - grad[1, j]) < 1e-3


def test_bf16_inputs_give_fp32_logprobs():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 64, generator=g).bfloat16(), torch.randn(300, 64, generator=g).bfloat16()
    targets = torch.randint(0, 300, (20,), generator=g)
    fast, plain = (both(f, hidden, weight, targets) for f in (token_logprobs, token_logprobs_plain))
    assert torch.allclose(fast[0], plain[0], atol=1e-4) and torch.allclose(fast[1], plain[1], atol=1e-3)
    assert fast[2].dtype == fast[3].dtype == torch.bfloat16
    assert (fast[2].float() - plain[2].float()).norm() < 0.01 * plain[2].float().norm()
    assert (fast[3].float() - plain[3].float()).norm() < 0.01 * plain[3].float().norm()


def test_entropy_without_gradient_is_only_a_metric():
    hidden = torch.randn(4, 8, requires_grad=True)
    logp, entropy = token_logprobs(hidden, torch.randn(9, 8), torch.arange(4), entropy_grad=False)
    assert logp.requires_grad and not entropy.requires_grad


def separate(model, prompt, response, temperature):
    """The slow truth: one sequence through the unmodified model with its own eager attention."""
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1:-1].float() / temperature
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(response, dtype=torch.int64)[:, None])[:, 0]


def groups(seed=0):
    """Sequences as a rollout has them: neighbours with one prompt; empty and long responses, a prompt that comes back."""
    g = torch.Generator().manual_seed(seed)
    some = lambda n: torch.randint(0, 60, (n,), generator=g).tolist()
    a, b, c = some(7), some(21), some(1)
    return [(p, some(n)) for p, n in [(a, 5), (a, 0), (a, 30), (b, 9), (c, 12), (c, 1), (b, 2), (b, 17), (b, 17)]]


@pytest.mark.parametrize("sequences", [sequences, groups])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("kind, tied", [("qwen2", False), ("qwen2", True), ("llama", False), ("llama", True), ("gemma3", True)])
def test_packed_equals_separate(kind, tied, recompute, train, sequences):
    """Log-probs and gradients; in eval mode too, where a cache left on would let documents see each other. `groups`
    share their prompts: every token of a row is there once, and every document sees its own."""
    plain, batch = make_model(kind, tied), sequences()
    plain.set_attn_implementation("eager")
    plain.eval()
    policy = Policy(make_model(kind, tied), recompute=recompute).train(train)
    policy.model.train(train)
    truth = torch.cat([separate(plain, p, r, 0.6) for p, r in batch])
    truth.mean().backward()
    logp, _ = policy(pack_row(batch), temperature=0.6)
    assert torch.allclose(logp, truth, atol=2e-5)
    logp.mean().backward()
    for (name, a), b in zip(policy.model.named_parameters(), plain.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=2e-5), name


def test_a_shared_prompt_lies_in_the_row_once():
    batch = groups()
    shared, whole = pack_row(batch), pack_row(batch, share=False)
    assert len(whole.ids) - len(shared.ids) == 2 * 7 + 2 * 21 + 1 and whole.layout is None
    assert torch.equal(unfold(shared.ids, shared.layout), whole.ids)
    assert torch.equal(unfold(shared.positions, shared.layout), whole.positions)
    assert torch.equal(fold(whole.ids, shared.layout), shared.ids)
    for name in ("cu_seqlens", "targets", "lengths", "max_seqlen", "rows"):
        assert torch.equal(*map(torch.as_tensor, (getattr(shared, name), getattr(whole, name)))), name


def test_a_model_that_drops_the_layout_is_refused():
    """transformers hands keywords it does not know through to attention; a model that does not must not train wrongly."""
    model = make_model()
    forward = model.base_model.forward
    model.base_model.forward = lambda *a, layout=None, **k: forward(*a, **k)
    with pytest.raises(ValueError, match="does not hand `layout` through"):
        Policy(model)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [80, 200, 2000])
def test_packing_of_groups(world, budget):
    """Each sequence once, no row over the budget, as many rows on each rank, and never more tokens than without sharing."""
    batch = [s for seed in range(4) for s in groups(seed)]
    ranks = [pack(batch, budget, r, world) for r in range(world)]
    assert sorted(i for r in ranks for m in r for i in m.rows) == list(range(len(batch)))
    assert len({len(r) for r in ranks}) == 1 and all(len(m.ids) <= budget for r in ranks for m in r)
    for m in (m for r in ranks for m in r if m.rows):
        assert m.targets.tolist() == [t for i in m.rows for t in batch[i][1]]
        assert len(m.ids) <= sum(len(p) + len(r) for p, r in (batch[i] for i in m.rows))


def test_bundles_are_neighbours_of_one_prompt():
    batch = groups()
    assert bundles(batch, 1000) == [[0, 1, 2], [3], [4, 5], [6, 7, 8]]
    assert bundles(batch, 50) == [[0, 1, 2], [3], [4, 5], [6, 7], [8]]
    assert bundles(batch, 0) == [[i] for i in range(9)]


def test_a_cache_would_leak_between_documents():
    """The trap itself, so that the test above is known to be able to fail: transformers' own sdpa path with its
    default use_cache, in eval mode, gives other numbers for a packed row."""
    model, batch = make_model().eval(), sequences()
    row = pack_row(batch)
    with torch.no_grad():
        leaky = model(input_ids=row.ids[None], position_ids=row.positions[None]).logits[0]
        clean = model(input_ids=row.ids[None], position_ids=row.positions[None], use_cache=False).logits[0]
    assert (leaky - clean).abs().max() > 0.01


def test_end_token_is_trained_although_it_is_the_pad_token():
    """pad == EOS == 0 here: masks come from lengths, so a response that ends in EOS keeps that token."""
    row = pack_row([([5, 0, 6], [7, 0]), ([0], [0])])
    assert row.targets.tolist() == [7, 0, 0] and row.where.tolist() == [2, 3, 5] and row.lengths.tolist() == [2, 1]


def test_last_token_of_a_document_predicts_nothing():
    row = pack_row([([1], [2, 3]), ([4, 5], [6])])
    assert row.where.tolist() == [0, 1, 4] and row.ids[row.where + 1].tolist() == row.targets.tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [60, 75, 200, 10_000])
def test_budget_split(world, budget):
    lengths = [len(p) + len(r) for p, r in sequences(25, seed=3)]
    ranks = split_by_budget(lengths, budget, world)
    assert sorted(i for r in ranks for b in r for i in b) == list(range(25))  # each sequence once
    assert len({len(r) for r in ranks}) == 1                                  # the same number of calls on every rank
    assert all(sum(lengths[i] for i in b) <= budget for r in ranks for b in r)


def test_budget_split_balances_the_ranks_at_each_moment():
    g = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(256, generator=g) * 0.7 + 7.5).long().clamp(max=9000).tolist()
    ranks = split_by_budget(lengths, 32768, 8)
    loads = torch.tensor([[sum(lengths[i] for i in b) for b in r] for r in ranks], dtype=torch.float)
    assert (loads.max(0).values.sum() / loads.mean(0).sum()) < 1.05


def test_too_long_for_the_budget_names_the_option():
    with pytest.raises(ValueError, match="--token_budget"):
        split_by_budget([10, 50], 40)


def test_budget_does_not_change_the_gradient():
    batch = sequences(12, seed=5)
    total = sum(len(r) for _, r in batch)
    grads = []
    for budget in (80, 150, 100_000):
        policy = Policy(make_model())
        for row in pack(batch, budget):
            (policy(row, 0.6)[0].sum() / total).backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert torch.allclose(grads[0], grads[2], atol=1e-6) and torch.allclose(grads[1], grads[2], atol=1e-6)


@pytest.mark.parametrize("attention", [document_attention, padded_attention])
def test_window_counts_the_current_token(attention):
    q = torch.randn(6, 1, 8)
    out = attention(q, q, q, torch.tensor([0, 6]), scale=1.0, window=1)
    assert torch.allclose(out, q, atol=1e-6)  # a window of one token sees only itself


def values_and_gradients(attention, inputs, out_grad):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attention(*leaves)
    return [out, *torch.autograd.grad(out, leaves, out_grad)]


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [40, 1, 17, 33, 3, 2, 38, 90, 91]])
def test_padded_documents_equal_separate_ones(lengths, window):
    g = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v, out_grad = (torch.randn(sum(lengths), h, 8, generator=g, dtype=torch.float64) for h in (6, 2, 2, 6))

    fast, plain = (values_and_gradients(lambda *x: attention(*x, bounds, 0.3, window), (q, k, v), out_grad)
                   for attention in (padded_attention, document_attention))
    for a, b in zip(fast, plain):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_padded_documents_that_share_prompts_equal_whole_ones(window):
    pieces, order = (3, 2, 5, 1, 4, 0, 7), (0, 1, 0, 2, 0, 3, 4, 5, 4, 6)  # the fourth response is empty
    layout, bounds = (pieces, order), torch.tensor([0, 5, 13, 17, 21, 32])
    g = torch.Generator().manual_seed(0)
    q, k, v, out_grad = (torch.randn(sum(pieces), h, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2, 4))

    def separate(*x):
        return fold(document_attention(*(unfold(t, layout) for t in x), bounds, 0.3, window), layout)

    fast, plain = (values_and_gradients(attention, (q, k, v), out_grad)
                   for attention in (lambda *x: padded_attention(*x, bounds, 0.3, window, layout), separate))
    for a, b in zip(fast, plain):
        assert torch.allclose(a, b, atol=1e-12)


def test_padding_is_worth_its_tokens():
    """Every token of the documents once; short ones together, long ones of different length alone."""
    lengths = (30, 8000, 31, 8001, 29, 8001, 33)
    index, shapes, back = padded_batches(lengths)
    assert shapes == [(4, 33), (1, 8000), (2, 8001)] and torch.equal(index[back], torch.arange(sum(lengths)))


def test_a_head_that_does_more_is_refused():
    class Scaled(type(make_model())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.5
            return out

    model = make_model()
    model.__class__ = Scaled
    with pytest.raises(ValueError, match="does more to its logits"):
        Policy(model)


def test_damaged_weights_are_refused():
    model = make_model()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="non-finite"):
        Policy(model)


def test_full_weights_hold_the_tied_head_under_both_names():
    for tied in (True, False):
        names = dict(Policy(make_model("llama", tied)).full_weights())
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(names)
