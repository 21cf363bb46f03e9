"""The checks of `elr doctor`: each does a small piece of what training does, and cleans up."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn

from elrcli.data.images import read_image
from elrcli.engine.device import (
    PRECISIONS,
    Runtime,
    blank_images,
    choose_runtime,
    usable_cores,
    worker_count,
)
from elrcli.engine.doctor import OK, PROBLEM, WARNING, Check
from elrcli.engine.export import check_packages
from elrcli.engine.graphs import compute_again, replay_on_gpu
from elrcli.engine.memory import free_host_memory, free_memory, total_host_memory, total_memory
from elrcli.engine.tensorboard import writer_class
from elrcli.errors import ElrError, ModelError, first_line
from elrcli.models import create_network, lay_out, preprocessing, weights_cache
from elrcli.run import RUNS
from elrcli.tables import table_format
from elrcli.weights import why_hub_is_silent

BACKBONE, SIDE, IMAGES = "test_resnet", 32, 4  # of the trial steps
LITTLE_MEMORY = 2e9  # bytes
LITTLE_SHARED_MEMORY = 1e9
LITTLE_DISK = 1e9
SHARED_MEMORY = Path("/dev/shm")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CPU_INFO = Path("/proc/cpuinfo")
# Files of a container: the time on all cores that it may use in a period, and the period.
CPU_QUOTAS = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)
FORMATS = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WebP": ".webp",
    "AVIF": ".avif",
    "TIFF": ".tif",
    "GIF": ".gif",
    "BMP": ".bmp",
    "JPEG 2000": ".jp2",
}
EXTRAS: dict[str, Callable[[], object]] = {  # raise where a package is missing
    "parquet": lambda: table_format(Path("table.parquet")),
    "tensorboard": writer_class,
    "onnx": check_packages,
}
NO_GPU = "torch finds no GPU"
SECONDS_ONLINE = 5.0
SECONDS_COMPILING = 20.0


def device_check(asked: str) -> tuple[Check, Runtime | None]:
    """Choose the device as a training does, and name it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on drivers; gpu_checks says it
            runtime = choose_runtime(asked)
    except (ElrError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, ModelError) else error
        if isinstance(cause, RuntimeError):  # a GPU that is there and does not work
            problem, remedy = first_line(cause), _gpu_remedy(first_line(cause))
        else:
            problem, _, remedy = str(error).partition(". ")
        return Check("device", PROBLEM, problem, remedy), None
    facts = _device_facts(runtime.device)
    words = [str(runtime.device), facts["name"]]
    if "compute_capability" in facts:
        words.append(f"compute capability {facts['compute_capability']}")
    if facts.get("driver"):
        words.append(f"driver {facts['driver']}")
    if facts["built_for"]:
        words.append(f"torch for {facts['built_for']}")
    if facts["gpus"] > 1:
        words.append(f"one of {facts['gpus']} GPUs")
    return Check("device", OK, ", ".join(filter(None, words)), None, facts), runtime


def _device_facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": _cpu_name(), "built_for": _built_for(), "gpus": 0}
    if device.type == "mps":
        facts |= {"name": "Apple GPU", "gpus": 1}
    elif device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        facts |= {
            "name": torch.cuda.get_device_name(device),
            "gpus": torch.cuda.device_count(),
            "compute_capability": f"{major}.{minor}",
            "driver": _driver(),
        }
    return facts


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", CPU_INFO.read_text(), re.MULTILINE)
    except (OSError, ValueError):
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _built_for() -> str | None:
    """Return the kind of GPU software that this torch was built for."""
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    return None if torch.version.hip is None else f"ROCm {torch.version.hip}"


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, where the kernel tells it."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", NVIDIA_DRIVER.read_text())
    except (OSError, ValueError):
        return None
    return found[0] if found else None


def gpu_checks(asked: str, runtime: Runtime | None) -> list[Check]:
    """Say why a GPU cannot be used, where one was wanted and none is usable."""
    is_wanted = asked.partition(":")[0] in ("auto", "cuda")
    if not is_wanted or (runtime is not None and runtime.device.type != "cpu"):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():  # what was asked for is another one than there is
            return []
    facts = {"built_for": _built_for(), "driver": _driver()}
    if facts["built_for"] is None:
        if asked == "auto" and facts["driver"] is None:
            return []
        problem = f"torch {torch.__version__} is built for CPUs only"
        return [Check("GPU", WARNING, problem, "Install a build of torch for CUDA.", facts)]
    problem = _why_cuda_does_not_start()
    return [Check("GPU", WARNING, problem, _gpu_remedy(problem), facts)]


def _why_cuda_does_not_start() -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return first_line(error).partition(". ")[0]
    return NO_GPU


def _gpu_remedy(problem: str) -> str:
    if "no NVIDIA driver" in problem:
        return "For a GPU, install NVIDIA's driver; start a container with --gpus all."
    if "too old" in problem:
        return f"Update NVIDIA's driver, or install a torch for an older one than {_built_for()}."
    if "no kernel image" in problem:
        return "This torch is not built for such a GPU. Install a build that is."
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and ("No CUDA GPUs" in problem or problem == NO_GPU):
        return f"CUDA_VISIBLE_DEVICES is '{hidden}': unset it, or name a GPU that there is."
    return "See with nvidia-smi whether the GPU is there and free, or take --device cpu."


def precision_check(asked: str, runtime: Runtime) -> Check:
    """Take a training step in every precision."""
    failed: dict[str, str] = {}
    for precision in PRECISIONS:
        try:
            take_step(choose_runtime(asked, precision))
        except ElrError as error:
            failed[precision] = str(error)
        except Exception as error:  # torch raises many unrelated kinds here
            failed[precision] = first_line(error)
    works = [precision for precision in PRECISIONS if precision not in failed]
    facts = {"works": works, "failed": failed, "auto": runtime.precision}
    if runtime.precision not in failed:
        others = f", {_listed(list(failed), 'or')} does not" if failed else ""
        finding = f"{_works(works)}{others}; auto takes {runtime.precision}"
        return Check("precision", OK, finding, None, facts)
    problem = f"a step in {runtime.precision} fails: {failed[runtime.precision]}"
    remedy = f"Add --precision {works[0]}." if works else _gpu_remedy(problem)
    return Check("precision", PROBLEM, problem, remedy, facts)


def take_step(runtime: Runtime) -> None:
    """Go forward and backward through a small network; raises what goes wrong."""
    with torch.random.fork_rng([runtime.device] if runtime.device.type == "cuda" else []):
        network = _small_network(runtime)
        images = blank_images(IMAGES, runtime, preprocessing(network, SIDE))
        _learn_from(network, images, runtime)


def _small_network(runtime: Runtime) -> nn.Module:
    network = create_network(BACKBONE, 2, image_size=SIDE)
    return lay_out(network.train(), runtime.device)


def _learn_from(network: nn.Module, images: torch.Tensor, runtime: Runtime) -> None:
    labels = torch.arange(len(images), device=images.device) % 2
    with runtime.autocast():
        logits = network(images)
    loss = nn.functional.cross_entropy(logits.float(), labels)
    loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    numbers = torch.stack([loss.detach(), *(gradient.float().sum() for gradient in gradients)])
    if not gradients or not numbers.isfinite().all():
        raise ArithmeticError("loss or gradient is not a finite number")


def graphs_check(runtime: Runtime) -> Check:
    """Let a CUDA GPU replay a step."""
    with torch.random.fork_rng([runtime.device]):
        network = _small_network(runtime)
        prepared = preprocessing(network, SIDE)
        problem = replay_on_gpu([network], [network], {IMAGES}, {IMAGES}, runtime, prepared)
        if problem is None:
            try:
                _learn_from(network, blank_images(IMAGES, runtime, prepared), runtime)
            except (RuntimeError, ArithmeticError) as error:
                problem = first_line(error)
            finally:
                compute_again([network])
    if problem is None:
        return Check("CUDA graphs", OK, "a replayed step works", None, {"usable": True})
    return Check(
        "CUDA graphs",
        WARNING,
        f"a step cannot be replayed: {problem}",
        "Training goes on without them, somewhat slower. Update NVIDIA's driver.",
        {"usable": False},
    )


def gpu_memory_check(device: torch.device) -> Check:
    """Say how much memory a GPU has left."""
    free, total = free_memory(device), total_memory(device)
    facts = {"free": free, "total": total}
    finding = f"{_gb(free)} of {_gb(total)} free on {device}"
    if free < LITTLE_MEMORY or free < total / 2:
        remedy = "End other programs (nvidia-smi lists them). --batch-size auto takes what is left."
        return Check("GPU memory", WARNING, finding, remedy, facts)
    return Check("GPU memory", OK, finding, None, facts)


def memory_check() -> Check:
    """Say how much memory the machine or the container has left."""
    free, total = free_host_memory(), total_host_memory()
    facts = {"free": free, "total": total}
    finding = f"{_gb(free)} of {_gb(total)} free"
    if free < LITTLE_MEMORY:
        remedy = "End other programs, or allow the container more. Lower --workers."
        return Check("memory", WARNING, finding, remedy, facts)
    return Check("memory", OK, finding, None, facts)


def shared_memory_checks() -> list[Check]:
    """Say how much memory processes can share, where the system has a limit of its own for it."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:  # not Linux
        return []
    facts = {"free": usage.free, "total": usage.total}
    finding = f"{_gb(usage.free)} of {_gb(usage.total)} free in {SHARED_MEMORY}"
    remedy = "Start the container with --shm-size 8g. Until then: --workers 0 --cache none."
    reason = why_not_writable(SHARED_MEMORY)
    if reason is not None:
        finding = f"{SHARED_MEMORY} cannot be written: {reason}"
    elif usage.total >= LITTLE_SHARED_MEMORY:
        return [Check("shared memory", OK, finding, None, facts)]
    return [Check("shared memory", WARNING, finding, remedy, facts)]


def cores_check() -> Check:
    """Say how many cores this process may use, and how many processes load images."""
    cores, workers, quota = usable_cores(), worker_count(None), _container_cores()
    facts = {"usable": cores, "all": os.cpu_count(), "container": quota, "workers": workers}
    finding = f"{cores} of {os.cpu_count()} usable, {_counted(workers, 'loading process')}"
    if quota is not None and quota < workers:
        return Check(
            "cores",
            WARNING,
            f"{finding}; the container may use {quota:g}",
            f"Add --workers {max(1, int(quota))}.",
            facts,
        )
    return Check("cores", OK, finding, None, facts)


def _container_cores() -> float | None:
    """Return how many cores' worth of time the container may use, None without a limit."""
    for files in CPU_QUOTAS:
        try:
            quota, period = " ".join(Path(file).read_text() for file in files).split()
            if int(quota) > 0:
                return int(quota) / int(period)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def compile_check(runtime: Runtime | None) -> Check:
    """Compile a line that needs Python's headers, as --compile will."""
    is_gpu = runtime is not None and runtime.device.type == "cuda"
    command = _compiler(is_gpu)
    problem, remedy = None, "Install gcc, g++ and the headers of Python, or leave --compile out."
    if command is None:
        problem = f"no {'C' if is_gpu else 'C++'} compiler"
    elif is_gpu and importlib.util.find_spec("triton") is None:
        problem, remedy = "the package triton is missing", "Install it: pip install triton"
    else:
        problem = _why_it_does_not_compile(command)
    facts = {"compiler": command}
    if problem is not None:
        return Check("torch.compile", WARNING, f"--compile cannot work: {problem}", remedy, facts)
    return Check("torch.compile", OK, f"{command} works", None, facts)


def _compiler(is_gpu: bool) -> str | None:
    """Return the command that torch would take: of C for its GPU kernels, of C++ for the CPU's."""
    named = os.environ.get("CC" if is_gpu else "CXX", "").strip()
    names = ("gcc", "clang") if is_gpu else ("g++", "clang++")
    return named or next(filter(shutil.which, names), None)


def _why_it_does_not_compile(command: str) -> str | None:
    with tempfile.TemporaryDirectory(prefix="elr-doctor-") as folder:
        source = Path(folder) / "line.cpp"
        source.write_text("#include <Python.h>\n")
        headers = sysconfig.get_path("include")
        try:
            program, *words = shlex.split(command)
            words += ["-x", "c++" if "++" in program else "c", f"-I{headers}", "-c", str(source)]
            done = subprocess.run(
                [program, *words, "-o", str(Path(folder) / "line.o")],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS_COMPILING,
            )
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            return first_line(error)  # ValueError: a command with half a quotation
    if done.returncode == 0:
        return None
    problems = (line.partition("error: ")[2] for line in done.stderr.splitlines())
    return next(filter(None, problems), "the compiler fails")


def image_check() -> Check:
    """Write a small image in every format and read it as a training does."""
    pixels = np.full((16, 16, 3), 128, dtype=np.uint8)
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="elr-doctor-") as folder:
        for name, suffix in FORMATS.items():
            file = Path(folder) / f"image{suffix}"
            try:
                Image.fromarray(pixels).save(file)
                read_image(file)
            except Exception as error:  # Pillow raises nearly anything for what it cannot do
                failed[name] = first_line(error)
        jpeg = Path(folder) / "image.jpg"
        is_fast = jpeg.is_file() and _opencv_reads(jpeg)
    works = [name for name in FORMATS if name not in failed]
    facts = {"works": works, "failed": failed, "opencv_jpeg": is_fast}
    if failed:
        status = PROBLEM if "JPEG" in failed or "PNG" in failed else WARNING
        problem = f"no {_listed(list(failed), 'or')}: {next(iter(failed.values()))}"
        remedy = "pip install --force-reinstall pillow, or convert such files."
        return Check("images", status, problem, remedy, facts)
    if not is_fast:
        remedy = "Install it again: pip install --force-reinstall opencv-python-headless"
        problem = "OpenCV does not decode JPEG: Pillow does, more slowly"
        return Check("images", WARNING, problem, remedy, facts)
    return Check("images", OK, _listed(works), None, facts)


def _opencv_reads(jpeg: Path) -> bool:
    data = np.frombuffer(jpeg.read_bytes(), dtype=np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR) is not None


def weights_check() -> Check:
    """Look into the cache of pretrained weights, without the network."""
    name, otherwise = "weights cache", "or use --weights FILE or --no-pretrained."
    try:
        cache = weights_cache()
    except ModelError as error:
        problem, _, remedy = str(error).partition(". ")
        return Check(name, WARNING, problem, f"{remedy.rstrip('.')}, {otherwise}")
    reason = why_not_writable(cache.folder)
    facts = {
        "folder": str(cache.folder),
        "size": cache.size,
        "backbones": list(cache.backbones),
        "writable": reason is None,
        "offline": cache.is_offline,
    }
    finding = f"{_counted(len(cache.backbones), 'backbone')}, {_gb(cache.size)} in {cache.folder}"
    if cache.is_offline:
        finding += ", HF_HUB_OFFLINE is set"
        if not cache.backbones:
            remedy = f"Unset HF_HUB_OFFLINE, {otherwise}"
            return Check(name, WARNING, finding, remedy, facts)
    elif reason is not None:
        remedy = f"Set HF_HOME to a folder that you can write, {otherwise}"
        return Check(name, WARNING, f"{finding}, which cannot be written: {reason}", remedy, facts)
    elif not cache.backbones:
        finding += ": the first training has to fetch its weights"
    return Check(name, OK, finding, None, facts)


def online_check() -> Check:
    """Ask the hub of pretrained weights for an answer."""
    reason = why_hub_is_silent(SECONDS_ONLINE)
    facts = {"answers": reason is None}
    if reason is None:
        return Check("weights online", OK, "the hub answers", None, facts)
    remedy = "Check network and proxy, or use --weights FILE or --no-pretrained."
    return Check("weights online", WARNING, f"the hub does not answer: {reason}", remedy, facts)


def extras_check() -> Check:
    """Load what optional features need."""
    missing = []
    for name, load in EXTRAS.items():
        try:
            load()
        except Exception:  # missing, or at odds with another package
            missing.append(name)
    installed = [name for name in EXTRAS if name not in missing]
    parts = [_listed(installed)] if installed else []
    if missing:
        parts.append(f"without {_listed(missing)}: pip install 'elr[{','.join(missing)}]'")
    facts = {"installed": installed, "missing": missing}
    return Check("extras", OK, "; ".join(parts), None, facts)


def runs_check() -> Check:
    """Try to write where runs go, under the current folder."""
    reason = why_not_writable(RUNS)
    if reason is not None:
        problem = f"{RUNS}/ cannot be written: {reason}"
        remedy = "Change to a folder that you can write, or choose one with --out."
        return Check("runs", PROBLEM, problem, remedy, {"writable": False})
    free = shutil.disk_usage(_existing(RUNS)).free
    facts = {"writable": True, "free": free}
    finding = f"{RUNS}/ can be written, {_gb(free)} free"
    if free < LITTLE_DISK:
        remedy = "Free some, or choose another disk with --out."
        return Check("runs", WARNING, finding, remedy, facts)
    return Check("runs", OK, finding, None, facts)


def why_not_writable(folder: Path) -> str | None:
    """Return why no file can be written in a folder, or in the one that it would be made in."""
    try:
        with tempfile.TemporaryDirectory(dir=_existing(folder), prefix=".elr-doctor-") as made:
            (Path(made) / "file").write_bytes(b"\0")
    except OSError as error:
        return error.strerror or str(error)
    return None


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above that is there."""
    return next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _counted(count: int, what: str) -> str:
    if count == 1:
        return f"1 {what}"
    return f"{count:,} {what}{'es' if what.endswith('s') else 's'}"


def _works(words: list[str]) -> str:
    return f"{_listed(words)} work{'s' if len(words) == 1 else ''}"


def _listed(words: list[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
