"""A model of transformers: a small BERT, trained from scratch to say which of five topics a sentence is about.

    pip install 'tolaria[hf]'
    tolaria serve --set preset=plain --set training.job=hugging_face:job --set training.epochs=4
    tolaria export --checkpoint best --format hf --to topics    # for BertForSequenceClassification.from_pretrained

To adapt one that has been trained: `model=lambda: AutoModelForSequenceClassification.from_pretrained(...)`.
"""

import random

import torch
from transformers import BertConfig, BertForSequenceClassification

from tolaria.adapters.hf import HuggingFaceJob

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


def job(context):
    data = {"train": sentences(2000, 1), "validation": sentences(400, 2)}
    return HuggingFaceJob(context, model=bert, data=data, collator=collate, batch_size=32, learning_rate=1e-3)
