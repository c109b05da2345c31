import json
import sys

from augment_cli.support import table_file


def test_the_page_is_made_of_its_numbers(monkeypatch):
    docs = table_file().parent
    monkeypatch.setattr(sys, "path", [str(docs), *sys.path])
    from story_page import markdown

    story = json.loads((docs / "story.json").read_text(encoding="utf-8"))
    assert markdown(story) == (docs / "story.md").read_text(encoding="utf-8")
