"""The GPU proof scripts at --size tiny on the CPU: they run, their checks can fail, their arithmetic is right.

No speed is asserted. What only a card can show (kernels, NCCL, sleep, MFU) is not tested here.
"""
import argparse
import doctest
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "bench"))
import gpu_correctness  # noqa: E402
import gpu_generate  # noqa: E402
import gpu_learn  # noqa: E402
import gpu_projection  # noqa: E402
import gpu_update  # noqa: E402


def tiny(script, folder, *options, check=True):
    """(exit status, JSON, printed) of bench/SCRIPT --size tiny."""
    out = folder / f"{script}.json"
    done = run([sys.executable, str(ROOT / "bench" / script), "--size", "tiny", "--out", str(out), *options],
               check=check, CUDA_VISIBLE_DEVICES="")
    result = json.loads(out.read_text())
    assert result["device"] == "cpu" or script == "gpu_projection.py"
    assert result["date"] and {"python", "torch", "transformers"} <= set(result["versions"]) and "commit" in result
    assert result["command"].startswith(f"python bench/{script} --size tiny") and str(folder) not in result["command"]
    assert str(folder) not in json.dumps(result), "no machine paths in a result"
    return done.returncode, result, done.stdout


# ---------------------------------------------------------------------------------------------------------------
# Correctness
# ---------------------------------------------------------------------------------------------------------------

def test_correctness_checks_pass(tmp_path):
    code, result, _ = tiny("gpu_correctness.py", tmp_path)
    rows = result["rows"]
    assert code == 0 and {r["verdict"] for r in rows} == {"ok"}
    assert {r["check"].split()[0] for r in rows} == {"attention", "packed", "head", "update", "step"}
    assert {r["dtype"] for r in rows} == {"float32", "bfloat16"}
    assert any(r["off"] > 0 for r in rows if r["dtype"] == "bfloat16"), "bf16 was not bf16"
    assert {"update gradients, second", "update change of weights", "step metrics", "attention dv",
            "head d weight"} <= {r["check"] for r in rows}


def wrong(check, dtype="float32"):
    return [what for what, _, error, bound in check(torch.device("cpu"), dtype, "tiny") if not error <= bound]


def test_documents_that_see_each_other_are_found(monkeypatch):
    import policy
    right = policy.document_attention

    def leaky(q, k, v, cu_seqlens, scale, window=None):
        return right(q, k, v, cu_seqlens[[0, -1]], scale, window)

    def fast(module, query, key, value, cu_seq_lens_q=None, scaling=None, sliding_window=None, **_):
        return leaky(*(x[0].transpose(0, 1) for x in (query, key, value)),
                     cu_seq_lens_q, scaling, sliding_window)[None], None

    assert wrong(gpu_correctness.check_attention) == []
    monkeypatch.setattr(policy, "varlen_attention", fast)
    assert set(wrong(gpu_correctness.check_attention)) == {f"attention {x}" for x in ("out", "dq", "dk", "dv")}


def test_a_wrong_entropy_and_a_wrong_head_gradient_are_found(monkeypatch):
    import policy
    right = policy.token_logprobs

    def slightly_wrong(hidden, weight, *args):
        logp, entropy = right(hidden, weight * 1.001, *args)
        return logp, entropy

    assert wrong(gpu_correctness.check_head) == []
    monkeypatch.setattr(policy, "token_logprobs", slightly_wrong)
    assert {"head log-probs", "head d weight"} <= set(wrong(gpu_correctness.check_head))


def test_a_check_that_does_not_run_fails_the_script(monkeypatch, tmp_path, capsys):
    """What a card with an unfit attention kernel would show: a row that says why, the others still run,
    exit status 1."""
    def broken(device, dtype, size):
        raise TypeError("varlen_attn() got an unexpected keyword argument")
        yield

    monkeypatch.setitem(gpu_correctness.CHECKS, "packed", broken)
    monkeypatch.setattr(gpu_correctness, "join", lambda: None)
    assert gpu_correctness.main(["--size", "tiny", "--checks", "packed", "head", "--dtypes", "float32",
                                 "--out", str(tmp_path / "x.json")]) == 1
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert rows[0]["verdict"] == "FAILED" and "unexpected keyword" in rows[0]["case"] and rows[1]["verdict"] == "ok"
    assert "packed float32: FAILED" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_written_by_default(tmp_path):
    args = argparse.Namespace(minutes=1, out=None, name="gpu_correctness", size="tiny")
    assert torch.cuda.is_available() or gpu_correctness.Results("x", args, [("a", "a", "")]).path is None


# ---------------------------------------------------------------------------------------------------------------
# Update
# ---------------------------------------------------------------------------------------------------------------

def test_update_rows(tmp_path):
    code, result, printed = tiny("gpu_update.py", tmp_path, "--recompute", "1", "--chunk", "16", "--profile")
    row, = result["rows"]
    assert code == 0 and row["recompute"] == 1 and row["grad_norm"] > 0 and row["budget"] == 64 and row["chunk"] == 16
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"]) and row["mfu"] is None
    assert row["responses"] == result["rollouts"]["tokens_response"] < row["tokens"] and 0 < row["fill"] <= 1
    assert row["score_tokens_per_second"] > 0 and row["micro_batches"] > 1
    assert sum(row["profile"]["kinds"].values()) == pytest.approx(1) and row["profile"]["top"][0]["seconds"] > 0
    assert row["profile"]["syncs"]["aten::_local_scalar_dense"]["calls"] > 0
    assert "not measured" in printed and "MET" not in printed


def test_random_model_has_the_exact_shape():
    """Parameters of DeepSeek-R1-Distill-Qwen-1.5B: 46,797,824 a layer, 1.777 B in all."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**gpu_correctness.SHAPES["r1-1.5b"], tie_word_embeddings=False))
    assert sum(p.numel() for p in model.model.layers[0].parameters()) == 46797824
    assert sum(p.numel() for p in model.parameters()) == 1777088000


def test_random_weights_are_those_of_their_seed_and_no_zeros():
    models = [gpu_correctness.fill(gpu_correctness.empty_model("tiny"), seed) for seed in (0, 0, 1)]
    a, b, c = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(a, b) and not torch.equal(a, c) and (a == 0).float().mean() < 1e-3
    norm = models[0].model.norm.weight
    assert norm.mean().item() == pytest.approx(1, abs=0.05)
    assert models[0].config.rope_parameters["rope_theta"] == 10000 and models[0].model.rotary_emb.inv_freq[0] == 1


def test_mfu_by_hand():
    """Two layers of width 8 with 2 heads, 1 key head, MLP 16, vocabulary 10; documents of 3 and 5 tokens, 6 responses.

    A layer's matmul weights: q 64, k and v 2 x 8 x 4 = 64, o 64, MLP 3 x 8 x 16 = 384: 576.
    body 2 x 2 x 576 x 8 = 18,432; attention 2 layers x 2 x 8 x (9 + 25) = 1,088; head 2 x 10 x 8 x 6 = 960.
    """
    shape = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                 intermediate_size=16, vocab_size=10)
    assert gpu_update.forward_flops(shape, 8, 6, 34) == (18432, 1088, 960)
    assert gpu_update.training_flops(shape, 8, 6, 34, 0) == (3 * 20480, 3 * 19520 + 4 * 960)
    assert gpu_update.training_flops(shape, 8, 6, 34, 1) == (3 * 20480, 4 * 20480)
    row = {"tokens": 8, "responses": 6, "squares": 34, "recompute": 1, "seconds": 2.0,
           "device": "NVIDIA H100 80GB HBM3"}
    gpu_update.rate(row, shape)
    assert row["tokens_per_second"] == 4 and row["mfu"] == pytest.approx(61440 / 2 / 989.4e12)
    assert row["hfu"] / row["mfu"] == pytest.approx(4 / 3)


@pytest.mark.parametrize("length, tflop", [(4000, 13.7), (8192, 31), (24576, 128)])
def test_operations_are_those_of_the_sizing_notes(length, tflop):
    assert (sum(gpu_update.forward_flops(gpu_correctness.SHAPES["r1-1.5b"], length, length, length**2)) / 1e12
            == pytest.approx(tflop, rel=0.005))


def test_peaks_by_device_name():
    assert gpu_update.peak_flops("NVIDIA H100 80GB HBM3") == gpu_update.peak_flops("NVIDIA H200") == 989.4e12
    assert gpu_update.peak_flops("NVIDIA H100 PCIe") == 756e12 and gpu_update.peak_flops("cpu") is None


def made_up(**changes):
    return {"side": "ours", "budget": 16384, "recompute": 1, "chunk": 1024, "compile": "none",
            "device": "NVIDIA H100", "mfu": 0.41, "hfu": 0.5, "peak_gib": 40.0, "tokens_per_second": 30000.0,
            "score_tokens_per_second": 100000.0, "grad_norm": 1.0, "fill": 0.8} | changes


def test_goals_are_judged():
    rows = [made_up(), made_up(budget=24576, peak_gib=44.0),
            made_up(side="trl", budget=None, tokens_per_second=20000.0, grad_norm=1.5)]
    lines = gpu_update.verdicts(rows, True)
    assert ("MET (MFU 41.0%" in lines[0] and "MET" in lines[1] and "MET (44.0 GiB" in lines[2]
            and "MISSED (1.50x)" in lines[3])
    assert "do NOT compute the same" in lines[4]
    lines = gpu_update.verdicts([made_up(mfu=0.2), made_up(budget=24576, error="OutOfMemoryError")], True)
    assert "MISSED" in lines[0] and "MISSED" in lines[1] and "not measured" in lines[2] and "not measured" in lines[3]


# ---------------------------------------------------------------------------------------------------------------
# Generation, learning, projection
# ---------------------------------------------------------------------------------------------------------------

def test_generation_rows(tmp_path):
    code, result, _ = tiny("gpu_generate.py", tmp_path, "--engine", "torch")
    rows = result["rows"]
    assert code == 0
    assert [r["what"] for r in rows] == ["start", "sleep", "push", "wake", "match", "stale", "push", "match",
                                         "short", "context", "step", "sleep", "wake"]
    fresh, stale = [r for r in rows if r["what"] == "match"], next(r for r in rows if r["what"] == "stale")
    assert max(abs(r["kl"]) for r in fresh) < 1e-9 < 1e-2 < stale["kl"]
    step = next(r for r in rows if r["what"] == "step")
    assert (step["tokens_per_second"] == pytest.approx(step["tokens"] / step["seconds"])
            and step["length_max"] <= step["limit"] == 48)
    assert step["tokens"] == pytest.approx(step["samples"] * step["length_mean"])


def test_an_engine_that_keeps_old_weights_is_found(monkeypatch):
    """check_match on an engine whose second push does nothing."""
    class Engine:
        sleep = wake = push = lambda self, *a, **k: None

    class Run:
        policy = torch.nn.Linear(2, 2)
        policy.full_weights = lambda: ()
    kls = iter([1e-6, 0.2, 0.2])
    monkeypatch.setattr(gpu_generate, "match", lambda *a: {"kl": next(kls)})
    args = argparse.Namespace(minutes=1, out=None, name="x", size="tiny")
    said = gpu_generate.check_match(gpu_correctness.Results("x", args, [("KL", "kl", ".1e")]), Run(), Engine(),
                                    gpu_generate.SIZES["tiny"])
    assert len(said) == 2 and "above 5e-04" in said[0] and "does nothing" in said[1]


def test_learning_is_seen(tmp_path):
    code, result, printed = tiny("gpu_learn.py", tmp_path)
    assert code == 0 and "it learned" in printed and len(result["rows"]) == 10
    steps = [m for m in result["curve"] if "reward" in m]
    assert ([m["step"] for m in steps] == list(range(1, 31))
            and result["rows"][-1]["reward"] > result["rows"][0]["reward"] + 0.3)
    assert any("eval_reward" in m for m in result["curve"]) and "grpo.py --recipe improved" in result["grpo"]


def test_not_learning_is_said():
    lines = [{"step": i, "reward": 0.3 + 0.1 * (i % 2), "updates_skipped": 0} for i in range(40)]
    assert gpu_learn.verdict(gpu_learn.tenths(lines), lines)[1] is False
    better = [m | {"reward": m["step"] / 40} for m in lines]
    assert gpu_learn.verdict(gpu_learn.tenths(better), better)[1] is True
    assert gpu_learn.verdict(gpu_learn.tenths(better[:3]), better[:3])[1] is False, "three steps are no proof"
    better[-1]["updates_skipped"] = 1
    assert gpu_learn.verdict(gpu_learn.tenths(better), better)[1] is False


def files(folder, device="NVIDIA H100"):
    generate = [{"what": "start", "seconds": 60.0}, {"what": "sleep", "seconds": 1.0},
                {"what": "push", "seconds": 9.0}, {"what": "wake", "seconds": 2.0}, {"what": "push", "seconds": 3.0},
                {"what": "step", "seconds": 50.0, "tokens_per_second": 10000.0, "samples": 128, "length_mean": 4000.0}]
    update = [made_up(budget=32768), made_up(budget=8192, tokens_per_second=1.0),
              made_up(compile="parts", tokens_per_second=1e9)]
    for name, rows in (("gpu_update", update), ("gpu_generate", generate)):
        (folder / f"{name}.json").write_text(json.dumps({"device": device, "rows": rows}))
    return ["--update", str(folder / "gpu_update.json"), "--generate", str(folder / "gpu_generate.json")]


def test_projection_by_hand(tmp_path, capsys):
    """128 samples a GPU of 4,000 tokens behind prompts of 100, so 524,800 tokens."""
    out = tmp_path / "p.json"
    assert gpu_projection.main([*files(tmp_path), "--length", "4000", "--prompt", "100", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    parts = {(r["recipe"], r["part"]): r["seconds"] for r in result["rows"]}
    assert parts["improved", "generate"] == pytest.approx(128 * 4000 / 10000)                          # 51.2
    assert parts["improved", "wait for the slowest GPU"] == pytest.approx(5.12)
    assert parts["improved", "update"] == pytest.approx(524800 / 30000)                                # 17.49
    assert parts["improved", "log-probs"] == pytest.approx(262400 / 100000)
    assert parts["deepscaler", "log-probs"] == pytest.approx(1.5 * 524800 / 100000)
    assert parts["improved", "push, sleep, wake"] == 3 + 1 + 2
    micro = 524800 / (32768 * 0.8)
    size = micro * (2 * (2 * 1.3103e9 + 0.4668e9) + 4 * 1.7771e9) + micro / 2 * 2 * 1.3103e9
    assert parts["improved", "communication"] == pytest.approx(size * 7 / 8 / 300e9)
    total = parts["improved", "TOTAL"]
    assert total == pytest.approx(sum(v for (recipe, part), v in parts.items()
                                      if recipe == "improved" and part != "TOTAL"))
    printed = capsys.readouterr().out
    assert ("PROJECTION" in result["what"] and "not measured on 8" in printed and f"{252 / total:.2f}x" in printed
            and "396 s published" in printed)


def test_projection_refuses(tmp_path):
    given = files(tmp_path)
    (tmp_path / "gpu_generate.json").unlink()
    with pytest.raises(SystemExit, match="gpu_generate.json is missing: run bench/gpu_generate.py"):
        gpu_projection.main(given)
    with pytest.raises(SystemExit, match="measured on a CPU"):
        gpu_projection.main(files(tmp_path, device="cpu"))
    given = files(tmp_path)
    broken = json.loads((tmp_path / "gpu_generate.json").read_text())
    broken["rows"] = [r for r in broken["rows"] if r["what"] != "step"]
    (tmp_path / "gpu_generate.json").write_text(json.dumps(broken))
    with pytest.raises(SystemExit, match='no finished row "step"'):
        gpu_projection.main(given)


def test_all_commands_are_understood(tmp_path):
    """Every command of gpu_all.sh: bash reads it, its options exist."""
    script = ROOT / "bench" / "gpu_all.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text().replace("\\\n", " ")
    commands = [line.split("run bench/", 1)[1].split(";;")[0].split()
                for line in text.splitlines() if "run bench/" in line]
    assert len(commands) == 8
    for name, *words in commands:
        for option in (w for w in words if w.startswith("--")):
            source = (ROOT / "bench" / name).read_text() + (ROOT / "bench" / "gpu_correctness.py").read_text()
            assert f'"{option}"' in source, (name, option)
    assert subprocess.run(["bash", str(script), str(tmp_path), "nonsense"],
                          cwd=ROOT, capture_output=True).returncode == 2


def test_doctests():
    for module in (gpu_correctness, gpu_update, gpu_learn, gpu_projection):
        assert doctest.testmod(module).failed == 0
