"""Addresses as text."""

import pytest

from workers.sockets import format_address, parse_address


@pytest.mark.parametrize("address", ["127.0.0.1:80", "worker-3:9000", "[::1]:443"])
def test_addresses_round_trip(address: str) -> None:
    assert format_address(*parse_address(address)) == address


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:0", "host:70000", "host:x"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        parse_address(address)
