"""Where a candidate's code meets its tests: two processes, so that the candidate can only answer, never judge.

    worker ──job──▶ judge (tests, verdict) ◀──values over one socket──▶ candidate (walled in)
                                           names, calls, results: data

judge.py      the usher, and for each completion a judge: runs the tests, says how many passed
cases.py      what is one test: asserts, test functions, HumanEval's check, a list of snippets
remote.py     the candidate's things as the tests see them
candidate.py  the other side: runs the code, answers calls
values.py     plain data, and what only stands for something, as JSON
walls.py      what the candidate is held by: limits, namespaces, Landlock, seccomp
seccomp.py    the system calls it may not make
landlock.py   the files it may see

Standard library only, relative imports only: the judge is started bare, without the package around it.
"""
