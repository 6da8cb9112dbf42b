"""How much memory a call takes at its peak, beyond what its inputs hold."""

import ctypes
import multiprocessing
from pathlib import Path

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_bytes(make, small, whole) -> int | None:
    """Peak of the resident memory during the first call of make(*whole)(), in a process of its own that has called
    make(*small)() to load what is loaded once. None where the system does not tell.

    `make` is a function of a module, and its arguments can be pickled.
    """
    if not CLEAR.exists():
        return None
    # Forked from a process that has imported PyTorch but not started its threads.
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
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or the call could use it unseen
    before = _status("VmRSS")
    CLEAR.write_text("5")  # sets the peak to what there is now
    function()
    sender.send(_status("VmHWM") - before)


def _status(name):
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
