"""Addresses of stores and their servers, how long a network call is tried, what its errors mean: nothing is sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_store.errors import ConfigError, StorageDenied, StorageFull, StorageUnavailable, StoreError, UserError
from cache_store.storage.addresses import redacted
from cache_store.storage.object_client import check_endpoints
from cache_store.storage.object_errors import Kind, fault_of
from cache_store.storage.open import parse_address
from cache_store.storage.retry import RetryPolicy


@pytest.mark.parametrize(
    ("uri", "scheme", "bucket", "path", "spelled"),
    [
        ("runs/a", "file", "", "runs/a", "runs/a"),
        ("file:///a/b", "file", "", "/a/b", "file:///a/b"),
        ("memory://x/", "memory", "", "x", "memory://x/"),
        ("s3://bucket", "s3", "bucket", "", "s3://bucket"),
        ("s3://bucket/", "s3", "bucket", "", "s3://bucket"),
        ("s3://my.bucket-1/a/b/", "s3", "my.bucket-1", "a/b", "s3://my.bucket-1/a/b"),
        ("gs://b/x", "gs", "b", "x", "gs://b/x"),
        ("az://container/x y", "az", "container", "x y", "az://container/x y"),
    ],
)
def test_known_addresses_are_taken_apart(uri: str, scheme: str, bucket: str, path: str, spelled: str) -> None:
    address = parse_address(uri)
    assert (address.scheme, address.bucket, address.path, address.uri) == (scheme, bucket, path, spelled)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "s3:/b",
        "s3://",
        "s3:///x",
        "s3://b//x",
        "s3://b/../x",
        "s3://b/./x",
        "s3://-b/x",
        "s3://b\\c/x",
        "S3://b/x",
        "http://host/x",
        "https://host/x",
        "s3a://b",
        "hdfs://b/x",
        "simplecache::s3://b/x",
        "s3://b/x::memory://y",
        "file://relative",
        "s3://b\0/x",
    ],
)
def test_other_addresses_are_refused_with_what_is_allowed(uri: str) -> None:
    with pytest.raises(UserError, match=r"allowed|write file:///"):
        parse_address(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:hunter2@bucket/x",
        "s3://bucket/x?secret=hunter2",
        "s3://bucket/x#hunter2",
        "https://me:hunter2@host/x",
        "az://container?sig=hunter2",
        "memory::s3://KEY:hunter2@bucket/x",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_address(uri)
    assert "hunter2" not in str(raised.value)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_typed_error(text: str) -> None:
    try:
        address = parse_address(text)
    except UserError:
        return
    assert address.scheme in ("file", "memory", "s3", "gs", "az")
    assert redacted(address.uri) == address.uri or address.scheme in ("file", "memory")


@given(
    st.builds(
        RetryPolicy,
        attempts=st.integers(1, 30),
        first_wait_s=st.floats(0.001, 10),
        longest_wait_s=st.floats(0.001, 100),
    ),
    st.floats(0, 1, exclude_max=True),
)
def test_waits_are_bounded_in_number_and_length_and_grow(patience: RetryPolicy, drawn: float) -> None:
    waits = list(patience.waits(lambda: drawn))
    assert len(waits) == patience.attempts - 1
    assert all(0 < wait <= patience.longest_wait_s for wait in waits)
    assert waits == sorted(waits)


def test_patience_is_read_from_the_environment_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGPROP_STORE_ATTEMPTS", "3")
    monkeypatch.setenv("SEGPROP_STORE_REQUEST_S", "1.5")
    assert (RetryPolicy.from_environment().attempts, RetryPolicy.from_environment().request_s) == (3, 1.5)
    for bad in ("0", "-1", "x", "nan", "1e9"):
        monkeypatch.setenv("SEGPROP_STORE_REQUEST_S", bad)
        with pytest.raises(UserError, match="SEGPROP_STORE_REQUEST_S"):
            RetryPolicy.from_environment()


class GenericError(Exception):
    """Named as obstore's: the class's name and the text are all there is to go by."""


class PermissionDeniedError(Exception):
    pass


class AlreadyExistsError(Exception):
    pass


def answered(status: int, code: str = "", url: str = "http://h/b/x?X-Amz-Signature=hunter2") -> str:
    body = f"<Error><Code>{code}</Code></Error>" if code else ""
    return (
        f"Generic S3 error: Error performing GET {url} in 1ms - Server returned non-2xx status code: {status} W: {body}"
        "\n\nDebug source:\nGeneric { timed out, status code: 418 }"
    )


@pytest.mark.parametrize(
    ("error", "kind", "raised"),
    [
        (GenericError(answered(429, "SlowDown")), Kind.PASSING, StorageUnavailable),
        (GenericError(answered(500)), Kind.PASSING, StorageUnavailable),
        (GenericError(answered(503)), Kind.PASSING, StorageUnavailable),
        (GenericError(answered(501)), Kind.OTHER, StoreError),
        (GenericError(answered(400, "InvalidArgument")), Kind.OTHER, StoreError),
        (GenericError(answered(400, "ExpiredToken")), Kind.EXPIRED, StorageDenied),
        (PermissionDeniedError(answered(403, "AccessDenied")), Kind.DENIED, StorageDenied),
        (PermissionDeniedError(answered(403, "RequestTimeTooSkewed")), Kind.DENIED, StorageDenied),
        (FileNotFoundError(answered(404, "NoSuchBucket")), Kind.NO_BUCKET, StoreError),
        (GenericError(answered(507)), Kind.FULL, StorageFull),
        (GenericError(answered(503, "XMinioStorageFull")), Kind.FULL, StorageFull),
        (AlreadyExistsError(answered(409, "ConditionalRequestConflict")), Kind.PASSING, StorageUnavailable),
        (
            GenericError("Generic S3 error: Error performing GET http://h/x in 1ms - HTTP error: connection reset"),
            Kind.PASSING,
            StorageUnavailable,
        ),
        (GenericError("Generic S3 error: HTTP error: operation timed out"), Kind.PASSING, StorageUnavailable),
        (
            GenericError("Error performing PUT http://169.254.169.254/latest/api/token in 1ms - refused"),
            Kind.NO_CREDENTIALS,
            StorageDenied,
        ),
        (
            GenericError("Generic S3 error: Error performing GET http://h/x in 1ms - HTTP error: builder error"),
            Kind.PLAIN_HTTP,
            StorageDenied,
        ),
    ],
)
def test_what_a_server_answers_becomes_a_typed_error_without_its_url(
    error: Exception, kind: Kind, raised: type[StoreError]
) -> None:
    fault = fault_of(error)
    assert fault.kind is kind
    typed = fault.error("read", "s3://b/x", "AWS_", tries=2)
    assert type(typed) is raised
    assert "s3://b/x" in typed.message
    assert "hunter2" not in typed.message
    assert "//h/" not in typed.message


def test_absent_and_existing_objects_are_told_apart() -> None:
    assert fault_of(FileNotFoundError(answered(404, "NoSuchKey"))).kind is Kind.ABSENT
    assert fault_of(AlreadyExistsError(answered(412, "PreconditionFailed"))).kind is Kind.EXISTS


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://[bad",
        "nonsense",
        "http://host:99999999",
        "http://host:port",
        " ",
        "ftp://host",
        "http://",
        "https://a b",
    ],
)
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ConfigError, match=r"AWS_ENDPOINT_URL is no address of a server: .*allowed: https://host"):
        check_endpoints(parse_address("s3://bucket/prefix"))


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9000", "https://[::1]:9000", "https://s3.example/path", ""])
def test_an_endpoint_may_be_any_server(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_USE_FIPS_ENDPOINT", "false")
    check_endpoints(parse_address("s3://bucket/prefix"))


def test_an_endpoint_with_credentials_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:secret@host:port")
    with pytest.raises(ConfigError) as caught:
        check_endpoints(parse_address("s3://bucket/prefix"))
    assert "secret" not in caught.value.message
