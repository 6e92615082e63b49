"""E1, torchdistill: its box, its loader, its own forward and post-forward processes."""

import logging

import torch
from e1_pair import ALPHA, BATCH, MOMENTUM, RATE, STEPS, TEMPERATURE, Stamps, asked, data, pair
from torch.utils.data import RandomSampler, TensorDataset
from torchdistill.core.distillation import get_distillation_box

logging.disable(logging.WARNING)
step = asked()
stamps = Stamps()
teacher, student = pair(step, stamps)
total = STEPS[step]
box = get_distillation_box(
    teacher,
    student,
    {"train": TensorDataset(*data())},
    {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": BATCH, "num_workers": 0},
        },
        "teacher": {
            "requires_grad": False,
            "forward_proc": "forward_batch_only",
            "forward_hook": {},
        },
        "student": {"forward_proc": "forward_batch_only", "forward_hook": {}},
        "optimizer": {"key": "SGD", "kwargs": {"lr": RATE, "momentum": MOMENTUM}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
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
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    },
    torch.device("cpu"),
    None,
    False,
    1,
)
done = 0
while done < total:
    box.pre_epoch_process(epoch=0)
    for images, targets, supplement in box.train_data_loader:
        box.pre_forward_process()
        loss = box.forward_process(images, targets, supplement)
        box.post_forward_process(loss)
        done += 1
        if done == total:
            break
stamps.tell(loss=loss.item())
