"""Peak memory of a call beyond its inputs."""

import ctypes
import multiprocessing
from pathlib import Path

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_bytes(make, small, whole) -> int | None:
    """Peak resident memory of the first call of make(*whole)(), in bytes. It runs in a new process, after
    make(*small)() as a warm-up. None if the system does not report it.

    `make` must be a function of a module, with picklable arguments.
    """
    if not CLEAR.exists():
        return None
    # The fork server has imported PyTorch but not started its threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dalle_kernels", make.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, make, small, whole))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _measure(sender, make, small, whole):
    make(*small)()
    function = make(*whole)
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory, which the call could otherwise reuse unnoticed
    before = _status("VmRSS")
    CLEAR.write_text("5")  # resets the peak
    function()
    sender.send(_status("VmHWM") - before)


def _status(name):
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
