"""`language_model.py` as a loop with Lightning Fabric."""

import json
import math
import os
from itertools import islice

import torch
from language_model import LENGTH, Network, Stream
from lightning.fabric import Fabric


def save(fabric, path, state):
    fabric.save(f"{path}.partial", state)
    with open(f"{path}.partial", "rb") as file:
        os.fsync(file.fileno())
    os.replace(f"{path}.partial", path)


def evaluate(model):
    loss, samples = 0.0, 0
    with torch.no_grad():
        for tokens in islice(Stream(training=False), 20):
            loss += float(model.loss(tokens, "sum"))
            samples += len(tokens)
    return {"loss": loss / samples / LENGTH, "perplexity": math.exp(loss / samples / LENGTH)}


def train(directory, epochs, save_every=20):
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0, verbose=False)
    model, stream = Network(), Stream(training=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = fabric.setup(model, optimizer)
    epoch, done, skipped, best = 1, 0, 0, math.inf
    newest = directory / "newest.pt"
    if newest.exists():
        state = fabric.load(newest)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        stream.load_state_dict(state["stream"])
        epoch, done, skipped, best = state["place"]

    def saved():
        place = epoch, done, skipped, best
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "stream": stream.state_dict()}
        save(fabric, newest, {**states, "place": place})

    while epoch <= epochs:
        for tokens in islice(stream, 100 - done):
            loss = model.loss(tokens)
            optimizer.zero_grad()
            fabric.backward(loss)
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if math.isfinite(loss.item()) and math.isfinite(norm):
                optimizer.step()
            else:
                skipped += 1
            done += 1
            if done % save_every == 0:
                saved()
        figures = evaluate(model)
        with open(directory / "log.jsonl", "a") as log:
            log.write(json.dumps({"epoch": epoch, "skipped": skipped, **figures}) + "\n")
        if figures["perplexity"] < best:
            best = figures["perplexity"]
            save(fabric, directory / "best.pt", model.state_dict())
        epoch, done = epoch + 1, 0
        saved()
    return model
