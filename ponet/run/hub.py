"""The Hugging Face hub, which is tried once."""

import socket
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies


def import_datasets() -> Any:
    """The `datasets` library, which looks in its cache alone where the hub cannot be reached.

    By itself it would try for half a minute, with two lines of the log each time.
    """
    # a second to import, and needed by few sources of data
    import datasets.config

    hub = urlsplit(datasets.config.HF_ENDPOINT)
    # what a proxy reaches cannot be told from here
    if not datasets.config.HF_HUB_OFFLINE and not getproxies():
        try:
            socket.create_connection((hub.hostname, hub.port or 443), timeout=10).close()
        except OSError:
            datasets.config.HF_HUB_OFFLINE = True
    return datasets
