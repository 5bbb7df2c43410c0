"""Writes the files of grpo.py, 25 steps a second. Lengths fall, turn at step 40 and rise."""
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

a = {"save_every": 5, "keep": 2, "seed": 0, "optimizer_from": ""}
a |= {name[2:]: value for name, value in zip(sys.argv, sys.argv[1:]) if name.startswith("--")}
steps, save_every, keep, seed = (int(a[name]) for name in ("steps", "save_every", "keep", "seed"))
out, folder, stop, log = (Path(a["out"], name) for name in ("", "checkpoints", "stop", "metrics.jsonl"))
signals, world = [], int(os.environ.get("WORLD_SIZE", "1"))
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: signals.append(number))
if os.environ.get("RANK", "0") != "0":
    sys.exit()
folder.mkdir(parents=True, exist_ok=True)
held = (out / "lock").open("a+")
fcntl.flock(held, fcntl.LOCK_SH)
stop.unlink(missing_ok=True)
(out / "config.json").write_text(json.dumps({"options": a, "world": world}))
saved = sorted(folder.iterdir())
moments = Path(a["optimizer_from"], "optim").read_text() if a["optimizer_from"] else "fresh"
step = int(saved[-1].name) if saved else 0
weights = float((saved[-1] / "hf/w" if saved else Path(a["model"], "w")).read_text())
while step < steps:
    time.sleep(0.04)
    step += 1
    weights, wiggle = (weights * 1.1 + seed + step) % 97, (step * 7919 % 13 - 6) / 12
    line = {"step": step, "tokens": 100 + step, "weights": weights, "seconds": 2.0,
            "length_mean": 60 + abs(step - 40) + wiggle, "reward": min(step, 30) / 100 + wiggle / 50,
            "truncated": 0.02 + max(0, step - 40) / 500 + wiggle / 1000}
    with log.open("a") as f:
        print(json.dumps(line), file=f)
    leave = signals or stop.exists()
    if step % save_every == 0 or step == steps or leave:
        new = folder / f"{step:06d}"
        (new / "hf").mkdir(parents=True)
        (new / "hf/w").write_text(repr(weights))
        (new / "optim").write_text(f"{moments}+{out.name}")
        for old in sorted(folder.iterdir())[:-(keep or 2)]:
            if keep:
                shutil.rmtree(old)
            else:
                (old / "optim").unlink(missing_ok=True)
    if leave:
        sys.exit(128 + signals[0] if signals else 0)
sys.exit(int(os.environ.get("EXIT", "0")))
