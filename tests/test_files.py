import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from augment_cli import files
from augment_cli.errors import AugmentError
from augment_cli.files import check_output, recover, write_file, write_folder


def fail(path: Path) -> None:
    (path / "a" if path.is_dir() else path).write_text("half")
    raise KeyboardInterrupt


def test_a_file_is_written_whole_and_replaces_the_old_one(in_tmp):
    target = in_tmp / "x"
    write_file(target, lambda p: p.write_text("one"))
    write_file(target, lambda p: p.write_text("two"))
    assert target.read_text() == "two"
    assert [f.name for f in in_tmp.iterdir()] == ["x"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(in_tmp):
    target = in_tmp / "x"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_file(target, fail)
    assert target.read_text() == "old"
    assert [f.name for f in in_tmp.iterdir()] == ["x"]


def test_an_interrupted_folder_leaves_nothing(in_tmp):
    with pytest.raises(KeyboardInterrupt):
        write_folder(in_tmp / "d", fail)
    assert list(in_tmp.iterdir()) == []


def fill(text: str):
    """Write ten files of this text into a folder."""

    def write(folder: Path) -> None:
        for i in range(10):
            (folder / f"{text}-{i}").write_text(text)

    return write


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_is_replaced_as_a_whole(in_tmp, monkeypatch, swaps):
    if not swaps:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    write_folder(in_tmp / "d", fill("old"))
    write_folder(in_tmp / "d", fill("new"))
    assert names(in_tmp / "d") == [f"new-{i}" for i in range(10)]
    assert names(in_tmp) == ["d"]
    with pytest.raises(KeyboardInterrupt):
        write_folder(in_tmp / "d", fail)
    assert names(in_tmp / "d") == [f"new-{i}" for i in range(10)]
    assert names(in_tmp) == ["d"]


WRITES = """
import itertools, sys
from pathlib import Path
from augment_cli import files
from tests.test_files import fill
if sys.argv[1] == "False":
    files._exchange = lambda one, other: False
for i in itertools.count():
    files.write_folder(Path("d"), fill("ab"[i % 2]))
    print(i, flush=True)
"""


@pytest.mark.parametrize("swaps", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(in_tmp, swaps):
    wait = random.Random(0)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    for _ in range(12):
        command = [sys.executable, "-c", WRITES, str(swaps)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout.readline()
        time.sleep(wait.random() / 50)
        process.kill()
        process.wait()
        if not swaps:
            recover(in_tmp / "d")
        assert names(in_tmp / "d") in ([f"{text}-{i}" for i in range(10)] for text in "ab")
    write_file(in_tmp / "x", lambda path: path.write_text(""))
    assert names(in_tmp) == ["d", "x"]


def test_a_later_write_removes_what_a_killed_process_left_but_not_what_another_writes(in_tmp):
    (in_tmp / ".augment-left.tmp").write_text("half")
    (in_tmp / ".augment-folder.tmp").mkdir()
    (in_tmp / ".augment-folder.tmp/a").write_text("half")
    (in_tmp / ".mine.tmp").write_text("mine")

    def write(path: Path) -> None:
        write_file(in_tmp / "other", lambda temporary: temporary.write_text("other"))
        path.write_text("whole")

    write_file(in_tmp / "x", write)
    assert (in_tmp / "x").read_text() == "whole"
    assert names(in_tmp) == [".mine.tmp", "other", "x"]


def test_the_target_of_a_link_is_replaced(in_tmp):
    (in_tmp / "real").mkdir()
    (in_tmp / "real/file").write_text("old")
    (in_tmp / "link").symlink_to("real/file")
    (in_tmp / "folder").symlink_to("real/folder")
    write_file(in_tmp / "link", lambda path: path.write_text("new"))
    write_folder(in_tmp / "folder", fill("a"))
    assert (in_tmp / "link").is_symlink()
    assert (in_tmp / "folder").is_symlink()
    assert (in_tmp / "real/file").read_text() == "new"
    assert len(names(in_tmp / "real/folder")) == 10


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_names_may_have_255_bytes(in_tmp, write):
    name = "é" * 127 + "x"
    check_output(in_tmp / name, overwrite=False)
    write(in_tmp / name, fill("a") if write is write_folder else lambda path: path.write_text(""))
    assert names(in_tmp) == [name]
    with pytest.raises(AugmentError, match="too long"):
        check_output(in_tmp / (name + "x"), overwrite=False)


def test_new_files_have_the_permissions_that_the_umask_gives(in_tmp):
    (in_tmp / "plain").write_text("")
    write_file(in_tmp / "x", lambda p: p.write_text(""))
    write_folder(in_tmp / "d", lambda p: (p / "a").touch(0o600))
    modes = {(in_tmp / name).stat().st_mode for name in ("plain", "x", "d/a")}
    assert len(modes) == 1


def test_an_output_is_checked_before_work_is_done_for_it(in_tmp):
    (in_tmp / "x").write_text("")
    with pytest.raises(AugmentError, match="x exists; `overwrite=True`"):
        check_output(in_tmp / "x", overwrite=False)
    check_output(in_tmp / "x", overwrite=True)
    with pytest.raises(AugmentError, match="there is no folder"):
        check_output(in_tmp / "none/x", overwrite=False)


def test_an_input_is_not_replaced_by_its_output(in_tmp):
    (in_tmp / "x").write_text("")
    (in_tmp / "link").symlink_to("x")
    for source, target in (("x", "x"), ("link", "x"), ("x", "link"), ("x", ".")):
        with pytest.raises(AugmentError, match="is read for it"):
            check_output(in_tmp / target, overwrite=True, inputs=[None, in_tmp / source])


def test_an_output_is_a_regular_file(in_tmp):
    os.mkfifo(in_tmp / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(AugmentError, match="give a file's name"):
            check_output(in_tmp / name, overwrite=True)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
        SafetensorError('Error while serializing: IoError(Os { code: 28, kind: Full, message: "No space left" })'),
    ],
)
def test_a_full_disk_is_told_of_the_users_file(in_tmp, error):
    def full(path: Path) -> None:
        raise error

    for write in (write_file, write_folder):
        with pytest.raises(AugmentError, match=r"^\S*/x cannot be written: No space left$"):
            write(in_tmp / "x", full)
    assert list(in_tmp.iterdir()) == []
