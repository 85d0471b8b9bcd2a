"""`poisoned.py` as a bare loop: skips what is extreme while the parameters are sound, else goes back to a copy."""

import copy
import json
import math
import os
import statistics

import torch
from poisoned import BATCH, digits, network
from torch.nn import functional
from torch.utils.data import DataLoader


def save(path, state):
    with open(f"{path}.partial", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.partial", path)


def evaluate(model, data):
    loss, correct = 0.0, 0
    with torch.no_grad():
        for images, labels in DataLoader(data, batch_size=120):
            logits = model(images)
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
    return {"loss": loss / len(data), "accuracy": correct / len(data)}


def train(directory, epochs, save_every=20):
    torch.manual_seed(0)
    training, validation = digits()
    model, loader = network(), DataLoader(training, BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    epoch, done, skipped, best, losses, last = 1, 0, 0, 0.0, [], None
    newest = directory / "newest.pt"

    def state():
        place = epoch, done, skipped, best, losses, last
        return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "place": place})

    def load(kept):
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(copy.deepcopy(kept["optimizer"]))

    if newest.exists():
        kept = torch.load(newest)
        load(kept)
        epoch, done, skipped, best, losses, last = kept["place"]
    good = state()
    while epoch <= epochs:
        for number, (images, labels) in enumerate(loader):
            if number < done:
                continue
            loss = functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            limit = 20 * statistics.median(losses[-256:]) if len(losses) >= 16 else math.inf
            if not (math.isfinite(loss.item()) and math.isfinite(norm)):
                skipped += 1
            elif loss > limit:
                skipped += 1
                with torch.no_grad():
                    probe = functional.cross_entropy(model(last[0]), last[1])
                if not probe < limit:  # the parameters are ill, not the data
                    load(good)
            else:
                optimizer.step()
                losses.append(loss.item())
                last = images, labels
            done = number + 1
            if done % save_every == 0:
                good = state()
                save(newest, good)
        figures = evaluate(model, validation)
        with open(directory / "log.jsonl", "a") as log:
            log.write(json.dumps({"epoch": epoch, "skipped": skipped, **figures}) + "\n")
        if figures["accuracy"] > best:
            best = figures["accuracy"]
            save(directory / "best.pt", model.state_dict())
        epoch, done = epoch + 1, 0
        good = state()
        save(newest, good)
    return model
