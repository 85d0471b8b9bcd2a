"""`images.py` as a loop with Lightning Fabric."""

import json
import math
import os

import torch
from images import Digits, network
from lightning.fabric import Fabric
from torch.nn import functional
from torch.utils.data import DataLoader


def save(fabric, path, state):
    fabric.save(f"{path}.partial", state)
    with open(f"{path}.partial", "rb") as file:
        os.fsync(file.fileno())
    os.replace(f"{path}.partial", path)


def evaluate(model):
    model.eval()
    loss, correct, data = 0.0, 0, Digits(training=False)
    with torch.no_grad():
        for images, labels in DataLoader(data, batch_size=120):
            logits = model(images)
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
    model.train()
    return {"loss": loss / len(data), "accuracy": correct / len(data)}


def train(directory, epochs, save_every=20):
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0, verbose=False)
    model, order = network(), torch.Generator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(Digits(training=True), 32, shuffle=True, num_workers=2, drop_last=True, generator=order)
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
        for number, (images, labels) in enumerate(loader):
            if number < done:  # these are read again, so that the workers draw the same random numbers
                continue
            if number == done:
                torch.set_rng_state(random)
            buffers = [buffer.clone() for buffer in model.buffers()]
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            fabric.backward(loss)
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if math.isfinite(loss.item()) and math.isfinite(norm):
                optimizer.step()
            else:
                skipped += 1
                for buffer, before in zip(model.buffers(), buffers):
                    buffer.copy_(before)
            done, random = number + 1, torch.get_rng_state()
            if done % save_every == 0:
                saved()
        figures = evaluate(model)
        with open(directory / "log.jsonl", "a") as log:
            log.write(json.dumps({"epoch": epoch, "skipped": skipped, **figures}) + "\n")
        if figures["accuracy"] > best:
            best = figures["accuracy"]
            save(fabric, directory / "best.pt", model.state_dict())
        epoch, done = epoch + 1, 0
        saved()
    return model
