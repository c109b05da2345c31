"""Signals, in processes of their own: a test process keeps its handlers."""

import signal
import subprocess
import sys

import pytest

BEGIN = "import os, signal, time; from augment_cli import signals; signals.install(); me = os.getpid()\n"


def run(code: str, hangup: signal.Handlers = signal.SIG_DFL) -> subprocess.CompletedProcess:
    def begin() -> None:  # a suite in the background ignores Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, hangup)

    command = [sys.executable, "-c", BEGIN + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=begin)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_waits_for_the_end_of_the_outermost_block(name):
    code = f"""
try:
    with signals.held():
        with signals.held():
            os.kill(me, signal.{name})
        print("inner", signals.pending())
    print("never")
except signals.Stopped as stop:
    print(stop.exit_code, signals.pending())
"""
    assert run(code).stdout == f"inner True\n{128 + getattr(signal, name)} False\n"


def test_a_repeated_signal_does_not_break_into_what_the_first_began():
    code = """
try:
    os.kill(me, signal.SIGTERM)
except signals.Stopped:
    os.kill(me, signal.SIGTERM)
    os.kill(me, signal.SIGINT)
    print("done")
"""
    assert run(code).stdout == "done\n"


def test_a_signal_that_is_ignored_stays_ignored():
    assert run("os.kill(me, signal.SIGHUP); print('on')", hangup=signal.SIG_IGN).stdout == "on\n"


def test_a_forked_process_leaves_signals_to_its_parent():
    code = """
child = os.fork()
if not child:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code).stdout == "7\n"
