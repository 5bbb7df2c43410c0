"""What schedule.py predicts for an update, beside the bytes of a simulated one."""
import subprocess
import sys

import pytest
from conftest import ROOT

import schedule

# in a process of its own: the simulation makes a process group, and is_cuda true of all fake tensors
CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import memory, schedule
schedule.SHAPE = schedule.SHAPE | {"layers": 4}
shape = schedule.model_shape(schedule.MODEL)
for setting in ((8, 8192, 1), (8, 8192, 0)):
    row = memory.compare(shape, *setting)
    print(row["states_gib"], row["simulated_gib"], row["predicted_gib"])
"""


def test_prediction_and_simulation_agree(monkeypatch):
    """Four layers of the 1.5B model. Never below: a run that was said to fit must fit."""
    done = subprocess.run([sys.executable, "-c", CODE, str(ROOT / "bench")], capture_output=True, text=True,
                          cwd=ROOT, check=False)
    assert not done.returncode, done.stderr[-3000:]
    rows = [[float(x) for x in line.split()] for line in done.stdout.splitlines()]
    monkeypatch.setattr(schedule, "SHAPE", schedule.SHAPE | {"layers": 4})
    parameters = schedule.model_shape(schedule.MODEL)["parameters"]
    assert len(rows) == 2
    for states, simulated, predicted in rows:
        assert states == pytest.approx((16 + 2) * parameters / 8 / 2**30, rel=0.01)
        assert simulated <= predicted <= 1.10 * simulated
