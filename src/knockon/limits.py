"""What a machine's limits look like from inside, and what to do about them: memory, disks, files."""

import errno

import torch

from knockon.types import UserError

LESS = {
    "prepare": "--memory",
    "train": "--train.sets, --train.cells, --train.validate-cells or --genes, or choose a smaller --preset",
    "predict": "--cells",
    "generate": "--cells",
    "embed": "the number of cells in DATA",
    "rank": "--cells or --draws",
    "evaluate": "the number of predicted cells, or name fewer of --suite",
    "compare": "--cells, --genes or --jobs, or name fewer of --models",
    "simulate": "--cells or --genes",
}
"""What to lower where memory does not suffice, by command."""
ERRORS = (MemoryError, OSError, RuntimeError, ImportError)
"""Types of errors that can be the machine's."""
OUT_OF_MEMORY = (
    *("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "Cannot allocate memory"),
    *("can't start new thread", "could not create a primitive", "failed to map segment"),
)
"""How libraries say so whose errors have no type for it."""


def explained(error: Exception, command: str) -> UserError | None:
    """Turn an error that is the machine's into a message; None for one that is the program's."""
    if _is_memory(error):
        less = LESS.get(command)
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        return UserError(
            f"Memory is exhausted ({reason})",
            expected="more memory than this machine has left",
            mend=(f"lower {less}, or " if less else "")
            + "run it where there is more; the same command goes on from what was finished",
        )
    if isinstance(error, OSError):
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return UserError(
            f"The system refuses: {error.strerror or error}",
            offenders=named,
            mend="see to it, and give the same command again",
        )
    return None


def _is_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | ImportError) and any(
        words in str(error) for words in OUT_OF_MEMORY
    )
