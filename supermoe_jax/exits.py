"""The exit codes of the `supermoe` command."""

OK = 0
ERROR = 1  # it was explained
USAGE = 2
CRASHED = 70  # `EX_SOFTWARE` of sysexits.h: a process of a run on several was ended by something that nobody expects
RESUME = 75  # `EX_TEMPFAIL`: nothing is wrong with the run; the same command goes on with it
INTERRUPTED = 130  # by Ctrl-C, and nothing was saved

# How a command ends by itself, and need not be explained.
ENDS = (OK, ERROR, USAGE, RESUME, INTERRUPTED)
