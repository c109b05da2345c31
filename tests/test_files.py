from pathlib import Path

import pytest

from augment_cli.errors import AugmentError
from augment_cli.files import check_output, write_file, write_folder


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


def test_a_folder_keeps_files_of_other_names(in_tmp):
    (in_tmp / "d").mkdir()
    (in_tmp / "d/mine").write_text("mine")
    (in_tmp / "d/a").write_text("old")
    write_folder(in_tmp / "d", lambda p: (p / "a").write_text("new"))
    assert {f.name: f.read_text() for f in (in_tmp / "d").iterdir()} == {"mine": "mine", "a": "new"}
    assert [f.name for f in in_tmp.iterdir()] == ["d"]


def test_new_files_have_the_permissions_that_the_umask_gives(in_tmp):
    (in_tmp / "plain").write_text("")
    write_file(in_tmp / "x", lambda p: p.write_text(""))
    write_folder(in_tmp / "d", lambda p: (p / "a").touch(0o600))
    modes = {(in_tmp / name).stat().st_mode for name in ("plain", "x", "d/a")}
    assert len(modes) == 1


def test_an_output_is_checked_before_work_is_done_for_it(in_tmp):
    (in_tmp / "x").write_text("")
    with pytest.raises(AugmentError, match="x exists; --overwrite replaces it"):
        check_output(in_tmp / "x", overwrite=False)
    check_output(in_tmp / "x", overwrite=True)
    with pytest.raises(AugmentError, match="there is no folder"):
        check_output(in_tmp / "none/x", overwrite=False)


def test_a_disk_that_refuses_is_named(in_tmp):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(AugmentError, match="x cannot be written: No space left on device"):
        write_file(in_tmp / "x", full)
    assert list(in_tmp.iterdir()) == []
