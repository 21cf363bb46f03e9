from __future__ import annotations

import subprocess
import sys
import tomllib
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from elrcli.engine import doctor, machine
from elrcli.engine.device import Runtime
from elrcli.errors import ModelError
from elrcli.models import WeightsCache

CPU, CUDA = Runtime(torch.device("cpu"), "fp32"), Runtime(torch.device("cuda", 0), "bf16")
Usage = namedtuple("Usage", "total used free")


def brief(check):
    """Return what a person reads of a check."""
    return check.status, check.finding, check.remedy


def fails_with(error):
    def fail(*_, **__):
        raise error

    return fail


def no_gpu(monkeypatch, problem):
    """Let torch for CUDA 13.0 find no GPU because of `problem`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fails_with(problem) if problem else lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_this_machine_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = doctor.examine("cpu")
    assert report.can_train
    assert (report.device, report.precision) == ("cpu", "fp32")
    names = [check.name for check in report.checks]
    assert names[:4] == ["elr", "packages", "device", "precision"]
    assert "GPU" not in names  # nobody asked for one
    assert "weights online" not in names
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_too_old_has_a_remedy(monkeypatch):
    def choose(asked):
        cause = RuntimeError("CUDA error: no kernel image is available for execution")
        raise ModelError("cuda:0: does not work (CUDA error). See. Or.") from cause

    monkeypatch.setattr(machine, "choose_runtime", choose)
    check, runtime = machine.device_check("auto")
    assert runtime is None
    assert brief(check) == (
        "problem",
        "CUDA error: no kernel image is available for execution",
        "This torch is not built for such a GPU. Install a build that is.",
    )


def test_a_package_that_does_not_load_ends_the_checks(monkeypatch):
    import_module = doctor.importlib.import_module

    def load(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        return import_module(name)

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    report = doctor.examine()
    assert not report.can_train
    assert [check.name for check in report.checks] == ["elr", "packages"]
    assert brief(report.checks[-1]) == (
        "problem",
        "torchvision does not load: operator torchvision::nms does not exist",
        "Install torch and torchvision together: each fits one version of the other.",
    )


def test_the_doctor_itself_loads_without_torch():
    code = "import sys; sys.modules['torch'] = None; from elrcli.engine import doctor\n"
    code += "print(doctor.examine().checks[-1].finding)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("torch does not load: ")


def test_a_gpu_is_described(monkeypatch, tmp_path):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64  550.54.15  Tue\n")
    monkeypatch.setattr(machine, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(machine, "choose_runtime", lambda name: CUDA)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fast 9000")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check, runtime = machine.device_check("auto")
    assert runtime == CUDA
    assert brief(check) == (
        "ok",
        "cuda:0, Fast 9000, compute capability 9.0, driver 550.54.15, torch for CUDA 13.0,"
        " one of 2 GPUs",
        None,
    )
    assert check.facts["driver"] == "550.54.15"


def test_a_device_that_is_not_there():
    check, runtime = machine.device_check("cuda:99")
    assert runtime is None
    assert check.status == "problem"
    assert check.finding.startswith("--device cuda:99: this machine has ")
    assert check.remedy == "Use auto."


def test_a_gpu_that_fails_at_once(monkeypatch):
    busy = RuntimeError("CUDA error: all CUDA-capable devices are busy\nCompile with")
    monkeypatch.setattr(machine, "choose_runtime", fails_with(busy))
    check, _ = machine.device_check("auto")
    assert brief(check) == (
        "problem",
        "CUDA error: all CUDA-capable devices are busy",
        "See with nvidia-smi whether the GPU is there and free, or take --device cpu.",
    )


@pytest.mark.parametrize(
    ("problem", "finding", "remedy"),
    [
        (
            RuntimeError("Found no NVIDIA driver on your system. Please check"),
            "Found no NVIDIA driver on your system",
            "For a GPU, install NVIDIA's driver; start a container with --gpus all.",
        ),
        (
            RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Do"),
            "The NVIDIA driver on your system is too old (found version 11040)",
            "Update NVIDIA's driver, or install a torch for an older one than CUDA 13.0.",
        ),
        (
            RuntimeError("No CUDA GPUs are available"),
            "No CUDA GPUs are available",
            "CUDA_VISIBLE_DEVICES is '7': unset it, or name a GPU that there is.",
        ),
        (
            None,
            "torch finds no GPU",
            "CUDA_VISIBLE_DEVICES is '7': unset it, or name a GPU that there is.",
        ),
        (
            RuntimeError("CUDA unknown error"),
            "CUDA unknown error",
            "See with nvidia-smi whether the GPU is there and free, or take --device cpu.",
        ),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "cuda:1"])
def test_why_no_gpu_is_usable(monkeypatch, asked, problem, finding, remedy):
    no_gpu(monkeypatch, problem)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    (check,) = machine.gpu_checks(asked, CPU if asked == "auto" else None)
    assert brief(check) == ("warning", finding, remedy)


def test_a_torch_without_cuda(monkeypatch, tmp_path):
    no_gpu(monkeypatch, AssertionError("Torch not compiled with CUDA enabled"))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine, "NVIDIA_DRIVER", tmp_path / "version")
    assert machine.gpu_checks("auto", CPU) == []  # and no GPU that it could use
    (check,) = machine.gpu_checks("cuda", None)
    assert check.finding.endswith("is built for CPUs only")
    (tmp_path / "version").write_text("NVRM version: 550.54")
    (check,) = machine.gpu_checks("auto", CPU)
    assert (check.status, check.remedy) == ("warning", "Install a build of torch for CUDA.")


def test_no_gpu_is_missed_where_none_was_wanted(monkeypatch):
    no_gpu(monkeypatch, RuntimeError("Found no NVIDIA driver"))
    assert machine.gpu_checks("cpu", CPU) == []
    assert machine.gpu_checks("auto", CUDA) == []


def test_precisions_of_a_cpu():
    check = machine.precision_check("cpu", CPU)
    assert brief(check) == ("ok", "fp32 and bf16 work, fp16 does not; auto takes fp32", None)
    assert check.facts["failed"] == {
        "fp16": "--precision fp16: needs a GPU. Use fp32 or bf16 on the CPU."
    }


def test_a_precision_of_which_a_step_fails(monkeypatch):
    def step(runtime):
        if runtime.precision == "fp32":
            raise ArithmeticError("loss or gradient is not a finite number")

    monkeypatch.setattr(machine, "take_step", step)
    assert brief(machine.precision_check("cpu", CPU)) == (
        "problem",
        "a step in fp32 fails: loss or gradient is not a finite number",
        "Add --precision bf16.",
    )


def test_a_gpu_that_torch_has_no_kernels_for(monkeypatch):
    error = RuntimeError("CUDA error: no kernel image is available for execution\nmore")
    monkeypatch.setattr(machine, "take_step", fails_with(error))
    check = machine.precision_check("cpu", CPU)
    assert check.status == "problem"
    assert check.remedy == "This torch is not built for such a GPU. Install a build that is."


def test_numbers_that_are_not_finite_fail_a_step(monkeypatch):
    monkeypatch.setattr(machine, "blank_images", lambda *_: torch.full((4, 3, 32, 32), torch.nan))
    with pytest.raises(ArithmeticError, match="not a finite number"):
        machine.take_step(CPU)


def test_a_step_leaves_random_numbers_as_they_were():
    before = torch.get_rng_state()
    machine.take_step(CPU)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (None, ("ok", "a replayed step works", None)),
        (
            "capturing failed",
            (
                "warning",
                "a step cannot be replayed: capturing failed",
                "Training goes on without them, somewhat slower. Update NVIDIA's driver.",
            ),
        ),
    ],
)
def test_cuda_graphs(monkeypatch, problem, expected):
    monkeypatch.setattr(machine, "replay_on_gpu", lambda *_: problem)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(machine, "_learn_from", lambda *_: None)
    monkeypatch.setattr(machine, "blank_images", lambda *_: None)
    monkeypatch.setattr(
        machine, "_small_network", lambda _: machine.create_network("test_resnet", 2)
    )
    assert brief(machine.graphs_check(CUDA)) == expected


@pytest.mark.parametrize(
    ("free", "total", "status"),
    [(70e9, 80e9, "ok"), (30e9, 80e9, "warning"), (1e9, 1e9, "warning")],
)
def test_memory_of_a_gpu(monkeypatch, free, total, status):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    check = machine.gpu_memory_check(CUDA.device)
    assert check.status == status
    assert check.finding == f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB free on cuda:0"
    assert (check.remedy is None) == (status == "ok")


@pytest.mark.parametrize(("free", "status"), [(3e9, "ok"), (1e9, "warning")])
def test_memory_of_the_host(monkeypatch, free, status):
    monkeypatch.setattr(machine, "free_host_memory", lambda: free)
    monkeypatch.setattr(machine, "total_host_memory", lambda: 8e9)
    check = machine.memory_check()
    assert (check.status, check.finding) == (status, f"{free / 1e9:.1f} GB of 8.0 GB free")


def test_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    sizes = Usage(8e9, 0, 8e9)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: sizes)
    (check,) = machine.shared_memory_checks()
    assert brief(check) == ("ok", f"8.0 GB of 8.0 GB free in {tmp_path}", None)
    sizes = Usage(67_108_864, 0, 67_108_864)  # what Docker gives without --shm-size
    (check,) = machine.shared_memory_checks()
    assert brief(check) == (
        "warning",
        f"0.1 GB of 0.1 GB free in {tmp_path}",
        "Start the container with --shm-size 8g. Until then: --workers 0 --cache none.",
    )


def test_shared_memory_that_is_not_there_or_not_writable(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    assert machine.shared_memory_checks() == []
    (tmp_path / "file").touch()
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "file")
    (check,) = machine.shared_memory_checks()
    assert check.status == "warning"
    assert "cannot be written: Not a directory" in check.finding


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", ("ok", "8 of 16 usable, 8 loading processes", None)),
        ("800000 100000", ("ok", "8 of 16 usable, 8 loading processes", None)),
        (
            "250000 100000",
            (
                "warning",
                "8 of 16 usable, 8 loading processes; the container may use 2.5",
                "Add --workers 2.",
            ),
        ),
    ],
)
def test_cores(monkeypatch, tmp_path, quota, expected):
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(machine, "CPU_QUOTAS", ((str(tmp_path / "cpu.max"),),))
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.setattr(machine, "worker_count", lambda requested: 8)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 16)
    assert brief(machine.cores_check()) == expected


def test_a_quota_in_two_files(monkeypatch, tmp_path):
    files = tuple(str(tmp_path / name) for name in ("quota", "period"))
    monkeypatch.setattr(machine, "CPU_QUOTAS", (("none",), files))
    for path, text in zip(files, ("150000\n", "100000\n"), strict=True):
        Path(path).write_text(text)
    assert machine.cores_check().facts["container"] == 1.5
    Path(files[0]).write_text("-1\n")
    assert machine.cores_check().facts["container"] is None


def test_a_compiler_that_works(monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert brief(machine.compile_check(CPU)) == ("ok", f"{compiler} works", None)


@pytest.mark.parametrize(("runtime", "language"), [(CPU, "C++"), (CUDA, "C"), (None, "C++")])
def test_without_a_compiler(monkeypatch, runtime, language):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert brief(machine.compile_check(runtime)) == (
        "warning",
        f"--compile cannot work: no {language} compiler",
        "Install gcc, g++ and the headers of Python, or leave --compile out.",
    )


def test_a_compiler_without_the_headers_of_python(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(
        "#!/bin/sh\necho 'a.c:1:10: fatal error: Python.h: No such file' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: True)
    assert machine.compile_check(CUDA).finding == ("--compile cannot work: Python.h: No such file")
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert "the package triton is missing" in machine.compile_check(CUDA).finding
    monkeypatch.setenv("CXX", 'g++ "')
    assert "No closing quotation" in machine.compile_check(CPU).finding
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert "No such file or directory" in machine.compile_check(CPU).finding


def test_images_of_every_kind_are_read():
    check = machine.image_check()
    assert check.facts["works"][:3] == ["JPEG", "PNG", "WebP"]
    assert check.status != "problem"


@pytest.mark.parametrize(
    ("suffix", "status", "name"), [(".avif", "warning", "AVIF"), (".jpg", "problem", "JPEG")]
)
def test_a_format_that_cannot_be_read(monkeypatch, suffix, status, name):
    def read(path):
        if path.suffix == suffix:
            raise OSError("decoder not available")

    monkeypatch.setattr(machine, "FORMATS", {"JPEG": ".jpg", "AVIF": ".avif"})
    monkeypatch.setattr(machine, "read_image", read)
    check = machine.image_check()
    assert (check.status, check.finding) == (status, f"no {name}: decoder not available")


def test_an_opencv_that_does_not_decode(monkeypatch):
    monkeypatch.setattr(machine, "FORMATS", {"JPEG": ".jpg"})
    monkeypatch.setattr(machine.cv2, "imdecode", lambda data, flags: None)
    check = machine.image_check()
    assert check.status == "warning"
    assert check.finding.startswith("OpenCV does not decode JPEG")


def weights(folder, *backbones, offline=False):
    return WeightsCache(folder, 1_000_000_000, backbones, offline)


def test_a_cache_of_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "weights_cache", lambda: weights(tmp_path, "resnet50.a1_in1k"))
    check = machine.weights_check()
    assert brief(check) == ("ok", f"1 backbone, 1.0 GB in {tmp_path}", None)
    assert check.facts["backbones"] == ["resnet50.a1_in1k"]
    assert list(tmp_path.iterdir()) == []


def test_an_offline_cache_needs_weights(monkeypatch, tmp_path):
    found = weights(tmp_path / "none", offline=True)
    monkeypatch.setattr(machine, "weights_cache", lambda: found)
    check = machine.weights_check()
    assert check.status == "warning"
    assert check.remedy == "Unset HF_HUB_OFFLINE, or use --weights FILE or --no-pretrained."
    found = weights(tmp_path / "none", "resnet50", offline=True)
    assert machine.weights_check().status == "ok"
    assert not (tmp_path / "none").exists()


def test_a_cache_that_cannot_be_written_or_read(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(machine, "weights_cache", lambda: weights(tmp_path / "file"))
    assert "cannot be written: Not a directory" in machine.weights_check().finding
    error = ModelError("cache: cannot be read (no). Set HF_HOME to another folder.")
    monkeypatch.setattr(machine, "weights_cache", fails_with(error))
    assert brief(machine.weights_check()) == (
        "warning",
        "cache: cannot be read (no)",
        "Set HF_HOME to another folder, or use --weights FILE or --no-pretrained.",
    )


def test_the_hub_is_asked_only_online(monkeypatch):
    monkeypatch.setattr(machine, "why_hub_is_silent", lambda seconds: None)
    assert machine.online_check().status == "ok"
    monkeypatch.setattr(machine, "why_hub_is_silent", lambda seconds: "no route")
    assert brief(machine.online_check()) == (
        "warning",
        "the hub does not answer: no route",
        "Check network and proxy, or use --weights FILE or --no-pretrained.",
    )


def test_extras(monkeypatch):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = set(project["project"]["optional-dependencies"]) - {"dev"}
    assert set(machine.EXTRAS) == extras
    loaders = {"parquet": lambda: None, "tensorboard": fails_with(ImportError("none"))}
    monkeypatch.setattr(machine, "EXTRAS", loaders)
    check = machine.extras_check()
    assert check.finding == "parquet; without tensorboard: pip install 'elr[tensorboard]'"
    assert check.facts == {"installed": ["parquet"], "missing": ["tensorboard"]}


def test_runs_can_be_written_and_nothing_is_left(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert machine.runs_check().status == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    assert machine.runs_check().status == "ok"
    assert list((tmp_path / "runs").iterdir()) == []


def test_runs_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    assert brief(machine.runs_check()) == (
        "problem",
        "runs/ cannot be written: Not a directory",
        "Change to a folder that you can write, or choose one with --out.",
    )


def test_a_disk_that_is_nearly_full(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(9e9, 9e9, 1e8))
    assert machine.runs_check().status == "warning"
