"""Measurements of `make gpu` in a JSON file, which is written whole after each of them."""

import json
import os
from pathlib import Path
from typing import Any

FINDINGS = {"OutOfMemoryError", "OutOfResources"}
"""Errors that are results: memory that the card, and shared memory that a block of Triton's, does not have."""

START = "start"
"""The key of a part that failed before its measurements were known."""


class Rows:
    """Rows by part and key. Each says by which call of the program it was measured.

    Processes take turns with the file: a part's own while it runs, its parent before and after.
    """

    def __init__(self, path: Path, before: Path | None = None) -> None:
        """Open a file, or begin one with what is in another."""
        self.path = path
        self.content: dict[str, Any] = {"rows": {}, "planned": {}, "running": None}
        if found := next((p for p in (path, before) if p and p.exists()), None):
            self.content |= json.loads(found.read_text(encoding="utf-8"))

    def write(self) -> None:
        new = self.path.with_name(self.path.name + ".new")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.path)

    def part(self, part: str) -> dict[str, dict]:
        return self.content["rows"].setdefault(part, {})

    def plan(self, part: str, keys: list[str]) -> None:
        self.content["planned"][part] = keys
        self.part(part).pop(START, None)
        self.write()

    def begin(self, part: str, key: str) -> None:
        self.content["running"] = [part, key]
        self.write()

    def put(self, part: str, key: str, row: dict) -> None:
        self.part(part)[key] = row
        self.content["running"] = None
        self.write()

    def forget(self, part: str) -> None:
        """Forget what was measured, to measure it anew."""
        self.content["rows"].pop(part, None)
        self.content["planned"].pop(part, None)
        self.write()

    def is_done(self, part: str, key: str, call: str) -> bool:
        """Whether there is nothing to do: what failed or was stopped in an earlier call is tried again."""
        row = self.part(part).get(key)
        return row is not None and (row["call"] == call or not (problems(row) or "stopped" in row))

    def left_out(self, part: str) -> list[str]:
        return [key for key in self.content["planned"].get(part, []) if key not in self.part(part)]

    def failures(self) -> list[tuple[str, str, dict[str, str]]]:
        """Part, key and error of all that failed."""
        return [
            (part, " / ".join(filter(None, [key, name])), error)
            for part, rows in self.content["rows"].items()
            for key, row in rows.items()
            for name, error in problems(row)
        ]


def failure(error: BaseException) -> dict[str, str]:
    """An error as results keep it."""
    return {"class": type(error).__name__, "message": str(error).strip()[:1000]}


def problems(row: dict) -> list[tuple[str, dict[str, str]]]:
    """Errors of a row, or of what was measured side by side in it, by name; findings are none."""
    found = [("", row), *row.get("by", {}).items()]
    return [(name, part["error"]) for name, part in found if "error" in part and part["error"]["class"] not in FINDINGS]
