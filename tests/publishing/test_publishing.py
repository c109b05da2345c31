"""A converted folder goes to a hub and comes back from it, by timm and by this package; what cannot says why."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import augment_cli
from tests.publishing.server import Hub, Repository

OWN_FILES = ["README.md", "config.json", "model.safetensors", "network.svg", "plan.json", "report.html", "report.json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model's folder, and a file in it that is not augment's."""
    folder = tmp_path_factory.mktemp("model") / "aa"
    augment_cli.save(augment_cli.convert("test_resnet", "aa", input_size=48), folder)
    (folder / "secrets.txt").write_text("mine")
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.close()


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """For processes that know only this hub, and keep what they download to themselves."""
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_writes"}
    return {**os.environ, **own, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *command: object, **changes: str) -> subprocess.CompletedProcess:
    words = [sys.executable, *map(str, command)]
    options = {"capture_output": True, "text": True, "check": False, "stdin": subprocess.DEVNULL}
    return subprocess.run(words, env={**environment, **changes}, **options)


def push(environment: dict[str, str], *arguments: object, **changes: str) -> subprocess.CompletedProcess:
    return run(environment, "-m", "augment_cli", "push", *arguments, **changes)


def wait_for(hub: Hub, request: str) -> None:
    end = time.monotonic() + 60
    while not any(request in line for line in hub.log):
        assert time.monotonic() < end, hub.log
        time.sleep(0.05)


LOAD = """
import sys, torch
import augment_cli, timm
from augment_cli.training.models import open_model
x = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
models = (
    timm.create_model("hf-hub:me/aa", pretrained=True),
    timm.create_model("hf-hub:me/aa@main", pretrained=True, features_only=False),
    augment_cli.load("hf-hub:me/aa"),
    augment_cli.load(sys.argv[1]),
)
opened = open_model("hf-hub:me/aa")
assert opened.metadata == models[2].augment_metadata
models = (opened.model, *models)
outputs = [model.eval()(x) for model in models]
assert all(torch.equal(output, outputs[-1]) for output in outputs)
assert isinstance(models[1].layer4[0].conv2, augment_cli.AAConv2d)
assert timm.create_model("hf-hub:me/aa", pretrained=True, num_classes=5)(x).shape == (1, 5)
try:
    augment_cli.plan("hf-hub:me/aa")
except augment_cli.AugmentError as error:
    print(error)
"""


def test_a_pushed_folder_is_loaded_by_timm_and_by_augment(hub, environment, model):
    pushed = push(environment, model, "me/aa", "--yes")
    assert (pushed.returncode, pushed.stdout) == (0, f"{hub.address}/me/aa\n"), pushed.stderr
    assert "note: secrets.txt" in pushed.stderr
    repository = hub.repositories["me/aa"]
    assert repository.private
    assert sorted(repository.files) == OWN_FILES
    assert all((model / name).read_bytes() == content for name, content in repository.files.items())
    assert b'create_model("hf-hub:' in repository.files["README.md"]
    assert b"import augment_cli" in repository.files["README.md"]
    loaded = run(environment, "-c", LOAD, model)
    assert loaded.returncode == 0, loaded.stderr
    assert "converted model already" in loaded.stdout


def test_commands_take_a_name_on_the_hub(hub, environment, model):
    assert push(environment, model, "hf-hub:me/aa", "--yes").returncode == 0
    program = ("-m", "augment_cli")
    assert run(environment, *program, "check", "hf-hub:me/aa").returncode == 0
    reported = run(environment, *program, "report", "hf-hub:me/aa", "-f", "json")
    assert json.loads(reported.stdout) == json.loads((model / "report.json").read_text())
    compared = run(environment, *program, "compare", "hf-hub:me/aa", model, "-f", "json")
    assert compared.returncode == 0, compared.stderr
    differing = run(environment, *program, "diff", "hf-hub:me/aa", model, "-f", "json")
    assert differing.returncode == 0, differing.stderr


PLAIN = """
import timm
import augment_cli

timm.models.push_to_hf_hub(timm.create_model("test_resnet"), "me/plain", private=True, safe_serialization=True)
model = augment_cli.convert("hf-hub:me/plain", "aa", pretrained=True, input_size=48)
print(model.augment_metadata.weights, model.augment_metadata.plan.model)
address = augment_cli.push(model, "me/from-plain", public=True)
print(address)
"""


def test_a_model_of_timm_on_the_hub_is_a_source_and_a_model_object_is_pushed(hub, environment):
    done = run(environment, "-c", PLAIN)
    assert done.stdout == f"pretrained test_resnet\n{hub.address}/me/from-plain\n", done.stderr
    assert not hub.repositories["me/from-plain"].private
    assert sorted(hub.repositories["me/from-plain"].files) == OWN_FILES


def test_a_second_push_is_asked_for_and_removes_what_the_first_left(hub, environment, model, tmp_path):
    assert push(environment, model, "me/aa", "--yes").returncode == 0
    again = push(environment, model, "me/aa", "--yes")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    assert hub.repositories["me/aa"].commits == 1
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "network.svg").unlink()
    hub.repositories["me/aa"].files["notes.txt"] = b"the owner's"
    assert push(environment, other, "me/aa", "--yes", "--overwrite", "--public").returncode == 0
    assert sorted(hub.repositories["me/aa"].files) == sorted({*OWN_FILES, "notes.txt"} - {"network.svg"})
    assert hub.repositories["me/aa"].private


def broken(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["plan"]["recipe"] = "another"
    (folder / "config.json").write_text(json.dumps(config))


FOLDERS = {
    "no such folder": shutil.rmtree,
    r"no model\.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    r"no config\.json": lambda folder: (folder / "config.json").unlink(),
    "two plans": broken,
    "not one that augment wrote": lambda folder: (folder / "config.json").write_text("{}"),
}


@pytest.mark.parametrize("word", FOLDERS)
def test_what_is_not_a_whole_converted_folder_is_refused_before_the_hub_is_asked(monkeypatch, model, tmp_path, word):
    shutil.copytree(model, tmp_path / "m")
    FOLDERS[word](tmp_path / "m")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(augment_cli.AugmentError, match=word):
        augment_cli.push(tmp_path / "m", "me/aa")


def test_one_file_is_refused(model):
    with pytest.raises(augment_cli.FileError, match="is a file"):
        augment_cli.push(model / "model.safetensors", "me/aa")


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("me/bad name", {}, "OWNER/NAME"),
        ("you/aa", {}, "may not write"),
        ("me/aa", {"HF_TOKEN": "hf_reads"}, "may not write"),
        ("me/aa", {"HF_TOKEN": "hf_old"}, "hf auth login"),
        ("me/aa", {"HF_TOKEN": ""}, "no token"),
        ("me/aa", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
        ("me/aa", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
    ],
)
def test_a_push_that_cannot_be_says_why_and_leaves_the_hub_as_it_was(hub, environment, model, name, changes, word):
    done = push(environment, model, name, "--yes", **changes)
    assert done.returncode == 2
    assert word in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not hub.repositories


def test_an_upload_that_fails_says_how_to_go_on(hub, environment, model):
    hub.fail = "/commit/"
    failed = push(environment, model, "me/aa", "--yes")
    assert failed.returncode == 2
    assert "--overwrite" in failed.stderr.splitlines()[-1]
    hub.fail = None
    assert push(environment, model, "me/aa", "--yes", "--overwrite").returncode == 0
    assert sorted(hub.repositories["me/aa"].files) == OWN_FILES


def test_a_card_that_the_hub_refuses_is_named(hub, environment, model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("# mine")
    refused = push(environment, tmp_path / "m", "me/aa", "--yes")
    assert refused.returncode == 2
    assert "README.md" in refused.stderr.splitlines()[-1]
    assert "no front matter" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "token", "word"),
    [
        ("hf-hub:me/none", "hf_writes", "no such model"),
        ("hf-hub:me/aa", "", "no such model, or a private one"),
        ("hf-hub:me/aa@v2", "hf_writes", "no such revision"),
        ("hf-hub:me/empty", "hf_writes", "not a converted model"),
        ("hf-hub:a/b/c", "hf_writes", "OWNER/NAME"),
    ],
)
def test_a_name_that_cannot_be_read_says_why(hub, environment, model, name, token, word):
    hub.repositories["me/empty"] = Repository(private=True)
    files = {file: (model / file).read_bytes() for file in OWN_FILES}
    hub.repositories["me/aa"] = Repository(private=True, files=files)
    done = run(environment, "-m", "augment_cli", "report", name, HF_TOKEN=token)
    assert done.returncode == 2
    assert word in done.stderr.splitlines()[-1]


def at_a_terminal(environment: dict[str, str], model: Path, typed: bytes) -> tuple[int, str]:
    """Exit code and output of a push that is asked for at a terminal, where `typed` is typed."""
    leader, follower = pytest.importorskip("pty").openpty()
    command = [sys.executable, "-m", "augment_cli", "push", str(model), "me/aa"]
    options = {"stdin": follower, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", take, *command], env=environment, **options)
    os.close(follower)
    said = b""
    while b"push?" not in said:
        said += os.read(process.stdout.fileno(), 1000)
    os.write(leader, typed)
    said += process.communicate(timeout=60)[0]
    os.close(leader)
    return process.returncode, said.decode()


@pytest.mark.parametrize(("typed", "code", "pushed"), [(b"y\n", 0, True), (b"\n", 1, False), (b"\x03", 130, False)])
def test_a_terminal_is_asked(hub, environment, model, typed, code, pushed):
    returned, said = at_a_terminal(environment, model, typed)
    assert returned == code, said
    assert "Traceback" not in said
    assert bool(hub.repositories) == pushed


def test_nobody_to_ask_is_an_error(hub, environment, model):
    done = push(environment, model, "me/aa")
    assert (done.returncode, hub.repositories) == (2, {})
    assert "--yes" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be sent Ctrl-C there")
def test_ctrl_c_ends_an_upload(hub, environment, model):
    hub.stall = "/large/"
    command = [sys.executable, "-m", "augment_cli", "push", str(model), "me/aa", "--yes"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(hub, "PUT /large/")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
    assert hub.repositories["me/aa"].commits == 0


def test_timm_refuses_two_plans_on_the_hub(hub, environment, model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    broken(tmp_path / "m")
    files = {file: (tmp_path / "m" / file).read_bytes() for file in OWN_FILES}
    hub.repositories["me/aa"] = Repository(private=False, files=files)
    done = run(environment, "-c", "import augment_cli, timm; timm.create_model('hf-hub:me/aa', pretrained=True)")
    assert "FileError" in done.stderr.splitlines()[-1]
    assert "two plans" in done.stderr.splitlines()[-1]
