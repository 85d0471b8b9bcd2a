"""`hugging_face.py` as a loop with Lightning Fabric."""

import json
import math
import os

import torch
from hugging_face import bert, collate, sentences
from lightning.fabric import Fabric
from torch.utils.data import DataLoader


def save(fabric, path, state):
    fabric.save(f"{path}.partial", state)
    with open(f"{path}.partial", "rb") as file:
        os.fsync(file.fileno())
    os.replace(f"{path}.partial", path)


def evaluate(model):
    model.eval()
    loss, correct, data = 0.0, 0, sentences(400, 2)
    with torch.no_grad():
        for rows in DataLoader(data, 200, collate_fn=collate):
            output = model(**rows)
            loss += float(output.loss) * len(rows["labels"])
            correct += int((output.logits.argmax(1) == rows["labels"]).sum())
    model.train()
    return {"loss": loss / len(data), "accuracy": correct / len(data)}


def train(directory, epochs, save_every=20):
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0, verbose=False)
    model, order = bert(), torch.Generator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(sentences(2000, 1), 32, shuffle=True, collate_fn=collate, generator=order)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)
    epoch, done, skipped, best = 1, 0, 0, 0.0
    newest = directory / "newest.pt"
    random = torch.get_rng_state()
    if newest.exists():
        state = fabric.load(newest)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, done, skipped, best = state["place"]
        random = state["random"]

    def saved():
        place = epoch, done, skipped, best
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save(fabric, newest, {**states, "place": place, "random": torch.get_rng_state()})

    while epoch <= epochs:
        order.manual_seed(epoch)
        for number, rows in enumerate(loader):
            if number < done:
                continue
            if number == done:
                torch.set_rng_state(random)
            loss = model(**rows).loss
            optimizer.zero_grad()
            fabric.backward(loss)
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if math.isfinite(loss.item()) and math.isfinite(norm):
                optimizer.step()
            else:
                skipped += 1
            done, random = number + 1, torch.get_rng_state()
            if done % save_every == 0:
                saved()
        figures = evaluate(model)
        with open(directory / "log.jsonl", "a") as log:
            log.write(json.dumps({"epoch": epoch, "skipped": skipped, **figures}) + "\n")
        if figures["accuracy"] > best:
            best = figures["accuracy"]
            model.save_pretrained(directory / "best")
        epoch, done = epoch + 1, 0
        saved()
    return model
