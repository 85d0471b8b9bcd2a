from __future__ import annotations

from collections.abc import Callable

import pytest

from leyline.v1.enums_pb2 import SeedLifecycleStage
from leyline.v1.seeds_pb2 import SeedState
from tolaria.seeds import Change, ChangeKind, Ground, Plan, Ramp, Refusal, Standing, plan
from tolaria.seeds.stages import ABSENT, FOLLOWERS, Stage, stage_name, stage_named

Wish = Callable[..., SeedState]
STEP = 100
UP = (0.0, 1.0, 80, 10)  # has ended by STEP
RISING = (0.0, 1.0, 80, 40)  # is at 0.5


def _misfit(blueprint: str, slot: str) -> str | None:
    return f"{blueprint} hates {slot}" if (blueprint, slot) == ("conv", "late") else None


GROUND = Ground(("early", "late"), frozenset({"mlp", "conv"}), _misfit, cull_steps=8)


def _standing(stage: str, ramp: tuple[float, float, int, int] | None = None, seed_id: str = "a") -> Standing:
    made = None if ramp is None else Ramp(*ramp)
    return Standing(seed_id, "mlp", "late", stage_named(stage), made, made)


def _plan(current: list[Standing], desired: list[SeedState]) -> Plan:
    return plan(current, desired, GROUND, STEP)


@pytest.mark.parametrize("stage", SeedLifecycleStage.values())
def test_every_stage_of_an_unknown_seed(wish: Wish, stage: Stage) -> None:
    """An unknown seed is grafted straight into what it can begin in, left alone where it has no place, else refused."""
    got = _plan([], [wish("a", stage_name(stage), "mlp", alpha=(0.0, 0.0, 0, 0))])
    if stage in ABSENT:
        assert got == Plan((), ())
    elif stage in FOLLOWERS[None]:
        assert [change.after and change.after.stage for change in got.changes] == [stage]
        assert got.refusals == ()
    else:
        assert got.changes == ()
        assert got.refusals == (Refusal("a", f"was never grafted here, so that it cannot be {stage_name(stage)}"),)


@pytest.mark.parametrize("target", [s for s in SeedLifecycleStage.values() if s not in ABSENT])
@pytest.mark.parametrize("source", [s for s in FOLLOWERS if s is not None and stage_name(s) != "CULLED"])
def test_every_succession(wish: Wish, source: Stage, target: Stage) -> None:
    """Where the table allows it the seed moves; elsewhere it stays, with the reason."""
    current = _standing(stage_name(source), UP)
    got = _plan([current], [wish("a", stage_name(target), "mlp", alpha=UP)])
    if target in FOLLOWERS[source]:
        assert got.refusals == ()
        assert [change.after and change.after.stage for change in got.changes] == [target] * (source != target)
    else:
        assert got == Plan((), (Refusal("a", f"{stage_name(target)} cannot follow {stage_name(source)}"),))


def test_nothing_goes_back() -> None:
    """No stage in the table is followed by an earlier one."""
    order = ["GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED", "TERMINATED"]
    places = {stage_named(name): place for place, name in enumerate(order)}
    for source, targets in FOLLOWERS.items():
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
    wish: Wish, stage: str | None, source: str, ramp: tuple[float, float, int, int] | None, expected: Ramp | None
) -> None:
    """A living seed that is wished away, or not wished for, goes at once from alpha 0 and ramps down from above."""
    (change,) = _plan([_standing(source, ramp)], [] if stage is None else [wish("a", stage)]).changes
    assert (change.after and change.after.ramp) == expected
    assert change.kind == (ChangeKind.REMOVED if expected is None else ChangeKind.FADING)


def test_fossils_stay(wish: Wish) -> None:
    """What is part of the host stays when nobody mentions it, and is not culled when somebody asks."""
    fossil = _standing("FOSSILIZED", UP)
    assert _plan([fossil], []) == Plan((), ())
    got = _plan([fossil], [wish("a", "CULLED")])
    assert got == Plan((), (Refusal("a", "is part of the host; CULLED cannot follow FOSSILIZED"),))


def test_culled_seed_does_not_come_back(wish: Wish) -> None:
    """A seed on its way out stays on it, and a wish for it waits until it has gone."""
    fading = _standing("CULLED", (0.5, 0.0, 98, 8))
    assert _plan([fading], [wish("a", "EMBARGOED")]) == Plan((), ())
    got = _plan([fading], [wish("a", "GERMINATED", "mlp")])
    assert got == Plan((), (Refusal("a", "is being culled until step 106; GERMINATED cannot follow"),))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"blueprint": "moss"}, "blueprint 'moss' is unknown; known are conv, mlp"),
        ({"slot": "attic"}, "slot 'attic' is unknown; known are early, late"),
        ({"blueprint": "conv"}, "conv hates late"),
        ({"stage": "BLENDING"}, "BLENDING needs an alpha schedule"),
        ({"stage": "BLENDING", "alpha": (0.0, 1.5, 0, 0)}, "alpha from 0 to 1.5 is not within 0 to 1"),
        ({"stage": "BLENDING", "alpha": (float("nan"), 1.0, 0, 0)}, "alpha from nan to 1 is not within 0 to 1"),
        ({"seed_id": ""}, "a seed id has 1 to 128 characters, not 0"),
        ({"seed_id": "a.b"}, "'a.b' cannot be part of a parameter's name"),
        ({"seed_id": "host"}, "'host' cannot be part of a parameter's name"),
    ],
)
def test_refused_grafts(wish: Wish, state: dict[str, str], reason: str) -> None:
    """Each impossible newcomer is refused for its own reason, and the next in line still comes."""
    fields = {"seed_id": "x", "stage": "GERMINATED", "blueprint": "mlp", **state}
    got = _plan([], [wish(**fields), wish("b", "GERMINATED", "mlp")])
    assert [(r.seed_id, r.reason) for r in got.refusals] == [(fields["seed_id"], reason)]
    assert [change.seed_id for change in got.changes] == ["b"]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"blueprint": "conv"}, "is a 'mlp'; it cannot become a 'conv'"),
        ({"slot": "early"}, "stands in slot 'late'; it cannot move to 'early'"),
        ({"stage": "GERMINATED"}, "GERMINATED cannot follow TRAINING"),
        ({"stage": "PROBATIONARY"}, "PROBATIONARY needs an alpha schedule"),
    ],
)
def test_refused_moves(wish: Wish, state: dict[str, str], reason: str) -> None:
    """A known seed that is asked for something impossible stays exactly as it is."""
    fields = {"seed_id": "a", "stage": "BLENDING", "blueprint": "mlp", **state}
    assert _plan([_standing("TRAINING")], [wish(**fields)]) == Plan((), (Refusal("a", reason),))


def test_malformed_wishes_leave_their_seed_alone(wish: Wish) -> None:
    """A wish with a stage or an attribution that means nothing is refused, and its seed is not culled for it."""
    newer, sick = wish("a", "TRAINING"), wish("b", "TRAINING")
    newer.stage = 99  # type: ignore[assignment] # as a newer peer could send it
    sick.attribution = float("nan")
    current = [_standing("TRAINING"), _standing("TRAINING", seed_id="b")]
    got = _plan(current, [newer, sick])
    assert got.changes == ()
    assert [r.reason for r in got.refusals] == [
        "stage 99 is unknown to this service",
        "attribution nan is not a finite number of at least 0",
    ]


def test_desired_twice(wish: Wish) -> None:
    """Of two wishes for one seed the first counts."""
    got = _plan([], [wish("a", "TRAINING", "mlp"), wish("a", "GERMINATED", "mlp")])
    assert [str(change) for change in got.changes] == ["a grafted in slot late, TRAINING"]
    assert got.refusals == (Refusal("a", "is desired twice; the first counts"),)


def test_slots_are_given_out_in_order(wish: Wish) -> None:
    """Without a slot's name a seed takes the first that is free and fits; a taken one is refused."""
    wishes = [wish("c", "TRAINING", "conv", slot=""), wish("a", "TRAINING", "mlp", slot="late")]
    got = _plan([], [*wishes, wish("b", "TRAINING", "mlp", slot="late"), wish("d", "TRAINING", "mlp", slot="")])
    assert [(c.after.seed_id, c.after.slot) for c in got.changes if c.after] == [("c", "early"), ("a", "late")]
    assert got.refusals == (Refusal("b", "slot 'late' is taken"), Refusal("d", "no slot is free"))
    assert _plan([_standing("TRAINING", seed_id="z")], [wish("z", "TRAINING", "", slot=""), wishes[0]]).refusals == ()


def test_no_free_slot_fits(wish: Wish) -> None:
    """Where slots are free but none fits, the reason is the first one's."""
    ground = Ground(("late",), GROUND.blueprints, _misfit, cull_steps=8)
    got = plan([], [wish("a", "TRAINING", "conv", slot="")], ground, STEP)
    assert got.refusals == (Refusal("a", "no free slot fits: conv hates late"),)


@pytest.mark.parametrize("leaving", [_standing("TRAINING"), _standing("PROBATIONARY", UP)])
def test_places_freed_in_the_same_plan(wish: Wish, leaving: Standing) -> None:
    """A slot whose seed goes at once, or becomes part of the host, is given out in the same plan, after it."""
    last = "FOSSILIZED" if leaving.ramp else "CULLED"
    got = _plan([leaving], [wish("b", "TRAINING", "mlp"), wish("a", last, "mlp", alpha=UP)])
    assert [change.seed_id for change in got.changes] == ["a", "b"]
    assert got.refusals == ()


def test_fading_seed_keeps_its_place(wish: Wish) -> None:
    """A culled seed that ramps down holds its slot until it has gone."""
    got = _plan([_standing("PROBATIONARY", UP)], [wish("b", "TRAINING", "mlp")])
    assert [change.kind for change in got.changes] == [ChangeKind.FADING]
    assert got.refusals == (Refusal("b", "slot 'late' is taken"),)


def test_late_schedule_begins_at_its_start(wish: Wish) -> None:
    """A seed that begins to blend after its schedule began enters at the start, and is not adjusted for it again."""
    wishes = [wish("a", "BLENDING", "mlp", alpha=RISING)]
    (change,) = _plan([_standing("TRAINING")], wishes).changes
    assert change.after is not None
    assert change.after.ramp == Ramp(0.0, 1.0, STEP, 40)
    assert _plan([change.after], wishes) == Plan((), ())


def test_reported_schedule_comes_back(wish: Wish) -> None:
    """A Kasmina that takes over schedules as they are reported does not thereby change them."""
    blending = Standing("a", "mlp", "late", stage_named("BLENDING"), Ramp(0.1, 0.7, 90, 40), Ramp(0.0, 1.0, 9, 9))
    assert _plan([blending], [wish("a", "BLENDING", "mlp", alpha=(0.1, 0.7, 90, 40))]) == Plan((), ())


def test_new_schedule_and_attribution(wish: Wish) -> None:
    """Another schedule or attribution of a blending seed is taken as it is."""
    state = wish("a", "BLENDING", "mlp", alpha=(0.5, 0.25, 100, 50))
    state.attribution = 0.5
    (change,) = _plan([_standing("BLENDING", RISING)], [state]).changes
    assert change.after is not None
    assert (change.kind, change.after.ramp, change.after.attribution) == (
        ChangeKind.ADJUSTED,
        Ramp(0.5, 0.25, 100, 50),
        0.5,
    )


def test_full_strength_is_kept(wish: Wish) -> None:
    """From the probation on, another schedule changes nothing."""
    desired = [wish("a", "PROBATIONARY", "mlp", alpha=(0.0, 0.5, 0, 0))]
    assert _plan([_standing("PROBATIONARY", UP)], desired) == Plan((), ())


@pytest.mark.parametrize("target", ["PROBATIONARY", "FOSSILIZED", "TERMINATED"])
@pytest.mark.parametrize(
    ("source", "reached"), [("GERMINATED", "BLENDING"), ("TRAINING", "BLENDING"), ("SHADOWING", "SHADOWING")]
)
def test_full_strength_waits_for_the_schedule(wish: Wish, source: str, reached: str, target: str) -> None:
    """A seed wished further than it can go without a jump goes as far as it can, and is told till when."""
    standing = _standing(source, RISING if source == "SHADOWING" else None)
    got = _plan([standing], [wish("a", target, "mlp", alpha=RISING)])
    after = got.changes[0].after if got.changes else standing
    assert after is not None
    assert stage_name(after.stage) == reached
    end, alpha = (120, "0.5") if source == "SHADOWING" else (140, "0")
    assert got.refusals == (Refusal("a", f"{target} has to wait: alpha is {alpha} and reaches 1 at step {end}"),)
    assert plan([after], [wish("a", target, "mlp", alpha=RISING)], GROUND, end).refusals == ()


def test_alpha_of_each_stage() -> None:
    """Alpha is 0 until the blending, follows the schedule in it, and is its end from the probation on."""
    alphas = {
        stage: _standing(stage, RISING).alpha(STEP)
        for stage in ("GERMINATED", "TRAINING", "BLENDING", "SHADOWING", "PROBATIONARY", "FOSSILIZED", "TERMINATED")
    }
    assert list(alphas.values()) == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0]


def test_change_in_words() -> None:
    """A change can be told in a line."""
    assert str(Change(_standing("TRAINING"), None)) == "a removed in slot late"
