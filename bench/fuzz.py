"""Damaged files against every reader: thousands of mutated images, tables, settings and tensors.

A child process reads one case after the other under limits of memory and time. A case is right
when it is used or refused with an `ElrError`; anything else is a finding: another exception, a
crash, a hang, a file written outside the case's own folder, a program started. Cases depend on
the seed and their number alone, so a finding can be repeated with `--only KIND:NUMBER`. Seconds
are those of the processor, so that a busy machine makes no hangs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 10  # of the processor for one case
WAIT = 60  # seconds by the clock: a case that waits for something hangs too
MEMORY = 2 * 1024**3  # bytes beyond what the child holds when it has loaded everything
CASES_A_CHILD = 1000  # then a fresh one: what it has leaked does not add up
KEPT_FINDINGS = 50
OUTCOMES = ("used", "refused", "traceback", "crash", "hang", "outside", "program")
WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
STARTS = ("subprocess.", "os.exec", "os.posix_spawn", "os.system", "os.fork", "pickle.find_class")

TOKENS = (
    *(
        "\0",
        "\n",
        "\r",
        '"',
        "'",
        ",",
        ";",
        "\t",
        "\\",
        "/",
        "../",
        "/etc/passwd",
        "C:\\",
        "\ufeff",
    ),
    *("=1+1", "{", "}", "[", "]", ":", "null", "true", "NaN", "-1", "0", "1e999", "\\ud800", "é"),
    *("9" * 30, "A" * 5000, "[" * 2000, "path", "label", "circle", "square", "train", "relabel"),
)
INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


# --- mutations ---


def mutate(content: bytes, rng: random.Random, other: bytes, is_text: bool) -> bytes:
    """Return `content` with one to eight changes; `other` lends blocks."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 8))):
        place = rng.randrange(len(data) + 1)
        if rng.random() < 0.4:
            place = min(place, rng.randrange(200))  # headers matter most
        length = rng.choice((1, 2, 4, 8, 30, 200))
        kind = rng.choice(("flip", "integer", "cut", "delete", "repeat", "lend", "token"))
        if kind == "flip" and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == "integer":
            form = rng.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
            size = struct.calcsize(form)
            number = rng.choice(INTEGERS) & ((1 << 8 * size) - 1)
            data[place : place + size] = struct.pack(form, number)
        elif kind == "cut" and rng.random() < 0.5:
            del data[place:]
        elif kind == "delete":
            del data[place : place + length]
        elif kind == "repeat":
            data[place:place] = data[place : place + length] * rng.choice((1, 2, 50))
        elif kind == "lend":
            start = rng.randrange(len(other) + 1)
            data[place:place] = other[start : start + length]
        elif kind == "token" and (is_text or rng.random() < 0.3):
            data[place:place] = rng.choice(TOKENS).encode()
    return bytes(data)


def mutate_tensors(content: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with other claims in its header."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    kind = rng.choice(("dtype", "shape", "offsets", "rename", "drop", "length", "state"))
    if kind == "dtype":
        entry["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "I8", "BOOL", "U8", "I64", "F8_E4M3", "X")
        )
    elif kind == "shape":
        entry["shape"] = rng.choice(([], [0], [-1], [10**6, 10**6], [10**12], entry["shape"][::-1]))
    elif kind == "offsets":
        entry["data_offsets"] = rng.choice(([0, 0], [0, 10**12], [10**15, 0], [-1, 4]))
    elif kind == "rename":
        header[rng.choice(("x", "", "fc.weight", "../x"))] = header.pop(name)
    elif kind == "drop":
        del header[name]
    elif kind == "state" and "__metadata__" in header:
        state = header["__metadata__"].get("state", "").encode()
        header["__metadata__"]["state"] = mutate(state, rng, state, True).decode("utf-8", "replace")
    text = json.dumps(header).encode()
    claimed = rng.choice(INTEGERS) if kind == "length" else len(text)
    return claimed.to_bytes(8, "little") + text + content[8 + length :]


def signed(content: bytes) -> bytes:
    """Return a checkpoint with the hash of what it holds, as somebody can who knows the format."""
    import safetensors.torch

    from elrcli.engine.checkpoints import _digest

    try:
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])[
            "__metadata__"
        ]
        tensors = safetensors.torch.load(content)
    except Exception:  # not a whole file any more
        return content
    metadata["sha256"] = _digest(metadata["state"], tensors)
    return safetensors.torch.save(tensors, metadata)


# --- the child ---


class Box:
    """What the child reads: seeds of every kind, and a run folder to tamper with."""

    def __init__(self, folder: Path) -> None:
        from elrcli.config import TrainConfig
        from elrcli.engine.fit import fit
        from tests.engine.conftest import TINY
        from tests.shapes import write_shapes

        self.folder = folder
        self.case = folder / "case"
        self.data = folder / "data"
        write_shapes(self.data, per_class=4)
        config = TrainConfig(data=self.data, **TINY | {"epochs": 1})
        self.run = fit(config, folder / "run")
        before, _ = sorted(self.run.checkpoint_folder.iterdir())
        before.unlink()  # it would be used instead of a damaged one
        self.manifest = self.run.manifest()
        self.seeds = self._seeds()
        self.whole = shutil.copytree(self.run.path, folder / "whole")
        self.pictures = pictures()
        self.readers = self._readers()

    def _seeds(self) -> dict[str, bytes]:
        import torch

        from elrcli.audit.run import audit_run
        from elrcli.data.manifest import manifest_text
        from elrcli.weights import read_state_dict

        audit_run(self.run.path, report=False)
        paths = list(self.manifest.paths)
        labels = [self.manifest.classes[i] for i in self.manifest.labels]
        rows = [
            f"{p},{name},{d},"
            for p, name, d in zip(paths, labels, ["keep", "remove"] * 6, strict=True)
        ]
        rows[0] = f"{paths[0]},{labels[0]},relabel,square"
        state = io.BytesIO()
        torch.save(read_state_dict(self.run.model_file), state)
        checkpoint = sorted(self.run.checkpoint_folder.iterdir())[-1]
        read = Path.read_bytes
        return {
            "csv": manifest_text(self.manifest).encode(),
            "manifest": read(self.run.manifest_file),
            "decisions": "\n".join(["path,label,decision,new_label", *rows, ""]).encode(),
            "audit": read(self.run.audit_folder / "audit.csv"),
            "metrics": read(self.run.metrics_file),
            "toml": b'backbone = "resnet18"\nlr = 0.1\nmilestones = [1, 2]\nmixup = true\n',
            "config": read(self.run.config_file),
            "classes": read(self.run.classes_file),
            "model": read(self.run.model_file),
            "checkpoint": read(checkpoint),
            "features": read(self.run.features_file),
            "pth": state.getvalue(),
        }

    def _readers(self) -> dict[str, Callable[[Path], object]]:
        from elrcli.audit.apply import plan_corrections, write_csv, write_folder
        from elrcli.audit.run import trained_evidence
        from elrcli.config import Reading, TrainConfig, read_toml
        from elrcli.data.manifest import load_data
        from elrcli.engine.features import Features
        from elrcli.engine.fit import resume
        from elrcli.engine.predict import Predictor
        from elrcli.weights import read_state_dict

        run, manifest = self.run, self.manifest
        checkpoint = sorted(run.checkpoint_folder.iterdir())[-1]

        def in_place(target: Path, *uses: Callable[[], object]) -> Callable[[Path], object]:
            def read(file: Path) -> None:
                shutil.copyfile(file, target)
                try:
                    in_turn(*uses)
                finally:
                    shutil.rmtree(run.path)
                    shutil.copytree(self.whole, run.path)

            return read

        def decisions(file: Path) -> None:
            plan = plan_corrections(manifest, file)
            write_csv(plan, self.case / "out.csv", Reading())
            write_folder(plan, self.case / "folder", mode="copy", with_split=True)

        def suggestions(file: Path) -> None:
            plan = plan_corrections(manifest, None, audit_csv=file, accept_above=0.5)
            write_folder(plan, self.case / "out", mode="symlink", with_split=False)

        return {
            "csv": lambda file: load_data(file, Reading(root=self.data)),
            "manifest": in_place(run.manifest_file, run.manifest, lambda: resume(run.path)),
            "decisions": decisions,
            "audit": suggestions,
            "metrics": in_place(run.metrics_file, run.metrics),
            "toml": lambda file: TrainConfig.from_dict({"data": "x", **read_toml(file)}),
            "config": in_place(
                run.config_file, lambda: Predictor.load(run.path), lambda: resume(run.path)
            ),
            "classes": in_place(
                run.classes_file, lambda: Predictor.load(run.path), lambda: resume(run.path)
            ),
            "model": in_place(run.model_file, lambda: Predictor.load(run.path)),
            "checkpoint": in_place(
                checkpoint, lambda: trained_evidence(run, manifest), lambda: resume(run.path)
            ),
            "features": lambda file: Features.load(file, len(manifest)),
            "pth": read_state_dict,
        }

    def content(self, kind: str, number: int, seed: int) -> tuple[str, bytes]:
        """Return the name and the bytes of one case."""
        rng = random.Random(f"{seed}/{kind}/{number}")
        if kind == "image":
            name = rng.choice(sorted(self.pictures))
            other = self.pictures[rng.choice(sorted(self.pictures))]
            return name, mutate(self.pictures[name], rng, other, False)
        whole = self.seeds[kind]
        is_tensors = kind in ("model", "checkpoint", "features")
        if is_tensors and rng.random() < 0.7:
            content = mutate_tensors(whole, rng)
            return "w.safetensors", signed(content) if kind == "checkpoint" else content
        name = "w.safetensors" if is_tensors else f"w.{'pth' if kind == 'pth' else 'csv'}"
        return name, mutate(whole, rng, whole, not is_tensors and kind != "pth")

    def read(self, kind: str, number: int, seed: int) -> str:
        """Read one case and return `used` or `refused`; a finding is raised."""
        from elrcli.audit.report import load_picture
        from elrcli.data.images import read_image
        from elrcli.errors import ElrError

        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        name, content = self.content(kind, number, seed)
        file = self.case / name
        file.write_bytes(content)
        WATCH.clear()
        try:
            if kind == "image":
                load_picture(file, 64)
                in_turn(lambda: read_image(file, 32), lambda: read_image(file))
            else:
                self.readers[kind](file)
        except ElrError as error:
            str(error).encode("utf-8", "surrogateescape")
            return "refused"
        return "used"


def in_turn(*uses: Callable[[], object]) -> None:
    """Try every use; the first refusal is raised at the end."""
    from elrcli.errors import ElrError

    refusal = None
    for use in uses:
        try:
            use()
        except ElrError as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal


def pictures() -> dict[str, bytes]:
    """Return small images in every format that Pillow writes, by file name."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels)
    modes = {mode: rgba.convert(mode) for mode in ("RGB", "L", "1", "CMYK", "P", "LA", "F", "I")}
    modes |= {"RGBA": rgba, "I;16": Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)}
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.init()
    found = {}
    for suffix, form in sorted(Image.registered_extensions().items()):
        if (
            form not in Image.SAVE
            or form in found
            or form in ("PDF", "PALM", "HDF5", "GRIB", "BUFR")
        ):
            continue
        for mode, image in modes.items():
            options: dict[str, Any] = {"exif": exif} if form in ("JPEG", "WEBP", "PNG") else {}
            if form in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
                options |= {"save_all": True, "append_images": [image]}
            buffer = io.BytesIO()
            try:
                image.save(buffer, form, **options)
            except Exception:  # this format cannot hold this mode
                continue
            found[f"{form.lower()}-{mode.replace(';', '')}{suffix}"] = buffer.getvalue()
    for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "group4", "jpeg"):
        buffer = io.BytesIO()
        image = modes["1"] if kind == "group4" else modes["RGB"]
        image.save(buffer, "TIFF", compression=kind)
        found[f"{kind}.tiff"] = buffer.getvalue()
    return found


class Watch:
    """Hears of every file opened for writing and of every program started."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.written: list[str] = []
        self.started: list[str] = []

    def clear(self) -> None:
        self.written, self.started = [], []

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(STARTS):
            self.started.append(event)
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._check(path)
        elif event in WRITES:
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                self._check(path)
            if event == "os.symlink":
                self._check(arguments[1])

    def _check(self, path: Any) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        place = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
        if self.allowed and not (place + os.sep).startswith(self.allowed):
            self.written.append(os.fsdecode(path))


WATCH = Watch()


def child(folder: Path, seed: int) -> None:
    """Answer `kind number` lines on stdin with one JSON line each."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not answer
    box = Box(folder)
    os.chdir(folder)
    for kind in ("image", *box.seeds):  # everything is loaded before the limit is set
        box.read(kind, 0, seed) if kind == "image" else None
    sys.addaudithook(WATCH.hear)
    WATCH.allowed = (os.path.realpath(folder) + os.sep, "/dev/")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"outcome": "ready"}), file=answers, flush=True)
    for line in sys.stdin:
        kind, number = line.split()
        started = time.process_time()
        try:
            answer: dict[str, Any] = {"outcome": box.read(kind, int(number), seed)}
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
            answer = {"outcome": "traceback", "error": f"{error!r:.300} {' '.join(places)}"}
        if WATCH.written:
            answer = {"outcome": "outside", "error": str(WATCH.written[:3])}
        if WATCH.started:
            answer = {"outcome": "program", "error": str(WATCH.started[:3])}
        answer["seconds"] = round(time.process_time() - started, 3)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
        answer["megabytes"] = round(peak / 1024)
        print(json.dumps(answer), file=answers, flush=True)


# --- the parent ---


class Child:
    """A child process that is started anew after a crash, a hang, or many cases."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._process: subprocess.Popen[str] | None = None
        self._cases = 0

    def ask(self, kind: str, number: int) -> dict[str, Any]:
        """Return the answer for one case."""
        if self._process is None or self._cases >= CASES_A_CHILD:
            self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._cases += 1
        self._process.stdin.write(f"{kind} {number}\n")
        self._process.stdin.flush()
        return self._answer(SECONDS, WAIT)

    def _answer(self, seconds: float, wait: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        pid, asked = self._process.pid, time.monotonic()
        latest = processor_seconds(pid) + seconds
        ready: list[Any] = []
        while not ready and time.monotonic() - asked < wait and processor_seconds(pid) < latest:
            ready, _, _ = select.select([self._process.stdout], [], [], 0.5)
        line = self._process.stdout.readline() if ready else ""
        if line:
            return dict(json.loads(line))
        self.stop()
        code = self._process.returncode
        self._process = None
        if not ready:
            return {
                "outcome": "hang",
                "error": f"more than {seconds:g} s, or {wait:g} s by the clock",
            }
        errors = (self._folder.parent / "stderr").read_text(errors="replace")[-300:]
        return {"outcome": "crash", "error": f"exit code {code}: {errors}"}

    def start(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        command = [
            sys.executable,
            __file__,
            "--child",
            str(self._folder),
            "--seed",
            str(self._seed),
        ]
        root = Path(__file__).parent.parent
        environment = os.environ | {
            "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        with (self._folder.parent / "stderr").open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self._cases = 0
        answer = self._answer(300, 900)
        if answer["outcome"] != "ready":
            raise RuntimeError(f"the child cannot be started: {answer}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def processor_seconds(pid: int) -> float:
    """Return what a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def all_cases(cases: int) -> list[tuple[str, int]]:
    """Return as many images as other files, in turn; the other kinds take turns, too."""
    kinds = "csv manifest decisions audit metrics toml config classes model checkpoint features pth"
    names = kinds.split()
    found = []
    for number in range(cases):
        found += [("image", number), (names[number % len(names)], number // len(names))]
    return found


def study(result: Path, cases: int, seed: int, minutes: float) -> dict[str, Any]:
    """Go on with the study in `result` until all cases or the minutes are used up."""
    figures: dict[str, Any] = {"seed": seed, "kinds": {}, "findings": []}
    if result.exists():
        figures = json.loads(result.read_text())
    done = {
        kind: sum(row[outcome] for outcome in OUTCOMES) for kind, row in figures["kinds"].items()
    }
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="elr-fuzz-") as temporary:
        process = Child(Path(temporary) / "box", seed)
        for kind, number in all_cases(cases):
            if number < done.get(kind, 0):
                continue
            if time.monotonic() > deadline:
                break
            answer = process.ask(kind, number)
            row = figures["kinds"].setdefault(kind, dict.fromkeys(OUTCOMES, 0))
            row[answer["outcome"]] += 1
            for name in ("seconds", "megabytes"):
                row[name] = max(row.get(name, 0), answer.get(name, 0))
            if answer["outcome"] not in ("used", "refused"):
                finding = {"case": f"{kind}:{number}", **answer}
                print(json.dumps(finding), flush=True)
                figures["findings"] = [*figures["findings"], finding][:KEPT_FINDINGS]
        process.stop()
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def print_table(figures: dict[str, Any]) -> None:
    """Print one line per kind and one for all."""
    columns = [*OUTCOMES, "seconds", "megabytes"]
    print(f"{'kind':<11}{'cases':>7}", *(f"{name:>10}" for name in columns))
    total: Counter[str] = Counter()
    for kind, row in figures["kinds"].items():
        count = sum(row[name] for name in OUTCOMES)
        print(f"{kind:<11}{count:>7}", *(f"{row[name]:>10}" for name in columns))
        total.update({"cases": count, **{name: row[name] for name in OUTCOMES}})
    print(f"{'all':<11}{total['cases']:>7}", *(f"{total[name]:>10}" for name in OUTCOMES))


def main() -> None:
    """Run the study, or one case of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000, help="images, and as many other files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600.0, help="then stop; go on next time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="read this case alone")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.seed)
    elif arguments.only:
        kind, number = arguments.only.split(":")
        with tempfile.TemporaryDirectory(prefix="elr-fuzz-") as temporary:
            process = Child(Path(temporary) / "box", arguments.seed)
            print(json.dumps(process.ask(kind, int(number))))
            process.stop()
    else:
        result = arguments.out / "fuzz" / f"seed-{arguments.seed}.json"
        print_table(study(result, arguments.cases, arguments.seed, arguments.minutes))


if __name__ == "__main__":
    main()
