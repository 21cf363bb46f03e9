"""Tables with a row of K numbers for every sample: in which form, and in whose memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elrcli.methods.sending import sent_pinned

FORMS = ("fp32", "fp16", "top-k")
TOP = 16  # entries of a row that a top-k table keeps
# Form and whether on the host, from the one that `auto` likes best to the smallest.
CANDIDATES = (
    ("fp32", False),
    ("fp16", False),
    ("fp16", True),
    ("fp32", True),
    ("top-k", False),
    ("top-k", True),
)
SHARE = 0.25  # of free memory for tables: the rest is for networks, batches and the next checkpoint


class SampleTables(nn.Module):
    """Base of modules that keep tables [N, K] as buffers, which are part of `state_dict`.

    `form` fp32 and fp16 keep whole rows. top-k keeps the largest TOP entries of a row and, last,
    the sum of the others, [N, k + 1] fp16, with the classes [N, k] of the entries in a buffer of
    its own; the others are read as equal. Only what is stored is rounded: rows are read and worked
    on in fp32 or more.

    `on_host` leaves the tables in the host's memory wherever the module goes, and moves the rows
    of a batch to and fro.
    """

    def __init__(self, num_classes: int, form: str = "fp32", on_host: bool = False) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"table form {form!r}: choose one of {', '.join(FORMS)}")
        self.num_classes = num_classes
        self.form = form
        self.on_host = on_host
        self._tables: list[str] = []  # names of buffers
        self._expected: tuple[Tensor, Tensor] | None = None  # the same rows on host and device
        self._arriving: list[_Arriving] = []

    def add_table(self, name: str, num_samples: int) -> None:
        """Make a table of zeros, one buffer or, for top-k, a second one `<name>_classes`."""
        dtype = torch.float32 if self.form == "fp32" else torch.float16
        columns = row_columns(self.form, self.num_classes)
        self.register_buffer(name, torch.zeros(num_samples, columns, dtype=dtype))
        self._tables.append(name)
        if self.form == "top-k":
            classes = torch.zeros(num_samples, columns - 1, dtype=_id_type(self.num_classes))
            self.register_buffer(f"{name}_classes", classes)
            self._tables.append(f"{name}_classes")

    def expect(self, places: Tensor, index: Tensor) -> None:
        """Say that the rows `index` [B] of the coming step are `places` on the host.

        So a table on the host does not have to ask the device for them, which would wait.
        """
        if self.on_host:
            self._expected = places, index

    def read(self, name: str, index: Tensor) -> Tensor:
        """Return rows of a table, index [B] -> [B, K] on its device, in fp32 or more."""
        rows = self._get(name, index)
        if self.form == "top-k":
            return spread(rows, self._get(f"{name}_classes", index), self.num_classes)
        return rows if rows.dtype == torch.float64 else rows.float()

    def write(self, name: str, index: Tensor, rows: Tensor, always: Tensor | None = None) -> None:
        """Replace rows of a table, index [B] without repeats, rows [B, K] >= 0.

        A top-k table keeps the entry of the class `always` [B], however small.
        """
        if self.form == "top-k":
            rows, classes = largest(rows, self.get_buffer(name).shape[1] - 1, always)
            self._put(f"{name}_classes", index, classes)
        self._put(name, index, rows)

    def settle(self) -> None:
        """Take over the rows that were still on their way from the device."""
        for rows in self._arriving:
            rows.event.synchronize()
            rows.table.index_copy_(0, rows.places, rows.staged)
        self._arriving.clear()

    def _get(self, name: str, index: Tensor) -> Tensor:
        table = self.get_buffer(name)
        if not self.on_host:
            return table.index_select(0, index)
        self.settle()
        rows = table.index_select(0, self._places(index))
        return sent_pinned(rows, index.device)

    def _put(self, name: str, index: Tensor, rows: Tensor) -> None:
        table = self.get_buffer(name)
        rows = rows.to(table.dtype)
        if not self.on_host:
            table.index_copy_(0, index, rows)
        elif index.device.type == "cuda":
            # They are taken over at the next step. By then the copy is done, or the device still
            # has the backward pass of this one to work on.
            staged = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            staged.copy_(rows, non_blocking=True)
            event = torch.cuda.current_stream(index.device).record_event()
            self._arriving.append(_Arriving(event, table, self._places(index), staged))
        else:
            table.index_copy_(0, self._places(index), rows.to(table.device))

    def _places(self, index: Tensor) -> Tensor:
        if self._expected is not None and self._expected[1] is index:
            return self._expected[0]
        return index.cpu()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SampleTables:
        """Move and convert all but tables on the host."""
        names = self._tables if self.on_host else []
        staying = {name: self._buffers.pop(name) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(staying)
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.settle()
        for name in self._tables:
            found = state.get(f"{prefix}{name}")
            if name.endswith("_classes") and found is not None and found.numel() > 0:
                lowest, highest = (int(end) for end in found.aminmax())
                if lowest < 0 or highest >= self.num_classes:
                    raise ValueError(f"{prefix}{name} names classes that do not exist")
        super()._load_from_state_dict(state, prefix, *args)


@dataclass(frozen=True, eq=False)
class _Arriving:
    """Rows on their way from the device to a table on the host."""

    event: torch.cuda.Event  # after the copy
    table: Tensor
    places: Tensor  # [B]
    staged: Tensor  # [B, ...] in pinned memory


def spread(values: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Return whole rows of top-k ones: values [B, k + 1], classes [B, k] -> [B, K] fp32."""
    values = values.float()
    rest = values[:, -1:] / max(num_classes - classes.shape[1], 1)
    return rest.repeat(1, num_classes).scatter_(1, classes.long(), values[:, :-1])


def largest(rows: Tensor, k: int, always: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the k largest entries with the sum of the others, [B, k + 1], and classes [B, k].

    The entry of the class `always` [B] is among them.
    """
    order = rows if always is None else rows.scatter(1, always[:, None], torch.inf)
    classes = order.topk(k, dim=1).indices
    values = rows.gather(1, classes)
    rest = (rows.sum(dim=1, keepdim=True) - values.sum(dim=1, keepdim=True)).clamp_min(0)
    return torch.cat([values, rest], dim=1), classes


def row_columns(form: str, num_classes: int) -> int:
    """Return how many numbers a row has, without the classes of a top-k table."""
    return min(TOP, num_classes) + 1 if form == "top-k" else num_classes


def row_bytes(form: str, num_classes: int) -> int:
    """Return the memory of one row."""
    columns = row_columns(form, num_classes)
    if form == "top-k":
        return 2 * columns + _id_type(num_classes).itemsize * (columns - 1)
    return columns * (4 if form == "fp32" else 2)


def _id_type(num_classes: int) -> torch.dtype:
    return torch.int16 if num_classes <= 2**15 else torch.int32


@dataclass(frozen=True)
class TableChoice:
    """The form and place of the tables of a run, and what to say about it, if anything."""

    form: str = "fp32"
    on_host: bool = False
    note: str | None = None


def choose_tables(
    form: str,
    place: str,
    *,
    rows: int,
    classes: int,
    tables: int,
    device: str,
    free: tuple[int, int],
) -> TableChoice:
    """Return the first of `CANDIDATES` that takes at most a quarter of the free memory.

    form fp32, fp16, top-k or auto; place device, host or auto; `free` bytes on the `device` and
    on the host. Where nothing is small enough it is the last one that may be.
    """
    size = {kind: tables * rows * row_bytes(kind, classes) for kind in FORMS}
    places = [place == "host"] if place != "auto" else [False] if device == "cpu" else [False, True]
    candidates = [
        (kind, on_host)
        for kind, on_host in CANDIDATES
        if form in ("auto", kind) and on_host in places
    ]
    fitting = [one for one in candidates if size[one[0]] <= SHARE * free[one[1]]]
    kind, on_host = (fitting or candidates[-1:])[0]
    note = None
    if (kind, on_host) != ("fp32", False):
        where = "in host memory" if on_host else f"on {device}"
        room = "" if device == "cpu" else f" on {device} and {gigabytes(free[1])} on the host"
        note = (
            f"targets and predictions of {rows:,} samples and {classes:,} classes are kept as"
            f" {kind} {where}: {gigabytes(size[kind])}, as fp32 {gigabytes(size['fp32'])};"
            f" {gigabytes(free[0])} are free{room}"
        )
    return TableChoice(kind, on_host, note)


def gigabytes(size: int) -> str:
    """Return a size as text."""
    return f"{size / 1e9:.2f} GB"
