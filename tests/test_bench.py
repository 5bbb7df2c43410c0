"""The benchmark scripts at sizes for tests, without peers: they run, their JSON is whole, the sides agree.

No speed is asserted: these tests run on machines that do other things. Of bench/gpu.py everything runs here
but the card itself: its kernels, sleeping, memory.
"""
import doctest
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "bench"))
import generate
import gpu
import logprobs
import measure
import tables

import policy
import predict
import rollout


def is_whole(result, script):
    """Everything that a reader needs is in it."""
    assert result["date"] and result["what"] and result["commit"] and result["minutes"] > 0
    assert result["command"].startswith(f"python bench/{script}.py")
    assert set(result["machine"]) == {"cpu", "cores", "threads"} and len(result["machine"]["threads"]) == 1
    assert "warning" in result
    for versions in result["versions"].values():
        assert {"python", "torch", "transformers"} <= set(versions)


def quick(script, folder, *sides):
    """{side: row} of the JSON that `bench/SCRIPT --quick` writes."""
    out = folder / f"{script}.json"
    run([sys.executable, str(ROOT / "bench" / f"{script}.py"), "--quick", "--work", str(folder),
         "--out", str(out), "--sides", ",".join(sides)], timeout=1200)
    result = json.loads(out.read_text())
    is_whole(result, script)
    assert result["repeats"] == 1 and "--quick" in result["command"]
    assert 0 <= result["busy_cores_before"] <= result["machine"]["cores"]
    assert bool(result["warning"]) == (result["busy_cores_before"] > 0.2)
    for row in result["rows"]:
        assert "error" not in row, row
        assert row["seconds"]["min"] == row["seconds"]["median"] == row["seconds"]["max"] > 0
    assert [row["side"] for row in result["rows"]] == list(sides)
    return {row["side"]: row for row in result["rows"]}


# ----- Ours beside others -----------------------------------------------------------------------------------

@pytest.mark.slow
def test_update_sides_take_the_same_step(tmp_path):
    rows = quick("update", tmp_path, "ours", "sorted", "limit")
    norms = rows["ours"]["grad_norm"]
    assert len(norms) == 4 and min(norms) > 0  # two updates, done twice
    assert rows["sorted"]["grad_norm_off"] < 1e-4
    assert rows["limit"]["tokens"] > rows["limit"]["tokens_response"] > 200
    assert all(r["memory_mb"]["median"] > 0 and r["first_seconds"]["median"] > 0 for r in rows.values())


@pytest.mark.slow
def test_head_is_that_of_full_logits(tmp_path):
    rows = quick("logprobs", tmp_path, "ours", "limit")
    inputs = logprobs.inputs({"length": 192, "vocab": 2048, "hidden": 64})[:3]
    logp, entropy = policy.token_logprobs_plain(*inputs, logprobs.TEMPERATURE)
    assert rows["ours"]["logp"] == pytest.approx(logp.mean().item(), rel=1e-4)
    assert rows["ours"]["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    assert rows["ours"]["grad_head"] > 0 and rows["limit"]["times_limit"] == 1


@pytest.mark.slow
def test_engines_write_the_same_greedy_tokens(tmp_path):
    """vLLM's three sides take turns in one process."""
    vllm = ["vllm", "bare_vllm", "bare_vllm+"] if measure.importlib.util.find_spec("vllm") else []
    rows = quick("generate", tmp_path, *vllm, "torch", "hf")
    assert all(r["greedy_equal"] == 1 and r["tokens_per_second"]["median"] > 0 and r["length_max"] <= 24
               and r["samples"] == 12 for r in rows.values())


@pytest.mark.slow
def test_a_whole_step_is_measured(tmp_path):
    row = quick("step", tmp_path, "ours_torch")["ours_torch"]
    assert row["tokens"] > 0 and row["grad_norm"] > 0 and 0 < row["reward"] < 1
    assert row["seconds_generate"] > 0 and row["seconds_update"] > 0 and len(row["steps"]) == 1


@pytest.mark.slow
def test_graders_are_measured(tmp_path):
    rows = quick("grader", tmp_path, "nanoscaler", "DeepScaleR")
    ours, theirs = rows["nanoscaler"], rows["DeepScaleR"]
    assert ours["accuracy"] == 1 and ours["hostile_paid"] == ours["raised"] == ours["hostile_raised"] == 0
    assert ours["positives"] + ours["negatives"] == ours["cases"] > 80 and ours["hostile"] > 3
    missed = theirs["false_positives"] + theirs["false_negatives"]
    assert theirs["accuracy"] == 1 - missed / theirs["cases"] < 1


@pytest.mark.slow
def test_stages_and_one_long_stage_are_compared(tmp_path):
    out = tmp_path / "staging.json"
    run([sys.executable, str(ROOT / "bench/staging.py"), "--quick", "--work", str(tmp_path), "--out",
         str(out)], timeout=1200)
    result = json.loads(out.read_text())
    is_whole(result, "staging")
    row, = result["rows"]
    assert row["direct_tokens"] >= row["staged_tokens"] > 0 and row["direct_tokens"] >= row["reached_tokens"]
    assert row["tokens_ratio"] == row["reached_tokens"] / row["staged_tokens"]


def test_a_side_that_fails_costs_one_row_and_says_why():
    rows = measure.rows_of({"ours": [{"seconds": 1.0, "memory_mb": 5.0, "x": 1},
                                     {"seconds": 3.0, "memory_mb": None, "x": 1}],
                            "trl": [{"error": "no room"}]}, length=7)
    assert rows["ours"]["seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 2}
    assert rows["ours"]["memory_mb"]["n"] == 1 and rows["ours"]["x"] == 1
    assert rows["trl"] == {"side": "trl", "length": 7, "error": "no room"}
    lines = tables.table(rows.values(), "seconds y").splitlines()[2:]
    assert [line.replace(" ", "") for line in lines] == ["|**ours**|2(1-3)|-|", "|TRL|-|noroom|"]


def test_turns_are_compared_with_their_neighbours():
    def turn(tokens, seconds):
        return {"tokens": tokens, "seconds": seconds, "greedy": [[1, 2]]}

    answers = {"vllm": [turn(10, 1), turn(30, 1)], "bare_vllm+": [turn(10, 2), turn(10, 1)]}
    rows = measure.rows_of(answers)
    generate.compare(rows, answers)
    assert rows["vllm"]["times_bare_same"] == {"median": 2.5, "min": 2, "max": 3, "n": 2}


def test_samples_are_what_they_say():
    shape = {"vocab": 50, "prompts": 40, "group": 8, "mean": 100, "max_len": 200, "prompt_len": 10}
    samples = measure.rollouts(**shape)
    assert str(samples) == str(measure.rollouts(**shape)) and len(samples) == 320
    lengths = [len(s.response_ids) for s in samples]
    assert max(lengths) == 200 and 70 < sum(lengths) / 320 < 110
    assert 0.02 < sum(s.finish_reason == "length" for s in samples) / 320 < 0.2
    for i in range(0, 320, 8):
        group = samples[i:i + 8]
        assert len({tuple(s.prompt_ids) for s in group}) == 1 and {s.reward for s in group} == {0.0, 1.0}
    assert all(len(s.logprobs) == len(s.response_ids) for s in samples)


# ----- One GPU ----------------------------------------------------------------------------------------------

def run_gpu(folder, *words):
    """All results of bench/gpu.py on the CPU: {part: rows}."""
    out = folder / "gpu.json"
    run([sys.executable, str(ROOT / "bench" / "gpu.py"), "--device", "cpu", "--tiny", "--out", str(out),
         "--work", str(folder), *words], timeout=1200)
    parts = json.loads(out.read_text())
    for part in parts.values():
        is_whole(part, "gpu")
    assert tables.section(out).count("`python bench/gpu.py --device cpu --tiny") == len(parts)
    return {name: part["rows"] for name, part in parts.items()}


@pytest.mark.slow
def test_gpu_parts_run(tmp_path):
    """Every part in one process; numbers that are no claims about a card are checked for what they are."""
    parts = run_gpu(tmp_path, "--worker", "--engine", "torch")
    assert list(parts) == list(gpu.PARTS)
    rows = {part: {row["what"]: row for row in some} for part, some in parts.items()}
    verdicts = [row["verdict"] for row in parts["correctness"] if "bound" in row]
    assert set(verdicts) == {"ok"} and len(verdicts) > 40
    assert any(row["error"] > 0 for row in parts["correctness"] if row.get("dtype") == "bfloat16")
    assert rows["correctness"]["KL, the head changed: as a share of stale weights'"]["stale"] > 1e-3
    assert [row["recompute"] for row in parts["update"]] == [1, 0]
    assert all(row["tflops"] > 0 and row["predicted_gib"] > 0 and "mfu" not in row for row in parts["update"])
    assert rows["generation"]["share"]["samples"] == 6 and rows["generation"]["push"]["seconds"] > 0
    assert all(row["verdict"] == "ok" and row["seconds_update"] > 0 for row in parts["step"][1:])
    learned = parts["learn"][-1]
    assert len(learned["rewards"]) == learned["steps"] == 20 and learned["verdict"] == "ok"


@pytest.mark.slow
def test_gpu_parts_with_vllm_each_in_its_process(tmp_path):
    pytest.importorskip("vllm")
    run_gpu(tmp_path, "correctness")
    parts = run_gpu(tmp_path, "generation", "step")
    assert list(parts) == ["correctness", "generation", "step"], "results are added to those before"
    assert {row.get("engine") for row in parts["generation"]} >= {"vllm", "bare vLLM"}
    assert parts["correctness"][-1]["verdict"] == "ok" and parts["step"][0]["engine"] == "vllm"


def report_of(check, folder, *more):
    """What a check says at tiny size -> its rows."""
    args = SimpleNamespace(size=gpu.SIZES["tiny"], tiny=True, out=str(folder / "x.json"), device="cpu",
                           work=str(folder), engine="torch")
    report = measure.Result(args.out, "correctness", "correctness", timed=False)
    check(args, report, *more)
    return report.rows


@pytest.mark.slow
def test_a_wrong_head_and_documents_that_see_each_other_are_found(tmp_path, monkeypatch):
    """As a wrong kernel would let them: only where the input is not float64."""
    head, attention = policy.token_logprobs, policy.document_attention

    def leaky(q, k, v, cu_seqlens, scale, window=None):
        bounds = cu_seqlens if q.dtype == torch.float64 else cu_seqlens[[0, -1]]
        return attention(q, k, v, bounds, scale, window)

    def verdicts(kernel):
        rows = report_of(gpu.check_kernels, tmp_path, torch.device("cpu"))
        return {row["what"]: row["verdict"] for row in rows
                if row["what"].startswith(kernel) and row["dtype"] == "float32"}

    assert {*verdicts("head").values(), *verdicts("attention").values()} == {"ok"}
    monkeypatch.setattr(policy, "token_logprobs", lambda h, w, *more: head(h, w * 1.001, *more))
    monkeypatch.setattr(policy, "document_attention", leaky)
    wrong = verdicts("head")
    assert wrong["head: log-probs"] == wrong["head: d weight"] == "WRONG"
    assert set(verdicts("attention").values()) == {"WRONG"}


def test_an_engine_that_keeps_old_weights_is_found(tmp_path, monkeypatch):
    """The torch engine loads the weights that the policy starts with, so the first push may do nothing."""
    monkeypatch.setattr(rollout.TorchEngine, "push", lambda *_: None)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # a process group would stay for the next tests
    try:
        rows = report_of(gpu.check_engine, tmp_path)
    finally:
        torch.distributed.destroy_process_group()
    said = {row["what"]: row["verdict"] for row in rows if "verdict" in row}
    assert said["KL(engine, trainer), first push"] == "ok"
    assert [what for what, verdict in said.items() if verdict == "WRONG"] == [
        f"KL, {name} changed{more}" for name in ("all weights", "the head")
        for more in (", slept, pushed", ": as a share of stale weights'")]


def test_a_part_that_fails_says_so_and_the_next_one_runs(tmp_path, monkeypatch):
    def broken(args, report):
        report.add("first", 1.0, error=0.5)
        report.add("second", 1.0, error=float("nan"))
        raise TypeError("varlen_attn() got an unexpected keyword argument")

    monkeypatch.setitem(gpu.PARTS, "update", broken)
    monkeypatch.setitem(gpu.PARTS, "learn", lambda _, report: report.add("third", 1.0, error=0.5))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "x.json"
    words = ["--worker", "--device", "cpu", "--tiny", "--out", str(out), "--work", str(tmp_path)]
    assert gpu.main(["update", "learn", *words]) == 1 and gpu.main(["learn", *words]) == 0
    parts = json.loads(out.read_text())
    assert [row.get("verdict") for row in parts["update"]["rows"]] == ["ok", "WRONG", None]
    assert "unexpected keyword" in parts["update"]["rows"][2]["error_text"]
    assert [row["verdict"] for row in parts["learn"]["rows"]] == ["ok"]


def test_operations_are_those_of_the_prediction():
    """By hand: two layers of 100 weights and 8 query numbers, vocabulary 10, width 4; documents of 3 and 5
    tokens, of which 6 are scored: 2 x (2 x 100 x 8 + 10 x 4 x 6) + 2 x 2 x 8 x (9 + 25)."""
    m = {"layers": 2, "layer": 100, "q": 8, "vocab": 10, "hidden": 4}
    assert predict.forward_flops(m, 8, 9 + 25, 6) == 2 * (1600 + 240) + 32 * 34


# ----- Tables -----------------------------------------------------------------------------------------------

def test_tables_are_those_of_the_results(tmp_path, monkeypatch, capsys):
    """What differs is found and written."""
    assert tables.main(write=False) == 0, capsys.readouterr().out
    assert 2 < len(tables.summary().splitlines()) <= 2 + 8
    path = tmp_path / "README.md"
    path.write_text("a <!-- x --> 1 <!-- y --> b")
    monkeypatch.setattr(tables, "FILES", [(path, "<!-- x -->", "<!-- y -->", lambda: "2")])
    assert [tables.main(write) for write in (False, True, False)] == [1, 0, 0]
    assert path.read_text() == "a <!-- x -->\n2\n<!-- y --> b"
    assert doctest.testmod(measure).failed == doctest.testmod(tables).failed == 0
