"""Which metrics there are: the status of the daemon and its backends in Prometheus' words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coherent_vfs.coherence.protocol.messages import Backend, Status

CONTENT_TYPE = CONTENT_TYPE_LATEST

# Of one backend, by the names of its counters (server/main.py). A backend can name no others.
BACKEND_COUNTERS = {
    "requests": ("requests", "Requests of the guest that were served."),
    "changes": ("changes", "Changes that the guest made; each makes others fetch again what they had of it."),
    "held": ("held_changes", "Changes of the guest that had to wait for leases of other guests."),
    "leases": ("leases", "Leases that the guest was given."),
}
BACKEND_GAUGES = {
    "inodes": ("inodes", "Inodes that the guest knows."),
    "handles": ("handles", "Files and directories that the guest has open."),
    "aware": ("aware", "1 for a guest that checks the version table, 0 for any other."),
    "parked": ("parked_requests", "Requests of the guest that wait now, for others' leases or for the host watch."),
}
# A guest may have several backends, one for each share: the process tells them apart.
LABELS = ("guest", "pid")


class _Snapshot(Collector):
    """What is true at one moment."""

    def __init__(self, status: Status, backends: Sequence[Backend]) -> None:
        self._status = status
        self._backends = backends

    def collect(self) -> Iterable[Metric]:
        """All families."""
        yield from self._domain()
        yield from self._members()

    def _domain(self) -> Iterable[Metric]:
        status, watch, dax = self._status, self._status.watch, self._status.dax
        counters = (
            ("bumps", "Bumps of the version table since it was made, by backends and by coherenced.", status.sequence),
            ("distrusts", "Times the version table was not to be trusted any more.", status.distrusts),
            ("changes", "Changes that the host watch saw.", watch.events),
            ("host_changes", "Of these, changes made on the host, or possibly so, and bumped.", watch.bumped),
            ("backend_made_changes", "Of these, changes that were surely made and bumped by a backend.", watch.own),
            ("gone_changes", "Of these, writes to files without a name by now: nothing to bump.", watch.gone),
            ("refused_watches", "Requests of backends for a watch that were refused.", watch.refused),
            ("watch_overflows", "Times the host watch lost changes.", watch.overflows),
            ("dax_refused_claims", "Claims for DAX windows that were refused.", dax.refused),
        )
        gauges = (
            ("trusted", "1 when cached things may be used, 0 when everybody asks for everything.", status.trusted),
            ("table_removed", "1 when the table's file was removed while the daemon runs.", status.removed),
            ("outside_backends", "Backends that serve guests with a table that was removed.", len(status.outside)),
            ("table_slots", "Slots of the version table.", status.slots),
            ("roots", "Shared directories of the backends that are members.", status.roots),
            ("backends", "Backends that are members.", len(self._backends)),
            ("missing_backends", "Backends that live and are not connected.", len(status.missing)),
            ("watches", "Directories and files that are watched (fanotify: file systems).", watch.watches),
            ("dax_windows", "DAX windows of guests.", dax.windows),
            ("dax_window_bytes", "Their sizes.", dax.window_bytes),
            ("dax_window_bytes_limit", "How much that may be at most.", dax.total_limit),
            ("dax_mappings", "Parts of files that are mapped in them.", dax.mappings),
            ("dax_mapped_bytes", "Their sizes.", dax.mapped_bytes),
            ("watches_limit", "Watches that there can be at most (0: no limit).", watch.limit),
        )
        raises = CounterMetricFamily(
            "coherenced_floor_raises", "Times everything that was cached became invalid.", labels=("reason",)
        )
        for reason, count in status.floor_raises.items():
            raises.add_metric((reason,), count)
        yield raises
        for name, told, value in counters:
            yield CounterMetricFamily(f"coherenced_{name}", told, value=value)
        for name, told, value in gauges:
            yield GaugeMetricFamily(f"coherenced_{name}", told, value=value)

    def _members(self) -> Iterable[Metric]:
        info = GaugeMetricFamily("coherenced_backend_info", "1 for each backend.", labels=(*LABELS, "cache"))
        answered = GaugeMetricFamily(
            "coherenced_backend_answered", "1 when the backend answered in time; else it has no counts.", labels=LABELS
        )
        seconds = GaugeMetricFamily(
            "coherenced_backend_member_seconds", "Seconds since the backend became a member.", labels=LABELS
        )
        for backend in self._backends:
            labels = backend.guest, str(backend.pid)
            info.add_metric((*labels, backend.cache), 1)
            answered.add_metric(labels, backend.counters is not None)
            seconds.add_metric(labels, backend.seconds)
        yield from (info, answered, seconds)
        for counter, (name, told) in BACKEND_COUNTERS.items():
            yield self._fill(CounterMetricFamily(f"coherenced_backend_{name}", told, labels=LABELS), counter)
        for counter, (name, told) in BACKEND_GAUGES.items():
            yield self._fill(GaugeMetricFamily(f"coherenced_backend_{name}", told, labels=LABELS), counter)

    def _fill(self, family: CounterMetricFamily | GaugeMetricFamily, counter: str) -> Metric:
        for backend in self._backends:
            if backend.counters is not None and counter in backend.counters:
                family.add_metric((backend.guest, str(backend.pid)), backend.counters[counter])
        return family


def render(status: Status, backends: Sequence[Backend]) -> bytes:
    """The text that Prometheus reads, of CONTENT_TYPE."""
    return generate_latest(_Snapshot(status, backends))
