from __future__ import annotations

from tolaria.training.standstill import Standstill


class Stood:
    """A standstill whose orders are written down: a number for each hold, 0 for each release."""

    def __init__(self) -> None:
        self.orders: list[int] = []
        self.it = Standstill(self.orders.append, lambda: self.orders.append(0))

    def stands(self) -> bool:
        return self.it.standing


def test_the_lane_goes_on_when_the_last_one_lets_go() -> None:
    """Two want it to stand: one order to hold, and one to release when both have let go."""
    stood = Stood()
    stood.it.want("run")
    stood.it.want("rollback")
    stood.it.let_go("run")
    assert stood.orders == [1]
    stood.it.let_go("rollback")
    assert stood.orders == [1, 0]


def test_wanting_twice_is_wanting_once() -> None:
    """Who lets go has let go, however often it has asked."""
    stood = Stood()
    stood.it.want("run")
    stood.it.want("run")
    stood.it.let_go("run")
    assert stood.orders == [1, 0]


def test_who_does_not_want_it_to_stand_cannot_let_it_go() -> None:
    """Neither while others hold it, nor while nobody does."""
    stood = Stood()
    stood.it.let_go("rollback")
    stood.it.want("run")
    stood.it.let_go("rollback")
    assert stood.orders == [1]


def test_it_stands_when_the_lane_has_answered_the_last_order() -> None:
    """An answer to an earlier order, which has been released meanwhile, says nothing of this one."""
    stood = Stood()
    stood.it.want("run")
    stood.it.let_go("run")
    stood.it.want("run")
    assert not stood.it.answered(1)
    assert not stood.stands()
    assert stood.it.answered(2)
    assert stood.stands()


def test_every_order_has_to_be_answered_anew() -> None:
    """Released, or held again, it does not stand before the lane says so; who joins a standstill finds it standing."""
    stood = Stood()
    stood.it.want("run")
    stood.it.answered(1)
    stood.it.want("rollback")
    assert stood.stands()
    stood.it.let_go("run")
    stood.it.let_go("rollback")
    assert not stood.stands()
    stood.it.want("run")
    assert not stood.it.held.is_set()


def test_it_tells_who_wants_it_to_stand() -> None:
    """This one, and anybody else."""
    stood = Stood()
    stood.it.want("run")
    assert stood.it.wanted_by("run")
    assert not stood.it.wanted_by("rollback")
    assert stood.it.others_than("rollback")
    assert not stood.it.others_than("run")
