"""A lane without a thread: the test scripts how it answers commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from tolaria.errors import TolariaError
from tolaria.images import ImagePool, Lease, StateImage, TensorSpec
from tolaria.lane.messages import (
    Command,
    CommandDone,
    Event,
    Held,
    Hold,
    ImageCaptured,
    LaneEnded,
    Release,
    Result,
    RunEpoch,
    Stop,
)
from tolaria.run.lane_client import LaneClient
from tolaria.values.failure import Failure
from tolaria.values.training import Position

Answer: TypeAlias = Result | TolariaError
Script: TypeAlias = Answer | Callable[..., Answer | None]
"""An answer, or a function of the command that returns one; None leaves the command unanswered."""

C = TypeVar("C", bound=Command)


@dataclass
class FakeLane:
    """A `LaneHandle` that records commands and answers them immediately from `answers`, by type of command.

    Commands without an answer wait in `unanswered` for `answer`. Holds are confirmed immediately unless `holds` is
    False, and `Stop` ends the lane.
    """

    answers: dict[type[Command], Script] = field(default_factory=dict)
    global_step: int = 0
    holds: bool = True
    images: ImagePool = field(default_factory=ImagePool)
    sent: list[Command] = field(default_factory=list)
    unanswered: dict[int, Command] = field(default_factory=dict)
    forbidden: set[int] = field(default_factory=set)
    copying: bool = False
    """Whether a restore has begun to change live state: it can no longer be forbidden."""
    stopped: bool = False
    dumped: list[str] = field(default_factory=list)
    """Why stacks were asked for."""
    _events: list[Event] = field(default_factory=list)
    _notify: Callable[[], object] = lambda: None

    def start(self, notify: Callable[[], object]) -> None:
        """Delivers what was emitted before, then each event as it is emitted."""
        self._notify = notify
        if self._events:
            notify()

    def send(self, command_id: int, command: Command) -> None:
        """Records the command, and answers it if `answers` has an answer."""
        self.sent.append(command)
        match command:
            case Hold(number):
                if self.holds:
                    self.emit(Held(self.global_step, number))
            case Stop():
                self.stopped = True
                self.emit(LaneEnded(self.global_step, None))
            case Release() | RunEpoch():
                pass
            case _:
                self.unanswered[command_id] = command
                script = self.answers.get(type(command))
                answer = script(command) if callable(script) else script
                if answer is not None:
                    self.answer(answer, command_id)

    def answer(self, answer: Answer, command_id: int | None = None) -> None:
        """Answers a command; without an id, the oldest unanswered one."""
        command_id = next(iter(self.unanswered)) if command_id is None else command_id
        del self.unanswered[command_id]
        if isinstance(answer, TolariaError):
            self.emit(CommandDone(command_id, self.global_step, None, Failure.of(answer)))
        else:
            self.emit(CommandDone(command_id, self.global_step, answer, None))

    def captured(self, image: StateImage | Lease) -> ImageCaptured:
        """Returns the answer to `CaptureImage` with this image, which is put into the pool."""
        return ImageCaptured(self.images.put(image))

    def emit(self, *events: Event) -> None:
        """Delivers these events."""
        self._events += events
        self._notify()

    def take_events(self) -> list[Event]:
        """Returns the events since the last call."""
        events, self._events = self._events, []
        return events

    def forbid_restore(self, command_id: int) -> bool:
        """Forbids a restore, unless `copying` is set."""
        if not self.copying:
            self.forbidden.add(command_id)
        return not self.copying

    def dump_stacks(self, why: str) -> None:
        """Records why."""
        self.dumped.append(why)

    def close(self, timeout_s: float) -> bool:
        """Ends immediately."""
        self.stopped = True
        return True

    def sent_of(self, kind: type[C]) -> list[C]:
        """The commands of a type, oldest first."""
        return [command for command in self.sent if isinstance(command, kind)]


def started_client(lane: FakeLane, on_event: Callable[[Event], None] = lambda _event: None) -> LaneClient:
    """Returns a started client that applies events as a run does; `on_event` sees each before its future completes."""
    client = LaneClient(lane)

    def apply(events: list[Event]) -> None:
        for event in events:
            match event:
                case CommandDone():
                    pending = client.take_pending(event)
                    on_event(event)
                    if pending is not None:
                        client.settle(pending, event)
                case Held():
                    client.mark_held(event)
                    on_event(event)
                case LaneEnded():
                    client.mark_ended(event)
                    on_event(event)
                case _:
                    on_event(event)

    client.start(apply)
    return client


def small_image(global_step: int, epoch: int = 1) -> StateImage:
    """Returns an image of two numbers at this step."""
    spec = TensorSpec("parameter/w", "F32", (2,))
    return StateImage(Position(global_step, epoch), (spec,), {spec.name: memoryview(bytearray(8))}, b"{}")
