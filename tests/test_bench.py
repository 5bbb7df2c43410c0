"""The benchmark scripts at --quick size, without peers: they run, their JSON is whole, and the sides agree on numbers.

No speed is asserted: these tests run on machines that do other things.
"""
import doctest
import json
import sys

import pytest
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "bench"))
import harness as common  # noqa: E402
import scaling  # noqa: E402


def quick(script, folder, *options):
    """The JSON that `bench/SCRIPT --quick` writes."""
    out = folder / f"{script}.json"
    run([sys.executable, str(ROOT / "bench" / script), "--quick", "--work", str(folder), "--out", str(out), *options],
        timeout=1200)
    return check(json.loads(out.read_text()))


def check(result):
    """Everything a reader needs to judge a number is there."""
    assert result["date"] and result["what"] and result["memory"] and result["settings"]
    assert set(result["machine"]) == {"cpu", "cores", "device", "threads"} and len(result["machine"]["threads"]) == 1
    assert len(result["before"]["load"]) == len(result["load_after"]) == 3 and "warning" in result
    assert 0 <= result["before"]["busy_cores"] <= result["machine"]["cores"]
    for versions in result["versions"].values():
        assert {"python", "torch", "transformers"} <= set(versions)
    for row in result["rows"]:
        assert "error" not in row, row
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"] and row["seconds"]["n"] == 1
    return result


def test_update_sides_take_the_same_step(tmp_path):
    result = quick("update.py", tmp_path, "--sides", "ours", "padded", "sorted", "limit")
    rows = {r["side"]: r for r in result["rows"]}
    assert list(rows) == ["ours", "padded", "sorted", "limit"]
    assert len(rows["ours"]["grad_norm"]) == 4 and min(rows["ours"]["grad_norm"]) > 0  # two updates, done twice
    assert rows["padded"]["grad_norm_off"] < 1e-4 and rows["sorted"]["grad_norm_off"] < 1e-4
    held = result["rollout_files"]["tiny"]
    assert abs(rows["limit"]["tokens"] / (held["tokens_prompt"] + held["tokens_response"]) - 1) < 0.05
    assert all(r["memory_mb"]["median"] > 0 and r["first_seconds"]["median"] > 0 for r in rows.values())


def test_head_sides_agree(tmp_path):
    out = tmp_path / "logprobs.json"
    run([sys.executable, str(ROOT / "bench" / "logprobs.py"), "--quick", "--sides", "ours", "full", "--out", str(out)],
        timeout=1200)
    rows = {r["side"]: r for r in check(json.loads(out.read_text()))["rows"]}
    assert set(rows) == {"ours", "full", "model_ours"}
    assert rows["full"]["off"] < 1e-4 and rows["ours"]["grad_head"] > 0
    assert rows["ours"]["entropy"] > 1 and rows["model_ours"]["logp"] < 0


def test_engines_write_the_same_greedy_tokens(tmp_path):
    rows = {r["side"]: r for r in quick("generate.py", tmp_path, "--sides", "torch", "hf")["rows"]}
    assert rows["torch"]["greedy_equal"] == rows["hf"]["greedy_equal"] == 1
    assert all(r["tokens_per_second"]["median"] > 0 and r["length_max"] <= 24 and r["samples"] == 12
               for r in rows.values())


def test_a_whole_step_is_measured(tmp_path):
    row, = quick("step.py", tmp_path, "--sides", "ours_torch")["rows"]
    assert row["side"] == "ours_torch" and row["tokens"] > 0 and row["grad_norm"] > 0 and 0 < row["reward"] < 1
    assert {"generate", "update", "sync"} <= set(row["phases"]) and len(row["steps"]) == 1


def test_communication_is_counted_and_equals_the_formula(tmp_path):
    result = quick("scaling.py", tmp_path)
    one, two = result["rows"]
    assert (one["shape"]["ranks"], two["shape"]["ranks"]) == (1, 2) and two["grad_norm_off"] < 1e-3
    assert two["bytes_counted"]["all_reduce"] > 0 and one["bytes_formula"] is None
    for name, size in two["bytes_formula"].items():
        # parameters are padded to a multiple of the ranks, nothing else is missing or added
        assert size > 0 and two["bytes_counted"][name] == pytest.approx(size, rel=1e-3)
    assert "PROJECTION" in result["projection"]["label"] and len(result["projection"]["rows"]) == 4


def test_a_side_that_fails_costs_one_row(tmp_path):
    rows = common.rows_of({"a": [{"seconds": 2.0, "memory_mb": 5.0, "x": 1},
                                 {"seconds": 4.0, "memory_mb": None, "x": 1}],
                           "b": [{"error": "MemoryError: no"}]}, workload="w")
    assert rows[0]["seconds"] == {"median": 3.0, "min": 2.0, "max": 4.0, "n": 2} and rows[0]["memory_mb"]["n"] == 1
    assert rows[1] == {"side": "b", "workload": "w", "error": "MemoryError: no"}


def test_rollout_files_are_what_they_say(tmp_path):
    shape = dict(vocab=50, prompts=40, group=8, mean=100, max_len=200, prompt_len=10)
    a, b = (common.rollouts(tmp_path / name, **shape, seed=1) for name in "ab")
    assert a == b and (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    rows = common.read_rollouts(tmp_path / "a")
    assert len(rows) == 320 and a["length_max"] == 200 and 0.02 < a["truncated"] < 0.2 and 70 < a["length_mean"] < 110
    for i in range(0, 320, 8):
        group = rows[i:i + 8]
        assert len({tuple(r["prompt"]) for r in group}) == 1 and {r["reward"] for r in group} == {0.0, 1.0}
    assert all(len(r["logprobs"]) == len(r["response"]) for r in rows)


def test_traffic_by_hand():
    """One layer of 10 and a root of 3 parameters, 4 bytes each, two micro-batches trained, one scored."""
    assert scaling.traffic(10, 3, 1, 2, 4) == {"all_gather": 4 * (2 * (10 + 10 + 3) + 10), "reduce_scatter": 4 * 2 * 13}


def test_doctests():
    assert doctest.testmod(common).failed == 0


def test_tables_of_the_readme_are_those_of_the_results():
    import tables
    text = (ROOT / "README.md").read_text()
    assert text.split(tables.START)[1].split(tables.END)[0].strip() == tables.tables()


def test_a_side_that_failed_says_why_in_the_table():
    import tables
    rows = [{"side": "ours", "seconds": {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}}, {"side": "trl", "error": "no room"}]
    text = tables.markdown(rows, [("", tables.side), ("seconds", tables.number(".1f", "seconds")), ("x", tables.number("", "x"))])
    assert text.splitlines()[2:] == ["| **ours** | 2.0 (1.0-3.0) | - |", "| TRL | - | no room |"]
