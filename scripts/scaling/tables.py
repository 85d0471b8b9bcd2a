"""The tables of docs/scaling.md, from measured costs, and the page with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Final, TypeAlias

from scaling import formulas
from scaling.assumptions import ASSUMPTIONS, SETTINGS, SIZES, assumed
from scaling.costs import HOW, Costs
from scaling.model import PIECE_GB, Model
from scaling.simulation import Policy, simulate

POLICIES: Final[Mapping[str, Callable[[Model], Policy]]] = {
    "checkpoints, blocking": Model.blocking_checkpoints,
    "checkpoints, as implemented": Model.checkpoints,
    "snapshots, default interval": Model.snapshots,
    "snapshots, Daly's interval": Model.rare_snapshots,
}

_UNITS: Final = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "\N{MICRO SIGN}s"))
_SIZES: Final = ((1e3, "TB"), (1.0, "GB"), (1e-3, "MB"), (1e-6, "kB"), (1e-9, "B"))
_MEASURED, _COMPUTED, _TWO = "measured", "computed", "computed, 2 ranks measured"

_Row: TypeAlias = tuple[str, str, Callable[[Model], str]]
"""Name, kind, and what stands in the column of a model."""


def sections(costs: Costs) -> dict[str, str]:
    """Returns every computed table by its name."""
    return {
        "assumptions": assumptions(),
        "measured": measured(costs),
        "costs": costs_by_size(costs),
        "limits": limits(costs),
        "goodput": goodput_by_size(costs),
    }


def renewed(page: str, tables: Mapping[str, str]) -> str:
    """Returns the text of the page with these tables by name. Raises ValueError if one has no place in it."""
    for name, text in tables.items():
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page has no place, or several, for the table {name!r}")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}"
    return page


# -- tables ----------------------------------------------------------------------------------------------------------


def assumptions() -> str:
    """Returns the table of what is assumed, and of the settings on which it depends."""
    rows = [(name, _value(each.value, each.unit), each.basis) for name, each in ASSUMPTIONS.items()]
    rows += [(f"`{name}`", f"{value:g}", "default of the setting") for name, value in SETTINGS.items()]
    return table(("assumption", "value", "basis"), rows)


def measured(costs: Costs) -> str:
    """Returns the table of measured costs, and the messages' time that follows from them."""
    values = asdict(costs)
    rows = [(how, _value(values[name], unit, 3), _MEASURED) for name, (unit, how) in HOW.items()]
    rows.append(
        ("one message between two ranks: half the sum of 2 processes, less the call", duration(costs.hop_s), _COMPUTED)
    )
    return f"Measured on {costs.machine}.\n\n" + table(("cost", "value", "kind"), rows)


def costs_by_size(costs: Costs) -> str:
    """Returns the table of costs by the number of ranks."""
    models = [Model(costs, ranks) for ranks in SIZES]
    head = ("cost", "kind", *(f"{ranks:,}" for ranks in SIZES))
    rows = [*_of_a_step(), *_of_states(), *_of_restarts()]
    return table(head, [(name, kind, *map(cell, models)) for name, kind, cell in rows], numbers_from=2)


def _of_a_step() -> list[_Row]:
    return [
        ("machines", _COMPUTED, lambda m: f"{m.machines:,}"),
        ("agreement of a step: ring of gloo, as implemented", _TWO, lambda m: duration(m.agreement_s())),
        (
            f"its share of a step of {assumed('step'):g} s",
            _COMPUTED,
            lambda m: share(m.agreement_s() / assumed("step")),
        ),
        ("the same in a tree (not implemented)", _COMPUTED, lambda m: duration(m.tree_s())),
        ("sum of 1 GB of gradients, gloo", _COMPUTED, lambda m: duration(m.gradients_gloo_s(1))),
        ("sum of 1 GB of gradients, NCCL", _COMPUTED, lambda m: duration(m.gradients_nccl_s(1))),
        ("sum of the model's gradients, NCCL", _COMPUTED, lambda m: duration(m.gradients_nccl_s(assumed("gradients")))),
    ]


def _of_states() -> list[_Row]:
    state = assumed("state")
    return [
        ("snapshot of 1 GB, by the leader only", _COMPUTED, lambda m: duration(m.snapshot_s(1))),
        ("snapshot of the state", _COMPUTED, lambda m: duration(m.snapshot_s(state))),
        ("leader's memory for a full ring", _COMPUTED, lambda _: size(state * SETTINGS["rollback.snapshots_max"])),
        ("checkpoint of 1 GB, by the leader only", _COMPUTED, lambda m: duration(m.write_s(1))),
        ("checkpoint of the state", _COMPUTED, lambda m: duration(m.write_s(state))),
        ("leader's state to all ranks, 1 GB", _COMPUTED, lambda m: duration(m.broadcast_s(1, formulas.pieces(1)))),
    ]


def _of_restarts() -> list[_Row]:
    return [
        ("answers of all ranks after a command", _COMPUTED, lambda m: duration(m.answers_s())),
        ("rendezvous: requests to the store", _COMPUTED, lambda m: f"{formulas.store_gets(m.ranks):,}"),
        ("rendezvous: what the store sends", _COMPUTED, lambda m: size(formulas.store_gb(m.ranks))),
        ("rendezvous: time of the store", _COMPUTED, lambda m: duration(m.store_s())),
        ("rendezvous: connections of a rank", _COMPUTED, lambda m: f"{m.ranks - 1:,}"),
        ("restore of the state on all ranks, proved", _COMPUTED, lambda m: duration(m.restore_s())),
        ("restart from memory, death to next step", _COMPUTED, lambda m: duration(m.restart_s(from_memory=True))),
        ("restart from a checkpoint", _COMPUTED, lambda m: duration(m.restart_s(from_memory=False))),
        ("mean time between failures", _COMPUTED, lambda m: duration(m.mean_s)),
    ]


def limits(costs: Costs) -> str:
    """Returns the table of what does not scale, at the largest size, and of what removing it would give."""
    model, state = Model(costs, max(SIZES)), assumed("state")
    depth, own = formulas.depth(model.ranks), state / model.machines
    sent_s, rendezvous_s = model.broadcast_s(state, assumed("tensors")), model.ranks * 2 * depth * costs.store_get_s
    passed_on_s = (state + (depth - 1) * PIECE_GB) / model.broadcast_gb_s
    restart_s = model.start_s() + rendezvous_s + model.proof_s() + passed_on_s
    rows = [
        ("agreement of a step", model.agreement_s(), "a sum in a tree", model.tree_s()),
        ("rendezvous", model.store_s(), "connections to neighbours in ring and trees only", rendezvous_s),
        ("leader's state to all ranks", sent_s, "pieces that are passed on while the next ones arrive", passed_on_s),
        ("restart from memory", model.restart_s(from_memory=True), "both of these", restart_s),
        (
            "snapshot",
            model.snapshot_s(state),
            "each machine keeps its part, and a copy elsewhere",
            model.snapshot_s(own),
        ),
        ("checkpoint", model.write_s(state), "each machine writes its part", model.write_s(own)),
    ]
    shown = [(what, duration(now), how, duration(then)) for what, now, how, then in rows]
    now, then = (each.expected(model.mean_s) for each in (model.rare_snapshots(), _with_restart(model, restart_s)))
    shown.append(("goodput, snapshots at Daly's interval", f"{now:.1%}", "the faster restart alone", f"{then:.1%}"))
    return table((f"at {model.ranks:,} ranks", "as implemented", "what it would take (not implemented)", "then"), shown)


def _with_restart(model: Model, restart_s: float) -> Policy:
    """Returns the policy of snapshots at Daly's interval, if a restart from memory took that long."""
    policy, sooner_s = model.rare_snapshots(), model.restart_s(from_memory=True) - restart_s
    restarts = tuple(replace(each, duration_s=each.duration_s - sooner_s) for each in policy.restarts)
    return replace(policy, restarts=restarts)


def goodput_by_size(costs: Costs) -> str:
    """Returns the table of simulated goodput, with its interval, and the exact formula's value where there is one."""
    rows = []
    for ranks in SIZES:
        model = Model(costs, ranks)
        cells = []
        for name, policy_of in POLICIES.items():
            policy = policy_of(model)
            found = simulate(policy, model.mean_s, f"{name}/{ranks}")
            exact = "" if policy.fallback_s else f", exact {percent(policy.expected(model.mean_s))}"
            figure = f"{percent(found.goodput)} ± {percent(found.error)}{exact}"
            cells.append(f"{figure}; every {duration(policy.interval_s)}")
        rows.append((f"{ranks:,}", *cells))
    return table(("ranks", *POLICIES), rows, numbers_from=1)


# -- text ------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int | None = None) -> str:
    """Returns a table in Markdown; columns from `numbers_from` on are aligned to the right."""
    right = len(head) if numbers_from is None else numbers_from
    rule = ["---" if number < right else "---:" for number in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def duration(seconds: float, digits: int = 2) -> str:
    """Returns a time in the largest unit of which it has at least one, with that many significant digits."""
    size, unit = next((each for each in _UNITS if seconds >= each[0]), _UNITS[-1])
    value = float(f"{seconds / size:.{digits}g}")
    return f"{value:,.{max(0, digits - len(str(int(value))))}f} {unit}"


def size(size_gb: float) -> str:
    """Returns a size in the largest unit of which it has at least one, with two significant digits."""
    factor, unit = next((each for each in _SIZES if size_gb >= each[0]), _SIZES[-1])
    return f"{float(f'{size_gb / factor:.2g}'):,g} {unit}"


def share(part: float) -> str:
    """Returns a share in percent, with two significant digits."""
    return f"{float(f'{part * 100:.2g}'):,g} %"


def percent(part: float) -> str:
    """Returns a share in percent, with three decimal places."""
    return f"{part * 100:.3f}"


def _value(value: float, unit: str, digits: int = 2) -> str:
    return duration(value, digits) if unit == "s" else f"{value:,g} {unit}".strip()
