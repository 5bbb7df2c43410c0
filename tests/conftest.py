"""Small real models and a way to run grpo.py, shared by all tests. No network, no GPU, fp32 by default."""
import functools
import importlib
import json
import os
import pkgutil
import string
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import forks
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import common

# Threads change the order of a sum: every program of a test gets one, however it is started.
os.environ["OMP_NUM_THREADS"] = "1"
SPECIAL = ["<eos>", "<user>", "<bot>", "<think>", "</think>", "\\boxed{"]
KINDS = pytest.mark.parametrize("kind, tied", [("qwen2", False), ("llama", True), ("gemma3", True)])


def make_tokenizer(template=True, every_byte=False, **parts):
    """One token a character, pad equal to EOS on purpose (as in the distilled Qwen). It works on bytes,
    because AutoTokenizer makes a Qwen2Tokenizer of the folder of any Qwen2, whatever its files say."""
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = [bytewise.pre_tokenize_str(c)[0][0] for c in string.printable]
    if every_byte:
        names = sorted(bytewise.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(SPECIAL + names)}, merges=[]))
    core.pre_tokenizer, core.decoder = bytewise, decoders.ByteLevel()
    for name, part in parts.items():
        setattr(core, name, part)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", additional_special_tokens=SPECIAL[1:])
    if template:
        tokenizer.chat_template = ("{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
                                   "{% if add_generation_prompt %}<bot>{% endif %}")
    return tokenizer


def make_model(kind="qwen2", tied=False, seed=0, **changes):
    """A random causal LM of the given architecture with head_dim 32 (which vLLM's CPU kernels take)."""
    shape = {"vocab_size": len(SPECIAL) + len(string.printable), "hidden_size": 64, "intermediate_size": 96,
             "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "max_position_embeddings": 1024, "tie_word_embeddings": tied, "initializer_range": 0.2,
             "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None, **changes}
    torch.manual_seed(seed)
    if kind == "gemma3":
        # both kinds of layer, a window shorter than the documents, a head_dim that is not hidden / heads
        layers = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        config = transformers.Gemma3TextConfig(**{"head_dim": 64, **shape, **layers})
    else:
        config = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}[kind](**shape)
    return transformers.AutoModelForCausalLM.from_config(config)


def save_model(path, kind="qwen2", tied=False, seed=0, template=True, **changes):
    make_model(kind, tied, seed, **changes).save_pretrained(path)
    make_tokenizer(template).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny untied Qwen2 with tokenizer."""
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """36 sums."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    sums = [{"id": f"{a}+{b}", "problem": f"{a}+{b}?", "answer": str(a + b)}
            for a in range(6) for b in range(6)]
    path.write_text("\n".join(map(json.dumps, sums)) + "\n")
    return str(path)


def read_cases(name):
    return list(common.read_lines(str(ROOT / f"tests/data/{name}.jsonl")))


def text_of(case):
    """The text of a case, or a long one of its parts: [[text, how many times], ...]."""
    return case["text"] if "text" in case else "".join(text * times for text, times in case["parts"])


def each_case(name):
    """Run a test on each case of tests/data/NAME.jsonl, which is called by the first value in its line."""
    def param(case):
        first = str(next(iter(case.values())))
        return pytest.param(case, id=first[:70], marks=[pytest.mark.slow] * ("slow" in case))
    return pytest.mark.parametrize("case", [param(case) for case in read_cases(name)])


def sequences(n=9, seed=0, vocab=100, longest=40):
    """[(prompt_ids, response_ids)] of very uneven lengths, a one-token response, EOS tokens in the middle."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=g))

    def some(length):
        return torch.randint(0, vocab, (length,), generator=g).tolist()

    return [(some(draw(1, longest // 2)), some(1 if i == 3 else draw(1, longest))) for i in range(n)]


def off(value, reference):
    """The largest difference, relative to the largest value of the reference."""
    return ((value.double() - reference).abs().max() / reference.abs().max().clamp(min=1e-30)).item()


def exact_logp(model, prompt, response, temperature):
    """The slow truth: one sequence through the unmodified model, in float64 -> log-probs [R]."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model.double()(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1:-1] / temperature
    return torch.log_softmax(logits, -1).gather(-1, ids[0, len(prompt):, None])[:, 0]


# a small step: two ranks differ by rounding alone, which after large ones decides what a later sample says
SMALL = ["--max_len", "24", "--prompts", "6", "--group", "4", "--lr", "1e-4", "--style", "plain",
         "--engine", "torch"]


def python(ranks=1):
    """The words that start a program in one process, or with torchrun in several."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *torchrun * (ranks > 1)]


def command(model, data, out, *options, ranks=1, program=ROOT / "grpo.py"):
    """The command line of a small run; later options win over the small defaults."""
    where = ["--model", model, "--data", data, "--out", str(out)]
    return [*python(ranks), str(program), *where, *SMALL, *map(str, options)]


def sabotaged(folder, code):
    """A program that is grpo.py after `code` has run: it may replace functions, or call `breaks`."""
    path = Path(folder) / "sabotaged.py"
    path.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                    f"import grpo, policy, rollout\nfrom conftest import breaks\n{code}\ngrpo.main()\n")
    return path


def breaks(name, error, calls=None, given="", rank=None):
    """From here on the function `name` raises an error, or sends its process a signal: on one rank or all, in
    the calls with these numbers (1, 2, ...) or all, of the calls that are given a word."""
    place, attribute = name.rsplit(".", 1)
    place, seen = pkgutil.resolve_name(place), []
    original = getattr(place, attribute)

    def broken(*args, **named):
        if given in str(args) and rank in (None, int(os.environ.get("RANK", "0"))):
            seen.append(args)
            if calls is None or len(seen) in calls:
                if isinstance(error, Exception):
                    raise error
                os.kill(os.getpid(), error)
        return original(*args, **named)

    setattr(place, attribute, broken)


def launch(cmd, **how):
    """A program that runs. Its .stdout has both of its streams."""
    read, write = os.pipe()
    process = forks.begin(cmd, write, write, **how)
    os.close(write)
    process.stdout = os.fdopen(read, errors="replace")
    return process


def run(cmd, check=True, timeout=300, **how):
    """A program to its end -> its exit code and what it printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = forks.begin(cmd, out.fileno(), err.fileno(), **how)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(cmd, code, out.read(), err.read())
    if check and code:
        raise AssertionError(f"{' '.join(cmd)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def start(function, *args, ranks=1, **how):
    """Run a function of a test file in a process of its own, or in several."""
    words = [function.__module__, function.__name__, *map(str, args)]
    return run([*python(ranks), __file__, *words], **how)


def in_processes(**how):
    """A slow test whose body runs in a process of its own, or in several. Its fixtures arrive as text."""
    def decorate(test):
        @pytest.mark.slow
        @functools.wraps(test)
        def test_from_outside(**fixtures):
            done = start(test, *fixtures.values(), **{"ranks": fixtures.get("ranks", 1), **how})
            assert "Traceback" not in done.stderr, done.stderr[-3000:]
        return test_from_outside
    return decorate


def metrics(out, timing=False):
    """Lines of metrics.jsonl, without what a clock measured."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    if timing:
        return lines
    return [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]


if __name__ == "__main__":  # what `start` starts
    function = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
    getattr(function, "__wrapped__", function)(*sys.argv[3:])
