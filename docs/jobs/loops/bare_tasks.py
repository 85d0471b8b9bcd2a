"""`tasks.py` as a bare loop, with PCGrad for two tasks."""

import json
import math
import os

import torch
from tasks import Network, digits
from torch.nn import functional
from torch.utils.data import DataLoader


def save(path, state):
    with open(f"{path}.partial", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.partial", path)


def evaluate(model, data):
    loss, correct, error = 0.0, 0, 0.0
    with torch.no_grad():
        for images, labels, ink in DataLoader(data, batch_size=120):
            scores, predicted = model(images)
            loss += float(functional.cross_entropy(scores, labels, reduction="sum"))
            correct += int((scores.argmax(1) == labels).sum())
            error += float((predicted - ink).abs().sum())
    return {"loss": loss / len(data), "accuracy": correct / len(data), "ink_error": error / len(data)}


def merge(model, losses):
    """Sets the gradients to the sum of those of the tasks, each without its part against another one."""
    parameters = list(model.parameters())
    rows = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    merged = torch.zeros_like(rows[0])
    for i, row in enumerate(rows):
        projected = row.clone()
        for j in torch.randperm(len(rows)).tolist():
            if j != i and (dot := projected @ rows[j]) < 0:
                projected -= dot / (rows[j] @ rows[j]) * rows[j]
        merged += projected
    for parameter, part in zip(parameters, merged.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter).clone()
    return float(merged.norm())


def train(directory, epochs, save_every=20):
    torch.manual_seed(0)
    training, validation = digits()
    model, order = Network(), torch.Generator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(training, 32, shuffle=True, generator=order)
    epoch, done, skipped, best = 1, 0, 0, 0.0
    newest = directory / "newest.pt"
    random = torch.get_rng_state()
    if newest.exists():
        state = torch.load(newest)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, done, skipped, best = state["place"]
        random = state["random"]

    def saved():
        place = epoch, done, skipped, best
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save(newest, {**states, "place": place, "random": torch.get_rng_state()})

    while epoch <= epochs:
        order.manual_seed(epoch)
        for number, (images, labels, ink) in enumerate(loader):
            if number < done:
                continue
            if number == done:
                torch.set_rng_state(random)
            scores, predicted = model(images)
            losses = functional.cross_entropy(scores, labels), 10 * functional.mse_loss(predicted, ink)
            norm = merge(model, losses)
            if math.isfinite(sum(losses).item()) and math.isfinite(norm):
                optimizer.step()
            else:
                skipped += 1
            done, random = number + 1, torch.get_rng_state()
            if done % save_every == 0:
                saved()
        figures = evaluate(model, validation)
        with open(directory / "log.jsonl", "a") as log:
            log.write(json.dumps({"epoch": epoch, "skipped": skipped, **figures}) + "\n")
        if figures["accuracy"] > best:
            best = figures["accuracy"]
            save(directory / "best.pt", model.state_dict())
        epoch, done = epoch + 1, 0
        saved()
    return model
