"""What tests of kernels share."""

import os

import pytest


@pytest.fixture(scope="module")
def tpu_compiler():
    """The compiler for TPU, which needs no TPU."""
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPU, is missing")
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
