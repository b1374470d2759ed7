"""Layouts of vhost-user payloads."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coherent_vfs.server.vhost_user import messages
from coherent_vfs.server.vhost_user.messages import (
    MAX_FDS,
    MAX_PAYLOAD,
    Config,
    MemoryRegion,
    Message,
    ProtocolError,
    SharedMapping,
    VringAddress,
    VringState,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
regions = st.builds(MemoryRegion, u64, u64, u64, u64)


@given(st.builds(VringState, u32, u32))
def test_vring_state(state: VringState) -> None:
    assert messages.unpack_vring_state(messages.pack_vring_state(state)) == state


@given(st.builds(VringAddress, u32, u64, u64, u64, u32, u64))
def test_vring_address(address: VringAddress) -> None:
    assert messages.unpack_vring_address(messages.pack_vring_address(address)) == address


@given(st.lists(regions, max_size=MAX_FDS), st.binary(max_size=40))
def test_memory_table_ignores_what_follows(table: list[MemoryRegion], rest: bytes) -> None:
    assert messages.unpack_memory_table(messages.pack_memory_table(table) + rest) == table


@given(regions)
def test_single_region(region: MemoryRegion) -> None:
    assert messages.unpack_single_region(messages.pack_single_region(region)) == region


@given(st.builds(Config, u32, st.binary(max_size=256), u32))
def test_config(config: Config) -> None:
    assert messages.unpack_config(messages.pack_config(config)) == config


@given(st.lists(u64, max_size=256))
def test_shmem_config(sizes: list[int]) -> None:
    assert messages.unpack_shmem_config(messages.pack_shmem_config(sizes)) == sizes


def test_shmem_config_of_too_many_regions() -> None:
    with pytest.raises(ValueError, match="257 shared memory regions"):
        messages.unpack_shmem_config(struct.pack("=2I256Q", 257, 0, *range(256)))


@given(st.builds(SharedMapping, u64, u64, u64, st.booleans(), st.integers(0, 255)))
def test_shared_mapping(mapping: SharedMapping) -> None:
    assert messages.unpack_shared_mapping(messages.pack_shared_mapping(mapping)) == mapping


def test_shared_mapping_with_unknown_flags() -> None:
    with pytest.raises(ValueError, match="flags 0x3"):
        messages.unpack_shared_mapping(struct.pack("=5Q", 0, 1, 2, 3, 3))


def test_layouts_on_the_wire() -> None:
    """The order of fields, spelled out once by hand from the specification."""
    address = VringAddress(index=1, flags=2, desc=3, used=4, avail=5, log=6)
    assert messages.pack_vring_address(address) == struct.pack("=2I4Q", 1, 2, 3, 4, 5, 6)
    region = MemoryRegion(guest_addr=1, size=2, user_addr=3, mmap_offset=4)
    assert messages.pack_memory_table([region]) == struct.pack("=2I4Q", 1, 0, 1, 2, 3, 4)
    assert messages.pack_single_region(region) == struct.pack("=5Q", 0, 1, 2, 3, 4)
    assert messages.pack_config(Config(1, b"ab", 3)) == struct.pack("=3I2s", 1, 2, 3, b"ab")
    mapping = SharedMapping(region=1, file_offset=2, moffset=3, length=4, writable=True)
    assert messages.pack_shared_mapping(mapping) == struct.pack("=5Q", 1, 2, 3, 4, 1)
    assert messages.pack_shmem_config([5, 6]) == struct.pack("=2I256Q", 2, 0, 5, 6, *bytes(254))
    assert messages.pack_header(1, 9, 12) == struct.pack("=3I", 1, 9, 12)


@pytest.mark.parametrize(
    "unpack",
    [
        messages.unpack_u64,
        messages.unpack_vring_state,
        messages.unpack_vring_address,
        messages.unpack_memory_table,
        messages.unpack_single_region,
        messages.unpack_config,
        messages.unpack_shmem_config,
        messages.unpack_shared_mapping,
    ],
)
@given(payload=st.binary(max_size=7))
def test_short_payloads_are_value_errors(unpack: object, payload: bytes) -> None:
    assert callable(unpack)
    with pytest.raises(ValueError, match="bytes"):
        unpack(payload)


@pytest.mark.parametrize("count", [2, MAX_FDS + 1, 2**32 - 1])
def test_memory_table_with_more_regions_than_it_holds(count: int) -> None:
    with pytest.raises(ValueError, match="memory table"):
        messages.unpack_memory_table(struct.pack("=2I4Q", count, 0, 1, 2, 3, 4))


@pytest.mark.parametrize("flags", [0, 2, 3])
def test_header_of_another_version(flags: int) -> None:
    with pytest.raises(ProtocolError, match=f"version {flags}, 1 expected"):
        messages.unpack_header(messages.pack_header(1, flags, 0))


def test_header_of_too_much() -> None:
    assert messages.unpack_header(messages.pack_header(1, 1, MAX_PAYLOAD)) == (1, 1, MAX_PAYLOAD)
    with pytest.raises(ProtocolError, match="4097 bytes, 4096 allowed"):
        messages.unpack_header(messages.pack_header(1, 1, MAX_PAYLOAD + 1))


def test_message_owns_its_descriptors() -> None:
    fds = list(os.pipe())
    message = Message(1, 1, fds=list(fds))
    with pytest.raises(ValueError, match="2 file descriptors came, 1 expected"):
        message.take_fds(1)
    assert message.take_fds(2) == fds
    message.close()
    for fd in fds:
        os.fstat(fd)
    message.fds = fds
    message.close()
    for fd in list(fds):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_message_names() -> None:
    assert Message(24, 1).name == "GET_CONFIG"
    assert Message(77, 1).name == "77"
