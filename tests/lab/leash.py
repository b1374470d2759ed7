"""Run a program that ends with whoever holds the other end of a socket, however that one ends.

Usage: leash.py FD PROGRAM [ARGUMENT...]. Run as a script, for its start must be quick and it must be a single thread
(a death signal follows the thread that forked). It writes the program's process id as a line to FD, then
its exit status when it has ended. When FD is closed at the other end, it kills the program's process group.
"""

import os
import selectors
import signal
import subprocess
import sys


def main() -> int:
    fd = int(sys.argv[1])
    # setpriv: should the leash itself be killed, the program goes too.
    command = ["setpriv", "--pdeathsig", "KILL", "--", *sys.argv[2:]]
    inherited = [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2 and int(name) != fd]
    program = subprocess.Popen(command, start_new_session=True, pass_fds=inherited)
    os.write(fd, b"%d\n" % program.pid)
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        selector.register(os.pidfd_open(program.pid), selectors.EVENT_READ)
        selector.select()
    if program.poll() is None:
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()
    # Its descendants may outlive it (a backend's sandbox, UML's helpers): they share its group.
    try:
        os.killpg(program.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        os.write(fd, b"%d\n" % program.returncode)
    except BrokenPipeError:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
