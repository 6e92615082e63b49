"""E1, the Hugging Face Trainer with the distillation loss in `compute_loss`."""

import tempfile

import torch
from e1_pair import ALPHA, BATCH, MOMENTUM, RATE, STEPS, TEMPERATURE, Stamps, asked, data, pair
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments

step = asked()
stamps = Stamps()
teacher, student = pair(step, stamps)


class Distiller(Trainer):
    """The loss of the bare loop, as the library's documentation asks it to be written."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Labels and soft targets."""
        images, target = inputs["x"], inputs["labels"]
        with torch.no_grad():
            soft = log_softmax(teacher(images) / TEMPERATURE, dim=1)
        logits = model(images)
        divergence = kl_div(
            log_softmax(logits / TEMPERATURE, dim=1), soft, reduction="batchmean", log_target=True
        )
        loss = (1 - ALPHA) * cross_entropy(logits, target) + ALPHA * TEMPERATURE**2 * divergence
        return (loss, logits) if return_outputs else loss


def collate(rows):
    """Pairs of tensors as a mapping."""
    return {"x": torch.stack([r[0] for r in rows]), "labels": torch.stack([r[1] for r in rows])}


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS[step],
        learning_rate=RATE,
        optim="sgd",
        optim_args=f"momentum={MOMENTUM}",
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    Distiller(
        model=student, args=arguments, train_dataset=TensorDataset(*data()), data_collator=collate
    ).train()
stamps.tell()
