"""Running out of memory is one message, on a device or on the host, that says what was asked for and the ways out."""

import sys

import pytest
import torch
from typer.testing import CliRunner

import augment_cli as augment
from augment_cli.cli import app
from augment_cli.errors import AugmentError, InputError, OutOfMemory, boundary, enough_memory, out_of_memory
from augment_cli.training.finetune import finetune
from augment_cli.training.settings import Settings, read_settings
from augment_cli.training.state import read_state
from tests.training.conftest import short, summary

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is "
    "free. Including non-PyTorch memory, this process has 78.00 GiB memory in use. Of the allocated memory 70.00 GiB "
    "is allocated by PyTorch, and 5.00 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
HOST = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4"
)
ERRORS = [
    torch.OutOfMemoryError(CUDA),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError(HOST),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    RuntimeError(
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
        "out of shared memory. Please try to raise your shared memory limit."
    ),
    MemoryError(),
    MemoryError("Unable to allocate 8.00 TiB for an array with shape (1099511627776,) and data type float64"),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_every_kind_is_known_and_said_in_one_line(error):
    with pytest.raises(OutOfMemory) as raised, enough_memory("training", "less of it"):
        raise error
    text = str(raised.value)
    assert text.startswith("training needs more memory than there is: ")
    assert text.endswith("less of it")
    assert "\n" not in text
    assert len(text) < 400
    assert "enforce" not in text
    assert "unallocated" not in text
    assert ("`workers`" in text) == ("worker" in str(error))


def test_what_was_in_use_is_said():
    text = str(out_of_memory(torch.OutOfMemoryError(CUDA), "training"))
    assert all(part in text for part in ("2.00 GiB", "79.10 GiB", "1.00 GiB is free", "78.00 GiB memory in use"))


def test_the_real_allocators_errors_are_known():
    with pytest.raises(OutOfMemory), enough_memory("this"):
        torch.empty(2**60)
    with pytest.raises(OutOfMemory, match="out of memory"), enough_memory("this"):
        bytearray(sys.maxsize)


def test_other_errors_pass():
    for error in (RuntimeError("shapes do not match"), ValueError("out of memory"), AugmentError("bad")):
        with pytest.raises(type(error)) as raised, enough_memory("this"):
            raise error
        assert raised.value is error


def test_memory_is_not_taken_for_bad_input():
    """Whoever knows what to do about it says so."""
    with pytest.raises(OutOfMemory, match="the file x: MemoryError"), boundary("the file x"):
        raise MemoryError
    known = pytest.raises(OutOfMemory, match=r"^this needs .*the file x: CUDA out of memory.*; try that$")
    with known, enough_memory("this", "that"), boundary("the file x"):
        raise torch.OutOfMemoryError(CUDA)
    with pytest.raises(InputError), boundary("the file x"):
        raise ValueError("no")


def test_memory_is_free_for_another_try():
    """The frames of the traceback no longer hold what had been computed."""
    kept = []

    class Big:
        def __del__(self):
            kept.append("freed")

    def compute():
        big = Big()
        raise MemoryError(f"with {type(big)}")

    try:
        with enough_memory("this"):
            compute()
    except OutOfMemory:
        assert kept == ["freed"]


def full(*_args, **_kwargs):
    raise torch.OutOfMemoryError(CUDA)


def test_a_run_says_which_settings_take_less_and_keeps_what_it_saved(model, images, tmp_path, monkeypatch):
    from augment_cli.training import engine

    whole = engine._loss

    def filling(run, *batch):
        return full() if (run.epoch, run.batch) == (1, 2) else whole(run, *batch)

    monkeypatch.setattr(engine, "_loss", filling)
    settings = short(model, images, tmp_path / "run")
    with pytest.raises(OutOfMemory) as raised:
        finetune(settings)
    text = str(raised.value)
    order = [text.index(part) for part in ("`batch_size=8`", "`precision='no'`", "2.00 GiB", "`precision='bf16'`")]
    order += [text.index(part) for part in ("`grad_checkpointing=True`", "`batch_size=4` with `accumulate=2`")]
    assert order == sorted(order)
    assert f"{tmp_path / 'run'} keeps its last checkpoint" in text
    assert read_state(tmp_path / "run/state.safetensors")["position"][0] == 1
    monkeypatch.undo()
    # As the message says: a resumed run takes another precision and checkpointing, and not another batch size.
    again = CliRunner().invoke(app, ["finetune", "--resume", str(tmp_path / "run"), "-b", "4"])
    assert again.exit_code == 2
    options = ["--precision", "bf16", "--grad-checkpointing"]
    assert CliRunner().invoke(app, ["finetune", "--resume", str(tmp_path / "run"), *options]).exit_code == 0
    assert len(summary(tmp_path / "run")) == 3
    assert read_settings(tmp_path / "run/settings.json", Settings).grad_checkpointing


def test_what_already_takes_less_is_not_suggested(model, images, tmp_path, monkeypatch):
    from augment_cli.training import engine

    monkeypatch.setattr(engine, "_loss", full)
    changes = {"precision": "bf16", "grad_checkpointing": True, "batch_size": 1}
    with pytest.raises(OutOfMemory) as raised:
        finetune(short(model, images, tmp_path / "run", **changes))
    assert "; try a smaller `img_size`" in str(raised.value)


COMMANDS = {
    "finetune": (
        "augment_cli.training.engine._loss",
        ("finetune", "MODEL", "--data", "DATA", "-o", "OUT"),
        "--accumulate 2",
    ),
    "evaluate": (
        "augment_cli.training.evaluate.logits_of",
        ("evaluate", "test_resnet", "-a", "num_classes=3", "--data", "DATA"),
        "--batch-size 8",
    ),
    "fit": (
        "augment_cli.conversion.fit",
        ("convert", "test_resnet", "--init", "fit", "--calibrate", "DATA", "--img-size", "32", "-o", "OUT"),
        "--calibrate-images",
    ),
    "sensitivity": (
        "augment_cli.surgery.sensitivity.fit_sites",
        ("plan", "test_resnet", "--sensitivity", "--pretrained", "--calibrate", "DATA", "--img-size", "32"),
        "--calibrate-images",
    ),
    "latency": (
        "augment_cli.latency.bench.ModelBench._run",
        ("plan", "test_resnet", "--latency", "--img-size", "32", "--set", "latency.batch=4096"),
        "latency.batch",
    ),
    "anything else": ("augment_cli.cli.common.announce", ("plan", "test_resnet", "--img-size", "32"), "augment plan"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_with_one_message(name, model, images, tmp_path, monkeypatch):
    place, arguments, said = COMMANDS[name]
    if name == "sensitivity":  # weights without a network
        from augment_cli.analysis import source

        whole = source.create
        monkeypatch.setattr(source, "create", lambda described, seed=0, origin=None: whole(described, seed))
    monkeypatch.setattr(place, full)
    places = {"MODEL": model, "DATA": images, "OUT": tmp_path / "out"}
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    arguments += ["--cpu", "-j", "0", "-b", "8"] if name in ("finetune", "evaluate") else []
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.output
    assert all(part in errors[0] for part in ("2.00 GiB", said)), errors


def test_the_error_is_public():
    assert issubclass(augment.OutOfMemory, augment.AugmentError)
