"""What keeps a server's answer from coming has a reason, whatever library noticed it."""

import io

import pytest

from heartseg.datasets.girder_client import FailedDownload, Server


@pytest.mark.parametrize("base", ["http://a..b/", "http://" + "a" * 70 + "/"])
def test_a_host_name_that_can_be_none_is_a_failed_download(base):
    with pytest.raises(FailedDownload, match="cannot be reached"):
        Server(base).fetch("folder", io.BytesIO())
