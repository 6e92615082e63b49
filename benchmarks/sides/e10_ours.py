"""E10, ours: `distill` with the baseline embedding-l2 from a store.

Arguments: the folder of E5, the dtype of the store.
"""

import sys
import tempfile
from pathlib import Path

from e5_case import SENTENCES, sources, tell
from e10_case import BATCH, EPOCHS, RATE, Marks, student

import stillhouse as still

marks = Marks()
train, test = sources()
steps, asked = -(-SENTENCES // BATCH), [0]
net = student()


def timed(module, _):
    """Notes when an epoch's first batch reaches the student; several may be read at once."""
    if module.training:
        if asked[0] % steps == 0:
            marks()
        asked[0] += 1


net.register_forward_pre_hook(timed)
with tempfile.TemporaryDirectory() as folder:
    result = still.distill(
        still.teacher(Path(sys.argv[1]) / "train" / sys.argv[2]),
        net,
        train,
        test=test,
        method="embedding-l2",
        settings={"distance": "l2"},
        compare=[],
        folder=folder,
        batch=BATCH,
        epochs=EPOCHS,
        lr=RATE,
        optimizer="adamw",
        weight_decay=0.0,
        schedule="constant",
        progress=False,
    )
tell(**marks.figures(), spearman=result.sides["distilled"]["0"]["spearman"])
