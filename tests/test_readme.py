"""The README's commands are executable documentation: what it tells a stranger to type is what runs here."""
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, metrics

import evaluate
import grpo

README = (ROOT / "README.md").read_text()


def block(name):
    return re.search(rf"<!-- {name} -->\n```bash\n(.*?)```", README, re.DOTALL).group(1)


@pytest.mark.slow
def test_the_first_training_as_written(tmp_path):
    """All after the installation, in a copy of the repository: real model, real problems, vLLM on the CPU."""
    for item in [*ROOT.glob("*.py"), ROOT / "toy", ROOT / "assets"]:
        (shutil.copytree if item.is_dir() else shutil.copy)(item, tmp_path / item.name)
    steps = block("first training")
    training = steps[steps.index("python toy"):]
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", training], cwd=tmp_path, capture_output=True,
                          text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "engine vllm" in done.stdout
    lines = metrics(tmp_path / "runs/first")
    assert len(lines) == 3 and all(m["tokens"] > 0 and m["mismatch_kl"] < 5e-4 for m in lines)
    assert (tmp_path / "runs/first/checkpoints/000003/hf/model.safetensors").exists()


def lines(program):
    found = [line for line in README.splitlines()
             if re.match(rf"(torchrun|python) .*{program}\.py --|torchrun .*{program}\.py", line)]
    return [line for line in found if "--help" not in line]


@pytest.mark.parametrize("program, line", [(p, x) for p in (grpo, evaluate) for x in lines(p.__name__)])
def test_commands_parse(program, line):
    """Every grpo.py and evaluate.py line in the README names options that exist."""
    program.parse_args(shlex.split(line.split(f"{program.__name__}.py", 1)[1], comments=True))


def test_tests_named_in_the_readme_exist():
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert named and all(f"def {name}(" in tests for name in named)
