"""`elr doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from elrcli.cli.options import Device, Json
from elrcli.files import readable_json

if TYPE_CHECKING:
    from elrcli.engine.doctor import DoctorReport


def doctor(
    device: Device = "auto",
    online: Annotated[
        bool,
        typer.Option("--online", help="Also ask whether pretrained weights can be fetched."),
    ] = False,
    json_output: Json = False,
) -> None:
    """What works on this machine: device, memory, weights.

    Each is tried out. The exit code is 1 if a training cannot work here.
    """
    from elrcli import api
    from elrcli.cli import console

    report = api.doctor(device=device, online=online)
    if json_output:
        console.result(readable_json(report.to_dict(), indent=2))
    else:
        console.result("\n".join(report_lines(report)))
    if not report.can_train:
        raise typer.Exit(1)


def report_lines(report: DoctorReport) -> list[str]:
    """Return one line per check, and one with the remedy where something is wrong."""
    from elrcli.cli.console import aligned

    rows = [(check.status, check.name, check.finding) for check in report.checks]
    table = aligned(("", "", ""), rows, left=3)[1:]
    indent = " " * table[0].index(report.checks[0].finding)
    lines = []
    for check, line in zip(report.checks, table, strict=True):
        lines.append(line)
        if check.remedy:
            lines.append(f"{indent}{check.remedy}")
    if report.can_train:
        place = f"on {report.device} in {report.precision}"
        start = "" if report.has_weights else ", with --weights FILE or --no-pretrained"
        return [*lines, "", f"A training can work here, {place}{start}."]
    return [*lines, "", "A training cannot work here."]
