"""Runs Python programs in forks of a process that has the large libraries imported already."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

# pytest, because a fork imports the main module of the process that asked for it
LIBRARIES = (
    "pytest torch._dynamo torch.utils.tensorboard datasets deepspeed matplotlib.pyplot "
    "sklearn.metrics tokenizers safetensors sentencex"
).split()
_ROOT = Path(__file__).resolve().parents[1]


def run_program(words: list[str], folder: Path, output: Path) -> int | None:
    """Run what follows `python` on a command line, in the environment of the first call.

    `output` takes both of its streams; the result is the exit status.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    process = context.Process(target=_run, args=(words, folder, output))
    process.start()
    process.join()
    return process.exitcode


def _run(words: list[str], folder: Path, output: Path) -> None:
    # seconds, after which it is ended
    signal.alarm(300)
    # one core: programs then start no helpers, each of which would import the libraries again
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    os.chdir(folder)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    paths = os.environ["PYTHONPATH"].split(os.pathsep)
    paths += [path for path in sys.path if path not in (str(_ROOT), str(_ROOT / "kernels"))]
    try:
        if words[0] == "-m":
            sys.argv, sys.path = words[1:], ["", *paths]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path = words, [str(Path(words[0]).resolve().parent), *paths]
            runpy.run_path(words[0], run_name="__main__")
    finally:
        # as a program ends, but without taking all libraries apart, which costs seconds
        atexit._run_exitfuncs()
