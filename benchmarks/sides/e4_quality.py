"""E4, what a form of the store does to the student: ResNet-56 teaches ResNet-8 on CIFAR-10.

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
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
recipe = {
    "method": "kd",
    "data": {"name": "cifar10", "options": {"per_class": {"train": 100, "test": 100}, "val": 0}},
    "teacher": {
        "model": "stillhouse:resnet56",
        "weights": "data:cifar10_resnets/resnet56.safetensors",
        "options": {"input_mean": MEAN, "input_std": STD},
    },
    "student": {"model": "stillhouse:resnet8"},
    "budget": {"epochs": 4, "batch": 32, "lr": 0.05, "optimizer": "sgd"},
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
