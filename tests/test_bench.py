"""The benchmark scripts at sizes for tests, without peers: they run, their JSON is whole, the sides agree.

No speed is asserted: these tests run on machines that do other things. Of bench/gpu.py everything runs here
but the card itself: its kernels, sleeping, memory.
"""
import doctest
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "bench"))
import gpu
import measure
import tables

import policy
import rollout
import schedule


def quick(script, folder, *options):
    """The JSON that `bench/SCRIPT --quick` writes."""
    out = folder / f"{script}.json"
    run([sys.executable, str(ROOT / "bench" / script), "--quick", "--work", str(folder), "--out", str(out),
         *options], timeout=1200)
    return check(json.loads(out.read_text()))


def check(result):
    """Everything a reader needs to judge a number is there."""
    assert result["date"] and result["what"] and result["memory"] and result["settings"]
    assert set(result["machine"]) == {"cpu", "cores", "device", "threads"}
    assert len(result["machine"]["threads"]) == 1 and result["minutes"] > 0
    assert len(result["before"]["load"]) == len(result["load_after"]) == 3 and "warning" in result
    assert 0 <= result["before"]["busy_cores"] <= result["machine"]["cores"]
    for versions in result["versions"].values():
        assert {"python", "torch", "transformers"} <= set(versions)
    for row in result["rows"]:
        assert "error" not in row, row
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert row["seconds"]["n"] == 1
    return result


# ----- Ours beside others -----------------------------------------------------------------------------------

@pytest.mark.slow
def test_update_sides_take_the_same_step(tmp_path):
    result = quick("update.py", tmp_path, "--sides", "ours", "padded", "sorted", "limit")
    rows = {r["side"]: r for r in result["rows"]}
    assert list(rows) == ["ours", "padded", "sorted", "limit"]
    norms = rows["ours"]["grad_norm"]
    assert len(norms) == 4 and min(norms) > 0  # two updates, done twice
    assert rows["padded"]["grad_norm_off"] < 1e-4 and rows["sorted"]["grad_norm_off"] < 1e-4
    held = result["rollout_files"]["tiny"]
    assert abs(rows["limit"]["tokens"] / (held["tokens_prompt"] + held["tokens_response"]) - 1) < 0.05
    assert all(r["memory_mb"]["median"] > 0 and r["first_seconds"]["median"] > 0 for r in rows.values())


@pytest.mark.slow
def test_head_sides_agree(tmp_path):
    rows = {r["side"]: r for r in quick("logprobs.py", tmp_path, "--sides", "ours", "full")["rows"]}
    assert set(rows) == {"ours", "full", "model_ours"}
    assert rows["full"]["off"] < 1e-4 and rows["ours"]["grad_head"] > 0
    assert rows["ours"]["entropy"] > 1 and rows["model_ours"]["logp"] < 0


@pytest.mark.slow
def test_engines_write_the_same_greedy_tokens(tmp_path):
    rows = {r["side"]: r for r in quick("generate.py", tmp_path)["rows"]}
    assert rows["torch"]["greedy_equal"] == rows["hf"]["greedy_equal"] == 1
    assert all(r["tokens_per_second"]["median"] > 0 and r["length_max"] <= 24 and r["samples"] == 12
               for r in rows.values())


@pytest.mark.slow
def test_vllm_and_bare_vllm_take_turns(tmp_path):
    pytest.importorskip("vllm")
    rows = {r["side"]: r for r in quick("generate.py", tmp_path, "--sides", "vllm", "hf")["rows"]}
    assert list(rows) == ["vllm", "bare_vllm", "bare_vllm+", "hf"]
    assert all(r["greedy_equal"] == 1 and r["samples"] == 12 for r in rows.values())


@pytest.mark.slow
def test_a_whole_step_is_measured(tmp_path):
    row, = quick("step.py", tmp_path, "--sides", "ours_torch")["rows"]
    assert row["side"] == "ours_torch" and row["tokens"] > 0
    assert row["grad_norm"] > 0 and 0 < row["reward"] < 1
    assert {"generate", "update", "sync"} <= set(row["phases"]) and len(row["steps"]) == 1


def test_a_side_that_fails_costs_one_row():
    rows = measure.rows_of({"a": [{"seconds": 2.0, "memory_mb": 5.0, "x": 1},
                                  {"seconds": 4.0, "memory_mb": None, "x": 1}],
                            "b": [{"error": "MemoryError: no"}]}, workload="w")
    assert rows[0]["seconds"] == {"median": 3.0, "min": 2.0, "max": 4.0, "n": 2}
    assert rows[0]["memory_mb"]["n"] == 1 and rows[0]["x"] == 1
    assert rows[1] == {"side": "b", "workload": "w", "error": "MemoryError: no"}


def test_rollout_files_are_what_they_say(tmp_path):
    shape = {"vocab": 50, "prompts": 40, "group": 8, "mean": 100, "max_len": 200, "prompt_len": 10}
    a, b = (measure.rollouts(tmp_path / name, **shape, seed=1) for name in "ab")
    assert a == b and (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    rows = measure.read_rollouts(tmp_path / "a")
    assert len(rows) == 320 and a["length_max"] == 200
    assert 0.02 < a["truncated"] < 0.2 and 70 < a["length_mean"] < 110
    for i in range(0, 320, 8):
        group = rows[i:i + 8]
        assert len({tuple(r["prompt"]) for r in group}) == 1 and {r["reward"] for r in group} == {0.0, 1.0}
    assert all(len(s.logprobs) == len(s.response_ids) for s in measure.as_samples(rows))


def test_doctests():
    assert doctest.testmod(measure).failed == 0


# ----- One GPU ----------------------------------------------------------------------------------------------

def run_gpu(folder, *words):
    """All results of bench/gpu.py on the CPU: {part: rows}."""
    out = folder / "gpu.json"
    run([sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--tiny", "--out", str(out),
         "--work", str(folder), *words], timeout=1200)
    parts = json.loads(out.read_text())
    assert all(part["versions"]["torch"] and part["device"] == "cpu" for part in parts.values())
    return {name: part["rows"] for name, part in parts.items()}


def test_gpu_parts_run(tmp_path):
    """Every part in one process; numbers that are no claims about a card are checked for what they are."""
    parts = run_gpu(tmp_path, "--worker", "--engine", "torch")
    assert list(parts) == list(gpu.PARTS)
    rows = {part: {row["what"]: row for row in some} for part, some in parts.items()}
    verdicts = [row["verdict"] for row in parts["correctness"] if "bound" in row]
    assert set(verdicts) == {"ok"} and len(verdicts) > 40
    assert any(row["error"] > 0 for row in parts["correctness"] if row.get("dtype") == "bfloat16")
    assert rows["correctness"]["KL, the head changed: as a share of stale weights'"]["stale"] > 1e-3
    update, memory = rows["update"]["update"], rows["memory"]["update"]
    assert update["tokens"] > 0 and update["tflops"] > 0 and update["mfu"] is None
    assert memory["predicted_gib"] > 0 and memory["recompute"] == 0 and update["recompute"] == 1
    assert rows["generation"]["share"]["samples"] == 6 and rows["generation"]["push"]["seconds"] > 0
    assert all(row["verdict"] == "ok" and row["seconds_update"] > 0 for row in parts["step"][1:])
    assert sum("reward" in row for row in parts["learn"]) == 10 and parts["learn"][-1]["verdict"] == "ok"


@pytest.mark.slow
def test_gpu_parts_with_vllm_each_in_its_process(tmp_path):
    pytest.importorskip("vllm")
    run_gpu(tmp_path, "update")
    parts = run_gpu(tmp_path, "correctness", "generation", "step")
    assert list(parts) == ["update", "correctness", "generation", "step"], "results are added to those before"
    assert {row.get("engine") for row in parts["generation"]} >= {"vllm", "bare vLLM"}
    assert parts["correctness"][-1]["verdict"] == "ok" and parts["step"][0]["engine"] == "vllm"


def report_of(check, folder, *more):
    """What a check says at tiny size -> {what: verdict}."""
    args = SimpleNamespace(size=gpu.SIZES["tiny"], tiny=True, out=str(folder / "x.json"), device="cpu",
                           work=str(folder), engine="torch")
    report = gpu.Report("correctness", args)
    check(args, report, torch.device("cpu"), *more)
    return {row["what"]: row["verdict"] for row in report.rows if "verdict" in row}


def test_a_wrong_head_is_found(tmp_path, monkeypatch):
    right = policy.token_logprobs
    assert set(report_of(gpu.check_head, tmp_path, "float32").values()) == {"ok"}
    monkeypatch.setattr(policy, "token_logprobs", lambda h, w, *more: right(h, w * 1.001, *more))
    wrong = report_of(gpu.check_head, tmp_path, "float32")
    assert wrong["head: log-probs"] == wrong["head: d weight"] == "WRONG"


def test_documents_that_see_each_other_are_found(tmp_path, monkeypatch):
    """As a wrong kernel would let them: only where the input is not float64."""
    right = policy.document_attention

    def leaky(q, k, v, cu_seqlens, scale, window=None):
        bounds = cu_seqlens if q.dtype == torch.float64 else cu_seqlens[[0, -1]]
        return right(q, k, v, bounds, scale, window)

    assert set(report_of(gpu.check_attention, tmp_path, "float32").values()) == {"ok"}
    monkeypatch.setattr(policy, "document_attention", leaky)
    assert set(report_of(gpu.check_attention, tmp_path, "float32").values()) == {"WRONG"}


def test_an_engine_that_keeps_old_weights_is_found(tmp_path, monkeypatch):
    """The torch engine loads the weights that the policy starts with, so the first push may do nothing."""
    monkeypatch.setattr(rollout.TorchEngine, "push", lambda *_: None)
    try:
        said = report_of(lambda args, report, _: gpu.check_engine(args, report), tmp_path)
    finally:
        measure.leave()
    assert said["KL(engine, trainer), first push"] == "ok"
    assert [what for what, verdict in said.items() if verdict == "WRONG"] == [
        f"KL, {name} changed{more}" for name in ("all weights", "the head")
        for more in (", slept, pushed", ": as a share of stale weights'")]


def test_a_part_that_fails_says_so_and_the_next_one_runs(tmp_path, monkeypatch):
    def broken(args, report):
        report.add("first", 1.0, error=0.5)
        raise TypeError("varlen_attn() got an unexpected keyword argument")

    monkeypatch.setitem(gpu.PARTS, "update", broken)
    monkeypatch.setitem(gpu.PARTS, "memory", lambda _, report: report.add("second", 1.0, error=float("nan")))
    monkeypatch.setitem(gpu.PARTS, "learn", lambda _, report: report.add("third", 1.0, error=0.5))
    out = tmp_path / "x.json"
    words = ["--worker", "--device", "cpu", "--tiny", "--out", str(out), "--work", str(tmp_path)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["update", "memory", "learn", *words]) == 1 and gpu.main(["learn", *words]) == 0
    parts = json.loads(out.read_text())
    first, second, third = (parts[name]["rows"] for name in ("update", "memory", "learn"))
    assert "unexpected keyword" in first[1]["error_text"] and first[0]["verdict"] == "ok"
    assert second[0]["verdict"] == "WRONG" and third[0]["verdict"] == "ok"


def test_the_big_model_has_the_shape_that_schedule_predicts_for():
    names = {"hidden_size": "hidden", "intermediate_size": "mlp", "num_hidden_layers": "layers",
             "vocab_size": "vocab", "max_position_embeddings": "positions"}
    assert {ours: gpu.R1[theirs] for theirs, ours in names.items()}.items() <= schedule.SHAPE.items()


def test_operations_of_a_forward_by_hand():
    """Two layers of 100 weights and 8 query numbers, vocabulary 10, width 4; documents of 3 and 5 tokens in a
    row of 8, 6 responses: 2 x (2 x 100 x 8 + 10 x 4 x 6) + 2 x 2 x 8 x (9 + 25)."""
    row = SimpleNamespace(ids=torch.zeros(8), targets=torch.zeros(6), cu_seqlens=torch.tensor([0, 3, 8]))
    m = {"layers": 2, "layer": 100, "q": 8, "vocab": 10, "hidden": 4}
    assert gpu.forward_flops(m, [(row, None, None)]) == 2 * (1600 + 240) + 32 * 34


# ----- Tables -----------------------------------------------------------------------------------------------

def test_tables_of_the_readme_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert text.split(tables.START)[1].split(tables.END)[0].strip() == tables.tables()


def test_a_side_that_failed_says_why_in_the_table():
    rows = [{"side": "ours", "seconds": {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}},
            {"side": "trl", "error": "no room"}]
    columns = [("", tables.side), ("seconds", tables.number(".1f", "seconds")), ("x", tables.number("", "x"))]
    assert tables.markdown(rows, columns).splitlines()[2:] == ["| **ours** | 2.0 (1.0-3.0) | - |",
                                                               "| TRL | - | no room |"]
