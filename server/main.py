"""vfs-backend: the command."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

from coherent_vfs.coherence.client.membership import Membership
from coherent_vfs.coherence.common import log
from coherent_vfs.coherence.common.errors import UserError
from coherent_vfs.coherence.common.sd_notify import Notifier
from coherent_vfs.server.dax.view import View
from coherent_vfs.server.device.device import FsDevice
from coherent_vfs.server.device.event_loop import EventLoop
from coherent_vfs.server.front_ends import FrontEnds
from coherent_vfs.server.host import credentials
from coherent_vfs.server.listener import adopt, listen
from coherent_vfs.server.options import PROG, Options, parse
from coherent_vfs.server.settings import Settings

NOFILE: Final = 1_000_000
"""Open files that are enough: each inode that the guest knows takes one."""
ROOT_SECONDS: Final = 1.0
"""So often it is looked whether the shared directory is still there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run vfs-backend with these arguments (the process's own by default); returns the exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    log.configure(options.log_level, json=options.log_json)
    try:
        _serve(options)
    except UserError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(options: Options) -> None:
    """Serve until a signal says to end."""
    notifier = Notifier()
    with ExitStack() as stack:
        _raise_nofile(options.rlimit_nofile)
        root_fd = _open_directory(options.share.shared_dir)
        stack.callback(os.close, root_fd)
        loop = EventLoop()
        view = _view(options, stack)
        settings = options.settings(root_fd, dax=view is not None)
        membership = None
        if options.coherence is not None:
            membership = stack.enter_context(closing(_join(options, options.coherence, root_fd, settings)))
        try:
            device = FsDevice(settings, loop, membership, view)
        except OSError as error:
            raise _not_shared(options.share.shared_dir, error) from None
        stack.enter_context(closing(device))
        if membership is not None:
            fs = device.fs
            membership.attach(loop, lambda: _counters(device, root_fd), watched=fs.watched, forgotten=fs.inodes.unwatch)
            fs.validity.watch_with(membership)
        if options.socket_path is not None:
            listener = stack.enter_context(listen(options.socket_path, options.socket_group))
        else:
            assert options.fd is not None
            listener = stack.enter_context(adopt(options.fd))
        credentials.prepare()
        ended = loop.stop if options.exit_on_disconnect else lambda: None
        stack.enter_context(closing(FrontEnds(listener.socket, device, loop, ended, loop.stop)))
        stack.enter_context(_stopped_by_signals(loop))
        _keep_alive(loop, notifier)
        _look_at_root(loop, root_fd, options.share.shared_dir)
        notifier.ready(f"Sharing {options.share.shared_dir}")
        loop.run()
        notifier.stopping()


def _raise_nofile(wanted: int | None) -> None:
    """Set the limit of open files; None: as high as useful and permitted; 0: leave it."""
    if wanted == 0:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = int(Path("/proc/sys/fs/nr_open").read_text())
    if wanted is None and soft >= min(NOFILE, most):
        return
    limit = min(NOFILE, most) if wanted is None else wanted
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(hard, limit)))
    except (ValueError, OSError):
        if wanted is not None:
            raise UserError(f"--rlimit-nofile {wanted}: not permitted, at most {min(hard, most)}") from None
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _open_directory(path: Path) -> int:
    """An O_PATH descriptor of the directory to share."""
    try:
        root_fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if os.access(f"/proc/self/fd/{root_fd}", os.R_OK | os.X_OK, effective_ids=True):
            return root_fd
        os.close(root_fd)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _not_shared(path, error) from None


def _not_shared(path: Path, error: OSError) -> UserError:
    return UserError(f"shared directory {path}: {error.strerror}: name another with --shared-dir")


def _view(options: Options, stack: ExitStack) -> View | None:
    """What a DAX window shows of files; None where there is to be none, or cannot be."""
    if options.share.dax == "never":
        return None
    view = stack.enter_context(closing(View()))
    if view.available:
        return view
    log.get_logger(__name__).warning("no DAX: guests read and write by requests", reason=view.reason)
    return None


def _join(options: Options, table: Path, root_fd: int, settings: Settings) -> Membership:
    return Membership.join(
        str(table),
        share_root=root_fd,
        guest=options.guest,
        cache=options.share.cache,
        socket_path=None if options.coherence_socket is None else str(options.coherence_socket),
        window=settings.window_bytes,
    )


def _removed(root_fd: int) -> bool:
    """Whether the shared directory has been removed; another one of its name is not shared."""
    try:
        return os.fstat(root_fd).st_nlink == 0
    except OSError as error:
        # From a file server.
        return error.errno == errno.ESTALE


def _look_at_root(loop: EventLoop, root_fd: int, path: Path) -> None:
    """Say once that the shared directory is gone: the guest sees an empty one for ever."""
    if _removed(root_fd):
        log.get_logger(__name__).error(
            "the shared directory was removed: make it again, then restart the virtual machine with its backend",
            path=str(path),
        )
        return
    loop.call_later(ROOT_SECONDS, lambda: _look_at_root(loop, root_fd, path))


def _counters(device: FsDevice, root_fd: int) -> dict[str, int]:
    """What coherencectl status shows of this backend."""
    fs = device.fs
    return {
        "requests": sum(fs.requests.values()),
        "inodes": fs.inodes.live,
        "handles": fs.handles.live,
        "aware": int(fs.aware),
        "changes": fs.publisher.made,
        "held": fs.publisher.held,
        "leases": fs.validity.given,
        "parked": device.parked,
        "removed": int(_removed(root_fd)),
    }


@contextmanager
def _stopped_by_signals(loop: EventLoop) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP stop the loop, whatever it is waiting for."""
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    loop.add_reader(woken.fileno(), loop.stop)
    try:
        yield
    finally:
        loop.remove_reader(woken.fileno())
        signal.set_wakeup_fd(-1)
        wake.close()
        woken.close()


def _keep_alive(loop: EventLoop, notifier: Notifier) -> None:
    """Tell the service manager's watchdog, if there is one, as long as the loop goes round."""
    period = notifier.alive_every
    if period is None:
        return
    notifier.alive()
    loop.call_later(period, lambda: _keep_alive(loop, notifier))


if __name__ == "__main__":
    sys.exit(main())
