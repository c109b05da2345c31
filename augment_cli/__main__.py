"""The `augment` program; signals are seen to before anything that takes long is imported."""

import sys

from augment_cli import signals


def main() -> None:
    try:
        signals.install()
        from augment_cli.cli import main as program

        program()
    except signals.Stopped as stop:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
