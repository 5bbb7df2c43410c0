"""Small real models and a way to run grpo.py, shared by all tests. No network, no GPU, fp32 unless a test says so."""
import json
import os
import string
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SPECIAL = ["<eos>", "<user>", "<bot>", "<think>", "</think>", "\\boxed{"]


def make_tokenizer(template=True):
    """One token a character, pad equal to EOS on purpose (as in DeepSeek's distilled Qwen). It is a tokenizer of
    bytes, because AutoTokenizer makes a Qwen2Tokenizer of the folder of any Qwen2, whatever its files say."""
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = [bytewise.pre_tokenize_str(c)[0][0] for c in string.printable]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(SPECIAL + names)}, merges=[]))
    core.pre_tokenizer, core.decoder = bytewise, decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>",
                                        additional_special_tokens=SPECIAL[1:])
    if template:
        tokenizer.chat_template = ("{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
                                   "{% if add_generation_prompt %}<bot>{% endif %}")
    return tokenizer


def make_model(kind="qwen2", tied=False, seed=0, **changes):
    """A random causal LM of the given architecture with head_dim 32 (which vLLM's CPU kernels take)."""
    shape = dict(vocab_size=len(SPECIAL) + len(string.printable), hidden_size=64, intermediate_size=96,
                 num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
                 tie_word_embeddings=tied, eos_token_id=0, pad_token_id=0, bos_token_id=None, initializer_range=0.2)
    shape.update(changes)
    torch.manual_seed(seed)
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    # both kinds of layer, a window shorter than the documents, a head_dim that is not hidden / heads
    return Gemma3ForCausalLM(Gemma3TextConfig(**{"head_dim": 64, **shape}, sliding_window=8,
                                              layer_types=["sliding_attention", "full_attention"]))


def save_model(path, kind="qwen2", tied=False, seed=0, template=True, **changes):
    make_model(kind, tied, seed, **changes).save_pretrained(path)
    make_tokenizer(template).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny untied Qwen2 with tokenizer."""
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny_tied"), kind="llama", tied=True, seed=1)


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """36 sums."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("\n".join(json.dumps(dict(id=f"{a}+{b}", problem=f"{a}+{b}?", answer=str(a + b)))
                              for a in range(6) for b in range(6)) + "\n")
    return str(path)


def sequences(n=9, seed=0, vocab=100, longest=40):
    """[(prompt_ids, response_ids)] of very uneven lengths, a one-token response and EOS tokens in the middle."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=g))
    out = []
    for i in range(n):
        prompt = torch.randint(0, vocab, (draw(1, longest // 2),), generator=g).tolist()
        response = torch.randint(0, vocab, (1 if i == 3 else draw(1, longest),), generator=g).tolist()
        out.append((prompt, response))
    return out


# a small step: two ranks differ by rounding alone, which after large ones decides what a later sample says
SMALL = ["--max_len", "24", "--prompts", "6", "--group", "4", "--lr", "1e-4", "--style", "plain",
         "--engine", "torch"]


def command(model, data, out, *options, ranks=1, program=ROOT / "grpo.py"):
    """The command line of a small run; later options win over the small defaults."""
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                 "--nproc_per_node", str(ranks)]
    return [*start, str(program), "--model", model, "--data", data, "--out", str(out), *SMALL,
            *map(str, options)]


# Threads change the order of a sum: every program of a test gets one, however it is started.
os.environ["OMP_NUM_THREADS"] = "1"


def sabotaged(folder, code):
    """A program that is grpo.py after `code` has run: it may replace functions, on one rank only with RANK."""
    path = Path(folder) / "sabotaged.py"
    path.write_text(f"import os, sys, time, signal\nsys.path.insert(0, {str(ROOT)!r})\n"
                    f"RANK = int(os.environ.get('RANK', 0))\nimport common, grpo, policy, rollout\n{code}\n"
                    f"grpo.main()\n")
    return path


def run(cmd, check=True, timeout=300, cwd=None, **env):
    done = subprocess.run(cmd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, cwd=cwd,
                          env={**os.environ, **env})
    if check and done.returncode:
        raise AssertionError(f"{' '.join(cmd)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


TIMING = ("second", "memory")


def metrics(out, timing=False):
    """Lines of metrics.jsonl, without what a clock measured."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return lines if timing else [{k: v for k, v in line.items() if not any(t in k for t in TIMING)} for line in lines]
