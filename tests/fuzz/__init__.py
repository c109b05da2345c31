"""Fuzzing of everything that reads input from outside: `python -m tests.fuzz`, and a part of it in the test suite.

A case is the bytes of one file, or of one `--set` string. A reader passes if it accepts the case or raises
AugmentError, within limits of time and memory.
"""
