"""E1, a bare hand-written loop: no log, no checkpoint, no guard, no progress."""

import torch
from e1_pair import ALPHA, BATCH, MOMENTUM, RATE, STEPS, TEMPERATURE, Stamps, asked, data, pair
from torch.nn.functional import cross_entropy, kl_div, log_softmax

step = asked()
stamps = Stamps()
teacher, student = pair(step, stamps)
x, y = data()
optimizer = torch.optim.SGD(student.parameters(), lr=RATE, momentum=MOMENTUM)
student.train()
done, total = 0, STEPS[step]
while done < total:
    for rows in torch.randperm(len(x)).split(BATCH):
        images, target = x[rows], y[rows]
        with torch.no_grad():
            soft = log_softmax(teacher(images) / TEMPERATURE, dim=1)
        logits = student(images)
        divergence = kl_div(
            log_softmax(logits / TEMPERATURE, dim=1), soft, reduction="batchmean", log_target=True
        )
        loss = (1 - ALPHA) * cross_entropy(logits, target) + ALPHA * TEMPERATURE**2 * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done += 1
        if done == total:
            break
stamps.tell(loss=loss.item())
