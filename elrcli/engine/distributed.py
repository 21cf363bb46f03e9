"""Several processes that train as one: who they are, what they tell each other, how they end.

A process that runs alone is a group of one: nothing is sent and nothing waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from elrcli.engine.launch import launch
from elrcli.errors import ElrError, EndedByAnother, TrainingError, first_line
from elrcli.methods.base import Method

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

TIMEOUT = timedelta(minutes=10)  # for one exchange: longer than any epoch's files take to write
BUCKET = 25 * 1024**2  # bytes of gradient sent at once, as torch's DistributedDataParallel has it

Item = TypeVar("Item")
_meetings = itertools.count()


@dataclass(frozen=True)
class Group:
    """All processes of one training. Every method is called by all of them, in the same order."""

    rank: int = 0
    processes: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def gather(self, item: Item) -> list[Item]:
        """Return the items of all processes, by rank."""
        items: list[Any] = [item]
        if self.processes > 1:
            items = [None] * self.processes
            dist.all_gather_object(items, item)
        return items

    def from_first(self, make: Callable[[], Item]) -> Item:
        """Let the first process make something and return it everywhere."""
        if self.processes == 1:
            return make()
        made = [make() if self.is_first else None]
        dist.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]

    def in_turn(self, items: Iterator[Item]) -> Iterator[list[Item]]:
        """Yield the first items of all processes together, then the second ones, and so on.

        All processes have equally many.
        """
        return map(self.gather, items)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums of small `values` over all processes, float64 on the CPU."""
        sums = values.detach().cpu().double()
        if self.processes > 1:
            dist.all_reduce(sums)
        return sums

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors by their means over all processes."""
        if self.processes == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        dist.all_reduce(flat)
        pieces = (flat / self.processes).split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

    @torch.no_grad()
    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the first process."""
        for tensor in tensors if self.processes > 1 else ():
            whole = tensor.contiguous()
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)

    def whole(self, part: Tensor, owner: np.ndarray) -> Tensor:
        """Return the rows of all processes in manifest order, on the CPU of the first process.

        part [n, ...] the rows of this process, owner [N] the process of each row -> [N, ...];
        the part itself on the other processes, and where there is one alone, wherever it lies.
        """
        if self.processes == 1:
            return part.detach()
        part = part.detach().cpu().contiguous()
        if not self.is_first:
            dist.send(part, dst=0)
            return part
        whole = torch.empty(len(owner), *part.shape[1:], dtype=part.dtype)
        for rank in range(self.processes):
            rows = torch.from_numpy(np.flatnonzero(owner == rank))
            piece = part
            if rank != self.rank:
                piece = torch.empty(len(rows), *part.shape[1:], dtype=part.dtype)
                dist.recv(piece, src=rank)
            whole[rows] = piece
        return whole

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)


def current_group() -> Group:
    """Return the processes that have met in `joined`; outside of it this one is alone."""
    if dist.is_available() and dist.is_initialized():
        return Group(dist.get_rank(), dist.get_world_size())
    return Group()


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes that torchrun started; inside another such context, stay with them.

    Also a decorator. NCCL carries what lies on a GPU, gloo the rest. If processes fail, the first
    one raises its own error, all others `EndedByAnother`. Raises TrainingError if they cannot meet.
    """
    if launch().processes == 1 or (dist.is_available() and dist.is_initialized()):
        yield
        return
    store = _meet()
    group = current_group()
    try:
        yield
        group.wait()  # what the first process has written is there for all
    except GeneratorExit:  # whoever reads predictions has enough
        raise
    except BaseException as error:
        is_first_to_fail = _first_to_fail(store)
        if dist.group.WORLD is not None:
            dist.group.WORLD.abort()  # or what waits on a GPU would wait for ever
        if not is_first_to_fail:
            code = error.exit_code if isinstance(error, ElrError) else 1
            raise EndedByAnother(code) from error
        if is_lost(error):
            raise TrainingError(
                f"another of the {group.processes} processes ended and did not say why. It may "
                "have been killed for lack of memory, or its machine cannot be reached."
                f"{what_nccl_says(error)}"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Tell whether an error only says that another process is gone."""
    if not dist.is_available() or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def what_nccl_says(error: BaseException) -> str:
    """Return the words of NCCL, after a space: the cause may be in this process as well."""
    if not isinstance(error, dist.DistBackendError):
        return ""
    words = str(error).rpartition("Last error:")[2].strip() or str(error)
    return f" NCCL says: {' '.join(words.split())[:300]}"


def _meet() -> Store:
    """Start the default process group; return a store in which processes leave a last word."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store: Store | None = None
    try:
        found, rank, processes = next(rendezvous("env://", timeout=TIMEOUT))
        store = PrefixStore(f"elr/{next(_meetings)}", found)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=processes, timeout=TIMEOUT
        )
    except (ValueError, RuntimeError) as error:
        if store is not None and not _first_to_fail(store):  # it failed while this one was coming
            raise EndedByAnother(1) from error
        raise TrainingError(
            f"the processes cannot meet ({first_line(error)}). Start them with torchrun."
        ) from error
    return store


def _first_to_fail(store: Store) -> bool:
    try:
        return int(store.add("failed", 1)) == 1
    except RuntimeError:  # its host is gone
        return True


SAVE = 1  # told like a signal, less than SIGINT and SIGTERM: save and go on


class SharedSignal:
    """Which signal any process has received, learned by all of them at the same step.

    Also `SAVE`, which only the first process tells, by its clock.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._sent: tuple[dist.Work, Tensor] | None = None

    def exchange(self, own: int | None) -> int | None:
        """Tell the others `own` and return what any of them told at the last call.

        The answer comes one call late, so that nobody waits for it.
        """
        if self._group.processes == 1:
            return own
        heard = 0
        if self._sent is not None:
            work, number = self._sent
            work.wait()
            heard = int(number)
        number = torch.tensor(own or 0)
        work = dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._sent = work, number
        return heard or None


class _Bucket:
    """Gradients of some parameters of one network, sent together."""

    def __init__(self, network: int) -> None:
        self.network = network
        self.parameters: list[nn.Parameter] = []
        self.bytes = 0
        self.missing = 0  # gradients that this backward pass has not made yet
        self.sent: tuple[dist.Work, Tensor] | None = None


class GradientMean:
    """Gradients averaged over the images of all processes, sent while backward still runs.

    Every process has the gradient of a mean over its own images. These are weighed by how many
    images they are of, network by network; a network or parameter that a process has no
    gradient of counts as zero images.
    """

    def __init__(self, group: Group, networks: Sequence[nn.Module]) -> None:
        self._buckets: list[_Bucket] = []
        self._images: Tensor | None = None  # [networks] of this process in this step
        self._is_last = False
        self._sent = 0
        if group.processes == 1:
            return
        for number, network in enumerate(networks):
            bucket = _Bucket(number)
            for parameter in network.parameters():
                if not parameter.requires_grad:
                    continue
                if bucket.bytes > BUCKET:
                    self._buckets.append(bucket)
                    bucket = _Bucket(number)
                bucket.parameters.append(parameter)
                bucket.bytes += parameter.numel() * parameter.element_size()
                parameter.register_post_accumulate_grad_hook(partial(self._made, bucket))
            self._buckets += [bucket] if bucket.parameters else []
        self._buckets.reverse()  # the last layers have their gradients first
        self._networks = len(networks)

    def expect(self, method: Method, index: Tensor, *, is_last: bool) -> None:
        """Say before a backward pass which rows it is for, and if it is the last of its step."""
        if self._buckets:
            images = method.images_per_network(index).float().expand(self._networks)
            self._images = images if self._images is None else self._images + images
            self._is_last = is_last
            for bucket in self._buckets:
                bucket.missing = len(bucket.parameters)

    def forget(self) -> None:
        """Let go of what backward passes of an unfinished step have found."""
        self._images = None

    @torch.no_grad()
    def finish(self) -> None:
        """Make every gradient the mean over all processes."""
        self._is_last = False
        while self._sent < len(self._buckets):
            self._send_next()
        for bucket in self._buckets:
            assert bucket.sent is not None
            work, flat = bucket.sent
            work.wait()
            mean = flat[:-1] / flat[-1].clamp_min(1)
            sizes = [parameter.numel() for parameter in bucket.parameters]
            for parameter, piece in zip(bucket.parameters, mean.split(sizes), strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(piece.view_as(parameter))
            bucket.sent = None
        self._images = None
        self._sent = 0

    def _made(self, bucket: _Bucket, parameter: Tensor) -> None:
        """Follow backward: send what is whole, in the same order on every process."""
        if self._is_last:
            bucket.missing -= 1
            while self._sent < len(self._buckets) and self._buckets[self._sent].missing == 0:
                self._send_next()

    @torch.no_grad()
    def _send_next(self) -> None:
        bucket = self._buckets[self._sent]
        self._sent += 1
        device = bucket.parameters[0].device
        images = torch.zeros(1, device=device)
        if self._images is not None:
            images = self._images[bucket.network].reshape(1)
        pieces = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in bucket.parameters
        ]
        flat = torch.cat([*(piece.flatten() for piece in pieces), torch.ones(1, device=device)])
        flat *= images
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        bucket.sent = work, flat


def names_per_sample(module: nn.Module) -> set[str]:
    """Return the names in `state_dict` of tensors [n, ...] with one row per sample."""
    return {
        f"{place}.{name}".lstrip(".")
        for place, part in module.named_modules()
        for name in getattr(part, "per_sample", ())
    }


def whole_state(module: nn.Module, group: Group, owner: np.ndarray) -> dict[str, Tensor]:
    """Return `state_dict` with the samples of all processes, whole on the first one."""
    per_sample = names_per_sample(module)
    return {
        name: group.whole(tensor, owner) if name in per_sample else tensor
        for name, tensor in module.state_dict().items()
    }


def own_state(module: nn.Module, state: dict[str, Tensor], rows: np.ndarray, samples: int) -> Any:
    """Return from the state of all `samples` what this process keeps: its `rows`.

    Raises ValueError if a table has another length.
    """
    own = dict(state)
    for name in names_per_sample(module) & own.keys():
        if len(own[name]) != samples:
            raise ValueError(f"{name} has {len(own[name])} rows for {samples} samples")
        own[name] = own[name][rows]
    return own


def batch_statistics(module: nn.Module) -> list[Tensor]:
    """Return what every process collects of its own images: BatchNorm's means and variances."""
    kept = ("running_mean", "running_var")
    return [tensor for name, tensor in module.named_buffers() if name.endswith(kept)]
