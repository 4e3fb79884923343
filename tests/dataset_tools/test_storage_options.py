"""Secrets in settings: refused where they stand in plain text, named where they are wanted, never repeated."""

from __future__ import annotations

from typing import Any

import pytest

from dataset_tools import storage_options
from dataset_tools.errors import Rejected, UserError
from dataset_tools.fetch import FetchSettings, read_bytes, with_retries
from dataset_tools.sources.folder import FolderSettings
from dataset_tools.sources.openimages import OpenImagesSettings
from dataset_tools.storage_options import resolved, scrub

SECRET = "hunter-2+/=x"
QUICK = FetchSettings(attempts=1, backoff_seconds=0)


def settings_of(options: Any, field: str = "root_options") -> OpenImagesSettings:
    return OpenImagesSettings.check({field: options}, origin="build.yaml")


@pytest.mark.parametrize("field", ["root_options", "images_options"])
@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"key": SECRET}, "key"),
        ({"secret": SECRET}, "secret"),
        ({"token": SECRET}, "token"),
        ({"password": 123456789012}, "password"),
        ({"sas_token": SECRET}, "sas_token"),
        ({"account_key": SECRET}, "account_key"),
        ({"connection_string": SECRET}, "connection_string"),
        ({"credential": {"json": SECRET}}, "credential.json"),
        ({"auth": ["user", SECRET]}, "auth.0"),
        ({"cookies": {"session": SECRET}}, "cookies.session"),
        ({"headers": {"X-Mirror": SECRET}}, "headers.X-Mirror"),
        ({"client_kwargs": {"headers": {"Authorization": SECRET}}}, "client_kwargs.headers.Authorization"),
        ({"client_kwargs": {"aws_secret_access_key": SECRET}}, "client_kwargs.aws_secret_access_key"),
        ({"s3_additional_kwargs": {"SSECustomerKey": SECRET}}, "s3_additional_kwargs.SSECustomerKey"),
        ({"s3": [{"apiKey": SECRET}]}, "s3.0.apiKey"),
        ({"client_kwargs": {"endpoint_url": f"https://me:{SECRET}@host/"}}, "client_kwargs.endpoint_url"),
        ({"proxy": f"http://proxy/?sig={SECRET}"}, "proxy"),
        ({"note": f"Bearer {SECRET}"}, "note"),
        ({"secret": {"env": SECRET}}, "secret"),
        ({"secret": {"block": SECRET}}, "secret"),
        ({"secret": {"env": "A", "default": SECRET}}, "secret.env"),
    ],
)
def test_a_plain_secret_is_refused_by_its_place_and_never_repeated(field: str, options: Any, place: str) -> None:
    """At any depth, whatever its type; the line says how to write it."""
    with pytest.raises(UserError) as caught:
        settings_of(options, field)
    message = str(caught.value)
    assert message.startswith(f"build.yaml: {field}: '{place}'")
    assert "{env: " in message or "{block: " in message
    assert SECRET not in message and "123456789012" not in message
    assert "\n" not in message


def test_a_model_made_in_python_repeats_no_secret_either() -> None:
    with pytest.raises(ValueError, match="plain text") as caught:
        OpenImagesSettings(root_options={"key": SECRET})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("field", ["root", "images"])
@pytest.mark.parametrize(
    "url",
    [
        f"https://me:{SECRET}@mirror.example/openimages",
        "https://ghp_0123456789@mirror.example/openimages",
        f"simplecache::https://me:{SECRET}@mirror.example/openimages",
        f"https://mirror.example/openimages?X-Amz-Signature={SECRET}",
        f"https://mirror.example/openimages?se=2030&sig={SECRET}",
        f"https://mirror.example/openimages?token={SECRET}",
    ],
)
def test_a_url_with_a_secret_in_it_is_refused_and_not_repeated(field: str, url: str) -> None:
    with pytest.raises(UserError, match=f"build.yaml: {field}: the URL carries") as caught:
        OpenImagesSettings.check({field: url}, origin="build.yaml")
    assert SECRET not in str(caught.value)
    assert "ghp_" not in str(caught.value)


@pytest.mark.parametrize("field", ["photos", "masks", "backgrounds"])
def test_folders_of_own_photographs_are_held_to_the_same(field: str) -> None:
    values = {"photos": "s3://a/photos/", "masks": "/masks", field: f"https://me:{SECRET}@host/"}
    with pytest.raises(UserError, match=f"build.yaml: {field}: the URL carries") as caught:
        FolderSettings.check(values, origin="build.yaml")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"anon": True},
        {"profile": "me", "requester_pays": True, "token": None},
        {"token": "anon"},
        {"client_kwargs": {"endpoint_url": "http://127.0.0.1:9000", "region_name": "eu-west-1", "timeout": 30}},
        {"config_kwargs": {"signature_version": "s3v4", "s3": {"addressing_style": "path"}}},
        {"headers": {"User-Agent": "mild/0.1"}},
        {"key": {"env": "BUCKET_KEY"}, "secret": {"block": "secret/my-bucket"}},
        {"client_kwargs": {"headers": {"Authorization": {"env": "_MIRROR1"}}}},
    ],
)
def test_harmless_options_and_names_of_secrets_stay_as_they_are(options: dict[str, Any]) -> None:
    made = settings_of(options)
    assert made.root_options == options
    assert made.model_dump(mode="json")["root_options"] == options


def test_a_value_is_looked_up_when_the_file_system_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any depth and each time anew, and only then: the settings hold the name."""
    made = settings_of({"anon": False, "client_kwargs": {"headers": {"Authorization": {"env": "MIRROR_AUTH"}}}})
    for value in (SECRET, "another one"):
        monkeypatch.setenv("MIRROR_AUTH", value)
        assert resolved(made.root_options, "x") == {
            "anon": False,
            "client_kwargs": {"headers": {"Authorization": value}},
        }
    assert "another one" not in made.model_dump_json()


def test_what_is_not_there_to_be_looked_up_is_named() -> None:
    with pytest.raises(UserError, match=r"root_options: a\.key: the environment variable NOT_SET_AT_ALL is not set"):
        resolved({"a": {"key": {"env": "NOT_SET_AT_ALL"}}}, "root_options")


def test_a_block_is_read_once_and_again_when_that_was_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are many; a secret that was renewed is found all the same."""
    asked: list[str] = []

    def read(name: str) -> dict[str, str]:
        asked.append(name)
        return {"headers": f"{SECRET}{len(asked)}"}

    monkeypatch.setattr(storage_options, "_readers", {"block": read})
    now = [1000.0]
    monkeypatch.setattr("dataset_tools.storage_options.time.monotonic", lambda: now[0])
    options = {"client_kwargs": {"block": "secret/read-once"}}
    for _ in range(3):
        assert resolved(options, "x") == {"client_kwargs": {"headers": f"{SECRET}1"}}
    now[0] += storage_options.KEPT_SECONDS + 1
    assert resolved(options, "x") == {"client_kwargs": {"headers": f"{SECRET}2"}}
    assert asked == ["secret/read-once"] * 2


@pytest.mark.parametrize(
    "raised",
    [
        lambda: OSError(f"denied for {SECRET}"),
        lambda: PermissionError(f"GET https://host/?key=hunter-2%2B%2F%3Dx {SECRET!r}"),
        lambda: TypeError(f"unexpected {SECRET}"),
    ],
)
def test_no_message_repeats_what_was_looked_up(monkeypatch: pytest.MonkeyPatch, raised: Any) -> None:
    """A file system that does so, plain or quoted, is not believed."""
    monkeypatch.setenv("MIRROR_AUTH", SECRET)
    resolved({"key": {"env": "MIRROR_AUTH"}}, "x")

    def fail() -> None:
        raise raised()

    with pytest.raises((Rejected, RuntimeError)) as caught:
        with_retries(fail, f"https://host/{SECRET}", QUICK)
    text, link = "", caught.value
    while link is not None:
        text, link = text + str(link) + repr(getattr(link, "message", "")), link.__cause__ or None
    assert "hunter-2" not in text
    assert caught.value.__suppress_context__


def test_secrets_that_nobody_looked_up_are_taken_out_by_their_look() -> None:
    text = scrub("GET https://me:pw@host/a?X-Amz-Signature=abc123&part=2 Authorization: Bearer abc.def-123")
    assert text == "GET https://***@host/a?X-Amz-Signature=***&part=2 Authorization: Bearer ***"


def test_a_missing_variable_is_no_rejection() -> None:
    """It is the user's to mend, and said once, not for every picture."""
    with pytest.raises(UserError, match="NOT_SET_AT_ALL"):
        read_bytes("memory://x", QUICK, {"key": {"env": "NOT_SET_AT_ALL"}})
