"""E6b: how near the gradient of stored classes comes to the exact one, on real logits."""

import gzip
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

from stillhouse.engine.records import DTYPES, Field
from stillhouse.losses.logits import kl, topk_kl
from stillhouse.models.loading import load_model

KS = (8, 16, 32, 64, 128, 256)
TOKENS, SPAN = 192, 192
FORMS = {"topk": "tail", "truncate": "truncate", "sample": "sample"}
DATA = Path(os.environ["STILLHOUSE_DATA"]) / "llm_text"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def texts() -> dict[str, str]:
    """Two real kinds of text."""
    with gzip.open(DATA / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(60)]
    with gzip.open(DATA / "tinyshakespeare.txt.gz", "rt", encoding="utf-8") as file:
        plays = file.read(20_000)
    return {"GSM8K": "\n\n".join(f"{r['question']}\n{r['answer']}" for r in rows), "plays": plays}


@torch.inference_mode()
def states(model, ids, kept) -> torch.Tensor:
    """(tokens, width) input of the head, with only the kept layers."""
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(layers[i] for i in kept)
    found = model.model(ids, use_cache=False).last_hidden_state
    model.model.layers = layers
    return found.reshape(-1, found.shape[-1])


def cosines(student, teacher, hidden, field, tail) -> tuple[float, float]:
    """Mean over tokens of the cosine of the logits' gradients; cosine of the head's gradient."""
    each, whole = [], torch.zeros(2, student.shape[-1], hidden.shape[-1])
    for start in range(0, len(student), 128):
        part = slice(start, start + 128)
        number = torch.arange(start, start + len(student[part]))
        written = field.encode(teacher[part], number, 0)
        stored = {c.name: written[c.name].to(DTYPES[c.dtype]) for c in field.columns()}
        kept = field.decode(stored)
        exact = gradient(student[part], partial(kl, reduction="none"), teacher[part])
        near = gradient(student[part], partial(topk_kl, tail=tail, reduction="none"), kept)
        each.append(cosine_similarity(exact, near, dim=-1))
        whole[0] += exact.T @ hidden[part]
        whole[1] += near.T @ hidden[part]
    # Sums over 28 million numbers: float32 would put the cosine above 1.
    dot = [(whole[i].double() * whole[j].double()).sum() for i, j in ((0, 1), (0, 0), (1, 1))]
    head = dot[0] / (dot[1] * dot[2]).sqrt()
    return torch.cat(each).mean().item(), head.item()


def gradient(logits, loss, target) -> torch.Tensor:
    """Of the sum over tokens, in the logits."""
    x = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x, target).sum(), x)
    return found


model = load_model(
    "hf:HuggingFaceTB/SmolLM2-135M-Instruct",
    options={"task": "causal-lm"},
    weights="pretrained",
).eval()
from transformers import AutoTokenizer  # noqa: E402 - after the model, which says what is missing

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
count = model.config.num_hidden_layers
students = {
    "near": [i for i in range(count) if i not in range(count - 6, count - 3)],
    "far": [*range(count // 3), *range(count - 5, count)],
}
head, rows = model.lm_head.weight.detach(), []
for text, content in texts().items():
    ids = tokenizer(content, return_tensors="pt").input_ids[0][:TOKENS].reshape(-1, SPAN)
    with torch.inference_mode():
        teacher = states(model, ids, range(count)) @ head.T
    teacher = teacher.clone()
    mass = teacher.softmax(-1).topk(16).values.sum(-1).mean().item()
    for name, kept in students.items():
        hidden = states(model, ids, kept).clone()
        student = hidden @ head.T
        for k in KS:
            row = {"text": text, "student": name, "k": k, "bytes": 4 * k + 2, "mass16": mass}
            for form, tail in FORMS.items():
                field = Field("logits", (len(head),), form=form, k=k)
                row[form], row[f"{form}_head"] = cosines(student, teacher, hidden, field, tail)
            rows.append(row)
print(json.dumps({"rows": rows, "default": Field("logits", (len(head),), form="topk").k}))
