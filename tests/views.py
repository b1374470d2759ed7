"""What tests of DAX need of the machine."""

import pytest

from coherent_vfs.server.dax.view import View


def need_views() -> None:
    """Skip the test where a backend can give its guest no DAX window."""
    with View() as view:
        if not view.available:
            pytest.skip(f"no DAX: {view.reason}")
