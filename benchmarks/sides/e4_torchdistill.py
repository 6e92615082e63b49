"""E4, torchdistill 1.1.4: live, then with its `cache_output`: a writing and cached epochs."""

import logging
import tempfile
from pathlib import Path

import torch
from e4_case import ALPHA, BATCH, EPOCHS, RATE, ROWS, TEMPERATURE, Epochs, data, pair, tell
from torch.utils.data import RandomSampler, TensorDataset
from torchdistill.core.distillation import get_distillation_box

logging.disable(logging.WARNING)
images = TensorDataset(*data())


def run(cache: str | None, epochs: int = EPOCHS) -> list[float]:
    """Seconds of the epochs of one training."""
    teacher, student = pair()
    loader = {
        "dataset_id": "train",
        "sampler": {"class_or_func": RandomSampler},
        "kwargs": {"batch_size": BATCH, "num_workers": 0},
    }
    if cache is not None:
        loader["cache_output"] = cache
    loss = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
            "temperature": TEMPERATURE,
            "alpha": 1 - ALPHA,
            "reduction": "batchmean",
        },
    }
    box = get_distillation_box(
        teacher,
        student,
        {"train": images},
        {
            "num_epochs": epochs,
            "train_data_loader": loader,
            "teacher": {
                "requires_grad": False,
                "forward_proc": "forward_batch_only",
                "forward_hook": {},
            },
            "student": {"forward_proc": "forward_batch_only", "forward_hook": {}},
            "optimizer": {"key": "SGD", "kwargs": {"lr": RATE, "momentum": 0.9}},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}},
            },
        },
        torch.device("cpu"),
        None,
        False,
        1,
    )
    stamps = Epochs()
    for epoch in range(epochs):
        box.pre_epoch_process(epoch=epoch)
        for x, target, supplement in box.train_data_loader:
            stamps()
            box.pre_forward_process()
            box.post_forward_process(box.forward_process(x, target, supplement))
    return stamps.seconds(epochs)


with tempfile.TemporaryDirectory() as place:
    live = run(None)
    seconds = run(f"{place}/0")
    again = [run(f"{place}/{number}", 2)[0] for number in (1, 2)]
    files = [p.stat().st_size for p in (Path(place) / "0").rglob("*.pt")]
    tell(
        live=min(live),
        writing=min(seconds[0], *again),
        cached=min(seconds[1:]),
        bytes=sum(files) / ROWS,
        files=len(files),
    )
