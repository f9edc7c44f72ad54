"""Runs Python programs in forks of a process that has the large libraries imported already.

Reads a job per line of standard input, `{"command", "folder", "output"}`, and answers each with a
line, the exit status. The words after `python` are a file or `-m` and a module, then arguments.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import sys
import traceback

LIBRARIES = (
    "torch._dynamo torch.utils.tensorboard datasets deepspeed matplotlib.pyplot sklearn.metrics "
    "tokenizers safetensors sentencex"
)
SECONDS = 300
"""After which a program is ended."""


def run(words: list[str]) -> int:
    """Run a program as `python` does and give its exit status."""
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path[0] = ""
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Serve until standard input ends."""
    # libraries may print
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # one core: programs then start no helpers, each of which would import the libraries again
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    for name in LIBRARIES.split():
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)
            os.chdir(job["folder"])
            files = os.open(os.devnull, os.O_RDONLY), os.open(job["output"], os.O_RDWR)
            for target, source in ((0, files[0]), (1, files[1]), (2, files[1])):
                os.dup2(source, target)
            status = run(job["command"])
            # as a program ends, but without taking all libraries apart, which costs seconds
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, file=answers, flush=True)


if __name__ == "__main__":
    main()
