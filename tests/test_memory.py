"""What schedule.py predicts for an update, beside the bytes of a simulated one."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

# in a process of its own: the simulation makes a process group, and is_cuda true of all fake tensors
CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import memory, schedule
schedule.SHAPE = schedule.SHAPE | {"layers": 4}
shape = schedule.model_shape(schedule.MODEL)
print(json.dumps(shape | memory.compare(shape, 8, 8192, 0)))
"""


def test_prediction_and_simulation_agree():
    """Four layers of the 1.5B model on 8 ranks. Never below: a run that was said to fit must fit."""
    done = subprocess.run([sys.executable, "-c", CODE, str(ROOT / "bench")], capture_output=True, text=True,
                          check=False)
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads(done.stdout)
    # weights, gradients, two moments in fp32 and the reference in bf16
    assert found["states_gib"] == pytest.approx((16 + 2) * found["parameters"] / 8 / 2**30, rel=0.01)
    assert found["simulated_gib"] <= found["predicted_gib"] <= 1.10 * found["simulated_gib"]
