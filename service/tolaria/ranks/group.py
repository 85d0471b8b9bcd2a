"""`Group`: the collective operations of the ranks that train one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import MappingProxyType
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from tolaria.config.ranks import RankEnvironment
from tolaria.errors import BrokenJobError, PeerLostError, RankFailedError, RanksDifferError
from tolaria.ranks.shared_segments import SharedSegments
from tolaria.ranks.step_word import COMPARED, StepWord

_WAIT: Final = timedelta(days=365)
"""A rank that waits for one that has gone is ended with the group; one that is only slow is not dead."""

_BEGUN: Final = "tolaria-begun"
"""Key of the store that the leader sets when it knows what to build."""

_AGREEMENT: Final = 24
"""Numbers of every agreement, so that a rank can take part in it without knowing which one it is."""

_BUCKET_BYTES: Final = 2**25
"""Small tensors are sent together, up to this size, and images in pieces of it."""


class Group:
    """One rank's part in the group. Every rank has to call the same methods in the same order; all of them block.

    Numbers and messages travel over gloo, tensors on CUDA over NCCL. Sums have the same bits on every rank.

    Attributes:
        rank: of this process, from 0, which is the leader.
        world: number of ranks.
        local_rank: among the `local_world` ranks on this machine.
        commands_due: whether the ranks exchange commands at the next step boundary; each `all_reduce_step` sets it.
        has_commands: returns whether this rank has any; set by the leader's queue of commands.
        snapshot_due: returns whether this rank wants a snapshot after the step; set where the state is sharded.
        snapshot_agreed: whether one follows this step on all ranks; each `all_reduce_step` sets it.
        rides: whether the next step's sums travel with its gradients; each `all_reduce_step` sets it.
        segments: how the others map the leader's memory; None before `connect_segments`, and on several machines.
    """

    def __init__(self, rank: int, world: int, local_rank: int = 0, local_world: int = 1) -> None:
        self.rank, self.world, self.local_rank, self.local_world = rank, world, local_rank, local_world
        self.commands_due = True
        self.has_commands: Callable[[], bool] = lambda: False
        self.snapshot_due: Callable[[], bool] = lambda: False
        self.snapshot_agreed = self.rides = False
        self.segments: SharedSegments | None = None

    @classmethod
    def join(cls, place: RankEnvironment, *, cuda: bool) -> Group:
        """Joins the group that the environment names, as torchrun sets it. Waits for all other ranks.

        Raises PeerLostError if the store of the group cannot be reached.
        """
        with _peers():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", init_method="env://", timeout=_WAIT)
        return cls(place.rank, place.world, place.local_rank, place.local_world)

    @staticmethod
    def await_leader(place: RankEnvironment) -> None:
        """Waits until the leader is about to join, which may be much later; nothing is put on a device before.

        Returns at once without an agent, whose store it is. Raises PeerLostError if the store cannot be reached.
        """
        if not place.agent:
            return
        with _peers():
            store = dist.TCPStore(  # type: ignore[attr-defined] # torch does not list it
                place.store_host, place.store_port, is_master=False, timeout=_WAIT
            )
            if place.rank == 0:
                store.set(_BEGUN, "1")
            else:
                store.wait([_BEGUN], _WAIT)

    def connect_segments(self) -> None:
        """Has the ranks map the leader's memory, if all are on one machine. Raises PeerLostError."""
        if self.local_world == self.world:
            self.segments = SharedSegments.connect(self.rank, self.world, self.broadcast_bytes)

    def leave(self) -> None:
        """Ends this rank's part: the threads of gloo must not outlive the interpreter."""
        dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this is the rank that speaks with the service."""
        return self.rank == 0

    # -- numbers and messages ----------------------------------------------------------------------------------------

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Returns the sums over all ranks, in float64. Raises PeerLostError."""
        numbers = torch.tensor(values, dtype=torch.float64)
        with _peers():
            dist.all_reduce(numbers)
        found: list[float] = numbers.tolist()
        return found

    def all_reduce_step(
        self, values: Sequence[float], must_match: Mapping[str, int], *, rides: bool = False
    ) -> list[float]:
        """Returns the sums of a step's values; sets `commands_due`, `snapshot_agreed` and `rides`.

        `must_match` are numbers that are equal on all ranks, by what they are; they are compared modulo 2**20. `rides`
        is whether this rank wants the next sums to travel with the gradients.

        Raises:
            RanksDifferError: names the first number that differs.
            RankFailedError: another rank reports a failure instead.
            PeerLostError: another rank has gone.
        """
        return self._agreed(self._agree([*values, *self._flags(rides=rides)], must_match))

    def all_reduce_ride(
        self,
        word: StepWord,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> tuple[list[float], list[Tensor | None]]:
        """Does what `all_reduce_step` and `all_reduce_gradients` do, in one operation where the gradients are few.

        There is at least one parameter, and all are of `step_word.DTYPES`. Where any rank has failed, only the first
        of the gradients are summed.
        """
        try:
            found, sums = self._sum_gradients(parameters, gradients, word)
        except RankFailedError:
            self._give_up_step()
            raise
        return self._agreed(sums), found

    def step_word(
        self, values: Sequence[float], must_match: Mapping[str, int], *, rides: bool, failed: bool = False
    ) -> StepWord:
        """Returns what `all_reduce_ride` sums."""
        return StepWord(self.rank, self.world, [*values, *self._flags(rides=rides)], must_match, failed=failed)

    def _flags(self, *, rides: bool) -> tuple[float, float, float]:
        return float(self.has_commands()), float(self.snapshot_due()), float(rides)

    def _agreed(self, sums: list[float]) -> list[float]:
        *rest, commands, snapshots, riding = sums
        self.commands_due, self.snapshot_agreed, self.rides = commands > 0, snapshots > 0, riding == self.world
        return rest

    def all(self, value: bool, must_match: Mapping[str, int] = MappingProxyType({})) -> bool:
        """Whether the value is true on every rank. Raises as `all_reduce_step`."""
        return self._agree([not value], must_match)[0] == 0

    def report_failure(self) -> None:
        """Takes part in the others' next agreement, whichever it is, by the news that this rank has failed.

        They raise RankFailedError. Raises PeerLostError.
        """
        self._give_up_step()
        self.all_reduce([1.0, *(0.0 for _ in range(_AGREEMENT - 1))])

    def _give_up_step(self) -> None:
        """Forgets what was agreed on for the next one; on all ranks, as one that has failed agrees on nothing."""
        self.snapshot_agreed = self.rides = False

    def _agree(self, values: Sequence[float], must_match: Mapping[str, int]) -> list[float]:
        places = [number % COMPARED for number in must_match.values()]
        given = [0.0, *values, *places, *(place * place for place in places)]
        failed, *found = self.all_reduce(given + [0.0] * (_AGREEMENT - len(given)))
        if failed:
            self._give_up_step()
            raise RankFailedError("a pass has raised an exception on another rank")
        sums, squares = found[len(values) :], found[len(values) + len(places) :]
        for name, place, total, square in zip(must_match, places, sums, squares, strict=False):
            if total != place * self.world or square != place * place * self.world:
                raise RanksDifferError(f"{name}: {must_match[name]} on rank {self.rank}, but not on every rank")
        return found[: len(values)]

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """Returns the greatest of each value over all ranks, in float64. Raises PeerLostError."""
        numbers = torch.tensor(values, dtype=torch.float64)
        with _peers():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        found: list[float] = numbers.tolist()
        return found

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        """Returns the values of each rank, by rank, in float64; as many on every rank. Raises PeerLostError."""
        places = [0.0] * (self.world * len(values))
        places[self.rank * len(values) : (self.rank + 1) * len(values)] = values
        found = self.all_reduce(places)
        return [found[start : start + len(values)] for start in range(0, len(found), len(values))]

    def broadcast_bytes(self, data: bytes = b"", source: int = 0) -> bytes:
        """Returns the `data` of rank `source`, by default the leader, on every rank. Raises PeerLostError."""
        size = torch.tensor([len(data)])
        with _peers():
            dist.broadcast(size, source)
            content = _of_bytes(data) if data and self.rank == source else torch.empty(int(size), dtype=torch.uint8)
            if len(content):
                dist.broadcast(content, source)
        return content.numpy().tobytes()

    def send_to_leader(self, data: bytes) -> None:
        """Sends what the leader takes with `receive_bytes` meanwhile; not empty. Raises PeerLostError."""
        with _peers():
            dist.send(_of_bytes(data), 0)

    def receive_bytes(self, source: int, size_bytes: int) -> bytes:
        """Returns what rank `source` sends to this one, the leader. Raises PeerLostError."""
        content = torch.empty(size_bytes, dtype=torch.uint8)
        with _peers():
            dist.recv(content, source)
        return content.numpy().tobytes()

    def all_gather_text(self, text: str) -> list[str]:
        """Returns what each rank says, by rank. Raises PeerLostError."""
        data = text.encode()
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(data)
        with _peers():
            dist.all_reduce(sizes)
            said = torch.zeros(self.world, max(1, int(sizes.max())), dtype=torch.uint8)
            if data:
                said[self.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            dist.all_reduce(said)
        return [row[:size].numpy().tobytes().decode() for row, size in zip(said, sizes.tolist(), strict=True)]

    def first_text(self, text: str) -> str:
        """Returns `text`, or if that is empty, the first one of another rank that is not. Raises PeerLostError."""
        said = self.all_gather_text(text)
        return text or next(filter(None, said), "")

    # -- tensors -----------------------------------------------------------------------------------------------------

    def all_reduce_tensor(self, tensor: Tensor) -> None:
        """Replaces a dense tensor of any shape, dtype and device by its sum over all ranks. Raises PeerLostError."""
        flat = tensor.view(-1)
        with _peers():
            for piece in torch.split(flat, max(1, _BUCKET_BYTES // tensor.element_size())):
                dist.all_reduce(piece)

    def all_reduce_gradients(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Returns the sums of the parameters' gradients; None where no rank has one. Raises PeerLostError.

        Gradients that are missing on some ranks count as zero.

        Raises:
            BrokenJobError: a gradient is sparse.
        """
        return self._sum_gradients(parameters, gradients, None)[0]

    def _sum_gradients(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], word: StepWord | None
    ) -> tuple[list[Tensor | None], list[float]]:
        """Sums gradients, and with the first of them a word; returns both sums."""
        found: list[Tensor | None] = [None] * len(parameters)
        sums = list[float]()
        for number, places in enumerate(_buckets(parameters)):
            kinds = parameters[places[0]]
            sizes = [parameters[place].numel() for place in places]
            riding = 0 if word is None or number else word.numbers
            flat = torch.zeros(sum(sizes) + len(places) + riding, dtype=kinds.dtype, device=kinds.device)
            *parts, present, slots = torch.split(flat, [*sizes, len(places), riding])
            if word is not None and riding:
                word.write(slots)
            for part, place, here in zip(parts, places, range(len(places)), strict=True):
                if (gradient := gradients[place]) is not None:
                    if gradient.layout != torch.strided:
                        raise BrokenJobError("a gradient is sparse; ranks sum dense ones only")
                    part.copy_(gradient.reshape(-1))
                    present[here] = 1
            with _peers():
                dist.all_reduce(flat)
            if word is not None and riding:
                sums = word.sums(slots)
                if word.failed:
                    break
            for place, part, count in zip(places, parts, present.tolist(), strict=True):
                found[place] = part.view(parameters[place].shape) if count else None
        return found, sums

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Gives the tensors of every rank the leader's values. Raises PeerLostError."""
        with torch.no_grad():
            for places in _buckets(tensors):
                chosen = [tensors[place] for place in places]
                flat = torch.cat([tensor.detach().reshape(-1) for tensor in chosen])
                with _peers():
                    dist.broadcast(flat, 0)
                if not self.leads:
                    for tensor, part in zip(chosen, torch.split(flat, [each.numel() for each in chosen]), strict=True):
                        given = part.view(tensor.shape)
                        if not torch.equal(tensor, given):  # else its version, by which changes are seen, stays
                            tensor.detach().copy_(given)

    def broadcast_buffer(self, content: memoryview) -> None:
        """Fills the memory of every rank with the leader's. Raises PeerLostError."""
        if content.nbytes:
            whole = torch.frombuffer(content, dtype=torch.uint8)
            with _peers():
                for piece in torch.split(whole, _BUCKET_BYTES):
                    dist.broadcast(piece, 0)


def _of_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yields the places of tensors that are sent together: of one dtype and device, in the order of the places."""
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for place, tensor in enumerate(tensors):
        kind = (tensor.dtype, tensor.device)
        places, size_bytes = open_buckets.get(kind, ([], 0))
        places.append(place)
        size_bytes += tensor.numel() * tensor.element_size()
        if size_bytes >= _BUCKET_BYTES:
            yield places
            places, size_bytes = [], 0
        open_buckets[kind] = places, size_bytes
    yield from (places for places, _ in open_buckets.values() if places)


def lost_peer(error: BaseException | None) -> PeerLostError | None:
    """Returns what an error of a collective operation, also within code of PyTorch's, says about another rank.

    None if it is another error. Looks also at what an error was raised from.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, PeerLostError):
            return error
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in text):
            return PeerLostError(f"{type(error).__name__}: {text.partition('. ')[0]}")
        error = error.__cause__
    return None


@contextmanager
def _peers() -> Iterator[None]:
    """Spans an operation that fails when another rank has gone."""
    try:
        yield
    except RuntimeError as error:
        if (lost := lost_peer(error)) is None:
            raise
        raise lost from error
