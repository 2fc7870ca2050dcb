"""Secrets are redacted or found; other text stays."""

import time
from pathlib import Path

import pytest

from servegrid.bundle.redact import Redactor, find_secrets, find_secrets_in_data
from servegrid.bundle.secrets import scan_tree
from servegrid.bundle.sources import list_source_files

ROOT = Path(__file__).parents[2]
RECORDS = [
    {"node": "sirocco14.site.example", "job": {"SLURM_JOB_NODELIST": "bora[001-002,7]"}},
    {"UserId": "alice(1000)", "AllocNode:Sid": "miriel01:4711", "NodeList": "(null)"},
    {"host": "vm"},
]
REDACTOR = Redactor.from_documents(RECORDS, ["bob", "root"])
HF, KEY = "hf_" + "aB3" * 9, "sk-" + "aB3_" * 8


def test_hosts_are_numbered_by_name_with_and_without_domain() -> None:
    assert REDACTOR.hosts == {
        "bora001": "node-1",
        "bora002": "node-2",
        "bora7": "node-3",
        "miriel01": "node-4",
        "sirocco14": "node-5",
        "sirocco14.site.example": "node-5",
        "vm": "node-6",
    }
    assert REDACTOR.users == {"alice", "bob"}


def test_pseudonyms_of_an_unpacked_bundle_stay_and_are_not_reused() -> None:
    hosts = Redactor.from_documents(
        [{"node": "node-2"}, {"node": "bora1"}, {"node": "bora2"}]
    ).hosts
    assert hosts == {"node-2": "node-2", "bora1": "node-1", "bora2": "node-3"}


AWS = "AKIA" + "Q7" * 8
TEXTS = {
    f"key {AWS}": "key [an AWS key]",
    "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG": "AWS_SECRET_ACCESS_KEY=[a secret]",
    "aws_session_token: FwoGZXIvYXdzEBYaDH7": "aws_session_token: [a secret]",
    "Authorization: Basic dXNlcjpwdw==": "[basic credentials]",
    "redis://:hunter2@db:6379/0": "redis://[a password in a URL]@db:6379/0",
    "postgresql://me:pw@db/x": "postgresql://[a password in a URL]@db/x",
    "password=hunter2 x": "password=[a secret] x",
    'DB_PASSWD: "s3cret!"': 'DB_PASSWD: "[a secret]"',
    "AccountKey=" + "aB3/" * 22: "[Azure Storage Account access key (1)]",
    "xoxb-123456789012-abcdefABCDEF12".lower(): "[Slack Token (1)]",
    "glrt-" + "aB3" * 8: "[GitLab Token (1)]",
    "sk_live_" + "aB3" * 8: "[Stripe Access Key (1)]",
    "SG." + "a" * 22 + "." + "b" * 43: "[SendGrid API Key (1)]",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln": "[a JSON Web Token]",
    f"token {HF}": "token [a Hugging Face token]",
    f"key={KEY}.": "key=[an API key].",
    "Authorization: Bearer abcdefghijklmnop0123": "Authorization: [a bearer token]",
    "https://me:secret@hub/x": "https://[a password in a URL]@hub/x",
    "AKIA" + "A1B2" * 4: "[an AWS key]",
    "a\n-----BEGIN RSA PRIVATE KEY-----\nAAA\n-----END RSA PRIVATE KEY-----\nb": "a\n"
    "[a private key]\nb",
    "--api-key abcdefgh12345678": "--api-key [a secret]",
    "HF_TOKEN=abcdefgh12345678": "HF_TOKEN=[a secret]",
    '"api_key": "abcdefgh12345678"': '"api_key": "[a secret]"',
    "/home/carol/.cache/x": "/home/user/.cache/x",
    "in '/Users/carol'": "in '/Users/user'",
    "/home/user-7/x": "/home/user/x",
    "/beegfs/alice/x, /scratch/bob": "/beegfs/user/x, /scratch/user",
    "UserId=alice(1000) alice@miriel01": "UserId=user(1000) user@node-4",
    "on sirocco14: up": "on node-5: up",
    "<td>vm</td><td>bora7</td>": "<td>node-6</td><td>node-3</td>",
    "<td>vm, bora7</td><td>a vm, or so</td>": "<td>node-6, node-3</td><td>a vm, or so</td>",
    "sirocco14.site.example:8000": "node-5:8000",
    "bora001,bora002 and bora7": "node-1,node-2 and node-3",
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_redacted(text: str) -> None:
    assert REDACTOR.redact_text(text) == TEXTS[text]
    assert REDACTOR.redact_text(TEXTS[text]) == TEXTS[text]


@pytest.mark.parametrize(
    "text",
    [
        "vm is too short to differ from a word",
        "a-bora001 bora0011 bora001-x my.bora001",
        "tokens: 123456789012345678901234567890",
        "max_tokens=100 token_ns tokenizer=abcdefgh12345678",
        "/home/user/x root user/x alice /alices/x",
        "hf_overrides the deadline is-in-task-format-and-other-words",
    ],
)
def test_other_words_stay(text: str) -> None:
    assert REDACTOR.redact_text(text) == text
    assert list(find_secrets(text)) == []


def test_the_time_grows_with_the_length_only() -> None:
    """The time grew with the square of the length: 1 MB without spaces took minutes."""
    for text in ("a-" * 125_000, "token" * 50_000, "password_" * 25_000, "://a:" * 50_000):
        started = time.process_time()
        REDACTOR.redact_text(text)
        assert time.process_time() - started < 5


def test_a_range_of_a_billion_hosts_is_left_as_it_is() -> None:
    hosts = Redactor.from_documents([{"NodeList": "a[1-999999999]"}]).hosts
    assert len(hosts) < 5


def test_json_values_of_host_keys_are_redacted_and_a_spec_stays() -> None:
    data = {
        "host": "vm",
        "job": {"SLURM_JOB_NODELIST": "bora[001-002]"},
        "NodeList": "(null)",
        "AllocNode:Sid": "miriel01:4711",
        "owner": "alice",
        "api_key": "short",
        "paths": ["/home/alice/x", 1, None],
        "spec": {"checkpoint": "/home/alice/m"},
    }
    assert REDACTOR.redact_data(data) == {
        "host": "node-6",
        "job": {"SLURM_JOB_NODELIST": "node-1,node-2"},
        "NodeList": "(null)",
        "AllocNode:Sid": "node-4:4711",
        "owner": "user",
        "api_key": "[a secret]",
        "paths": ["/home/user/x", 1, None],
        "spec": {"checkpoint": "/home/alice/m"},
    }


def test_secrets_are_reported_by_kind_without_repeating_them() -> None:
    text = f"{HF} {KEY} /home/carol"
    found = list(find_secrets(text))
    assert found == ["a Hugging Face token", "an API key", "a user name in a path"]
    data = {"engine_args": {"api-key": "short"}, "x": [f"/home/carol {HF}"]}
    assert list(find_secrets_in_data(data)) == [
        "a value of `api-key`",
        "a Hugging Face token",
        "a user name in a path",
    ]
    assert list(find_secrets_in_data(REDACTOR.redact_data(data))) == []


def test_the_sources_that_go_into_a_bundle_have_no_secrets() -> None:
    texts = {name: path.read_text(encoding="utf-8") for name, path in list_source_files(ROOT)}
    assert len(texts) > 100
    found = {name: list(find_secrets(text)) for name, text in texts.items()}
    assert {name: kinds for name, kinds in found.items() if kinds} == {}


def test_images_are_scanned_for_readable_text_only(tmp_path: Path) -> None:
    chance = b"\x89PNG\r\n\x1a\n\0\0" + bytes(range(256)) + b"x://\xe9\x01k:\xff\xa0y@\x07"
    (tmp_path / "plot.png").write_bytes(chance)
    assert list(scan_tree(tmp_path)) == []
    (tmp_path / "plot.png").write_bytes(chance + b"tEXtComment\0" + HF.encode() + b"\0")
    assert list(scan_tree(tmp_path)) == ["plot.png: a Hugging Face token"]
    # As text, the same characters are a secret.
    (tmp_path / "plot.png").unlink()
    (tmp_path / "a.log").write_bytes(b"x://k:y@host")
    assert list(scan_tree(tmp_path)) == ["a.log: a password in a URL"]
