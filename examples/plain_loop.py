"""Distil inside a training loop of your own: plain PyTorch, no job, no recipe."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import stillhouse as still
from stillhouse.batch import Batch
from stillhouse.clock import Clock

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32) / 16
y = torch.tensor(labels)
train, test = slice(0, 1400), slice(1400, None)


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


big = network(256)
optimizer = torch.optim.Adam(big.parameters(), lr=3e-3)
for _ in range(150):
    optimizer.zero_grad()
    nn.functional.cross_entropy(big(x[train]), y[train]).backward()
    optimizer.step()

small = network(8)
teacher = still.teacher(big)
objective = still.objective("kd", small, teacher=teacher, classes=10, temperature=4.0)
optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
for step in range(300):
    clock = Clock(seed=0, step=step, total=300)
    rows = torch.randperm(1400)[:128]
    batch = Batch(x=x[rows], target=y[rows], id=rows)
    terms = objective.terms(batch, teacher, clock)
    optimizer.zero_grad()
    sum(terms.values()).backward()
    optimizer.step()
    objective.after_step(clock)

accuracy = (objective.export()(x[test])["logits"].argmax(1) == y[test]).float().mean()
print(f"accuracy of the distilled student: {accuracy:.3f}")
