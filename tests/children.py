"""Children that are forked from a server with everything imported: starting Python anew takes longer than they live."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext

import torch.multiprocessing

PRELOADED = ("fit3d_ns.cli.finetune", "fit3d_ns.cli.probe", "tests.finetuning.finetuning_scene")


def get_context() -> ForkServerContext:
    """The context that starts them one by one."""
    context = multiprocessing.get_context("forkserver")
    # A server that runs already, as that of the fault campaigns, imports no more; children import what they lack.
    context.set_forkserver_preload([*PRELOADED])
    return context


def run_processes(function: Callable[..., None], folder: str, number: int) -> None:
    """Calls `function(rank, folder)` in `number` processes; raises what one of them raised."""
    get_context()
    torch.multiprocessing.start_processes(function, args=(folder,), nprocs=number, start_method="forkserver")
