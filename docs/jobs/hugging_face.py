"""A model of transformers: a small BERT, trained from scratch to say which of five topics a sentence is about.

    pip install transformers
    tolaria serve --set preset=plain --set training.job=hugging_face:Job --set training.epochs=4
    tolaria export --checkpoint best --format hf --to topics    # for BertForSequenceClassification.from_pretrained

To adapt one that has been trained, `build_model` returns `AutoModelForSequenceClassification.from_pretrained(...)`.
"""

import random

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from tolaria.jobs import HOST, Batch, Evaluation, JobContext, LoaderCursor

LENGTH, TOPICS = 12, ("weather", "music", "food", "travel", "sport")
NOUNS = ("rain wind cloud", "song piano choir", "bread soup apple", "train hotel map", "ball goal match")
WORDS = [word for nouns in NOUNS for word in nouns.split()] + "the a one new old we saw like had with and of".split()


def sentences(count, seed):
    """Returns rows as a data set of `datasets` has them: `input_ids`, `attention_mask` and `labels`."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        topic, length = draw.randrange(len(TOPICS)), draw.randint(4, LENGTH)
        words = [draw.choice(WORDS) for _ in range(length - 2)] + draw.choices(NOUNS[topic].split(), k=2)
        draw.shuffle(words)
        rows.append({"input_ids": [1 + WORDS.index(word) for word in words], "labels": topic})
    return rows


def collate(rows):
    """Pads a list of rows to tensors; with a tokenizer, `DataCollatorWithPadding` does it."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {"input_ids": padded, "attention_mask": padded > 0, "labels": torch.tensor([row["labels"] for row in rows])}


def bert():
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(WORDS) + 1, max_position_embeddings=LENGTH, num_labels=len(TOPICS), **size)
    )


class Job:
    def __init__(self, context: JobContext):
        self.seed = context.seed

    def build_model(self):
        return bert()

    def build_optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    def training_data(self):
        return LoaderCursor(DataLoader(sentences(2000, 1), 32, shuffle=True, collate_fn=collate), seed=self.seed)

    def losses(self, model, batch: Batch):
        return {HOST: model(**batch.payload).loss}

    def validation_batches(self):
        return [Batch(rows, len(rows["labels"])) for rows in DataLoader(sentences(400, 2), 200, collate_fn=collate)]

    def evaluate(self, model, batch: Batch):
        output = model(**batch.payload)
        correct = int((output.logits.argmax(1) == batch.payload["labels"]).sum())
        return Evaluation(float(output.loss) * batch.samples, correct, batch.samples)
