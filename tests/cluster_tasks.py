"""What tasks of submitit do in tests; it is imported in their processes, so it imports little."""

import os
import signal
from pathlib import Path

from fit3d_ns.cli.cluster import ClusterConfig

NAMES = ["failing", "dying", "preempted", "well"]


def fail_or_die(cluster: ClusterConfig) -> dict[str, str]:
    """Of four scenes one fails, one is killed, one is preempted once."""
    (name,) = cluster.choose(NAMES)
    if name == "failing":
        raise ValueError("It cannot be done.")
    if name == "dying":
        os.kill(os.getpid(), signal.SIGKILL)
    file = Path(name)
    if file.exists():
        file.write_text("twice")
    else:
        file.write_text("once")
        if name == "preempted":
            signal.raise_signal(signal.SIGUSR2)
    return {}
