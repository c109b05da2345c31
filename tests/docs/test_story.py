import json

from story import markdown

from augment_cli.analysis.support import table_file


def test_the_page_is_made_of_its_numbers():
    docs = table_file().parent
    story = json.loads((docs / "story.json").read_text(encoding="utf-8"))
    assert markdown(story) == (docs / "story.md").read_text(encoding="utf-8")
