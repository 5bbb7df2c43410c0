"""predict.py: parameters, memory beside simulations, advice that fits, seconds, what --dry_run prints."""
import argparse
import json
import re
import sys

import pytest
import torch
from conftest import KINDS, ROOT, each_case, make_model, run

import predict
import schedule


@KINDS
def test_parameters_are_those_of_the_model(kind, tied, tmp_path):
    model = make_model(kind, tied)
    model.config.save_pretrained(tmp_path)
    m, real = predict.model_shape(str(tmp_path)), sum(p.numel() for p in model.parameters())
    assert m["tied"] == tied and abs(m["parameters"] - real) <= (kind != "qwen2") * 0.01 * real


M = predict.model_shape(predict.MODEL)  # without a network
RESOLVED = {"dtype": "auto", "max_len": 7168, "max_prompt_len": 1024, "token_budget": 0, "recompute": 1,
            "prompts": 128, "group": 8, "engine": "auto", "max_seqs": 0, "gpu_memory": 0.6,
            "kl_coef": 0.001, "mean_len": 4000, "updates": 2, "steps": 10, "keep": 2}


def card(*options):
    return predict.card(schedule.parse(["--dry_run", *options]))


@pytest.mark.parametrize("row", json.loads((ROOT / "bench/results/memory.json").read_text())["rows"],
                         ids=lambda row: "{ranks} ranks, {budget}, recompute {recompute}".format(**row))
def test_memory_of_an_update_against_a_simulation(row):
    """The file is what bench/memory.py wrote. Never below: a run that was said to fit must fit."""
    a = RESOLVED | {"token_budget": row["budget"], "recompute": row["recompute"]}
    said = predict.predict_memory(M, a, 79.2, row["ranks"])["training"] - predict.RESERVE
    assert row["simulated_gib"] <= said <= 1.06 * row["simulated_gib"]


@each_case("memory")
def test_refusals_name_a_value_that_fits(case):
    a, memory = RESOLVED | case["change"], card("--gpu_type", case["card"])[1]
    world, wanted = case["world"], case["offers"]
    why = predict.predict_memory(M, a, memory, world)["why"]
    assert bool(why) == bool(wanted), why
    offer = predict.remedy(predict.MODEL, a, memory, world) if wanted else ""
    assert (wanted or "") in offer, offer
    if wanted and "--stages" not in offer:
        pairs = zip(offer.split()[::2], offer.split()[1::2])
        fix = {name[2:]: float(value) if "." in value else int(value) for name, value in pairs}
        assert not predict.predict_memory(M, a | fix, memory, world)["why"]


def test_one_small_card_is_told_which_model_fits(monkeypatch):
    name, memory, *_ = card("--gpu_memory_gib", "24")
    offer = predict.remedy(predict.MODEL, RESOLVED, memory, 1)
    size = float(re.search(r"up to (\d\.\d+) B parameters", offer)[1])
    assert 0.3 < size < 1.3 and name.startswith("card")
    half = {"hidden": 896, "mlp": 4864, "layers": 24, "q": 896, "kv": 128, "tied": True}  # Qwen2.5-0.5B
    monkeypatch.setattr(predict, "SHAPE", predict.SHAPE | half)
    small = predict.model_shape(predict.MODEL)
    assert small["parameters"] == 494_032_768
    assert not predict.predict_memory(small, RESOLVED, memory, 1)["why"]


@pytest.mark.parametrize("name, gib, price, assumed", [
    ("NVIDIA H100 80GB HBM3", 79.1, 2.5, False), ("NVIDIA B200", 178.4, 1.18, True),
    ("NVIDIA A100-SXM4-40GB", 39.4, 1.1, False)])
def test_a_card_is_asked_for_its_memory(monkeypatch, name, gib, price, assumed):
    found = argparse.Namespace(name=name, total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    said = card()
    assert said[1] == gib and ("assumed" in said[0]) == assumed and said[-1] == price


def test_time_of_a_step(monkeypatch):
    """84 PFLOP for train and two log-prob passes over 1,024 sequences of 4,000 tokens: 85 s on 8 A100."""
    monkeypatch.setattr(predict, "PROMPT", 0)
    gpu = card("--gpu_type", "A100-80")
    t = predict.predict_seconds(M, RESOLVED | {"updates": 1000}, gpu, 8)
    assert t["update"] + t["log-probs"] == pytest.approx(84.4, rel=0.02)
    assert t["generate"] == pytest.approx(1024 * 4000 / 6000 / 8, rel=1e-3)
    longer = predict.predict_seconds(M, RESOLVED | {"max_len": 24576}, gpu, 32)
    assert longer["generate"] == pytest.approx(24576 / 110, rel=1e-3)  # bound by the longest sequence


def test_dry_run_prints_and_refuses(capsys, tmp_path):
    out = tmp_path / "run"
    options = ["--dry_run", "--gpus", "4", "--gpu_type", "RTX4090", "--gpu_memory", "0.9", "--run", str(out)]
    assert schedule.main(options) == 2
    said, refused = capsys.readouterr()
    assert "1,777,088,000 parameters" in said and "assumed:" in said
    assert "stage1 cannot run" in refused and "--gpu_memory 0." in refused and not out.exists()
    assert schedule.main(["--dry_run", "--gpus", "8", "--run", str(out)]) == 0
    assert "it fits" in capsys.readouterr().out


# in a process of its own: the simulation makes a process group, and is_cuda true of all fake tensors
CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import memory, predict
predict.SHAPE = predict.SHAPE | {"layers": 4}
shape = predict.model_shape(predict.MODEL)
print(json.dumps(shape | memory.compare(shape, 8, 8192, 0)))
"""


def test_prediction_and_simulation_agree():
    """Four layers of the 1.5B model on 8 ranks, today."""
    found = json.loads(run([sys.executable, "-c", CODE, str(ROOT / "bench")]).stdout)
    # weights, gradients, two moments in fp32 and the reference in bf16
    assert found["states_gib"] == pytest.approx((16 + 2) * found["parameters"] / 8 / 2**30, rel=0.01)
    assert found["simulated_gib"] <= found["predicted_gib"] <= 1.10 * found["simulated_gib"]
