"""Distil under Lightning's Trainer: the objective is the module's loss."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stillhouse as still
from stillhouse.batch import Batch
from stillhouse.clock import Clock

seed_everything(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32) / 16
y = torch.tensor(labels)


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


class Plain(LightningModule):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.module(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Distilled(LightningModule):
    """The teacher is no child of the module: it is neither trained nor saved."""

    def __init__(self, objective, teacher):
        super().__init__()
        self.objective = objective
        self._terms = lambda batch, clock: objective.terms(batch, teacher, clock)

    def clock(self):
        return Clock(seed=0, step=self.global_step, epoch=self.current_epoch)

    def training_step(self, batch, index):
        terms = self._terms(Batch(x=batch[0], target=batch[1]), self.clock())
        self.log_dict({name: value.detach() for name, value in terms.items()})
        return sum(terms.values())

    def on_train_batch_end(self, *_):
        self.objective.after_step(self.clock())

    def configure_optimizers(self):
        return torch.optim.Adam(self.objective.parameters(), lr=1e-2)


def fit(module, epochs):
    loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=128, shuffle=True)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)


big = network(256)
fit(Plain(big), 20)
teacher = still.teacher(big)
objective = still.objective("kd", network(8), teacher=teacher, classes=10, temperature=4.0)
fit(Distilled(objective, teacher), 30)
student = objective.export().eval()
accuracy = (student(x[1400:])["logits"].argmax(1) == y[1400:]).float().mean()
print(f"accuracy of the distilled student: {accuracy:.3f}")
