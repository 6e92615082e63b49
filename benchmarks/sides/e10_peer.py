"""E10, sentence-transformers: EmbedDistillLoss and its Trainer.

Arguments: the folder of E5; "tokenised" for rows that are tokenised before the training.
"""

import sys
import tempfile
from pathlib import Path

import torch
from datasets import load_from_disk
from e5_case import sources, spearman, tell
from e10_case import BATCH, EPOCHS, RATE, Marks, student
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    Transformer,
)
from transformers import TrainerCallback

marks = Marks()
_, test = sources()
data = load_from_disk(str(Path(sys.argv[1]) / "train"))
start = student()


def peer(folder: str) -> SentenceTransformer:
    """The same student, from the same weights, of their modules."""
    start.encoder.save_pretrained(folder)
    start.tokenizer.save_pretrained(folder)
    reader = Transformer(folder, max_seq_length=start.length)
    linear = start.projection
    dense = Dense(linear.in_features, linear.out_features, activation_function=torch.nn.Identity())
    dense.linear.load_state_dict(linear.state_dict())
    pooling = Pooling(linear.in_features, pooling_mode="mean")
    made = SentenceTransformer(modules=[reader, pooling, dense, Normalize()], device="cpu")
    with torch.inference_mode():
        texts = test.views["text"][:64]
        ours = start.eval()(texts)
        theirs = made.encode(texts, convert_to_tensor=True)
        assert torch.allclose(ours, theirs, atol=1e-5), "the two students differ"
    return made


class Epochs(TrainerCallback):
    """Notes when epochs begin."""

    def on_epoch_begin(self, *args, **named):
        """At the loader's first batch."""
        marks()


def tokenised(model: SentenceTransformer) -> SentenceTransformerDataCollator:
    """Their collator with a table of tokens: what is left is padding."""
    table = {
        text: start.tokenizer(text, truncation=True, max_length=start.length)["input_ids"]
        for text in data["sentence"]
    }

    def look_up(texts, prompt=None, task=None):
        rows = {"input_ids": [table[text] for text in texts]}
        return start.tokenizer.pad(rows, return_tensors="pt")

    return SentenceTransformerDataCollator(preprocess_fn=look_up)


with tempfile.TemporaryDirectory() as folder:
    model = peer(folder)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        ),
        train_dataset=data,
        loss=EmbedDistillLoss(model, distance_metric="l2"),
        data_collator=tokenised(model) if "tokenised" in sys.argv else None,
        callbacks=[Epochs()],
    )
    trainer.train()
    vectors = model.encode(test.views["text"], convert_to_tensor=True)
tell(**marks.figures(), spearman=spearman(vectors.cpu(), test))
