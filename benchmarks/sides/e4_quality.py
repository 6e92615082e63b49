"""E4, what a form of the store does to the student: a CNN teaches a smaller one digits.

The argument is the seed. The same student learns from the live teacher and from each form.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from stillhouse import launch
from stillhouse.recipe import load_recipe

torch.set_num_threads(1)
recipe = {
    "method": "kd",
    "data": {"name": "digits", "options": {"per_class": 40, "val": 0}},
    "teacher": {
        "model": "stillhouse:small_cnn",
        "options": {"widths": [16, 32, 64]},
        "train": {"epochs": 20, "batch": 64, "lr": 0.003, "optimizer": "adamw"},
    },
    "student": {"model": "stillhouse:small_cnn", "options": {"widths": [8, 16]}},
    "budget": {
        "epochs": 40,
        "batch": 64,
        "lr": 0.01,
        "optimizer": "adamw",
        "schedule": "cosine",
    },
    "compare": [],
    "seed": int(sys.argv[1]),
}
found = {}
with tempfile.TemporaryDirectory() as place:
    for form in ("live", "float16", "int8"):
        store = {"path": f"{place}/store-{form}", "dtype": form}
        recipe["teacher"]["store"] = None if form == "live" else store
        run = launch.run(load_recipe(recipe), folder=Path(place) / form, progress=False)
        scores = run.summary["sides"]["distilled"][str(recipe["seed"])]
        found[form] = {"accuracy": scores["accuracy"], "nll": scores["nll"]}
print(json.dumps(found))
