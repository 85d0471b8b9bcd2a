from __future__ import annotations

from collections.abc import Callable

import pytest

from leyline.v1.enums_pb2 import SeedLifecycleStage
from leyline.v1.seeds_pb2 import SeedState
from tolaria.seeds.plan import Change, GraftedSeed, HostFacts, Plan, Refusal, plan
from tolaria.seeds.stages import ABSENT, SUCCESSORS, stage_name
from tolaria.values.seeds import Ramp, SeedLimits, Stage, stage_from_name

Seed = Callable[..., SeedState]
STEP = 100
UP = (0.0, 1.0, 80, 10)  # has ended by STEP
RISING = (0.0, 1.0, 80, 40)  # is at 0.5


MISFITS = {("conv", "late"): "conv does not fit late"}
FACTS = HostFacts(("early", "late"), frozenset({"mlp", "conv"}), MISFITS, cull_steps=8)


def _seed(stage: str, ramp: tuple[float, float, int, int] | None = None, seed_id: str = "a") -> GraftedSeed:
    made = None if ramp is None else Ramp(*ramp)
    return GraftedSeed(seed_id, "mlp", "late", stage_from_name(stage), made, made)


def _plan(current: list[GraftedSeed], desired: list[SeedState]) -> Plan:
    return plan(current, desired, FACTS, STEP)


@pytest.mark.parametrize("stage", SeedLifecycleStage.values())
def test_a_new_seed_in_every_stage(seed: Seed, stage: Stage) -> None:
    """It is grafted where the stage allows it, ignored in stages outside the model, and refused in all others."""
    got = _plan([], [seed("a", stage_name(stage), "mlp", alpha=(0.0, 0.0, 0, 0))])
    if stage in ABSENT:
        assert got == Plan((), ())
    elif stage in SUCCESSORS[None]:
        assert [change.after and change.after.stage for change in got.changes] == [stage]
        assert got.refusals == ()
    else:
        assert got.changes == ()
        assert got.refusals == (Refusal("a", f"was never grafted here, so that it cannot be {stage_name(stage)}"),)


@pytest.mark.parametrize("target", [s for s in SeedLifecycleStage.values() if s not in ABSENT])
@pytest.mark.parametrize("source", [s for s in SUCCESSORS if s is not None and stage_name(s) != "CULLED"])
def test_every_pair_of_stages(seed: Seed, source: Stage, target: Stage) -> None:
    """Where the table allows it the seed moves; elsewhere it stays, and the reason says why."""
    current = _seed(stage_name(source), UP)
    got = _plan([current], [seed("a", stage_name(target), "mlp", alpha=UP)])
    if target in SUCCESSORS[source]:
        assert got.refusals == ()
        assert [change.after and change.after.stage for change in got.changes] == [target] * (source != target)
    else:
        assert got == Plan((), (Refusal("a", f"{stage_name(target)} cannot follow {stage_name(source)}"),))


def test_no_stage_precedes_the_one_before_it() -> None:
    """The table has no transition to an earlier stage."""
    order = ["GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED", "TERMINATED"]
    places = {stage_from_name(name): place for place, name in enumerate(order)}
    for source, targets in SUCCESSORS.items():
        if source in places:
            assert all(places[target] >= places[source] for target in targets)


@pytest.mark.parametrize("stage", ["UNKNOWN", "DORMANT", "CULLED", "EMBARGOED", "RESETTING", None])
@pytest.mark.parametrize(
    ("source", "ramp", "expected"),
    [
        ("GERMINATED", None, None),
        ("TRAINING", None, None),
        ("BLENDING", (0.0, 1.0, 100, 10), None),
        ("BLENDING", RISING, Ramp(0.5, 0.0, STEP, 8)),
        ("PROBATIONARY", UP, Ramp(1.0, 0.0, STEP, 8)),
    ],
)
def test_culling(
    seed: Seed,
    stage: str | None,
    source: str,
    ramp: tuple[float, float, int, int] | None,
    expected: Ramp | None,
) -> None:
    """A seed that is culled or no longer declared leaves at once at alpha 0, and fades out from above."""
    (change,) = _plan([_seed(source, ramp)], [] if stage is None else [seed("a", stage)]).changes
    assert (change.after and change.after.ramp) == expected
    assert change.kind == ("removed" if expected is None else "fading")


def test_a_fossil_stays(seed: Seed) -> None:
    """A seed that is part of the host stays if it is no longer declared, and refuses to be culled."""
    fossil = _seed("FOSSILIZED", UP)
    assert _plan([fossil], []) == Plan((), ())
    got = _plan([fossil], [seed("a", "CULLED")])
    assert got == Plan((), (Refusal("a", "is part of the host; CULLED cannot follow FOSSILIZED"),))


def test_a_culled_seed_does_not_come_back(seed: Seed) -> None:
    """A seed that fades out continues to do so; a new declaration is refused until it has left."""
    fading = _seed("CULLED", (0.5, 0.0, 98, 8))
    assert _plan([fading], [seed("a", "EMBARGOED")]) == Plan((), ())
    got = _plan([fading], [seed("a", "GERMINATED", "mlp")])
    assert got == Plan((), (Refusal("a", "is being culled until step 106; GERMINATED cannot follow"),))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"blueprint": "unknown"}, "blueprint 'unknown' is unknown; known are conv, mlp"),
        ({"slot": "missing"}, "slot 'missing' is unknown; known are early, late"),
        ({"blueprint": "conv"}, "conv does not fit late"),
        ({"stage": "BLENDING"}, "BLENDING needs an alpha schedule"),
        ({"stage": "BLENDING", "alpha": (0.0, 1.5, 0, 0)}, "alpha from 0 to 1.5 is not within 0 to 1"),
        ({"stage": "BLENDING", "alpha": (float("nan"), 1.0, 0, 0)}, "alpha from nan to 1 is not within 0 to 1"),
        ({"seed_id": ""}, "a seed id has 1 to 128 characters, not 0"),
        ({"seed_id": "a.b"}, "'a.b' cannot be part of a parameter's name"),
        ({"seed_id": "host"}, "'host' cannot be part of a parameter's name"),
    ],
)
def test_refused_grafts_name_their_reason(seed: Seed, state: dict[str, str], reason: str) -> None:
    """An impossible graft is refused, and the next seed is still grafted."""
    fields = {"seed_id": "x", "stage": "GERMINATED", "blueprint": "mlp", **state}
    got = _plan([], [seed(**fields), seed("b", "GERMINATED", "mlp")])
    assert [(r.seed_id, r.reason) for r in got.refusals] == [(fields["seed_id"], reason)]
    assert [change.seed.seed_id for change in got.changes] == ["b"]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"blueprint": "conv"}, "is a 'mlp'; it cannot become a 'conv'"),
        ({"slot": "early"}, "is in slot 'late'; it cannot move to 'early'"),
        ({"stage": "GERMINATED"}, "GERMINATED cannot follow TRAINING"),
        ({"stage": "PROBATIONARY"}, "PROBATIONARY needs an alpha schedule"),
    ],
)
def test_refused_moves_leave_the_seed_as_it_is(seed: Seed, state: dict[str, str], reason: str) -> None:
    """The reason says what is impossible."""
    fields = {"seed_id": "a", "stage": "BLENDING", "blueprint": "mlp", **state}
    assert _plan([_seed("TRAINING")], [seed(**fields)]) == Plan((), (Refusal("a", reason),))


def test_a_malformed_state_leaves_its_seed_as_it_is(seed: Seed) -> None:
    """A state with an invalid stage or attribution is refused, and its seed is not culled."""
    newer, sick = seed("a", "TRAINING"), seed("b", "TRAINING")
    newer.stage = 99  # type: ignore[assignment] # as a newer peer could send it
    sick.attribution = float("nan")
    current = [_seed("TRAINING"), _seed("TRAINING", seed_id="b")]
    got = _plan(current, [newer, sick])
    assert got.changes == ()
    assert [r.reason for r in got.refusals] == [
        "stage 99 is unknown to this service",
        "attribution nan is not a finite number of at least 0",
    ]


def test_the_first_of_two_states_counts(seed: Seed) -> None:
    """The second state of one seed is refused."""
    got = _plan([], [seed("a", "TRAINING", "mlp"), seed("a", "GERMINATED", "mlp")])
    assert [str(change) for change in got.changes] == ["a grafted in slot late, TRAINING"]
    assert got.refusals == (Refusal("a", "is desired twice; the first counts"),)


def test_slots_are_assigned_in_order(seed: Seed) -> None:
    """Without a slot name a seed takes the first slot that is free and fits; a taken slot is refused."""
    states = [seed("c", "TRAINING", "conv", slot=""), seed("a", "TRAINING", "mlp", slot="late")]
    got = _plan([], [*states, seed("b", "TRAINING", "mlp", slot="late"), seed("d", "TRAINING", "mlp", slot="")])
    assert [(c.after.seed_id, c.after.slot) for c in got.changes if c.after] == [("c", "early"), ("a", "late")]
    assert got.refusals == (Refusal("b", "slot 'late' is taken"), Refusal("d", "no slot is free"))
    assert _plan([_seed("TRAINING", seed_id="z")], [seed("z", "TRAINING", "", slot=""), states[0]]).refusals == ()


def test_no_free_slot_fits(seed: Seed) -> None:
    """The reason is that of the first free slot."""
    facts = HostFacts(("late",), FACTS.blueprints, MISFITS, cull_steps=8)
    got = plan([], [seed("a", "TRAINING", "conv", slot="")], facts, STEP)
    assert got.refusals == (Refusal("a", "no free slot fits: conv does not fit late"),)


@pytest.mark.parametrize("leaving", [_seed("TRAINING"), _seed("PROBATIONARY", UP)])
def test_a_slot_freed_in_a_plan_is_assigned_in_the_same_plan(seed: Seed, leaving: GraftedSeed) -> None:
    """A slot is free once its seed leaves at once or becomes part of the host."""
    last = "FOSSILIZED" if leaving.ramp else "CULLED"
    got = _plan([leaving], [seed("b", "TRAINING", "mlp"), seed("a", last, "mlp", alpha=UP)])
    assert [change.seed.seed_id for change in got.changes] == ["a", "b"]
    assert got.refusals == ()


def test_a_fading_seed_keeps_its_slot(seed: Seed) -> None:
    """The slot stays taken until the seed has left."""
    got = _plan([_seed("PROBATIONARY", UP)], [seed("b", "TRAINING", "mlp")])
    assert [change.kind for change in got.changes] == ["fading"]
    assert got.refusals == (Refusal("b", "slot 'late' is taken"),)


def test_a_late_schedule_begins_at_its_start(seed: Seed) -> None:
    """A seed that starts to blend after its schedule began enters at the start; planning again changes nothing."""
    states = [seed("a", "BLENDING", "mlp", alpha=RISING)]
    (change,) = _plan([_seed("TRAINING")], states).changes
    assert change.after is not None
    assert change.after.ramp == Ramp(0.0, 1.0, STEP, 40)
    assert _plan([change.after], states) == Plan((), ())


def test_declaring_the_reported_schedule_changes_nothing(seed: Seed) -> None:
    """A schedule that comes back as it was reported is the same schedule."""
    blending = GraftedSeed(
        "a", "mlp", "late", stage_from_name("BLENDING"), Ramp(0.1, 0.7, 90, 40), Ramp(0.0, 1.0, 9, 9)
    )
    assert _plan([blending], [seed("a", "BLENDING", "mlp", alpha=(0.1, 0.7, 90, 40))]) == Plan((), ())


def test_a_new_schedule_and_attribution(seed: Seed) -> None:
    """A blending seed takes both as they are."""
    state = seed("a", "BLENDING", "mlp", alpha=(0.5, 0.25, 100, 50))
    state.attribution = 0.5
    (change,) = _plan([_seed("BLENDING", RISING)], [state]).changes
    assert change.after is not None
    assert (change.kind, change.after.ramp, change.after.attribution) == (
        "adjusted",
        Ramp(0.5, 0.25, 100, 50),
        0.5,
    )


def test_the_schedule_is_fixed_from_the_probation_on(seed: Seed) -> None:
    """Another schedule changes nothing."""
    desired = [seed("a", "PROBATIONARY", "mlp", alpha=(0.0, 0.5, 0, 0))]
    assert _plan([_seed("PROBATIONARY", UP)], desired) == Plan((), ())


@pytest.mark.parametrize("target", ["PROBATIONARY", "FOSSILIZED", "TERMINATED"])
@pytest.mark.parametrize(
    ("source", "reached"), [("GERMINATED", "BLENDING"), ("TRAINING", "BLENDING"), ("SHADOWING", "SHADOWING")]
)
def test_full_strength_waits_for_the_schedule(seed: Seed, source: str, reached: str, target: str) -> None:
    """A seed declared further than is possible without a jump moves as far as it can; the reason names the step."""
    record = _seed(source, RISING if source == "SHADOWING" else None)
    got = _plan([record], [seed("a", target, "mlp", alpha=RISING)])
    after = got.changes[0].after if got.changes else record
    assert after is not None
    assert stage_name(after.stage) == reached
    end, alpha = (120, "0.5") if source == "SHADOWING" else (140, "0")
    assert got.refusals == (Refusal("a", f"{target} has to wait: alpha is {alpha} and reaches 1 at step {end}"),)
    assert plan([after], [seed("a", target, "mlp", alpha=RISING)], FACTS, end).refusals == ()


def test_alpha_of_each_stage() -> None:
    """Alpha is 0 before blending, follows the schedule while blending, and is its end from the probation on."""
    alphas = {
        stage: _seed(stage, RISING).alpha(STEP)
        for stage in ("GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED", "TERMINATED")
    }
    assert list(alphas.values()) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0]


def test_a_change_as_text() -> None:
    """The text names seed, change and slot."""
    assert str(Change(_seed("TRAINING"), None)) == "a removed in slot late"


@pytest.mark.parametrize(("active", "grafted"), [(0, []), (1, []), (2, ["b"]), (3, ["b", "c"])])
def test_no_more_seeds_grow_than_the_limit_allows(seed: Seed, active: int, grafted: list[str]) -> None:
    """Seeds beside one that grows are refused beyond the limit, with the setting's name."""
    slots = ("early", "late", "third", "fourth")
    facts = HostFacts(slots, FACTS.blueprints, {}, cull_steps=8, limits=SeedLimits(active, 8))
    desired = [seed(name, "TRAINING", "mlp", slot="") for name in "abc"]
    got = plan([_seed("TRAINING")], desired, facts, STEP)
    assert [change.seed.seed_id for change in got.changes] == grafted
    assert {refusal.seed_id for refusal in got.refusals} == {"b", "c"} - set(grafted)
    assert all("(seeds.active_max)" in refusal.reason for refusal in got.refusals)


@pytest.mark.parametrize(("fossilized", "moved"), [(1, []), (2, ["b"]), (3, ["b", "c"])])
def test_no_more_seeds_are_fossilized_than_the_limit_allows(seed: Seed, fossilized: int, moved: list[str]) -> None:
    """Beside one that is, seeds stay on probation beyond the limit; those that are part of the host stay."""
    facts = HostFacts(FACTS.slots, FACTS.blueprints, {}, cull_steps=8, limits=SeedLimits(4, fossilized))
    current = [_seed("FOSSILIZED", UP), _seed("PROBATIONARY", UP, "b"), _seed("PROBATIONARY", UP, "c")]
    got = plan(current, [seed(name, "FOSSILIZED", "mlp", alpha=UP) for name in "abc"], facts, STEP)
    assert [change.seed.seed_id for change in got.changes] == moved
    assert {refusal.seed_id for refusal in got.refusals} == {"b", "c"} - set(moved)
    assert all("(seeds.fossilized_max)" in refusal.reason for refusal in got.refusals)
