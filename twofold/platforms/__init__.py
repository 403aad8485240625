"""What machine is this: where the work runs, and how much of it this process may use.

cgroup.py        the control groups this process lives in, version 1 and 2
compiler.py      the C++ compiler that kernels may be built with, when there is one
cores.py         the processors this process may use
direct.py        a file read past the system's cache
heap.py          memory that was freed stays with the process
host.py          HostPool, memory outside the device: this machine's, or files
instructions.py  the vector instructions of this processor
memory.py        the memory this process may use
pages.py         large tensors straight from the system
platform.py      Platform, the answers in one value; current() gathers them
threads.py       how many threads there are, and how long they may spin
"""

from .compiler import Compiler, find_compiler
from .cores import usable_cores
from .heap import keep_freed
from .instructions import instruction_sets
from .memory import Memory, free_on, read_memory
from .platform import Platform, current
from .threads import bound_spin, bound_team, team_size

__all__ = [
    "Compiler",
    "Memory",
    "Platform",
    "bound_spin",
    "bound_team",
    "current",
    "find_compiler",
    "free_on",
    "instruction_sets",
    "keep_freed",
    "read_memory",
    "team_size",
    "usable_cores",
]
