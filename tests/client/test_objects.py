"""What is a place in an object store, and what is said where none is to be had; the rest is tried on a real server."""

import sys

import pytest
from holdfast.client.objects import Objects, is_url


def test_what_is_a_place_in_an_object_store() -> None:
    assert all(map(is_url, ("s3://bucket", "s3://bucket/a/b", "gs://bucket/x", "az://container/x/")))
    assert not any(map(is_url, ("/s3", "s3:/bucket", "s3:///x", "file:///x", "http://bucket", "S3://bucket")))


def test_without_the_package_it_is_said_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(OSError, match=r"s3://bucket/x needs obstore: pip install 'holdfast\[s3\]' on every node"):
        Objects("s3://bucket/x")
