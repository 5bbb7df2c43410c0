"""Writes the files of evaluate.py without an evaluation."""
import json
import sys
from pathlib import Path

a = dict(zip(sys.argv, sys.argv[1:]))
if "--table" in a:
    print("a table of", *sys.argv)
else:
    Path(a["--out"]).mkdir(parents=True, exist_ok=True)
    said = {"name": a["--name"], "model": a["--model"], "tokens_generated": 1000, "seconds": 36.0,
            "argv": sys.argv}
    Path(a["--out"], f"{said['name']}.json").write_text(json.dumps(said))
