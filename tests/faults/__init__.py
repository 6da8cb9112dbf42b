"""Faults put in on purpose: damaged and hostile files, disks that fail, folders that vanish, a second process.

What must hold: what took work is kept, nothing is believed that was not checked, and the user gets one sentence, a
UserError. Any other exception, a crash, a hang or a silent wrong result is a bug.

- `test_damage.py`: bits flipped and pages zeroed in every file a user may receive. Another file is one more entry of
  `FILES`: its name, and a function that loads a directory and returns what was read from the file.
- `test_hostile.py`: JSON changed by hypothesis, headers and optimiser states that lie. Another lie about a training
  checkpoint is one more entry of `LIES`.
- `test_writes.py`: a disk that is full, and a process killed, at the n-th write of a small run. Another command that
  writes is one more entry of `COMMANDS`.
- `test_kill.py`: SIGKILL at random moments of a training.
- `test_belonging.py`: parts of different models in one directory, and data replaced between two runs.
- `test_losses.py`: data, directories and labels that fail in the course of the work; two writers of one directory.

`models_for_tests.py` trains the smallest model with every kind of file; the fixture `model` is a fresh copy of it.
"""
