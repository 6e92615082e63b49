"""Distil under the Hugging Face Trainer: only compute_loss changes."""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import stillhouse as still
from stillhouse.batch import Batch
from stillhouse.clock import Clock

set_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
x = torch.nn.functional.interpolate(x, scale_factor=4.0)
rows = [{"pixel_values": i, "labels": int(label)} for i, label in zip(x, labels, strict=True)]


def resnet(width: int) -> ResNetForImageClassification:
    config = ResNetConfig(
        num_channels=1, embedding_size=width, hidden_sizes=[width, 2 * width], depths=[1, 1],
        layer_type="basic", num_labels=10,
    )  # fmt: skip
    return ResNetForImageClassification(config)


def arguments(epochs: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=tempfile.mkdtemp(), num_train_epochs=epochs, per_device_train_batch_size=64,
        learning_rate=3e-3, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip


class DistillingTrainer(Trainer):
    """The Trainer's model is the objective's student, so what it saves is the student."""

    def __init__(self, *args, objective, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.objective, self.teacher = objective, teacher

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = Batch(x=inputs["pixel_values"], target=inputs["labels"])
        clock = Clock(seed=0, step=self.state.global_step)
        terms = self.objective.terms(batch, self.teacher, clock)
        loss = sum(terms.values())
        return (loss, None) if return_outputs else loss


class AfterStep(TrainerCallback):
    def __init__(self, objective):
        self.objective = objective

    def on_step_end(self, args, state, control, **kwargs):
        self.objective.after_step(Clock(seed=0, step=state.global_step))


big = resnet(32)
Trainer(big, arguments(6), train_dataset=rows[:1400]).train()

small = resnet(8)
teacher = still.teacher(big)
objective = still.objective("kd", small, teacher=teacher, classes=10, temperature=2.0)
DistillingTrainer(
    small, arguments(12), train_dataset=rows[:1400], objective=objective, teacher=teacher,
    callbacks=[AfterStep(objective)],
).train()  # fmt: skip
for name, model in (("teacher", big), ("distilled student", small)):
    with torch.no_grad():
        logits = model.cpu().eval()(pixel_values=x[1400:]).logits
    accuracy = (logits.argmax(1) == torch.tensor(labels[1400:])).float().mean()
    print(f"accuracy of the {name}: {accuracy:.3f}")
