"""Work in a fork of the test process: it imports nothing, and a kill ends it as any process."""

import os
import resource
import signal
import sys
import traceback

import evomerge.answering.hf.engine  # noqa: F401 (before any fork)
from evomerge.cli import main


def fork(work):
    """The id of a process that ends with the code that `work` returns, 70 if it raises."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = work()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def begin(command, log, limit=None, first=lambda: None):
    """A process that runs the command; its output goes to `log`; no file may grow beyond `limit`
    bytes; `first` is called there.
    """

    def work():
        out = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        first()
        return main(command)

    return fork(work)


def ended(child):
    """Its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def running(child):
    """Whether it has not ended yet; afterwards `ended` still tells its code."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
