"""Run a program that ends with whoever holds the other end of a socket, however that one ends.

Usage: leash.py FD PROGRAM [ARGUMENT...]. It writes the program's process id as a line to FD, then its exit
status when it has ended. When FD is closed at the other end, it kills the program's process group. Run as a
script, for its start must be quick, and it must be a single thread: a death signal follows the thread that
forked, so that a thread of the tests cannot be the parent of what it starts.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys


def main() -> int:
    fd = int(sys.argv[1])
    # setpriv: should the leash itself be killed, the program goes too.
    command = ["setpriv", "--pdeathsig", "KILL", "--", *sys.argv[2:]]
    os.set_inheritable(fd, False)
    program = subprocess.Popen(command, start_new_session=True, close_fds=False)
    os.write(fd, b"%d\n" % program.pid)
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        selector.register(os.pidfd_open(program.pid), selectors.EVENT_READ)
        selector.select()
    if program.poll() is None:
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()
    # Its descendants may outlive it (a backend's sandbox, UML's helpers): they share its group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    with contextlib.suppress(BrokenPipeError):
        os.write(fd, b"%d\n" % program.returncode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
