"""The tables on scaling follow from stored costs; formulas and simulation are right."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

import pytest

from scaling import formulas
from scaling.assumptions import ASSUMPTIONS, SETTINGS, SIZES, assumed
from scaling.costs import HOW, Costs
from scaling.model import PIECE_GB, Model
from scaling.simulation import Policy, Restart, simulate
from scaling.tables import POLICIES, duration, renewed, sections, share, size
from tolaria.config import Settings
from tolaria.run import restore_points

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
COSTS: Final = Costs.load()
TABLES: Final = sections(COSTS)
ROUND: Final = replace(
    COSTS,
    all_reduce_1_s=10e-6,
    all_reduce_2_s=110e-6,
    all_reduce_piece_s=0.0336 + 110e-6,
    broadcast_piece_s=PIECE_GB / 2,
    store_get_s=25e-6,
    copy_gb_s=10.0,
    hash_gb_s=20.0,
    notice_s=0.5,
    start_s=1.0,
    ready_s=8.0,
    first_step_s=0.5,
)
"""Costs with which one can calculate by hand: a message takes 50 \N{MICRO SIGN}s."""


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_the_tables_that_the_script_makes() -> None:
    """After a change of costs, assumptions or formulas: `python scripts/scaling write`."""
    assert renewed(PAGE, TABLES) == PAGE


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_stale_table_is_noticed(name: str) -> None:
    """Of each table; a page without a place for it is refused."""
    begin = f"<!-- begin: {name} -->"
    assert renewed(PAGE.replace(begin + "\n", f"{begin}\n| stale |\n"), TABLES) == PAGE
    with pytest.raises(ValueError, match=name):
        renewed(PAGE.replace(begin, ""), TABLES)


def test_other_costs_make_other_tables() -> None:
    """The costs of the file are those that count."""
    changed = replace(COSTS, all_reduce_2_s=2 * COSTS.all_reduce_2_s, copy_gb_s=COSTS.copy_gb_s / 2)
    after = sections(changed)
    assert {name for name in TABLES if TABLES[name] != after[name]} == {"measured", "costs", "limits", "goodput"}


def test_the_script_prints_the_tables_without_torch() -> None:
    """Within seconds, from the stored costs alone."""
    code = "import runpy, sys; sys.argv = ['scaling']; runpy.run_path('scripts/scaling', run_name='__main__')"
    code += "; assert 'torch' not in sys.modules"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(text in printed for text in TABLES.values())


def test_every_assumption_is_used_and_shown_once() -> None:
    """One without use, or a second value for it, would mislead."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts" / "scaling").glob("*.py"))
    assert set(re.findall(r'assumed\("([^"]+)"\)', sources)) == set(ASSUMPTIONS)
    assert [name for name in ASSUMPTIONS if PAGE.count(f"| {name} |") != 1] == []


def test_each_cost_is_described_and_stored() -> None:
    """And is positive."""
    assert [field.name for field in fields(Costs)] == ["machine", *HOW]
    assert all(getattr(COSTS, name) > 0 for name in HOW)


def test_costs_survive_their_file(tmp_path: Path) -> None:
    """With 3 digits; a file without one of them is refused."""
    file = tmp_path / "costs.json"
    replace(COSTS, store_get_s=1.23456e-5).save(file)
    assert Costs.load(file) == replace(COSTS, store_get_s=1.23e-5)
    file.write_text("{}")
    with pytest.raises(TypeError):
        Costs.load(file)


def test_settings_are_the_defaults_of_the_service() -> None:
    """And the size of pieces, and the steps until a snapshot is proven."""
    settings = Settings()
    for name, value in SETTINGS.items():
        section, _, field = name.partition(".")
        assert getattr(getattr(settings, section), field) == value
    group = (ROOT / "service" / "tolaria" / "ranks" / "group.py").read_text(encoding="utf-8")
    assert f"_BUCKET_BYTES: Final = 2**{int(math.log2(formulas.PIECE_BYTES))}\n" in group
    model = Model(COSTS, 8)
    assert model.snapshots().lag_s == restore_points.PROOF_LOSSES * assumed("step")


# -- formulas --------------------------------------------------------------------------------------------------------


def ring_rounds(ranks: int) -> int:
    """Returns in how many rounds a ring sums chunks on every rank; a chunk is the set of ranks that are in its sum."""
    chunks = [[1 << rank] * ranks for rank in range(ranks)]
    rounds, whole = 0, (1 << ranks) - 1
    while any(chunk != whole for own in chunks for chunk in own):
        # First partial sums travel round, each gaining one rank at a time; then the results do.
        place = rounds + 1 if rounds < ranks - 1 else rounds - (ranks - 1)
        sent = [(rank, (rank + place) % ranks) for rank in range(ranks)]
        given = [chunks[rank][chunk] for rank, chunk in sent]
        for (rank, chunk), content in zip(sent, given, strict=True):
            chunks[rank - 1][chunk] |= content
        rounds += 1
    return rounds


def broadcast_rounds(ranks: int) -> int:
    """Returns in how many rounds all have something, if whoever has it gives it to one other in each."""
    rounds, having = 0, 1
    while having < ranks:
        rounds, having = rounds + 1, 2 * having
    return rounds


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8, 9, 64, 100])
def test_messages_in_a_row(ranks: int) -> None:
    """In a ring and in a tree, against following the messages."""
    unit = {"call_s": 0.0, "hop_s": 1.0, "network_s": 0.0, "devices": 8.0}
    assert formulas.ring_s(ranks, **unit) == ring_rounds(ranks)
    assert formulas.tree_s(ranks, **unit) == 2 * broadcast_rounds(ranks)
    assert formulas.broadcast_s(ranks, 1, 1, messages=0, hop_s=1) == broadcast_rounds(ranks)


def test_figures_of_64_ranks_by_hand() -> None:
    """On 8 machines, with costs that are round."""
    model = Model(ROUND, 64)
    assert model.machines == 8
    assert model.agreement_s() == pytest.approx(10e-6 + 126 * 50e-6 + 16 * 5e-6)
    assert model.tree_s() == pytest.approx(10e-6 + 12 * 50e-6 + 6 * 5e-6)
    assert model.gradients_gloo_s(1) == pytest.approx(30 * 6.39e-3 + 2 * 63 / 64 * 0.0336 / PIECE_GB)
    assert model.gradients_nccl_s(1) == pytest.approx(min(30 * 126 * 5e-6 + 126 / 64 / 50, 30 * 12 * 5e-6 + 2 / 50))
    assert model.snapshot_s(12) == pytest.approx(1.8)
    assert model.write_s(12) == pytest.approx(4)
    assert model.broadcast_s(12, 900) == pytest.approx(6 * (6 + 900 * 55e-6))
    assert model.store_s() == pytest.approx(4096 * 25e-6 + 8 * 262_144 / 12.5e9)
    assert model.proof_s() == pytest.approx(3.6 + 3.0)
    assert model.answers_s() == pytest.approx(2 * 6.39e-3, rel=1e-3)
    assert model.start_s() == pytest.approx(10)
    from_memory_s = 10 + 0.1029 + 6.6 + 36.297 + 4 * 6.39e-3
    assert model.restart_s(from_memory=True) == pytest.approx(from_memory_s, abs=0.001)
    assert model.restart_s(from_memory=False) == pytest.approx(from_memory_s + 2, abs=0.001)
    assert model.mean_s == pytest.approx(50_000 * 3600 / 64)


def test_one_machine_has_no_network_between_its_ranks() -> None:
    """And one rank more than it has room for needs another."""
    assert [Model(ROUND, ranks).machines for ranks in (2, 8, 9)] == [1, 1, 2]
    assert Model(ROUND, 8).agreement_s() == pytest.approx(10e-6 + 14 * 50e-6)
    assert Model(ROUND, 9).agreement_s() == pytest.approx(10e-6 + 16 * 50e-6 + 4 * 5e-6)


def test_intervals_by_hand() -> None:
    """Young's and Daly's, and the latter's limit for long stalls."""
    assert formulas.young_s(2, 3600) == pytest.approx(120)
    assert formulas.daly_s(2, 3600) == pytest.approx(120 * (1 + 1 / 180 + 1 / 32_400) - 2)
    assert formulas.daly_s(300, 100) == 100


@pytest.mark.parametrize(("stall_s", "mean_s"), [(1.0, 1e5), (60.0, 3600.0), (300.0, 1800.0)])
def test_dalys_interval_is_the_best(stall_s: float, mean_s: float) -> None:
    """No other one gives more goodput, to the accuracy of a higher-order estimate."""
    best_s = formulas.daly_s(stall_s, mean_s)

    def found(interval_s: float) -> float:
        return formulas.goodput(interval_s, stall_s, mean_s, [(1.0, 30.0)])

    searched = max(found(best_s * 1.002**step) for step in range(-500, 500))
    assert found(best_s) == pytest.approx(searched, rel=1e-4)
    assert found(2 * best_s) < searched * (1 - 1e-4)
    assert found(best_s / 2) < searched * (1 - 1e-4)


def test_goodput_by_hand() -> None:
    """Against Daly's complete model, its first order, and a sum over the states that a failure leaves."""
    interval_s, stall_s, mean_s, restart_s, lag_s = 600.0, 20.0, 3600.0, 300.0, 50.0
    daly = interval_s / (mean_s * math.exp(restart_s / mean_s) * (math.exp(620 / mean_s) - 1))
    assert formulas.goodput(interval_s, stall_s, mean_s, [(1.0, restart_s)]) == pytest.approx(daly)
    assert formulas.goodput(formulas.young_s(1, 1e8), 1, 1e8, [(1.0, 0.0)]) == pytest.approx(
        1 - math.sqrt(2 / 1e8), rel=1e-7
    )
    kept = interval_s * sum(math.exp(-(saved * 620 + lag_s) / mean_s) for saved in range(1, 1000))
    ends = 0.75 * math.exp(-300 / mean_s) + 0.25 * math.exp(-900 / mean_s)
    rested_s = mean_s * (1 - ends) / ends  # attempts until one is not struck, each as long as it lasts
    assert formulas.goodput(interval_s, stall_s, mean_s, [(0.75, 300.0), (0.25, 900.0)], lag_s) == pytest.approx(
        kept / (mean_s + rested_s)
    )


def test_policies_of_64_ranks_by_hand() -> None:
    """Intervals, stalls and lags; one failure in 40 takes the leader's machine."""
    model = Model(ROUND, 64)
    mean_s, restart_s, read_s = model.mean_s, model.restart_s(from_memory=True), model.restart_s(from_memory=False)
    snapshots = model.snapshots()
    assert (snapshots.interval_s, snapshots.lag_s) == pytest.approx((180, 1.5))
    assert snapshots.all_stalls_s == pytest.approx(1.8 + 1.8 * 180 / 3600)
    shares, durations = ([getattr(each, name) for each in snapshots.restarts] for name in ("share", "duration_s"))
    assert shares == pytest.approx([0.7, 0.1, 0.175, 0.025])
    assert durations == pytest.approx([restart_s, restart_s + 30, restart_s + 600, read_s + 600])
    assert [each.leaves_state for each in snapshots.restarts] == [True, True, True, False]
    blocking, beside = model.blocking_checkpoints(), model.checkpoints()
    assert (blocking.interval_s, blocking.stall_s, blocking.lag_s) == pytest.approx(
        (formulas.daly_s(5.8, mean_s), 5.8, 0)
    )
    assert (beside.interval_s, beside.stall_s, beside.lag_s) == pytest.approx((formulas.daly_s(1.8, mean_s), 1.8, 4))
    assert all(each.leaves_state and each.duration_s >= read_s for each in blocking.restarts)
    assert model.rare_snapshots().interval_s == beside.interval_s


# -- the simulation --------------------------------------------------------------------------------------------------

FRAGILE: Final = Policy(400.0, 30.0, 60.0, (Restart(0.7, 200.0), Restart(0.3, 900.0)))
"""Everything matters: stalls, the lag, restarts that fail."""

MEAN_S: Final = 3600.0


def test_the_simulation_agrees_with_the_formula() -> None:
    """Within its error, which is small."""
    found = simulate(FRAGILE, MEAN_S, "agrees", failures=800)
    assert found.error < 0.004
    assert abs(found.goodput - FRAGILE.expected(MEAN_S)) < found.error


def test_the_simulation_agrees_with_young_and_daly() -> None:
    """Of checkpoints at their intervals: no other interval is better by more than the error."""
    policy = Policy(formulas.daly_s(30.0, MEAN_S), 30.0, 0.0, (Restart(1.0, 200.0),))
    best = simulate(policy, MEAN_S, "best", failures=800)
    assert abs(best.goodput - policy.expected(MEAN_S)) < best.error
    for factor in (0.3, 3.0):
        other = simulate(replace(policy, interval_s=policy.interval_s * factor), MEAN_S, "best", failures=800)
        assert other.goodput < best.goodput - best.error
    young = replace(policy, interval_s=formulas.young_s(30.0, MEAN_S))
    assert abs(simulate(young, MEAN_S, "best", failures=800).goodput - best.goodput) < best.error


@pytest.mark.parametrize(
    "wrong",
    [
        replace(FRAGILE, lag_s=0.0),
        replace(FRAGILE, stall_s=15.0),
        replace(FRAGILE, interval_s=800.0),
        replace(FRAGILE, restarts=FRAGILE.restarts[:1]),
        replace(FRAGILE, restarts=(Restart(1.0, 410.0 * 0.9),)),
    ],
)
def test_the_simulation_tells_formulas_apart(wrong: Policy) -> None:
    """The exact value of anything else is outside its interval."""
    found = simulate(FRAGILE, MEAN_S, "agrees", failures=800)
    assert abs(found.goodput - wrong.expected(MEAN_S)) > found.error


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize("name", list(POLICIES))
def test_simulated_figures_of_the_page_are_right(name: str, ranks: int) -> None:
    """Where no failure loses the states in memory, they are the exact ones to twice the error; elsewhere, below."""
    model = Model(COSTS, ranks)
    policy = POLICIES[name](model)
    found = simulate(policy, model.mean_s, f"{name}/{ranks}")
    assert sum(each.share for each in policy.restarts) == pytest.approx(1)
    above = found.goodput - policy.expected(model.mean_s)
    assert above < 2 * found.error
    if not policy.fallback_s:
        assert above > -2 * found.error


def test_what_the_page_concludes() -> None:
    """Above 98 % up to 1,024 ranks; at 10,000 a fifth is lost, and the rendezvous is most of a restart."""
    models = {ranks: Model(COSTS, ranks) for ranks in SIZES}
    found = {n: [of(model).expected(model.mean_s) for of in POLICIES.values()] for n, model in models.items()}
    assert all(min(found[ranks]) > 0.98 for ranks in SIZES[:-1])
    assert all(0.75 < goodput < 0.85 for goodput in found[10_000])
    blocking, beside, default, rare = found[1024]
    assert default < blocking - 0.001 < blocking + 0.001 < min(beside, rare)
    assert models[10_000].store_s() > 0.9 * models[10_000].restart_s(from_memory=True)
    assert models[1024].agreement_s() < assumed("step") < models[10_000].agreement_s()


def test_a_lost_memory_costs_the_work_since_the_checkpoint() -> None:
    """Half an interval of checkpoints on average, less half of one between snapshots."""
    kept = Policy(10.0, 0.0, 0.0, (Restart(1.0, 0.0),), fallback_s=3600.0)
    lost = replace(kept, restarts=(Restart(1.0, 0.0, leaves_state=False),))
    mean_s = 50 * 3600.0
    found = simulate(lost, mean_s, "lost", failures=800)
    assert simulate(kept, mean_s, "lost").goodput == pytest.approx(1, abs=1e-3)
    exact = formulas.goodput(3600.0, 0.0, mean_s, [(1.0, 0.0)])
    assert abs(found.goodput - exact) < 2 * found.error
    assert exact < 0.992


def test_the_simulation_repeats_itself() -> None:
    """By its seed; another one gives another figure."""
    one, same, other = (simulate(FRAGILE, MEAN_S, seed, runs=3, failures=20) for seed in ("a", "a", "b"))
    assert one == same
    assert one != other


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.234e-4, "120 \N{MICRO SIGN}s"),
        (0.0123, "12 ms"),
        (0.99, "990 ms"),
        (1.0, "1.0 s"),
        (59.0, "59 s"),
        (90, "1.5 min"),
        (9e7, "1,000 d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """Two digits, in the largest unit."""
    assert duration(seconds) == text


def test_sizes_and_shares() -> None:
    """Two digits."""
    assert [size(8000), size(0.0021), size(64e-9)] == ["8 TB", "2.1 MB", "64 B"]
    assert [share(0.000324), share(2.75)] == ["0.032 %", "280 %"]
